"""SIGTERM and SIGINT: the first ends the work in order, a second one ends the process at once. No torch.

`ending_in_order` is for a whole command: a signal raises `Interrupted` where the program happens to be, and what is on
the disk is what was finished. `held_back` is for a training run: a signal only makes a note, which is read between
optimizer steps.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)

ONE_REQUEST_SECONDS = 1.0
"""Signals so close together are one request: Ctrl-C reaches a worker from the terminal and from its parent."""


class Interrupted(BaseException):
    """Somebody asked the program to end; no error, so nothing that handles errors handles it.

    `code` is what a shell expects of a program that a signal ended: 130 after SIGINT, 143 after SIGTERM.
    """

    def __init__(self, number: int, kept: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}" + (f": {kept}" if kept else ""))
        self.number = number

    @property
    def code(self) -> int:
        return 128 + self.number


class Request:
    """Whether a signal came, and which."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0

    def note(self, number: int) -> bool:
        """Take a signal down; False when it is one too many and the process must end now."""
        now = time.monotonic()
        if self.number is not None:
            return now - self._since < ONE_REQUEST_SECONDS
        self.number, self._since = number, now
        return True


@contextmanager
def ending_in_order() -> Iterator[Request]:
    """While the block lasts, the first signal raises Interrupted in it."""
    request = Request()

    def act(number: int, frame: FrameType | None) -> None:
        again = request.number is not None
        if not request.note(number):
            os._exit(128 + number)
        if not again:
            raise Interrupted(number)

    with _handling(act):
        yield request


@contextmanager
def held_back() -> Iterator[Request]:
    """While the block lasts, the first signal is noted and nothing else; whoever is in the block looks for it."""
    request = Request()

    def act(number: int, frame: FrameType | None) -> None:
        if request.number is None:  # no print: the signal may have come in the middle of one
            os.write(2, f"\n{signal.Signals(number).name}: ends after this step; again to end at once\n".encode())
        if not request.note(number):
            os._exit(128 + number)

    with _handling(act):
        yield request


@contextmanager
def _handling(act: Any) -> Iterator[None]:
    """Both signals go to `act`; outside of the main thread, where Python takes none, nothing changes."""
    before: dict[signal.Signals, Any] = {}
    with suppress(ValueError):
        for number in SIGNALS:
            before[number] = signal.signal(number, act)
    try:
        yield
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)
