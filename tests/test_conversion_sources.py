"""Towers, projectors and LoRA folders that a conversion takes from elsewhere."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from authors import (
    LAYERS,
    TOWER,
    TOWER_PREFIX,
    authors_config,
    decoder_shapes,
    fill,
    projector_shapes,
    refused,
    same,
    save_authors,
    theirs_in,
    tower_shapes,
)
from hydra_vlm.errors import ConfigError
from hydra_vlm.models.mobilevlm.conversion import to_hydra, to_original


def clip_folder(folder: Path, whole: bool) -> dict[str, Tensor]:
    """A CLIP model in hub format, or its vision half; returns its tower weights under the authors' names."""
    tower = fill(tower_shapes("vision_model."), seed=5)
    text = {"text_model.final_layer_norm.weight": torch.ones(4), "logit_scale": torch.ones(())}
    buffers = {"vision_model.embeddings.position_ids": torch.arange(577)[None]}
    folder.mkdir()
    config = {"model_type": "clip", "vision_config": TOWER, "text_config": {}} if whole else TOWER
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tower | buffers | (text if whole else {}), folder / "model.safetensors")
    return {name.replace("vision_model.", TOWER_PREFIX): tensor for name, tensor in tower.items()}


@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_without_a_tower_asks_for_one_and_takes_it(whole: bool, tmp_path: Path) -> None:
    weights = fill(decoder_shapes() | projector_shapes("v2"))
    source = save_authors(tmp_path / "theirs", "v2", weights, authors_config("v2", mm_vision_tower="openai/clip-x"))
    save_authors(tmp_path / "known", "v2", weights)
    refused("holds no weights of the vision tower: give --vision FOLDER", tmp_path / "known", tmp_path / "ours")
    tower = clip_folder(tmp_path / "clip", whole)
    done = to_hydra(source, tmp_path / "ours", vision=tmp_path / "clip")
    assert len(done.left) == (3 if whole else 1)
    to_original(tmp_path / "ours", tmp_path / "back")
    assert same(theirs_in(tmp_path / "back"), weights | tower)
    refused("holds no config.json", source, tmp_path / "x", ConfigError, vision=tmp_path)
    refused("holds a mobilevlm model", source, tmp_path / "x", ConfigError, vision=source)


def test_a_checkpoints_own_tower_is_kept(tmp_path: Path) -> None:
    source = save_authors(tmp_path / "theirs", "v2")
    clip_folder(tmp_path / "clip", whole=True)
    done = to_hydra(source, tmp_path / "ours", vision=tmp_path / "clip")
    assert any("own tower is kept" in note for note in done.notes)
    to_original(tmp_path / "ours", tmp_path / "back")
    assert same(theirs_in(tmp_path / "back"), theirs_in(source))


def test_a_stage_one_projector_replaces_the_checkpoints(tmp_path: Path) -> None:
    source = save_authors(tmp_path / "theirs", "v1")
    trained = fill(projector_shapes("v1"), seed=7)
    torch.save(trained, tmp_path / "mm_projector.bin")
    to_hydra(source, tmp_path / "ours", projector=tmp_path / "mm_projector.bin")
    to_original(tmp_path / "ours", tmp_path / "back")
    assert same(theirs_in(tmp_path / "back"), theirs_in(source) | trained)
    torch.save(fill(projector_shapes("v2")), tmp_path / "mm_projector.bin")
    refused("not part of this model", source, tmp_path / "x", projector=tmp_path)
    refused("does not exist", source, tmp_path / "x", ConfigError, projector=tmp_path / "nothing.bin")


def test_a_language_model_with_a_stage_one_folder_and_a_tower_is_whole(tmp_path: Path) -> None:
    llama = {k: v for k, v in authors_config("v1").items() if not k.startswith(("mm_", "image_", "vision_"))}
    language = fill(decoder_shapes())
    source = save_authors(tmp_path / "llama", "v1", language, llama | {"model_type": "llama"})
    refused("has no mm_projector_type", source, tmp_path / "x")
    stage_one = tmp_path / "stage-1"
    stage_one.mkdir()
    (stage_one / "config.json").write_text(json.dumps(authors_config("v1")))
    trained = fill(projector_shapes("v1"), seed=7)
    torch.save(trained, stage_one / "mm_projector.bin")
    tower = clip_folder(tmp_path / "clip", whole=False)
    to_hydra(source, tmp_path / "ours", projector=stage_one, vision=tmp_path / "clip")
    to_original(tmp_path / "ours", tmp_path / "back")
    assert same(theirs_in(tmp_path / "back"), language | trained | tower)


