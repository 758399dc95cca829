"""The table of faults: what strikes a run, what the user is told, what is kept.

A row is a fault's name, the function that strikes and returns the message, words that the message must hold, and the
function that looks at what is kept; most of them end with the same command, which goes on.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from hydra_vlm import evaluation, files, measuring, trials
from hydra_vlm.config import load_config
from hydra_vlm.interruption import Interrupted, ending_in_order
from hydra_vlm.training import checkpoints, trackers, trainer
from striking import Place, killing, no_room, own_handlers, quiet, raising, told
from tiny import write_toy_data

Strike = Callable[[Place], str]


@dataclass(frozen=True)
class Fault:
    """One row. `words` are parts of the message, `kept` asserts what is there afterwards."""

    name: str
    strike: Strike
    words: tuple[str, ...]
    kept: Callable[[Place], None]


# A loss or a gradient that is no number


def loss_is_nan(place: Place) -> str:
    place.spoil_loss({4}, float("nan"))
    return place.message()


def gradient_overflows(place: Place) -> str:
    real = trainer.VLMTrainer._clip_grad_norm
    place.patch.setattr(
        trainer.VLMTrainer,
        "_clip_grad_norm",
        lambda self, model: real(self, model) * (float("inf") if self.state.global_step == 3 else 1),
    )
    return place.message()


def spikes_without_end(place: Place) -> str:
    place.spoil_loss({2, 3, 4}, float("inf"))
    return place.message("training.skip_spikes=2")


def isolated_spike(place: Place) -> str:
    seen: list[str] = []
    place.patch.setattr("hydra_vlm.training.nonfinite.say", seen.append)
    place.spoil_loss({3}, float("nan"))
    assert place.train("training.skip_spikes=1").validation_loss > 0
    return "\n".join(seen)


def written_down(step: int, stopped: bool, checkpoint: str | None) -> Callable[[Place], None]:
    def look(place: Place) -> None:
        found = json.loads((place.trial / f"nonfinite-step-{step}.json").read_text())
        assert found["step"] == step
        assert found["stopped"] is stopped
        assert len(found["records"]) == 4
        assert {record["id"] for record in found["records"]} <= {f"toy-{n}" for n in range(8)}
        assert all(f"row {record['id'].removeprefix('toy-')} (line" in record["place"] for record in found["records"])
        assert found["learning_rate"] > 0
        assert place.checkpoints[-1:] == ([checkpoint] if checkpoint else [])

    return look


# No room on the disk


def no_room_for_weights(place: Place) -> str:
    """As safetensors tells it, without an errno."""

    def failing(state: dict[str, torch.Tensor], path: Path) -> None:
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half a")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(state, path)

    real = trainer.save_file
    place.patch.setattr(trainer, "save_file", failing)
    return place.message()


def no_room_for_optimizer(place: Place) -> str:
    """As torch tells it, in the middle of the second checkpoint."""
    real = torch.save

    def failing(value: object, path: str, *args: object, **kwargs: object) -> None:
        if "checkpoint-4" in str(path) and "optimizer" in str(path):
            Path(path).write_bytes(b"half a")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file")
        real(value, path, *args, **kwargs)

    place.patch.setattr(torch, "save", failing)
    return place.message()


def no_room_for_record(place: Place) -> str:
    real = Path.write_text

    def failing(path: Path, text: str, *args: Any, **kwargs: Any) -> int:
        if not path.name.startswith(".record.json"):
            return real(path, text, *args, **kwargs)
        real(path, text[:20])
        raise no_room()

    place.patch.setattr(Path, "write_text", failing)
    return place.message()


def no_room_for_adapter(place: Place) -> str:
    place.patch.setattr(trials, "save_adapter", lambda *_, **__: raising(no_room())(None))
    return place.message()


def no_room_for_answers(place: Place) -> str:
    place.patch.setattr(os, "fsync", _no_room_in_answers(os.fsync))
    return place.message()


def _no_room_in_answers(real: Callable[[int], None]) -> Callable[[int], None]:
    seen: list[str] = []

    def failing(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        seen.append(name)
        if name.endswith("predictions/toy.jsonl") and seen.count(name) == 2:
            raise no_room()
        real(handle)

    return failing


def earlier_checkpoint(place: Place) -> None:
    assert place.checkpoints == ["checkpoint-2"]
    assert checkpoints.damage_of(place.trial / "checkpoints/checkpoint-2") is None
    place.recovers()


def no_half_file(place: Place) -> None:
    assert not list(place.run.rglob("*.tmp"))
    assert not (place.trial / "record.json").exists()
    assert place.checkpoints[-1] == "checkpoint-5"
    place.recovers()


def first_answers(place: Place) -> None:
    lines = (place.trial / "predictions/toy.jsonl").read_text().splitlines()
    assert len(lines) >= 4
    place.recovers()
    assert (place.trial / "predictions/toy.jsonl").read_text().splitlines()[:4] == lines[:4]


# No memory


def out_of_memory(place: Place) -> str:
    """As torch tells it on a CPU."""
    problem = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"
    )
    place.at_step(4, raising(problem))
    return place.message()


def out_of_memory_on_card(place: Place) -> str:
    place.at_step(4, raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")))
    return place.message("training.device_batch_size=1")


def out_of_memory_in_answers(place: Place) -> str:
    place.patch.setattr(evaluation, "answer", lambda *_, **__: raising(MemoryError("no more"))(None))
    return place.message()


def goes_on_smaller(place: Place) -> None:
    assert place.checkpoints == ["checkpoint-2"]
    place.patch.undo()
    steps = [step for step, _ in place.train("training.device_batch_size=2").train_losses]
    assert steps == [1, 2, 3, 4, 5]


def checkpoint_four(place: Place) -> None:
    assert place.checkpoints == ["checkpoint-2", "checkpoint-4"]  # the order of the data has it in step 5


def checkpoint_two(place: Place) -> None:
    assert place.checkpoints == ["checkpoint-2"]


def trained_already(place: Place) -> None:
    assert place.checkpoints[-1] == "checkpoint-5"
    place.recovers()


# Signals


def asked_to_end(number: int) -> Strike:
    def strike(place: Place) -> str:
        place.at_step(3, killing(number))
        with own_handlers(), pytest.raises(Interrupted) as caught:
            place.train()
        assert caught.value.code == 128 + number
        return str(caught.value)

    return strike


def asked_to_end_while_answering(place: Place) -> str:
    answered = evaluation.answer

    def ending(*args: object, save: Callable[[object], None], **kwargs: object) -> None:
        def last(new: object) -> None:
            save(new)
            killing(15)(None)

        answered(*args, save=last, **kwargs)  # type: ignore[arg-type]

    place.patch.setattr(evaluation, "answer", ending)
    with own_handlers(), pytest.raises(Interrupted) as caught, ending_in_order():
        place.train()
    assert caught.value.code == 143
    return str(caught.value)


SECOND = """
import os, signal, sys, time
from hydra_vlm import interruption
interruption.ONE_REQUEST_SECONDS = 0.05
with interruption.held_back():
    os.kill(os.getpid(), signal.SIGINT)
    print("noted", flush=True)
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)
    print("too late", flush=True)
