"""Who is alive: heartbeats, processes that are gone, and rights that one process at a time has.

No clock is compared between machines. A heartbeat is a number that its owner changes now and then; an observer who has
seen the same number for longer than the grace, by its own clock, takes the owner for dead. A process of the same host
that no longer exists is dead at once.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # not a Unix: Python's O_EXCL alone guards a claim
    fcntl = None  # type: ignore[assignment]

BEATS_PER_GRACE = 6
"""A heartbeat comes so often within the grace; a few may be late on a busy machine."""

_NUMBERS = count(1)
"""One count for all heartbeats of this process, so that a claim held again never looks as it did before."""

GUARD = ".guard"
"""Beside a claim: the file that is locked while somebody looks at it."""

GONE = ("Z", "X")
"""States in /proc/<pid>/stat of a process that has ended but is still listed."""


# Names of processes


@cache
def host() -> str:
    """This machine since its last start, and this container: the same process id elsewhere is another process."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8])
        parts.append(os.readlink("/proc/self/ns/pid").strip("pid:[]"))
    return "/".join(parts)


def own_id() -> str:
    """host:pid:start of this process, unique among all processes that may share a study."""
    return f"{host()}:{os.getpid()}:{process_start(os.getpid())}"


def process_start(pid: int) -> str | None:
    """When a process of this host started, in clock ticks since the host did; None when there is no such process.

    "?" where the system does not tell (no /proc).
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # it exists, and is another user's
        pass
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "?"
    return None if state in GONE else fields[18]


def is_gone(name: str) -> bool:
    """Whether a process is known to have ended: of this host, and not there any more. Others are never known."""
    there, _, rest = name.partition(":")
    pid, _, start = rest.partition(":")
    return there == host() and pid.isdigit() and process_start(int(pid)) != start


# Watching others


class Watch:
    """What one observer has seen of others' heartbeats, and since when."""

    def __init__(self, grace: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.grace = grace
        self._clock = clock
        self._seen: dict[Hashable, tuple[Any, float]] = {}

    @property
    def interval(self) -> float:
        """Seconds between the heartbeats of one that is watched with this grace."""
        return min(10.0, self.grace / BEATS_PER_GRACE)

    def is_dead(self, what: Hashable, shown: Any) -> bool:
        """Whether the owner of `what` is gone, or the heartbeat that it shows has not changed for the grace.

        A heartbeat is {"id": ..., "beat": ...}, or anything else where the owner has not come to write one.
        """
        name = shown.get("id") if isinstance(shown, dict) else None
        if name is not None and is_gone(str(name)):
            return True
        seen = json.dumps(shown, sort_keys=True)
        now = self._clock()
        before, since = self._seen.get(what, (None, now))
        if before != seen:
            since = now
        self._seen[what] = seen, since
        return now - since > self.grace


def heartbeat() -> dict[str, Any]:
    """One of this process, unlike any before."""
    return {"id": own_id(), "beat": next(_NUMBERS)}


@contextmanager
def beating(interval: float, beat: Callable[[dict[str, Any]], bool]) -> Iterator[threading.Event]:
    """A heartbeat from a thread, at once and every `interval` seconds; the event is set when `beat` returns False.

    A `beat` that raises is tried again the next time: a database may be away for a moment.
    """
    lost, done = threading.Event(), threading.Event()

    def run() -> None:
        while not done.is_set():
            with suppress(Exception):
                if not beat(heartbeat()):
                    lost.set()
                    return
            done.wait(interval)

    thread = threading.Thread(target=run, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield lost
    finally:
        done.set()
        thread.join()


# Rights that one process at a time has


@contextmanager
def claimed(
    path: Path, watch: Watch, told: Mapping[str, Any] | None = None, lost: Callable[[], None] | None = None
) -> Iterator[bool]:
    """Whether the right that this file stands for could be had at once; while it is held, the file says by whom.

    `told` is written into the file, too. `lost` is called from a thread when somebody else has taken the right, since
    this process showed no heartbeat for the grace.
    """
    if not _take(path, watch, told or {}):
        yield False
        return

    def beat(new: dict[str, Any]) -> bool:
        mine = _renew(path, {**(told or {}), **new})
        if not mine and lost is not None:
            lost()
        return mine

    try:
        with beating(watch.interval, beat):
            yield True
    finally:  # after the last heartbeat, which would not find its claim
        _give_back(path)


@contextmanager
def waiting_for(path: Path, watch: Watch, pause: float = 0.05) -> Iterator[None]:
    """The right that this file stands for, waited for as long as a living process has it."""
    while True:
        with claimed(path, watch) as mine:
            if mine:
                yield
                return
        time.sleep(pause)


def holder(path: Path) -> dict[str, Any] | None:
    """What the file of a right says of who has it; None where nobody has, or nobody has come to say so."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # not there, or its taker was killed before it wrote its name
        return None
    return found if isinstance(found, dict) else None


def _take(path: Path, watch: Watch, told: Mapping[str, Any]) -> bool:
    with guarded(path):
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            if not watch.is_dead(path, holder(path)):
                return False
            _write(path, {**told, **heartbeat()})
            return True
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(_text({**told, **heartbeat()}))
        return True


def _renew(path: Path, new: dict[str, Any]) -> bool:
    with guarded(path):
        mine = (holder(path) or {}).get("id") == new["id"]
        if mine:
            _write(path, new)
        return mine


def _give_back(path: Path) -> None:
    with guarded(path):
        if (holder(path) or {}).get("id") == own_id():
            path.unlink(missing_ok=True)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """Under another name first, so that no reader sees half of it."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(_text(value), encoding="utf-8")
    os.replace(draft, path)


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value) + "\n"


@contextmanager
def guarded(path: Path) -> Iterator[Path]:
    """No two processes look at and change a claim at once; the system lifts the lock of a process that dies.

    Yields the file that is locked; whoever holds the lock may remove it.
    """
    guard = path.with_name(GUARD)
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = guard.open("a")
        except FileNotFoundError:  # somebody removed the folder meanwhile
            continue
        with file:
            _lock(file)
            if _is_still(file, guard):
                yield guard
                return


def _lock(file: IO[str]) -> None:
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks: O_EXCL alone guards the claim
            fcntl.flock(file, fcntl.LOCK_EX)


def _is_still(file: IO[str], guard: Path) -> bool:
    """Whether this is the file that others will lock, and not one that was removed while it was waited for."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), guard.stat())
    except FileNotFoundError:
        return False
