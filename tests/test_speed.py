"""What makes a step cheaper changes neither loss nor gradients, in any family, and leaves no trace."""

import contextlib
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AttentionInterface

from families import FAMILIES, Family
from hydra_vlm.allocation import AllocationRequest, Budget, allocate
from hydra_vlm.config import TrainingConfig, load_config
from hydra_vlm.data.instruction import InstructionDataset
from hydra_vlm.data.readers import Reader, open_reader
from hydra_vlm.data.records import Record, read_records
from hydra_vlm.errors import ConfigError
from hydra_vlm.lora import attach
from hydra_vlm.models.loading import LoadedModel, load_model
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.training.attention import NAME
from hydra_vlm.training.fused import ROTARY, LoraProduct
from hydra_vlm.training.loss import mean_over_batch
from hydra_vlm.training.recipe import InstructionData, adapting, finetune, prepare, training_arguments
from hydra_vlm.training.speed import engine, sped_up
from test_families import records_for, write_data

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

PLAIN = {"supervised_only": False, "fused_layers": False}
COUNT = torch.tensor(19)


@dataclass(frozen=True)
class Opened:
    """A family's model with an adapter that says something, and its records."""

    family: Family
    loaded: LoadedModel
    model: PeftModel
    reader: Reader
    records: list[Record]

    def batch(self, records: list[Record]) -> dict[str, Tensor]:
        return self.reader.batch([self.reader.item(record) for record in records])

    def loss_and_gradients(self, batch: dict[str, Tensor], **settings: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """As the Trainer has them; with nothing that makes a step cheaper, the model's own loss."""
        self.model.zero_grad()
        with sped_up(self.model, self.loaded.parts, TrainingConfig(**settings)) as positions:
            if settings == PLAIN:
                loss = self.model(**batch, use_cache=False).loss
            else:
                if positions is not None:
                    positions.read(batch)
                outputs = self.model(**unlabelled(batch), use_cache=False)
                loss = mean_over_batch(positions)(outputs, batch["labels"], batch.get("num_items_in_batch"))
            loss.backward()
        trained = {n: p.grad for n, p in self.model.named_parameters() if p.requires_grad}
        return loss.detach(), {n: g.clone() for n, g in trained.items() if g is not None}


def unlabelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model is given in training: the loss is made outside of it."""
    return {name: value for name, value in batch.items() if name != "labels"}


def uniform(loaded: LoadedModel, rank: int = 4) -> RankSchedule:
    graph = loaded.parts.graph
    return allocate("uniform", AllocationRequest(graph, Budget.of_rank(graph, rank)))


def opened(folder: Path, family: str) -> Opened:
    data = write_data(folder / "data", records_for(family))
    loaded = load_model(str(FAMILIES[family].save(folder / "model")), "cpu")
    model = prepare(loaded, uniform(loaded), TrainingConfig(), seed=0).train()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return Opened(FAMILIES[family], loaded, model, open_reader(loaded.processor), read_records(data))


@pytest.fixture(scope="module", params=FAMILIES)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def mobilevlm(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(tmp_path_factory.mktemp("mobilevlm"), "mobilevlm")


def batches(opened: Opened) -> Iterator[dict[str, Tensor]]:
    """All records; those with and those without an image alone; the last rows without a label; summed losses."""
    yield opened.batch(opened.records)
    for alone in ([r for r in opened.records if r.image], [r for r in opened.records if not r.image]):
        if alone:
            yield opened.batch(alone)
    silent = opened.batch(opened.records)
    silent["labels"][1:] = -100
    yield silent
    yield opened.batch(opened.records) | {"num_items_in_batch": COUNT}


def require_equal(found: tuple[Tensor, dict[str, Tensor]], plain: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Losses within 1e-6, the gradient as a whole within 2e-6 of its norm, each tensor's within float32's reach."""
    torch.testing.assert_close(found[0], plain[0], rtol=1e-6, atol=1e-6)
    assert found[1].keys() == plain[1].keys()
    apart = {name: float((found[1][name] - gradient).norm()) for name, gradient in plain[1].items()}
    norm = {name: float(gradient.norm()) for name, gradient in plain[1].items()}
    whole = math.hypot(*norm.values())
    assert math.hypot(*apart.values()) <= 2e-6 * whole
    assert {name: a for name, a in apart.items() if a > 1e-5 * norm[name] + 1e-7 * whole} == {}


def test_loss_and_gradients_are_the_plain_forwards(each: Opened) -> None:
    compared = 0
    for batch in batches(each):
        plain = each.loss_and_gradients(batch, **PLAIN)
        assert any(float(gradient.abs().max()) > 0 for gradient in plain[1].values())
        for off in ("fused_layers", "packed_rows", "supervised_only", None):
            require_equal(each.loss_and_gradients(batch, **({off: False} if off else {})), plain)
            compared += 1
    assert compared >= 12


def test_the_head_and_the_last_layers_end_see_supervised_rows_alone(each: Opened) -> None:
    batch = each.batch(each.records)
    seen = {}
    base = each.model.get_base_model()
    last = f"{each.loaded.parts.layers}.{each.loaded.parts.graph.n_layers - 1}"
    inner = {"head": base.get_output_embeddings(), "mlp": base.get_submodule(f"{last}.mlp.gate_proj")}
    inner["keys"] = base.get_submodule(f"{last}.self_attn.k_proj")
    with sped_up(each.model, each.loaded.parts, TrainingConfig(packed_rows=False)) as positions:
        positions.read(batch)
        hooks = [
            module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output.shape[:-1]}))
            for name, module in inner.items()
        ]
        logits = each.model(**unlabelled(batch)).logits
        for hook in hooks:
            hook.remove()
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    assert 0 < supervised < batch["labels"].numel()
    assert seen == {"head": (1, supervised), "mlp": (1, supervised), "keys": batch["labels"].shape}
    assert logits.shape[:2] == (1, supervised)


