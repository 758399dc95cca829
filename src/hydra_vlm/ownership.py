"""A folder that is written to has one owner: a second command on it is told who is at work there, and ends.

While a command works in a folder, `owner.json` in it says which process that is, since when, and carries its heartbeat.
An owner that was killed on the same host is replaced at once; one of another host or container after `GRACE` without a
heartbeat. A process that still exists on this host is alive, however long it is silent.
"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from hydra_vlm.errors import FolderInUseError, RunFolderError
from hydra_vlm.liveness import GUARD, Watch, claimed, guarded, holder, host, is_gone

OWNER = "owner.json"
GRACE = 60.0
"""Seconds after which a silent owner on another host is taken for dead."""

_PAUSE = 0.2
_held: set[tuple[int, str]] = set()
"""Files by which this process owns a folder (with its id, as a fork owns nothing): a command may ask for one twice."""


@contextmanager
def owned(
    folder: Path,
    file: Path | None = None,
    say: Callable[[str], None] | None = None,
    otherwise: str = "name another folder",
    watch: Watch | None = None,
) -> Iterator[None]:
    """Own `folder` while the block lasts; a new one in which nothing was written goes again.

    `file` says who the owner is, where that cannot lie in the folder itself. `say` is told of a wait. `otherwise`
    is what somebody who is refused may do beside waiting.

    Raises:
        FolderInUseError: a living process owns the folder.
        RunFolderError: the folder cannot be written to.
    """
    file = file or folder / OWNER
    mark = os.getpid(), os.path.abspath(file)
    if mark in _held:
        yield
        return
    with ExitStack() as stack:
        stack.callback(_clear, file, not file.parent.exists())
        _wait_until_claimed(stack, folder, file, watch or Watch(GRACE), say, otherwise)
        _held.add(mark)
        stack.callback(_held.discard, mark)
        yield


def _wait_until_claimed(
    stack: ExitStack, folder: Path, file: Path, watch: Watch, say: Callable[[str], None] | None, otherwise: str
) -> None:
    """Claim at once, or refuse at once, unless only time tells whether an owner on another host still lives."""
    seen = None
    while True:
        found = holder(file)
        if found is not None and _lives(found, seen):
            raise FolderInUseError(f"{folder} is in use by {_words(found)}: wait for its end, or {otherwise}")
        try:
            mine = stack.enter_context(claimed(file, watch, _told(), partial(_taken_away, folder)))
        except OSError as problem:
            reason = problem.strerror or problem
            raise RunFolderError(f"{folder} cannot be written to ({reason}): name another folder") from None
        if mine:
            return
        if seen is None and found is not None and say is not None:
            say(f"{folder} was in use by {_words(found)}: waiting up to {watch.grace:.0f} s for a sign of life")
        seen = found
        time.sleep(_PAUSE)


def contents(folder: Path) -> list[Path]:
    """What is in a folder beside the marks of its owner and drafts of files; empty where there is no folder."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.name not in (OWNER, GUARD) and not _is_draft(path.name)]


def _is_draft(name: str) -> bool:
    return name.startswith(".") and name.endswith((".tmp", ".draft"))


def _told() -> dict[str, str]:
    program = Path(sys.argv[0])
    name = "hydra-vlm" if program.stem in ("cli", "__main__") else program.name
    return {
        "command": shlex.join([name, *sys.argv[1:2]]),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _lives(found: dict[str, Any], before: dict[str, Any] | None) -> bool:
    """Whether an owner is known to live: its process is there, or it shows another heartbeat than `before`."""
    name = str(found.get("id"))
    is_here = name.startswith(f"{host()}:") and not name.endswith(":?")
    return not is_gone(name) if is_here else before is not None and before != found


def _words(found: dict[str, Any]) -> str:
    where, _, rest = str(found.get("id")).partition(":")
    place = "this host" if where == host() else f"host {where.partition('/')[0]}"
    since = found.get("since", "an unknown time")
    return f"{found.get('command', 'another command')!r} (process {rest.partition(':')[0]} on {place}, since {since})"


def _taken_away(folder: Path) -> None:
    """End this process, which was thought dead: two owners would write into each other's files."""
    os.write(2, f"\n{folder} was taken over while this process was silent: ending\n".encode())
    os.kill(os.getpid(), signal.SIGTERM)


def _clear(file: Path, is_new: bool) -> None:
    """Leave no trace where nobody owns the folder."""
    with suppress(OSError):
        with guarded(file) as guard:
            if file.exists():
                return
            guard.unlink(missing_ok=True)
        if is_new:
            file.parent.rmdir()
