"""A run's folder, which tells its own story and from which the run goes on. No torch.

config.yaml  environment.json  graph.json  profile.json  signals/<kind>.json  schedules/<name>.json
trials/<name>-seed<k>/{record.json, adapter/, metrics.jsonl, predictions/, verdicts/, scores.json}
results.json  report.html
"""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_vlm.config import Config, flatten
from hydra_vlm.errors import FileError, RunFolderError
from hydra_vlm.files import require_place, write_json, write_text
from hydra_vlm.names import file_name
from hydra_vlm.ownership import contents, owned
from hydra_vlm.processes import by_first
from hydra_vlm.reading import TABLE, read_json, read_yaml
from hydra_vlm.signals import GRADIENT_NORM

_PACKAGES = (
    "hydra-vlm",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "numpy",
    "scikit-learn",
)


_PASSWORD = re.compile(r"(://[^:/@\s]*):[^/\s]*@")

_COMPARED = ("python", "machine", "device", "precision", "revision")
"""What else of a session may show in its results."""

A_WORKERS_OWN = "a worker's own"
"""The device of a session that only starts workers."""

HOW_WORK_IS_DONE = {
    "training.device_batch_size",
    "training.save_steps",
    "training.skip_spikes",
    "training.trackers",
    "training.cache_gigabytes",
    "training.disk_cache_gigabytes",
    "evaluation.batch_size",
    "search.storage",
    "search.grace_seconds",
}
"""Keys that do not show in what comes of the work, rounding apart."""

HOW_MUCH_IS_DONE = {
    "profile.signal",
    "seeds",
    "schedules",
    "evaluation.zero_shot",
    "search.trials",
    "search.parallel",
    "search.final_seeds",
}
"""Keys that ask for more trials or signals, or fewer. What each trial is follows from its own schedule and seed, so
those that are there stay as they are, new ones are made as they would have been from the start, and the report shows
all."""

CHANGEABLE = HOW_WORK_IS_DONE | HOW_MUCH_IS_DONE
"""Keys that a run may go on with another value of; with any other it would be of two configurations."""


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its records."""

    path: Path

    @property
    def profile(self) -> Path:
        return self.path / "profile.json"

    def signal(self, kind: str) -> Path:
        """Where a measured signal is kept; gradient norms are the profile."""
        return self.profile if kind == GRADIENT_NORM else self.path / "signals" / f"{kind}.json"

    @property
    def graph(self) -> Path:
        return self.path / "graph.json"

    @property
    def start(self) -> Path:
        """The digest of the adapter that the run starts from."""
        return self.path / "start.json"

    def schedule(self, name: str) -> Path:
        """A schedule's file; raises ConfigError for a name that no file may have (a schedule may come from a file)."""
        return self.path / "schedules" / f"{file_name(name, 'schedule')}.json"

    def trial(self, key: str) -> Path:
        """A trial's folder; raises ConfigError as `schedule` does."""
        return self.path / "trials" / file_name(key, "trial")


@contextmanager
def owning(
    path: Path, say: Callable[[str], None] | None = None, otherwise: str = "name another --out"
) -> Iterator[None]:
    """Own a run folder while the block lasts; of several processes of one job the first owns it for all.

    Raises:
        RunFolderError: the folder holds other files.
        FolderInUseError: another command is at work in it.
    """

    def enter() -> None:
        require_place(path, alone=True)
        require_run_or_nothing(path)
        held.enter_context(owned(path, say=say, otherwise=otherwise))

    with ExitStack() as held:
        by_first(enter)
        yield


def require_run_or_nothing(path: Path) -> None:
    """Raises RunFolderError where a run folder is to be and something else is."""
    if (path / "config.yaml").is_file():
        return
    if (path.exists() and not path.is_dir()) or contents(path):
        raise RunFolderError(f"{path} exists and holds no run (no config.yaml): name an empty or new folder with --out")


def open_run(path: Path, config: Config, environment: Mapping[str, Any]) -> RunFolder:
    """Create the folder, or go on with the run of the same configuration in it.

    A run that has computed nothing yet takes the new configuration.

    Raises:
        RunFolderError: the folder holds a run of another configuration, or other files.
    """
    stored = path / "config.yaml"
    if stored.is_file():
        # A run of an earlier version lacks keys that came later: their defaults are what it did.
        before = flatten(Config().model_dump(mode="json")) | flatten(_stored_config(stored))
        now = flatten(config.model_dump(mode="json"))
        changed = sorted(key for key in (before | now).keys() - CHANGEABLE if before.get(key) != now.get(key))
        if changed and has_begun(path):
            listed = ", ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in changed[:5])
            raise RunFolderError(
                f"{path} holds a run of another configuration ({listed}): name another --out, or repeat the run's "
                "own configuration to go on with it"
            )
    else:
        require_run_or_nothing(path)
    path.mkdir(parents=True, exist_ok=True)
    write_text(stored, config.to_yaml())
    keep_session(path, environment)
    return RunFolder(path)


def has_begun(path: Path) -> bool:
    """Whether something was computed in a run folder: from then on it is of one configuration and one content."""
    measured = (path / "profile.json").exists() or any((path / "signals").glob("*"))
    return measured or any((path / "trials").glob("*"))


def _stored_config(stored: Path) -> dict[str, Any]:
    try:
        values = read_yaml(stored)
    except FileError:
        values = None
    if isinstance(values, dict) and values:
        return values
    raise RunFolderError(
        f"{stored} is damaged: without it nobody can say of which configuration this run is. Put back the file, or the "
        "configuration that the run was started with; else name another --out"
    )


def keep_session(path: Path, environment: Mapping[str, Any]) -> None:
    """Write `environment.json`: this session's environment, and under `before` those of the sessions before it."""
    write_json(path / "environment.json", {**environment, "before": _sessions(path)})


def session_changes(path: Path) -> list[str]:
    """A line where the last session of a run differs from the one before in versions, machine, device or precision."""
    found = _sessions(path)[-2:]
    if len(found) < 2:
        return []
    last, now = ({**session, **session.get("packages", {})} for session in found)
    keys = [key for key in (*_PACKAGES, *_COMPARED) if key in last and A_WORKERS_OWN not in (last[key], now.get(key))]
    told = [f"{key} {last[key]} before, {now.get(key)} now" for key in keys if last[key] != now.get(key)]
    if not told:
        return []
    return [
        f"{path} goes on in another environment ({'; '.join(told)}): its trials may differ by more than their ranks"
    ]


def _sessions(path: Path) -> list[dict[str, Any]]:
    """All sessions of a run that can be read, the last one last."""
    try:
        told = read_json(path / "environment.json", TABLE)
    except FileError:
        return []
    if not isinstance(told, dict):
        return []
    before = told.pop("before", [])
    return [session for session in (*before, told) if isinstance(session, dict)]


def environment(device: str, precision: str) -> dict[str, Any]:
    """Command line without passwords, versions, device and, in a checkout, the git revision of this package."""
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": _PASSWORD.sub(r"\1@", shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "device": device,
        "precision": precision,
        "revision": _revision(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() or None
