"""`hydra-vlm squeeze`: which adapter is meant, and where what is needed beside it is said. Loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_vlm.data.builtin import BUILTIN
from hydra_vlm.errors import ConfigError, RunFolderError

CONFIG, ADAPTER = "config.yaml", "adapter_config.json"
RUN = (CONFIG, "environment.json")
"""What a run folder holds."""

SHOWN = 6


@dataclass(frozen=True)
class Named:
    """The adapter's folder, and the run that it lies in, whose config.yaml says model and data."""

    adapter: Path
    run: Path | None

    @property
    def config(self) -> Path | None:
        return None if self.run is None else self.run / CONFIG


def find_adapter(place: Path) -> Named:
    """The adapter that is meant by its own folder, a trial's, or a run's: its best, else its only one.

    Raises:
        ConfigError: there is nothing there.
        RunFolderError: it has no adapter, or several and none that is its best.
    """
    if not place.is_dir():
        raise ConfigError(
            f"{place} {'is a file' if place.exists() else 'does not exist'}: name an adapter's or a run's folder"
        )
    run = next((above for above in (place, *place.absolute().parents) if _is_run(above)), None)
    for folder in (place, place / "adapter", place / "best" / "adapter"):
        if (folder / ADAPTER).is_file():
            return Named(folder, run)
    trials = (*place.glob(f"trials/*/adapter/{ADAPTER}"), *place.glob(f"final/trials/*/adapter/{ADAPTER}"))
    found = sorted(path.parent for path in trials)
    if not found:
        what = (
            "this run has no adapter yet: let it finish" if _is_run(place) else "no adapter is in it: name its folder"
        )
        raise RunFolderError(f"{place}: {what}")
    if len(found) > 1:
        told = ", ".join(map(str, found[:SHOWN])) + (", …" if len(found) > SHOWN else "")
        raise RunFolderError(f"{place} holds {len(found)} adapters and none is marked as its best: name one of {told}")
    return Named(found[0], run)


def require_one_budget(rank: int | None, parameters: int | None, decide: str | None) -> None:
    """Raises ConfigError for two budgets, or for a decider without one."""
    if rank is not None and parameters is not None:
        raise ConfigError("--rank and --parameters are two budgets: give one of them")
    if decide is not None and rank is None and parameters is None:
        raise ConfigError("--decide says how a budget is spent: give --rank or --parameters, too, or leave it out")


def said(
    named: Named, model: str | None, data: str | None, images: Path | None, limit: int | None
) -> Mapping[str, tuple[str, Any]]:
    """What options say of the configuration: key -> option and its value (None: not given).

    Raises:
        ConfigError: nothing says which model the adapter is of.
    """
    if named.run is None and model is None:
        raise ConfigError(
            f"{named.adapter} lies in no run's folder, so nothing says which model it is of: give --model, and --data "
            "for a metric and losses"
        )
    found: dict[str, tuple[str, Any]] = {
        "model": ("--model", model),
        "data.images": ("--images", images),
        "data.validation_limit": ("--limit", limit),
    }
    if data is not None:
        found["data.train"] = ("--data", data)
        found["data.images"] = ("--images", images or "null")  # not those of the run's own file
        found["data.validation"] = ("--data", "null" if data in BUILTIN else data)
    return found


def _is_run(folder: Path) -> bool:
    return all((folder / name).is_file() for name in RUN)
