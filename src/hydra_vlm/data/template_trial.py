"""Chat templates end, and write about as much as they are given. No torch.

A template is a program of whoever made the model. Before its first use it is tried on drawn conversations in a process
of its own that may take `SECONDS` of a processor and `MEMORY` bytes, so loops without end and texts of terabytes end
there. What it writes later is held to the same bound, linear in the conversation, and a rendering that takes a minute
is ended.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hydra_vlm.errors import ConfigError, DataError
from hydra_vlm.trial_copy import tried_in_a_copy

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, bool], str]

SECONDS = 10
"""Of a processor, for all conversations of the trial; templates take milliseconds, some a second."""

MEMORY = 2**30
"""Bytes beyond what the process has."""

FEW, TIMES = 2**16, 16
"""A rendering may have so many characters, and so many times those of its messages on top."""

LONGEST_RENDERING = 60
"""Seconds of one rendering by the clock."""

TURNS = (1, 2, 8)
TEXTS = ("what is it?", "a long text, which goes on. " * 40)  # some templates walk a text character by character

_tried: set[str] = set()


def require_ending(template: str, render: Render) -> None:
    """Try a template on drawn conversations, once in a process.

    Raises:
        ConfigError: it does not end, takes too much memory, or writes too much.
    """
    if template in _tried:
        return
    fault = _fault_in_a_fork(render)
    if fault:
        raise ConfigError(
            f"the model's chat template {fault}: it was tried on conversations of up to {max(TURNS)} turns. Put the "
            "model's own template in its place, or choose data.template from v1, v1-short, plain"
        )
    _tried.add(template)


def bounded(render: Render) -> Render:
    """The same rendering, held to its bounds; raises DataError where it passes them."""

    def within_bounds(messages: Messages, ask: bool) -> str:
        with _ending_within(LONGEST_RENDERING):
            text = render(messages, ask)
        if fault := _length_fault(messages, text):
            raise DataError(f"the model's chat template {fault}")
        return text

    return within_bounds


def _conversations() -> Iterator[list[dict[str, Any]]]:
    """Of every number of turns and length of text, with content as a string, and as typed parts with an image."""
    for turns in TURNS:
        for text in TEXTS:
            roles = ["user", "assistant"] * turns
            yield [{"role": role, "content": text} for role in roles]
            part = {"type": "text", "text": text}
            yield [{"role": role, "content": [{"type": "image"}, part] if i == 0 else [part]}
                   for i, role in enumerate(roles)]  # fmt: skip


def _length_fault(messages: Messages, text: str) -> str:
    allowed = FEW + TIMES * sum(_characters(message.get("content")) for message in messages)
    return f"writes {len(text):,} characters where {allowed:,} are allowed" if len(text) > allowed else ""


def _characters(content: Any) -> int:
    if isinstance(content, str):
        return len(content)
    return sum(len(part.get("text", "")) for part in content or ())


def _fault_in_a_fork(render: Render) -> str:
    return tried_in_a_copy(lambda: _fault(render), SECONDS, MEMORY)


def _fault(render: Render) -> str:
    for messages in _conversations():
        for ask in (True, False):
            try:
                text = render(messages, ask)
            except MemoryError:
                return "takes more memory than a text needs"
            except Exception:  # a template may refuse a conversation, or content of that form
                continue
            if fault := _length_fault(messages, text):
                return fault
    return ""


@contextmanager
def _ending_within(seconds: int) -> Iterator[None]:
    """Raises DataError in the block once so many seconds have passed; in the main thread of a POSIX system alone."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum: int, frame: FrameType | None) -> None:
        raise DataError(f"the model's chat template does not end within {seconds} seconds")

    before = signal.signal(signal.SIGALRM, end)
    left, again = signal.setitimer(signal.ITIMER_REAL, seconds)
    started = time.monotonic()
    try:
        yield
    finally:
        rest = max(left - (time.monotonic() - started), 1e-3) if left else 0.0
        signal.setitimer(signal.ITIMER_REAL, rest, again)
        signal.signal(signal.SIGALRM, before)
