"""Files that are whole or not there: written under a temporary name, then renamed. No torch."""

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from hydra_vlm.errors import FileError, HydraError, RunFolderError
from hydra_vlm.faults import disk_full_told, first_line, is_disk_full, is_out_of_memory
from hydra_vlm.ownership import owned
from hydra_vlm.reading import SETTINGS, file_fault, read_json

Value = TypeVar("Value")


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one, whoever else writes it.

    Raises:
        DiskFullError: there is no room; what was there is there still.
        RunFolderError: a folder is in the file's place.
    """
    if path.is_dir():
        raise RunFolderError(f"{path} is a folder, where a file is to be written: move it away, and repeat the command")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_full_told(path, _old_file_kept, needed=len(text)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def _old_file_kept() -> str:
    return "All that was written before is kept."


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """One JSON value a line."""
    write_text(path, "".join(json.dumps(value) + "\n" for value in values))


def read_value(path: Path, from_json: Callable[[Any], Value], remedy: str, limit: int = SETTINGS) -> Value:
    """One of this package's values from its JSON file.

    Raises:
        RunFolderError: the file is not valid JSON, or not of this kind; `remedy` says what to do.
    """
    try:
        return from_json(read_json(path, limit))
    except FileError as problem:
        raise RunFolderError(f"{problem}: {remedy}") from None
    except HydraError as problem:
        raise RunFolderError(f"{path} does not hold what it should ({problem}): {remedy}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as problem:
        what = "is damaged" if isinstance(problem, ValueError) else "does not hold what it should"
        raise RunFolderError(f"{path} {what} ({type(problem).__name__}: {problem}): {remedy}") from None


def read_kept(path: Path, from_json: Callable[[Any], Value], remedy: str, limit: int = SETTINGS) -> Value | None:
    """As `read_value`, or None where nothing is there; what is there and no file is refused, not overlooked."""
    return read_value(path, from_json, remedy, limit) if os.path.lexists(path) else None


@contextmanager
def at_work(path: Path | str) -> Iterator[None]:
    """While the block lasts this file is the one at work, which an error that escapes from the block remembers."""
    try:
        yield
    except BaseException as problem:
        if file_at_work(problem) is None:
            with suppress(AttributeError, TypeError):
                problem.file_at_work = str(path)  # type: ignore[attr-defined]
        raise


def file_at_work(problem: BaseException) -> str | None:
    """The innermost file that was at work when this error was raised, as far as one is known."""
    found = getattr(problem, "file_at_work", None) or getattr(problem, "filename", None)
    return None if found is None else os.fsdecode(found) if isinstance(found, str | bytes) else str(found)


@contextmanager
def reading(path: Path | str, remedy: str, error: type[HydraError] = RunFolderError) -> Iterator[None]:
    """While the block lasts a library reads this file; whatever it raises becomes `error` with the file's name.

    For calls into libraries, which raise what they like about a damaged file. A full disk and memory that ran out are
    not the file's fault and stay what they are.

    Raises:
        HydraError: of the kind asked for.
    """
    try:
        with at_work(path):
            yield
    except (HydraError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as problem:
        rust = type(problem).__name__ == "PanicException"  # what a Rust library raises beside Python's exceptions
        if not (rust or isinstance(problem, Exception)) or is_disk_full(problem) or is_out_of_memory(problem):
            raise
        raise error(f"{path} cannot be read ({type(problem).__name__}: {first_line(problem)}): {remedy}") from problem


_ROOM = 24
"""Bytes that a temporary name adds to a name."""

_BELOW = 200
"""Bytes that the longest name below a run folder takes."""


_OWNERS = {"run": ("config.yaml", "environment.json"), "model": ("config.json",), "adapter": ("adapter_config.json",)}
"""What a folder is that holds all of these files."""


def require_place(folder: Path, what: str = "--out", alone: bool = False) -> None:
    """Check, before long work, that a folder can be made here, or is here, and can be written.

    `alone`: what is written here is not to lie among the files of another run, a model or an adapter.

    Raises:
        RunFolderError: it is inside a file, a file, a link to nothing or a device, read-only, or its name is too long.
    """
    found = _nearest(folder, what)
    if found == folder.absolute() and not folder.is_dir():
        raise RunFolderError(f"{what} {folder} {_state(folder)}: give the folder that is to be written.")
    _require_room(folder, found, what)
    for above in folder.resolve().parents if alone else ():
        owner = next((kind for kind, own in _OWNERS.items() if all((above / name).is_file() for name in own)), None)
        if owner is not None:
            raise RunFolderError(f"{what} {folder} lies inside the {owner} folder {above}: name a place of its own.")


def require_file_place(file: Path, what: str = "--out") -> None:
    """Check, before long work, that a file can be written under this name; an earlier file there is replaced.

    Raises:
        RunFolderError: a folder, a device or a link to nothing is there, or its folder is none of `require_place`.
    """
    found = _nearest(file, what)
    there = found == file.absolute()
    if there and not file.is_file():
        raise RunFolderError(f"{what} {file} {_state(file)}: give the name of the file that is to be written.")
    _require_room(file, found.parent if there else found, what)


def _require_room(path: Path, found: Path, what: str) -> None:
    """Raises RunFolderError unless `found`, a parent that is there, takes new files, and all names between fit."""
    if not found.is_dir():
        raise RunFolderError(f"{what} {path} lies inside {found}, which {_state(found)}: name another place.")
    _require_names(path, found, what)
    try:
        with tempfile.TemporaryFile(dir=found):
            pass
    except OSError as problem:
        if is_disk_full(problem):
            raise
        raise RunFolderError(
            f"{what} {path} cannot be written: {found} takes no new files ({problem.strerror}): name another place."
        ) from None


def _nearest(path: Path, what: str) -> Path:
    """The path itself or the first folder above it that is there, or a link that leads nowhere."""
    if "\0" in str(path):
        raise RunFolderError(f"{what} {str(path)!r} holds a NUL character, which no name can: name another place.")
    try:
        return next(p for p in (path.absolute(), *path.absolute().parents) if os.path.lexists(p))
    except OSError as problem:
        raise RunFolderError(f"{what} {path} cannot be used ({problem.strerror}): name another place.") from None


def _require_names(path: Path, there: Path, what: str) -> None:
    """Raises RunFolderError for names that the file system at `there` has no room for, temporary ones included."""
    longest, whole = (os.pathconf(there, limit) for limit in ("PC_NAME_MAX", "PC_PATH_MAX"))
    for part in path.absolute().relative_to(there).parts:
        if len(os.fsencode(part)) + _ROOM > longest:
            raise RunFolderError(
                f"{what}: the name {part[:40]}… is {len(os.fsencode(part))} bytes long, {longest - _ROOM} are possible "
                "here: choose a shorter one."
            )
    if len(os.fsencode(path.absolute())) + _BELOW > whole:
        raise RunFolderError(
            f"{what}: its path is {len(os.fsencode(path.absolute())):,} bytes long, and what is written below it needs "
            f"{_BELOW} of the {whole:,} possible: choose a shorter one."
        )


def _state(path: Path) -> str:
    """What is there: "is a file", "is a pipe, not a file", "is a link to x, which does not exist"."""
    return file_fault(path) or "is a file"


def as_umask_says(path: Path) -> None:
    """Give a file, or all files of a folder, the mode of a file made here: safetensors makes theirs for the owner."""
    with tempfile.TemporaryDirectory(dir=path if path.is_dir() else path.parent) as scratch:
        probe = Path(scratch) / "mode"
        probe.touch()
        mode = probe.stat().st_mode
    for file in path.rglob("*.safetensors") if path.is_dir() else (path,):
        file.chmod(stat.S_IMODE(mode))


def require_free(folder: Path) -> None:
    """Raises RunFolderError unless a new folder may appear there: nothing is there, or an empty folder."""
    require_place(folder, "the folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise RunFolderError(f"{folder} is not empty, and nothing is overwritten: choose another folder.")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A sibling to write into, which takes the folder's name at the end; on any error it goes, and nothing appears.

    Raises:
        FolderInUseError: another process is writing the same folder.
    """
    folder = folder.absolute()
    draft = folder.with_name(f".{folder.name}.new")
    with owned(folder, folder.with_name(f".{folder.name}.owner")):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            yield draft
            require_free(folder)  # whoever was here before may have ended with it
            if folder.exists():
                folder.rmdir()
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
