"""Files that are whole or not there: written under a temporary name, then renamed. No torch."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from hydra_vlm.errors import FileError, HydraError, RunFolderError
from hydra_vlm.faults import disk_full_told
from hydra_vlm.ownership import owned
from hydra_vlm.reading import read_json

Value = TypeVar("Value")


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one, whoever else writes it.

    Raises:
        DiskFullError: there is no room; what was there is there still.
    """
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


def read_value(path: Path, from_json: Callable[[Any], Value], remedy: str) -> Value:
    """One of this package's values from its JSON file.

    Raises:
        RunFolderError: the file is not valid JSON, or not of this kind; `remedy` says what to do.
    """
    try:
        return from_json(read_json(path))
    except FileError as problem:
        raise RunFolderError(f"{problem}: {remedy}") from None
    except HydraError as problem:
        raise RunFolderError(f"{path} does not hold what it should ({problem}): {remedy}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as problem:
        what = "is damaged" if isinstance(problem, ValueError) else "does not hold what it should"
        raise RunFolderError(f"{path} {what} ({type(problem).__name__}: {problem}): {remedy}") from None


def require_free(folder: Path) -> None:
    """Raises RunFolderError unless a new folder may appear there: nothing is there, or an empty folder."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file: give the folder that is to be written.")
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
