"""Every export is read here once more, by what its target reads, and compared with the adapter."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from typer.testing import CliRunner

from hydra_vlm.cli import app
from hydra_vlm.errors import AdapterError, ConfigError, GraphMismatchError, HydraError, RunFolderError
from hydra_vlm.export import merged, uniform
from hydra_vlm.export.comparison import logits, make_probe
from hydra_vlm.export.outcome import format_size
from hydra_vlm.export.run import export
from hydra_vlm.export.source import Source
from hydra_vlm.export.uniform import uniform_rank
from hydra_vlm.files import read_json, write_json
from hydra_vlm.graph import ComputationGraph
from hydra_vlm.lora import attach, load_adapter, save_adapter
from hydra_vlm.models.loading import LoadedModel, load_model
from hydra_vlm.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration, MobileVLMProcessor
from hydra_vlm.models.mobilevlm.conversion import to_hydra, to_original
from hydra_vlm.models.structure import find_parts
from hydra_vlm.schedule import RankSchedule, Scaling
from tiny import byte_tokenizer
from tolerances import assert_same_sums

# PEFT asks transformers for an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
SCALINGS = (Scaling(), Scaling("fixed", 16.0), Scaling("rslora", 3.0), Scaling("balanced", 2.0, 4))


def text_config() -> LlamaConfig:
    return LlamaConfig(**TEXT, vocab_size=len(byte_tokenizer()))


def save_mobilevlm(folder: Path) -> None:
    """The first projector, which has an equal in the authors' layout for every tower."""
    config = MobileVLMConfig(
        text_config=text_config().to_dict(),
        vision_config=CLIPVisionConfig(**TOWER).to_dict(),
        projector_type="ldpnet",
        image_token_id=3,
    )
    MobileVLMForConditionalGeneration(config).save_pretrained(folder)
    MobileVLMProcessor.from_config(config, byte_tokenizer()).save_pretrained(folder)


