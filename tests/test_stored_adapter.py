"""An adapter's folder is whole, its own and of this base, or it is refused or explained; nothing in it runs."""

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hydra_vlm.allocation import AllocationRequest, Budget, allocate
from hydra_vlm.commands.chat import chat
from hydra_vlm.errors import AdapterError, ConfigError, HydraError
from hydra_vlm.export.run import export
from hydra_vlm.lora import attach, detach, load_adapter, save_adapter
from hydra_vlm.models.loading import LoadedModel, load_model
from hydra_vlm.stored_adapter import RECORD, expanded, read_adapter
from tiny import save_tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes", "ignore::FutureWarning"),
]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
CONFIG, WEIGHTS, PROJECTOR = "adapter_config.json", "adapter_model.safetensors", "projector.safetensors"


def logits(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 200, (1, 24), generator=generator)
    ids[:, 2:6] = 3
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, pixel_values=torch.rand(1, 3, 32, 32, generator=generator)).logits
    return result


def adapter_on(loaded: LoadedModel, folder: Path) -> Path:
    """A trained adapter with a trained projector; the model is as it was afterwards."""
    graph = loaded.parts.graph
    schedule = allocate("linear", AllocationRequest(graph, Budget.of_rank(graph, 4)))
    model = attach(loaded.model, schedule, loaded.parts, seed=0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name or "mm_projector" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, folder, schedule, loaded.parts, projector_state=True)
    detach(model)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model", layers=2)


@pytest.fixture(scope="module")
def loaded(base: Path) -> LoadedModel:
    return load_model(str(base), "cpu")


@pytest.fixture(scope="module")
def whole(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_on(loaded, tmp_path_factory.mktemp("trained") / "adapter")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of a whole adapter, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "adapter"))


def tensors(file: str, make: Callable[[Tensor], Tensor | None], last: str = "") -> Callable[[Path], None]:
    """Change (None: remove) the first tensor whose name ends so."""

    def harm(folder: Path) -> None:
        stored = load_file(folder / file)
        name = next(name for name in sorted(stored) if name.endswith(last))
        made = make(stored.pop(name))
        save_file(stored | ({name: made.contiguous()} if made is not None else {}), folder / file)

    return harm


def bad(value: float) -> Callable[[Tensor], Tensor]:
    def make(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return make


def key(name: str, value: Any) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text()) | {name: value}
        (folder / CONFIG).write_text(json.dumps(config))

    return harm


def stray_tensor(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS) | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, folder / WEIGHTS)


