"""Two equal commands at once, as users start them: one works, the other says so and ends; a killed one is replaced."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hydra_vlm.errors import FolderInUseError
from hydra_vlm.ownership import OWNER
from tiny import toy_config, write_toy_data

pytestmark = pytest.mark.slow

TRIES = 20
SHORT = (
    "schedules=[uniform]",
    "evaluation.zero_shot=false",
    "profile.steps=3",
    "training.steps=1",
    "search.objective=loss",
    "search.trials=1",
    "search.final_seeds=[]",
)
DONE = {
    "compare": "trials/uniform-seed0/record.json",
    "train": "trials/uniform-seed0/record.json",
    "search": "search.json",
}


@pytest.fixture(scope="module")
def config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("twice")
    path = home / "config.yaml"
    path.write_text(toy_config(tiny_model, write_toy_data(home / "toy"), *SHORT).to_yaml())
    return path


def start(command: str, config: Path, run: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "hydra_vlm.cli", command, str(config), "--out", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    told = process.communicate(timeout=240)[1]
    assert "Traceback" not in told
    return process.returncode, told


@pytest.mark.parametrize("command", DONE)
def test_one_works_and_the_other_says_so(config: Path, tmp_path: Path, command: str) -> None:
    """Twenty tries; the second starts at the same time, or up to 0.4 s later."""
    script = Path(__file__).parent / "two_at_once.py"
    words = [sys.executable, str(script), command, str(config), str(tmp_path), str(TRIES)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    tries = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(tries) == TRIES
    for number, found in enumerate(tries):
        run = tmp_path / f"{command}-{number}"
        assert sorted(found["codes"]) == [0, FolderInUseError.code], found
        [refusal] = [told for code, told in zip(found["codes"], found["said"], strict=True) if code]
        assert refusal.startswith(f"error: {run} is in use by 'hydra-vlm {command}' (process "), found
        assert len(refusal.splitlines()) == 1
        assert "Traceback" not in "".join(found["said"])
        assert json.loads((run / DONE[command]).read_text())
        assert OWNER not in found["left"]


@pytest.mark.parametrize("command", DONE)
def test_a_killed_one_is_replaced(config: Path, tmp_path: Path, command: str) -> None:
    run = tmp_path / "run"
    first = start(command, config, run)
    while not (run / "config.yaml").exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert (run / OWNER).exists()
    first.communicate()
    code, told = ended(start(command, config, run))
    assert code == 0, told
    assert json.loads((run / DONE[command]).read_text())
    assert not (run / OWNER).exists()


def test_a_worker_still_joins_a_search(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start("search", config, run)
    while not (run / "study.json").exists():
        assert first.poll() is None
        time.sleep(0.01)
    words = [sys.executable, "-m", "hydra_vlm.cli", "worker", str(run)]
    worker = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert [ended(process)[0] for process in (first, worker)] == [0, 0]
