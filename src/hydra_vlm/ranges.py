"""What a setting's value may be: shared types, so that a key says its range once, where it is declared. No torch.

Numbers are finite and within reach of what computes with them; a true or a text is no number, except a text that a YAML
reader took for one without need, such as 1e-4.
"""

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

LARGEST_SEED = 2**32 - 1
"""What NumPy takes, and Python's and torch's generators with it."""

LARGEST_COUNT = 2**31 - 1
LARGEST_BATCH = 2**20
LARGEST_RATE = 100.0

_WHOLE = re.compile(r"[-+]?(0|[1-9]\d*)(\.0*)?([eE]\+?\d{1,3})?")
_REAL = re.compile(r"[-+]?(0|[1-9]\d*)?(\.\d*)?([eE][-+]?\d{1,3})?")
T = TypeVar("T")


def most_workers() -> int:
    """Processes that may run beside each other here: four for each core, and eight on the smallest machine."""
    return max(8, 4 * (os.cpu_count() or 1))


def _whole(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a valid integer, and true or false is none")
    if isinstance(value, str):
        if not _WHOLE.fullmatch(value):
            raise ValueError("should be a valid integer, in digits and without a leading zero")
        return int(value) if value.lstrip("+-").isdecimal() else float(value)
    return value


def _real(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a valid number, and true or false is none")
    if isinstance(value, str):
        if not _REAL.fullmatch(value) or not any(map(str.isdecimal, value)):
            raise ValueError("should be a valid number, such as 0.001 or 1e-3")
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("should be a finite number")
    return value


def _readable(value: T) -> T:
    text = str(value)
    if "\0" in text:
        raise ValueError("holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode") from None
    return value


def _affordable(value: int) -> int:
    if value > (most := most_workers()):
        raise ValueError(f"is more than this machine's {os.cpu_count() or 1} cores can serve: {most} at most")
    return value


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
    if twice is not None:
        raise ValueError(f"names {twice!r} twice: each stands for a run of its own")
    return values


def _ascending(span: tuple[int, int]) -> tuple[int, int]:
    if span[0] > span[1]:
        raise ValueError(f"should be a lowest and a highest value in this order: write [{span[1]}, {span[0]}]")
    return span


def _listed(value: Any) -> Any:
    """`a,b` as on a command line, and one value where a list is meant."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int | float) else value


Whole = Annotated[int, BeforeValidator(_whole)]
Finite = Annotated[float, BeforeValidator(_real)]
Listed = BeforeValidator(_listed)
Distinct = AfterValidator(_distinct)

Seed = Annotated[Whole, Field(ge=0, le=LARGEST_SEED)]
Count = Annotated[Whole, Field(ge=1, le=LARGEST_COUNT)]
Amount = Annotated[Whole, Field(ge=0, le=LARGEST_COUNT)]
Parameters = Annotated[Whole, Field(ge=1, le=10**15)]
Batch = Annotated[Whole, Field(ge=1, le=LARGEST_BATCH)]
Workers = Annotated[Whole, Field(ge=0), AfterValidator(_affordable)]
Pixels = Annotated[Whole, Field(ge=1, le=178_956_970)]  # at twice Pillow's own limit it refuses by itself
Span = Annotated[tuple[Count, Count], Listed, AfterValidator(_ascending)]
Seeds = Annotated[tuple[Seed, ...], Listed, Distinct]

Positive = Annotated[Finite, Field(gt=0, le=1e6)]
NotNegative = Annotated[Finite, Field(ge=0, le=1e6)]
Rate = Annotated[Finite, Field(gt=0, le=LARGEST_RATE)]
Share = Annotated[Finite, Field(ge=0, lt=1)]
Gigabytes = Annotated[Finite, Field(ge=0, le=1e6)]
Seconds = Annotated[Finite, Field(gt=0, le=1e7)]

Text = Annotated[str, AfterValidator(_readable)]
Place = Annotated[Path, AfterValidator(_readable)]
