"""Two processes on the CPU against one: the same losses, adapters and profiles, by DDP and by FSDP.

One launch runs all commands of a fixture in two processes, joined by gloo, since loading torch takes longer than all of
them. A tenth of the records have no image, the last batch of an epoch is short, and the tower runs in every step.
"""

import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from hydra_vlm import processes
from hydra_vlm.config import RECIPES
from hydra_vlm.profile import GradientNormProfile
from tiny import save_tiny_model, toy_config, write_toy_data

LOSS, WEIGHT, NORM = 1e-5, 1e-4, 1e-4
"""Largest differences allowed: of losses, of the trained weights (learning rate 4e-3), of norms (relative)."""

SECONDS = 900
STEPS = 6
PLAIN = ("training.device_batch_size=1",)  # batches of 4: accumulation 4 on one process, 2 on each of two
BY_LENGTH = ("training.group_by_length=true",)  # batches of 4 on one process, 2 on each of two


def launcher(form: str) -> Namespace:
    """What `accelerate launch` makes of a shipped file."""
    words = ["--config_file", str(RECIPES / "accelerate" / f"{form}.yaml"), "--num_processes", "2", "-m", "hydra_vlm"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return arguments


def fsdp() -> dict[str, str]:
    """The environment in which `accelerate launch` with the shipped fsdp.yaml starts processes."""
    found = prepare_multi_gpu_env(launcher("fsdp"))
    return {name: value for name, value in found.items() if name.startswith(("ACCELERATE_USE_FSDP", "FSDP_"))}


def write_mixed_data(folder: Path) -> Path:
    """Eleven records for training and validation, three of them without image, answers of many lengths."""
    write_toy_data(folder)
    records = json.loads((folder / "train.json").read_text())
    for number, record in enumerate(records):
        record["conversations"][1]["value"] += " and so on" * (number % 4)
    for number in range(3):
        turns = [
            {"from": "human", "value": f"count to {number}"},
            {"from": "gpt", "value": "one two three"[: 4 * number + 3]},
        ]
        records.insert(4 * number, {"id": f"text-{number}", "conversations": turns})
    for split in ("train", "validation"):
        (folder / f"{split}.json").write_text(json.dumps(records))
    return folder


class Home:
    """A folder of runs, on one process and on two."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model, data = save_tiny_model(folder / "model", layers=2), write_mixed_data(folder / "toy")
        options = (
            f"training.steps={STEPS}",
            "training.cache_gigabytes=0",
            "training.disk_cache_gigabytes=0",
            "evaluation.max_new_tokens=1",
        )
        (folder / "config.yaml").write_text(toy_config(model, data, *options).to_yaml())

    def words(self, run: str, *options: str, command: str = "train") -> list[str]:
        return [command, str(self.folder / "config.yaml"), "--out", str(self.folder / run), *options]

    def on_one(self, *words: str, stop: int | None = None) -> None:
        from two_processes import run

        run(list(words), stop)

    def on_two(self, name: str, jobs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
        """What each process reports, and what both said."""
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(jobs))
        done = launch([str(Path(__file__).parent / "two_processes.py"), str(path)])
        assert done.returncode == 0, done.stderr
        return [json.loads(path.with_suffix(f".{rank}.json").read_text()) for rank in (0, 1)], done.stderr

    def record(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / run / "trials/uniform-seed0/record.json").read_text())
        return found

    def weights(self, run: str) -> dict[str, torch.Tensor]:
        adapter = self.folder / run / "trials/uniform-seed0/adapter"
        return load_file(adapter / "adapter_model.safetensors") | load_file(adapter / "projector.safetensors")

    def profile(self, run: str) -> GradientNormProfile:
        return GradientNormProfile.from_json(json.loads((self.folder / run / "profile.json").read_text()))


def launch(words: list[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """torchrun with two processes, on a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    places = [str(Path(processes.__file__).parents[1]), str(Path(__file__).parent)]
    own = {**os.environ, **(environment or {}), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    return subprocess.run([*start, *words], env=own, capture_output=True, text=True, timeout=SECONDS)


def require_same(home: Home, run: str, reference: str) -> None:
    """Losses at every step, validation loss and all trained weights."""
    expected, found = home.record(reference), home.record(run)
    losses, others = torch.tensor(found["train_losses"]), torch.tensor(expected["train_losses"])
    assert len(others) == STEPS
    print(
        run,
        "losses",
        float((losses - others).abs().max()),
        "validation",
        found["validation_loss"] - expected["validation_loss"],
    )
    pairs = home.weights(run), home.weights(reference)
    print(run, "weights", max(float((pairs[0][n] - pairs[1][n]).abs().max()) for n in pairs[1]))
    torch.testing.assert_close(losses, others, rtol=0, atol=LOSS)
    assert found["validation_loss"] == pytest.approx(expected["validation_loss"], abs=LOSS)
    assert pairs[0].keys() == pairs[1].keys()
    for name, value in pairs[1].items():
        torch.testing.assert_close(pairs[0][name], value, rtol=0, atol=WEIGHT, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = Home(tmp_path_factory.mktemp("devices"))
    home.on_one(*home.words("one", *PLAIN))
    home.on_one(*home.words("one", *PLAIN, command="profile"))
    return home


@pytest.fixture(scope="module")
def ddp_and_fsdp(home: Home) -> tuple[list[dict[str, Any]], str]:
    jobs: list[dict[str, Any]] = [
        {"words": home.words("ddp", *PLAIN)},
        {"words": home.words("ddp", *PLAIN, command="profile")},
        {"words": home.words("fsdp", *PLAIN), "environment": fsdp()},
        {"words": home.words("fsdp", *PLAIN, command="profile"), "environment": fsdp()},
    ]
    return home.on_two("both", jobs)


@pytest.mark.parametrize("form", ["ddp", "fsdp"])
def test_two_processes_train_as_one(home: Home, ddp_and_fsdp: tuple[Any, str], form: str) -> None:
    reports, _ = ddp_and_fsdp
    assert [report["sharded"] for report in reports] == [[False, False, True, True]] * 2
    require_same(home, form, "one")
    moved = max(float(value.abs().max()) for name, value in home.weights(form).items() if "lora_B" in name)
    assert moved > 100 * WEIGHT  # B starts at zero: what was compared was trained


@pytest.mark.parametrize("form", ["ddp", "fsdp"])
def test_the_profile_is_that_of_one_process(home: Home, ddp_and_fsdp: tuple[Any, str], form: str) -> None:
    expected, found = home.profile("one"), home.profile(form)
    for one, two in ((expected.mean, found.mean), (expected.spread, found.spread)):
        print(form, float((torch.tensor(two) / torch.tensor(one) - 1).abs().max()))
        torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=NORM, atol=1e-8)
    assert min(min(pair) for pair in expected.mean) > 1e-4


def test_only_the_first_process_writes_and_speaks(home: Home, ddp_and_fsdp: tuple[Any, str]) -> None:
    (first, second), said = ddp_and_fsdp
    assert any(path.endswith(".tmp") or "record.json" in path for path in first["written"])
    # Each process keeps its own random states in a checkpoint, and may be the one that makes the checkpoint's folder.
    assert {Path(path).parent.name for path in second["written"]} <= {"checkpoints", "profile-run"}
    assert said.count("uniform, seed 0: ") == 2
    assert said.count("adapter and record: ") == 2
    for form in ("ddp", "fsdp"):
        assert len((home.folder / form / "trials/uniform-seed0/metrics.jsonl").read_text().splitlines()) == STEPS
        left = {path.name for path in (home.folder / form).rglob("*") if path.name.startswith((".", "rng_state"))}
        assert not left


@pytest.mark.slow
def test_batches_by_length_and_resuming_with_another_number_of_processes(home: Home) -> None:
    home.on_one(*home.words("by-length", *BY_LENGTH))
    for form in ("ddp", "fsdp"):
        home.on_one(*home.words(f"one-{form}", *PLAIN), stop=4)
        assert (home.folder / f"one-{form}/trials/uniform-seed0/checkpoints/checkpoint-4").is_dir()
    jobs: list[dict[str, Any]] = []
    for form, environment in (("ddp", {}), ("fsdp", fsdp())):
        jobs += [
            {"words": home.words(f"by-length-{form}", *BY_LENGTH), "environment": environment},
            {"words": home.words(f"one-{form}", *PLAIN), "environment": environment},
            {"words": home.words(f"{form}-one", *PLAIN), "environment": environment, "stop": 4},
            {"words": home.words(f"{form}-self", *PLAIN), "environment": environment, "stop": 3},
            {"words": home.words(f"{form}-self", *PLAIN), "environment": environment},
        ]
    home.on_two("many", jobs)
    for form in ("ddp", "fsdp"):
        kept = {
            path.name for path in (home.folder / f"{form}-one/trials/uniform-seed0/checkpoints/checkpoint-4").iterdir()
        }
        assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "scheduler.pt", "projector.safetensors"} <= kept
        assert not any("fsdp" in name for name in kept)
        home.on_one(*home.words(f"{form}-one", *PLAIN))
        require_same(home, f"by-length-{form}", "by-length")
        for run in (f"one-{form}", f"{form}-one", f"{form}-self"):
            require_same(home, run, "one")
