"""Two processes on the CPU against one: the same losses, adapters and profiles, by DDP and by FSDP.

One launch runs all commands of a fixture in two processes, joined by gloo, since loading torch takes longer than all of
them. A tenth of the records have no image, the last batch of an epoch is short, and the tower runs in every step.
"""

import json
import os
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from families import FAMILIES
from hydra_vlm import processes
from hydra_vlm.config import RECIPES, load_config, recipe_names
from hydra_vlm.errors import ConfigError
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.signals import Signal
from hydra_vlm.training import frugality, sharding
from hydra_vlm.training.even_batches import EvenBatches, WithBlanks, blanking
from hydra_vlm.training.recipe import split_batch
from hydra_vlm.training.trainer import ByLength
from tiny import save_tiny_model, toy_config, write_toy_data
from tolerances import LOSS, NORM, WEIGHT

SECONDS = 900
STEPS = 6
PLAIN = ("training.device_batch_size=1",)  # batches of 4: accumulation 4 on one process, 2 on each of two
STILL = ("training.steps=1", "training.learning_rate=1e-30")  # too little for float32: the weights stay
SENSITIVITY = ("profile.signal=sensitivity",)
BEST = ("training.keep=best", "training.watch_steps=1", "training.patience=1", "training.learning_rate=0.2")
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
            "training.rates=single",  # smaller steps, so that the order of sums shows less
        )
        (folder / "config.yaml").write_text(toy_config(model, data, *options).to_yaml())
        self.other = (f"model={FAMILIES['qwen3_vl'].save(folder / 'qwen3_vl')}",)

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

    def record(self, run: str, name: str = "uniform") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / run / f"trials/{name}-seed0/record.json").read_text())
        return found

    def weights(self, run: str, name: str = "uniform") -> dict[str, torch.Tensor]:
        trial = self.folder / run / f"trials/{name}-seed0"
        if (trial / "model").is_dir():
            return load_file(trial / "model/model.safetensors")
        return load_file(trial / "adapter/adapter_model.safetensors") | load_file(
            trial / "adapter/projector.safetensors"
        )

    def profile(self, run: str) -> GradientNormProfile:
        return GradientNormProfile.from_json(json.loads((self.folder / run / "profile.json").read_text()))

    def signal(self, run: str, kind: str) -> Signal:
        return Signal.from_json(json.loads((self.folder / run / f"signals/{kind}.json").read_text()))


