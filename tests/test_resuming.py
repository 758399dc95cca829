"""A resumed run is step for step the undisturbed one, to the bit.

It can be: the processor and the number of threads are the same, frozen weights are mapped from the same file, and what
is trained lies in torch's own memory each time, so all sums are taken in the same order.
"""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from hydra_vlm.interruption import Interrupted
from hydra_vlm.training import recipe, trainer
from striking import Place, killing
from tiny import write_toy_data

# Eight records make two optimizer steps an epoch, of two batches of two: seven steps cross three ends of epochs.
RUN = (
    "training.steps=7",
    "training.save_steps=100",
    "training.batch_size=4",
    "training.device_batch_size=2",
    "training.dropout=0.2",
)


def results(place: Place) -> dict[str, Any]:
    """Everything that a trial leaves and that does not tell the time."""
    found: dict[str, Any] = {
        str(path.relative_to(place.trial)): path.read_bytes()
        for path in place.trial.rglob("*")
        if path.is_file() and path.name != "record.json"
    }
    return found


@pytest.mark.parametrize(
    ("grouped", "logging"),
    [(True, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(False, 3), (False, 1), (True, 1)])],
)
def test_stopped_after_every_single_step_it_ends_the_same(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grouped: bool, logging: int
) -> None:
    """Six times SIGTERM, one step a start, with dropout, accumulation, and losses logged over several steps."""
    options = (*RUN, f"training.group_by_length={str(grouped).lower()}")
    toy = write_toy_data(tmp_path / "toy")
    own = recipe.training_arguments

    def logged(*args: Any) -> Any:
        made = own(*args)
        made.logging_steps = logging
        return made

    monkeypatch.setattr(recipe, "training_arguments", logged)
    whole = Place(tiny_model, toy, tmp_path / "whole", monkeypatch)
    expected = whole.train(*options)
    cut = Place(tiny_model, toy, tmp_path / "cut", monkeypatch)
    real = trainer.VLMTrainer.training_step
    for step in range(1, 7):
        cut.at_step(step, killing(15))
        with pytest.raises(Interrupted):
            cut.train(*options)
        monkeypatch.setattr(trainer.VLMTrainer, "training_step", real)
        assert cut.checkpoints[-1] == f"checkpoint-{step}"
    found = cut.train(*options)
    assert found.train_losses == expected.train_losses
    assert len(found.train_losses) == -(-7 // logging)  # the last step's, too
    assert found.validation_loss == expected.validation_loss
    assert results(cut) == results(whole)
    assert load_file(cut.trial / "adapter/adapter_model.safetensors")


def test_a_run_stopped_after_its_last_step_takes_no_other(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven steps of two an epoch end in the middle of one."""
    place = Place(tiny_model, write_toy_data(tmp_path / "toy"), tmp_path, monkeypatch)
    steps: list[int] = []
    for _ in range(2):
        place.at_step(7, lambda found: (steps.append(found.state.global_step + 1), killing(15)(None)))
        if not steps:
            with pytest.raises(Interrupted):
                place.train(*RUN)
            assert place.checkpoints == ["checkpoint-7"]
    assert [step for step, _ in place.train(*RUN).train_losses] == [1, 2, 3, 4, 5, 6, 7]
    assert steps == [7]
