"""Reading a run folder back into records; whatever is not there yet is left empty."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hydra_vlm.errors import FileError, HydraError, RunFolderError
from hydra_vlm.names import below, found_below
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.reading import PAGE, read_json, read_json_lines, read_text
from hydra_vlm.records import TrialRecord
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.signals import Signal

Credits = Mapping[str, float]
"""Credit from 0 to 1 by question id."""

T = TypeVar("T")


@dataclass(frozen=True)
class RunData:
    """What a run folder holds; parts that are not there (yet) are empty or None.

    `verdicts` is trial key → benchmark → question id → credit; `unfinished` names trials with no record.
    """

    folder: Path
    config: str
    environment: Mapping[str, Any]
    profile: GradientNormProfile | None
    schedules: tuple[RankSchedule, ...]
    trials: tuple[TrialRecord, ...]
    verdicts: Mapping[str, Mapping[str, Credits]]
    unfinished: tuple[str, ...] = ()
    signals: tuple[Signal, ...] = ()
    """What was measured beside the profile."""

    def ended_schedules(self) -> tuple[RankSchedule, ...]:
        """The folder's schedules, its trials' where it has none; of a name whose ranks moved, what they ended with.

        That is the best trial's, under the trial's own name; what such trainings began with is left out.
        """
        moved = {t.name: replace(t.schedule, name=t.key) for t in best_moved(self.trials) if t.schedule}
        began = {trial.moves[0].before for trial in self.trials if trial.moves}
        trained = {t.name: replace(t.schedule, name=t.name) for t in self.trials if t.schedule}
        files = {s.name: s for s in self.schedules if s.name in trained or s.ranks not in began}
        shown = (files if self.schedules else trained) | moved
        return tuple(shown[name] for name in sorted(shown, key=place))


def best_moved(trials: Iterable[TrialRecord]) -> tuple[TrialRecord, ...]:
    """Of each name whose ranks moved, the trial with the lowest validation loss."""
    best: dict[str, TrialRecord] = {}
    for trial in trials:
        if trial.moves and (trial.name not in best or _loss(trial) < _loss(best[trial.name])):
            best[trial.name] = trial
    return tuple(best.values())


def _loss(trial: TrialRecord) -> float:
    return trial.validation_loss if math.isfinite(trial.validation_loss) else math.inf


def load_run(folder: Path) -> RunData:
    """Read a run folder; raises RunFolderError when it is none, or names the file that does not read.

    Links that lead out of the folder are not followed.
    """
    config, environment, profile = (_own(folder, name) for name in ("config.yaml", "environment.json", "profile.json"))
    schedules = [_read(path, RankSchedule.from_json) for path in _found(folder, "schedules/*.json")]
    signals = [_read(path, Signal.from_json) for path in _found(folder, "signals/*.json")]
    homes = [path for path in _found(folder, "trials/*") if path.is_dir()]
    done = [home for home in homes if os.path.lexists(home / "record.json")]
    trials = [_read(_own(home, "record.json"), partial(TrialRecord.from_json, key=home.name)) for home in done]
    if not (os.path.lexists(config) or os.path.lexists(profile) or signals or schedules or homes):
        raise RunFolderError(
            f"{folder} is not a run folder: it has no config.yaml, profile.json, schedules or trials. "
            "Name the folder that was given to --out."
        )
    return RunData(
        folder=folder,
        config=read_text(config, PAGE) if os.path.lexists(config) else "",
        environment=_read(environment, dict) if os.path.lexists(environment) else {},
        profile=_read(profile, GradientNormProfile.from_json) if os.path.lexists(profile) else None,
        schedules=tuple(sorted(schedules, key=lambda s: place(s.name))),
        trials=tuple(sorted(trials, key=lambda t: (place(t.name), t.seed))),
        verdicts={trial.key: _read_verdicts(home) for home, trial in zip(done, trials, strict=True)},
        unfinished=tuple(home.name for home in homes if home not in done),
        signals=tuple(signals),
    )


def _own(folder: Path, name: str) -> Path:
    return below(folder, name, "file", RunFolderError)


def _found(folder: Path, pattern: str) -> list[Path]:
    return found_below(folder, pattern, "file", RunFolderError)


def _read(path: Path, parse: Callable[[Any], T]) -> T:
    try:
        return parse(read_json(path))
    except FileError as error:
        raise RunFolderError(f"{error}. Delete it and run the same command again.") from None
    except (ValueError, KeyError, TypeError, HydraError) as error:
        raise RunFolderError(
            f"{path} does not read: {type(error).__name__} {error}. Delete it and run the same command again."
        ) from error


def _read_verdicts(home: Path) -> dict[str, Credits]:
    return {path.stem: _read_credits(path) for path in _found(home, "verdicts/*.jsonl")}


def _read_credits(path: Path) -> Credits:
    try:
        return {str(verdict["id"]): float(verdict["credit"]) for _, verdict in read_json_lines(path)}
    except FileError as error:
        raise RunFolderError(f"{error}. Score the predictions beside it again.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{path} does not read: {type(error).__name__} {error}. Score the predictions beside it again."
        ) from error


def place(name: str) -> tuple[int, str]:
    """Sorting key of trials and schedules: as it came, the baseline, the method, its rivals by name, full."""
    order = ("zero-shot", "uniform", "coarse", "fine")
    return (order.index(name) if name in order else len(order) + (name == "full"), name)
