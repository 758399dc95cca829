"""What is kept between runs about data files, so that no start repeats a pass over them. No torch.

The folder is `$HYDRA_VLM_CACHE`, else `$XDG_CACHE_HOME/hydra-vlm`, else `~/.cache/hydra-vlm`. It may be removed at any
time. A data file is known by its content: where path, size, inode and both times are what they were, the digest that
was taken then holds; small files are read again in any case.
"""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from hydra_vlm.data.json_rows import cannot_open
from hydra_vlm.errors import DiskFullError, FileError
from hydra_vlm.files import write_json
from hydra_vlm.reading import open_file, read_json

SMALL = 2**20
"""Bytes up to which a file's digest is taken anew: two writes within one tick of the clock look alike."""


DIGEST = 16
"""Bytes of the digest behind a stored array."""


class CacheWarning(UserWarning):
    """Something about the cache, which is never needed."""


def cache_folder() -> Path:
    """The folder; one that goes with the process where none can be written."""
    own = os.environ.get("HYDRA_VLM_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(own) if own else Path(home).expanduser() / "hydra-vlm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as problem:
        if not _OWN:
            _tell_unwritable(folder, problem)
        return Path(_own_folder())


def file_digest(path: Path, cache: Path) -> str:
    """BLAKE2 of a file's content, from `cache` where the file was not touched since.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with open_file(path) as file:
            seen = os.fstat(file.fileno())
            state = [seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino]
            note = cache / "digests" / f"{digest_of(str(path.resolve()))}.json"
            if seen.st_size > SMALL and (known := read_summary(note)) and known[0] == state:
                return str(known[1])
            found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except (FileError, OSError) as problem:
        raise cannot_open(path, problem) from None
    if seen.st_size > SMALL:
        write_summary(note, [state, found])
    return found


def digest_of(*parts: str) -> str:
    """A short name for these texts together."""
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def number_of(text: str) -> int:
    """64 bits that stand for a text; never 0."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def write_array(path: Path, array: np.ndarray) -> None:
    """Whole or not there, its digest behind it; not at all where the cache takes nothing more."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _optional(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        with draft.open("rb+") as file:
            file.write(_digest(file))  # `np.load` reads as far as the array goes
        os.replace(draft, path)


def read_array(path: Path) -> np.ndarray | None:
    """The array, mapped from disk; None where there is none, or one that is no longer as it was written."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size - DIGEST
            digest = hashlib.blake2b(digest_size=DIGEST)
            while piece := file.read(min(2**20, max(size - file.tell(), 0))):
                digest.update(piece)
            if size < 0 or digest.digest() != file.read():
                raise ValueError("another digest")
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as problem:
        _tell_damaged(path, problem)
        return None
    return found


def write_summary(path: Path, value: Any) -> None:
    """A JSON value with its digest; not at all where the cache takes nothing more."""
    with _optional(path):
        write_json(path, {"digest": digest_of(json.dumps(value)), "value": value})


def read_summary(path: Path) -> Any:
    """A value that `write_summary` wrote; None where there is none, or one that is no longer as it was written."""
    if not path.is_file():
        return None
    try:
        found = read_json(path)
        if found["digest"] != digest_of(json.dumps(found["value"])):
            raise ValueError("another digest")
    except (OSError, ValueError, KeyError, TypeError) as problem:
        _tell_damaged(path, problem)
        return None
    return found["value"]


def _digest(file: IO[bytes]) -> bytes:
    """BLAKE2 of a file from its beginning; leaves the place at its end."""
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST)).digest()  # type: ignore[arg-type]


def _tell_damaged(path: Path, problem: Exception) -> None:
    reason = f"{type(problem).__name__}: {problem}"
    warnings.warn(f"{path} in the cache is damaged ({reason}): it is made anew", CacheWarning, stacklevel=3)


@contextmanager
def _optional(path: Path) -> Iterator[None]:
    """A cache that takes nothing more (read-only meanwhile, a full disk) is no reason to end: it is said."""
    try:
        yield
    except (OSError, DiskFullError) as problem:
        with suppress(OSError):
            path.with_name(f".{path.name}.{os.getpid()}.tmp").unlink(missing_ok=True)
        _tell_unwritable(path.parents[1], problem)


def _tell_unwritable(folder: Path, problem: Exception) -> None:
    warnings.warn(
        f"the cache {folder} takes no new files ({getattr(problem, 'strerror', None) or problem}): going on without; "
        "HYDRA_VLM_CACHE names another folder",
        CacheWarning,
        stacklevel=3,
    )


_OWN: list[tempfile.TemporaryDirectory[str]] = []


def _own_folder() -> str:
    if not _OWN:
        _OWN.append(tempfile.TemporaryDirectory(prefix="hydra-vlm-"))
    return _OWN[0].name