def test_families_compute_with_the_operations_written_out(each: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    plain = LoraProduct.apply
    monkeypatch.setattr(LoraProduct, "apply", lambda *given: used.append(torch.is_grad_enabled()) or plain(*given))
    each.loss_and_gradients(each.batch(each.records))
    assert sum(used) == len(each.loaded.parts.names())


def test_nothing_is_left_behind(each: Opened) -> None:
    base = each.model.get_base_model()
    sources = {type(module).__module__ for module in base.modules()}
    before = {name: getattr(sys.modules[name], ROTARY, None) for name in sources}
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in base.modules()]
    text = base.config.get_text_config()
    settings = (text.use_cache, text._attn_implementation)
    during = ()
    with contextlib.suppress(KeyboardInterrupt), sped_up(each.model, each.loaded.parts, TrainingConfig()):
        during = (text.use_cache, text._attn_implementation)
        raise KeyboardInterrupt
    assert during == (False, f"hydra_packed_{NAME}")
    assert not any("forward" in vars(module) for module in base.modules())
    assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in base.modules()] == hooks
    assert {name: getattr(sys.modules[name], ROTARY, None) for name in sources} == before
    assert (text.use_cache, text._attn_implementation) == settings


def test_no_position_supervised_is_no_gradient(mobilevlm: Opened) -> None:
    batch = mobilevlm.batch(mobilevlm.records) | {"num_items_in_batch": COUNT}
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss, gradients = mobilevlm.loss_and_gradients(batch)
    assert float(loss) == 0.0
    assert all(float(gradient.abs().max()) == 0.0 for gradient in gradients.values())


def test_where_most_is_supervised_all_is_computed(mobilevlm: Opened) -> None:
    batch = mobilevlm.batch([r for r in mobilevlm.records if not r.image])
    batch["labels"] = batch["input_ids"]
    with sped_up(mobilevlm.model, mobilevlm.loaded.parts, TrainingConfig()) as positions:
        positions.read(batch)
        assert mobilevlm.model(**unlabelled(batch)).logits.shape[:2] == batch["labels"].shape


def test_gradient_checkpointing_runs_the_same_rows_again(mobilevlm: Opened) -> None:
    batch = mobilevlm.batch(mobilevlm.records)
    plain = mobilevlm.loss_and_gradients(batch, **PLAIN)
    base = mobilevlm.model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": False})
    try:
        require_equal(mobilevlm.loss_and_gradients(batch), plain)
    finally:
        base.activation_checkpointing_disable()


def test_autocast_and_dropout_keep_pefts_own_forward(mobilevlm: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("LoRA in one operation is for float32 without dropout")

    monkeypatch.setattr(LoraProduct, "apply", refuse)
    batch = mobilevlm.batch(mobilevlm.records)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = mobilevlm.loss_and_gradients(batch, **PLAIN)[0]
        ours = mobilevlm.loss_and_gradients(batch)[0]
    torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)
    dropping = TrainingConfig(dropout=0.5)
    again = load_model_again(mobilevlm)
    with adapting(again, uniform(again), dropping, 0) as model, sped_up(model, again.parts, dropping) as positions:
        positions.read(batch)
        assert torch.isfinite(model.train()(**unlabelled(batch)).logits).all()


def load_model_again(opened: Opened) -> LoadedModel:
    return load_model(opened.loaded.model.config._name_or_path, "cpu")


def test_attention_knows_its_limits() -> None:
    attend = AttentionInterface()[NAME]
    module = torch.nn.Module()
    type(module).__module__, before = "transformers.models.llama.modeling_llama", type(module).__module__
    try:
        module.num_key_value_groups, module.training = 2, False
        q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
        mask = torch.zeros(2, 1, 3, 5).masked_fill(torch.ones(3, 5).triu(3).bool(), torch.finfo(torch.float32).min)
        ours, theirs = (attend(module, q, k, v, m, scaling=0.3)[0] for m in (mask, mask.double().float()))
        torch.testing.assert_close(ours, theirs)
        halves = attend(module, q.bfloat16(), k.bfloat16(), v.bfloat16(), mask.bfloat16(), scaling=0.3)
        assert halves[0].dtype == torch.bfloat16
        assert halves[1] is not None  # eager's own, which tells its weights
        torch.testing.assert_close(halves[0].float(), ours, atol=3e-2, rtol=3e-2)
    finally:
        type(module).__module__ = before


