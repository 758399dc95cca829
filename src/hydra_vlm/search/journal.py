"""Optuna's journal file with a lock that a killed process cannot leave behind, and read although damaged.

A damaged journal is repaired once, when it is opened (`repair.py`): what is not readable moves to a file beside it.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from hydra_vlm.errors import RunFolderError
from hydra_vlm.files import write_text
from hydra_vlm.reading import file_fault
from hydra_vlm.search.repair import OPENING, Reading, read

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

AGAIN = "start the same command again, which keeps what is readable"


def open_journal(path: Path, name: str, say: Callable[[str], None]) -> JournalStorage:
    """The journal file as an Optuna storage, made where it is not there yet and repaired where it is damaged.

    Processes of one machine may share it; for several machines, a database server is the storage. `name` is the
    study's, should its own line be lost; `say` is told of a repair.

    Raises:
        RunFolderError: there is something else in its place, or the file may not be read and written.
    """
    fault = file_fault(path)
    if fault and not fault.endswith("not exist"):
        raise RunFolderError(f"{path} {fault}, and it is the study's journal: move it out of the way")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        lock = JournalFileOpenLock(str(path)) if fcntl is None else SystemLock(path)
        lock.acquire()
        try:
            _repair(path, name, say)
        finally:
            lock.release()
        return JournalStorage(Journal(str(path), lock_obj=lock))
    except OSError as problem:
        raise RunFolderError(f"{path} cannot be read and written ({problem.strerror}): check its permissions") from None


def _repair(path: Path, name: str, say: Callable[[str], None]) -> None:
    """Rewrite a damaged journal with its readable lines, after the others are safe; nothing otherwise."""
    reading = read(path.read_bytes(), name)
    if reading.is_whole:
        return
    damaged = aside(path)
    _set_aside(damaged, b"".join(line + b"\n" for _, line in reading.aside))
    write_text(path, b"".join(line + b"\n" for line in reading.kept).decode())
    say(_told(path, damaged, reading))


def _told(path: Path, damaged: Path, reading: Reading) -> str:
    places = sorted({number for number, _ in reading.aside if number})
    where = f" in line {', '.join(map(str, places[:5]))}" + (" and others" if len(places) > 5 else "") if places else ""
    return (
        f"{path} was damaged{where}: {reading.finished} finished trials are kept, what cannot be read is in "
        f"{damaged.name}, and what it told of is read back from the trials' own records"
    )


def aside(path: Path) -> Path:
    """Where the damaged parts of a journal are kept."""
    return path.with_name(f"{path.name}.damaged")


def _set_aside(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


class Journal(JournalFileBackend):
    """Optuna's file, for a process that has it open while it is damaged, or repaired by another: one clear error."""

    def __init__(self, file_path: str, lock_obj: JournalFileOpenLock) -> None:
        super().__init__(file_path, lock_obj)
        self._inode = Path(file_path).stat().st_ino

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Raises RunFolderError when the file is damaged, or is another than before."""
        try:
            if Path(self._file_path).stat().st_ino != self._inode:
                raise RunFolderError(f"{self._file_path} was replaced while it was in use: {AGAIN}")
            yield from super().read_logs(log_number_from)
        except (ValueError, RecursionError, OSError) as problem:
            raise RunFolderError(
                f"{self._file_path} was damaged while it was in use ({type(problem).__name__}): {AGAIN}"
            ) from None


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
    """Shorten a file to the end of its last whole line; nobody may be writing to it.

    What is no beginning of one line, as a killed writer leaves it, becomes a line, for a repair to look at.
    """
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
            file.seek(start)
            rest = file.read()
            if rest.startswith(OPENING[: len(rest)]) and rest.count(OPENING) < 2:
                file.truncate(start)
            else:
                file.write(b"\n")
