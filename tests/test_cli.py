"""The command line's fixed forms, and errors in one line."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BASE = "schedule --graph mobilellama-1.4b --rank 128 --stages 1-8,9-12,13-24 --delta 2 --grain coarse"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hydra_vlm.cli", *words], capture_output=True, text=True, check=False)


def schedule(text: str) -> dict[str, Any]:
    done = run(*text.split(), "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.parametrize(("step", "expected"), [("", (124, 126, 131)), (" --step 1", (125, 127, 130))])
def test_the_papers_configuration(step: str, expected: tuple[int, int, int]) -> None:
    made = schedule(BASE + step)
    by_layer = [set(ranks.values()) for ranks in made["ranks"]]
    assert by_layer == [{expected[0]}] * 8 + [{expected[1]}] * 4 + [{expected[2]}] * 12
    assert made["budget"] == 121_110_528
    assert made["parameters"] <= made["budget"]


def test_fine_grain_setting_1() -> None:
    made = schedule(BASE.replace("coarse", "fine"))
    first = made["ranks"][0]
    assert first == {
        "q_proj": 122, "k_proj": 122, "v_proj": 124, "o_proj": 124, "gate_proj": 124, "up_proj": 126, "down_proj": 124
    }  # fmt: skip


def test_a_parameter_budget_and_an_output_file(tmp_path: Path) -> None:
    out = tmp_path / "schedule.json"
    words = BASE.replace("--rank 128", "--budget-parameters 40000000").split()
    done = run(*words, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "of 40,000,000 parameters" in done.stdout
    written = json.loads(out.read_text())
    assert written["parameters"] <= written["budget"] == 40_000_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("schedule --graph mobilellama-1.4 --rank 8 --stages 1-24", "mobilellama-1.4b"),
        ("schedule --graph mobilellama-1.4b --stages 1-24", "--rank"),
        ("schedule --rank 8", "--graph"),
        ("schedule --graph mobilellama-1.4b --rank 1 --stages 1-8,9-12,13-24", "rank 3"),
        ("schedule --graph mobilellama-1.4b --rank 8", "stages"),
        ("schedule --graph mobilellama-1.4b --rank 8 --stages 1-30", "24"),
        ("schedule --profile none.json --rank 8", "does not exist"),
        ("tune training.stepz=3", "training.steps"),
        ("report nowhere", "not a run folder"),
    ],
)
def test_errors_are_one_line_and_name_the_remedy(words: str, message: str) -> None:
    done = run(*words.split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert message in done.stderr


COMMANDS = (
    *("schedule", "init", "pretrain", "profile", "train", "evaluate"),
    *(
        "tune",
        "compare",
        "plan",
        "search",
        "worker",
        "chat",
        "export",
        "squeeze",
        "report",
        "convert",
        "rescore",
        "data",
        "devices",
    ),
)


def test_every_command_has_help() -> None:
    listed = run("--help").stdout
    for text in (listed, run("data", "--help").stdout):
        assert "..." not in text.split("Commands:")[1]  # no summary is cut short
    for command in COMMANDS:
        assert command in listed
        assert run(command, "--help").returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluate --benchmarks mmebench", "did you mean 'mmbench'"),
        ("evaluate --model nowhere", "holds no config.json"),
        ("evaluate --adapter nowhere", "no schedule.json"),
        ("rescore nowhere", "keeps no examples"),
        ("data check nowhere", "does not exist"),
    ],
)
def test_evaluation_refuses_in_one_line(words: str, message: str, tmp_path: Path) -> None:
    done = run(*words.split(), *(["--out", str(tmp_path / "out")] if words.startswith("evaluate") else []))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_embedded_suite_is_written_checked_and_complete(tmp_path: Path) -> None:
    folder = tmp_path / "suite"
    assert run("data", "worlds", str(folder)).returncode == 0
    assert run("data", "worlds", str(folder)).returncode == 2  # nothing is overwritten
    done = run("data", "check", str(folder / "benchmarks"), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [c["benchmark"] for c in found] == ["mme", "mmbench", "textvqa", "pope", "gqa", "scienceqa"]
    assert all(c["questions"] > 100 and not c["problem"] and not c["surplus"] for c in found)
    (folder / "benchmarks/textvqa/TextVQA_0.5.1_val.json").unlink()
    (folder / "benchmarks/gqa/holiday.mov").touch()
    done = run("data", "check", str(folder / "benchmarks"))
    assert done.returncode == 1
    assert "textvqa: incomplete" in done.stdout
    assert "TextVQA_0.5.1_val.json" in done.stdout
    assert "not read: holiday.mov" in done.stdout


def test_schedule_answers_at_once() -> None:
    times = []
    for _ in range(3):
        started = time.monotonic()
        schedule(BASE)
        times.append(time.monotonic() - started)
    assert min(times) < 3.0  # under a second on an idle machine; the bound leaves room for a busy one
