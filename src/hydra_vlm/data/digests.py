"""Size and SHA-256 of files, many or huge, taken once and then known again by their state. No torch.

A digest is remembered only of a file that had been at rest for a while: two writes within one tick of the clock could
leave the same state. So what is promised is: a changed file is seen, unless its file system keeps no time of change and
somebody sets size and time of modification back.
"""

import hashlib
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path

from hydra_vlm.data.cache import cache_folder
from hydra_vlm.data.remembered import Remembered, State, state_of
from hydra_vlm.errors import FileError
from hydra_vlm.reading import open_file

Content = tuple[int, str]
"""Bytes of a file, and the SHA-256 of them."""

AT_REST = 2.0
"""Seconds since the last change after which another change is sure to show in the times."""

BATCH, THREADS = 256, 4


def contents_of(paths: Iterable[str], cache: Path | None = None) -> dict[str, Content]:
    """Each file's size and digest; files that cannot be read are left out."""
    found: dict[str, Content] = {}
    waiting = iter(dict.fromkeys(paths))
    with closing(open_digests(cache or cache_folder())) as remembered, ThreadPoolExecutor(THREADS) as pool:
        while batch := list(islice(waiting, BATCH)):
            states = {path: state_of(path) for path in batch}
            known = {path: remembered.get(os.path.abspath(path), state) for path, state in states.items()}
            new = [path for path in batch if known[path] is None]
            for path, digest in zip(new, pool.map(_digest, new), strict=True):
                known[path] = (digest,) if digest else None
                if digest:
                    remember(remembered, path, states[path], digest)
            remembered.keep()
            found |= {path: (states[path][0], str(told[0])) for path, told in known.items() if told is not None}
    return found


def open_digests(cache: Path) -> Remembered:
    """The table of digests in the cache."""
    return Remembered(cache, "digests", ("digest",))


def remember(remembered: Remembered, path: str, before: State, digest: str) -> None:
    """Keep a digest that was taken of a file whose state was `before`, if the file is in it still, and at rest."""
    if state_of(path) == before and time.time() - max(before[1], before[2]) / 1e9 > AT_REST:
        remembered.put(os.path.abspath(path), before, digest)


def _digest(path: str) -> str | None:
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileError, OSError):
        return None
