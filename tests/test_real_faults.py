"""Faults of the machine as they really come, to the real command: a full file system, an address space, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny import toy_config, write_toy_data

pytestmark = pytest.mark.slow

LIMITED = """
import resource, sys
import torch, transformers, peft, optuna, accelerate, hydra_vlm.compare
from hydra_vlm.cli import main
pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + {megabytes} * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
sys.argv = ["hydra-vlm", *{words!r}]
main()
"""


def launch(*words: str, code: str | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hydra_vlm.cli", *words] if code is None else [sys.executable, "-c", code]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what was said."""
    told = process.communicate(timeout=1800)[1]
    assert "Traceback" not in told, told
    return process.returncode, told


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    made = toy_config(
        tiny_model,
        write_toy_data(tmp_path / "toy"),
        "schedules=[uniform]",
        "training.steps=200",
        "search.trials=2",
        "search.startup=2",
        "search.final_seeds=[101]",
        "evaluation.zero_shot=false",
    )
    path.write_text(made.to_yaml())
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB of which nearly all is taken by `ballast`."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], check=False)
    if done.returncode:
        pytest.skip("mounting a small file system needs more rights than the tests have")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_and_then_room(config: Path, small_disk: Path) -> None:
    run, ballast = small_disk / "run", small_disk / "ballast"
    ballast.write_bytes(bytes(15 * 2**20))
    words = ("compare", str(config), "--out", str(run), "training.steps=12")
    code, told = ended(launch(*words))
    assert code == 2
    assert told.splitlines()[-1].startswith("error: no room on the disk for ")
    assert "needed" in told
    assert "repeat the same command" in told
    assert not list(run.rglob("*.tmp"))
    left = {path.name for path in run.glob("trials/*/checkpoints/checkpoint-*")}
    ballast.unlink()
    code, told = ended(launch(*words))
    assert code == 0, told
    assert json.loads(next(run.glob("trials/*/record.json")).read_text())["train_losses"][-1][0] == 12
    assert left <= {f"checkpoint-{step}" for step in range(2, 13, 2)}


def test_too_little_memory_and_then_a_smaller_batch(config: Path, tmp_path: Path) -> None:
    toy = tmp_path / "toy/train.json"
    long = [{"from": "human", "value": "<image>\nsay it"}, {"from": "gpt", "value": "ab " * 100}]
    toy.write_text(json.dumps([{"id": f"{n}", "image": f"{n % 8}.png", "conversations": long} for n in range(96)]))
    run = tmp_path / "run"
    words = ("compare", str(config), "--out", str(run), "training.batch_size=96", "training.steps=3", "profile.steps=3")
    code, told = ended(launch(code=LIMITED.format(megabytes=900, words=words)))
    assert code == 2, told
    assert "error: out of memory while training" in told
    assert "training.device_batch_size=48" in told
    code, told = ended(launch(code=LIMITED.format(megabytes=900, words=(*words, "training.device_batch_size=2"))))
    assert code == 0, told
    assert next(run.glob("trials/*/record.json"))


@pytest.mark.parametrize("command", ["compare", "search"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_it_saves_ends_and_goes_on(config: Path, tmp_path: Path, command: str, number: int) -> None:
    run = tmp_path / "run"
    words = (command, str(config), "--out", str(run), "training.save_steps=50")
    process = launch(*words)
    while not any(run.glob("trials/*/checkpoints/checkpoint-50/trainer_state.json")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(number)
    code, told = ended(process)
    assert code == 128 + number, told
    steps = [int(path.name.partition("-")[2]) for path in run.glob("trials/*/checkpoints/checkpoint-*")]
    assert 50 < max(steps) < 200
    assert "the same command goes on" in told.lower()
    code, told = ended(launch(*words))
    assert code == 0, told
    assert len(list(run.glob("trials/*/record.json"))) == (1 if command == "compare" else 2)
