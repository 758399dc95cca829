"""What both of two processes do in test_distributed.py: command after command, so that torch is loaded once.

`python -m torch.distributed.run --nproc-per-node 2 two_processes.py jobs.json`; a job has `words`, the command line,
perhaps `environment`, which a launcher would set, and `stop`, the step before which the training breaks off. Each
process leaves what it wrote itself, and whether the model was in pieces in each job, in `<jobs>.<rank>.json`.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor
from transformers import logging

from hydra_vlm import processes
from hydra_vlm.cli import app
from hydra_vlm.training import recipe
from hydra_vlm.training.progress import LossProgress

WRITING = {"open": 1, "os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "shutil.rmtree": 0}


SHARDED: list[bool] = []
"""Whether the model was in pieces at each step that this process began."""


class Stopped(Exception):
    """The training was broken off."""


@contextmanager
def stopping(step: int | None) -> Iterator[None]:
    """A training that breaks off when it is to begin a step after so many, as if it were killed."""

    class Stopper(LossProgress):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            SHARDED.append(all(isinstance(p, DTensor) for p in kwargs["model"].parameters()))
            if state.global_step == step:
                raise Stopped

    kept = recipe.LossProgress
    recipe.LossProgress = Stopper
    try:
        yield
    except Stopped:
        pass
    finally:
        recipe.LossProgress = kept


def run(words: list[str], stop: int | None = None) -> None:
    """One command of the command line, in this process."""
    with stopping(stop):
        app(words, standalone_mode=False)


def writes(root: Path, seen: list[str]) -> None:
    """From now on, remember every file under `root` that this process writes, renames or removes."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in WRITING:
            return
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            return
        path = str(arguments[0 if event == "open" else WRITING[event]])
        if path.startswith(str(root)):
            seen.append(path)

    sys.addaudithook(watch)


def main() -> None:
    jobs_file = Path(sys.argv[1])
    logging.disable_progress_bar()
    seen: list[str] = []
    sharded: list[bool] = []
    writes(jobs_file.parent, seen)
    with processes.one_voice():
        for job in json.loads(jobs_file.read_text()):
            os.environ.update(job.get("environment", {}))
            SHARDED.clear()
            run(job["words"], job.get("stop"))
            sharded.append(all(SHARDED))
            for name in job.get("environment", {}):
                del os.environ[name]
        own = {"written": list(seen), "sharded": sharded}
        jobs_file.with_suffix(f".{os.environ['RANK']}.json").write_text(json.dumps(own))
    processes.leave()


if __name__ == "__main__":
    main()