ENDLESS = "(.*a)*(.*b)*(.*c)*(.*d)*(.*e)*(.*f)*(.*g)*$x"
NAN, INFINITE = float("nan"), float("inf")
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "half the weights": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:900]), "cannot be read"),
    "NaN in A": (tensors(WEIGHTS, bad(NAN), "lora_A.weight"), "holds NaN or infinity"),
    "infinity in B": (tensors(WEIGHTS, bad(INFINITE), "lora_B.weight"), "holds NaN or infinity"),
    "integers": (tensors(WEIGHTS, lambda t: (100 * t).int()), "int32, not floating-point"),
    "B is missing": (tensors(WEIGHTS, lambda t: None, "lora_B.weight"), "has no lora_B"),
    "a stray tensor": (stray_tensor, "no LoRA matrix"),
    "another shape": (tensors(WEIGHTS, lambda t: t[:, :-1], "lora_A.weight"), "this model takes"),
    "another rank": (tensors(WEIGHTS, lambda t: t[:1], "lora_A.weight"), "says rank"),
    "NaN in the projector": (tensors(PROJECTOR, bad(NAN)), "projector.*NaN"),
    "integers in the projector": (tensors(PROJECTOR, lambda t: t.long()), "int64, not floating-point"),
    "half the projector": (tensors(PROJECTOR, lambda t: None), "does not fit the projector"),
    "alpha NaN": (key("lora_alpha", NAN), "adapter_config.json"),
    "alpha zero": (key("lora_alpha", 0), "alpha is a finite number above 0"),
    "alpha in words": (key("lora_alpha", "16"), "alpha is a finite number above 0"),
    "alpha of one module": (key("alpha_pattern", {"q_proj": -1.0}), "alpha_pattern"),
    "rank zero": (key("r", 0), "a rank is a whole number"),
    "rank in words": (key("rank_pattern", {"q_proj": "four"}), "rank_pattern"),
    "dropout": (key("lora_dropout", 1.5), "from 0 to below 1"),
    "endless targets": (key("target_modules", ENDLESS), "are not run on names"),
    "endless ranks": (key("rank_pattern", {ENDLESS: 4}), "are not run on names"),
    "endless alphas": (key("alpha_pattern", {"(a+)+$": 4}), "are not run on names"),
    "endless exceptions": (key("exclude_modules", ENDLESS), "are not run on names"),
    "a layers pattern": (key("layers_pattern", ENDLESS), "layers_pattern"),
    "whole modules": (key("modules_to_save", [ENDLESS]), "modules_to_save"),
    "other targets": (key("target_modules", ["q_proj"]), "which are no target"),
    "targets that are not there": (key("target_modules", "model.tower.q_proj"), "no tensors for"),
    "DoRA": (key("use_dora", True), "use_dora"),
    "biases": (key("bias", "all"), "trained biases"),
    "another method": (key("peft_type", "IA3"), "only LORA"),
    "no schedule": (lambda f: (f / "schedule.json").unlink(), "not an adapter saved by hydra-vlm"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_without_a_record_is_checked_by_what_it_says(loaded: LoadedModel, folder: Path, damage: str) -> None:
    harm, says = DAMAGE[damage]
    (folder / RECORD).unlink()
    harm(folder)
    before, started = logits(loaded.model), time.monotonic()
    with pytest.raises(HydraError, match=says) as told:
        load_adapter(loaded.model, folder, loaded.parts)
    assert time.monotonic() - started < 10
    assert "\n" not in str(told.value)
    assert torch.equal(logits(loaded.model), before)


def swapped(folder: Path) -> None:
    stored = load_file(folder / WEIGHTS)
    save_file({name: tensor + 1e-3 for name, tensor in stored.items()}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda f: (f / PROJECTOR).unlink(), "lacks projector.safetensors, the projector that was trained with it"),
        (swapped, "is not the file that was saved with the adapter"),
        (key("lora_alpha", 64), "adapter_config.json is not the file that was saved"),
        (lambda f: (f / RECORD).write_text("{}"), "adapter.json is damaged"),
    ],
)
def test_what_was_recorded_is_there_unchanged(
    loaded: LoadedModel, folder: Path, harm: Callable[[Path], object], says: str
) -> None:
    harm(folder)
    with pytest.raises(AdapterError, match=says):
        load_adapter(loaded.model, folder, loaded.parts)


def test_detach_gives_the_base_back_that_it_promised(loaded: LoadedModel, whole: Path) -> None:
    before = logits(loaded.model)
    adapted = load_adapter(loaded.model, whole, loaded.parts)
    assert (logits(adapted) - before).abs().max() > 0.1
    assert torch.equal(logits(detach(adapted)), before)


def test_keys_that_reach_outside_are_not_followed(loaded: LoadedModel, folder: Path) -> None:
    for name, value in {
        "base_model_name_or_path": "https://example.org/model",
        "revision": "main",
        "auto_mapping": {"base_model_class": "os.system", "parent_library": "os"},
        "loftq_config": {"loftq_bits": 4},
        "eva_config": {"rho": 2.0},
    }.items():
        key(name, value)(folder)
    (folder / RECORD).unlink()
    detach(load_adapter(loaded.model, folder, loaded.parts))


