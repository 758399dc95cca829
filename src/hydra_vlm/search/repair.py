"""What is readable of a damaged study journal: the lines to go on with, and those to set aside. Pure.

A journal is a list of operations, one a line, and a trial is known by how many were created before it. So a lost line
is more than its content: every later trial would be taken for its neighbour. Lines are kept when they parse and Optuna
replays them; where later ones speak of a study or trial that no line has made, it is made again, empty. A trial that
is finished but lacks its scores, say, is opened again: whoever takes it reads them back from its record.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from optuna.storages.journal._storage import JournalOperation, JournalStorageReplayResult
from optuna.trial import TrialState

from hydra_vlm.search.space import Candidate

OPENING = b'{"op_code"'
"""What every line that Optuna writes begins with."""

EVALUATED = ("candidate", "key", "scores", "seconds", "record")
"""What an evaluated trial of a search cannot be without."""

Operation = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """A journal as it is read: the lines to keep, those set aside with their numbers, counted from 1."""

    kept: tuple[bytes, ...]
    aside: tuple[tuple[int, bytes], ...]
    finished: int
    is_whole: bool


def read(content: bytes, name: str) -> Reading:
    """Read a journal to its end, whatever is in it; `name` is what a study is called whose own line is lost."""
    aside: list[tuple[int, bytes]] = []
    operations: list[tuple[int, Operation, bytes]] = []
    created: set[bytes] = set()
    lines = content.split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        found = list(_operations(line))
        fresh = [(operation, text) for operation, text in found if text not in created]
        created |= {text for operation, text in fresh if operation["op_code"] == JournalOperation.CREATE_TRIAL}
        operations += [(number, operation, text) for operation, text in fresh]
        if len(fresh) != 1 or fresh[0][1] != line:
            aside.append((number, line))
    replayed = _Replay(name, operations)
    for number, operation, text in operations:
        if not replayed.take(operation, text):
            aside.append((number, text))
    finished, wanting = replayed.ended()
    kept = []
    for operation, text in replayed.kept:
        if operation.get("trial_id") in wanting and _ends(operation):
            aside.append((0, text))
        else:
            kept.append(text)
    return Reading(tuple(kept), tuple(sorted(aside)), len(finished - wanting), kept == lines)


def _ends(operation: Operation) -> bool:
    """Whether a trial is evaluated, or finished, by this operation."""
    if operation["op_code"] == JournalOperation.SET_TRIAL_STATE_VALUES:
        return TrialState(operation["state"]).is_finished()
    return "scores" in operation.get("user_attr", {})


def _operations(line: bytes) -> Iterator[tuple[Operation, bytes]]:
    """The operation that a line holds, or those that are whole in what is glued together in it."""
    whole = _operation(line)
    if whole is not None:
        yield whole, line
        return
    for piece in line.split(OPENING)[1:]:
        text = OPENING + piece
        end = text.rfind(b"}") + 1
        found = _operation(text[:end])
        if found is not None:
            yield found, text[:end]


def _operation(text: bytes) -> Operation | None:
    try:
        found = json.loads(text.decode())
        return found if _is_sound(found) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _is_sound(found: Any) -> bool:
    """Whether the identifiers and the attributes of an operation are what they should be."""
    if not isinstance(found, dict) or type(found["op_code"]) is not int or not isinstance(found["worker_id"], str):
        return False
    ids = [found[key] for key in ("study_id", "trial_id") if key in found]
    if any(type(one) is not int or one < 0 for one in ids):
        return False
    if found["op_code"] == JournalOperation.SET_TRIAL_USER_ATTR:
        [(key, value)] = found["user_attr"].items()
        return key not in ATTRIBUTES or ATTRIBUTES[key](value)
    values = found.get("values")
    return values is None or all(_is_number(value) and math.isfinite(value) for value in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_candidate(value: Any) -> bool:
    try:
        Candidate.from_json(value)
    except Exception:  # any fault in it makes it none
        return False
    return True


def _are_scores(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_number(one) for one in value.values())


ATTRIBUTES: Mapping[str, Callable[[Any], bool]] = {
    "candidate": _is_candidate,
    "key": lambda value: isinstance(value, str),
    "worker": lambda value: value is None or isinstance(value, dict),
    "scores": _are_scores,
    "loss": lambda value: value is None or _is_number(value),
    "seconds": _is_number,
    "record": lambda value: isinstance(value, str),
    "baseline": lambda value: isinstance(value, bool),
    "reason": lambda value: isinstance(value, str),
}
"""What the attributes of a trial may hold, as `study.py` lists them."""


class _Replay:
    """Optuna's own replay of a journal, line by line, with what is missing put in."""

    def __init__(self, name: str, operations: list[tuple[int, Operation, bytes]]) -> None:
        self.kept: list[tuple[Operation, bytes]] = []
        self._state = JournalStorageReplayResult("reading-")
        self._name = name
        self._values = max((len(operation.get("values") or [0]) for _, operation, _ in operations), default=1)
        made = sum(operation["op_code"] == JournalOperation.CREATE_TRIAL for _, operation, _ in operations)
        named = Counter(operation["trial_id"] for _, operation, _ in operations if "trial_id" in operation)
        # One line alone may name a trial because it is damaged itself.
        self._lost = max((trial + 1 for trial, lines in named.items() if lines > 1), default=0) - made

    def take(self, operation: Operation, text: bytes) -> bool:
        """Apply an operation; False when it cannot be."""
        if not self._make_what_it_names(operation):
            return False
        try:
            self._state.apply_logs([operation])
        except Exception:  # Optuna's replay raises whatever its own code comes to
            return False
        self.kept.append((operation, text))
        return True

    def _make_what_it_names(self, operation: Operation) -> bool:
        study, trial = operation.get("study_id"), operation.get("trial_id")
        if self._state._next_study_id == 0 and (study == 0 or trial is not None):
            self._make(JournalOperation.CREATE_STUDY, study_name=self._name, directions=[2] * self._values)
        if study is not None and study >= self._state._next_study_id:
            return False
        missing = 0 if trial is None else trial + 1 - len(self._state._trials)
        if missing > max(0, self._lost):
            return False
        for _ in range(missing):
            self._lost -= 1
            self._make(JournalOperation.CREATE_TRIAL, study_id=0, datetime_start="1970-01-01T00:00:00.000000+00:00")
        return True

    def _make(self, code: JournalOperation, **fields: Any) -> None:
        operation = {"op_code": int(code), "worker_id": "made-again", **fields}
        self._state.apply_logs([operation])
        self.kept.append((operation, json.dumps(operation, separators=(",", ":")).encode()))

    def ended(self) -> tuple[set[int], set[int]]:
        """The trials that are finished, and those that are evaluated or finished and lack what that takes."""
        trials = self._state._trials
        n_params = max((len(trial.params) for trial in trials.values()), default=0)
        has_baseline = any(trial.user_attrs.get("baseline") for trial in trials.values())  # else it may be any
        finished, wanting = set(), set()
        for key, trial in trials.items():
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
                finished.add(key)
            if trial.state == TrialState.PRUNED:
                is_whole = "candidate" in trial.user_attrs
            else:
                named = all(name in trial.user_attrs for name in EVALUATED)
                is_whole = named and has_baseline and len(trial.params) == n_params
                is_whole &= trial.state != TrialState.COMPLETE or bool(trial.values)
            if not is_whole and (
                key in finished or (trial.state == TrialState.RUNNING and "scores" in trial.user_attrs)
            ):
                wanting.add(key)
        return finished, wanting