"""


def asked_twice(place: Place) -> str:
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stdout == "noted\n"
    return done.stderr


def step_three(place: Place) -> None:
    assert place.checkpoints == ["checkpoint-2", "checkpoint-3"]
    place.recovers()


# Damaged files of a run


@dataclass(frozen=True)
class Given:
    """What rows about damaged files begin with: a run stopped after step 5 with two whole checkpoints, and its end."""

    toy: Path
    stopped: Path
    ended: Path


@pytest.fixture(scope="module")
def given(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Given:
    home = tmp_path_factory.mktemp("given")
    with pytest.MonkeyPatch.context() as patch:
        place = Place(tiny_model, write_toy_data(home / "toy"), home, patch)
        patch.setattr(trials, "keep_weights", lambda *_: raising(Interrupted(15))(None))
        place.message()
        assert place.checkpoints == ["checkpoint-4", "checkpoint-5"]
        shutil.copytree(place.run, home / "stopped")
        patch.undo()
        place.train()
    return Given(place.toy, home / "stopped", place.run)


def from_stopped(place: Place) -> Path:
    """The newest checkpoint of the stopped run."""
    place.toy = place.given.toy
    shutil.copytree(place.given.stopped, place.run)
    return place.trial / "checkpoints/checkpoint-5"


def from_ended(place: Place) -> Path:
    place.toy = place.given.toy
    shutil.copytree(place.given.ended, place.run)
    return place.run


def damaged(act: Callable[[Path], object]) -> Strike:
    """The newest checkpoint is damaged; the run goes on from the one before it, and says so."""

    def strike(place: Place) -> str:
        seen: list[str] = []
        act(from_stopped(place))
        place.patch.setattr("hydra_vlm.training.guarded.say", seen.append)
        began: list[int] = []
        place.at_step(5, lambda found: began.append(found.state.global_step))
        place.train()
        assert began == [4]
        return "\n".join(seen)

    return strike


def cut_off(name: str) -> Callable[[Path], object]:
    def act(checkpoint: Path) -> None:
        path = checkpoint / name
        os.truncate(path, path.stat().st_size // 2)

    return act


def flip(checkpoint: Path) -> None:
    path = checkpoint / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def as_undisturbed(place: Place) -> None:
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl"):
        assert (place.trial / name).read_bytes() == (place.given.ended / "trials/it-seed0" / name).read_bytes()


class Trap:
    """What an attacker pickles: reading it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def pickled_checkpoint(place: Place) -> str:
    torch.save(Trap(place.path / "ran"), from_stopped(place) / "optimizer.pt")
    return place.message()


