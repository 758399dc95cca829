"""A run folder made of synthetic records, as `hydra-vlm tune` leaves it: no model, no training."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra_vlm.benchmarks.protocol import Score
from hydra_vlm.graph import ComputationGraph, llama_graph
from hydra_vlm.moving.plan import Move
from hydra_vlm.pilot.candidates import Pilot, Tried, Tuned
from hydra_vlm.profile import GradientNormProfile, partition_into_stages
from hydra_vlm.records import TrialRecord
from hydra_vlm.schedule import RankSchedule, hand_schedule

ACCURACY = {"zero-shot": 0.2, "uniform": 0.80, "coarse": 0.81, "fine": 0.84, "full": 0.9}
"""What each trial gets right, before noise."""

LOSS = {
    "zero-shot": math.nan,
    "uniform": 0.42,
    "coarse": 0.40,
    "fine": 0.37,
    "full": 0.30,
    "squeeze": 0.35,
    "dynamic": 0.34,
}
TASKS = ("shape", "colour")
MOVES = {"squeeze": (100,), "dynamic": (60, 90, 120)}
"""After which of 200 steps ranks move in trials of these names; they have a pilot and leave no schedule file."""


def fake_profile(graph: ComputationGraph, seed: int = 0) -> GradientNormProfile:
    """Norms that rise with depth, highest for Up and lowest for Q and K, A below B."""
    rng = random.Random(seed)
    worth = {"q_proj": 0.6, "k_proj": 0.65, "up_proj": 1.7}
    mean = tuple(
        (0.3 * norm, norm)
        for p in graph.projections
        for norm in [0.04 * worth.get(p.component, 1.4) * (0.3 + p.layer / graph.n_layers) * rng.uniform(0.9, 1.1)]
    )
    spread = tuple((0.2 * a, 0.2 * b) for a, b in mean)
    return GradientNormProfile(graph, mean, spread, steps=40, skipped=5)


def fake_schedules(profile: GradientNormProfile, rank: int = 8) -> dict[str, RankSchedule]:
    """Uniform, coarse (three stages) and fine (Q and K lower, Up higher), all within uniform's budget."""
    graph = profile.graph
    budget = rank * graph.cost
    stages = partition_into_stages(profile.layer_norms(), min(3, graph.n_layers))
    low = rank - 2
    rest = rank * graph.n_layers - sum(len(stage) * (low + 2 * i) for i, stage in enumerate(stages[:-1]))
    stage_ranks = [*(low + 2 * i for i in range(len(stages) - 1)), rest // len(stages[-1])]
    coarse = hand_schedule(graph, stages, stage_ranks, budget, "coarse")
    offset = {"q_proj": -2, "k_proj": -2, "up_proj": 1}
    ranks = [r + offset.get(p.component, 0) for r, p in zip(coarse.ranks, graph.projections, strict=True)]
    uniform = RankSchedule("uniform", graph, (rank,) * len(graph.projections), budget)
    return {
        "uniform": uniform,
        "coarse": coarse,
        "fine": RankSchedule("fine", graph, tuple(ranks), budget, stages, delta=2),
    }


def fake_run(
    folder: Path,
    names: Sequence[str] = ("zero-shot", "uniform", "coarse", "fine", "full"),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    n_layers: int = 8,
    questions: int = 400,
    benchmarks: Sequence[str] = ("easy-vqa",),
    profile: bool = True,
    extra: Mapping[str, RankSchedule] | None = None,
) -> Path:
    """Write a run folder and return it; `extra` schedules become trials too when `names` has them."""
    graph = llama_graph("tiny", n_layers, 64, 176)
    measured = fake_profile(graph)
    schedules = fake_schedules(measured) | dict(extra or {})
    folder.mkdir(parents=True, exist_ok=True)
    moving = {name: replace(schedules["fine"], name=name) for name in names if name in MOVES}
    config = "model: embedded\ndata: {train: easy-vqa, test: null}\ntraining: {steps: 200, batch_size: 32}\n"
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    environment = {"command": "hydra-vlm tune --out RUN", "device": "cpu", "versions": {"torch": "2.13.0"}}
    write_json(folder / "environment.json", environment)
    write_json(folder / "graph.json", graph.to_json())
    if profile:
        write_json(folder / "profile.json", measured.to_json())
    for name, schedule in schedules.items():
        write_json(folder / "schedules" / f"{name}.json", schedule.to_json())
    for name in names:
        for seed in seeds[:1] if name == "zero-shot" else seeds:
            fake_trial(folder, name, seed, (schedules | moving).get(name), questions, benchmarks)
    return folder


def fake_trial(
    folder: Path,
    name: str,
    seed: int,
    schedule: RankSchedule | None,
    questions: int = 400,
    benchmarks: Sequence[str] = ("easy-vqa",),
) -> None:
    """Write one trial's record and verdicts; seed noise is common to trials of one seed, as in a real run."""
    common, own = random.Random(seed), random.Random(f"{name}-{seed}")
    noise = common.gauss(0, 0.01) + own.gauss(0, 0.004)
    home = folder / "trials" / f"{name}-seed{seed}"
    scores = []
    for benchmark in benchmarks:
        hard = random.Random(benchmark)
        p = ACCURACY.get(name, 0.8) + noise
        credits = [float(0.6 * hard.random() + 0.4 * own.random() < p) for _ in range(questions)]
        groups = {task: 100 * sum(credits[i::2]) / len(credits[i::2]) for i, task in enumerate(TASKS)}
        scores.append(Score(benchmark, 100 * sum(credits) / questions, questions, 0, groups))
        lines = [json.dumps({"id": f"q{i}", "answer": "", "credit": c}) for i, c in enumerate(credits)]
        path = home / "verdicts" / f"{benchmark}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    last = LOSS.get(name, 0.4) - noise
    steps = range(5, 205, 5) if name != "zero-shot" else ()
    trained = {"lora": schedule.parameters, "projector": 5_000} if schedule else {}
    record = TrialRecord(
        name=name,
        seed=seed,
        schedule=schedule,
        trained={"decoder": 500_000, "projector": 5_000} if name == "full" else trained,
        train_losses=tuple((s, last + 2.5 * math.exp(-s / 35) + own.gauss(0, 0.04)) for s in steps),
        validation_loss=last,
        scores=tuple(scores),
        seconds=31.5,
    )
    if name in MOVES and schedule is not None:
        pilot = fake_pilot(seed)
        moves = fake_moves(schedule, MOVES[name], "phi" if name == "dynamic" else "spectral", seed)
        rates = {"a": pilot.chosen.learning_rate, "b": 4 * pilot.chosen.learning_rate, "projector": 1e-3}
        record = replace(record, moves=moves, pilot=pilot, learning_rates=rates)
    write_json(home / "record.json", record.to_json())


def fake_moves(end: RankSchedule, steps: Sequence[int], decider: str, seed: int = 0) -> tuple[Move, ...]:
    """From twice uniform LoRA's rank, in as many steps, to the ranks of `end`; phi has probed four schedules."""
    graph, rng = end.graph, random.Random(seed)
    before = (2 * end.budget // graph.cost,) * len(graph.projections)
    moves = []
    for number, step in enumerate(steps, start=1):
        share = number / len(steps)
        ranks = tuple(round(b + share * (e - b)) for b, e in zip(before, end.ranks, strict=True))
        after = replace(end, ranks=ranks, budget=max(end.budget, graph.parameters(ranks)), stages=None, delta=None)
        spectra = tuple(
            tuple(rng.uniform(1, 3) * 0.5**k * (1 + p.layer / graph.n_layers) for k in range(b))
            for b, p in zip(before, graph.projections, strict=True)
        )
        spectra = tuple(tuple(sorted(found, reverse=True)) for found in spectra)
        tried = [tuple(max(1, rank + rng.randint(-1, 0)) for rank in ranks) for _ in range(3)]
        probed = tuple((found, 0.5 + rng.random() / 10) for found in tried)
        told = (*probed, (ranks, 0.49)) if decider == "phi" else ()
        moves.append(Move(step, decider, before, after, 0.46, 0.49, spectra, told, 640, 2.5))
        before = ranks
    return tuple(moves)


def fake_pilot(seed: int = 0) -> Pilot:
    """Four candidates: the guess, one that was ended, a tie at a higher rate, and the winner."""
    rates = [Tuned(rate, 4.0, 1e-3) for rate in (1e-3, 1.5625e-2, 6.25e-3, 2.5e-3 + seed * 1e-4)]
    losses = (0.9, math.nan, 0.699, 0.7)
    tried = tuple(Tried(rate, loss, 19) for rate, loss in zip(rates, losses, strict=True))
    return Pilot(tried, rates[-1], thrown_away=60)


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
