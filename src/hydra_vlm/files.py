"""Files that are whole or not there: written under a temporary name, then renamed. No torch."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra_vlm.errors import RunFolderError


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """One JSON value a line."""
    write_text(path, "".join(json.dumps(value) + "\n" for value in values))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def require_free(folder: Path) -> None:
    """Raises RunFolderError unless a new folder may appear there: nothing is there, or an empty folder."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file: give the folder that is to be written.")
    if folder.is_dir() and any(folder.iterdir()):
        raise RunFolderError(f"{folder} is not empty, and nothing is overwritten: choose another folder.")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A sibling to write into, which takes the folder's name at the end; on any error it goes, and nothing appears."""
    folder = folder.absolute()
    draft = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
