"""A plan: for each phase of a run its peak memory by what holds it, and its FLOPs, from shapes and a configuration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from hydra_vlm.config import Config
from hydra_vlm.moving.plan import DYNAMIC, SQUEEZE
from hydra_vlm.planning import flops, memory
from hydra_vlm.planning.lengths import DataSize, Rows
from hydra_vlm.planning.shapes import Batch, Manner, Memory, Shape

GIB = 2**30
WIDE = "wide training"
"""The phase until ranks have moved to the budget, planned as if all of it were as wide as its beginning."""

RUNTIME = {"cpu": 0.52, "cuda": 0.6, "mps": 0.6}
"""GiB that are taken before there is a model: Python with torch and transformers after a first step (resident memory on
Linux, as `tools/bench_plan.py` measures it), or the CUDA context with its libraries (not measured here)."""


@dataclass(frozen=True)
class Device:
    """Where a run is to be: its kind, its memory in bytes, and where that number is from."""

    kind: str
    memory: int
    source: str


@dataclass(frozen=True)
class Phase:
    """One phase of a run: memory at its peak, FLOPs of a step or batch, and how many of these there are.

    `steps` None: as many as the data that could not be read will take. `once` are FLOPs spent before the first step.
    """

    name: str
    unit: str
    memory: Memory
    flops: int
    steps: int | None
    batch: Batch
    once: int = 0

    @property
    def total(self) -> int | None:
        return None if self.steps is None else self.once + self.flops * self.steps

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "bytes": dict(self.memory.parts),
            "peak_bytes": self.memory.total,
            f"flops_per_{self.unit}": self.flops,
            "steps": self.steps,
            "flops": self.total,
            "rows": self.batch.rows,
            "length": self.batch.length,
        }


@dataclass(frozen=True)
class Plan:
    """What a configuration will take on a device."""

    model: str
    device: Device
    trained: Mapping[str, int]
    phases: tuple[Phase, ...]
    data: DataSize
    manner: Manner
    notes: tuple[str, ...] = ()
    """What of the adapted layers LoRA leaves out. Experts are among the weights, but their FLOPs are not counted."""

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.memory.total)

    @property
    def fits(self) -> bool:
        return not self.excess

    @property
    def excess(self) -> int:
        """Bytes beyond the device's memory, of all phases together."""
        return sum(max(0, phase.memory.total - self.device.memory) for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "device": {"kind": self.device.kind, "bytes": self.device.memory, "source": self.device.source},
            "trained": dict(self.trained),
            "phases": [phase.to_json() for phase in self.phases],
            "peak_bytes": self.peak.memory.total,
            "fits": self.fits,
            "data": self.data.source,
            "formula": flops.FORMULA,
            "notes": list(self.notes),
        }


def manner_of(config: Config, kind: str) -> Manner:
    """How a device of that kind will compute this configuration; a CUDA device is taken to compute in bfloat16."""
    cuda = kind == "cuda"
    training = config.training
    eager = config.attention == "eager" or (config.attention == "auto" and kind == "cpu")
    small = config.dtype == "bfloat16" or (config.dtype == "auto" and cuda)
    return Manner(
        weight=2 if small else 4,
        autocast=training.precision == "bf16" or (training.precision == "auto" and cuda),
        attention="eager" if eager else "sdpa",
        checkpointing=training.gradient_checkpointing,
        offload=training.offload_activations and kind != "cpu",
        optimizer=training.optimizer,
        four_bits=config.quantization == "nf4",
        supervised_only=training.supervised_only,
        packed=training.supervised_only and training.packed_rows and not training.compile and not training.dropout,
    )


