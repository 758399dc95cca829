"""Faults of the machine told as errors that teach: a full disk, no memory left. No torch.

Libraries report both in many ways (an errno, a RuntimeError of torch, a SafetensorError), so they are known by errno
and by their words.
"""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra_vlm.errors import DiskFullError, HydraError, OutOfMemoryError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_ROOM_WORDS = (
    "no space left on device",
    "disk quota exceeded",
    "file too large",
    "pytorchstreamwriter failed writing",  # torch.save keeps no errno
    "unexpected pos",  # torch.save, closing a file that it could not write
)
NO_MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED and its like
)

Told = Callable[[], str]
"""A sentence or more, made when it is needed."""


def is_disk_full(problem: BaseException) -> bool:
    """Whether this says that a file could not be written for want of room."""
    if isinstance(problem, OSError) and problem.errno is not None:
        return problem.errno in NO_ROOM
    return any(words in str(problem).lower() for words in NO_ROOM_WORDS)


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether this says that memory, of the machine or of a device, ran out."""
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        return True
    if isinstance(problem, OSError) and problem.errno is not None:
        return problem.errno == errno.ENOMEM
    return isinstance(problem, RuntimeError) and any(words in str(problem).lower() for words in NO_MEMORY_WORDS)


@contextmanager
def disk_full_told(place: Path, kept: Told = str, needed: int | None = None) -> Iterator[None]:
    """A full disk as our error, which says what is `kept` and how many bytes are `needed` at `place`.

    Raises:
        DiskFullError: the block could not write for want of room.
    """
    try:
        yield
    except HydraError:
        raise
    except Exception as problem:
        if not is_disk_full(problem):
            raise
        wanted = f"{as_size(needed)} needed, " if needed else ""
        raise DiskFullError(
            f"no room on the disk for {place} ({wanted}{as_size(free_bytes(place))} free; {first_line(problem)}). "
            f"{kept()} Make room and repeat the same command: it goes on from there.".replace("  ", " ")
        ) from None


@contextmanager
def out_of_memory_told(doing: str, remedy: Told, kept: Told = str) -> Iterator[None]:
    """Memory that ran out as our error, which says what to lower and what is `kept`.

    Raises:
        OutOfMemoryError: the block wanted more memory than there is.
    """
    try:
        yield
    except HydraError:
        raise
    except Exception as problem:
        if not is_out_of_memory(problem):
            raise
        message = f"out of memory while {doing} ({first_line(problem)}). {remedy()} {kept()}"
        raise OutOfMemoryError(message.strip()) from None


def free_bytes(place: Path) -> int:
    """Bytes that may still be written at `place`, or at its nearest parent that exists."""
    there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def as_size(size: int) -> str:
    """Bytes in the unit that suits them: 1.5 MB."""
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def first_line(problem: BaseException) -> str:
    """What a library said, in one short line."""
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return lines[0] if len(lines[0]) <= 160 else lines[0][:157] + "..."
