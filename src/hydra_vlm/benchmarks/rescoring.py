"""Scores from saved predictions, without a model: in an evaluation folder or a run folder. No torch."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra_vlm.benchmarks.protocol import Example, Prediction, Rule, Score
from hydra_vlm.benchmarks.suite import SIX, Task, open_benchmark, score_task
from hydra_vlm.errors import RunFolderError
from hydra_vlm.files import write_json, write_lines
from hydra_vlm.names import below, file_name, found_below
from hydra_vlm.ownership import owned
from hydra_vlm.reading import TABLE, read_json, read_json_lines, read_text
from hydra_vlm.strict import parse_json


def write_examples(run: Path, tasks: Iterable[Task]) -> None:
    """Keep the questions and their references beside the answers, so that scoring needs nothing else."""
    for task in tasks:
        write_lines(run / "examples" / f"{task.name}.jsonl", (e.to_json() for e in task.examples))


def read_predictions(path: Path, task: Task) -> list[Prediction]:
    """The task's predictions in a file, in the examples' order; a last line that was cut off is left out.

    Raises:
        RunFolderError: a line in the middle does not read, or belongs to no example.
    """
    if not os.path.lexists(path):  # what is there but no file is told as that
        return []
    lines = read_text(path, TABLE).splitlines(keepends=True)
    found: dict[str, Prediction] = {}
    for number, line in enumerate(lines, start=1):
        try:
            prediction = Prediction.from_json(parse_json(line, "it"))
        except (ValueError, TypeError) as problem:
            if number == len(lines):
                break
            raise RunFolderError(f"{path}, line {number} does not read ({problem}): delete the file") from None
        if not line.endswith("\n"):
            break
        found.setdefault(prediction.id, prediction)
    known = [example.id for example in task.examples]
    surplus = found.keys() - set(known)
    if surplus:
        raise RunFolderError(f"{path} answers {min(surplus)!r}, which was not asked: it belongs to another run")
    return [found[id] for id in known if id in found]


def finish(folder: Path, tasks: Sequence[Task]) -> tuple[Score, ...]:
    """Score the predictions in `folder`; writes verdicts/ and scores.json, and predictions/ in the examples' order."""
    scores = []
    for task in tasks:
        path = _own(folder, f"predictions/{task.name}.jsonl")
        predictions = read_predictions(path, task)
        result, verdicts = score_task(task, predictions)
        write_lines(path, (p.to_json() for p in predictions))
        write_lines(_own(folder, f"verdicts/{task.name}.jsonl"), (v.to_json() for v in verdicts))
        scores.append(result)
    write_json(_own(folder, "scores.json"), [result.to_json() for result in scores])
    return tuple(scores)


def rescore(run: Path, rule: Rule = "published") -> dict[str, tuple[Score, ...]]:
    """Score every answered folder of a run anew: scores by label; the records of trials get the new scores.

    Raises:
        RunFolderError: the folder keeps no examples, or no predictions.
        FolderInUseError: a command is at work in it.
    """
    paths = {path.stem: path for path in found_below(run, "examples/*.jsonl", "file", RunFolderError)}
    if not paths:
        raise RunFolderError(f"{run} keeps no examples: give the --out of `evaluate` or `tune`")
    with owned(run):
        return _rescored(run, paths, rule)


def _rescored(run: Path, paths: dict[str, Path], rule: Rule) -> dict[str, tuple[Score, ...]]:
    for name in paths:
        file_name(name, f"{run / 'examples'}: benchmark", RunFolderError)
    names = [name for name in SIX if name in paths] + sorted(paths.keys() - SIX.keys())
    tasks = [Task(open_benchmark(name, rule), _read_examples(paths[name])) for name in names]
    scores = {}
    folders = [f for home in ("answers", "trials") for f in found_below(run, f"{home}/*", "folder", RunFolderError)]
    for folder in folders:
        answered = [task for task in tasks if os.path.lexists(folder / "predictions" / f"{task.name}.jsonl")]
        if answered:
            scores[folder.name] = finish(folder, _as_before(folder, answered))
            _renew_record(_own(folder, "record.json"), scores[folder.name])
    if not scores:
        raise RunFolderError(f"{run} has no predictions in answers/ or trials/: nothing was answered yet")
    return scores


def _own(folder: Path, name: str) -> Path:
    """A file of a folder; raises RunFolderError where a link leads out of it."""
    return below(folder, name, "file", RunFolderError)


def _as_before(folder: Path, tasks: Sequence[Task]) -> list[Task]:
    """In the order in which they were scored last, which reports follow; new ones behind."""
    path = _own(folder, "scores.json")
    before = [score["benchmark"] for score in read_json(path)] if os.path.lexists(path) else []
    return sorted(tasks, key=lambda task: before.index(task.name) if task.name in before else len(before))


def _read_examples(path: Path) -> tuple[Example, ...]:
    try:
        return tuple(Example.from_json(value) for _, value in read_json_lines(path))
    except (ValueError, TypeError, KeyError) as problem:
        raise RunFolderError(f"{path} does not read ({problem}): it is not as it was written") from None


def _renew_record(path: Path, scores: Sequence[Score]) -> None:
    if os.path.lexists(path):
        record = read_json(path)
        write_json(path, record | {"scores": [score.to_json() for score in scores]})