def save_lora(folder: Path, version: str, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA folder as the authors' script leaves it; returns its matrices and its projector."""
    shapes = {}
    for layer in range(LAYERS):
        for name, (rank, out, into) in {"self_attn.v_proj": (4, 32, 32), "mlp.down_proj": (2, 32, 48)}.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            shapes |= {f"{module}.lora_A.weight": (rank, into), f"{module}.lora_B.weight": (out, rank)}
    matrices, projector = fill(shapes, seed=8), fill(projector_shapes(version), seed=9)
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["v_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    (folder / "config.json").write_text(json.dumps(authors_config(version)))
    torch.save(matrices, folder / "adapter_model.bin")
    torch.save({f"base_model.model.{k}": v for k, v in projector.items()}, folder / "non_lora_trainables.bin")
    return matrices, projector


def merged(base: dict[str, Tensor], matrices: dict[str, Tensor], scale: Any) -> dict[str, Tensor]:
    after = dict(base)
    for name, a in matrices.items():
        if "lora_A" in name:
            weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
            update = scale(weight, len(a)) * (matrices[name.replace("lora_A", "lora_B")].double() @ a.double())
            after[weight] = (base[weight].double() + update).to(base[weight].dtype)
    return after


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, lambda name, rank: 8 / rank),
        ({"use_rslora": True}, lambda name, rank: 8 / math.sqrt(rank)),
        ({"alpha_pattern": {"^model.layers.1.mlp.down_proj": 3}}, lambda n, r: (3 if "1.mlp" in n else 8) / r),
    ],
)
def test_a_lora_folder_is_merged_into_its_base(changes: dict[str, Any], scale: Any, tmp_path: Path) -> None:
    base = save_authors(tmp_path / "base", "v2")
    before = theirs_in(base)
    matrices, projector = save_lora(tmp_path / "lora", "v2", **changes)
    to_hydra(tmp_path / "lora", tmp_path / "ours", base=base)
    to_original(tmp_path / "ours", tmp_path / "back")
    expected = merged(before | projector, matrices, scale)
    after = theirs_in(tmp_path / "back")
    assert after.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=1e-6)
    touched = {name for name in after if not torch.equal(after[name], before[name])}
    assert touched == {name for name in expected if not torch.equal(expected[name], before[name])}


def test_the_base_may_be_a_language_model_and_is_given_not_followed(tmp_path: Path) -> None:
    llama = {k: v for k, v in authors_config("v1").items() if not k.startswith(("mm_", "image_", "vision_"))}
    base = save_authors(tmp_path / "llama", "v1", fill(decoder_shapes()), llama | {"model_type": "llama"})
    tower = clip_folder(tmp_path / "clip", whole=True)
    _, projector = save_lora(tmp_path / "lora", "v1", base_model_name_or_path=str(base))
    refused(f"trained on '{base}': give .* --base FOLDER", tmp_path / "lora", tmp_path / "ours", ConfigError)
    to_hydra(tmp_path / "lora", tmp_path / "ours", vision=tmp_path / "clip", base=base)
    to_original(tmp_path / "ours", tmp_path / "back")
    assert same(theirs_in(tmp_path / "back"), projector | tower, names=[*projector, *tower])


def test_lora_folders_that_do_not_fit(tmp_path: Path) -> None:
    base = save_authors(tmp_path / "base", "v2")
    matrices, _ = save_lora(tmp_path / "lora", "v2", base_model_name_or_path="mtgv/somewhere")
    refused("trained on 'mtgv/somewhere': give .* --base FOLDER", tmp_path / "lora", tmp_path / "x", ConfigError)
    refused("--base .* holds no config", tmp_path / "lora", tmp_path / "x", ConfigError, base=tmp_path)
    save_lora(tmp_path / "dora", "v2", use_dora=True)
    refused("use_dora True is not supported", tmp_path / "dora", tmp_path / "x", ConfigError, base=base)
    first = next(iter(matrices))
    broken = {
        "A and B belong together": {k: v for k, v in matrices.items() if k != first},
        "is not a LoRA matrix": matrices | {"base_model.model.lm_head.weight": torch.ones(2)},
        "adapts model.language_model.layers.9": {k.replace("layers.1", "layers.9"): v for k, v in matrices.items()},
        r"is \(32, 31\), the base's weight \(32, 32\)": matrices | {first: torch.ones(4, 31)},
        "A of rank 3 and B of rank 4": matrices | {first: torch.ones(3, 32)},
    }
    for message, state in broken.items():
        torch.save(state, tmp_path / "lora" / "adapter_model.bin")
        refused(message, tmp_path / "lora", tmp_path / "x", base=base)
    (tmp_path / "lora" / "adapter_model.bin").unlink()
    refused("neither adapter_model.safetensors nor", tmp_path / "lora", tmp_path / "x", base=base)
