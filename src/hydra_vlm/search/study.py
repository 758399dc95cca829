"""The study of a search: where Optuna keeps it, and what stands in the attributes of its trials.

User attributes of a trial: `candidate` (JSON, what is tried), `key` (its digest), `worker` ({"id", "beat"}, who runs
it; null: nobody any more), `scores` ({benchmark: per cent}), `loss` (of validation), `seconds`, `record` (the folder,
relative to the run's), `baseline` (true for the trial that all others are measured against), `reason` (why it failed).
A trial that has `scores` is evaluated: it is told to Optuna as soon as the baseline's scores are known, too.
"""

import hashlib
import json
import math
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from hydra_vlm.errors import ConfigError, RunFolderError
from hydra_vlm.files import read_value, write_json
from hydra_vlm.liveness import Watch, waiting_for
from hydra_vlm.search.journal import open_journal
from hydra_vlm.search.space import Candidate

NAME = "search"
"""The study's name in a journal file; in a database it also says of which run folder."""

DESCRIPTION = "study.json"
JOURNAL = "study.journal"

BASELINE = "uniform"
"""Folder name of the baseline's trial."""

PREPARED = "prepared"
"""Attribute of the study: a worker has come past everything that may be wrong with the configuration."""

CONNECT_SECONDS = 10
SETTLED = 30.0
"""Seconds after which somebody silent who was to make the study is taken for dead."""

Say = Callable[[str], None]

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Outcome:
    """What a trial came to: per cent by benchmark, mean loss over validation tokens, seconds of work."""

    scores: dict[str, float]
    validation_loss: float
    seconds: float


class Progress(Protocol):
    """What a runner calls now and then with optimizer step and validation loss; it may raise to end the trial."""

    def __call__(self, step: int, validation_loss: float) -> None: ...


class Runner(Protocol):
    """Trains and scores one candidate in a folder; goes on with what is in it, and reads a finished one back."""

    def __call__(self, candidate: Candidate, seed: int, folder: Path, progress: Progress) -> Outcome: ...


# Where the study is


def journal(run: Path) -> Path:
    """The journal file of a run folder."""
    return run / JOURNAL


def masked(url: str) -> str:
    """A storage URL without its password."""
    return re.sub(r"(://[^:/@]*):[^/]*@", r"\1@", url)


def check_storage(url: str) -> str:
    """The URL as SQLAlchemy reads it; raises ConfigError unless it is one of a PostgreSQL server."""
    scheme, found, rest = url.partition("://")
    kind = scheme.partition("+")[0].lower()
    if kind == "sqlite" or url.endswith((".db", ".sqlite", ".sqlite3")):
        raise ConfigError(
            "search.storage is an SQLite file, which loses updates when several workers write at once: leave it out "
            "for a journal file in the run folder (one machine), or give postgresql+psycopg://user@host/database"
        )
    if not found or kind not in ("postgresql", "postgres"):
        raise ConfigError(
            f"search.storage {masked(url)!r} is no PostgreSQL URL: give postgresql+psycopg://user@host/database, or "
            "leave it out for a journal file in the run folder"
        )
    return f"postgresql+psycopg://{rest}"


def aloud(line: str) -> None:
    """Say it on standard error, beside the results."""
    print(line, file=sys.stderr)


def open_storage(run: Path, url: str | None = None, say: Say = aloud) -> BaseStorage:
    """The journal file in the run folder, repaired where it is damaged, or the database of a URL.

    Raises:
        RunFolderError: something else stands in the journal's place.
        ConfigError: SQLite, a URL of something else, or a server that does not answer; never with the password.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if url is None:
        return open_journal(journal(run), NAME, say)
    address = check_storage(url)
    from sqlalchemy.exc import SQLAlchemyError

    waits = {"connect_args": {"connect_timeout": CONNECT_SECONDS}, "pool_pre_ping": True}
    try:
        return optuna.storages.get_storage(optuna.storages.RDBStorage(address, engine_kwargs=waits))
    except ImportError:
        raise ConfigError(
            "search.storage is a PostgreSQL URL and psycopg is not installed: pip install 'hydra-vlm[postgresql]'"
        ) from None
    except (SQLAlchemyError, ValueError, UnicodeError) as problem:
        raise ConfigError(
            f"search.storage {masked(url)} cannot be opened ({_first_line(problem, url)}): start the server, or check "
            "host, port, database, user and password, which is kept nowhere: give it again by --storage, by "
            "HYDRA_VLM_STORAGE or as libpq's PGPASSWORD"
        ) from None


@contextmanager
def answering(url: str | None) -> Iterator[None]:
    """Turn a database that stops answering into one clear line; nothing that is finished is lost by it."""
    if url is None:
        yield
        return
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as problem:
        raise ConfigError(
            f"search.storage {masked(url)} stopped answering ({_first_line(problem, url)}): start the same command "
            "again when it is back, nothing that is finished is lost"
        ) from None


def close_storage(storage: BaseStorage) -> None:
    """Give a database's connections back; the journal file is open only while it is read or written."""
    backend = getattr(storage, "_backend", None)
    if isinstance(backend, optuna.storages.RDBStorage):
        backend.remove_session()
        backend.engine.dispose()