def test_no_graph_below_the_first_trained_parameter(mobilevlm: Opened) -> None:
    loaded = load_model_again(mobilevlm)
    graph, parts = loaded.parts.graph, loaded.parts
    top = graph.n_layers - 1
    ranks = tuple(4 if projection.layer == top else 0 for projection in graph.projections)
    model = attach(loaded.model, RankSchedule("top", graph, ranks, 10**6), parts, seed=0).train()
    grown: dict[str, bool] = {}

    def note(name: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            grown[name] = (output if torch.is_tensor(output) else output[0]).requires_grad

        return hook

    base = model.get_base_model()
    names = [*(f"{parts.layers}.{i}" for i in range(graph.n_layers)), parts.projector, f"{parts.tower}.embeddings"]
    hooks = [base.get_submodule(name).register_forward_hook(note(name)) for name in names]
    batch = mobilevlm.batch(mobilevlm.records)
    with sped_up(model, parts, TrainingConfig()) as positions:
        positions.read(batch)
        logits = model(**unlabelled(batch)).logits
        mean_over_batch(positions)({"logits": logits}, batch["labels"]).backward()
    for hook in hooks:
        hook.remove()
    assert grown == {name: name == f"{parts.layers}.{top}" for name in names}


def losses(opened: Opened, folder: Path, records: list[Record], **settings: Any) -> list[float]:
    """Of a run of three steps with this adapter's schedule."""
    loaded = load_model_again(opened)
    data = InstructionDataset(records, opened.reader, 512)
    config = TrainingConfig(steps=3, batch_size=4, learning_rate=1e-2, save_steps=10**6, **settings)
    with adapting(loaded, uniform(loaded), config, 0) as model:
        done = finetune(model, loaded, InstructionData(data, data, opened.reader), config, 0, folder)
    return [loss for _, loss in done.train_losses] + [done.validation_loss]


ACCUMULATED: dict[str, Any] = {"device_batch_size": 2}
BY_LENGTH: dict[str, Any] = {"group_by_length": True}


@pytest.mark.parametrize(
    ("settings", "modality"),
    [
        *itertools.product((ACCUMULATED, BY_LENGTH), ("both", "text", "images")),
        ({"workers": 2}, "both"),  # which know nothing of modalities
    ],
    ids=str,
)
def test_a_run_has_the_plain_runs_losses(
    mobilevlm: Opened, tmp_path: Path, settings: dict[str, Any], modality: str
) -> None:
    wanted = {"both": (True, False), "text": (False,), "images": (True,)}[modality]
    records = [record for record in mobilevlm.records if bool(record.image) in wanted] * 3
    plain = {key: value for key, value in settings.items() if key != "workers"}
    found = losses(mobilevlm, tmp_path / "fast", records, **settings)
    assert len(found) == 4
    assert found == pytest.approx(losses(mobilevlm, tmp_path / "plain", records, **plain, **PLAIN), abs=2e-6)


def test_engines_are_the_trainers() -> None:
    cpu = torch.device("cpu")
    assert engine(TrainingConfig(), cpu)["dataloader_num_workers"] == 0
    assert engine(TrainingConfig(workers=3), cpu)["dataloader_prefetch_factor"] == 2
    assert engine(TrainingConfig(compile=True), cpu)["torch_compile"]
    with pytest.raises(ConfigError, match=r"training\.liger.*cpu"):
        engine(TrainingConfig(liger=True), cpu)
    with pytest.raises(ConfigError, match=r"hydra-vlm\[liger\]"):
        engine(TrainingConfig(liger=True), torch.device("cuda"))


def test_fused_adamw_on_the_cpu(tmp_path: Path) -> None:
    assert training_arguments(TrainingConfig(), 0, tmp_path, torch.device("cpu")).optim == "adamw_torch_fused"


def test_attention_that_is_not_installed_is_named(mobilevlm: Opened) -> None:
    with pytest.raises(ConfigError, match="attention=flash_attention_2"):
        load_model(mobilevlm.loaded.model.config._name_or_path, "cpu", attention="flash_attention_2")
    assert load_config(None, ["attention=sdpa"]).attention == "sdpa"


def test_the_benchmarks_contenders_are_real_settings() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    try:
        from bench_training import CONTENDERS
    finally:
        sys.path.pop(0)
    for contender in CONTENDERS.values():
        assert json.loads(TrainingConfig(**contender.settings).model_dump_json())
