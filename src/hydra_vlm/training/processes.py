"""What the processes of one training run must agree on; with a single process all of it is for nothing."""

from typing import Any

import torch
from torch import distributed


def several() -> bool:
    """Whether several processes train together."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up in any process, so that all of them do the same."""
    if not several():
        return flag
    shared = torch.tensor(int(flag), device=device)
    distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
    return bool(shared)


def from_all_processes(value: Any) -> list[Any]:
    """Every process's value, by rank."""
    if not several():
        return [value]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found
