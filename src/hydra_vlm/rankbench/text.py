"""Tables for a Markdown log, and the intervals in them."""

from collections.abc import Sequence
from statistics import fmean, stdev

from scipy.special import stdtrit

from hydra_vlm.performance_model.cross_validation import LEVEL, Estimate


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def t_interval(values: Sequence[float]) -> Estimate:
    """Mean of independent values and half the width of its 95 % t interval."""
    n = len(values)
    if n < 2:
        return Estimate(fmean(values), None)
    return Estimate(fmean(values), float(stdtrit(n - 1, (1 + LEVEL) / 2)) * stdev(values) / n**0.5)


def show(found: Estimate, decimals: int = 2, signed: bool = False) -> str:
    """Text such as "1.24 ± 0.11"."""
    half = "" if found.half_width is None else f" ± {found.half_width:.{decimals}f}"
    return number(found.mean, decimals, signed) + half


def number(value: float, decimals: int = 2, signed: bool = False) -> str:
    """A number with a real minus sign."""
    return f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", "−")