def _first_line(problem: Exception, url: str) -> str:
    """What went wrong in a few words, without the password, wherever the library repeats it."""
    text = str(getattr(problem, "orig", None) or problem)
    password = re.search(r"://[^:/@]*:([^/]*)@", url)
    if password and password[1]:
        text = text.replace(password[1], "***")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else type(problem).__name__


@dataclass(frozen=True)
class Described:
    """What `study.json` keeps: the study's name, where it is (without the password), and how many values it has."""

    name: str
    storage: str
    values: int

    @property
    def is_in_database(self) -> bool:
        return "://" in self.storage

    @classmethod
    def from_json(cls, data: Any) -> "Described":
        """Raises RunFolderError for anything that no search has written."""
        found = cls(data["name"], data["storage"], data["values"])
        if not (isinstance(found.name, str) and isinstance(found.storage, str)) or type(found.values) is not int:
            raise RunFolderError("name and storage are texts, values is a number")
        if not found.is_in_database and (found.name, found.storage) != (NAME, JOURNAL):
            raise RunFolderError(f"a study in a file has the name {NAME!r} and the storage {JOURNAL!r}")
        return found

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "storage": self.storage, "values": self.values}


def create_study(
    run: Path, storage: BaseStorage, url: str | None, n_values: int, say: Say = aloud, **plug: Any
) -> optuna.Study:
    """The run folder's study, made where it is not there yet; `plug` gives sampler and pruner.

    `study.json` in the folder keeps its name and, without the password, where it is. A journal without its study is
    filled anew: every trial that has a record is read back from it.

    Raises:
        RunFolderError: the study is elsewhere, or is another one.
    """
    with waiting_for(run / "claims" / "study", Watch(SETTLED)):
        kept = _described(run, url)
        is_new = kept is None
        if kept is None:
            name = NAME if url is None else f"{NAME}-{run.resolve().name}-{uuid.uuid4().hex[:8]}"
            kept = Described(name, masked(url) if url else JOURNAL, n_values)
        if kept.is_in_database != (url is not None):
            there = kept.storage if kept.is_in_database else "the journal file"
            raise RunFolderError(f"the study of {run} is kept in {there}: go on with it there, or name another --out")
        before = {study.study_name: study.directions for study in storage.get_all_studies()}
        _check_other(run, kept, before, n_values)
        if is_new:
            write_json(run / DESCRIPTION, kept.to_json())
        elif kept.name not in before:
            say(f"{kept.storage} holds no study of {run}: made anew, and every trial that has a record is read back")
        return optuna.create_study(
            storage=storage, study_name=kept.name, directions=_directions(n_values), load_if_exists=True, **plug
        )


def _directions(n_values: int) -> list[optuna.study.StudyDirection]:
    return [optuna.study.StudyDirection.MAXIMIZE] * n_values


def _check_other(run: Path, kept: Described, before: Mapping[str, Sequence[Any]], n_values: int) -> None:
    """Raise RunFolderError for a study that is not this search's."""
    if not kept.is_in_database and before and kept.name not in before:
        others = ", ".join(map(repr, list(before)[:3]))
        raise RunFolderError(
            f"{journal(run)} holds the study {others} and not {kept.name!r}, so it is another program's: put back the "
            "search's own file, or move this one away, and finished trials are read back from their records"
        )
    if list(before.get(kept.name, _directions(n_values))) == _directions(n_values):
        return
    told = [direction.name.lower() for direction in before[kept.name]]
    raise RunFolderError(
        f"the study of {run} is to {', '.join(told)} {len(told)} values and the objective asked for has {n_values} to "
        "maximize: name another --out"
    )


