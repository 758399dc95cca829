"""What to change when a run will not fit, each change proven by planning the changed configuration again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hydra_vlm.config import Config
from hydra_vlm.planning.plan import GIB, Plan

Planner = Callable[[Config], Plan]


@dataclass(frozen=True)
class Remedy:
    """Changes of the configuration (key -> value), and what they do.

    `saving` is what they save alone in bytes, in the `phase` where they save most of what is too much; `peak` is the
    highest peak of all phases with all remedies so far, and `fits` whether that fits.
    """

    changes: tuple[tuple[str, Any], ...]
    phase: str
    saving: int
    peak: int
    fits: bool

    @property
    def words(self) -> str:
        return " ".join(f"{key}={_text(value)}" for key, value in self.changes)

    def to_json(self) -> dict[str, Any]:
        return {
            "changes": dict(self.changes),
            "phase": self.phase,
            "saving": self.saving,
            "peak_bytes": self.peak,
            "fits": self.fits,
        }


def remedies(config: Config, plan: Plan, planner: Planner) -> tuple[Remedy, ...]:
    """The changes, in order of what they cost, until every phase fits; each is added to those before it.

    A change that helps no phase that is too large is left out. If all of them do not do, the last one's `fits` is
    False.
    """
    found: list[Remedy] = []
    now, current = config, plan
    for changes in _ladder(config, plan):
        if current.fits:
            break
        tried = _changed(now, changes)
        after = planner(tried)
        if after.excess < current.excess:
            phase, saving = _saved(plan, planner(_changed(config, changes)))
            found.append(Remedy(changes, phase, saving, after.peak.memory.total, after.fits))
            now, current = tried, after
    return tuple(_without_steps(found))


def _saved(before: Plan, after: Plan) -> tuple[str, int]:
    """The phase beyond the memory in which most is saved, and how much; a phase that is gone counts whole."""
    left = {phase.name: phase.memory.total for phase in after.phases}
    large = [phase for phase in before.phases if phase.memory.total > before.device.memory]
    savings = {phase.name: phase.memory.total - left.get(phase.name, 0) for phase in large}
    name = max(savings, key=savings.__getitem__)
    return name, savings[name]


def _ladder(config: Config, plan: Plan) -> Iterator[tuple[tuple[str, Any], ...]]:
    """What costs nothing but time first; what touches the numbers of the result last."""
    training = config.training
    kind = plan.device.kind
    if kind == "cpu" and training.cache_gigabytes:
        yield (("training.cache_gigabytes", 0),)
    evaluated = config.evaluation.batch_size
    while evaluated > 1:
        evaluated = max(1, evaluated // 4)
        yield (("evaluation.batch_size", evaluated),)
    for rows in _smaller(training.batch_size, training.device_batch_size or training.batch_size):
        yield (("training.device_batch_size", rows),)
    yield (("training.gradient_checkpointing", True),)
    if kind == "cuda":
        yield (("training.gradient_checkpointing", True), ("training.offload_activations", True))
    yield (("training.precision", "bf16"),)
    yield (("dtype", "bfloat16"),)
    yield (("training.optimizer", "adamw-8bit"),)
    if "full" in config.schedules:
        yield (("schedules", tuple(name for name in config.schedules if name != "full")),)
    yield (("quantization", "nf4"),)
    length = config.data.max_length
    while length > 256 and not plan.data.is_read:
        length //= 2
        yield (("data.max_length", length),)


def _smaller(batch: int, rows: int) -> Iterator[int]:
    """Divisors of the global batch below `rows`, each about half of the one before."""
    below = [d for d in range(rows - 1, 0, -1) if batch % d == 0]
    last = rows
    for divisor in below:
        if divisor <= last // 2 or divisor == 1:
            last = divisor
            yield divisor


def _changed(config: Config, changes: tuple[tuple[str, Any], ...]) -> Config:
    values = config.model_dump()
    for key, value in changes:
        *sections, leaf = key.split(".")
        target = values
        for section in sections:
            target = target[section]
        target[leaf] = value
    return Config.model_validate(values)


def _without_steps(found: list[Remedy]) -> Iterator[Remedy]:
    """Of several steps of one key the last alone."""
    last = {remedy.changes[-1][0]: i for i, remedy in enumerate(found)}
    return (remedy for i, remedy in enumerate(found) if i in last.values())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def remedy_text(plan: Plan, found: tuple[Remedy, ...]) -> str:
    """The remedies as lines for people."""
    wanted = f"{plan.peak.memory.total / GIB:.2f} GiB ({plan.peak.name}) of {plan.device.memory / GIB:.2f} GiB"
    if plan.fits:
        return f"fits: the peak is {wanted}"
    lines = [f"does not fit: the peak is {wanted}. Lower it, one after another:"]
    for remedy in found:
        fits = "fits" if remedy.fits else "not yet"
        saving = f"alone saves {remedy.saving / GIB:.2f} GiB of {remedy.phase}"
        lines.append(f"  {remedy.words:<45} {saving}; then the peak is {remedy.peak / GIB:.2f} GiB: {fits}")
    if not found or not found[-1].fits:
        lines.append("  that is not enough: take a smaller model, shorter rows, or several devices (FSDP, ZeRO-3)")
    return "\n".join(lines)
