"""What a command says: results on standard output, everything else on standard error. No torch.

While `told_plainly` lasts, no encoding can lose a result, a line begins on a line of its own beside a progress bar, and
standard error that nobody takes (a closed terminal, a full disk behind a log) stops no work.
"""

import codecs
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_PLAIN = "hydra_vlm.plain"
"""The name, to Python's codecs, of writing what an encoding lacks in plainer characters."""

_FORMS = str.maketrans(
    {
        **dict.fromkeys("−–—─━", "-"),
        **dict.fromkeys("│┃║", "|"),
        **dict.fromkeys("┌┐└┘├┤┬┴┼", "+"),
        **dict.fromkeys("█▇▆▅▄▃▂▁", "#"),
        **{"±": "+/-", "×": "x", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "≈": "~", "…": "...", "·": ".", "²": "^2"},
        **{"α": "alpha", "β": "beta", "Δ": "Delta", "Φ": "Phi", "φ": "phi", "σ": "sigma", "√": "sqrt", "‘": "'"},
        **{"’": "'", "“": '"', "”": '"', "\u00a0": " ", "\u202f": " "},
    }
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
LONGEST = 4000
"""Characters of a message; what is longer repeats somebody's file."""


@contextmanager
def told_plainly() -> Iterator[None]:
    """Standard streams as this file promises them; afterwards they are what they were."""
    _occupy()
    codecs.register_error(_PLAIN, _plainly)
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_PLAIN)
    sys.stdout, sys.stderr = _Watched(sys.stdout, False), _Watched(sys.stderr, True)  # type: ignore[assignment]
    shown = warnings.showwarning
    warnings.showwarning = _one_line
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        warnings.showwarning = shown


def show(text: object) -> None:
    """A result, on standard output at once: whether it can be written is known while something can be said."""
    print(text, flush=True)


def say(line: str) -> None:
    """A line on standard error, above a bar that may be there."""
    line = printable(line)
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
    else:
        print(line, file=sys.stderr, flush=True)


def say_last(line: str) -> None:
    """A line on standard error after which nothing comes: bars end, and it begins on a line of its own."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(tqdm._instances):
            with suppress(Exception):  # a bar that was not yet drawn, or whose stream is gone
                bar.close()
    if getattr(sys.stderr, "within_line", False):
        sys.stderr.write("\n")
    print(printable(line), file=sys.stderr, flush=True)


def printable(message: str) -> str:
    """A message without what would command a terminal, and not endlessly long."""
    message = _CONTROL.sub(lambda found: repr(found[0])[1:-1], message)
    return message if len(message) <= LONGEST else f"{message[:LONGEST]}…"


def output_lost() -> OSError | None:
    """Why standard output took no more: its reader went, its disk is full, it was closed."""
    with suppress(OSError):
        sys.stdout.flush()
    return getattr(sys.stdout, "failed", None)


def _silence(descriptor: int) -> None:
    """Let what is still written there go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


class _Watched:
    """A text stream that knows whether a line was begun and whether it failed; a `patient` one fails silently."""

    def __init__(self, stream: TextIO, patient: bool) -> None:
        self._stream, self._patient = stream, patient
        self.within_line = False
        self.failed: OSError | None = None

    def write(self, text: str) -> int:
        if text.strip(" "):
            self.within_line = not text.rstrip(" ").endswith(("\n", "\r"))
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], Any]) -> None:
        if self.failed and not self._patient:
            raise self.failed
        try:
            act()
        except OSError as problem:
            self.failed = problem
            with suppress(OSError, ValueError):
                _silence(self._stream.fileno())  # what is left in the buffer would fail again when Python ends
            if not self._patient:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _occupy() -> None:
    """Give closed standard descriptors a place, so that no file of ours gets their number.

    What is written to a standard output that was closed is an error, as it was; standard error may go nowhere.
    """
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, mode)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)


def _plainly(problem: UnicodeError) -> tuple[str | bytes, int]:
    """For codecs: what cannot be encoded in plainer characters, bytes of a file's name as they are, or as '?'."""
    if not isinstance(problem, UnicodeEncodeError):
        raise problem
    lacking = problem.object[problem.start : problem.end]
    if all("\udc80" <= character <= "\udcff" for character in lacking):
        return bytes(ord(character) - 0xDC00 for character in lacking), problem.end
    plain = lacking.translate(_FORMS)
    return plain.encode("ascii", "replace").decode(), problem.end


def _one_line(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    """A library's warning in one line, without the source line that Python adds."""
    told = " ".join(str(message).split())
    say(f"warning: {told if len(told) <= 300 else told[:299] + '…'}")
