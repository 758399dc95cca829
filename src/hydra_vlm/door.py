"""How a command ends: its exit code, and the one line that it says then. No torch.

    0    done
    1    done, and the check found something (`data check`)
    2    told what is to be put right: an option, a configuration, a file, a device, no room, no memory
    75   another command is at work in the folder: the same command may do later
    70   an error that nobody foresaw: the line names the full report
    130  143  141   ended by SIGINT, by SIGTERM, by a reader of the output that went away

Whatever was finished by then is kept, and the same command goes on from it.
"""

import contextlib
import json
import os
import re
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import typer

from hydra_vlm import processes
from hydra_vlm.errors import HydraError
from hydra_vlm.faults import first_line, is_disk_full, is_out_of_memory
from hydra_vlm.files import file_at_work
from hydra_vlm.interruption import Interrupted, ending_in_order
from hydra_vlm.streams import output_lost, say, say_last, told_plainly

FAULT = 70
"""The exit code of an error that nobody foresaw (EX_SOFTWARE of sysexits.h)."""

BROKEN_PIPE = 141
"""What a shell says of a program that SIGPIPE ended."""

_SECRETS = (
    (re.compile(r"(://[^/\s:@']*):[^/\s@']*@"), r"\1:…@"),  # a database's password
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_…"),
    (re.compile(r"(?i)((?:token|password|secret|api[-_]?key)['\"]?\s*[=: ]\s*)['\"]?[^\s'\",]+"), r"\1…"),
)


def enter(app: typer.Typer, before: Callable[[], None] = lambda: None) -> NoReturn:
    """Run what the command line asks for, after `before`, and end the process with the exit code."""
    with told_plainly():
        threading.excepthook = _thread_failed
        try:
            with processes.one_voice(), ending_in_order():
                before()
                _invoke(app)
        except BaseException as problem:
            code = _ending(problem)
        lost = output_lost() if code == 0 else None
        sys.exit(_unheard(lost) if lost else code)


def _invoke(app: typer.Typer) -> NoReturn:
    """Without typer's own ending, which takes any EOFError for a wish to stop and any broken pipe for the output's."""
    command = typer.main.get_command(app)
    with command.make_context(_program(), sys.argv[1:]) as context:
        command.invoke(context)
    sys.exit(0)


def _program() -> str:
    """What was called, for the help."""
    package = getattr(sys.modules["__main__"], "__package__", None)
    return f"python -m {package}" if package else Path(sys.argv[0]).name


def _ending(problem: BaseException) -> int:
    """Say what there is to say about how a command ended; returns the exit code."""
    if isinstance(problem, SystemExit):
        return problem.code if isinstance(problem.code, int) else int(problem.code is not None)
    if isinstance(problem, Interrupted):
        if processes.is_first():
            say_last(str(problem))
        return problem.code
    if isinstance(problem, KeyboardInterrupt):
        return 130
    if isinstance(problem, typer.Exit):
        return problem.exit_code
    if isinstance(problem, typer.TyperException) and hasattr(problem, "show"):
        problem.show()
        return int(getattr(problem, "exit_code", processes.FAILED))
    if problem is output_lost():
        return _unheard(problem)
    if isinstance(problem, HydraError):
        return _fail(without_worker(str(problem)), problem.code)
    told = _foreseen(problem)
    return _fail(told) if told else _fault(problem)


def _unheard(problem: BaseException) -> int:
    """Nobody takes the result: a reader that went away knows it, others are told."""
    if isinstance(problem, BrokenPipeError):
        return BROKEN_PIPE
    return _fail(
        f"the result could not be written to standard output ({first_line(problem)}): what the command wrote to its "
        "files is kept. Repeat the command with an output that takes it"
    )


def _fail(message: str, code: int = processes.FAILED, topic: str = "") -> int:
    """Say an error; of several processes whoever meets it first says it."""
    if processes.is_first_to_say(topic or message):
        say_last(f"error: {message}")
    return code


def _foreseen(problem: BaseException) -> str:
    """What the user can put right, though a library met it: no room, no memory, a file that cannot be used."""
    if is_disk_full(problem):
        return f"no room on the disk ({first_line(problem)}): make room and repeat the command"
    if is_out_of_memory(problem):
        return f"out of memory ({first_line(problem)}): free some, or ask for less at a time, and repeat the command"
    if isinstance(problem, OSError) and problem.errno is not None and problem.filename is not None:
        place = os.fsdecode(problem.filename) if isinstance(problem.filename, str | bytes) else problem.filename
        return f"{place} cannot be used ({problem.strerror}): see that it is there, of the right kind, and permitted"
    return ""


def _fault(problem: BaseException) -> int:
    """One line about an error that nobody foresaw; all that is known about it goes into a file."""
    place = file_at_work(problem)
    what = f"{type(problem).__name__}: {first_line(problem)}"
    at = f", at work on {place}" if place else ""
    report = write_report(problem, place)
    written = f"the full report is in {report}" if report else "no report could be written"
    command = " ".join([_program(), *_command()])
    return _fail(f"{command} met an error that it does not know{at} ({what}): {written}", FAULT, f"{command} {what}")


def _command() -> list[str]:
    """The command's own words, `data check` being two."""
    words = [word for word in sys.argv[1:3] if re.fullmatch("[a-z]+", word)]
    return words if words[:1] == ["data"] else words[:1]


def write_report(problem: BaseException, place: str | None) -> Path | None:
    """Traceback, command line and versions in a file of the state folder, else of the temporary one; no secrets."""
    from hydra_vlm.run_folder import environment

    known = {"file at work": place} | environment("unknown", "unknown")
    text = f"{json.dumps(known, indent=2)}\n\n{''.join(traceback.format_exception(problem))}"
    for secret, form in _SECRETS:
        text = secret.sub(form, text)
    name = "-".join([time.strftime("%Y%m%d-%H%M%S"), *_command(), str(os.getpid())])
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    for folder in (Path(state).expanduser() / "hydra-vlm", Path(tempfile.gettempdir()) / "hydra-vlm"):
        with contextlib.suppress(OSError, RuntimeError):
            folder.mkdir(parents=True, exist_ok=True)
            report = folder / f"{name}.txt"
            with report.open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return report
    return None


def without_worker(message: str) -> str:
    """The message of an error that a process of torch's data loader met, without the traceback put around it."""
    if "Original Traceback" not in message:
        return message
    last = message.strip().splitlines()[-1]
    return re.sub(r"^[\w.]+: ", "", last)


def _thread_failed(failed: Any) -> None:
    """An error in a thread beside the work: one line, and a report."""
    if failed.exc_value is None or issubclass(failed.exc_type, SystemExit):
        return
    report = write_report(failed.exc_value, file_at_work(failed.exc_value))
    say(f"warning: {failed.exc_type.__name__} in a thread beside the work: the full report is in {report}")
