"""MobileVLM's processor: text with `<image>` marks and images in, tensors for the model out."""

from collections.abc import Sequence
from typing import Any, Literal

from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hydra_vlm.models.mobilevlm.configuration import MobileVLMConfig
from hydra_vlm.models.mobilevlm.towers import tower_kind

IMAGE_TOKEN = "<image>"


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Centre an image on a square canvas of its longer side L, at offset floor((L - s) / 2).

    The image is converted to RGB first; a square image is returned without padding.
    """
    image = image.convert("RGB")
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


class MobileVLMProcessor(ProcessorMixin):
    """A tokenizer and a CLIP image processor that agree on how many positions an image takes.

    `image_tokens` is the configuration's property of that name. A tokenizer that does not know
    `<image>` gets it as a special token, at the first id after its vocabulary.
    """

    tokenizer: PreTrainedTokenizerFast
    image_processor: CLIPImageProcessorPil

    def __init__(
        self,
        image_processor: CLIPImageProcessorPil,
        tokenizer: PreTrainedTokenizerFast,
        image_tokens: int = 144,
        image_aspect_ratio: Literal["pad", "square"] = "pad",
        chat_template: str | None = None,
    ) -> None:
        self.image_tokens = image_tokens
        self.image_aspect_ratio = image_aspect_ratio
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if not isinstance(image_processor, CLIPImageProcessorPil):
            # Where torchvision is installed the Auto classes load its backend, whose bicubic pixels differ.
            image_processor = CLIPImageProcessorPil.from_dict(image_processor.to_dict())
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_config(
        cls, config: MobileVLMConfig, tokenizer: PreTrainedTokenizerFast, **image_settings: Any
    ) -> "MobileVLMProcessor":
        """The processor of a model: resize and crop to the tower's image size, its kind's normalisation.

        `image_settings` such as `image_mean` or `resample` go to the image processor in place of the kind's own.
        """
        side, kind = config.vision_config.image_size, tower_kind(config.vision_config)
        settings = {"image_mean": list(kind.image_mean), "image_std": list(kind.image_std), **image_settings}
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        return cls(
            CLIPImageProcessorPil(**sizes, **settings), tokenizer, config.image_tokens, config.image_aspect_ratio
        )

    @property
    def pad_colour(self) -> tuple[int, int, int]:
        """The mean colour of the image processor as 0-255 integers, (122, 116, 104) for CLIP."""
        red, green, blue = (int(mean * 255) for mean in self.image_processor.image_mean)
        return red, green, blue

    def pixels(self, images: Sequence[Image.Image], return_tensors: str = "pt") -> Any:
        """Squared, resized and normalised images [n, 3, H, W]."""
        if self.image_aspect_ratio == "pad":
            images = [pad_to_square(image, self.pad_colour) for image in images]
        return self.image_processor(list(images), return_tensors=return_tensors)["pixel_values"]

    def expand(self, text: str) -> str:
        """The text with as many copies of each `<image>` as an image has decoder positions."""
        return text.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.image_tokens)

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image] | None = None,
        text: str | Sequence[str] = "",
        padding: bool | str = True,
        padding_side: Literal["left", "right"] = "left",
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Tensors for the model: `input_ids` and `attention_mask` [B, L], `pixel_values` [n, 3, H, W].

        Images belong to the `<image>` marks of the rows in reading order. Rows are padded on the left,
        as generation needs. Further arguments go to the tokenizer.

        Raises:
            ValueError: there are not as many images as `<image>` marks.
        """
        rows = [text] if isinstance(text, str) else list(text)
        pictures = [images] if isinstance(images, Image.Image) else list(images or ())
        marks = [row.count(IMAGE_TOKEN) for row in rows]
        if sum(marks) != len(pictures):
            raise ValueError(
                f"{len(pictures)} images for {sum(marks)} {IMAGE_TOKEN} marks (per text: {marks}): "
                f"write {IMAGE_TOKEN} exactly once where each image belongs."
            )
        tokens = self.tokenizer(
            [self.expand(row) for row in rows],
            padding=padding,
            padding_side=padding_side,
            return_tensors=return_tensors,
            **kwargs,
        )
        data = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        if pictures:
            data["pixel_values"] = self.pixels(pictures, return_tensors)
        return BatchFeature(data)
