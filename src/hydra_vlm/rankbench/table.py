"""The table: schedules under one budget, and what fine-tuning with each came to, a row for each training seed.

On disk it is a folder of plain text: `table.json` (graph, profile, budget, names of the scores, facts), and a line for
each schedule in `schedules.jsonl` and for each run in `runs.jsonl`. `collect.py` makes it from a folder of trials.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from hydra_vlm.allocation import Budget
from hydra_vlm.errors import ConfigError, DataError, FileError, MissingFileError
from hydra_vlm.files import write_json, write_text
from hydra_vlm.graph import ComputationGraph, finite, whole
from hydra_vlm.profile import GradientNormProfile, require_same_graph
from hydra_vlm.rankbench.entry import Entry
from hydra_vlm.reading import read_json, read_json_lines
from hydra_vlm.records import TrialRecord
from hydra_vlm.schedule import RankSchedule

FloatArray = npt.NDArray[np.float64]
Part = Literal["development", "held-out", "all"]
PACKAGED = Path(__file__).parent / "data"
EARLY = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
"""Training losses are kept at the logged steps nearest to these shares of a run."""


@dataclass(frozen=True)
class Row:
    """One run: `scores` in per cent, in the table's order, losses, wall time.

    `train_losses` are (optimizer step, mean loss) pairs, at about EARLY shares of the run.
    """

    entry: str
    seed: int
    scores: tuple[float, ...]
    validation_loss: float
    train_losses: tuple[tuple[int, float], ...]
    seconds: float

    @classmethod
    def of(cls, record: TrialRecord, entry: str, benchmarks: Sequence[str]) -> "Row":
        """From a trial's record; raises DataError when its benchmarks are not these."""
        found = {score.benchmark: score.percent for score in record.scores}
        if set(found) != set(benchmarks):
            raise DataError(
                f"trial {record.key} has the scores {', '.join(found)}, and the table has {', '.join(benchmarks)}: "
                "evaluate it on the same benchmarks, or leave it out."
            )
        scores = tuple(round(found[name], 4) for name in benchmarks)
        losses = _early(record.train_losses)
        return cls(entry, record.seed, scores, round(record.validation_loss, 6), losses, round(record.seconds, 1))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready object."""
        return {
            "id": self.entry,
            "seed": self.seed,
            "scores": list(self.scores),
            "loss": self.validation_loss,
            "train_losses": [list(pair) for pair in self.train_losses],
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Row":
        """The inverse of `to_json`; raises DataError on anything else."""
        try:
            losses = tuple((whole(step), finite(loss)) for step, loss in data["train_losses"])
            scores = tuple(finite(value) for value in data["scores"])
            loss, seconds = finite(data["loss"]), finite(data["seconds"])
            return cls(str(data["id"]), whole(data["seed"]), scores, loss, losses, seconds)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a run of RankBench: {type(error).__name__} {error}.") from error


def _early(losses: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    if not losses:
        return ()
    last = losses[-1][0]
    kept = {min(losses, key=lambda pair: abs(pair[0] - share * last))[0] for share in EARLY}
    return tuple((step, round(loss, 5)) for step, loss in losses if step in kept)


@dataclass(frozen=True, repr=False)
class RankBench:
    """The table; `entries` may have any number of rows, the first entry is uniform LoRA, the baseline of all gains.

    `meta` holds facts for people (how, when, on what). Raises DataError when ids or runs are repeated, a row's entry is
    unknown, numbers are missing or not finite, or the baseline has no run; BudgetError for a schedule over the budget;
    GraphMismatchError for a foreign profile.
    """

    graph: ComputationGraph
    budget: Budget
    profile: GradientNormProfile
    benchmarks: tuple[str, ...]
    entries: tuple[Entry, ...]
    rows: tuple[Row, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_same_graph(self.profile, self.graph)
        ids = Counter(entry.id for entry in self.entries)
        ranks = Counter(entry.ranks for entry in self.entries)
        for what, counts in (("id", ids), ("rank vector", ranks)):
            twice = [key for key, n in counts.items() if n > 1]
            if twice:
                raise DataError(f"RankBench has two entries of one {what}, {str(twice[0])[:60]}: remove one of them.")
        if not self.entries or self.entries[0].origin != "uniform":
            raise DataError("the first entry of RankBench must be uniform LoRA, the baseline: put it first.")
        for entry in self.entries:
            entry.schedule(self.graph, self.budget).check()
        self._check_rows(set(ids))

    def _check_rows(self, ids: set[str]) -> None:
        counts = Counter((row.entry, row.seed) for row in self.rows)
        for row in self.rows:
            where = f"run {row.entry}-seed{row.seed}"
            if row.entry not in ids:
                raise DataError(f"{where} belongs to no entry of RankBench: add its schedule, or leave it out.")
            if counts[row.entry, row.seed] > 1:
                raise DataError(f"{where} is in RankBench twice: remove one of the two.")
            if len(row.scores) != len(self.benchmarks):
                raise DataError(f"{where} has {len(row.scores)} scores for {len(self.benchmarks)} benchmarks.")
            if not np.isfinite([*row.scores, row.validation_loss]).all():
                raise DataError(f"{where} has a score or loss that is not finite: leave it out or run it again.")
        if not any(row.entry == self.entries[0].id for row in self.rows):
            raise DataError("uniform LoRA, the baseline, has no run: run it first.")

    @cached_property
    def finished(self) -> tuple[Entry, ...]:
        """The entries that have at least one run, in order."""
        return tuple(entry for entry in self.entries if entry.id in self.runs)

    @cached_property
    def runs(self) -> dict[str, tuple[Row, ...]]:
        """The rows of each entry that has any, seeds rising."""
        found: dict[str, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.seed):
            found.setdefault(row.entry, []).append(row)
        return {name: tuple(rows) for name, rows in found.items()}

    @cached_property
    def schedules(self) -> dict[str, RankSchedule]:
        """The schedule of each entry, by id."""
        return {entry.id: entry.schedule(self.graph, self.budget) for entry in self.entries}

    @cached_property
    def baseline(self) -> FloatArray:
        """[benchmarks] mean scores of uniform LoRA over its seeds."""
        return self.scores(self.runs[self.entries[0].id]).mean(axis=0)

    def scores(self, rows: Sequence[Row] | None = None) -> FloatArray:
        """[n, benchmarks] of these rows, by default of all, in per cent."""
        return np.array([row.scores for row in (self.rows if rows is None else rows)], dtype=np.float64)

    def objective(self, scores: FloatArray) -> FloatArray:
        """[n] mean over benchmarks of scores [n, benchmarks] relative to uniform's mean, in per cent.

        Uniform has 100. On a benchmark where uniform scores 0, a point counts as one per cent.
        """
        safe = np.where(self.baseline > 0, self.baseline, 1.0)
        relative = np.where(self.baseline > 0, scores / safe, 1 + scores / 100)
        return np.asarray(100 * relative.mean(axis=1))

    def part(self, part: Part) -> "RankBench":
        """The entries and rows of a part; which half an entry is in follows from its id, and uniform is in both.

        Raises ConfigError for another name.
        """
        if part not in get_args(Part):
            raise ConfigError(f"part {part!r} does not exist: use one of {', '.join(get_args(Part))}.")
        chosen = [e for e in self.entries if part == "all" or e is self.entries[0] or half(e.id) == part]
        ids = {entry.id for entry in chosen}
        return replace(self, entries=tuple(chosen), rows=tuple(row for row in self.rows if row.entry in ids))

    def save(self, folder: Path) -> None:
        """Write the three files."""
        header = {
            "graph": self.graph.to_json(),
            "budget": {"parameters": self.budget.parameters, "rank": self.budget.rank},
            "benchmarks": list(self.benchmarks),
            "profile": {key: value for key, value in self.profile.to_json().items() if key != "graph"},
            "meta": dict(self.meta),
        }
        write_json(folder / "table.json", header)
        lines = {"schedules": [e.to_json() for e in self.entries], "runs": [row.to_json() for row in self.rows]}
        for name, values in lines.items():
            text = "".join(json.dumps(value, separators=(",", ":")) + "\n" for value in values)
            write_text(folder / f"{name}.jsonl", text)

    def __repr__(self) -> str:
        seeds = Counter(len(rows) for rows in self.runs.values())
        by_seeds = ", ".join(f"{n} with {k} seeds" for k, n in sorted(seeds.items()))
        return (
            f"RankBench({len(self.finished)} schedules of {self.graph.name!r} at rank {self.budget.rank}, "
            f"{len(self.rows)} runs: {by_seeds})"
        )


def half(name: str) -> Part:
    """The half that an entry's id puts it in; settings are chosen on one, results reported on the other."""
    return "development" if hashlib.sha256(f"rankbench half {name}".encode()).digest()[0] % 2 else "held-out"


def load(folder: Path | None = None) -> RankBench:
    """A saved table, by default the packaged one; raises DataError where there is none or it is damaged."""
    folder = PACKAGED if folder is None else folder
    try:
        header = read_json(folder / "table.json")
        graph = ComputationGraph.from_json(header["graph"])
        lines = {name: _lines(folder / f"{name}.jsonl") for name in ("schedules", "runs")}
        return RankBench(
            graph=graph,
            budget=Budget(whole(header["budget"]["parameters"]), whole(header["budget"]["rank"])),
            profile=GradientNormProfile.from_json({**header["profile"], "graph": header["graph"]}),
            benchmarks=tuple(map(str, header["benchmarks"])),
            entries=tuple(Entry.from_json(line, graph) for line in lines["schedules"]),
            rows=tuple(Row.from_json(line) for line in lines["runs"]),
            meta=header["meta"],
        )
    except MissingFileError as error:
        raise DataError(f"no RankBench is in {folder}: {error}.") from None
    except FileError as error:
        raise DataError(f"RankBench in {folder} is damaged: {error}.") from None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"RankBench in {folder} is damaged: {type(error).__name__} {error}.") from error


def _lines(path: Path) -> list[Any]:
    return [value for _, value in read_json_lines(path)]
