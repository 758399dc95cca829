"""Learning rates by part: LoRA's A and B, the projector, LoRA in the tower, the decoder where it is trained whole.

At equal rates B moves the output less than A can, since it starts at zero and A does not: LoRA+ (arXiv 2402.12354)
gives B a multiple of A's rate.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from hydra_vlm.config import TrainingConfig
from hydra_vlm.models.structure import ModelParts

PROJECTOR_SHARE = 0.25
"""The projector's learning rate over that of A, where it is not given: trained whole, it is moved further by a step."""

WRAPPED = "base_model.model."


@dataclass(frozen=True)
class Rates:
    """Peak learning rates: of A and B in the decoder, of the projector, of A and B in the tower.

    What is trained whole beside the projector (the decoder in full fine-tuning) has A's rate.
    """

    a: float
    b: float
    projector: float
    tower_a: float
    tower_b: float

    @classmethod
    def of(cls, settings: TrainingConfig) -> "Rates":
        """The configuration's rates, what is left out filled in."""
        rate, tower = settings.learning_rate, settings.tower_learning_rate or settings.learning_rate
        ratio, share = (1.0, 1.0) if settings.rates == "single" else (settings.b_ratio, PROJECTOR_SHARE)
        return cls(
            a=rate,
            b=rate * ratio,
            projector=settings.projector_learning_rate or rate * share,
            tower_a=tower,
            tower_b=tower * ratio,
        )

    def to_json(self) -> dict[str, float]:
        return {"a": self.a, "b": self.b, "projector": self.projector, "tower_a": self.tower_a, "tower_b": self.tower_b}


def parameter_groups(model: nn.Module, parts: ModelParts, rates: Rates) -> list[dict[str, Any]]:
    """The trained parameters in an optimizer's groups, one for each part that there is, each with its rate.

    Groups come in a fixed order and parameters in the model's, so that an optimizer's state finds them again.
    """
    groups: dict[str, list[nn.Parameter]] = {part: [] for part in rates.to_json()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[part_of(name, parts)].append(parameter)
    listed = rates.to_json()
    return [{"params": found, "lr": listed[part], "part": part} for part, found in groups.items() if found]


def part_of(name: str, parts: ModelParts) -> str:
    """Which of the rates a parameter of this name has; the name may have PEFT's prefix."""
    place = name.removeprefix(WRAPPED)
    matrix = "b" if ".lora_B." in place else "a"
    if _within(place, parts.projector) and ".lora_" not in place:
        return "projector"
    in_tower = _within(place, parts.tower) and not _within(place, parts.projector)
    return f"tower_{matrix}" if in_tower else matrix


def _within(name: str, part: str | None) -> bool:
    return part is not None and name.startswith(f"{part}.")