def launch(words: list[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """torchrun with two processes, on a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    places = [str(Path(processes.__file__).parents[1]), str(Path(__file__).parent)]
    own = {**os.environ, **(environment or {}), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    return subprocess.run([*start, *words], env=own, capture_output=True, text=True, timeout=SECONDS)


def require_same(home: Home, run: str, reference: str, name: str = "uniform") -> None:
    """Losses at every step, validation loss and all trained weights."""
    expected, found = home.record(reference, name), home.record(run, name)
    losses, others = torch.tensor(found["train_losses"]), torch.tensor(expected["train_losses"])
    assert len(others) == STEPS
    pairs = home.weights(run, name), home.weights(reference, name)
    torch.testing.assert_close(losses, others, rtol=0, atol=LOSS)
    assert found["validation_loss"] == pytest.approx(expected["validation_loss"], abs=LOSS)
    assert pairs[0].keys() == pairs[1].keys()
    for key, value in pairs[1].items():
        torch.testing.assert_close(pairs[0][key], value, rtol=0, atol=WEIGHT, msg=lambda m, key=key: f"{key}: {m}")
    differences = torch.cat([(pairs[0][key] - value).abs().flatten() for key, value in pairs[1].items()])
    assert float(differences.mean()) < WEIGHT / 100


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = Home(tmp_path_factory.mktemp("devices"))
    home.on_one(*home.words("one", *PLAIN))
    home.on_one(*home.words("one", *PLAIN, command="profile"))
    home.on_one(*home.words("one", *PLAIN, *SENSITIVITY, command="profile"))
    home.on_one(*home.words("still", *STILL, "training.device_batch_size=4"))
    home.on_one(*home.words("other", *home.other, *PLAIN))
    home.on_one(*home.words("best", *PLAIN, *BEST))
    return home


@pytest.fixture(scope="module")
def ddp_and_fsdp(home: Home) -> tuple[list[dict[str, Any]], str]:
    jobs: list[dict[str, Any]] = [
        {"words": home.words("ddp", *PLAIN)},
        {"words": home.words("ddp", *PLAIN, command="profile")},
        {"words": home.words("fsdp", *PLAIN), "environment": fsdp()},
        {"words": home.words("fsdp", *PLAIN, command="profile"), "environment": fsdp()},
        {"words": home.words("still-ddp", *STILL, *PLAIN)},
        {"words": home.words("still-fsdp", *STILL, "training.device_batch_size=2"), "environment": fsdp()},
        {"words": home.words("other-ddp", *home.other, *PLAIN)},
        {"words": home.words("best-ddp", *PLAIN, *BEST)},
        {"words": home.words("best-fsdp", *PLAIN, *BEST), "environment": fsdp()},
        {"words": home.words("ddp", *PLAIN, *SENSITIVITY, command="profile")},
        {"words": home.words("fsdp", *PLAIN, *SENSITIVITY, command="profile"), "environment": fsdp()},
    ]
    return home.on_two("both", jobs)


@pytest.mark.parametrize("form", ["ddp", "fsdp"])
def test_two_processes_train_as_one(home: Home, ddp_and_fsdp: tuple[Any, str], form: str) -> None:
    reports, _ = ddp_and_fsdp
    assert [report["sharded"] for report in reports] == [
        [False, False, True, True, False, True, False, False, True, False, True]
    ] * 2
    require_same(home, form, "one")
    moved = max(float(value.abs().max()) for name, value in home.weights(form).items() if "lora_B" in name)
    assert moved > 20 * WEIGHT  # B starts at zero: what was compared was trained


@pytest.mark.parametrize("form", ["ddp", "fsdp"])
def test_the_validation_loss_of_fixed_weights_is_that_of_one_process(
    home: Home, ddp_and_fsdp: tuple[Any, str], form: str
) -> None:
    expected, found = home.record("still"), home.record(f"still-{form}")
    assert found["validation_loss"] == pytest.approx(expected["validation_loss"], abs=1e-6)


def test_a_family_that_cannot_be_told_a_number_of_tokens_trains_as_on_one(
    home: Home, ddp_and_fsdp: tuple[Any, str]
) -> None:
    require_same(home, "other-ddp", "other")


@pytest.mark.parametrize("form", ["ddp", "fsdp"])
def test_the_best_weights_are_those_of_one_process(home: Home, ddp_and_fsdp: tuple[Any, str], form: str) -> None:
    """Steps as large as these spread rounding errors; what is kept and when training ends is the same."""
    expected, found = home.record("best"), home.record(f"best-{form}")
    assert found["kept_step"] == expected["kept_step"] < expected["validation_losses"][-1][0] < STEPS
    assert found["validation_loss"] == min(loss for _, loss in found["validation_losses"])
    ours, theirs = (torch.tensor(record["validation_losses"]) for record in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
    for key, value in home.weights("best").items():
        assert float((home.weights(f"best-{form}")[key] - value).abs().mean()) < 1e-2 * 0.2, key


@pytest.mark.parametrize("form", ["ddp", "fsdp"])
def test_the_profile_is_that_of_one_process(home: Home, ddp_and_fsdp: tuple[Any, str], form: str) -> None:
    expected, found = home.profile("one"), home.profile(form)
    for one, two in ((expected.mean, found.mean), (expected.spread, found.spread)):
        torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=NORM, atol=1e-8)
    assert min(min(pair) for pair in expected.mean) > 1e-4
    one, two = (home.signal(run, "sensitivity") for run in ("one", form))
    torch.testing.assert_close(torch.tensor(two.values), torch.tensor(one.values), rtol=NORM, atol=0)


def test_only_the_first_process_writes_and_speaks(home: Home, ddp_and_fsdp: tuple[Any, str]) -> None:
    (first, second), said = ddp_and_fsdp
    assert any(path.endswith(".tmp") or "record.json" in path for path in first["written"])
    # Each process keeps its own random states in a checkpoint, and may be the one that makes the checkpoint's folder.
    assert {Path(path).parent.name for path in second["written"]} <= {"checkpoints", "profile-run"}
    assert said.count("uniform, seed 0: ") == 7
    assert said.count("adapter and record: ") == 7
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


@pytest.mark.slow
def test_the_whole_job_and_the_whole_decoder(home: Home) -> None:
    """`compare` with two schedules, and training of the whole decoder, broken off and taken up again."""
    schedules = ("schedules=[uniform,coarse]", *PLAIN)
    home.on_one(*home.words("compare-one", *schedules, command="compare"))
    home.on_one(*home.words("full-one", "--schedule", "full", *PLAIN))
    jobs: list[dict[str, Any]] = []
    for form, environment in (("ddp", {}), ("fsdp", fsdp())):
        full = home.words(f"full-{form}", "--schedule", "full", *PLAIN)
        jobs += [
            {"words": home.words(f"compare-{form}", *schedules, command="compare"), "environment": environment},
            {"words": full, "environment": environment, "stop": 3},
            {"words": full, "environment": environment},
        ]
    home.on_two("whole", jobs)
    for form in ("ddp", "fsdp"):
        require_same(home, f"full-{form}", "full-one", "full")
        for name in ("uniform", "coarse"):
            require_same(home, f"compare-{form}", "compare-one", name)
        made = [json.loads((home.folder / f"compare-{run}/schedules/coarse.json").read_text()) for run in (form, "one")]
        assert made[0]["ranks"] == made[1]["ranks"]
        assert (home.folder / f"compare-{form}/report.html").is_file()
        assert (home.folder / f"compare-{form}/trials/zero-shot-seed0/record.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["data.train=missing.json"], "data file missing.json"),  # found by the first process alone
        (["training.batch_size=3"], "training.batch_size 3 is not a multiple"),  # found by both
    ],
)
def test_an_error_ends_both_processes_and_is_said_once(
    home: Home, tmp_path: Path, options: list[str], said: str
) -> None:
    started = time.monotonic()
    words = ["-m", "hydra_vlm", "train", str(home.folder / "config.yaml"), "--out", str(tmp_path / "run"), *options]
    done = launch(words)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == done.stderr.count(said) == 1, done.stderr
    assert "exitcode  : 2" in done.stderr  # the launcher's report
    assert "hydra_vlm/" not in done.stderr  # no traceback of ours
    assert time.monotonic() - started < SECONDS / 2


# Without launching anything


@pytest.mark.parametrize("processes_", [2, 3])
@pytest.mark.parametrize("records", [1, 7, 11, 12, 13])
@pytest.mark.parametrize("grouped", [False, True])
def test_all_processes_together_read_the_global_batches_of_one(records: int, processes_: int, grouped: bool) -> None:
    from accelerate.data_loader import BatchSamplerShard

    accumulation, each = 2, 2
    together = processes_ * accumulation * each
    lengths = [7 * n % 5 for n in range(records)]
    order = list(ByLength(lengths, together, seed=0)) if grouped else list(range(records))
    expected = [order[start : start + together] for start in range(0, records, together)]
    shares = []
    for rank in range(processes_):
        shard = BatchSamplerShard(BatchSampler(order, each, drop_last=False), processes_, rank)
        shard.batch_sampler = EvenBatches(shard.batch_sampler, processes_)
        shares.append(list(shard))
        assert len(shard) == len(shares[-1])
        assert all(len(batch) == each for batch in shares[-1])
    assert len({len(share) for share in shares}) == 1
    for step, batch in enumerate(expected):
        window = slice(step * accumulation, (step + 1) * accumulation)
        read = [number for share in shares for micro in share[window] for number in micro]
        assert sorted(number for number in read if number >= 0) == sorted(batch)
        assert {~number for number in read if number < 0} <= set(batch)
    assert len(shares[0]) <= len(expected) * accumulation


def test_blanks_have_nothing_supervised() -> None:
    items = WithBlanks([{"labels": torch.tensor([5, 6])}, {"labels": torch.tensor([7, 8])}])
    collate = blanking(lambda rows: {"labels": torch.stack([row["labels"].clone() for row in rows])})
    made = collate([items[1], items[~1], items[~0]])
    assert made["labels"].tolist() == [[7, 8], [-100, -100], [-100, -100]]
    assert collate([items[0]])["labels"].tolist() == [[5, 6]]
    assert len(items) == 2


def test_the_global_batch_holds_for_every_number_of_devices() -> None:
    settings = load_config(None, ["training.batch_size=12", "training.device_batch_size=2"]).training
    assert [split_batch(settings, n) for n in (1, 2, 3, 6)] == [(2, 6), (2, 3), (2, 2), (2, 1)]
    one = settings.model_copy(update={"batch_size": 1, "device_batch_size": None})
    for wrong, devices in ((settings, 4), (one, 2)):
        with pytest.raises(ConfigError, match="is not a multiple of device_batch_size"):
            split_batch(wrong, devices)


def as_launched(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)


def test_what_several_processes_cannot_do_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    processes.require_shared(["search"], ["train"])  # one process does everything
    as_launched(monkeypatch)
    processes.require_shared(["train", "--out", "x"], ["train"])
    for words in (["search"], []):
        with pytest.raises(ConfigError, match="only train, tune share"):
            processes.require_shared(words, ["train", "tune"])
    with pytest.raises(ConfigError, match="names one device for 2 processes"):
        processes.join("cuda:1")
    as_launched(monkeypatch, ACCELERATE_USE_FSDP="true")
    with pytest.raises(ConfigError, match="fsdp_version: 2"):
        processes.join("cpu")
    as_launched(monkeypatch, FSDP_VERSION="2", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    with pytest.raises(ConfigError, match="without weights"):
        processes.join("cpu")
    as_launched(monkeypatch, ACCELERATE_USE_FSDP="false", ACCELERATE_USE_DEEPSPEED="true")
    assert processes.shards_model()
    with pytest.raises(ConfigError, match="cannot be measured under DeepSpeed"):
        sharding.require_gradients()
    monkeypatch.setattr(frugality, "require_bitsandbytes", lambda asked: None)
    with pytest.raises(ConfigError, match="cannot be put together again"):
        frugality.require_frugality(load_config(None, ["quantization=nf4"]), trains_base=False)


def test_checkpoints_of_another_kind_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert sharding.require_resumable(None) is None
    with pytest.raises(ConfigError, match=r"has no optimizer\.pt"):
        sharding.require_resumable(str(tmp_path))
    for rank in range(4):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    as_launched(monkeypatch, ACCELERATE_USE_DEEPSPEED="true")
    with pytest.raises(ConfigError, match=r"written by 4 process\(es\), now there are 2"):
        sharding.require_resumable(str(tmp_path))
    as_launched(monkeypatch, WORLD_SIZE="4")
    assert sharding.require_resumable(str(tmp_path)) == str(tmp_path)


def test_shipped_files_are_what_accelerate_reads() -> None:
    assert {path.stem for path in (RECIPES / "accelerate").iterdir()} == {"ddp", "fsdp", "zero2", "zero3"}
    assert not {"ddp", "fsdp", "zero2", "zero3"} & set(recipe_names())
    ddp = launcher("ddp")
    assert (ddp.multi_gpu, ddp.use_fsdp, ddp.use_deepspeed, ddp.mixed_precision) == (True, False, False, "no")
    found = fsdp()
    assert found["FSDP_VERSION"] == "2"
    assert found["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert found["FSDP_CPU_RAM_EFFICIENT_LOADING"] == found["FSDP_OFFLOAD_PARAMS"] == "false"


@pytest.mark.parametrize("stage", [2, 3])
def test_the_deepspeed_files_leave_batches_and_clipping_to_the_configuration(
    monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """What says "auto" is filled in by the Trainer from its arguments, and those come from the configuration."""
    arguments = launcher(f"zero{stage}")
    assert arguments.use_deepspeed
    fields = load_config_from_file(arguments.config_file).deepspeed_config
    arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)  # as `accelerate launch` does
    _, found = prepare_deepspeed_cmd_env(arguments)
    for name, value in found.items():
        if name.startswith("ACCELERATE_") and os.environ.get(name) != value:
            monkeypatch.setenv(name, value)
    read = DeepSpeedPlugin().hf_ds_config.config
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert read[key] == "auto", key
    assert read["zero_optimization"]["stage"] == stage
    assert read["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
