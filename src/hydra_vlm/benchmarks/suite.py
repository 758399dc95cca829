"""Benchmarks by name, and the tasks (benchmark and examples) that a folder of data holds. No torch."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import cast

from hydra_vlm.benchmarks.exact_match import ExactMatch
from hydra_vlm.benchmarks.gqa import GQA
from hydra_vlm.benchmarks.mmbench import MMBench
from hydra_vlm.benchmarks.mme import MME
from hydra_vlm.benchmarks.pope import POPE
from hydra_vlm.benchmarks.protocol import Benchmark, Example, Prediction, Published, Rule, Score, Verdict
from hydra_vlm.benchmarks.scienceqa import ScienceQA
from hydra_vlm.benchmarks.scoring import judged, sample_examples, score
from hydra_vlm.benchmarks.textvqa import TextVQA
from hydra_vlm.data.builtin import BUILTIN, DataFiles, write_builtin
from hydra_vlm.data.records import check_images, read_records, sample
from hydra_vlm.errors import ConfigError, DataError
from hydra_vlm.names import file_name, require_distinct

SIX: dict[str, type[MME | MMBench | TextVQA | POPE | GQA | ScienceQA]] = {
    "mme": MME,
    "mmbench": MMBench,
    "textvqa": TextVQA,
    "pope": POPE,
    "gqa": GQA,
    "scienceqa": ScienceQA,
}
FOLDERS = {"scienceqa": ("sqa", "scienceqa"), "mme": ("mme", "MME")}
"""Where MobileVLM's and LLaVA's evaluation folders name a benchmark otherwise than we do."""


@dataclass(frozen=True)
class Task:
    """A benchmark, its examples, and what they were read from: a folder, `root`, or a plain `file`."""

    benchmark: Benchmark
    examples: tuple[Example, ...]
    root: Path | None = None
    file: Path | None = None

    @property
    def name(self) -> str:
        return self.benchmark.name

    @property
    def images(self) -> set[str]:
        return {example.image for example in self.examples if example.image}

    def limited(self, limit: int | None, seed: int = 0) -> "Task":
        """At most `limit` examples: of the six whole units and strata in proportion, of a plain file any."""
        if isinstance(self.benchmark, ExactMatch):
            return replace(self, examples=tuple(sample(self.examples, limit, seed)))
        return replace(self, examples=tuple(sample_examples(self.examples, limit, seed, self.name)))


def require_test_name(name: str) -> str:
    """The name of a plain file's test, once its answers may be filed under it.

    Raises:
        ConfigError: no file may have the name, or one of the six has it, which is scored otherwise.
    """
    require_distinct([file_name(name, "test")], "test", SIX)
    return name


def open_benchmark(name: str, rule: Rule = "published") -> Benchmark:
    """One of the six by its name; any other name is a plain file's, whose answers must be equal."""
    return SIX[name](rule=rule) if name in SIX else ExactMatch(name, rule)


def asked_names(text: str) -> tuple[str, ...]:
    """`all`, or names separated by commas.

    Raises:
        ConfigError: naming the unknown one and the nearest.
    """
    names = tuple(name.strip().lower() for name in text.split(",") if name.strip())
    if names == ("all",) or not names:
        return ()
    for name in names:
        if name not in SIX:
            close = difflib.get_close_matches(name, SIX, n=1, cutoff=0.5)
            meant = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(SIX)}, or all"
            raise ConfigError(f"benchmark {name!r} does not exist: {meant}")
    return tuple(dict.fromkeys(names))


def find_folders(data: Path) -> dict[str, Path]:
    """The benchmarks that have a folder in `data`, in the order of the six."""
    places = {name: [data / folder for folder in FOLDERS.get(name, (name,))] for name in SIX}
    return {
        name: next(p for p in paths if p.is_dir()) for name, paths in places.items() if any(map(Path.is_dir, paths))
    }


