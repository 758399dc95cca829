"""A search without a model: a small space, a sampler that draws from it, a runner that sleeps; no torch.

    python tests/fake_search.py RUN TRIALS [--url URL] [--seconds 0.2] [--grace 2] [--stop MOMENT] [--together N]

works as one worker, from when N are there. Every training and every evaluation writes a line to RUN/log. `--stop` waits
for a kill at a moment: "training" and "evaluation" of the second trial it runs, "starting" of the third, or "asking"
for the first one that is drawn.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import optuna

from fake_run import fake_profile
from hydra_vlm.allocation import AllocationRequest, Budget, allocate
from hydra_vlm.graph import llama_graph
from hydra_vlm.search.membership import adopt
from hydra_vlm.search.objective import Objective
from hydra_vlm.search.proposals import sample
from hydra_vlm.search.samplers import Sight, distributions, within
from hydra_vlm.search.space import Candidate, Space
from hydra_vlm.search.study import Outcome, Say, aloud, candidate_of, create_study, digest, open_storage
from hydra_vlm.search.worker import Plan, work

GRAPH = llama_graph("tiny", 6, 64, 176)


def space() -> Space:
    return Space(GRAPH, Budget.of_rank(GRAPH, 8), fake_profile(GRAPH))


def starters(room: Space) -> tuple[Candidate, ...]:
    """Uniform LoRA and the coarse ranks."""
    request = AllocationRequest(room.graph, room.budget, room.profile, n_stages=2, delta=1)
    found = [adopt(room, allocate(name, request)) for name in ("uniform", "coarse")]
    assert None not in found
    return tuple(c for c in found if c is not None)


class DrawSampler(optuna.samplers.BaseSampler):
    """Draws by trial number; what the study has is drawn again."""

    def __init__(self, room: Space, wait: Callable[[], None] = lambda: None) -> None:
        self.room, self.wait = room, wait

    def infer_relative_search_space(self, study: optuna.Study, trial: Any) -> dict[str, Any]:
        return distributions(self.room)

    def sample_relative(self, study: optuna.Study, trial: Any, search_space: Any) -> dict[str, Any]:
        given = candidate_of(trial)
        if given is not None:
            return within(distributions(self.room), given.values)
        taken = {candidate_of(t) for t in study.get_trials(deepcopy=False) if t.state.name != "FAIL"} - {None}
        keys = {c.key for c in taken if c is not None}
        draw = random.Random(trial.number)
        self.wait()
        found = sample(self.room, draw)
        while found.key in keys:
            found = sample(self.room, draw)
        study._storage.set_trial_user_attr(trial._trial_id, "candidate", found.to_json())
        return found.values

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        raise AssertionError(f"{param_name} is proposed with all others")


def score(candidate: Candidate) -> float:
    return 50.0 + int(digest(candidate), 16) % 100 / 10


def wait_for_the_end(run: Path) -> None:
    (run / "stopped").write_text(str(os.getpid()))
    time.sleep(600)


def fake_runner(run: Path, seconds: float, moment: str = "") -> Callable[..., Outcome]:
    """Trains (a file), evaluates (a record), each in half of the time; goes on as a real one does."""
    runs = 0

    def log(*words: str) -> None:
        with (run / "log").open("a") as file:
            file.write(" ".join((*words, str(os.getpid()))) + "\n")

    def stop(at: str) -> None:
        if at == moment and runs == (3 if at == "starting" else 2):
            wait_for_the_end(run)

    def runner(candidate: Candidate, seed: int, folder: Path, progress: Callable[[int, float], None]) -> Outcome:
        nonlocal runs
        runs += 1
        stop("starting")
        record, trained = folder / "record.json", folder / "adapter"
        if not record.exists():
            folder.mkdir(parents=True, exist_ok=True)
            if not trained.exists():
                log("train", folder.name)
                for step in (1, 2):
                    time.sleep(seconds / 4)
                    progress(step, 1.0)
                stop("training")
                trained.touch()
                log("trained", folder.name)
            stop("evaluation")
            time.sleep(seconds / 2)
            log("scored", folder.name)
            temporary = folder / f".record.{os.getpid()}"
            temporary.write_text(json.dumps({"gqa": score(candidate), "seed": seed}))
            temporary.rename(record)
        return Outcome({"gqa": json.loads(record.read_text())["gqa"]}, 0.5, seconds)

    return runner


def fake_plan(run: Path, trials: int, grace: float = 2.0, **more: Any) -> Plan:
    room = space()
    more.setdefault("sight", Sight(None))  # DrawSampler reads no scores
    return Plan(run, room, Objective(), starters(room), trials, grace=grace, **more)


def fake_study(plan: Plan, url: str | None = None, sampler: Any = None, say: Say = aloud, **plug: Any) -> optuna.Study:
    plan.run.mkdir(parents=True, exist_ok=True)
    plug["sampler"] = sampler or DrawSampler(plan.space)
    return create_study(plan.run, open_storage(plan.run, url, say), url, 1, say, **plug)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("trials", type=int)
    parser.add_argument("--url")
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--grace", type=float, default=2.0)
    parser.add_argument("--stop", default="")
    parser.add_argument("--together", type=int, default=1)
    words = parser.parse_args()
    assert "torch" not in sys.modules
    plan = fake_plan(words.run, words.trials, words.grace)
    (words.run / f"here-{os.getpid()}").touch()
    while len(list(words.run.glob("here-*"))) < words.together:
        time.sleep(0.01)
    wait = partial(wait_for_the_end, words.run) if words.stop == "asking" else lambda: None
    study = fake_study(plan, words.url, DrawSampler(plan.space, wait))
    work(study, plan, fake_runner(words.run, words.seconds, words.stop))
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main()