def plan_of(
    config: Config, shape: Shape, data: DataSize, device: Device, devices: int = 1, wide: Shape | None = None
) -> Plan:
    """Every phase that the configuration asks for.

    `shape` carries the measuring (uniform) adapter; every schedule under the same budget has at most its parameters.
    `wide` carries the adapter with which a training begins whose ranks move, where they do.
    """
    how = manner_of(config, device.kind)
    training = config.training
    on_one = training.device_batch_size or max(1, training.batch_size // devices)
    accumulation = max(1, training.batch_size // (on_one * devices))
    kept = _cached_bytes(shape, data, how)
    is_cached = data.is_read and 0 < kept <= training.cache_gigabytes * 1e9
    cached = replace(shape, tower=replace(shape.tower, is_cached=is_cached))
    extra = _beside(device, kept if is_cached else 0)
    trains_projector = shape.projector.parameters > 0 and "projector" not in config.adapt
    batch = _batches(data.train, shape, how)
    worst = batch(on_one, data.train.longest, data.train.longest)
    usual = batch(on_one, data.train.padded(on_one, training.group_by_length), fmean(data.train.lengths))
    once = data.images * shape.tower.forward if is_cached else 0

    def step(full: bool, steps: int | None, name: str, first: int = 0, widely: Shape | None = None) -> Phase:
        own = replace(widely, tower=cached.tower) if widely else cached.bare if full else cached
        held = memory.training_step(own, worst, how, full, trains_projector)
        work = accumulation * flops.training_step(own, usual, how, full, trains_projector).total
        return Phase(name, "step", held + extra, work, steps, worst, first)

    steps = _steps(config, data)
    phases = [step(False, config.profile.steps, "profile", once), step(False, steps, "training")]
    if wide is not None:
        share = {"squeeze": SQUEEZE, "dynamic": DYNAMIC}[training.ranks][-1]
        phases.append(step(False, None if steps is None else round(share * steps), WIDE, widely=wide))
    if "full" in config.schedules:
        phases.append(step(True, steps, "full fine-tuning"))
    validation = _validation(cached, data, how, 2 * on_one, trains_projector, extra)
    evaluation = _evaluation(config, cached, data, how, extra)
    phases += [phase for phase in (validation, evaluation) if phase is not None]
    phases.append(_search(config, phases))
    if is_cached:
        phases.append(_encoding(cached, data, how, extra, device))
    trained = {"lora": shape.adapter, "projector": shape.projector.parameters if trains_projector else 0}
    return Plan(shape.name, device, trained, tuple(phases), data, how)


def _batches(rows: Rows, shape: Shape, how: Manner) -> Callable[[int, float, float], Batch]:
    """How rows become a batch in training: by number, padded length, own length."""
    if how.packed and shape.can_pack:
        return rows.packed
    return lambda count, length, _: rows.batch(count, length)


def _steps(config: Config, data: DataSize) -> int | None:
    """Optimizer steps of a training run."""
    if config.training.steps is None and not data.is_read:
        return None
    return config.training.total_steps(data.train.count if data.is_read else 0)


def _cached_bytes(shape: Shape, data: DataSize, how: Manner) -> int:
    return data.images * shape.tower.features * how.weight // memory.FLOAT


def _beside(device: Device, features: int) -> Memory:
    """What is there beside the model: the runtime; on a CPU the features, which a GPU's host keeps."""
    parts = {"Python, torch": int(RUNTIME.get(device.kind, 0.6) * GIB)}
    if device.kind == "cpu" and features:
        parts["image features"] = features
    return Memory(parts)


def _validation(
    shape: Shape, data: DataSize, how: Manner, rows: int, trains_projector: bool, extra: Memory
) -> Phase | None:
    if data.validation is None:
        return None
    rows = min(rows, data.validation.count or rows)
    longest = data.validation.longest
    batch = _batches(data.validation, shape, how)(rows, longest, longest)
    few = memory.head_positions(batch, how)
    work = flops.forward(shape, batch, few, few).total
    batches = -(-data.validation.count // rows) if data.is_read else None
    return Phase(
        "validation", "batch", memory.validation_step(shape, batch, how, trains_projector) + extra, work, batches, batch
    )


def _evaluation(config: Config, shape: Shape, data: DataSize, how: Manner, extra: Memory) -> Phase | None:
    if data.tests is None:
        return None
    rows = min(config.evaluation.batch_size, data.tests.count or config.evaluation.batch_size)
    batch, new = data.tests.batch(rows, data.tests.longest), config.evaluation.max_new_tokens
    mean = replace(batch, length=round(data.tests.padded(rows, by_length=True)))
    work = flops.generation(shape, mean, new).total
    batches = -(-data.tests.count // rows) if data.is_read else None
    return Phase("evaluation", "batch", memory.generation(shape, batch, new, how) + extra, work, batches, batch)


def _search(config: Config, phases: list[Phase]) -> Phase:
    """A search: its trials and, in the end, two schedules with every final seed; each trains, validates and answers."""
    parts = [phase for phase in phases if phase.name in ("training", "validation", "evaluation")]
    known = [phase.total for phase in parts]
    one = 0 if None in known else sum(total for total in known if total is not None)
    trials = config.search.trials + 2 * len(config.search.final_seeds)
    widest = max(parts, key=lambda phase: phase.memory.total)
    once = 0 if phases[0].total is None else phases[0].total
    return Phase("search", "trial", widest.memory, one, None if None in known else trials, widest.batch, once)


def _encoding(shape: Shape, data: DataSize, how: Manner, extra: Memory, device: Device) -> Phase:
    """Each image through the frozen tower, once."""
    rows = min(8 if device.kind == "cpu" else 64, data.images)
    held = {"tower": rows * shape.tower.transient * how.weight // memory.FLOAT, "pixels": rows * shape.tower.pixels}
    weights = memory.weights(shape, how, False)
    batch = Batch(rows, shape.patches, rows, 0)
    return Phase(
        "image features", "batch", weights + Memory(held) + extra, rows * shape.tower.forward,
        -(-data.images // rows), batch,
    )  # fmt: skip
