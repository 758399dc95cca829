"""Measure whether the embedded default can tell schedules apart (the tables in docs/log.md).

    python tools/measure_regime.py --out build/regime [key.sub=value ...]          # run or go on; prints the tables
    python tools/measure_regime.py --out build/regime --only budgets               # one part: budgets | schedules

Parts: zero-shot; uniform LoRA at a quarter, half, one, two and four times the budget's rank; full fine-tuning;
twelve schedules at one budget. Each with seeds 0-2. Finished trials are kept and never repeated.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from hydra_vlm.allocation import AllocationRequest, Budget, allocate
from hydra_vlm.config import load_config, split_overrides
from hydra_vlm.graph import ComputationGraph
from hydra_vlm.measuring import measure_profile
from hydra_vlm.records import TrialRecord
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.trials import Study, prepare_study, run_trial

SEEDS = (0, 1, 2)
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def placed(graph: ComputationGraph, budget: Budget, name: str, keep: set[tuple[int, str]]) -> RankSchedule:
    """The whole budget on some projections, the others not adapted."""
    cost = sum(p.cost for p in graph.projections if (p.layer, p.component) in keep)
    rank = budget.parameters // cost
    ranks = tuple(rank if (p.layer, p.component) in keep else 0 for p in graph.projections)
    return RankSchedule(name, graph, ranks, budget.parameters)


def contrasting(study: Study) -> Iterable[RankSchedule]:
    """Twelve schedules at the study's budget, from close to uniform to extreme."""
    graph, budget, profile = study.graph, study.budget, measure_profile(study)
    request = AllocationRequest(graph, budget, profile, n_stages=3, delta=1)
    for name in ("uniform", "coarse", "fine", "exponential", "decreasing"):
        yield named(name, allocate(name, request))
    yield named("coarse-delta-2", allocate("coarse", replace(request, delta=2)))
    yield named("fine-profile", allocate("fine", replace(request, rule="profile")))
    yield named("random", allocate("random", request))
    pairs = [(p.layer, p.component) for p in graph.projections]
    half = graph.n_layers // 2
    yield placed(graph, budget, "first-half", {(i, c) for i, c in pairs if i < half})
    yield placed(graph, budget, "second-half", {(i, c) for i, c in pairs if i >= half})
    yield placed(graph, budget, "attention-only", {(i, c) for i, c in pairs if c in ATTENTION})
    yield placed(graph, budget, "feed-forward-only", {(i, c) for i, c in pairs if c not in ATTENTION})


def named(name: str, schedule: RankSchedule) -> RankSchedule:
    """The schedule under the name that its trials are filed by."""
    return replace(schedule, name=name)


def budgets(study: Study) -> Iterable[RankSchedule]:
    """Uniform LoRA at a quarter, half, one, two and four times the budget's rank (those above zero)."""
    for factor in (0.25, 0.5, 1, 2, 4):
        rank = factor * study.budget.rank
        if rank >= 1:
            made = allocate("uniform", AllocationRequest(study.graph, Budget.of_rank(study.graph, int(rank))))
            yield named("uniform" if factor == 1 else f"uniform-r{int(rank)}", made)


def table(title: str, trials: dict[str, list[TrialRecord]]) -> None:
    """Means and standard deviations over seeds, then the spread between rows against the spread between seeds."""
    measures: dict[str, Callable[[TrialRecord], float]] = {"validation loss": lambda r: r.validation_loss}
    for position, result in enumerate(next(iter(trials.values()))[0].scores):
        measures[result.benchmark] = lambda r, i=position: r.scores[i].value  # type: ignore[misc]
    print(f"\n{title}\n{'':20} {'LoRA':>8} " + " ".join(f"{name:>18}" for name in measures) + "  seconds")
    for name, records in trials.items():
        trained = records[0].schedule.parameters if records[0].schedule else 0
        cells = [[pick(r) for r in records] for pick in measures.values()]
        shown = " ".join(f"{statistics.mean(c):10.4f} ± {_spread(c):5.3f}" for c in cells)
        print(f"{name:20} {trained:8,} {shown} {statistics.mean(r.seconds for r in records):8.0f}")
    for what, pick in measures.items():
        groups = [[pick(r) for r in records] for records in trials.values() if len(records) > 1]
        if len(groups) > 1:
            between = statistics.stdev(statistics.mean(g) for g in groups)
            within = statistics.mean(statistics.variance(g) for g in groups) ** 0.5
            print(f"{what}: between rows {between:.4f}, between seeds {within:.4f}, ratio {between / within:.1f}")


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/regime"))
    parser.add_argument("--only", choices=("budgets", "schedules"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--names", nargs="+", help="only these rows (default: all)")
    arguments, overrides = parser.parse_known_args()
    swallowed = [name for name in arguments.names or () if "=" in name]
    if swallowed:
        parser.error(f"{swallowed[0]} would be read as one of --names: put overrides before --names")
    config = load_config(None, split_overrides(overrides))
    study = prepare_study(config, arguments.out)
    parts: dict[str, list[tuple[str, RankSchedule | None]]] = {
        "budgets": [(s.name, s) for s in budgets(study)] + [("full", None)],
        "schedules": [(s.name, s) for s in contrasting(study)],
    }
    run_trial(study, "zero-shot", None, 0)
    for part, wanted in parts.items():
        if arguments.only in (None, part):
            found: dict[str, list[TrialRecord]] = {}
            wanted = [(name, s) for name, s in wanted if arguments.names is None or name in arguments.names]
            for seed in arguments.seeds:
                for name, schedule in wanted:
                    found.setdefault(name, []).append(run_trial(study, name, schedule, seed))
                table(f"{part}, seeds up to {seed}", found)


if __name__ == "__main__":
    main()
