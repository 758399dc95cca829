"""The processes of one job, one for each device: who writes, and how the others learn of it.

`torchrun` and `accelerate launch` start the same command once for each device. All processes train together, the first
one alone writes files and prints. Whatever depends on files is therefore asked of the first (`by_first`), or done by
the first before the others (`in_turn`); a failure there ends all. torch is imported only where there are several.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any, TypeVar

from hydra_vlm.errors import ConfigError

T = TypeVar("T")

FAILED = 2
"""The exit code of a command that was told of an error which the user can put right."""

_PATIENCE = timedelta(days=30)
"""How long processes wait for the first one, which may be encoding images or answering a benchmark."""

_LAST_WORDS = 10.0
"""Seconds that the others stay when the first fails, so that the launcher does not end it before its message is out."""

_group: Any = None


def count() -> int:
    """How many processes this job has."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return count() == 1 or os.environ["RANK"] == "0"


def shards_model() -> bool:
    """Whether the launcher asked for FSDP or DeepSpeed, which take a model apart."""
    return count() > 1 and (uses_deepspeed() or _asked("ACCELERATE_USE_FSDP"))


def uses_deepspeed() -> bool:
    """Whether the launcher asked for DeepSpeed."""
    return count() > 1 and _asked("ACCELERATE_USE_DEEPSPEED")


def join(device: str) -> None:
    """Meet the other processes of this job, if there are any; `device` is the configuration's.

    Raises:
        ConfigError: a device by number, a form of sharding that is not supported, or DeepSpeed is not installed.
    """
    global _group
    if count() == 1 or _group is not None:
        return
    _require_supported(device)
    from accelerate import PartialState
    from torch import distributed

    try:
        PartialState(cpu=device == "cpu")
    except ImportError as problem:
        raise ConfigError(f"the launcher asked for what is not installed: {problem}") from None
    _group = distributed.new_group(backend="gloo", timeout=_PATIENCE)


def _require_supported(device: str) -> None:
    if ":" in device:
        raise ConfigError(
            f"device {device!r} names one device for {count()} processes: set it to auto, each process takes its own"
        )
    if not _asked("ACCELERATE_USE_FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("the launcher asked for FSDP version 1: set fsdp_version: 2 in its configuration file")
    if _asked("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ConfigError(
            "fsdp_cpu_ram_efficient_loading leaves all processes but the first without weights: set it to false in the "
            "launcher's configuration file"
        )


def leave() -> None:
    """Part from the other processes at the end of a command."""
    global _group
    if _group is not None:
        from torch import distributed

        _group = None
        distributed.destroy_process_group()


@contextmanager
def one_voice() -> Iterator[None]:
    """What processes other than the first print as results goes nowhere; at the end, they part."""
    with ExitStack() as stack:
        if not is_first():
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        try:
            yield
        except SystemExit as end:
            if end.code:
                raise
            leave()
            raise


def require_shared(words: Sequence[str], shared: Sequence[str]) -> None:
    """Raises ConfigError where several processes were started for a command that is not made for it."""
    if count() > 1 and (not words or words[0] not in shared):
        raise ConfigError(
            f"{words[0] if words else 'no command'!r} was started as {count()} processes: only {', '.join(shared)} "
            "share their work among processes, start others without a launcher"
        )


def by_first(work: Callable[[], T]) -> T:
    """What `work` returns in the first process, given to all; the others wait. Its failure ends all."""
    return _told(work, give=True)


def in_turn(work: Callable[[], T]) -> T:
    """`work` done by the first process, then by each of the others, which find the files that it wrote."""
    done = _told(work, give=False)
    return done if is_first() else work()


def _told(work: Callable[[], T], give: bool) -> T:
    if _group is None:
        return work()
    from torch import distributed

    told: list[Any] = [None]  # (what was returned,), or None where the work failed
    try:
        if is_first():
            done = work()
            told = [(done if give else None,)]
    finally:
        distributed.broadcast_object_list(told, src=0, group=_group)
    if is_first():
        return done
    if told[0] is None:
        time.sleep(_LAST_WORDS)
        sys.exit(FAILED)
    given: T = told[0][0]
    return given


def is_first_to_say(message: str) -> bool:
    """Whether no other process of this job has said this: an error that all meet is printed once."""
    if count() == 1:
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=10))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"hydra-vlm {attempt} {hashlib.sha256(message.encode()).hexdigest()}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


def _asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")
