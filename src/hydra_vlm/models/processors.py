"""The processor of a saved model, of a text decoder its tokenizer.

Many processors hold a video half that transformers builds with torchvision alone. Only images are read here, so where
torchvision is not installed a stand-in takes the video half's place, which knows its settings and can do nothing.
"""

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedConfig, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import transformers_module
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin

from hydra_vlm.errors import CheckpointError, ConfigError
from hydra_vlm.files import reading
from hydra_vlm.models.folder import require_tokenizer_possible
from hydra_vlm.models.tokenizer_trial import require_working
from hydra_vlm.reading import read_object


class VideoSettings(VideoProcessorMixin):
    """The stored settings of a video processor, kept so that saving the processor writes them unchanged."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(**settings)
        self.settings = settings
        # A processor checks the class of its parts by name, and transformers hides this name without torchvision.
        if not hasattr(transformers_module, "VideoProcessorMixin"):
            transformers_module.VideoProcessorMixin = VideoProcessorMixin

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)


def load_processor(folder: Path, config: PreTrainedConfig) -> Any:
    """The processor in `folder`.

    Raises:
        ConfigError: it needs a package that is not installed, the folder holds none, or its tokenizer is none.
    """
    require_tokenizer_possible(folder)
    remedy = "put the files of its tokenizer and image processor beside config.json"
    with reading(folder, remedy, ConfigError):
        try:
            processor = _processor(folder, config)
        except ImportError as problem:
            raise ConfigError(f"the processor in {folder} cannot be loaded: {' '.join(str(problem).split())}") from None
        except (OSError, ValueError) as problem:
            told = " ".join(str(problem).split())[:400]
            raise ConfigError(f"{folder} holds no processor that can be loaded ({told}): {remedy}") from None
    require_working(getattr(processor, "tokenizer", processor), folder)
    return processor


def _processor(folder: Path, config: PreTrainedConfig) -> Any:
    processor_class = PROCESSOR_MAPPING.get(type(config), None)
    if processor_class and "video_processor" in processor_class.get_attributes() and not is_torchvision_available():
        return _without_video(processor_class, folder)
    return AutoProcessor.from_pretrained(folder, trust_remote_code=False)


def require_own_processor(folder: Path, processor: Any, model: Any) -> None:
    """Every token that the processor can write has a row in the model's embeddings, and both mean the same image token.

    An image token may lie behind the embeddings: features take its place before anything is looked up.

    Raises:
        CheckpointError: the tokenizer knows more tokens than the model, or another image token.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if "" in tokenizer.all_special_tokens:
        raise CheckpointError(
            f"model {folder}: its tokenizer has an empty special token: put back the model's own files"
        )
    tokens = [getattr(side, "image_tokens", None) for side in (processor, model.config)]
    if None not in tokens and tokens[0] != tokens[1]:
        raise CheckpointError(
            f"model {folder}: its processor writes {tokens[0]} tokens for an image, its configuration says "
            f"{tokens[1]}: put back the processor that the model was saved with"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    image = getattr(model.config, "image_token_id", getattr(model.config, "image_token_index", None))
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows and number != image}
    if beyond:
        token = min(beyond, key=lambda each: beyond[each])
        raise CheckpointError(
            f"model {folder}: its tokenizer writes {token!r} as {beyond[token]}, its embeddings have rows 0 to "
            f"{rows - 1}: the tokenizer is another model's. Put the model's own beside config.json, or resize the "
            "model's embeddings and save it again."
        )
    # Gemma 3's processor means the mark that opens an image by this name, its tokenizer the image's own.
    named = [getattr(each, "image_token_id", None) for each in (processor, tokenizer)]
    theirs = [number for number in named if isinstance(number, int)]
    if isinstance(image, int) and theirs and image not in theirs:
        raise CheckpointError(
            f"model {folder}: config.json names {image} as the image token, the processor writes "
            f"{theirs[0]}: they are of two models. Put the model's own processor beside config.json."
        )


def _without_video(processor_class: type[ProcessorMixin], folder: Path) -> Any:
    """The processor from its parts, the video half by its stored settings."""
    stored, _ = processor_class.get_processor_dict(folder)
    parts: list[Any] = []
    for name in processor_class.get_attributes():
        if name == "video_processor":
            parts.append(VideoSettings(stored.get(name) or _video_settings(folder)))
        else:
            auto = AutoTokenizer if name == "tokenizer" else AutoImageProcessor
            parts.append(auto.from_pretrained(folder, trust_remote_code=False))
    return processor_class.from_args_and_dict(parts, stored)


def _video_settings(folder: Path) -> dict[str, Any]:
    """From the files in which older versions of transformers kept them."""
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            found: dict[str, Any] = read_object(folder / name)
            return found
    return {}
