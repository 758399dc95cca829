"""Where a model's weights lie: mapped from a file they begin wherever the file has them, else where torch wants."""

import torch
from torch import Tensor, nn

LINE = 64
"""Bytes of a cache line; torch's own allocations begin at a multiple."""


def move(model: nn.Module, behind: int) -> None:
    """Put each weight into memory of its own, `behind` bytes behind a multiple of 64; ties stay tied.

    Weights that are not floating point (a base in four bits) stay.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.numel():
            tensor.data = moved(tensor.data, behind)


def moved(tensor: Tensor, behind: int) -> Tensor:
    """A contiguous copy that begins `behind` bytes behind a multiple of 64."""
    size = tensor.element_size()
    room = torch.empty(tensor.numel() + (2 * LINE) // size, dtype=tensor.dtype, device=tensor.device)
    first = ((behind - room.data_ptr()) % LINE) // size
    copy = room[first : first + tensor.numel()].view(tensor.shape)
    copy.copy_(tensor)
    assert copy.data_ptr() % LINE == behind
    return copy
