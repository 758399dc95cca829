"""Optuna's journal file with a lock that a killed process cannot leave behind, and without its half-written lines."""

import os
from pathlib import Path
from typing import BinaryIO

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]


def open_journal(path: Path) -> JournalStorage:
    """The journal file as an Optuna storage, made where it is not there yet.

    Processes of one machine may share it; for several machines, a database server is the storage.
    """
    lock = JournalFileOpenLock(str(path)) if fcntl is None else SystemLock(path)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


class SystemLock(JournalFileOpenLock):
    """A lock that the operating system lifts when its holder dies.

    Optuna's own locks are files that a killed holder leaves behind, so that everybody waits for half a minute. A
    writer may also be killed within a line longer than a memory page; the next line would be glued to what it wrote,
    and the journal unreadable. Whoever locks next cuts such a piece off.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path
        self._held: BinaryIO | None = None  # held by one thread: JournalStorage writes under a lock of its own

    def acquire(self) -> bool:
        file = self.path.with_name(f"{self.path.name}.flock").open("ab")
        fcntl.flock(file, fcntl.LOCK_EX)
        self._held = file
        cut_unfinished_line(self.path)
        return True

    def release(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None


def cut_unfinished_line(path: Path) -> None:
    """Shorten a file to the end of its last whole line; nobody may be writing to it."""
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        start = end
        while start > 0:
            begin = max(0, start - 4096)
            file.seek(begin)
            found = file.read(start - begin).rfind(b"\n")
            if found >= 0:
                start = begin + found + 1
                break
            start = begin
        if start < end:
            file.truncate(start)