def pickled_adapter(place: Place) -> str:
    from_ended(place)
    adapter = place.trial / "adapter"
    (adapter / "adapter_model.safetensors").unlink()
    with (adapter / "adapter_model.bin").open("wb") as file:
        pickle.dump(Trap(place.path / "ran"), file)
    request = evaluation.EvaluationRequest(str(place.model), str(place.toy / "test.json"), (str(adapter),))
    return told(lambda: evaluation.evaluate(request, place.path / "evaluated", quiet))


def nothing_ran(place: Place) -> None:
    assert not (place.path / "ran").exists()


def spoilt(name: str, text: str) -> Strike:
    def strike(place: Place) -> str:
        (from_ended(place) / name).write_text(text)
        return place.message()

    return strike


def spoilt_profile(place: Place) -> str:
    (from_ended(place) / "profile.json").write_text('{"graph": ')
    study = trials.prepare_study(load_config(place.run / "config.yaml"), place.run, quiet)
    return told(lambda: measuring.measure_profile(study, quiet))


def adapter_is_there(place: Place) -> None:
    assert load_file(place.trial / "adapter/adapter_model.safetensors")


def record_is_remade(place: Place) -> None:
    (place.trial / "record.json").unlink()
    place.recovers()


# Data, settings


def image_lost_late(place: Place) -> str:
    place.at_step(3, lambda _: (place.toy / "0.png").write_bytes(b"\x89PNG no more"))
    return place.message("training.cache_gigabytes=0", "training.disk_cache_gigabytes=0")


def bad_record(change: Callable[[dict, Path], object]) -> Strike:
    def strike(place: Place) -> str:
        path = place.toy / "train.json"
        records = json.loads(path.read_text())
        change(records[3], place.toy)
        path.write_text(json.dumps(records))
        return place.message()

    return strike


def _say(record: dict, turn: int, **change: str) -> None:
    record["conversations"][turn].update(change)


def _link_out(path: Path) -> None:
    elsewhere = path.parents[1] / "elsewhere.png"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


def repeated_records(place: Place) -> str:
    path = place.toy / "train.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps([*records[:-1], records[0]]))
    return place.said()


def skipped_rows(place: Place) -> str:
    path = place.toy / "train.json"
    records = json.loads(path.read_text())
    records[3]["conversations"][1]["value"] = ""
    path.write_text(json.dumps(records))
    return place.said("data.on_bad_row=skip")


def listed_and_trained(place: Place) -> None:
    rows = [json.loads(line) for line in (place.run / "preflight-rows.jsonl").read_text().splitlines()]
    assert {(row["row"], row["level"]) for row in rows} in ({(7, "warning")}, {(3, "bad")})
    assert (place.trial / "adapter/adapter_model.safetensors").is_file()


def nothing_trained(place: Place) -> None:
    assert not (place.run / "trials").exists()


def no_tracker(place: Place) -> str:
    place.patch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    return place.message("training.trackers=wandb")


def another_rate(place: Place) -> str:
    place.at_step(3, killing(15))
    place.message()
    return place.message("training.learning_rate=1e-5")


def checkpoint_three(place: Place) -> None:
    assert place.checkpoints == ["checkpoint-2", "checkpoint-3"]
    place.recovers()


