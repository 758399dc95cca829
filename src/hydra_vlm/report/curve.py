"""Loss against budget, all from one training: a table, a figure, a page of its own. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hydra_vlm.files import write_text
from hydra_vlm.graph import none_for_nan
from hydra_vlm.report import figures
from hydra_vlm.report.comparison import aligned
from hydra_vlm.report.markup import plot, table
from hydra_vlm.report.page import document

NEAR = 0.01
"""How far above the whole adapter's loss, as a share of it, a cut adapter is as good."""


@dataclass(frozen=True)
class Cut:
    """An adapter of so many parameters, and its validation loss."""

    parameters: int
    loss: float


@dataclass(frozen=True)
class Curve:
    """A wider adapter cut to one budget after the other, without further training.

    `cuts` has the adapters that each decider makes, one for each of `budgets` (in parameters, ascending). `cost` are
    the parameters of one rank everywhere, `records` those on which losses were measured.
    """

    source: str
    cost: int
    records: int
    whole: Cut
    budgets: tuple[int, ...]
    cuts: Mapping[str, tuple[Cut, ...]]

    def enough(self) -> tuple[int, str] | None:
        """The least budget, and whose cut it is, whose loss is no more than `NEAR` above the whole adapter's.

        None where losses are no numbers.
        """
        most = self.whole.loss * (1 + NEAR)
        for number, budget in enumerate(self.budgets):
            name = min(self.cuts, key=lambda name: self.cuts[name][number].loss)
            if self.cuts[name][number].loss <= most:
                return budget, name
        return None

    def finding(self) -> str:
        """The curve in a sentence."""
        found = self.enough()
        loss = f"a validation loss of {self.whole.loss:.4f}"
        told = f"The whole adapter has {self.whole.parameters:,} parameters and {loss}; "
        if found is None or found[0] >= self.whole.parameters:
            return f"{told}no lower budget of these stays within {NEAR * 100:g} % of it."
        budget, name = found
        rank = f"rank {budget / self.cost:.4g}"
        return f"{told}{budget:,} parameters ({rank}) stay within {NEAR * 100:g} % of it, with {name} ranks."

    def cells(self) -> list[list[str]]:
        """A header, a line for each budget."""
        head = ["budget", "rank", *(f"{what}, {name}" for name in self.cuts for what in ("parameters", "loss"))]
        rows = []
        for number, budget in enumerate(self.budgets):
            cuts = [found[number] for found in self.cuts.values()]
            told = [text for cut in cuts for text in (f"{cut.parameters:,}", f"{cut.loss:.4f}")]
            rows.append([f"{budget:,}", f"{budget / self.cost:.4g}", *told])
        return [head, *rows]

    def table(self) -> str:
        """The curve as text."""
        return f"{aligned(self.cells())}\n\n{self.finding()}"

    def to_json(self) -> dict[str, Any]:
        """`curve` is a list of budgets; `rank` is that of uniform LoRA of as many parameters, also between two."""
        found = self.enough()
        return {
            "source": self.source,
            "records": self.records,
            **_told(self.whole),
            "enough": None if found is None else {"budget": found[0], "decide": found[1], "within": NEAR},
            "curve": [
                {
                    "budget": budget,
                    "rank": budget / self.cost,
                    **{name: _told(cuts[number]) for name, cuts in self.cuts.items()},
                }
                for number, budget in enumerate(self.budgets)
            ],
        }


def write_curve(curve: Curve, folder: Path) -> Path:
    """Write `folder`/curve.html, which needs no network and no other file, and return its path."""
    path = folder / "curve.html"
    lines = {name: [(cut.parameters, cut.loss) for cut in cuts] for name, cuts in curve.cuts.items()}
    figure = plot(figures.budget_curve(lines, curve.whole.loss, curve.cost), _CAPTION, "Loss against budget")
    cells = curve.cells()
    numeric = range(len(cells[0]))
    sections = {
        "What a budget costs": figure,
        "In numbers": table(cells, numeric) + f'<p class="note">{_note(curve)}</p>',
    }
    write_text(path, document(f"Which rank is needed? {curve.source}", [curve.finding()], sections))
    return path


_CAPTION = (
    "One trained adapter, cut to lower ranks without further training; the dashed line is the whole adapter. Uniform "
    "has the same rank everywhere; spectral gives each rank to the direction that carries most for its parameters."
)


def _note(curve: Curve) -> str:
    return f"Validation loss over {curve.records:,} records; rank: that of uniform LoRA of as many parameters."


def _told(cut: Cut) -> dict[str, Any]:
    return {"parameters": cut.parameters, "validation_loss": none_for_nan(cut.loss)}


def levels(least: int, most: int, count: int) -> list[int]:
    """`count` budgets from `least` (rank 1) to `most`, ascending: whole ranks, closer together where they are low.

    Where there are fewer ranks than that, budgets between two fill the widest gaps.

    Raises ValueError where there are not so many numbers.
    """
    if most - least < count:
        raise ValueError(f"there are no {count} budgets from {least} to {most}")
    ranks = range(1, -(-most // least))  # those below `most`
    if len(ranks) >= count:
        chosen = [1]
        for step in range(1, count - 1):
            chosen.append(max(chosen[-1] + 1, round((most / least) ** (step / (count - 1)))))
        return [*(rank * least for rank in chosen), most]
    found = [*(rank * least for rank in ranks), most]
    while len(found) < count:
        gaps = [high / low if high - low > 1 else 0.0 for low, high in pairwise(found)]
        widest = gaps.index(max(gaps))
        found.insert(widest + 1, (found[widest] + found[widest + 1]) // 2)
    return found
