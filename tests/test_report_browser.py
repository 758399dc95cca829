"""The page in a real headless Chromium: every figure is drawn, nothing goes wrong, and there is something to see."""

import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from fake_run import fake_run
from hydra_vlm.graph import llama_graph
from hydra_vlm.records import TrialRecord
from hydra_vlm.report.page import write_report
from hydra_vlm.report.run import load_run
from hydra_vlm.schedule import RankSchedule

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH to open the page with"
)

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)

ODD = "odd <b>&amp; \"quoted\" 'name' %{x}"

PLOT = 'class="plot"'
CELL = r'class="heatmap-label"><text[^>]*>(\d+)<'


@dataclass(frozen=True)
class Opened:
    """A page after its scripts ran: the document as text, and its picture."""

    run: Path
    dom: str
    picture: Path

    @property
    def root(self) -> str:
        """The root element's tag, on which the page notes what it drew and what went wrong."""
        match = re.search(r"<html[^>]*>", self.dom)
        assert match is not None, self.dom[:500]
        return match[0]

    @property
    def body(self) -> str:
        return self.dom[self.dom.index("<body") :]


def open_page(run: Path, home: Path, *shot: str) -> Opened:
    """Write the report and open it; a browser that hangs, as headless ones rarely do, is started once more."""
    url = write_report(run).as_uri()
    for attempt in range(2):
        dom = home / f"dom{attempt}.html"
        command = [str(BROWSER), *FLAGS, f"--user-data-dir={home / f'profile{attempt}'}", *shot, "--dump-dom", url]
        with dom.open("wb") as out:  # not a pipe: the browser's children may hold that open after it is killed
            browser = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, start_new_session=True)
            try:
                browser.wait(timeout=180)
                return Opened(run, dom.read_text(encoding="utf-8"), home / "page.png")
            except subprocess.TimeoutExpired:
                os.killpg(browser.pid, signal.SIGKILL)
                browser.wait()
    pytest.fail(f"{BROWSER} did not finish within 180 s, twice")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    graph = llama_graph("tiny", 8, 64, 176)
    odd = RankSchedule(ODD.replace("/", ""), graph, (7,) * len(graph.projections), 8 * graph.cost)
    names = ("zero-shot", "uniform", "coarse", "fine", "full", "dynamic", odd.name)
    run = fake_run(tmp_path_factory.mktemp("run"), names, (0, 1, 2), questions=100, extra={odd.name: odd})
    home = tmp_path_factory.mktemp("browser")
    return open_page(run, home, "--window-size=1280,4000", f"--screenshot={home / 'page.png'}")


def test_every_figure_is_drawn_without_an_error(opened: Opened) -> None:
    figures = opened.body.count(PLOT)
    # curve, components, gradient-norm map, 5 rank maps, budget, score, difference, 2 of losses; 4 frames, 3 spectra,
    # 3 of probes
    assert figures == 23
    assert f'data-figures="{figures}"' in opened.root
    assert "data-errors" not in opened.root
    for block in opened.body.split(PLOT)[1:]:
        assert 'class="main-svg"' in block


def test_rank_maps_show_every_rank(opened: Opened) -> None:
    cells = re.findall(CELL, opened.body.split("Where the rank goes")[1].split("How ranks moved")[0])
    schedules = load_run(opened.run).ended_schedules()
    assert len(schedules) == 5
    assert sorted(map(int, cells)) == sorted(rank for schedule in schedules for rank in schedule.ranks)


def test_stages_are_coloured_and_named(opened: Opened) -> None:
    legend = re.findall(r'class="legendtext"[^>]*>([^<]*)<', opened.body)
    assert [text for text in legend if text.startswith("stage")] == [
        "stage 1: layers 1-2",
        "stage 2: layers 3-5",
        "stage 3: layers 6-8",
    ]
    assert "A" in legend
    assert "B" in legend


def test_names_are_shown_as_they_are(opened: Opened) -> None:
    ticks = re.findall(r"<text[^>]*>([^<]*(?:&lt;)?[^<]*)</text>", opened.body)
    shown = ODD.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert shown in ticks


def test_there_is_something_to_see(opened: Opened) -> None:
    with Image.open(opened.picture) as picture:
        assert picture.size == (1280, 4000)
        colours = picture.convert("RGB").quantize(64).convert("RGB").getcolors()
        ink = sum(picture.convert("L").histogram()[:200])
    assert colours is not None
    assert len(colours) > 20
    assert ink > 0.02 * 1280 * 4000


def test_ranks_that_moved_are_drawn_from_the_start_on(opened: Opened) -> None:
    (trial,) = (trial for trial in load_run(opened.run).trials if trial.key == "dynamic-seed2")
    _require_film(opened, trial)
    legend = re.findall(r'class="legendtext"[^>]*>([^<]*)<', opened.body)
    assert (legend.count("where it is cut"), legend.count("chosen")) == (3, 3)


@pytest.mark.slow
def test_ranks_that_moved_over_400_projections_are_drawn(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", names=("dynamic",), seeds=(0,), n_layers=58, questions=5, profile=False)
    page = open_page(run, tmp_path)
    assert "data-errors" not in page.root
    assert f'data-figures="{page.body.count(PLOT)}"' in page.root
    (trial,) = load_run(run).trials
    _require_film(page, trial)


def _require_film(page: Opened, trial: TrialRecord) -> None:
    """The cells of every frame hold the ranks of that time."""
    film = page.body.split('class="grid film"')[1].split('class="note"')[0]
    cells = [[int(rank) for rank in re.findall(CELL, frame)] for frame in film.split(PLOT)[1:]]
    times = [trial.moves[0].before, *(move.after.ranks for move in trial.moves)]
    assert [sorted(found) for found in cells] == [sorted(ranks) for ranks in times]


def test_a_run_without_trials_is_drawn_too(tmp_path: Path) -> None:
    page = open_page(fake_run(tmp_path / "run", names=(), n_layers=3), tmp_path)
    assert 'data-figures="7"' in page.root
    assert "data-errors" not in page.root
