"""Every image of a data set, decoded once and remembered. No torch.

What was found is kept in the cache (`remembered.py`), so that neither a second start nor one after a kill decodes an
image again.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path

from hydra_vlm.data.image_files import examine, place_fault, size_fault
from hydra_vlm.data.remembered import Remembered, state_of
from hydra_vlm.names import resolved

BATCH = 256
"""Images between two writes to the cache."""

THREADS = 4
"""At most so many images are decoded at a time; Pillow's decoders let go of Python's lock."""


def image_faults(
    images: Iterable[tuple[int, str]], folder: Path, max_pixels: int, cache: Path
) -> Iterator[list[tuple[int, str]]]:
    """For each batch of (key, path): the same keys with what is wrong with the image, "" for nothing."""
    root = resolved(folder)
    workers = min(THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with closing(_remembered(cache)) as remembered, ThreadPoolExecutor(workers) as pool:
        waiting = iter(images)
        while batch := list(islice(waiting, BATCH)):
            paths = [path for _, path in batch]
            faults = _faults(paths, root, max_pixels, remembered, pool)
            yield [(key, fault) for (key, _), fault in zip(batch, faults, strict=True)]


def _faults(
    paths: Sequence[str], root: str, max_pixels: int, remembered: Remembered, pool: ThreadPoolExecutor
) -> list[str]:
    found = {path: place_fault(path, root) for path in paths}
    states = {path: state_of(path) for path, fault in found.items() if not fault}
    new = []
    for path, state in states.items():
        known = remembered.get(os.path.abspath(path), state)
        if known is None:
            new.append(path)
        else:
            width, height, fault = known
            found[path] = fault or size_fault(path, (width, height), max_pixels)
    for path, (size, fault) in zip(new, pool.map(lambda path: examine(path, max_pixels), new), strict=True):
        found[path] = fault
        if size is not None and not size_fault(path, size, max_pixels):  # then it was decoded
            remembered.put(os.path.abspath(path), states[path], *size, fault)
    remembered.keep()
    return [found[path] for path in paths]


def _remembered(cache: Path) -> Remembered:
    return Remembered(cache, "pictures", ("width", "height", "fault"))
