"""How commands end: exit codes, one line, a report of what nobody foresaw, output that cannot be written."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer
from tqdm import tqdm

from fake_run import fake_run
from hydra_vlm import door, streams
from hydra_vlm.errors import ConfigError
from hydra_vlm.files import at_work
from hydra_vlm.interruption import Interrupted

COMMAND = (sys.executable, "-m", "hydra_vlm.cli")
SCHEDULE = ["schedule", "--graph", "mobilellama-1.4b", "--rank", "8", "--stages", "1-8,9-12,13-24"]


def ended(act: Any, words: str, patch: pytest.MonkeyPatch) -> int:
    """The exit code of a command line whose only commands do `act`."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command("work")(act)
    app.command("other")(lambda: None)
    patch.setattr(sys, "argv", ["hydra-vlm", *words.split()])
    with pytest.raises(SystemExit) as end:
        door.enter(app)
    assert isinstance(end.value.code, int)
    return end.value.code


def raising(problem: BaseException) -> Any:
    def act() -> None:
        raise problem

    return act


def test_an_error_that_nobody_foresaw_is_one_line_with_the_file_at_work_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HYDRA_VLM_STORAGE", "postgresql+psycopg://me:hidden@host/base")

    def act(storage: str) -> None:
        with at_work(tmp_path / "outer"), at_work(tmp_path / "inner.json"):
            raise RuntimeError(f"nobody\nforesaw {storage} with token=abcdef and hf_0123456789")

    assert ended(act, "work postgresql+psycopg://me:hidden@host/base", monkeypatch) == door.FAULT
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("error: hydra-vlm work met an error that it does not know, at work on ")
    assert f"{tmp_path / 'inner.json'} (RuntimeError: nobody)" in line
    (report,) = (tmp_path / "state/hydra-vlm").iterdir()
    assert line.endswith(f"the full report is in {report}\n")
    told = report.read_text()
    assert "Traceback (most recent call last)" in told
    assert '"torch"' in told
    assert f'"file at work": "{tmp_path / "inner.json"}"' in told
    for secret in ("hidden", "abcdef", "hf_0"):
        assert secret not in told


def test_a_report_that_has_no_place_is_missed_by_nobody_but_its_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    assert ended(raising(KeyError("x")), "work", monkeypatch) == door.FAULT
    assert "no report could be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        (ConfigError("this is wrong"), 2, "error: this is wrong\n"),
        (OSError(28, "No space left on device"), 2, "error: no room on the disk"),
        (MemoryError(), 2, "error: out of memory"),
        (PermissionError(13, "Permission denied", "/some/file"), 2, "error: /some/file cannot be used (Permission"),
        (EOFError("Ran out of input"), door.FAULT, "EOFError: Ran out of input"),  # typer's own ending says "Aborted!"
        (BrokenPipeError(32, "Broken pipe"), door.FAULT, "BrokenPipeError"),  # not the output's
        (RecursionError("too deep"), door.FAULT, "RecursionError"),
        (KeyboardInterrupt(), 130, ""),
        (Interrupted(signal.SIGTERM, "kept"), 143, "stopped by SIGTERM: kept\n"),
        (SystemExit(7), 7, ""),
        (typer.Exit(1), 1, ""),
    ],
)
def test_every_ending_has_its_code_and_its_line(
    problem: BaseException,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert ended(raising(problem), "work", monkeypatch) == code
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == bool(said)
    assert "Traceback" not in told


def test_a_data_loaders_process_speaks_like_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = (
        "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
        "hydra_vlm.errors.DataError: image 3.png cannot be read: mend it\n"
    )
    assert ended(raising(ConfigError(told)), "work", monkeypatch) == 2
    assert capsys.readouterr().err == "error: image 3.png cannot be read: mend it\n"


def test_a_message_commands_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(raising(ConfigError("key \x1b[2J\r'x' \x9b" + "y" * 10_000)), "work", monkeypatch) == 2
    told = capsys.readouterr().err
    assert "key \\x1b[2J\\r'x' \\x9byyy" in told
    assert len(told) < streams.LONGEST + 20


def test_warnings_of_libraries_are_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def act() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.warn("first\n  second", UserWarning, stacklevel=1)

    before = warnings.showwarning
    assert ended(act, "work", monkeypatch) == 0
    assert capsys.readouterr().err == "warning: first second\n"
    assert warnings.showwarning is before


def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *words], check=False, timeout=120, **{"stderr": subprocess.PIPE, **options})


