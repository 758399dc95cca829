"""`kill -9` during `hydra-vlm compare` or `evaluate`, then the same command: the same result as without."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from striking import start
from tiny import toy_config

pytestmark = pytest.mark.slow

# Where the kill falls: in the profile, in the second schedule's training, between training and scoring of the last one.
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "profile": lambda run: (run / "profile-run").exists(),
    "training": lambda run: any(run.glob("trials/coarse-seed0/checkpoints/checkpoint-4")),
    "scoring": lambda run: (run / "trials/fine-seed0/adapter/adapter_config.json").exists(),
}


def outcome(run: Path) -> dict[str, object]:
    """Losses and scores of every trial, and what each adapter holds."""
    found: dict[str, object] = {}
    for path in sorted(run.glob("trials/*/record.json")):
        record = json.loads(path.read_text())
        del record["seconds"]
        weights = path.parent / "adapter" / "adapter_model.safetensors"
        found[path.parent.name] = (record, weights.read_bytes() if weights.exists() else None)
    return found


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """A configuration file and the outcome of its undisturbed run."""
    from tiny import write_toy_data

    home = tmp_path_factory.mktemp("kill")
    config = home / "config.yaml"
    config.write_text(toy_config(tiny_model, write_toy_data(home / "toy"), "training.steps=8").to_yaml())
    assert start(config, home / "undisturbed").wait() == 0
    return config, outcome(home / "undisturbed")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_an_undisturbed_one(
    prepared: tuple[Path, dict[str, object]], tmp_path: Path, moment: str
) -> None:
    config, expected = prepared
    run = tmp_path / "run"
    process = start(config, run)
    deadline = time.monotonic() + 300
    while not MOMENTS[moment](run):
        assert process.poll() is None, "the run ended before the kill"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert outcome(run) != expected
    assert start(config, run).wait() == 0
    assert outcome(run) == expected


def test_a_killed_evaluation_goes_on_after_its_last_saved_answers(tiny_model: Path, tmp_path: Path) -> None:
    """Killed again and again, it ends with the files of an undisturbed one, and no saved answer is made twice."""
    from tiny import write_toy_data

    data = write_toy_data(tmp_path / "toy") / "test.json"
    options = ["--model", str(tiny_model), "--data", str(data), "--batch-size", "1", "--max-new-tokens", "200"]

    def launch(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "hydra_vlm.cli", "evaluate", *options, "--out", str(out)]
        with (tmp_path / "evaluate.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def files(out: Path) -> dict[str, bytes]:
        found = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
        return {name: content for name, content in found.items() if name != "environment.json"}

    assert launch(tmp_path / "whole").wait() == 0
    out = tmp_path / "killed"
    answers = out / "answers/base/predictions/test.jsonl"
    kept: list[str] = []
    for wanted in (1, 4, 6):
        process = launch(out)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if answers.exists() and len(answers.read_text().splitlines()) >= wanted:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        assert process.wait() == -signal.SIGKILL
        lines = answers.read_text().splitlines()
        assert lines[: len(kept)] == kept
        kept = [line for line in lines if line.endswith("}")]
        assert len(kept) >= wanted
    assert launch(out).wait() == 0
    assert files(out) == files(tmp_path / "whole")
