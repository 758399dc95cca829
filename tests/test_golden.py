"""MobileVLM's numbers: converted checkpoints against the architecture's formulas and the reference code's outputs.

Three sources that know nothing of this package's model:

- `plain_mobilevlm.py`, the formulas on the authors' state dict, for any weights, sizes and batches;
- numbers written down here: made once with those formulas in float64 from weights that a formula gives, too;
- tensors recorded from the reference code (Meituan-AutoML/MobileVLM at 688fdec, transformers 4.33.1), where the folder
  with them lies beside the project.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from authors import TOWER, authors_config, authors_shapes, fill, same, save_authors, waves
from hydra_vlm.models.mobilevlm import MobileVLMForConditionalGeneration, pad_to_square
from hydra_vlm.models.mobilevlm.conversion import to_hydra, to_original
from plain_mobilevlm import IMAGE, forward, project

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
recorded = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no recorded reference outputs beside the project")
VERSIONS = pytest.mark.parametrize("version", ["v1", "v2"])
CLOSE = {"atol": 1e-5, "rtol": 1e-5}

# Ragged rows: an image in front, none, an image within, two images.
ROWS = ([1, IMAGE, 7, 8, 9], [1, 11, 12, 13, 14, 15, 16, 2], [1, 5, 6, IMAGE, 300, 17], [1, IMAGE, 30, IMAGE, 31, 2])
LABELS = [[token if place > 2 and token != IMAGE else -100 for place, token in enumerate(row)] for row in ROWS]


def converted(folder: Path, version: str, weights: dict[str, Tensor]) -> MobileVLMForConditionalGeneration:
    to_hydra(save_authors(folder / version / "theirs", version, weights), folder / version / "ours")
    return AutoModelForImageTextToText.from_pretrained(folder / version / "ours").eval()


def batch(rows: Any, labels: Any, image_token: int, copies: int = 144) -> dict[str, Tensor]:
    """Rows padded on the right, -200 written `copies` times as the placeholder."""
    expanded = []
    for ids, marks in zip(rows, labels, strict=True):
        pairs = list(zip(ids, marks, strict=True))
        expanded.append(
            [p for i, m in pairs for p in ([(image_token, -100)] * copies if i == IMAGE else [(int(i), int(m))])]
        )
    length = max(map(len, expanded))
    padded = [row + [(0, -100)] * (length - len(row)) for row in expanded]
    ids, marks = torch.tensor(padded).unbind(-1)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in expanded])
    return {"input_ids": ids, "labels": marks, "attention_mask": mask}


def doubled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in weights.items()}


@VERSIONS
def test_a_mixed_ragged_batch_is_each_row_by_the_formulas(version: str, tmp_path: Path) -> None:
    weights = fill(authors_shapes(version), seed=3)
    model, pixels = converted(tmp_path, version, weights), torch.randn(4, 3, 336, 336)
    with torch.no_grad():
        projected = model.model.project(model.encode_images(pixels))
        output = model(**batch(ROWS, LABELS, model.config.image_token_id), pixel_values=pixels)
    state, config = doubled(weights), authors_config(version)
    torch.testing.assert_close(projected.double(), project(pixels.double(), state, config, TOWER), **CLOSE)
    logits, loss = forward(state, config, TOWER, ROWS, LABELS, pixels.double())
    for row, expected in enumerate(logits):
        torch.testing.assert_close(output.logits[row, : len(expected)].double(), expected, **CLOSE)
    torch.testing.assert_close(output.loss.double(), loss, **CLOSE)


# Made with plain_mobilevlm.forward in float64: weights `waves(authors_shapes(version))`, ROWS and LABELS, pixels
# cos(0.1 i) over four images; loss, two projected features and a logit of the first row's last position.
WRITTEN = {
    "v1": (7.18351641, 1.109226, 0.48622964, -0.62378688),
    "v2": (7.65870874, -0.92066503, -0.35551551, 0.0057055),
}


@cache
def wave_pixels() -> Tensor:
    return torch.cos(0.1 * torch.arange(4 * 3 * 336 * 336, dtype=torch.float64)).reshape(4, 3, 336, 336)


@VERSIONS
def test_written_numbers(version: str, tmp_path: Path) -> None:
    weights = waves(authors_shapes(version))
    model = converted(tmp_path, version, {name: tensor.float() for name, tensor in weights.items()})
    pixels = wave_pixels().float()
    with torch.no_grad():
        projected = model.model.project(model.encode_images(pixels))
        output = model(**batch(ROWS, LABELS, model.config.image_token_id), pixel_values=pixels)
    seen = (output.loss, projected[0, 0, 0], projected[3, 143, 31], output.logits[0, 147, 5])
    assert [float(value) for value in seen] == pytest.approx(WRITTEN[version], abs=1e-5, rel=1e-5)


@recorded
@VERSIONS
def test_recorded_features_logits_and_loss(version: str, tmp_path: Path) -> None:
    to_hydra(GOLDEN / version, tmp_path / "ours")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").eval()
    golden = load_file(GOLDEN / version / "golden.safetensors")
    pixels = load_file(GOLDEN / "pixels.safetensors")["pixel_values"]
    lengths = golden["attention_mask"].sum(1).tolist()
    rows = [row[:n] for row, n in zip(golden["input_ids"].tolist(), lengths, strict=True)]
    labels = [row[:n] for row, n in zip(golden["labels"].tolist(), lengths, strict=True)]
    with torch.no_grad():
        features = model.model.project(model.encode_images(pixels))
        output = model(**batch(rows, labels, model.config.image_token_id), pixel_values=pixels)
    torch.testing.assert_close(features, golden["image_features"], **CLOSE)
    for row, length in enumerate(lengths):
        real = length + 143
        torch.testing.assert_close(output.logits[row, :real], golden["logits"][row, :real], **CLOSE)
    torch.testing.assert_close(output.loss.reshape(1), golden["loss"], **CLOSE)


@recorded
@VERSIONS
def test_the_formulas_give_the_recorded_numbers(version: str) -> None:
    config = json.loads((GOLDEN / version / "config.json").read_text())
    vision = json.loads((GOLDEN / "clip-tiny" / "config.json").read_text())
    state = doubled(torch.load(GOLDEN / version / "pytorch_model.bin", weights_only=True))
    golden = load_file(GOLDEN / version / "golden.safetensors")
    lengths = golden["attention_mask"].sum(1).tolist()
    rows = [row[:n] for row, n in zip(golden["input_ids"].tolist(), lengths, strict=True)]
    labels = [row[:n] for row, n in zip(golden["labels"].tolist(), lengths, strict=True)]
    pixels = load_file(GOLDEN / "pixels.safetensors")["pixel_values"].double()
    logits, loss = forward(state, config, vision, rows, labels, pixels)
    for row, expected in enumerate(logits):
        torch.testing.assert_close(expected.float(), golden["logits"][row, : len(expected)], **CLOSE)
    torch.testing.assert_close(loss.float().reshape(1), golden["loss"], **CLOSE)


@recorded
@VERSIONS
def test_recorded_checkpoints_come_back_to_the_bit(version: str, tmp_path: Path) -> None:
    to_hydra(GOLDEN / version, tmp_path / "ours")
    to_original(tmp_path / "ours", tmp_path / "back")
    before, after = (
        torch.load(folder / "pytorch_model.bin", weights_only=True) for folder in (GOLDEN / version, tmp_path / "back")
    )
    assert same(before, after)
    keys = json.loads((GOLDEN / version / "config.json").read_text())
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: back.get(key) for key in keys} == keys | {"mm_vision_tower": "vision_tower"}


@recorded
def test_recorded_pixels(tmp_path: Path) -> None:
    to_hydra(GOLDEN / "v2", tmp_path / "ours")
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "ours")
    images = [pad_to_square(Image.open(GOLDEN / "images" / name), (122, 116, 104)) for name in ("0.png", "1.png")]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    # In units of a standard deviation; resampling code moved between versions, so 1e-2 is what may differ.
    torch.testing.assert_close(pixels, load_file(GOLDEN / "pixels.safetensors")["pixel_values"], atol=1e-2, rtol=0)
