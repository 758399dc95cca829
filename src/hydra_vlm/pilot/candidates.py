"""Which rates a pilot tries next, and which win: a line search over learning rate, B's ratio, the projector's rate.

Each candidate is the beginning of the whole run, cooled on a copy and measured; the winner goes on from where it
stopped, so its steps are not lost. No torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra_vlm.config import TrainingConfig
from hydra_vlm.graph import at_least, finite, nan_for_none, none_for_nan, whole

FACTORS = {"learning_rate": 2.5, "b_ratio": 2.0, "projector_learning_rate": 2.5}
"""How far apart neighbours are on each axis; axes are searched in this order."""

TIE = 0.01
"""Losses within this share of the lowest count as equal, and the lowest rate among them wins."""

LONG = 600
"""Steps from which a run counts as long."""


@dataclass(frozen=True)
class Tuned:
    """The rates that a pilot chooses; b_ratio and the projector's are None where all have one rate."""

    learning_rate: float
    b_ratio: float | None = None
    projector_learning_rate: float | None = None

    @classmethod
    def of(cls, settings: TrainingConfig, projector: float) -> "Tuned":
        """The configuration's own, the guess that a pilot begins with; `projector` is its learning rate in them."""
        if settings.rates == "single":
            return cls(settings.learning_rate)
        return cls(settings.learning_rate, settings.b_ratio, projector)

    def settings(self, settings: TrainingConfig) -> TrainingConfig:
        """The configuration with these rates; the tower's keeps its ratio to the decoder's."""
        tower = settings.tower_learning_rate
        scaled = None if tower is None else tower * self.learning_rate / settings.learning_rate
        known = {key: value for key, value in self.to_json().items() if value is not None}
        return settings.model_copy(update={**known, "tower_learning_rate": scaled})

    @property
    def text(self) -> str:
        """In a few words."""
        if self.b_ratio is None:
            return f"{self.learning_rate:g}"
        return f"{self.learning_rate:g} (B x {self.b_ratio:g}, projector {self.projector_learning_rate:g})"

    @property
    def axes(self) -> tuple[str, ...]:
        """What there is to search, in order."""
        return tuple(axis for axis in FACTORS if getattr(self, axis) is not None)

    def moved(self, axis: str, steps: int) -> "Tuned":
        """Neighbour number `steps` on an axis, upwards or (below 0) downwards."""
        value = getattr(self, axis) * FACTORS[axis] ** steps
        return replace(self, **{axis: float(f"{value:.4g}")})

    def to_json(self) -> dict[str, float | None]:
        return {axis: getattr(self, axis) for axis in FACTORS}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Tuned":
        others = [None if data[axis] is None else finite(data[axis]) for axis in list(FACTORS)[1:]]
        return cls(finite(data["learning_rate"]), *others)


@dataclass(frozen=True)
class Tried:
    """A candidate, its validation loss after cooling, the steps that it took, trunk and cooling.

    The loss is nan where the candidate was ended for a loss that is no number, or doubled.
    """

    rates: Tuned
    loss: float
    steps: int


@dataclass(frozen=True)
class Length:
    """Steps of one candidate: until it is saved, and of its cooled copy after that; how many steps all may take."""

    trunk: int
    cooling: int
    most: int

    @classmethod
    def of(cls, steps: int) -> "Length":
        """For a run of so many steps: 6 % (in short runs up to 20 steps, a tenth), then 1.5 %.

        Fewer favour rates that diverge later: of the embedded run's 180 steps 11 chose 1e-2 once, which ended at 1.7.
        """
        trunk = max(math.ceil(0.06 * steps), min(20, steps // 10), 1)
        cooling = max(math.ceil(0.015 * steps), min(5, trunk // 2), 1)
        return cls(trunk, cooling, math.floor((0.2 if steps >= LONG else 0.35) * steps))

    @property
    def is_worthwhile(self) -> bool:
        """Whether two candidates can be told apart at that cost; a run of a few steps keeps the rates it was given."""
        return self.trunk + 2 * self.cooling <= self.most

    def affords(self, tried: Sequence[Tried]) -> bool:
        """Whether one more candidate fits; the winner's trunk is part of the run and costs nothing."""
        return sum(one.steps for one in tried) + self.cooling <= self.most


@dataclass(frozen=True)
class Pilot:
    """What was tried, in order, which of it won, and how many optimizer steps were thrown away."""

    tried: tuple[Tried, ...]
    chosen: Tuned
    thrown_away: int

    def summary(self) -> str:
        """One line for the terminal."""
        if not self.tried:
            return f"pilot: the run is too short for one; rates stay at {self.chosen.text}"
        losses = ", ".join(f"{one.rates.text}: {one.loss:.4f}" for one in self.tried)
        return f"pilot: {self.chosen.text} (validation loss after cooling, {losses}); {self.thrown_away} steps"

    def to_json(self) -> dict[str, Any]:
        return {
            "chosen": self.chosen.to_json(),
            "tried": tried_to_json(self.tried),
            "thrown_away": self.thrown_away,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Pilot":
        return cls(
            tried_from_json(data["tried"]), Tuned.from_json(data["chosen"]), at_least(0, whole(data["thrown_away"]))
        )


def following(guess: Tuned, tried: Sequence[Tried]) -> Tuned | None:
    """The next candidate, or None where nothing is left to try.

    First the guess, then its upper neighbour, then whichever neighbour of the best is missing; once both are known the
    next axis is searched from there.
    """
    if not tried:
        return guess
    known = {one.rates for one in tried}
    best = winner(tried)
    for axis in guess.axes:
        for step in (1, -1):
            neighbour = best.moved(axis, step)
            if not any(_same(neighbour, other) for other in known):
                return neighbour
    return None


def winner(tried: Sequence[Tried]) -> Tuned:
    """The lowest rates whose loss is within a tie of the lowest loss; the first candidate where none has a loss."""
    sound = [one for one in tried if math.isfinite(one.loss)]
    if not sound:
        return tried[0].rates
    lowest = min(one.loss for one in sound)
    equal = [one.rates for one in sound if one.loss <= lowest * (1 + TIE)]
    return min(equal, key=lambda rates: [getattr(rates, axis) for axis in rates.axes])


def tried_to_json(tried: Sequence[Tried]) -> list[dict[str, Any]]:
    """JSON-ready; a loss that is no number is None."""
    return [{**one.rates.to_json(), "loss": none_for_nan(one.loss), "steps": one.steps} for one in tried]


def tried_from_json(data: Sequence[Mapping[str, Any]]) -> tuple[Tried, ...]:
    """The inverse of `tried_to_json`."""
    return tuple(
        Tried(
            Tuned.from_json(one),
            nan_for_none(one["loss"]),
            at_least(0, whole(one["steps"])),
        )
        for one in data
    )


def _same(one: Tuned, other: Tuned) -> bool:
    return all(math.isclose(getattr(one, axis), getattr(other, axis), rel_tol=0.01) for axis in one.axes)
