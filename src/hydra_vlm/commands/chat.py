"""`hydra-vlm chat`: one question about one image (or none), one answer."""

from pathlib import Path

import transformers

from hydra_vlm.benchmarks.generation import Answering, answer
from hydra_vlm.benchmarks.protocol import Example
from hydra_vlm.data.features import load_image
from hydra_vlm.data.readers import open_reader
from hydra_vlm.data.templates import require_plain_text, require_template
from hydra_vlm.errors import ConfigError
from hydra_vlm.lora import load_adapter
from hydra_vlm.models.loading import load_model, resolve_device
from hydra_vlm.models.quantization import NONE
from hydra_vlm.stored_adapter import base_quantization, read_adapter


def chat(
    model: str,
    question: str,
    image: Path | None,
    adapter: Path | None,
    template: str,
    max_new_tokens: int,
    device: str,
    decoder_pattern: str | None,
    other_base: bool = False,
) -> str:
    """The greedy answer of a model, with an adapter (on the base as it was quantised for it) or as it is.

    Raises:
        HydraError: an empty question, an unreadable image, or what loading finds wrong.
    """
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    if not question.strip():
        raise ConfigError("the question is empty: write it last, in quotes")
    if image is not None:
        load_image(str(image))
    require_template(template)
    if adapter is not None:
        read_adapter(adapter)  # before the model is loaded
    quantization = base_quantization(adapter, resolve_device(device)) if adapter is not None else NONE
    loaded = load_model(model, device, decoder_pattern, quantization=quantization)
    reader = open_reader(loaded.processor, template)
    require_plain_text(question, reader.tokenizer, "the question")
    parts = loaded.parts if decoder_pattern else None
    asked = load_adapter(loaded.model, adapter, parts, other_base=other_base) if adapter else loaded.model
    example = Example("chat", str(image) if image else None, question.strip(), ())
    return answer(asked, reader, [example], Answering(1, max_new_tokens))[0].text
