"""Worlds: six small benchmarks in the six official formats, and the instruction-tuning mix that goes with them.

There are two: `worlds`, which asks what there is to see, and `nicknames`, which asks in the same forms for facts
that only training tells. All pictures are generated scenes; everything follows from a seed, nothing needs torch. No
picture of the evaluation occurs in the mix.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hydra_vlm.data.records import write_records
from hydra_vlm.data.worlds import gqa, mix, mmbench, mme, nicknames, pope, sqa, textvqa
from hydra_vlm.data.worlds.pictures import Gallery, Sheet

Drawn = list[tuple[Sheet, bytes]]
Sheets = Mapping[str, Callable[[random.Random, int, Gallery], Drawn]]
"""Benchmark -> how so many pictures of it are drawn."""

SHEETS: Sheets = {
    "mme": mme.sheets,
    "pope": pope.sheets,
    "textvqa": textvqa.sheets,
    "gqa": gqa.sheets,
    "mmbench": mmbench.sheets,
    "sqa": sqa.sheets,
}


@dataclass(frozen=True)
class Sizes:
    """Pictures by benchmark, in all; for MME of each category."""

    benchmarks: Mapping[str, int] = field(
        default_factory=lambda: {"mme": 12, "pope": 22, "textvqa": 300, "gqa": 70, "mmbench": 130, "sqa": 300}
    )
    train: Mapping[str, int] = field(
        default_factory=lambda: {"mme": 32, "pope": 36, "textvqa": 1300, "gqa": 200, "mmbench": 2400, "sqa": 1900}
    )
    validation: Mapping[str, int] = field(
        default_factory=lambda: {"mme": 3, "pope": 3, "textvqa": 80, "gqa": 12, "mmbench": 80, "sqa": 80}
    )


NICKNAMES = Sizes(
    benchmarks={"mme": 7, "pope": 12, "textvqa": 200, "gqa": 40, "mmbench": 60, "sqa": 200},
    train={"mme": 12, "pope": 16, "textvqa": 1300, "gqa": 200, "mmbench": 350, "sqa": 300},
    validation={"mme": 2, "pope": 2, "textvqa": 100, "gqa": 12, "mmbench": 30, "sqa": 30},
)
"""As many records as about 100 steps of 32 read, and few enough questions for a search."""


def write_nicknames(folder: Path, seed: int = 0) -> None:
    """As `write_worlds`, but the six ask for nicknames."""
    write_worlds(folder, seed, NICKNAMES, sheets=nicknames.SHEETS)


def write_worlds(
    folder: Path, seed: int = 0, sizes: Sizes | None = None, ocr_tokens: bool = False, sheets: Sheets = SHEETS
) -> None:
    """Write benchmarks/{mme,pope,textvqa,gqa,mmbench,sqa}, train.json, validation.json and images/ under `folder`."""
    sizes, gallery = sizes or Sizes(), Gallery()
    evaluation = draw_all(f"{seed} evaluation", sizes.benchmarks, gallery, sheets)
    write_benchmarks(folder / "benchmarks", evaluation, seed, ocr_tokens)
    for split, pictures in (("train", sizes.train), ("validation", sizes.validation)):
        drawn = draw_all(f"{seed} {split}", pictures, gallery, sheets)
        records = mix.records(folder / "images", split, drawn, random.Random(f"{seed} {split} order"))
        write_records(folder / f"{split}.json", records)


def draw_all(seed: str, pictures: Mapping[str, int], gallery: Gallery, sheets: Sheets = SHEETS) -> dict[str, Drawn]:
    """The sheets of all six, none with a picture that hangs in the gallery already."""
    return {name: sheets[name](random.Random(f"{seed} {name}"), n, gallery) for name, n in pictures.items()}


def write_benchmarks(folder: Path, drawn: Mapping[str, Drawn], seed: int, ocr_tokens: bool = False) -> None:
    """The six folders."""
    mme.write(folder / "mme", drawn["mme"])
    pope.write(folder / "pope", drawn["pope"])
    textvqa.write(folder / "textvqa", drawn["textvqa"], random.Random(f"{seed} answers"), ocr_tokens)
    gqa.write(folder / "gqa", drawn["gqa"])
    mmbench.write(folder / "mmbench", drawn["mmbench"])
    sqa.write(folder / "sqa", drawn["sqa"])
