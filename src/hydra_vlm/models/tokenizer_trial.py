"""A tokenizer reads a text once and for all, and makes about as much of it as is there, in both directions.

Its file is a program of whoever made the model: rules that make texts grow, expressions that take for ever, merges
that are drawn by chance. It is tried on drawn texts in a copy of the process before the first record.
"""

from itertools import product
from pathlib import Path
from typing import Any

from hydra_vlm.errors import ConfigError
from hydra_vlm.trial_copy import tried_in_a_copy

SECONDS = 10
"""Of a processor, for all texts of the trial; tokenizers take milliseconds."""

MEMORY = 2**30
"""Bytes beyond what the process has."""

FEW, TIMES = 2**12, 64
"""A text may become so many tokens, and so many times its bytes on top; tokens so many characters, likewise."""

DECODED = 512
"""Tokens that are written out as text, from the whole vocabulary; an answer is about as long."""

TEXTS = (
    "what is it?", "A long text, which goes on. " * 40, "a" * 1000, " " * 1000, "0" * 1000, "\n" * 100, "Aa1 .," * 100,
    "é漢字🙂" * 100,
)  # fmt: skip

_tried: set[tuple[str, int, int]] = set()  # tokenizers' files as they were then


def require_working(tokenizer: Any, folder: Path) -> None:
    """Try a tokenizer that was loaded from a folder, once in a process.

    Raises:
        ConfigError: it does not end, takes too much memory, writes too much, or reads a text differently each time.
    """
    path = folder / "tokenizer.json"
    seen = path.stat() if path.exists() else None
    key = (str(path.resolve()), seen.st_size, seen.st_mtime_ns) if seen else None
    if key in _tried:
        return
    fault = tried_in_a_copy(lambda: _fault(tokenizer), SECONDS, MEMORY)
    if fault:
        raise ConfigError(
            f"the tokenizer in {folder} {fault}: it was tried on texts of up to {max(map(len, TEXTS)):,} characters. "
            "Put the model's own files in its place"
        )
    if key:
        _tried.add(key)


def _fault(tokenizer: Any) -> str:
    try:
        return _reading_fault(tokenizer) or _writing_fault(tokenizer)
    except MemoryError:
        return "takes more memory than a text needs"
    except BaseException as problem:  # Rust's panics are no Exceptions
        return f"fails ({type(problem).__name__}: {' '.join(str(problem).split())[:200]})"


def _reading_fault(tokenizer: Any) -> str:
    for text, marks in product(TEXTS, (False, True)):
        ids, allowed = _read(tokenizer, text, marks), FEW + TIMES * len(text.encode())
        if len(ids) > allowed:
            return f"makes {len(ids):,} tokens of a text for which {allowed:,} are allowed"
        if any(_read(tokenizer, text, marks) != ids for _ in range(3)):
            return "reads the same text differently each time (dropout among its merges?)"
    return ""


def _read(tokenizer: Any, text: str, marks: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=marks)["input_ids"]
    return ids


def _writing_fault(tokenizer: Any) -> str:
    count = len(tokenizer)
    ids = [number * count // DECODED for number in range(DECODED)]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    written = sum(len(str(token)) for token in tokenizer.convert_ids_to_tokens(ids))
    allowed = FEW + TIMES * written
    return f"writes {len(text):,} characters for tokens of {written:,}" if len(text) > allowed else ""
