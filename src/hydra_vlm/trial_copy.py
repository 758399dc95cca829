"""What a stranger's file makes a library do is tried first in a copy of this process, within bounds. No torch.

A chat template or a tokenizer is a program: it may never end, take all memory, or bring its library down. Where a
system cannot fork (Windows), the trial is left out.
"""

import os
import select
import signal
import warnings
from collections.abc import Callable

LONGEST_WAIT = 120
"""Seconds by the clock, on a machine that is busy with other things."""


def tried_in_a_copy(find: Callable[[], str], seconds: int, memory: int) -> str:
    """What `find` says is wrong ("" for nothing), found out in a copy of this process, which is ended if need be.

    The copy may take so many `seconds` of a processor, and so many bytes of `memory` beyond what this process has.
    """
    if not hasattr(os, "fork"):
        return ""
    out, into = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads; the copy runs what is tried alone
        child = os.fork()
    if not child:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries say there why they broke down
            _limit_this_process(seconds, memory)
            os.write(into, (find() or "ends").encode())
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as told:
        if not select.select([told], [], [], LONGEST_WAIT)[0]:
            os.kill(child, signal.SIGKILL)
        fault = told.read(1000).decode()  # nothing where the copy was ended
    os.waitpid(child, 0)
    return fault.removeprefix("ends") if fault else f"does not end within {seconds} seconds, or takes too much memory"


def _limit_this_process(seconds: int, memory: int) -> None:
    import resource

    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
    try:
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (OSError, ValueError):  # a system without /proc, or a lower limit already
        return
