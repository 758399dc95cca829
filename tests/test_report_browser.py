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
    names = ("zero-shot", "uniform", "coarse", "fine", "full", odd.name)
    run = fake_run(tmp_path_factory.mktemp("run"), names, (0, 1, 2), questions=100, extra={odd.name: odd})
    home = tmp_path_factory.mktemp("browser")
    return open_page(run, home, "--window-size=1280,4000", f"--screenshot={home / 'page.png'}")


def test_every_figure_is_drawn_without_an_error(opened: Opened) -> None:
    figures = opened.body.count('class="plot"')
    assert figures == 12  # curve, components, gradient-norm map, 4 rank maps, budget, score, difference, 2 of losses
    assert f'data-figures="{figures}"' in opened.root
    assert "data-errors" not in opened.root
    for block in opened.body.split('class="plot"')[1:]:
        assert 'class="main-svg"' in block


def test_rank_maps_show_every_rank(opened: Opened) -> None:
    cells = re.findall(r'class="heatmap-label"><text[^>]*>(\d+)<', opened.body)
    run = load_run(opened.run)
    assert len(run.schedules) == 4
    assert run.profile is not None
    norms = [text for value in run.profile.signal().values if (text := f"{value:.3g}").isdigit()]
    ranks = [str(rank) for schedule in run.schedules for rank in schedule.ranks]
    assert sorted(cells) == sorted(ranks + norms)


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


def test_ranks_that_moved_over_400_projections_are_drawn(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", names=("dynamic",), seeds=(0,), n_layers=58, questions=5, profile=False)
    shutil.rmtree(run / "schedules")
    page = open_page(run, tmp_path)
    assert 'data-figures="14"' in page.root  # rank map, budget, 4 frames, 3 spectra, 3 probes, 2 of losses
    assert "data-errors" not in page.root
    film = page.body.split('class="grid film"')[1].split("What phi cut")[0]
    ranks = [int(rank) for rank in re.findall(r'class="heatmap-label">.*?<text[^>]*>(\d+)<', film)]
    (trial,) = load_run(run).trials
    assert ranks[:406] == list(trial.moves[0].before)
    assert len(ranks) == 4 * 406
    spectra = page.body.split("What phi cut after step")[2::2]
    assert all("where it is cut" in spectrum for spectrum in spectra)
    assert len(spectra) == 3


def test_a_run_without_trials_is_drawn_too(tmp_path: Path) -> None:
    page = open_page(fake_run(tmp_path / "run", names=(), n_layers=3), tmp_path)
    assert 'data-figures="7"' in page.root
    assert "data-errors" not in page.root
