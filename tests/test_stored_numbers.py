"""What a run folder holds is checked when it is read back: the numbers of records, and that files are files."""

import json
from pathlib import Path
from typing import Any

import pytest

from fake_run import fake_run
from hydra_vlm.errors import RunFolderError
from hydra_vlm.files import write_text
from hydra_vlm.inputs import read_inputs
from hydra_vlm.report.run import load_run
from hydra_vlm.trials import finished

NAN = float("nan")
EDITS: list[tuple[tuple[str | int, ...], Any]] = [
    (("validation_loss",), -3),
    (("validation_loss",), NAN),
    (("validation_loss",), "0.4"),
    (("validation_loss",), True),
    (("validation_losses",), [[3, NAN]]),
    (("train_losses", 0, 1), NAN),
    (("train_losses", 0, 0), -1),
    (("seed",), "0"),
    (("seed",), 7),
    (("name",), "coarse"),
    (("trained",), {"lora": -5}),
    (("trained",), [1]),
    (("seconds",), -1),
    (("seconds",), "long"),
    (("kept_step",), 99),
    (("scores", 0, "value"), NAN),
    (("scores", 0, "value"), 101),
    (("scores", 0, "n"), 2.5),
    (("scores", 0, "unanswered"), 10**6),
    (("scores", 0, "maximum"), 0),
    (("scores", 0, "groups"), {"shape": "high"}),
    (("scores", 0, "rule"), "mine"),
    (("scores",), None),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("run"), ["uniform"], [0], questions=10)


@pytest.mark.parametrize(("place", "value"), EDITS, ids=lambda part: str(part)[:40])
def test_a_record_with_a_number_that_is_none_is_refused(run: Path, place: tuple[str | int, ...], value: Any) -> None:
    path = run / "trials" / "uniform-seed0" / "record.json"
    whole = path.read_text()
    edited = json.loads(whole)
    inner = edited
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    path.write_text(json.dumps(edited))
    try:
        for read in (lambda: load_run(run), lambda: finished(path)):
            with pytest.raises(RunFolderError, match=r"record\.json.*(?i:remove|delete) it"):
                read()
    finally:
        path.write_text(whole)


def test_a_whole_record_reads_as_it_was(run: Path) -> None:
    path = run / "trials" / "uniform-seed0" / "record.json"
    found = finished(path)
    assert found is not None
    assert found.to_json() == json.loads(path.read_text())


def test_a_folder_in_the_place_of_a_file_is_named_before_work_is_done(tmp_path: Path) -> None:
    for name in ("record.json", "inputs.json", "results.json"):
        (tmp_path / name).mkdir()
    with pytest.raises(RunFolderError, match=r"record\.json is a folder"):
        finished(tmp_path / "record.json")
    with pytest.raises(RunFolderError, match=r"inputs\.json is a folder"):
        read_inputs(tmp_path)
    with pytest.raises(RunFolderError, match=r"results\.json is a folder"):
        write_text(tmp_path / "results.json", "{}")
    assert not list(tmp_path.glob(".*"))
