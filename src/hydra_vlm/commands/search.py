"""The command `search --workers`: local worker processes on one run folder, one for each graphics card where asked."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from hydra_vlm.config import Config
from hydra_vlm.errors import ConfigError, HydraError
from hydra_vlm.ranges import most_workers
from hydra_vlm.run_folder import A_WORKERS_OWN, environment, open_run
from hydra_vlm.search.objective import Objective
from hydra_vlm.search.study import PREPARED, answering, close_storage, create_study, journal, open_storage
from hydra_vlm.search_request import check_search, for_workers, without_password

CARD = r"0|[1-9]\d{0,3}|(GPU|MIG)-[\w/-]+"
"""A card's number or its name as the driver lists it; under any other word no card is seen, and the CPU would train."""

STORAGE = "HYDRA_VLM_STORAGE"
"""The environment variable that gives workers the storage's URL, password and all: a command line is seen by anyone."""


def asked_workers(workers: int | None, gpus: str | None) -> list[str | None]:
    """One entry for each worker: its graphics card, or None; empty when the search is to run in this process.

    Raises ConfigError for numbers that do not agree.
    """
    if gpus is None:
        if (workers or 0) > (most := most_workers()):
            raise ConfigError(f"--workers {workers} is more than this machine's cores can serve: give {most} or fewer")
        return [None] * (workers or 0)
    cards = [card.strip() for card in gpus.split(",")]
    if not all(re.fullmatch(CARD, card, re.ASCII) for card in cards) or len(set(cards)) < len(cards):
        raise ConfigError(f"--gpus {gpus!r} must name each graphics card once, such as --gpus 0,1")
    if workers is not None and workers != len(cards):
        raise ConfigError(f"--gpus {gpus} starts {len(cards)} workers, and --workers says {workers}: leave one out")
    return list(cards)


def worker_environment(card: str | None, n_workers: int, storage: str | None) -> dict[str, str]:
    """A worker's variables: its share of the cores unless OMP_NUM_THREADS is set, its card, the storage."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = {"OMP_NUM_THREADS": str(max(1, cores // n_workers)), **os.environ}
    if card is not None:
        found["CUDA_VISIBLE_DEVICES"] = card
    if storage is not None:
        found[STORAGE] = storage
    return found


def run_workers(config: Config, out: Path, cards: Sequence[str | None], storage: str | None, say: Any = print) -> None:
    """Start the workers and wait until they end; what they say comes with their number before it.

    The first one starts alone until it is past everything that may be wrong, so that an error is told once.

    Raises:
        HydraError: what ended the last worker, when all of them ended with an error.
    """
    url = storage or config.search.storage
    check_search(config, url)
    config = for_workers(config, len(cards))
    config = without_password(config, url)
    with answering(url):
        opened = open_storage(out, url, say) if url or journal(out).exists() else None
        open_run(out, config, environment(A_WORKERS_OWN, A_WORKERS_OWN))
        opened = opened or open_storage(out, say=say)
        running: list[Worker] = []
        try:
            study = create_study(out, opened, url, Objective.parse(config.search.objective).n_values, say)
            for number, card in enumerate(cards, 1):
                running.append(Worker(number, out, worker_environment(card, len(cards), url), say))
                while number == 1 and PREPARED not in study.user_attrs and running[0].process.poll() is None:
                    time.sleep(0.2)
                if number == 1 and running[0].process.poll():
                    break
            codes = [worker.wait() for worker in running]
        finally:
            for worker in running:
                worker.ask_to_end()
            for worker in running:
                worker.wait()
            close_storage(opened)
    if codes and all(codes):
        failed = HydraError(running[-1].problem or f"the workers ended with exit codes {codes}")
        failed.code = max(max(codes), HydraError.code)
        raise failed
    for worker, code in zip(running, codes, strict=True):
        if code:
            say(f"worker {worker.number} ended with exit code {code}; the others did its work")


class Worker:
    """One local worker process, whose lines are passed on without its progress bars."""

    def __init__(self, number: int, out: Path, variables: Mapping[str, str], say: Any) -> None:
        self.number, self.say = number, say
        self.problem = ""
        command = [sys.executable, "-m", "hydra_vlm.cli", "worker", str(out)]
        self.process = subprocess.Popen(command, env=dict(variables), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert self.process.stderr is not None  # a pipe
        self._reader = threading.Thread(target=self._pass_on, args=(self.process.stderr,), daemon=True)
        self._reader.start()

    def _pass_on(self, lines: IO[bytes]) -> None:
        for line in lines:  # up to a line feed: a bar that is drawn again and again, by carriage returns, is one line
            bar, _, text = line.decode("utf-8", "replace").rstrip("\n").rpartition("\r")
            if text.startswith("error: "):
                self.problem = text.removeprefix("error: ")
            elif text.strip() and not bar:
                self.say(f"[{self.number}] {text}")
        lines.close()

    def wait(self) -> int:
        """The exit code."""
        code = self.process.wait()
        self._reader.join()
        return code

    def ask_to_end(self) -> None:
        """Where the process still runs it ends after its step; its trial goes on with the next worker."""
        if self.process.poll() is None:
            self.process.terminate()
