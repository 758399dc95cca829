"""MobileVLM's processor: padding colour and placement, placeholders, left padding, saving."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoProcessor, CLIPVisionConfig, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hydra_vlm.models.mobilevlm import MobileVLMConfig, MobileVLMProcessor, pad_to_square

MEAN_COLOUR = (122, 116, 104)
WORDS = ["<unk>", "<s>", "</s>", "what", "colour", "is", "it", "?", "red", "user", ":"]


def word_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """One token a word, <s> in front, as LLaMA's tokenizer puts it."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def tiny_processor(image_aspect_ratio: str = "pad") -> MobileVLMProcessor:
    config = MobileVLMConfig(
        vision_config=CLIPVisionConfig(image_size=32, patch_size=8),
        image_aspect_ratio=image_aspect_ratio,  # type: ignore[arg-type]
    )
    return MobileVLMProcessor.from_config(config, word_tokenizer())


@pytest.mark.parametrize(
    ("size", "box"),
    [((5, 2), (0, 1, 5, 3)), ((2, 5), (1, 0, 3, 5)), ((8, 4), (0, 2, 8, 6)), ((3, 3), (0, 0, 3, 3))],
)
def test_image_is_centred_on_the_mean_colour(size: tuple[int, int], box: tuple[int, ...]) -> None:
    image = Image.new("RGB", size, (250, 10, 30))
    padded = np.array(pad_to_square(image, tiny_processor().pad_colour))
    expected = np.full((max(size), max(size), 3), MEAN_COLOUR, dtype=np.uint8)
    left, top, right, bottom = box
    expected[top:bottom, left:right] = (250, 10, 30)
    assert np.array_equal(padded, expected)


def test_padding_turns_any_mode_into_rgb() -> None:
    for mode in ("L", "RGBA", "P"):
        assert pad_to_square(Image.new(mode, (4, 2)), MEAN_COLOUR).mode == "RGB"


def test_pixels_are_normalised_and_padding_is_near_zero() -> None:
    pixels = tiny_processor().pixels([Image.new("RGB", (64, 16), (255, 255, 255))])
    assert pixels.shape == (1, 3, 32, 32)
    mean, std = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073]),
        torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )
    torch.testing.assert_close(pixels[0, :, 16, 16], (1 - mean) / std, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pixels[0, :, 0, 0], (torch.tensor(MEAN_COLOUR) / 255 - mean) / std, atol=1e-5, rtol=1e-5)


def test_square_aspect_crops_the_middle() -> None:
    image = Image.new("RGB", (96, 32), (0, 0, 255))
    image.paste((255, 255, 255), (32, 0, 64, 32))
    pixels = tiny_processor("square").pixels([image])
    assert torch.allclose(pixels, pixels[:, :, :1, :1].expand_as(pixels))


def test_each_mark_becomes_an_images_worth_of_placeholders() -> None:
    processor = tiny_processor()
    image = processor.image_token_id
    batch = processor(text=["user : <image>\nwhat colour ?"], images=[Image.new("RGB", (8, 8))])
    assert batch["input_ids"].tolist() == [[1, 9, 10, image, image, image, image, 3, 4, 7]]
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}


def test_rows_are_padded_on_the_left_and_text_rows_may_be_mixed_in() -> None:
    processor = tiny_processor()
    batch = processor(text=["is it red ?", "<image> what ?"], images=[Image.new("RGB", (8, 4))])
    image = processor.image_token_id
    assert batch["input_ids"].tolist() == [[0, 0, 1, 5, 6, 8, 7], [1, image, image, image, image, 3, 7]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1, 1], [1] * 7]
    assert batch["pixel_values"].shape[0] == 1
    right = processor(text=["is it", "is it red"], padding_side="right")
    assert right["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_one_text_and_one_image_need_no_lists() -> None:
    batch = tiny_processor()(images=Image.new("RGB", (8, 8)), text="<image> what")
    assert batch["input_ids"].shape == (1, 6)
    assert "pixel_values" not in tiny_processor()(text="what colour")


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        (["<image> what", "is it"], 2, r"2 images for 1 <image> marks \(per text: \[1, 0\]\)"),
        (["<image> <image>"], 1, "1 images for 2 <image> marks"),
        (["<image>"], 0, "0 images for 1 <image> marks"),
    ],
)
def test_marks_and_images_must_agree(text: list[str], images: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_processor()(text=text, images=[Image.new("RGB", (8, 8))] * images)


def test_an_image_token_the_tokenizer_knows_is_kept() -> None:
    known = word_tokenizer([*WORDS, "<image>"])
    known.add_tokens(["<image>"], special_tokens=True)
    assert MobileVLMProcessor(CLIPImageProcessorPil(), known, 4).image_token_id == len(WORDS)
    assert tiny_processor().image_token_id == len(WORDS)  # unknown: the first id after the vocabulary


def test_pixels_come_from_pil_whichever_backend_was_loaded() -> None:
    ours = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    other = SimpleNamespace(to_dict=ours.to_dict)  # what torchvision's backend looks like from here
    processor = MobileVLMProcessor(other, word_tokenizer(), 4)  # type: ignore[arg-type]
    assert isinstance(processor.image_processor, CLIPImageProcessorPil)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    assert torch.equal(processor.pixels([image]), ours([image], return_tensors="pt")["pixel_values"])


def test_the_published_size_takes_144_positions() -> None:
    processor = MobileVLMProcessor.from_config(MobileVLMConfig(), word_tokenizer())
    batch = processor(text="<image>", images=Image.new("RGB", (20, 12)))
    assert (batch["input_ids"] == processor.image_token_id).sum() == 144
    assert batch["pixel_values"].shape == (1, 3, 336, 336)


def test_saved_and_loaded_by_the_auto_class_it_is_the_same_processor(tmp_path: Path) -> None:
    processor = tiny_processor("square")
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, local_files_only=True)
    assert isinstance(loaded, MobileVLMProcessor)
    assert isinstance(loaded.image_processor, CLIPImageProcessorPil)
    assert (loaded.image_tokens, loaded.image_aspect_ratio) == (4, "square")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    text = ["user : <image>\nwhat colour ?", "is it red ?"]
    before, after = processor(text=text, images=[image]), loaded(text=text, images=[image])
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert loaded.batch_decode(after["input_ids"], skip_special_tokens=True) == [
        "user : what colour ?",
        "is it red ?",
    ]
