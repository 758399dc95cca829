"""What is kept between runs about data files, so that no start repeats a pass over them. No torch.

The folder is `$HYDRA_VLM_CACHE`, else `$XDG_CACHE_HOME/hydra-vlm`, else `~/.cache/hydra-vlm`. It may be removed at any
time. A data file is known by its content: where path, size, inode and both times are what they were, the digest that
was taken then holds; small files are read again in any case.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np

from hydra_vlm.data.json_rows import cannot_open
from hydra_vlm.errors import FileError
from hydra_vlm.files import write_json
from hydra_vlm.reading import open_file, read_json

SMALL = 2**20
"""Bytes up to which a file's digest is taken anew: two writes within one tick of the clock look alike."""


def cache_folder() -> Path:
    """The folder; one that goes with the process where none can be written."""
    own = os.environ.get("HYDRA_VLM_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(own) if own else Path(home).expanduser() / "hydra-vlm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
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
            if seen.st_size > SMALL and (known := _known(note)) and known[0] == state:
                return str(known[1])
            found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except (FileError, OSError) as problem:
        raise cannot_open(path, problem) from None
    if seen.st_size > SMALL:
        write_json(note, [state, found])
    return found


def digest_of(*parts: str) -> str:
    """A short name for these texts together."""
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def number_of(text: str) -> int:
    """64 bits that stand for a text; never 0."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def write_array(path: Path, array: np.ndarray) -> None:
    """Whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with draft.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    os.replace(draft, path)


def read_array(path: Path) -> np.ndarray | None:
    """The array, mapped from disk; None where there is no whole one."""
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found


def _known(note: Path) -> list[object] | None:
    try:
        found = read_json(note)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, list) and len(found) == 2 else None


_OWN: list[tempfile.TemporaryDirectory[str]] = []


def _own_folder() -> str:
    if not _OWN:
        _OWN.append(tempfile.TemporaryDirectory(prefix="hydra-vlm-"))
    return _OWN[0].name
