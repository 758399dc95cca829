"""The page's elements, all text escaped, its CSS, and its only script beside Plotly's."""

from collections.abc import Collection, Sequence
from html import escape

import plotly.graph_objects as go

STYLE = """
:root { --ink: #1f2933; --muted: #52606d; --line: #dfe3e8; --soft: #f5f7fa; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 2.5rem 1.25rem 4rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 0 0 1rem; font-weight: 650; }
h2 { font-size: 1.3rem; margin: 3rem 0 1rem; padding-bottom: .35rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
p, li { max-width: 48rem; }
.kicker { margin: 0 0 .25rem; color: var(--muted); font-size: .85rem; letter-spacing: .04em; }
.headline { padding: 1rem 1.25rem; background: var(--soft); border-left: 4px solid var(--accent); }
.headline p { margin: .3rem 0 0; max-width: none; }
.headline p:first-child { margin: 0; font-size: 1.12rem; font-weight: 600; }
.note, figcaption { color: var(--muted); font-size: .88rem; line-height: 1.45; }
.missing { padding: .7rem 1rem; border: 1px dashed #9aa5b1; color: var(--muted); max-width: none; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .3rem 1.5rem; margin: 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem 1.2rem .4rem 0; text-align: left; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--muted); font-weight: 600; border-bottom-color: #9aa5b1; }
.number { text-align: right; }
.verdict { min-width: 11rem; max-width: 17rem; white-space: normal; }
.better { color: #005a8c; font-weight: 600; }
.worse, .over { color: #a34700; font-weight: 600; }
td { vertical-align: top; }
.grid { display: grid; gap: 1rem 2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
.maps { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.maps figure { max-width: 34rem; }
.film { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: 0 1.25rem; }
.film h3 { font-size: .9rem; }
.chosen { font-weight: 650; }
figure { margin: 1rem 0; min-width: 0; }
figure h3 { margin: 0 0 .25rem; }
figcaption { max-width: 48rem; margin-top: .35rem; }
.canvas { width: 100%; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--accent); }
pre { background: var(--soft); padding: 1rem; overflow-x: auto; font-size: .85rem; line-height: 1.45; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .6rem; } }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
"""

WATCH = """
const failures = [];
const fail = message => {
  failures.push(String(message));
  document.documentElement.dataset.errors = failures.join("; ");
};
addEventListener("error", event => fail(event.message));
addEventListener("unhandledrejection", event => fail(event.reason));
"""
"""Runs first: whatever goes wrong in the page is left on its root element, where a test finds it."""

SCRIPT = """
const options = { responsive: true, displayModeBar: false };
Promise.all([...document.querySelectorAll(".plot")].map(plot => {
  const { data, layout } = JSON.parse(plot.querySelector("script").textContent);
  return Plotly.newPlot(plot.querySelector(".canvas"), data, layout, options);
})).then(drawn => { document.documentElement.dataset.figures = drawn.length; });
"""
"""Draws every figure from the JSON beside it, then says on the root element how many there are."""


def missing(text: str) -> str:
    """A line that says what is not there."""
    return f'<p class="missing">{escape(text)}</p>'


def grid(blocks: Sequence[str], kind: str = "") -> str:
    """Blocks side by side where the window is wide enough."""
    return f'<div class="grid {kind}">{"".join(blocks)}</div>' if blocks else ""


def film(frames: Sequence[str]) -> str:
    """Blocks in order of time, as close as four in a line."""
    return grid(frames, "film")


def fold(summary: str, content: str, unfolded: bool = False) -> str:
    """A line that unfolds to HTML `content`."""
    return f"<details{' open' if unfolded else ''}><summary>{escape(summary)}</summary>{content}</details>"


def plot(figure: go.Figure, caption: str, title: str) -> str:
    """A figure with its title and caption; `SCRIPT` draws it."""
    # "<" must not end the script element early, whatever a label holds
    data = figure.to_json().replace("<", "\\u003c")
    return (
        f'<figure class="plot" aria-label="{escape(title)}"><h3>{escape(title)}</h3>'
        f'<div class="canvas" style="min-height:{figure.layout.height}px"></div>'
        f'<script type="application/json">{data}</script>'
        + (f"<figcaption>{escape(caption)}</figcaption>" if caption else "")
        + "</figure>"
    )


def table(cells: Sequence[Sequence[str]], numeric: Collection[int], marked: Collection[int] = ()) -> str:
    """A table from a header and rows of text; `numeric` columns are set to the right, `marked` rows (from 0) in bold.

    A second line of a cell is its verdict, which colours the cell.
    """

    def line(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{kind(i, text)}>{content(text)}</{tag}>" for i, text in enumerate(row))

    def content(text: str) -> str:
        value, _, verdict = text.partition("\n")
        return escape(value) + (f'<div class="verdict">{escape(verdict)}</div>' if verdict else "")

    def kind(column: int, text: str) -> str:
        words = ["number"] if column in numeric else []
        words += [word for word in ("better", "worse") if f"\n{word}," in text]
        words += ["over"] if text.endswith("OVER") else []
        return f' class="{" ".join(words)}"' if words else ""

    rows = enumerate(cells[1:])
    body = "".join(f"<tr{' class=chosen' if i in marked else ''}>{line(row, 'td')}</tr>" for i, row in rows)
    head = f"<thead><tr>{line(cells[0], 'th')}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'
