"""How equal two computed results have to be, in one place.

Equal numbers give equal results to the bit where the same operations run in the same order: on one processor, with the
same number of threads, over weights that lie in memory alike. A kernel chooses its order of sums by all three (MKL's
product with a single row asks whether a weight matrix begins at a multiple of 16 bytes), so bits are compared only
where a test says why they can be. Everything else is compared with a tolerance from here.
"""

import torch
from torch import Tensor

SUMS = 1e-5
"""Float32 results that differ in the order of sums alone: largest difference, as a share of the largest value.

A sum of n terms is off by about sqrt(n) times 6e-8 of its largest; the widest sum here has some hundred terms and a
result has passed through some ten of them.
"""

ROWS = 1e-4
"""The same for rows that are computed alone or among others, padded and masked: further sums are another's."""

LOSS, WEIGHT, NORM = 5e-6, 1e-4, 1e-5
"""Largest differences after some steps of training by one process or two: of losses, of a trained weight, of norms
(relative).

AdamW divides by a gradient's own size, so where that is next to nothing its rounding error is seen: one weight in
thousands may differ by a hundredth of a step (learning rate 4e-3). On average they may differ by a hundredth of that.
"""


def assert_same_sums(found: Tensor, expected: Tensor, tolerance: float = SUMS) -> None:
    """Equal in shape, dtype and, but for the order of sums, in value."""
    assert bool(expected.isfinite().all())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())