STATE = "trainer_state.json"
FAULTS = (
    Fault(
        "loss nan",
        loss_is_nan,
        ("step 4", "loss is nan", "learning rate", "toy-"),
        written_down(4, True, "checkpoint-2"),
    ),
    Fault(
        "gradient inf", gradient_overflows, ("step 4", "gradient norm is inf"), written_down(4, True, "checkpoint-2")
    ),
    Fault(
        "spikes in a row",
        spikes_without_end,
        ("step 4", "last of 3 such steps in a row"),
        written_down(4, True, "checkpoint-2"),
    ),
    Fault("isolated spike", isolated_spike, ("step 3", "left out (1 in a row"), written_down(3, False, None)),
    Fault(
        "disk full: weights", no_room_for_weights, ("no room", "needed", "free", "step 2 is kept"), earlier_checkpoint
    ),
    Fault(
        "disk full: optimizer", no_room_for_optimizer, ("no room", "checkpoint-4", "step 2 is kept"), earlier_checkpoint
    ),
    Fault("disk full: adapter", no_room_for_adapter, ("no room", "last checkpoint is kept"), no_half_file),
    Fault("disk full: record", no_room_for_record, ("no room", "record.json", "kept"), no_half_file),
    Fault(
        "disk full: answers", no_room_for_answers, ("no room", "toy.jsonl", "answers before are kept"), first_answers
    ),
    Fault(
        "memory: cpu",
        out_of_memory,
        ("step 4", "The plan was", "device_batch_size=2", "step 2 is kept"),
        goes_on_smaller,
    ),
    Fault("memory: card", out_of_memory_on_card, ("One record at a time", "step 2 is kept"), checkpoint_two),
    Fault(
        "memory: answers", out_of_memory_in_answers, ("answering toy", "for evaluation", "batch size"), trained_already
    ),
    Fault("SIGTERM", asked_to_end(15), ("SIGTERM", "step 3 is kept", "goes on"), step_three),
    Fault("SIGINT", asked_to_end(2), ("SIGINT", "step 3 is kept", "goes on"), step_three),
    Fault("SIGTERM, answering", asked_to_end_while_answering, ("SIGTERM",), first_answers),
    Fault("two signals", asked_twice, ("SIGINT: ends after this step; again to end at once",), lambda _: None),
    Fault("checkpoint without end", damaged(cut_off(STATE)), ("step 5", STATE, "the one before"), as_undisturbed),
    Fault(
        "weights cut off", damaged(cut_off("adapter_model.safetensors")), ("adapter_model", "not read"), as_undisturbed
    ),
    Fault("projector cut off", damaged(cut_off("projector.safetensors")), ("projector.saf",), as_undisturbed),
    Fault("optimizer cut off", damaged(cut_off("optimizer.pt")), ("optimizer.pt does not read",), as_undisturbed),
    Fault("optimizer altered", damaged(flip), ("optimizer.pt does not read",), as_undisturbed),
    Fault(
        "random states lost",
        damaged(lambda p: (p / "rng_state.pth").unlink()),
        ("rng_state", "missing"),
        as_undisturbed,
    ),
    Fault("pickle in a checkpoint", pickled_checkpoint, ("something else than tensors", "foreign code"), nothing_ran),
    Fault("pickle as an adapter", pickled_adapter, ("lacks adapter_model.safetensors",), nothing_ran),
    Fault("config damaged", spoilt("config.yaml", "a: [\n"), ("config.yaml is damaged", "--out"), adapter_is_there),
    Fault("profile damaged", spoilt_profile, ("profile.json is not valid JSON", "measured again"), adapter_is_there),
    Fault(
        "record cut off",
        spoilt("trials/it-seed0/record.json", '{"na'),
        ("record.json is not valid JSON",),
        record_is_remade,
    ),
    Fault("record of another kind", spoilt("trials/it-seed0/record.json", "[]"), ("does not hold",), record_is_remade),
    Fault("image lost late", image_lost_late, ("toy-0", "row 0", "can no longer be read"), checkpoint_four),
    Fault("another configuration", another_rate, ("training.learning_rate", "another configuration"), checkpoint_three),
    Fault("tracker not there", no_tracker, ("wandb", "pip install"), nothing_trained),
    Fault("no <image>", bad_record(lambda r, _: _say(r, 0, value="what?")), ("record 3", "<image>"), nothing_trained),
    Fault(
        "two <image>", bad_record(lambda r, _: _say(r, 0, value="<image><image>")), ("exactly once",), nothing_trained
    ),
    Fault(
        "wrong roles",
        bad_record(lambda r, _: _say(r, 1, **{"from": "human"})),
        ("must be from 'gpt'",),
        nothing_trained,
    ),
    Fault("empty answer", bad_record(lambda r, _: _say(r, 1, value=" ")), ("empty answer",), nothing_trained),
    Fault("too long", bad_record(lambda r, _: _say(r, 1, value="ab " * 300)), ("toy-3", "exceed 512"), nothing_trained),
    Fault("image not there", bad_record(lambda r, _: r.update(image="9.png")), ("does not exist",), nothing_trained),
    Fault(
        "image unreadable",
        bad_record(lambda r, toy: (toy / "3.png").write_text("no picture")),
        ("toy-3", "cannot be read"),
        nothing_trained,
    ),
    Fault(
        "image bomb",
        bad_record(lambda r, toy: Image.new("1", (200_000, 1)).save(toy / "3.png")),
        ("toy-3", "40,000,000,000", "data.max_image_pixels"),
        nothing_trained,
    ),
    Fault(
        "path out of the folder",
        bad_record(lambda r, _: r.update(image="../3.png")),
        ("record 3", "must not leave the image folder"),
        nothing_trained,
    ),
    Fault(
        "link out of the folder",
        bad_record(lambda r, toy: _link_out(toy / "3.png")),
        ("bad record", "lies outside the image folder"),
        nothing_trained,
    ),
    Fault("duplicates", repeated_records, ("1 duplicate records", "1 duplicate ids"), listed_and_trained),
    Fault("bad rows skipped", skipped_rows, ("1 of 8 records are bad", "record 3 (id toy-3)"), listed_and_trained),
)


