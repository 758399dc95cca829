"""A run is bound to the content of what it read: digests in `inputs.json`, compared whenever it goes on. No torch.

`inputs.json` has a group for each thing that is read (the model's folder, each data file, the images of each, each
benchmark's files, each adapter): {group: {"root": folder, "files": {name: [bytes, SHA-256]}}}. A group's files are
compared by name and content; where the group lies does not matter.
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_vlm.benchmarks.suite import Task, published
from hydra_vlm.data.digests import Content, contents_of
from hydra_vlm.data.preflight import Checked
from hydra_vlm.errors import RunFolderError
from hydra_vlm.files import read_kept, write_json
from hydra_vlm.ownership import contents
from hydra_vlm.reading import TABLE

INPUTS = "inputs.json"
SET_ASIDE = "set-aside"

_READ_OF_A_MODEL = {".json", ".safetensors", ".bin", ".jinja", ".model", ".txt", ".tiktoken"}
_NOT_OF_A_MODEL = {"training_args.bin", "optimizer.bin", "scheduler.bin", "trainer_state.json"}
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}


@dataclass(frozen=True)
class Group:
    """Files below `root` by name, with size and digest each."""

    root: str
    files: Mapping[str, Content]

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def to_json(self) -> dict[str, Any]:
        return {"root": self.root, "files": {name: list(content) for name, content in self.files.items()}}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Group":
        files = {name: (int(size), str(digest)) for name, (size, digest) in data["files"].items()}
        return cls(str(data["root"]), files)


Inputs = dict[str, Group]


# What is read


def group_of(root: Path | str, paths: Iterable[Path | str]) -> Group:
    """These files with their content, by their names below `root`; those that are not there are left out."""
    start = os.path.join(str(root), "")
    found = contents_of(map(str, paths))
    return Group(str(root), {path.removeprefix(start): content for path, content in sorted(found.items())})


def model_inputs(folder: Path) -> Inputs:
    """The files of a model's folder that loading it may read: weights, configuration, tokenizer, chat templates."""
    files = [path for path in folder.iterdir() if path.suffix in _READ_OF_A_MODEL and path.is_file()]
    files += (folder / "additional_chat_templates").glob("*.jinja")
    whole = any(path.suffix == ".safetensors" for path in files)  # beside which a .bin is not read
    read = [path for path in files if path.name not in _NOT_OF_A_MODEL and not (whole and path.suffix == ".bin")]
    return {"model": group_of(folder, read)}


def folder_inputs(name: str, folder: Path) -> Inputs:
    """All files directly in a folder, such as an adapter's."""
    return {name: group_of(folder, (path for path in contents(folder) if path.is_file()))}


def data_inputs(name: str, checked: Checked) -> Inputs:
    """A data file, and the images of its good records."""
    images = (path for _, path in checked.records.images())
    return {
        name: group_of(checked.path.parent, [checked.path]),
        f"images of {name}": group_of(checked.records.folder, images),
    }


def task_inputs(tasks: Sequence[Task], home: Path) -> Inputs:
    """Each task's file, or what its benchmark reads in its folder, and the images of its questions.

    Images that were decoded from a benchmark's file lie below `home`, the run's folder.
    """
    found: Inputs = {}
    for task in tasks:
        place = task.root or (task.file.parent if task.file else Path())
        read = [task.file] if task.file else _benchmark_files(task)
        found[f"test {task.name}"] = group_of(place, read)
        given = {path for path in task.images if path.startswith(os.path.join(str(place), ""))}
        found[f"images of test {task.name}"] = group_of(place, given)
        if task.images - given:
            found[f"decoded images of test {task.name}"] = group_of(home, task.images - given)
    return found


def _benchmark_files(task: Task) -> list[Path]:
    """The files of a benchmark's folder besides images, of which those that are asked about are known."""
    benchmark = published(task.benchmark)
    if task.root is None or benchmark is None:
        return []
    surplus = set(benchmark.surplus(task.root))
    read: list[Path] = []
    for entry in task.root.iterdir():
        if entry.name in surplus or entry.name.startswith("."):
            continue
        below = (
            [entry] if not entry.is_dir() else [Path(at) / name for at, _, names in os.walk(entry) for name in names]
        )
        read += [path for path in below if path.suffix.lower() not in _PICTURES]
    return read


# What is kept of it


def bind(folder: Path, now: Inputs, begun: bool) -> tuple[str, ...]:
    """Keep what is read in a run folder or, where something was computed from it, compare; returns the groups' names.

    Raises:
        RunFolderError: a file is not what it was, or another one has come or gone, where the run has `begun`.
    """
    before = read_inputs(folder) if begun else {}
    found = [line for name in now if name in before for line in differences(name, before[name], now[name])]
    if found:
        more = f", and {len(found) - 3:,} more" if len(found) > 3 else ""
        raise RunFolderError(
            f"{folder} holds a run on other content ({'; '.join(found[:3])}{more}): put back what was there and repeat "
            f"the command to go on with the run, or name another --out{_builtin_remedy(folder, now, found)}"
        )
    write_json(folder / INPUTS, {name: group.to_json() for name, group in {**before, **now}.items()})
    return tuple(now)


def require_unchanged(folder: Path, names: Sequence[str], made: Path) -> None:
    """Raise unless what a run is bound to is on the disk still; what was `made` of it meanwhile is set aside.

    Raises:
        RunFolderError: a file was changed while it was used.
    """
    before = read_inputs(folder)
    found: list[str] = []
    for name in names:
        if (group := before.get(name)) is not None:
            again = group_of(group.root, (group.path(file) for file in group.files))
            found += differences(name, group, again)
    if not found:
        return
    kept = ""
    if made.exists():
        place = folder / SET_ASIDE / made.name
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        made.rename(place)
        kept = f" What was made meanwhile, of nobody knows which content, is set aside in {place}."
    raise RunFolderError(
        f"what {made.name} reads was changed while it was used ({'; '.join(found[:3])}): put it back and repeat the "
        f"command, which makes {made.name} anew, or name another --out.{kept}"
    )


def read_inputs(folder: Path) -> Inputs:
    """What a run folder is bound to; nothing where an earlier version made it."""
    stored = folder / INPUTS
    advice = "remove it if all that the run has read is unchanged, else name another --out"
    found = read_kept(
        stored, lambda data: {name: Group.from_json(group) for name, group in data.items()}, advice, TABLE
    )
    return found or {}


def differences(name: str, before: Group, now: Group) -> list[str]:
    """A few words for each file that differs, by name; those that have changed first."""
    both = [file for file in before.files if file in now.files and before.files[file] != now.files[file]]
    gone = [file for file in before.files if file not in now.files]
    new = [file for file in now.files if file not in before.files]
    return [
        *(f"{name}: {now.path(f)} had {_words(before.files[f])} and has {_words(now.files[f])} now" for f in both),
        *(f"{name}: {now.path(f)} had {_words(before.files[f])} and is not there or not readable now" for f in gone),
        *(f"{name}: {now.path(f)} was not there and has {_words(now.files[f])} now" for f in new),
    ]


def _words(content: Content) -> str:
    return f"{content[0]:,} bytes (SHA-256 {content[1][:8]}…)"


def _builtin_remedy(folder: Path, now: Inputs, found: Sequence[str]) -> str:
    """A built-in set that was edited can be written again."""
    own = str(folder / "data")
    if any(own in line for line in found) and any(group.root.startswith(own) for group in now.values()):
        return f". Once {own} is removed, the built-in set is written there again"
    return ""