def _described(run: Path, url: str | None) -> Described | None:
    """What `study.json` says; None where it is missing, or is damaged and can be made again."""
    path = run / DESCRIPTION
    if not path.exists():
        return None
    name = f"{NAME}-{run.resolve().name}-..."
    like = json.dumps({"name": name, "storage": masked(url or "postgresql://..."), "values": 1})
    try:
        return read_value(path, Described.from_json, f"put it back, or write {like} with the name in the database")
    except RunFolderError:
        if url is not None or not path.is_file():
            raise
        return None  # in a run folder there is one journal, and one study in it


def load_study(run: Path, storage: BaseStorage) -> optuna.Study:
    """The run folder's study as it is; raises RunFolderError when there is none."""
    require_study(run)
    is_journal = journal(run).is_file()
    kept = _described(run, None if is_journal else "")
    name = NAME if kept is None else kept.name
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        remedy = "start the same command again" if is_journal else "give the --storage that it was made with"
        raise RunFolderError(f"the study {name!r} of {run} is not in its storage: {remedy}") from None


def study_exists(run: Path) -> bool:
    """Whether a search has made its study in this run folder."""
    return (run / DESCRIPTION).is_file() or journal(run).is_file()


def require_study(run: Path) -> None:
    """Raise RunFolderError unless a search has made its study in this run folder."""
    if not study_exists(run):
        raise RunFolderError(f"{run} holds no search (no study.json): start one with hydra-vlm search --out {run}")


# What stands in a trial


def digest(candidate: Candidate) -> str:
    """A name for what makes two candidates the same training run, the same on every machine."""
    ranks, scaling, rate = candidate.key
    standard = [] if scaling.standard_rank is None else [scaling.standard_rank]
    text = json.dumps([ranks, scaling.rule, scaling.value, rate, *standard])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def candidate_of(trial: FrozenTrial) -> Candidate | None:
    """What is tried; None as long as nobody has said."""
    found = trial.user_attrs.get("candidate")
    return None if found is None else Candidate.from_json(found)


def is_evaluated(trial: FrozenTrial) -> bool:
    """Whether its scores are stored."""
    return "scores" in trial.user_attrs


def is_baseline(trial: FrozenTrial) -> bool:
    return bool(trial.user_attrs.get("baseline"))


def standing(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that count: waiting, running and finished, not the failed ones."""
    return [trial for trial in trials if trial.state != TrialState.FAIL]


def finished(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that are done, pruned ones too."""
    return [trial for trial in trials if trial.state in FINISHED]


def baseline_scores(trials: Iterable[FrozenTrial]) -> dict[str, float] | None:
    """The baseline's scores, once they are stored."""
    found = [t.user_attrs["scores"] for t in standing(trials) if is_baseline(t) and is_evaluated(t)]
    return found[0] if found else None


def outcome_of(trial: FrozenTrial) -> Outcome:
    """What an evaluated trial came to."""
    kept = trial.user_attrs
    loss = kept.get("loss")
    return Outcome(dict(kept["scores"]), math.nan if loss is None else float(loss), float(kept["seconds"]))


def record(trial: optuna.Trial, outcome: Outcome, folder: str) -> None:
    """Store an outcome; the scores come last, and with them the trial is evaluated."""
    loss = outcome.validation_loss
    trial.set_user_attr("record", folder)
    trial.set_user_attr("seconds", round(outcome.seconds, 3))
    trial.set_user_attr("loss", loss if math.isfinite(loss) else None)
    trial.set_user_attr("scores", dict(outcome.scores))


def summary(trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    """All trials as JSON-ready objects, in order."""
    return [
        {
            "number": trial.number,
            "state": trial.state.name,
            "values": trial.values,
            "baseline": is_baseline(trial),
            **{key: trial.user_attrs.get(key) for key in ("record", "seconds", "loss", "scores", "reason")},
            "candidate": trial.user_attrs.get("candidate"),
        }
        for trial in trials
    ]