@pytest.fixture
def place(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> Place:
    return Place(tiny_model, write_toy_data(tmp_path / "toy"), tmp_path, monkeypatch, given)


SLOW = {
    "gradient inf",
    "spikes in a row",
    "disk full: weights",
    "disk full: adapter",
    "memory: card",
    "SIGINT",
    "weights cut off",
    "projector cut off",
    "optimizer cut off",
    "random states lost",
    "image not there",
    "two <image>",
}
"""Rows whose like is in the table already: left to the whole suite."""


def rows() -> list[Any]:
    return [pytest.param(row, id=row.name, marks=[pytest.mark.slow] if row.name in SLOW else []) for row in FAULTS]


def test_the_table_is_long_enough() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 20
    assert set(names) >= SLOW


@pytest.mark.parametrize("fault", rows())
def test_the_table_of_faults(place: Place, fault: Fault) -> None:
    message = fault.strike(place)
    place.patch.undo()
    for words in fault.words:
        assert words in message
    assert "Traceback" not in message
    fault.kept(place)


def test_a_step_left_out_changes_neither_weights_nor_moments(place: Place) -> None:
    """With the loss of every step but one spoilt, the weights are those of that one step."""
    states: list[dict[str, torch.Tensor]] = []
    place.at_step(5, lambda found: states.append(_moments(found)))
    place.spoil_loss({3, 4}, float("nan"))
    before: list[dict[str, torch.Tensor]] = []
    real = trainer.VLMTrainer._get_grad_norm

    def watching(self: trainer.VLMTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            before.append(_moments(self))
        return real(self, *args, **kwargs)

    place.patch.setattr(trainer.VLMTrainer, "_get_grad_norm", watching)
    place.train("training.skip_spikes=2")
    assert before[0].keys() == states[0].keys()
    for name, value in before[0].items():
        assert torch.equal(value, states[0][name]), name


def _moments(found: trainer.VLMTrainer) -> dict[str, torch.Tensor]:
    kept = {name: p.detach().clone() for name, p in found.model.named_parameters() if p.requires_grad}
    for number, state in found.optimizer.state_dict()["state"].items():
        kept |= {f"{number}.{name}": value.clone() for name, value in state.items()}
    return kept


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    files.write_json(path, {"old": 1})
    monkeypatch.setattr(os, "replace", lambda *_: raising(no_room())(None))
    assert "no room" in told(lambda: files.write_json(path, {"new": 2}))
    assert files.read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]
