"""Two equal commands at once, twenty times over: run as a script, which loads the libraries once and forks for each.

    python tests/two_at_once.py COMMAND CONFIG FOLDER TRIES

Prints for each try the exit codes, what was said on standard error, and what is left in the folder, as a line of JSON.
"""

import json
import os
import sys
import time
from pathlib import Path


def child(command: str, config: str, run: Path, log: Path, delay: float) -> int:
    """The process id of a command that starts after a delay, as if it had been typed."""
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        time.sleep(delay)
        sys.argv = ["hydra-vlm", command, config, "--out", str(run)]
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    from hydra_vlm.cli import main

    command, config, folder, tries = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    for number in range(tries):
        run = folder / f"{command}-{number}"
        logs = [folder / f"{command}-{number}-{which}.log" for which in "ab"]
        started = [child(command, config, run, log, i * 0.02 * number) for i, log in enumerate(logs)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]
        left = sorted(path.name for path in run.iterdir())
        print(json.dumps({"codes": codes, "said": [log.read_text() for log in logs], "left": left}), flush=True)
