"""How much contrast between layers it takes before rank matters: the paper's schedule and wilder ones against uniform.

    OMP_NUM_THREADS=1 python tools/measure_contrast.py --base build/rankbench/base --out build/contrast [--seeds 10]

The paper's (124, 126, 131) differs from uniform LoRA at 128 by 3 %. Rank 128 of a decoder 2,048 wide is rank 8 of the
embedded model's 128, where one unit is 12 %: its smallest contrast, Δd = 1 over three stages, is nearest. Beside it Δd
of 2, 4, 6 by the same rule, and the half of the layers with the lower norms unadapted; each under constant α/r and
under rank-stabilised scale, each with the same seeds and data order. Resumable; several processes may share the folder
(`--part 0/2`, `--part 1/2`). `--table` prints paired differences with 95 % t intervals.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from build_rankbench import TRIAL
from hydra_vlm.allocation import AllocationRequest, allocate
from hydra_vlm.config import load_config
from hydra_vlm.files import read_json
from hydra_vlm.measuring import measure_profile
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.records import TrialRecord
from hydra_vlm.report.statistics import paired_seed_interval
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.search.proposals import repair
from hydra_vlm.search.space import Space
from hydra_vlm.trials import Study, prepare_study, resolve_budget, run_trial

RULES = ("constant", "rslora")
DELTAS = (1, 2, 4, 6)
HALF = "upper half by norm only"
SETTINGS = (*TRIAL, "budget.rank=8")
Measure = Callable[[TrialRecord], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="build/rankbench/base", help="see tools/build_rankbench.py")
    parser.add_argument("--out", type=Path, default=Path("build/contrast"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--part", default="0/1", help="which of how many processes this one is")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if asked.table:
        table(asked.out)
    else:
        train(asked)


def train(asked: argparse.Namespace) -> None:
    """Every schedule under both scalings, seed by seed; those between the extremes come last."""
    mine, of = map(int, asked.part.split("/"))
    studies = {rule: opened(asked.base, asked.out / rule, rule) for rule in RULES}
    names = list(studies[RULES[0]][1])
    first = [names[0], names[1], names[-2], names[-1]]  # uniform, the paper's, the widest, half unadapted
    for group in (first, [name for name in names if name not in first]):
        for seed, rule, name in itertools.product(range(asked.seeds), RULES, group):
            if (seed + RULES.index(rule)) % of == mine:
                study, schedules = studies[rule]
                run_trial(study, name, schedules[name], seed)


def opened(base: str, out: Path, rule: str) -> tuple[Study, dict[str, RankSchedule]]:
    """The run folder of a scaling rule, and its schedules under one budget and one profile."""
    # Under rank-stabilised scale the factor is value/√r: the same update as constant α/r = 2 at the budget's rank.
    value = 2.0 if rule == "constant" else 2.0 * 8**0.5
    config = load_config(None, (f"model={base}", *SETTINGS, f"scaling.rule={rule}", f"scaling.value={value}"))
    study = prepare_study(config, out)
    return study, schedules_of(study, measure_profile(study))


def schedules_of(study: Study, profile: GradientNormProfile) -> dict[str, RankSchedule]:
    """Uniform, the paper's rule with growing Δd, and half of the layers unadapted."""
    scaling = study.config.scaling
    graph, budget = study.graph, resolve_budget(study.graph, study.config)
    request = AllocationRequest(graph, budget, profile, n_stages=3)
    found = {"uniform": allocate("uniform", request)}
    found |= {f"coarse, delta {delta}": allocate("coarse", replace(request, delta=delta)) for delta in DELTAS}
    norms = profile.layer_norms()
    upper = sorted(range(graph.n_layers), key=lambda layer: norms[layer])[graph.n_layers // 2 :]
    ranks = [int(projection.layer in upper) for projection in graph.projections]
    found[HALF] = repair(Space(graph, budget, profile, open=True), ranks).schedule
    shared = replace(request.scaling, rule=scaling.rule, value=scaling.value)
    return {name: replace(schedule, scaling=shared) for name, schedule in found.items()}


def table(out: Path) -> None:
    """Differences to uniform LoRA, paired by seed, in Markdown."""
    print("| scaling | schedule | mean rank of each layer | seeds | validation loss | mean of six scores |")
    print("|---|---|---|---|---|---|")
    for rule in RULES:
        records = [TrialRecord.from_json(read_json(path)) for path in sorted((out / rule).glob("trials/*/record.json"))]
        by_name: dict[str, dict[int, TrialRecord]] = {}
        for record in records:
            by_name.setdefault(record.name, {})[record.seed] = record
        for name in sorted(by_name, key=lambda name: (name != "uniform", name)):
            mine, uniform = by_name[name], by_name["uniform"]
            shared = sorted(mine.keys() & uniform.keys())
            if not shared:
                continue
            print(f"| {rule} | {name} | {ranks_of(mine[shared[0]])} | {len(shared)} | ", end="")
            print(" | ".join(cell(mine, uniform, shared, measure) for measure in (loss, mean_score)), "|")


def cell(mine: dict[int, TrialRecord], uniform: dict[int, TrialRecord], seeds: list[int], measure: Measure) -> str:
    """The mean of uniform LoRA, or a difference to it."""
    if mine is uniform:
        return f"{sum(measure(uniform[seed]) for seed in seeds) / len(seeds):.3f}"
    ours, theirs = ({seed: measure(runs[seed]) for seed in seeds} for runs in (mine, uniform))
    found = paired_seed_interval(ours, theirs)
    assert found is not None  # there are shared seeds
    return f"{found.mean:+.3f}" + (f" [{found.low:+.3f}, {found.high:+.3f}]" if found.low is not None else "")


def loss(record: TrialRecord) -> float:
    """The validation loss."""
    return record.validation_loss


def mean_score(record: TrialRecord) -> float:
    """The mean of the six, each in per cent of its maximum."""
    return sum(100 * score.value / score.maximum for score in record.scores) / len(record.scores)


def ranks_of(record: TrialRecord) -> str:
    """Mean rank of each layer."""
    schedule = record.schedule
    assert schedule is not None  # LoRA
    by_layer: dict[int, list[int]] = {}
    for projection, rank in zip(schedule.graph.projections, schedule.ranks, strict=True):
        by_layer.setdefault(projection.layer, []).append(rank)
    return " ".join(f"{sum(ranks) / len(ranks):.3g}" for ranks in by_layer.values())


if __name__ == "__main__":
    main()