def open_tasks(
    data: str, names: Sequence[str], out: Path, rule: Rule = "published", images: Path | None = None
) -> list[Task]:
    """The tasks of a built-in set (written to `out`/data), of a LLaVA-format file, or of a folder of benchmarks.

    `images` is the image folder of a file (default: the file's own).

    Raises:
        DataError: what is asked for is missing, incomplete or wrong.
        ConfigError: names are given for a file, which is one task.
    """
    if data in BUILTIN:
        return tasks_of(write_builtin(data, out / "data"), names, out / "images", rule)
    if Path(data).is_file():
        tests = {require_test_name(Path(data).stem): Path(data)}
        return tasks_of(DataFiles(Path(data), None, tests, images), names, out / "images", rule)
    return load_tasks(Path(data), names, out / "images", rule)


def tasks_of(files: DataFiles, names: Sequence[str], scratch: Path, rule: Rule = "published") -> list[Task]:
    """The tasks of a data set: its plain files, whose answers must be equal, and its folder of benchmarks.

    Raises:
        DataError: there is nothing to ask, or it is wrong.
        ConfigError: names are given where there is no folder of benchmarks.
    """
    if names and files.benchmarks is None:
        raise ConfigError(f"{', '.join(names)} come from a folder of benchmarks: name one in place of {files.train}")
    tasks = []
    for name, path in ({} if names else files.tests).items():
        require_test_name(name)
        records = read_records(path, files.images)
        check_images(path, records)
        benchmark = ExactMatch(name, rule)
        tasks.append(Task(benchmark, tuple(benchmark.examples(records)), file=Path(path)))
    if files.benchmarks is not None:
        tasks += load_tasks(files.benchmarks, names, scratch, rule)
    return tasks


def load_tasks(data: Path, names: Sequence[str], scratch: Path, rule: Rule = "published") -> list[Task]:
    """The benchmarks asked for (none named: all that have a folder in `data`); decoded images go to `scratch`.

    Raises:
        DataError: a folder or file is missing or wrong.
    """
    if not data.is_dir():
        raise DataError(f"benchmark folder {data} does not exist: it holds one folder a benchmark ({', '.join(SIX)})")
    folders = find_folders(data)
    absent = [name for name in names if name not in folders]
    if absent or not folders:
        first = (absent or list(SIX))[0]
        raise DataError(
            f"{data} has no folder {' or '.join(FOLDERS.get(first, (first,)))}"
            + (f", only {', '.join(folders)}" if folders else " nor that of any other benchmark")
            + f". {SIX[first]().source}"
        )
    tasks = []
    for name in names or folders:
        benchmark: Published = SIX[name](rule=rule)
        examples = benchmark.load(folders[name], scratch / name)
        if not examples:
            raise DataError(f"{folders[name]} holds no question. {benchmark.source}")
        tasks.append(Task(benchmark, tuple(examples), folders[name]))
    return tasks


def score_task(task: Task, predictions: Iterable[Prediction]) -> tuple[Score, list[Verdict]]:
    """The score by the task's rule, with the value by the other rule beside it where that differs."""
    said = list(predictions)
    result, verdicts = score(task.benchmark, task.examples, said)
    other = open_benchmark(task.name, "corrected" if task.benchmark.rule == "published" else "published")
    value = other.total(task.examples, judged(other, task.examples, said)).value
    return replace(result, otherwise=value if abs(value - result.value) > 1e-9 else None), verdicts


def average(scores: Sequence[Score]) -> float | None:
    """MobileVLM's average of the six, MME's perception / 20 among them; None unless all six are there."""
    by_name = {score.benchmark: score for score in scores}
    return fmean(by_name[name].percent for name in SIX) if by_name.keys() >= SIX.keys() else None


def published(benchmark: Benchmark) -> Published | None:
    """The benchmark with its folder's side, if it has one."""
    return cast(Published, benchmark) if benchmark.name in SIX else None
