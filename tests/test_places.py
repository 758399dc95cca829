"""Where nothing can be written is known before work begins: one function decides."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_run import fake_run
from hydra_vlm.cli import main
from hydra_vlm.compare import compare
from hydra_vlm.errors import HydraError, RunFolderError
from hydra_vlm.files import require_file_place, require_free, require_place
from tiny import toy_config


def refused(path: Path) -> str:
    with pytest.raises(RunFolderError) as problem:
        require_place(path)
    assert "\n" not in str(problem.value)
    return str(problem.value)


def test_what_is_no_place_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for name, words in {
        "file": "is a file",
        "file/run": "lies inside",
        "file/a/b": "a file",
        "dangling": "a link to",
        "dangling/run": "a link to",
        "loop": "cannot be read (Too many levels",
        "pipe": "is a pipe",
        "pipe/run": "a pipe",
        "x" * 300: "300 bytes long",
        "ä" * 120: "240 bytes long",  # the file system counts bytes
        "/".join(["d" * 99] * 45): "its path is",
        "nul\0": "NUL",
    }.items():
        assert words in refused(tmp_path / name), name
    assert "device" in refused(Path("/dev/null"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "loop", "pipe"]


def test_what_is_a_place_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for name in ("there", "link", "link/run", "new", "new/deep/er", "x" * 200, "run with blanks ä"):
        require_place(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]
    assert not list((tmp_path / "there").iterdir())


def test_what_is_no_place_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.json").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    require_file_place(tmp_path / "old.json")
    require_file_place(tmp_path / "new/er.json")
    for name in ("folder", "old.json/x", "dangling", "x" * 250):
        with pytest.raises(RunFolderError):
            require_file_place(tmp_path / name)
    with pytest.raises(RunFolderError, match="device"):
        require_file_place(Path("/dev/null"))  # it would be replaced, by a user who may
    with pytest.raises(RunFolderError, match="not empty"):
        require_free(tmp_path)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)], check=False).returncode:
        pytest.skip("mounting a file system needs more rights than the tests have")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_read_only_disk(read_only: Path) -> None:
    assert "takes no new files (Read-only file system)" in refused(read_only)
    assert "Read-only" in refused(read_only / "run/deeper")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused(tmp_path / "run")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("inside", ["run", "model", "adapter"])
def test_a_run_lies_in_no_other_folder_of_ours(inside: str, tmp_path: Path) -> None:
    if inside == "run":
        fake_run(tmp_path / inside, names=("uniform",), seeds=(0,))
    else:
        (tmp_path / inside).mkdir()
        (tmp_path / inside / {"model": "config.json", "adapter": "adapter_config.json"}[inside]).touch()
    with pytest.raises(RunFolderError, match=f"lies inside the {inside} folder"):
        require_place(tmp_path / inside / "deep/er", alone=True)
    require_place(tmp_path / inside, alone=True)  # going on with it
    require_place(tmp_path / inside / "exported")


def test_a_run_is_refused_before_its_model_is_loaded(
    tiny_model: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_vlm.trials.load_model", lambda *_, **__: pytest.fail("too late"))
    (tmp_path / "file").touch()
    with pytest.raises(HydraError, match="lies inside"):
        compare(toy_config(tiny_model, toy_data), tmp_path / "file/run")


@pytest.mark.parametrize(
    "words",
    [
        "tune --out FILE/run",
        "train --out FILE/run",
        "profile --out FILE/run",
        "pretrain --out FILE/run",
        "search --out FILE/run",
        "search --workers 2 --out FILE/run",
        "evaluate --out FILE/run",
        "evaluate --write-reference FILE/run",
        "schedule --graph mobilellama-1.4b --rank 8 --stages 1-8,9-12,13-24 --out FILE/run",
        "data worlds FILE/run",
        "data check FILE --out FILE/run",
        "init FILE/run --preset smol",
        "convert FILE FILE/run",
        "export embedded FILE FILE/run --format snippet",
    ],
)
def test_every_command_refuses_it(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.json"
    file.write_text("[]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hydra-vlm", *words.replace("FILE", str(file)).split()])
    with pytest.raises(SystemExit, match="2"):
        main()
    told = capsys.readouterr()
    assert f"lies inside {file}, which is a file" in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