def changed(base: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> LoadedModel:
    shutil.copytree(base, folder)
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return load_model(str(folder), "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_that_was_cast_is_the_same(base: Path, whole: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    cast = changed(base, tmp_path / "m", lambda s: s.update({name: t.to(dtype) for name, t in s.items()}))
    detach(load_adapter(cast.model, whole, cast.parts))


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ("layers.1.mlp.up_proj.weight", "the decoder's linear layers"),
        ("embed_tokens.weight", "the rest of the decoder"),
        ("vision_tower.post_layernorm.bias", "vision tower"),
        ("lm_head.weight", "the output head"),
    ],
)
def test_another_base_is_refused_unless_it_is_asked_for(
    base: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, last: str, says: str
) -> None:
    def nudge(stored: dict[str, Tensor]) -> None:
        name = next(name for name in stored if name.endswith(last))
        stored[name].view(-1)[5] += 0.05

    other = changed(base, tmp_path / "m", nudge)
    with pytest.raises(AdapterError, match=rf"another base: other weights in .*{says}.*--other-base"):
        load_adapter(other.model, whole, other.parts)
    assert not caplog.messages
    detach(load_adapter(other.model, whole, other.parts, other_base=True))
    assert says in caplog.messages[0]


def test_another_configuration_and_a_missing_record_are_said(
    base: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(base, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"vision_feature_layer": -2}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    other = load_model(str(tmp_path / "m"), "cpu")
    detach(load_adapter(other.model, folder, other.parts))
    assert "vision_feature_layer -1 (now -2)" in caplog.messages[-1]
    (folder / RECORD).unlink()
    detach(load_adapter(other.model, folder, other.parts))
    assert "has no adapter.json" in caplog.messages[-1]


def test_our_expressions_are_read_without_running_them(loaded: LoadedModel, whole: Path) -> None:
    found = read_adapter(whole)
    assert set(found.updates) == expanded(found.config["target_modules"])
    assert expanded(r"model\.layers\.(?:0|11)\.mlp\.up_proj|lm_head") == {
        "model.layers.0.mlp.up_proj",
        "model.layers.11.mlp.up_proj",
        "lm_head",
    }
    for strange in ("", "a|", ".*", "(a+)+", "a{2}", r"\d", "(?:1|1)x", "a(?:1)(?:2)b", "x" * 10**6 + "("):
        assert expanded(strange) is None, strange[:10]


def test_a_projector_that_is_missing_stops_an_export(base: Path, folder: Path, tmp_path: Path) -> None:
    (folder / PROJECTOR).unlink()
    with pytest.raises(AdapterError, match="the projector that was trained with it"):
        export(str(base), folder, tmp_path / "out", "merged")
    with pytest.raises(AdapterError, match="the projector that was trained with it"):
        chat(str(base), "what?", None, folder, "auto", 2, "cpu", None)


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_are_readable_as_the_umask_says(loaded: LoadedModel, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        adapter_on(loaded, tmp_path / "adapter")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes


def recorded_as_four_bits(folder: Path) -> None:
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(record | {"quantization": "nf4"}))


def test_without_bitsandbytes_a_four_bit_adapter_says_what_differs(
    base: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorded_as_four_bits(folder)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more)
    )
    with pytest.raises(ConfigError, match=r"merging an adapter .*quantization=nf4 needs the package bitsandbytes"):
        export(str(base), folder, tmp_path / "merged", "merged")
    done = export(str(base), folder, tmp_path / "peft", "peft")
    assert any("quantization=nf4; without bitsandbytes" in note for note in done.outcome.notes)
    assert any("quantization=nf4, this one has none" in message for message in caplog.messages)


@needs_bitsandbytes
def test_a_four_bit_adapter_is_answered_and_checked_on_four_bits(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = load_model(str(base), "cpu", quantization="nf4")
    folder = adapter_on(trained, tmp_path / "adapter")
    answer = logits(load_adapter(trained.model, folder, trained.parts))
    assert not caplog.messages
    export(str(base), folder, tmp_path / "merged", "merged")
    torch.testing.assert_close(logits(load_model(str(tmp_path / "merged"), "cpu").model), answer, atol=1e-3, rtol=0)
    for form in ("peft", "uniform"):
        done = export(str(base), folder, tmp_path / form, form)
        note = next(note for note in done.outcome.notes if "quantization=nf4" in note)
        assert "on which it was checked: on the full weights its logits differ by" in note
    chat(str(base), "what?", None, folder, "auto", 2, "cpu", None)
    full = load_model(str(base), "cpu")
    load_adapter(full.model, folder, full.parts)
    assert "quantization=nf4, this one has none" in caplog.messages[-1]
