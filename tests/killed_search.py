"""Workers of a search without a model, killed again and again at drawn moments, against the same search left alone.

    python tests/killed_search.py FOLDER --seed 0 --kills 20 --workers 2

A worker is killed before the n-th thing that it asks of the system (a file opened, renamed or removed, a lock, a
pause), or within the n-th line of its journal. So kills fall in asking, proposing, telling, claims, heartbeats,
training and scoring alike. Workers are forked, so that each starts at once; Φ proposes, from scores. What happened is
printed as JSON.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend

from fake_search import fake_plan, fake_runner, fake_study
from hydra_vlm.search.journal import SystemLock
from hydra_vlm.search.objective import Objective
from hydra_vlm.search.phi import PhiSettings
from hydra_vlm.search.samplers import Sight, schedule_sampler
from hydra_vlm.search.study import close_storage, journal
from hydra_vlm.search.worker import Plan, work

MOMENTS = ("open", "os.rename", "os.remove", "fcntl.flock", "time.sleep")
"""Audit events: each is a moment before which a worker may be killed."""

SPAN = 150
"""Moments that a worker may live for; a trial takes about as many."""

STARTUP = 5


def quiet(_: str) -> None:
    """Say nothing."""


def study_of(plan: Plan, sampler: str) -> optuna.Study:
    settings = PhiSettings("ridge", n_startup=STARTUP, pool=16, rounds=2)
    made = schedule_sampler(sampler, plan.space, 0, Objective(), settings, plan.sight.parallel)
    return fake_study(plan, sampler=made)


def plan_of(run: Path, trials: int, sampler: str, parallel: int) -> Plan:
    return fake_plan(run, trials, grace=1.0, sight=Sight.of(sampler, STARTUP, parallel))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def kill_before(moment: int, note: Path) -> None:
    """Have this process killed before its n-th moment, which the note names."""
    moments, written = count(1), []

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in MOMENTS and not written and next(moments) == moment:
            written.append(event)
            on = Path(str(args[0])).name if event not in ("fcntl.flock", "time.sleep") else ""
            note.write_text(f"{event} {on}".strip())
            die()

    sys.addaudithook(watch)


def kill_within_line(line: int, path: Path, note: Path) -> None:
    """Have this process killed when half of the n-th line that it writes to the journal is on the disk."""
    lines, whole = count(1), JournalFileBackend.append_logs

    def append(backend: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        if next(lines) == line:
            lock = SystemLock(path)
            lock.acquire()
            with path.open("ab") as file:
                text = json.dumps(logs[0], separators=(",", ":")).encode()
                file.write(text[: len(text) // 2])
            note.write_text("half a line")
            die()
        whole(backend, logs)

    JournalFileBackend.append_logs = append  # type: ignore[method-assign]


def fork(plan: Plan, sampler: str, seconds: float, draw: random.Random | None, note: Path) -> int:
    """A worker; where `draw` is given it will be killed."""
    struck = None if draw is None else (draw.random() < 0.2, draw.randint(1, SPAN))
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if struck is not None:
            torn, moment = struck
            kill_within_line(1 + moment // 10, journal(plan.run), note) if torn else kill_before(moment, note)
        work(study_of(plan, sampler), plan, fake_runner(plan.run, seconds), quiet)
        code = 0
    finally:
        os._exit(code)


def outcome(plan: Plan, sampler: str) -> list[tuple[Any, ...]]:
    """What a search came to: every trial's number, state, candidate, values and folder."""
    study = study_of(plan, sampler)
    found = [
        (t.number, t.state.name, t.user_attrs.get("key"), t.values, t.user_attrs.get("record"))
        for t in study.get_trials(deepcopy=False)
    ]
    close_storage(study._storage)
    return found


def strike(folder: Path, seed: int, kills: int, workers: int, sampler: str, trials: int) -> dict[str, Any]:
    """One sequence of kills; `differing` lists the trials that an undisturbed search does not have."""
    alone = plan_of(folder / "alone", trials, sampler, workers)
    work(study_of(alone, sampler), alone, fake_runner(alone.run, 0.0), quiet)
    plan, draw, fell = plan_of(folder / "killed", trials, sampler, workers), random.Random(seed), Counter[str]()
    study_of(plan, sampler)
    began, running, note = time.monotonic(), dict[int, Path](), count()
    ended = 0
    while running or ended < workers:
        while len(running) + ended < workers:
            path = plan.run / f"note-{next(note)}"
            left = kills - sum(fell.values()) - len(running)
            running[fork(plan, sampler, 0.01, draw if left > 0 else None, path)] = path
        child, status = os.wait()
        path = running.pop(child)
        if os.WIFSIGNALED(status):
            fell[path.read_text()] += 1
        else:
            assert os.WEXITSTATUS(status) == 0, "a worker failed"
            ended += 1
    expected, found = outcome(alone, sampler), outcome(plan, sampler)
    trained = Counter(line.split()[1] for line in (plan.run / "log").read_text().splitlines() if "trained" in line)
    return {
        "seed": seed,
        "kills": sum(fell.values()),
        "seconds": round(time.monotonic() - began, 1),
        "moments": dict(fell),
        "trials": len(found),
        "trained_twice": [name for name, n in trained.items() if n > 1],
        "differing": [one for one in found if one not in expected] + [one for one in expected if one not in found],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sampler", default="phi")
    parser.add_argument("--trials", type=int, default=24)
    asked = parser.parse_args()
    print(json.dumps(strike(asked.folder, asked.seed, asked.kills, asked.workers, asked.sampler, asked.trials)))


if __name__ == "__main__":
    main()
