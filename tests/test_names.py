"""Names and paths that come from a file's content stay inside, and are refused before anything is written or read."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hydra_vlm.benchmarks.folder import image_path
from hydra_vlm.benchmarks.gqa import GQA
from hydra_vlm.benchmarks.pope import POPE
from hydra_vlm.benchmarks.rescoring import rescore
from hydra_vlm.benchmarks.scienceqa import PROBLEMS, ScienceQA
from hydra_vlm.benchmarks.suite import SIX, open_tasks
from hydra_vlm.benchmarks.textvqa import ANNOTATIONS, TextVQA
from hydra_vlm.config import BENCHMARKS, load_config
from hydra_vlm.data.worlds import write_worlds
from hydra_vlm.errors import ConfigError, DataError, HydraError, RunFolderError
from hydra_vlm.evaluation import EvaluationRequest
from hydra_vlm.names import LONGEST, below, file_name, name_fault, path_fault, require_distinct
from hydra_vlm.run_folder import RunFolder

BAD_NAMES = (
    *(
        "",
        " ",
        ".",
        "..",
        ".hidden",
        "../evil",
        "../../evil",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "C:evil",
        "\\\\host\\share",
    ),
    *(
        "nul",
        "NUL.json",
        "con",
        "COM1",
        "lpt9.txt",
        "a\0b",
        "a\nb",
        "\x7f",
        "end.",
        "end ",
        " start",
        "a?",
        "a*",
        "<b>",
    ),
    *("x" * (LONGEST + 1), "é" * LONGEST, "\ud800", "a|b", 'a"b', "\u2028"),
)
BAD_PATHS = (
    "",
    "..",
    "../x",
    "a/../../x",
    "/etc/passwd",
    "~/x",
    "\\x",
    "a\\..\\b",
    "C:\\x",
    "a\0",
    "x" * 300,
    "\udfff",
)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_such_a_name_is_refused_wherever_it_comes_from(name: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for make in (lambda: run.trial(name), lambda: run.schedule(name), lambda: file_name(name, "test")):
        with pytest.raises(ConfigError, match="choose another name"):
            make()
    (tmp_path / "my.yaml").write_text(json.dumps({"data": {"tests": {name: "some.json"}}}))
    with pytest.raises(ConfigError):
        load_config(tmp_path / "my.yaml")


@given(st.text(max_size=40))
def test_a_name_that_passes_is_one_part_of_a_path_that_reads_back(name: str) -> None:
    if name_fault(name):
        return
    path = Path("/root/of/it") / f"{name}.json"
    assert path.name == f"{name}.json"
    assert path.parent == Path("/root/of/it")
    assert os.path.normpath(path) == str(path)
    assert len(os.fsencode(f".{name}-seed4294967295.12345.tmp")) < 256
    assert name == name.strip()
    assert not name.startswith(".")


@given(st.text(alphabet="ab./\\~:C\0 ", max_size=12))
def test_a_path_that_passes_stays_below_its_root_on_every_system(path: str) -> None:
    if path_fault(path):
        return
    for text in (path, path.replace("\\", "/")):
        assert os.path.normpath(os.path.join("/root/of/it", text)).startswith("/root/of/it")


@pytest.mark.parametrize("names", [("Test", "test"), ("straße", "STRASSE"), ("e\u0301", "\u00e9")])
def test_names_that_differ_by_case_or_spelling_alone_are_one_file(names: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="would be one file"):
        require_distinct(names, "test")
    require_distinct((names[0], "other"), "test")


def test_tests_are_not_called_like_the_benchmarks(tmp_path: Path) -> None:
    assert tuple(SIX) == BENCHMARKS
    for name in ("gqa", "MME"):
        with pytest.raises(ConfigError, match="scored otherwise: rename it"):
            load_config(None, [f"data.tests={{{name}: x.json}}"])
    file = tmp_path / "gqa.json"
    file.write_text("[]")
    with pytest.raises(ConfigError, match="scored otherwise: rename it"):
        open_tasks(str(file), (), tmp_path)
    assert load_config(None, ["data.tests.my-test=x.json"]).data.tests == {"my-test": Path("x.json")}


@pytest.mark.parametrize("path", BAD_PATHS)
def test_such_a_path_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^image "):
        below(tmp_path, path, "image", DataError)


def test_links_may_lead_around_a_folder_but_not_out_of_it(tmp_path: Path) -> None:
    home, other = tmp_path / "real", tmp_path / "other"
    home.mkdir()
    other.mkdir()
    (home / "in.png").symlink_to("picture.png")
    (home / "out.png").symlink_to(other / "picture.png")
    (home / "folder").symlink_to(other)
    (tmp_path / "linked").symlink_to(home)  # the folder itself may be a link
    for root in (home, tmp_path / "linked"):
        assert below(root, "in.png", "image", DataError) == root / "in.png"
        for name in ("out.png", "folder/x.png"):
            with pytest.raises(DataError, match="a link leads to"):
                below(root, name, "image", DataError)
    for value in (None, 3, ["a"]):
        with pytest.raises(DataError, match="must be a path"):
            image_path(home, value)


def rewrite_lines(path: Path, key: str, value: str) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0][key] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rewrite_json(path: Path, change: Callable[[object], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds")
    write_worlds(folder, 0)
    return folder / "benchmarks"


@pytest.mark.parametrize("evil", ["../../secret", "/etc/secret", "..\\secret"])
@pytest.mark.parametrize("name", ["pope", "textvqa", "gqa", "scienceqa", "mme"])
def test_no_benchmark_reads_an_image_outside_its_folder(name: str, evil: str, worlds: Path, tmp_path: Path) -> None:
    import shutil

    source = next(path for path in worlds.iterdir() if path.name in (name, {"scienceqa": "sqa"}.get(name)))
    root = tmp_path / name
    shutil.copytree(source, root)
    for extra in root.glob(
        "llava_*"
    ):  # with LLaVA's question files and without: their names come from other files then
        if name != "pope":
            extra.unlink()
    if name == "pope":
        (file,) = root.rglob("coco_pope_random.json")
        rewrite_lines(file, "image", f"{evil}.png")
        for extra in root.glob("llava_*"):
            extra.unlink()
    elif name == "textvqa":
        rewrite_json(root / ANNOTATIONS, lambda v: v["data"][0].update(image_id=evil))  # type: ignore[index]
        for extra in root.glob("TextVQA_Rosetta*"):
            extra.unlink()
    elif name == "gqa":
        (file,) = root.rglob("testdev_balanced_questions.json")
        rewrite_json(file, lambda v: next(iter(v.values())).update(imageId=evil))  # type: ignore[attr-defined]
    elif name == "scienceqa":
        rewrite_json(root / PROBLEMS, lambda v: [p.update(image=f"../../{evil}.png") for p in v.values()])  # type: ignore[attr-defined]
    else:
        picture = next(path for path in root.rglob("*.png"))
        Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
        picture.unlink()
        picture.symlink_to(tmp_path / "secret.png")
    kinds = {"pope": POPE, "textvqa": TextVQA, "gqa": GQA, "scienceqa": ScienceQA, "mme": SIX["mme"]}
    with pytest.raises(DataError, match=r"must not leave|must be relative|a link leads to") as caught:
        kinds[name]().load(root, tmp_path / "scratch")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "linked",
    ["answers/base", "answers/base/predictions", "answers/base/scores.json", "examples", "examples/mine.jsonl"],
)
def test_rescoring_reads_and_writes_the_run_alone(tmp_path: Path, linked: str) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    (run / "examples").mkdir(parents=True)
    (run / "answers/base/predictions").mkdir(parents=True)
    example = {"id": "1", "image": None, "question": "q", "answers": ["a"], "group": "", "unit": "", "options": []}
    (run / "examples" / "mine.jsonl").write_text(json.dumps(example) + "\n")
    answers = run / "answers/base/predictions/mine.jsonl"
    answers.write_text(json.dumps({"id": "1", "prompt": "", "text": "a"}) + "\n")
    (run / "answers/base/scores.json").write_text("[]")
    (run / linked).rename(other)
    before = contents(other)
    (run / linked).symlink_to(other)
    with pytest.raises(RunFolderError, match="a link leads to"):
        rescore(run)
    assert contents(other) == before


def contents(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (place, *place.rglob("*")) if path.is_file()}


def test_an_adapters_folder_names_its_answers(tmp_path: Path) -> None:
    with pytest.raises(HydraError, match="choose another name"):
        _ = EvaluationRequest("embedded", "worlds", adapters=("/",)).labels
