"""What is loaded is whole: a model's folder gives all that its configuration asks for, or it is refused by name."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from families import FAMILIES
from hydra_vlm.errors import CheckpointError, ConfigError
from hydra_vlm.models import whole
from hydra_vlm.models.compose import load_decoder, load_tower
from hydra_vlm.models.loading import load_model, model_class
from tiny import save_tiny_model

LINEAR = "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("whole") / "model", layers=2)


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of a whole model, to be damaged."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def change(folder: Path, alter: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    alter(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")


def replaced(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        change(folder, lambda weights: weights.update({name: make(weights[name])}))

    return harm


def with_value(value: float, place: int = -1) -> Callable[[Tensor], Tensor]:
    def make(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[place] = value
        return tensor

    return make


def without(wanted: Callable[[str], bool]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        def alter(weights: dict[str, Tensor]) -> None:
            for name in [name for name in weights if wanted(name)]:
                del weights[name]

        change(folder, alter)

    return harm


def renamed(folder: Path) -> None:
    def alter(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            weights[f"student.{name}"] = weights.pop(name)

    change(folder, alter)


def configured(*path: str, value: Any) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        inner = config
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))

    return harm


def sharded(folder: Path, forget: str = "", named: Mapping[str, str] = {}) -> None:
    """Two shards with an index; `forget` is what the index leaves out, `named` its files' other names."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        where |= {name: named.get(file, file) for name in part if file != forget}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def without_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def without_index(folder: Path) -> None:
    sharded(folder)
    (folder / "model.safetensors.index.json").unlink()


