"""The table from the trials that it is made of (`tools/build_rankbench.py` runs them)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra_vlm.allocation import Budget
from hydra_vlm.errors import DataError
from hydra_vlm.graph import ComputationGraph
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.rankbench.entry import Entry
from hydra_vlm.rankbench.table import RankBench, Row
from hydra_vlm.reading import read_json, read_yaml
from hydra_vlm.records import TrialRecord
from hydra_vlm.schedule import RankSchedule

SECTIONS = ("data", "budget", "profile", "scaling", "training", "evaluation")
"""What of a configuration is told of every run; the others do not count here, or name files of one machine."""


def collect(folder: Path, meta: Mapping[str, Any] | None = None) -> RankBench:
    """The table of a folder of trials, of those that have finished.

    The folder holds `rankbench.json` (a list of entries), `graph.json`, `profile.json` and
    `trials/<id>-seed<k>/record.json`; `meta` are facts beside those of `config.yaml` and `environment.json`.

    Raises DataError where a file is missing, no trial has finished, or a record is of another schedule, budget or set
    of benchmarks than the table's.
    """
    for name in ("rankbench.json", "graph.json", "profile.json"):
        if not (folder / name).is_file():
            raise DataError(f"{folder} has no {name}: it is not a folder of RankBench trials.")
    graph = ComputationGraph.from_json(read_json(folder / "graph.json"))
    entries = tuple(Entry.from_json(line, graph) for line in read_json(folder / "rankbench.json"))
    records = {path.parent.name: _record(path) for path in sorted(folder.glob("trials/*/record.json"))}
    by_key = {f"{entry.id}-seed{record.seed}": entry for entry in entries for record in records.values()}
    known = {key: record for key, record in records.items() if key in by_key}
    if not known:
        raise DataError(f"no trial of RankBench has finished in {folder / 'trials'}: run some first.")
    key, first = next(iter(known.items()))
    if first.schedule is None:
        raise DataError(f"trial {key} has no schedule: it is not of RankBench.")
    budget = Budget.of_parameters(graph, first.schedule.budget)
    benchmarks = tuple(score.benchmark for score in first.scores)
    for key, record in known.items():
        _check_record(key, record, by_key[key].schedule(graph, budget))
    rows = tuple(Row.of(record, by_key[key].id, benchmarks) for key, record in known.items())
    profile = GradientNormProfile.from_json(read_json(folder / "profile.json"))
    return RankBench(graph, budget, profile, benchmarks, entries, rows, {**_facts(folder), **(meta or {})})


def _record(path: Path) -> TrialRecord:
    try:
        return TrialRecord.from_json(read_json(path))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a trial's record: {type(error).__name__} {error}.") from error


def _check_record(key: str, record: TrialRecord, planned: RankSchedule) -> None:
    ran = record.schedule
    if ran is None or ran.ranks != planned.ranks or ran.budget != planned.budget or ran.scaling != planned.scaling:
        raise DataError(
            f"trial {key} ran {ran!r}, but the table has {planned!r} under that id: the plan was made anew; use "
            "another folder."
        )


def _facts(folder: Path) -> dict[str, Any]:
    """The configuration that all runs share, and the versions that they ran with, as far as the folder tells."""
    found: dict[str, Any] = {}
    if (folder / "config.yaml").is_file():
        config = read_yaml(folder / "config.yaml")
        for name in SECTIONS:
            kept = {key: value for key, value in (config.get(name) or {}).items() if value not in (None, {}, [])}
            found[name] = kept
    if (folder / "environment.json").is_file():
        environment = read_json(folder / "environment.json")
        names = ("packages", "python", "machine")
        found["environment"] = {key: environment[key] for key in names if key in environment}
    return found
