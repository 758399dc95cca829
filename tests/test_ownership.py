"""A folder has one owner: the second is told by whom it is used, the dead are replaced, nobody leaves a trace."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hydra_vlm.errors import FolderInUseError, RunFolderError
from hydra_vlm.files import whole_folder
from hydra_vlm.liveness import Watch, heartbeat, host, own_id
from hydra_vlm.ownership import OWNER, contents, owned
from hydra_vlm.run_folder import owning

HOLDS = """
import sys, time
from pathlib import Path
from hydra_vlm.liveness import Watch
from hydra_vlm.ownership import owned
with owned(Path(sys.argv[1]), watch=Watch(3.0)):
    print("mine", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holding(folder: Path, seconds: float = 60) -> subprocess.Popen[str]:
    """Another process that owns the folder, once it does."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder), str(seconds)], stdout=-1, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_the_second_is_told_who_works_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = holding(run)
    try:
        words = f"run is in use by .* \\(process {first.pid} on this host, since 2"
        with pytest.raises(FolderInUseError, match=words), owned(run):
            raise AssertionError("two owners")
        with pytest.raises(FolderInUseError), owning(run):
            pass
    finally:
        end(first)
    assert FolderInUseError.code == 75


def test_a_killed_owner_is_replaced_at_once(tmp_path: Path) -> None:
    first = holding(tmp_path / "run")
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / "run" / OWNER).exists()
    started = time.monotonic()
    with owned(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / OWNER).read_text())["id"] == own_id()
    assert time.monotonic() - started < 5
    end(first)


def test_a_stopped_owner_on_this_host_is_alive(tmp_path: Path) -> None:
    """It may go on at any time, however long its heart stands still."""
    first = holding(tmp_path / "run")
    first.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(FolderInUseError), owned(tmp_path / "run", watch=Watch(0.1)):
            pass
    finally:
        end(first)


def elsewhere(folder: Path, beat: int) -> None:
    folder.mkdir(exist_ok=True)
    shown = {"id": "farm/0/1:7:99", "beat": beat, "command": "hydra-vlm tune", "since": "2026-01-01 00:00:00"}
    (folder / OWNER).write_text(json.dumps(shown))


def test_an_owner_on_another_host_lives_as_long_as_its_heart_beats(tmp_path: Path) -> None:
    elsewhere(tmp_path, 1)
    beat = threading.Timer(0.5, elsewhere, (tmp_path, 2))
    beat.start()
    said: list[str] = []
    words = r"'hydra-vlm tune' \(process 7 on host farm, since 2026-01-01"
    with pytest.raises(FolderInUseError, match=words), owned(tmp_path, say=said.append, watch=Watch(30)):
        pass
    assert len(said) == 1
    assert "waiting up to 30 s for a sign of life" in said[0]
    beat.join()


def test_a_silent_owner_on_another_host_is_replaced_after_the_grace(tmp_path: Path) -> None:
    elsewhere(tmp_path, 1)
    started = time.monotonic()
    with owned(tmp_path, watch=Watch(0.6)):
        assert 0.6 < time.monotonic() - started < 10


def test_an_owner_that_was_taken_for_dead_ends(tmp_path: Path) -> None:
    first = holding(tmp_path / "run", 30)
    (tmp_path / "run" / OWNER).write_text(json.dumps({**heartbeat(), "id": "farm/0/1:7:99"}))
    try:
        assert first.wait(timeout=25) == -signal.SIGTERM
    finally:
        end(first)


def test_one_command_may_ask_twice_and_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "new"
    with owning(run), owning(run), owned(run):
        assert (run / OWNER).is_file()
        assert contents(run) == []
    assert not run.exists()
    with pytest.raises(RuntimeError), owned(run):
        raise RuntimeError
    assert not run.exists()
    run.mkdir()
    with owned(run):
        (run / "kept").touch()
    assert [path.name for path in run.iterdir()] == ["kept"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = r"file.run cannot be written to \(Not a directory\)"
    with pytest.raises(RunFolderError, match=words), owned(tmp_path / "file" / "run"):
        pass


def test_of_many_at_once_no_two_own_a_folder(tmp_path: Path) -> None:
    """Each owner makes a folder and removes it again; two at a time could not."""
    script = HOLDS.replace('print("mine", flush=True)', "draw()").replace(
        "with owned",
        """
def draw():
    (Path(sys.argv[1]) / "inside").mkdir()
    time.sleep(0.05)
    (Path(sys.argv[1]) / "inside").rmdir()
with owned""",
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run"), "0"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    told = [process.communicate(timeout=60)[1] for process in processes]
    for process, words in zip(processes, told, strict=True):
        assert process.returncode == 0 or "FolderInUseError" in words, words
    assert 0 in [process.returncode for process in processes]
    assert contents(tmp_path / "run") == []


def test_two_drafts_of_one_destination_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with whole_folder(target) as draft:
        (draft / "first").touch()
        other = subprocess.run(
            [sys.executable, "-c", f"from hydra_vlm.files import *\nwith whole_folder(Path({str(target)!r})): pass"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "FolderInUseError" in other.stderr
        assert (draft / "first").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "first"]
    with pytest.raises(RunFolderError, match="is not empty"), whole_folder(target):
        pass
    assert (target / "first").exists()


def test_ids_say_where_a_process_is() -> None:
    assert own_id().startswith(f"{host()}:{os.getpid()}:")
