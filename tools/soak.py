"""Kill a tiny `tune` run by the real command again and again, and compare it with an undisturbed one.

    python tools/soak.py --kills 30 --seed 0

SIGKILL, SIGTERM and SIGINT come at random moments: while the program starts, in the profile, in training, in writing,
in answering. The same command is started again each time. In the end every record (but its seconds), adapter, metric,
prediction and verdict must be that of the undisturbed run, to the byte.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from striking import start

SENT = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
OPTIONS = (
    "schedules=[uniform, coarse]",
    "training.save_steps=3",
    "training.batch_size=4",
    "training.device_batch_size=2",
    "training.dropout=0.1",
    "profile.steps=20",
    "evaluation.batch_size=2",
)
BEFORE_TRAINING = 0.3
"""Share of the kills that fall before anything new is on the disk."""


def outcome(run: Path) -> dict[str, object]:
    """All that a run is for: its trials without times, its profile and its schedules."""
    found: dict[str, object] = {}
    for path in sorted([*run.glob("trials/*/**/*"), run / "profile.json", *run.glob("schedules/*")]):
        name = str(path.relative_to(run))
        if path.name == "record.json":
            record = json.loads(path.read_text())
            found[name] = {key: value for key, value in record.items() if key != "seconds"}
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def new_on_disk(run: Path) -> set[str]:
    """What tells that a run has got on: checkpoints, adapters, predictions, the profile's folder."""
    names = ("profile-run", "trials/*/checkpoints/*/trainer_state.json", "trials/*/adapter/*", "trials/*/predictions/*")
    return {str(path) for name in names for path in run.glob(name)}


def kill_once(config: Path, run: Path, draw: random.Random, starting: float, span: float) -> tuple[str, int] | None:
    """Start the command and send it a signal at a random moment: (signal and moment, exit code); None: it ended."""
    before, process, began = new_on_disk(run), start(config, run), time.monotonic()
    early = draw.random() < BEFORE_TRAINING
    wait = draw.uniform(0, starting) if early else draw.uniform(0, span)
    if not early:
        while process.poll() is None and new_on_disk(run) <= before:
            time.sleep(0.01)
        began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < wait:
        time.sleep(0.005)
    if process.poll() is not None:
        assert process.returncode == 0, f"ended by itself with exit code {process.returncode}: see {run}.log"
        return None
    number = draw.choice(SENT)
    process.send_signal(number)
    code = process.wait()
    return f"{number.name} {'starting' if early else 'working'}", code


def soak(home: Path, kills: int, steps: int, seed: int) -> None:
    """Both runs, what happened, and an AssertionError where they differ."""
    from tiny import save_tiny_model, toy_config, write_toy_data

    made = toy_config(
        save_tiny_model(home / "model"), write_toy_data(home / "toy"), *OPTIONS, f"training.steps={steps}"
    )
    config = home / "config.yaml"
    config.write_text(made.to_yaml())
    began = time.monotonic()
    process, whole = start(config, home / "undisturbed"), home / "undisturbed"
    while process.poll() is None and not new_on_disk(whole):
        time.sleep(0.01)
    starting = time.monotonic() - began
    assert process.wait() == 0, f"the undisturbed run failed: see {whole}.log"
    working = time.monotonic() - began - starting
    print(f"undisturbed: {starting:.1f} s to start, {working:.1f} s of work", flush=True)
    draw, run, seen = random.Random(seed), home / "killed", Counter[str]()
    while sum(seen.values()) < kills:
        struck = kill_once(config, run, draw, starting, span=1.2 * working / kills)
        assert struck is not None, f"it ended after {sum(seen.values())} kills: ask for more --steps"
        seen[f"{struck[0]}: exit code {struck[1]}"] += 1
        print(f"kill {sum(seen.values())}: {struck[0]}, exit code {struck[1]}", flush=True)
    assert start(config, run).wait() == 0, f"the killed run failed at its end: see {run}.log"
    expected, found = outcome(whole), outcome(run)
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    log = (home / "killed.log").read_text(errors="replace")
    print("\n".join(f"{count:3} x {what}" for what, count in sorted(seen.items())))
    print(
        f"{kills} kills in {time.monotonic() - began:.0f} s, {log.count('is damaged')} damaged checkpoints passed over"
    )
    assert "Traceback" not in log, f"a traceback is in {home}/killed.log"
    assert not differing, f"differs from the undisturbed run: {', '.join(differing)}"
    print(f"the same {len(expected)} files as undisturbed, to the byte (record.json without its seconds)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of each of the two trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work in this new folder and keep it")
    asked = parser.parse_args()
    if asked.keep is not None:
        asked.keep.mkdir(parents=True)
        soak(asked.keep, asked.kills, asked.steps, asked.seed)
    else:
        with tempfile.TemporaryDirectory() as there:
            soak(Path(there), asked.kills, asked.steps, asked.seed)