def run_without(stream: int, words: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The command with one of its streams closed, by a shell: this process has threads, and a copy of it may hang."""
    words = ["sh", "-c", f'exec "$@" {stream}>&-', "sh", *COMMAND, *words]
    return subprocess.run(words, check=False, timeout=120, **options)


@pytest.mark.parametrize("words", [SCHEDULE, ["--help"]])
def test_output_that_nobody_takes(words: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = run(words, stdout=full)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: the result could not be written to standard output")
    assert done.stderr.count(b"\n") == 1
    closed = run_without(1, words, stderr=subprocess.PIPE)
    assert closed.returncode == 2
    assert b"standard output ([Errno 9]" in closed.stderr
    reader, writer = os.pipe()
    os.close(reader)
    piped = run(words, stdout=writer)
    os.close(writer)
    assert (piped.returncode, piped.stderr) == (door.BROKEN_PIPE, b"")


def test_standard_error_that_nobody_takes_stops_nothing() -> None:
    with open("/dev/full", "wb") as full:
        done = run(SCHEDULE, stdout=subprocess.PIPE, stderr=full)
    assert (done.returncode, done.stdout) == (0, run(SCHEDULE, stdout=subprocess.PIPE).stdout)
    closed = run_without(2, SCHEDULE, stdout=subprocess.PIPE)
    assert (closed.returncode, closed.stdout) == (0, done.stdout)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_table_is_printed_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", seeds=(0, 1))
    done = run(["report", str(folder)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(encoding)
    assert "uniform" in text
    assert (folder / "report.html").is_file()
    assert "?" not in text


def test_what_an_encoding_lacks_has_a_plain_form() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with streams.told_plainly():
            streams.show("Δd ±1 − │ α·10 … 水 \udcff")
        assert sys.stdout is stream
    assert stream.buffer.getvalue() == b"Deltad +/-1 - | alpha.10 ... ? \xff\n"  # type: ignore[attr-defined]


BARS = """
import sys, typer
from tqdm import tqdm
from hydra_vlm import door
from hydra_vlm.errors import DataError
from hydra_vlm.streams import say
app = typer.Typer(add_completion=False, rich_markup_mode=None)
@app.command()
def work():
    for step in tqdm(range(10), mininterval=0, leave={leave}):
        if step == 3:
            say("a word between")
        if step == 5:
            raise DataError("image 5 cannot be read")
@app.command()
def other():
    pass
sys.argv = ["hydra-vlm", "work"]
door.enter(app)
"""


def screen(raw: str) -> list[str]:
    """The lines of a terminal after this was written to it."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|\x1b\[K|[\r\n]|[^\r\n\x1b]+", raw):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part == "\x1b[A":
            row -= 1
        elif part == "\x1b[K":
            lines[row] = lines[row][:column]
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("leave", [True, False])
def test_lines_beside_a_bar_begin_on_their_own(leave: bool) -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    process = subprocess.Popen([sys.executable, "-c", BARS.format(leave=leave)], stdout=slave, stderr=slave)
    os.close(slave)
    raw = b""
    while select.select([master], [], [], 60)[0]:
        try:
            piece = os.read(master, 4096)
        except OSError:  # the terminal's other side is closed
            break
        if not piece:
            break
        raw += piece
    os.close(master)
    assert process.wait(60) == 2
    lines = screen(raw.decode())
    assert "a word between" in lines
    assert "error: image 5 cannot be read" in lines
    last = lines.index("error: image 5 cannot be read")
    assert not any(lines[last + 1 :])  # no bar is drawn after the last word
    assert any("/10 [00" in line for line in lines) == leave, lines


def test_bars_that_other_tests_left_are_closed() -> None:
    bar = tqdm(total=3, file=io.StringIO())
    streams.say_last("the end")
    assert bar.disable
