"""The same question to the adapter and to what was exported: how far apart may the logits be, and how far are they.

A tolerance is a share of the largest logit: float32 carries seven digits whatever their size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from hydra_vlm.data.readers import Reader, open_reader
from hydra_vlm.errors import AdapterError, ConfigError
from hydra_vlm.export.source import Source
from hydra_vlm.lora import load_adapter
from hydra_vlm.models.loading import LoadedModel
from hydra_vlm.models.quantization import NONE

QUESTION = "What is in the picture? Name the colours, the shapes and where they lie."
PICTURE_SIZE = (160, 112)

EXACT = 1e-5
"""For an adapter in another form over the same float32 weights."""

MERGED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""For weights with the adapter added in, by the dtype in which they are stored."""


@dataclass(frozen=True)
class Probe:
    """Keyword arguments of a model's forward, and what they are in words."""

    inputs: Mapping[str, Tensor]
    text: str


@dataclass(frozen=True)
class Comparison:
    """The largest difference of two models' logits, the largest that was allowed, and on what it was seen."""

    difference: float
    allowed: float
    text: str

    def __str__(self) -> str:
        return f"{self.text}: logits differ by {self.difference:.2g} at most, {self.allowed:.2g} is allowed"


def make_probe(loaded: LoadedModel) -> Probe:
    """Two rows with a picture each where the model takes pictures, one row of text where it takes none."""
    place = next(loaded.model.parameters())
    reader = _reader(loaded.processor)
    if loaded.parts.tower is None:
        inputs, kind = reader.prompts([reader.prompt(QUESTION, False)], [None]), "of text alone"
    else:
        with TemporaryDirectory() as scratch:
            paths = [str(Path(scratch) / f"{number}.png") for number in (0, 1)]
            for number, path in enumerate(paths):
                _picture(number).save(path)
            inputs, kind = reader.prompts([reader.prompt(QUESTION, True)] * 2, paths), "with a picture each"
    rows, tokens = inputs["input_ids"].shape
    moved = {k: v.to(place.device, place.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
    return Probe(moved, f"{rows} row{'s' if rows > 1 else ''} of {tokens} tokens {kind}")


def logits(model: nn.Module, probe: Probe) -> Tensor:
    """Float32 logits [rows, tokens, vocabulary], in evaluation mode, on the CPU."""
    with torch.no_grad():
        answer: Tensor = model.eval()(**probe.inputs).logits
    return answer.float().cpu()


def compare(before: Tensor, after: Tensor, tolerance: float, probe: Probe) -> Comparison:
    """Raises AdapterError when the logits differ by more than `tolerance` of the largest, or are not finite."""
    if before.shape != after.shape:
        raise AdapterError(f"the export gives logits {tuple(after.shape)}, the adapter {tuple(before.shape)}.")
    largest = float(before.abs().max())
    seen = Comparison(
        float((after - before).abs().max()),
        tolerance * largest,
        f"{probe.text}, {tolerance:.0e} of the largest logit {largest:.3g}",
    )
    if not seen.difference <= seen.allowed:  # also true for NaN
        raise AdapterError(f"the export differs from the adapter: {seen}. Nothing was written.")
    return seen


def adapted_logits(source: Source) -> tuple[LoadedModel, Tensor, Probe]:
    """What the adapter itself answers on the base it was trained on, which carries it afterwards."""
    loaded = source.as_trained()
    probe = make_probe(loaded)
    adapter = load_adapter(loaded.model, source.folder, loaded.parts, other_base=source.other_base)
    return loaded, logits(adapter, probe), probe


def quantization_notes(source: Source) -> tuple[str, ...]:
    """What has to be said of an adapter that was trained on four-bit weights: how it differs on the full ones."""
    if source.quantization == NONE:
        return ()
    said = f"the adapter was trained on the base with quantization={source.quantization}"
    if not source.is_quantized:
        return (f"{said}; without bitsandbytes it was checked on the full weights alone, where it answers otherwise",)
    _, trained, probe = adapted_logits(source)
    _, plain, _ = adapted_logits(replace(source, quantization=NONE))
    difference, largest = float((plain - trained).abs().max()), float(trained.abs().max())
    on_full = f"on the full weights its logits differ by {difference:.2g} ({probe.text}, largest {largest:.3g})"
    return (f"{said}, on which it was checked: {on_full}",)


def _reader(processor: Any) -> Reader:
    """The model's own way of asking; any other will do where it has none, since both sides are asked alike."""
    try:
        return open_reader(processor)
    except ConfigError:
        return open_reader(processor, "v1")


def _picture(colour: int) -> Image.Image:
    """A gradient; the two pictures run in different directions."""
    width, height = PICTURE_SIZE
    ramp = Image.linear_gradient("L").resize((width, height))
    channels = [ramp, ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT), ramp.rotate(90 + 90 * colour).convert("L")]
    return Image.merge("RGB", channels[colour:] + channels[:colour])