def save_llava(folder: Path) -> None:
    """Its tower has layers with q_proj, k_proj and v_proj, as its decoder does."""
    config = LlavaConfig(vision_config=CLIPVisionConfig(**TOWER), text_config=text_config(), image_token_id=3)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size),
        byte_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def save_llama(folder: Path) -> None:
    LlamaForCausalLM(text_config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


MAKERS = {"mobilevlm": save_mobilevlm, "llava": save_llava, "llama": save_llama}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    made: dict[str, str] = {}

    def get(kind: str) -> str:
        if kind not in made:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(kind) / "model"
            MAKERS[kind](folder)
            made[kind] = str(folder)
        return made[kind]

    return get


def mixed(graph: ComputationGraph) -> list[int]:
    """Ranks 0 to 4."""
    return [(7 * i) % 5 for i in range(len(graph.projections))]


def same(graph: ComputationGraph) -> list[int]:
    return [3] * len(graph.projections)


def schedule_of(graph: ComputationGraph, ranks: Sequence[int], scaling: Scaling) -> RankSchedule:
    return RankSchedule("tiny", graph, tuple(ranks), max(1, graph.parameters(ranks)), scaling=scaling)


def save_trained(
    name: str,
    folder: Path,
    ranks: Callable[[ComputationGraph], list[int]] = mixed,
    scaling: Scaling = SCALINGS[0],
    projector: bool = True,
    adapt: tuple[str, ...] = ("decoder",),
) -> Path:
    """An adapter as after training: B is not zero, and the projector has moved."""
    loaded = load_model(name, "cpu")
    parts = find_parts(loaded.model, adapt=adapt)
    schedule = schedule_of(parts.graph, ranks(parts.graph), scaling)
    peft_model = attach(loaded.model, schedule, parts, seed=0, dropout=0.1)
    torch.manual_seed(1)
    trained = projector and parts.projector is not None
    for parameter_name, parameter in peft_model.named_parameters():
        if ".lora_B." in parameter_name:
            nn.init.normal_(parameter, std=0.1)
        elif trained and f".{parts.projector}." in parameter_name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    save_adapter(peft_model, folder, schedule, parts, trained)
    return folder


Trained = Callable[..., tuple[str, Path]]


@pytest.fixture(scope="session")
def trained(model: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model and an adapter of it, made once for all tests that read them."""
    made: dict[tuple[Any, ...], Path] = {}

    def get(
        kind: str, ranks: Callable[[ComputationGraph], list[int]] = mixed, scaling: Scaling = SCALINGS[0]
    ) -> tuple[str, Path]:
        key = (kind, ranks.__name__, scaling)
        if key not in made:
            made[key] = save_trained(model(kind), tmp_path_factory.mktemp("trained") / "adapter", ranks, scaling)
        return model(kind), made[key]

    return get


@cache
def adapter_logits(name: str, adapter: Path) -> Tensor:
    loaded = load_model(name, "cpu")
    probe = make_probe(loaded)
    bare = logits(loaded.model, probe)
    adapted = logits(load_adapter(loaded.model, adapter, loaded.parts), probe)
    assert (adapted - bare).abs().max() > 0.05  # an export that lost the adapter would be seen
    return adapted


def plain_peft_logits(name: str, folder: Path) -> tuple[Tensor, PeftModel]:
    """As anybody would load it: PEFT, and the projector by hand."""
    loaded = load_model(name, "cpu")
    if loaded.parts.projector is not None:
        loaded.model.get_submodule(loaded.parts.projector).load_state_dict(load_file(folder / "projector.safetensors"))
    probe = make_probe(loaded)
    peft_model = PeftModel.from_pretrained(loaded.model, str(folder))
    return logits(peft_model, probe), peft_model


def adapted_names(peft_model: PeftModel) -> list[str]:
    return [name for name, module in peft_model.named_modules() if isinstance(module, LoraLayer)]


def lora_pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {key.rpartition(".lora_")[0] for key in tensors}
    return {name: (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]) for name in names}


@pytest.mark.parametrize("kind", ["mobilevlm", "llava", "llama"])
def test_merged_is_a_model_that_answers_as_the_adapter(kind: str, trained: Trained, tmp_path: Path) -> None:
    name, adapter = trained(kind)
    done = export(name, adapter, tmp_path / "out", "merged")
    loaded = load_model(str(tmp_path / "out"), "cpu")
    after = logits(loaded.model, make_probe(loaded))
    assert_same_sums(after, adapter_logits(name, adapter))
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())
    assert done.outcome.seen is not None
    assert done.outcome.seen.difference <= done.outcome.seen.allowed


@pytest.mark.parametrize("kind", ["mobilevlm", "llava"])
def test_peft_is_the_adapter_to_the_byte_with_the_projector_beside_it(
    kind: str, trained: Trained, tmp_path: Path
) -> None:
    name, adapter = trained(kind)
    done = export(name, adapter, tmp_path / "out", "peft")
    names = [
        "adapter.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "projector.safetensors",
        "schedule.json",
    ]
    assert [file for file, _ in done.files] == names
    for file in names:
        assert (tmp_path / "out" / file).read_bytes() == (adapter / file).read_bytes()
    assert read_json(tmp_path / "out" / "adapter_config.json")["modules_to_save"] is None
    after, _ = plain_peft_logits(name, tmp_path / "out")
    assert torch.equal(after, adapter_logits(name, adapter))  # equal files, mapped alike: the same sums


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [*(("mobilevlm", scaling) for scaling in SCALINGS), ("llava", SCALINGS[2]), ("llama", SCALINGS[1])],
)
def test_uniform_has_one_rank_and_scale_one_and_the_same_logits(
    kind: str, scaling: Scaling, trained: Trained, tmp_path: Path
) -> None:
    name, adapter = trained(kind, scaling=scaling)
    export(name, adapter, tmp_path / "out", "uniform")
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    parts = load_model(name, "cpu").parts
    shapes = {parts.modules[p.layer, p.component]: (p.in_features, p.out_features) for p in parts.graph.projections}
    kept = [module for module, rank in zip(parts.names(), mixed(parts.graph), strict=True) if rank]
    pairs = lora_pairs(tmp_path / "out")
    assert sorted(pairs) == sorted(f"base_model.model.{module}" for module in kept)
    for module in kept:
        a, b = pairs[f"base_model.model.{module}"]
        assert tuple(a.shape) == (8, shapes[module][0])
        assert tuple(b.shape) == (shapes[module][1], 8)
        assert a.dtype == b.dtype == torch.float32
    after, peft_model = plain_peft_logits(name, tmp_path / "out")
    assert len(adapted_names(peft_model)) == len(kept)
    assert not any("vision_tower" in name for name in adapted_names(peft_model))
    assert_same_sums(after, adapter_logits(name, adapter))


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.rule)
def test_servers_compute_the_schedules_update_from_a_uniform_adapter(
    scaling: Scaling, trained: Trained, tmp_path: Path
) -> None:
    """vLLM: alpha / r of the configuration; llama.cpp: alpha / rank of the tensor; neither knows more."""
    name, adapter = trained("llama", scaling=scaling)
    export(name, adapter, tmp_path / "out", "uniform", rank=5)
    config = read_json(tmp_path / "out" / "adapter_config.json")
    written = lora_pairs(tmp_path / "out")
    for module, (a, b) in lora_pairs(adapter).items():
        update = scaling.scale(a.shape[0]) * b @ a
        padded_a, padded_b = written[module]
        vllm, llama_cpp = config["lora_alpha"] / config["r"], config["lora_alpha"] / padded_b.shape[1]
        assert vllm == llama_cpp == 1
        torch.testing.assert_close(padded_b @ padded_a, update, atol=1e-6, rtol=1e-5)


def test_the_uniform_rank_is_one_that_vllm_permits_unless_asked(trained: Trained, tmp_path: Path) -> None:
    name, adapter = trained("llama")
    graph = load_model(name, "cpu").parts.graph

    def of(rank: int) -> RankSchedule:
        return schedule_of(graph, [rank] * len(graph.projections), Scaling())

    tops = (1, 2, 8, 9, 128, 131, 257, 321, 512)
    assert [uniform_rank(of(top), None) for top in tops] == [1, 8, 8, 16, 128, 256, 320, 512, 512]
    assert uniform_rank(of(131), 131) == 131
    with pytest.raises(ConfigError, match="--rank 100 is below the largest rank of schedule 'tiny': give 131 or more"):
        uniform_rank(of(131), 100)
    with pytest.raises(ConfigError, match="largest rank of schedule 'tiny' is 600, vLLM permits 512 at most"):
        uniform_rank(of(600), None)
    notes = {
        rank: export(name, adapter, tmp_path / f"{rank}", "uniform", rank).outcome.notes[0] for rank in (None, 5, 600)
    }
    assert notes[None] == "vLLM: --enable-lora --max-lora-rank 8"
    assert notes[5] == "vLLM: --enable-lora --max-lora-rank 8 (it does not permit a max_lora_rank of 5)"
    assert "will refuse this adapter of rank 600" in notes[600]


@pytest.mark.parametrize(
    ("ranks", "scaling"), [(mixed, SCALINGS[2]), (mixed, SCALINGS[1]), (mixed, SCALINGS[3]), (same, SCALINGS[0])]
)
def test_original_comes_back_through_the_converter(
    ranks: Callable[[ComputationGraph], list[int]],
    scaling: Scaling,
    model: Callable[[str], str],
    trained: Trained,
    tmp_path: Path,
) -> None:
    name, adapter = trained("mobilevlm", ranks, scaling)
    done = export(name, adapter, tmp_path / "lora", "original")
    files = ["adapter_config.json", "adapter_model.bin", "config.json", "non_lora_trainables.bin"]
    assert [file for file, _ in done.files] == files
    to_original(Path(name), tmp_path / "base")
    to_hydra(tmp_path / "lora", tmp_path / "merged", base=tmp_path / "base")
    loaded = load_model(str(tmp_path / "merged"), "cpu")
    before = adapter_logits(name, adapter)
    assert_same_sums(logits(loaded.model, make_probe(loaded)), before)


@pytest.mark.parametrize(("ranks", "scaling"), [(mixed, SCALINGS[2]), (same, SCALINGS[0])])
def test_original_loads_in_peft_on_a_decoder_with_the_authors_names(
    ranks: Callable[[ComputationGraph], list[int]],
    scaling: Scaling,
    model: Callable[[str], str],
    trained: Trained,
    tmp_path: Path,
) -> None:
    name, adapter = trained("mobilevlm", ranks, scaling)
    export(name, adapter, tmp_path / "lora", "original")
    ids = torch.randint(4, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    ours = load_model(name, "cpu")
    llama = LlamaForCausalLM(ours.model.config.text_config).eval()
    llama.model.load_state_dict(ours.model.model.language_model.state_dict())
    llama.lm_head.load_state_dict(ours.model.lm_head.state_dict())
    theirs = PeftModel.from_pretrained(llama, str(tmp_path / "lora"))
    with torch.no_grad():
        before = load_adapter(ours.model, adapter, ours.parts).eval()(input_ids=ids).logits
        assert_same_sums(theirs(input_ids=ids).logits, before)
    projector = torch.load(tmp_path / "lora" / "non_lora_trainables.bin", weights_only=True)
    trained = load_file(adapter / "projector.safetensors")
    prefix = "base_model.model.model.mm_projector."
    assert projector.keys() == {f"{prefix}{key}" for key in trained}
    assert all(torch.equal(projector[f"{prefix}{key}"], value) for key, value in trained.items())


def test_original_has_what_the_authors_peft_reads_and_keeps_what_it_can(
    model: Callable[[str], str], tmp_path: Path
) -> None:
    name = model("mobilevlm")
    several = save_trained(name, tmp_path / "several", projector=False)
    done = export(name, several, tmp_path / "lora", "original")
    assert "scales folded into B, ranks padded to 4" in done.outcome.checked
    config = read_json(tmp_path / "lora" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 4, 0.1)
    assert not {"rank_pattern", "alpha_pattern", "use_rslora"} & config.keys()
    assert all(target.startswith("model.layers.") for target in config["target_modules"])
    assert (tmp_path / "lora" / "non_lora_trainables.bin").is_file()  # trained or not, their script reads it
    theirs = read_json(tmp_path / "lora" / "config.json")
    assert (theirs["model_type"], theirs["mm_projector_type"]) == ("mobilevlm", "ldpnet")
    one = save_trained(name, tmp_path / "one", same)
    done = export(name, one, tmp_path / "kept", "original")
    assert "rank 3, tensors as they are" in done.outcome.checked
    config = read_json(tmp_path / "kept" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    stored = torch.load(tmp_path / "kept" / "adapter_model.bin", weights_only=True)
    for key, value in load_file(one / "adapter_model.safetensors").items():
        assert torch.equal(stored[key.replace("model.language_model.", "model.")], value)


def test_original_is_for_mobilevlm_that_the_authors_code_could_run(
    model: Callable[[str], str], tiny_model: Path, tmp_path: Path
) -> None:
    llava = save_trained(model("llava"), tmp_path / "llava")
    with pytest.raises(ConfigError, match=r"layout of MobileVLM's authors, model .* is a llava: export it as peft"):
        export(model("llava"), llava, tmp_path / "out", "original")
    second = save_trained(str(tiny_model), tmp_path / "second")
    with pytest.raises(ConfigError, match="no equal in their layout"):
        export(str(tiny_model), second, tmp_path / "out", "original")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [*(("llama", scaling) for scaling in SCALINGS), ("mobilevlm", SCALINGS[2]), ("llava", SCALINGS[0])],
)
def test_snippets_build_the_schedule_in_other_trainers(
    kind: str, scaling: Scaling, model: Callable[[str], str], tmp_path: Path
) -> None:
    loaded = load_model(model(kind), "cpu")
    schedule = schedule_of(loaded.parts.graph, mixed(loaded.parts.graph), scaling)
    write_json(tmp_path / "schedule.json", schedule.to_json())
    export(model(kind), tmp_path / "schedule.json", tmp_path / "out", "snippet")
    keywords = json.loads((tmp_path / "out" / "lora_config.json").read_text())
    keys = yaml.safe_load((tmp_path / "out" / "axolotl.yaml").read_text())
    # What axolotl's schema takes: whole positive numbers.
    assert all(type(v) is int and v > 0 for v in [*keys["lora_rank_pattern"].values(), keys["lora_alpha"]])
    assert all(type(v) is int and v > 0 for v in keys["lora_alpha_pattern"].values())
    assert keys["adapter"] == "lora"
    theirs = {
        "r": keys["lora_r"],
        "lora_alpha": keys["lora_alpha"],
        "target_modules": keys["lora_target_modules"],
        "rank_pattern": keys["lora_rank_pattern"],
        "alpha_pattern": keys["lora_alpha_pattern"],
        "use_rslora": keys["peft_use_rslora"],
    }
    for made in (keywords, theirs):
        fresh = load_model(model(kind), "cpu")
        peft_model = get_peft_model(fresh.model, LoraConfig(**made))
        built = {
            name.removeprefix("base_model.model."): (m.lora_A["default"].weight.shape[0], m.scaling["default"])
            for name, m in peft_model.named_modules()
            if isinstance(m, LoraLayer)
        }
        asked = {
            name: (rank, pytest.approx(scaling.scale(rank)))
            for name, rank in zip(loaded.parts.names(), schedule.ranks, strict=True)
            if rank
        }
        assert built == asked


def test_a_snippet_of_a_trained_adapter_keeps_its_dropout_and_says_what_axolotl_cannot(
    trained: Trained, tmp_path: Path
) -> None:
    name, adapter = trained("llama", scaling=Scaling("constant", 0.5))
    done = export(name, adapter, tmp_path / "out", "snippet")
    assert [name for name, _ in done.files] == ["lora_config.json"]
    assert read_json(tmp_path / "out" / "lora_config.json")["lora_dropout"] == 0.1
    assert "axolotl takes whole numbers as alphas, this schedule needs" in done.outcome.notes[0]
    assert done.outcome.seen is None
    assert done.to_json()["difference"] is None


def test_a_snippet_for_another_model_is_refused(model: Callable[[str], str], tmp_path: Path) -> None:
    graph = load_model(model("llama"), "cpu").parts.graph
    fewer = ComputationGraph("other", graph.layer(0))
    write_json(tmp_path / "schedule.json", schedule_of(fewer, mixed(fewer), Scaling()).to_json())
    with pytest.raises(GraphMismatchError):
        export(model("llama"), tmp_path / "schedule.json", tmp_path / "out", "snippet")
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.json"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_weights_are_stored_in_the_models_own_dtype(
    dtype: torch.dtype, model: Callable[[str], str], tmp_path: Path
) -> None:
    loaded = load_model(model("mobilevlm"), "cpu")
    loaded.model.to(dtype).save_pretrained(tmp_path / "half")
    loaded.processor.save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "tokenizer.model").write_bytes(b"kept")
    adapter = save_trained(str(tmp_path / "half"), tmp_path / "adapter")
    done = export(str(tmp_path / "half"), adapter, tmp_path / "out", "merged")
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"kept"
    assert f"{dtype}".removeprefix("torch.") in done.outcome.checked
    assert done.outcome.seen is not None
    assert 0 < done.outcome.seen.difference <= done.outcome.seen.allowed


def forget_scale(tensors: Any, scales: dict[str, tuple[int, float]], rank: int) -> dict[str, Tensor]:
    return uniform_tensors(tensors, {name: (r, 1.0) for name, (r, _) in scales.items()}, rank)


def forget_module(tensors: Any, scales: dict[str, tuple[int, float]], rank: int) -> dict[str, Tensor]:
    made = uniform_tensors(tensors, scales, rank)
    return {key: value for key, value in made.items() if next(iter(scales)) not in key}


uniform_tensors = uniform.uniform_tensors
DIFFERS = r"the export differs from the adapter: 2 rows of .* Nothing was written"


def forget_adapter(peft_model: PeftModel, *_: Any) -> nn.Module:
    return peft_model.unload()


@pytest.mark.parametrize(
    ("form", "where", "what", "wrong", "message"),
    [
        ("uniform", uniform, "uniform_tensors", forget_scale, DIFFERS),
        ("uniform", uniform, "uniform_tensors", forget_module, "missing adapter keys"),
        ("merged", merged, "merge", forget_adapter, DIFFERS),
    ],
    ids=["scale", "module", "adapter"],
)
def test_an_export_that_differs_is_not_written(
    form: Any,
    where: Any,
    what: str,
    wrong: Any,
    message: str,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, adapter = trained("mobilevlm")
    monkeypatch.setattr(where, what, wrong)
    with pytest.raises(AdapterError, match=message):
        export(name, adapter, tmp_path / "out", form)
    assert not any(tmp_path.iterdir())


def test_half_precision_hides_no_weight_that_was_not_stored(
    model: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small adapter moves the logits by less than rounding may."""
    loaded = load_model(model("llama"), "cpu")
    loaded.model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    loaded.processor.save_pretrained(tmp_path / "half")
    adapter = save_trained(str(tmp_path / "half"), tmp_path / "adapter", scaling=Scaling("constant", 0.05))
    store = LlamaForCausalLM.save_pretrained

    def store_the_base(self: Any, folder: Path) -> None:
        store(LlamaForCausalLM.from_pretrained(tmp_path / "half"), folder)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", store_the_base)
    with pytest.raises(AdapterError, match="1e-05 of the largest logit"):
        export(str(tmp_path / "half"), adapter, tmp_path / "out", "merged")


def test_what_reaches_beyond_the_decoder(model: Callable[[str], str], tmp_path: Path) -> None:
    both = ("decoder", "tower")
    llava = save_trained(model("llava"), tmp_path / "llava", adapt=both)
    parts = find_parts(load_model(model("llava"), "cpu").model, adapt=both)
    done = export(model("llava"), llava, tmp_path / "uniform", "uniform")
    _, peft_model = plain_peft_logits(model("llava"), tmp_path / "uniform")
    asked = {module for module, rank in zip(parts.names(), mixed(parts.graph), strict=True) if rank}
    assert {name.removeprefix("base_model.model.") for name in adapted_names(peft_model)} == asked
    assert any("tower" in name for name in asked)
    assert "--enable-tower-connector-lora" in done.outcome.notes[0]
    mobilevlm = save_trained(model("mobilevlm"), tmp_path / "mobilevlm", adapt=both)
    with pytest.raises(AdapterError, match="adapt the decoder only, schedule 'tiny' has ranks in the tower"):
        export(model("mobilevlm"), mobilevlm, tmp_path / "original", "original")


def test_a_projector_that_was_left_out_is_noticed(trained: Trained, tmp_path: Path) -> None:
    """The probe shows pictures, so the adapter alone does not pass."""
    name, adapter = trained("llava")
    loaded = load_model(name, "cpu")
    alone = logits(PeftModel.from_pretrained(loaded.model, str(adapter)), make_probe(loaded))
    assert (alone - adapter_logits(name, adapter)).abs().max() > 1e-3


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Source) -> LoadedModel:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Source, "base", refuse)


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "nowhere"}, ConfigError, "holds no config.json"),
        ({"adapter": "nowhere"}, ConfigError, "adapter nowhere does not exist"),
        ({"adapter": "empty"}, AdapterError, "has no adapter_config.json"),
        ({"adapter": "."}, AdapterError, r"Did you mean adapter\?"),
        ({"adapter": "adapter/schedule.json"}, AdapterError, "a schedule holds no weights"),
        ({"adapter": "adapter/adapter_config.json"}, ConfigError, "not a rank schedule"),
        ({"form": "merged", "rank": 8}, ConfigError, "--rank is the one rank of a uniform export"),
        ({"form": "uniform", "rank": 2}, ConfigError, "give 4 or more"),
        ({"form": "gguf"}, ConfigError, "choose one of merged, peft, uniform, original, snippet"),
        ({"form": "original"}, ConfigError, "is a llama"),
        ({"device": "tpu7"}, ConfigError, "not a torch device"),
        ({"destination": "adapter"}, RunFolderError, "is not empty"),
        ({"destination": "adapter/schedule.json"}, RunFolderError, "is a file"),
    ],
)
def test_bad_requests_are_refused_before_a_model_is_loaded(
    changes: dict[str, Any],
    error: type[HydraError],
    message: str,
    model: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_trained(model("llama"), tmp_path / "adapter")
    Path("empty").mkdir()
    request = {"model": model("llama"), "adapter": "adapter", "destination": "out", "form": "peft"} | changes
    with pytest.raises(error, match=message):
        export(**request)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "empty"]


def test_the_command_says_what_was_written_and_checked(trained: Trained, tmp_path: Path) -> None:
    name, adapter = trained("mobilevlm")
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    words = ["export", name, str(adapter), str(tmp_path / "out"), "--format", "uniform"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    for text in (
        f"uniform: {tmp_path / 'out'} (",
        "adapter_model.safetensors",
        "rank 8, scale 1 in 11 modules",
        "with a picture each",
        "logits differ by",
        "--max-lora-rank 8",
        "note: the projector was trained too",
    ):
        assert text in done.stdout
    words[3] = str(tmp_path / "json")
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert told["files"].keys() == {"adapter_config.json", "adapter_model.safetensors", "projector.safetensors"}
    assert 0 <= told["difference"] <= told["allowed"]
    listed = CliRunner().invoke(app, ["export", "--help"]).stdout
    assert all(word in listed for word in ("MODEL", "ADAPTER", "DST", "--format", "snippet"))


def test_sizes_are_for_people() -> None:
    sizes = [format_size(n) for n in (0, 999, 1000, 15_420, 3_350_000_000, 12e12)]
    assert sizes == ["0 B", "999 B", "1 kB", "15.4 kB", "3.35 GB", "1.2e+04 GB"]
