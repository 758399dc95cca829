"""One training: what it borrows, its settings and its folder, handed from the pilot to the phases."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from transformers import TrainerCallback

from hydra_vlm.config import TrainingConfig
from hydra_vlm.models.loading import LoadedModel
from hydra_vlm.training.guarded import Estimate
from hydra_vlm.training.legs import Leg
from hydra_vlm.training.progress import Watch
from hydra_vlm.training.recipe import Finetuned, InstructionData, finetune

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A training of one seed; `folder` is where all of its checkpoints lie."""

    loaded: LoadedModel
    data: InstructionData
    settings: TrainingConfig
    seed: int
    folder: Path
    estimate: Estimate = str
    watch: Watch | None = None

    def finetune(self, model: PeftModel, folder: Path, leg: Leg, *callbacks: TrainerCallback) -> Finetuned:
        """`recipe.finetune` of one leg, with checkpoints in `folder`; only the run's last leg is watched."""
        watch = self.watch if leg.until is None else None
        return finetune(
            model, self.loaded, self.data, self.settings, self.seed, folder, callbacks, watch, self.estimate, leg
        )
