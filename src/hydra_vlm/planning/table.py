"""A plan as text for people."""

from hydra_vlm.planning.flops import FORMULA
from hydra_vlm.planning.plan import GIB, Phase, Plan

HEADER = f"{'phase':<18}{'peak GiB':>10}{'rows x tokens':>16}{'FLOPs':>10} a {'unit':<8}{'units':>8}{'in all':>10}"
UNITS = ("", "k", "M", "G", "T", "P", "E", "Z")


def plan_text(plan: Plan) -> str:
    """Header, a line a phase, and what the memory is made of at the widest phase and in training."""
    trained = " + ".join(f"{count:,} {part}" for part, count in plan.trained.items() if count)
    lines = [
        f"{plan.model} on {plan.device.kind}, {plan.device.memory / GIB:.2f} GiB ({plan.device.source})",
        f"trainable parameters: {trained} = {sum(plan.trained.values()):,} (any schedule under the budget: at most)",
        f"data: {plan.data.source}",
        *_packed(plan),
        *(f"{note}; weights counted, FLOPs and activations not" for note in plan.notes),
        "",
        HEADER,
        *(_line(phase) for phase in plan.phases),
        "",
        FORMULA.replace(". ", ".\n  ") + ".",
    ]
    widest = plan.peak
    same = widest.memory == plan.phase("training").memory
    for name in ["training"] if same else ["training", widest.name]:
        lines += ["", f"{name}, at its peak:", *_parts(plan.phase(name))]
    return "\n".join(lines)


def _packed(plan: Plan) -> list[str]:
    batch = plan.phase("training").batch
    if batch.packed is None:
        return []
    whole = batch.rows * plan.data.train.longest
    return [f"rows are packed: of a step's {whole:,} positions {batch.packed:,} go through the decoder"]


def _line(phase: Phase) -> str:
    batch = f"{phase.batch.rows} x {phase.batch.length}"
    units = "?" if phase.steps is None else f"{phase.steps:,}"
    total = "?" if phase.total is None else short(phase.total)
    peak = phase.memory.total / GIB
    each = short(phase.flops) if phase.flops else "?"
    return f"{phase.name:<18}{peak:>10.2f}{batch:>16}{each:>10} a {phase.unit:<8}{units:>8}{total:>10}"


def _parts(phase: Phase) -> list[str]:
    parts = sorted(phase.memory.parts.items(), key=lambda item: -item[1])
    return [f"  {name:<34}{size / 2**20:>12,.1f} MiB" for name, size in parts if size]


def short(number: float) -> str:
    """1.23 T for 1.23e12."""
    for unit in UNITS:
        if number < 1000 or unit == UNITS[-1]:
            break
        number /= 1000
    return f"{number:.3g} {unit}".strip()
