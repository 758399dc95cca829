"""However often its workers are killed, a search has the trials of an undisturbed one (`killed_search.py`)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "killed_search.py"


def check(folder: Path, *words: str, kills: int = 20) -> None:
    """Trials, candidates, values and folders are the same, number by number, and nothing was trained twice."""
    command = [sys.executable, str(SCRIPT), str(folder), "--kills", str(kills), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == kills
    assert found["differing"] == []
    assert found["trained_twice"] == []
    assert len(found["moments"]) >= 3, "kills fell in different places"


@pytest.mark.parametrize(
    ("workers", "sampler"),
    [("2", "phi"), *(pytest.param(*case, marks=pytest.mark.slow) for case in [("1", "phi"), ("2", "evolution")])],
)
def test_twenty_kills_change_no_trial(tmp_path: Path, workers: str, sampler: str) -> None:
    check(tmp_path, "--workers", workers, "--sampler", sampler)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_twenty_kills_of_two_workers_in_ten_sequences(tmp_path: Path, seed: int) -> None:
    check(tmp_path, "--seed", str(seed))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_twenty_kills_of_three_workers_with_the_other_samplers(tmp_path: Path, sampler: str) -> None:
    check(tmp_path, "--workers", "3", "--sampler", sampler, "--trials", "16")