def cut_index(folder: Path) -> None:
    sharded(folder)
    text = (folder / "model.safetensors.index.json").read_text()
    (folder / "model.safetensors.index.json").write_text(text[: len(text) // 2])


def cut_file(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def as_pickle(make: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        torch.save(weights | {LINEAR: make(weights[LINEAR])}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    return harm


def another_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<one>", "<more>"])
    tokenizer.save_pretrained(folder)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a layer is missing": (without(lambda name: ".layers.1." in name and "language" in name), r"9 are not in its wei"),
    "a bias is missing": (without(lambda name: name.endswith("0.self_attn.q_proj.bias")), "vision.*q_proj.bias"),
    "the projector is missing": (without(lambda name: "mm_projector" in name), "not in its weights .*mm_projector"),
    "nothing is there": (without(lambda _: True), "is not whole"),
    "names of another prefix": (renamed, r"is not whole.*no place in it, such as student\."),
    "no file": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "an empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors cannot be read"),
    "half a file": (cut_file, "model.safetensors cannot be read"),
    "a shard is missing": (without_shard, "model-00002-of-00002.safetensors is missing"),
    "no index": (without_index, "no index of them"),
    "half an index": (cut_index, "index.json is no index of weights"),
    "an index that lost a shard": (lambda f: sharded(f, "model-00002-of-00002.safetensors"), "is not whole"),
    "an index that points elsewhere": (
        lambda f: sharded(f, named={"model-00001-of-00002.safetensors": "../model.safetensors"}),
        "must name files beside it",
    ),
    "NaN": (replaced(LINEAR, with_value(float("nan"))), rf"{LINEAR} holds NaN or infinity"),
    "infinity": (replaced(LINEAR, with_value(-float("inf"), 7)), rf"{LINEAR} holds NaN or infinity"),
    "NaN in the tower": (
        replaced("model.vision_tower.post_layernorm.bias", with_value(float("nan"))),
        "post_layernorm.bias holds NaN",
    ),
    "beyond float32": (replaced(LINEAR, lambda t: t.double() * 1e300), "more than torch.float32"),
    "integers": (replaced(LINEAR, lambda t: (1000 * t).to(torch.int32)), "holds int32, not floating-point"),
    "bytes": (replaced(LINEAR, lambda t: t.to(torch.uint8)), "holds uint8, not floating-point"),
    "truth values": (replaced(LINEAR, lambda t: t > 0), "holds bool, not floating-point"),
    "NaN in a pickle": (as_pickle(with_value(float("nan"))), "NaN or infinity"),
    "integers in a pickle": (as_pickle(lambda t: t.long()), "holds int64"),
    "sparse": (as_pickle(lambda t: t.to_sparse()), "must hold dense tensors"),
    "another shape": (replaced(LINEAR, lambda t: t[:-1]), rf"{LINEAR} is stored as \[47, 32\].*asks for \[48, 32\]"),
    "a wider configuration": (configured("text_config", "intermediate_size", value=64), "are of two models"),
    "more layers in the configuration": (configured("text_config", "num_hidden_layers", value=3), "is not whole"),
    "fewer layers in the configuration": (
        configured("text_config", "num_hidden_layers", value=1),
        "9 tensors beyond.*fewer layers",
    ),
    "another tokenizer": (another_tokenizer, "'<one>' as 260.*rows 0 to 259"),
    "another image token": (configured("image_token_id", value=7), "names 7 as the image token"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_whole_is_refused(folder: Path, damage: str) -> None:
    harm, says = DAMAGE[damage]
    harm(folder)
    with pytest.raises(CheckpointError, match=says) as told:
        load_model(str(folder), "cpu")
    assert str(folder) in str(told.value)
    assert "\n" not in str(told.value)
    assert re.search(r"[Ff]etch|[Ss]ave it again|beside config.json", str(told.value))


def test_a_model_beside_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x/y"}))
    with pytest.raises(ConfigError, match="keep each in a folder of its own"):
        load_model(str(folder), "cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_whole_and_misses_what_it_lacks(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family].save(tmp_path / "model")
    load_model(str(folder), "cpu")
    name = next(name for name in load_file(folder / "model.safetensors") if "embed_tokens" not in name)
    without(lambda each: each == name)(folder)
    with pytest.raises(CheckpointError, match=r"1 are not in its weights"):
        load_model(str(folder), "cpu")


def in_shards(folder: Path) -> None:
    sharded(folder)


def in_half(folder: Path) -> None:
    change(folder, lambda weights: weights.update({name: t.half() for name, t in weights.items()}))


@pytest.mark.parametrize("form", [in_shards, in_half, as_pickle(lambda t: t)])
def test_other_forms_of_the_same_model_are_whole(folder: Path, form: Callable[[Path], object]) -> None:
    before = load_model(str(folder), "cpu").model.state_dict()
    form(folder)
    after = load_model(str(folder), "cpu").model.state_dict()
    assert all(torch.allclose(tensor, after[name], rtol=1e-3, atol=1e-4) for name, tensor in before.items())


def test_what_has_no_place_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(folder, lambda weights: weights.update({"value_head.weight": torch.zeros(3)}))
    load_model(str(folder), "cpu")
    assert caplog.messages == [f"model {folder}: 1 stored tensors are not used: value_head.weight"]


def test_a_file_is_searched_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[str] = []
    monkeypatch.setattr(whole, "require_sound", lambda tensors, what, *more: searched.append(what))
    load_model(str(folder), "cpu")
    load_model(str(folder), "cpu")
    assert searched == [str(folder / "model.safetensors")]
    change(folder, lambda weights: weights.update({LINEAR: 2 * weights[LINEAR]}))
    load_model(str(folder), "cpu")
    assert len(searched) == 2


def test_parts_of_a_new_model_are_whole(folder: Path, tmp_path: Path) -> None:
    model = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder)
    for part, name in ((model.model.language_model, "llm"), (model.model.vision_tower, "tower")):
        part.save_pretrained(tmp_path / name)
        change(tmp_path / name, lambda weights: weights.pop(next(n for n in sorted(weights) if "layers.1" in n)))
    with pytest.raises(CheckpointError, match=r"not in its weights"):
        load_decoder(tmp_path / "llm")
    with pytest.raises(CheckpointError, match=r"not in its weights"):
        load_tower(tmp_path / "tower")
