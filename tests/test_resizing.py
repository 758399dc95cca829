"""An update at another rank: growing is exact, shrinking the weighted optimum, moments those of the new coordinates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hydra_vlm.resizing import RIDGE, LowRank, Moments, carry_moments, resize, spectrum

D_IN, D_OUT = 12, 9


def drawn(seed: int, rank: int = 6, scale: float = 2.0) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, D_IN, generator=draw), torch.randn(D_OUT, rank, generator=draw)
    return LowRank(a.double(), b.double(), scale)


def second_moment(seed: int) -> Tensor:
    x = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(seed)).double() * torch.arange(1, D_IN + 1)
    return x.T @ x / len(x)


def root_of(metric: Tensor) -> Tensor:
    """The symmetric root of C with its ridge, by eigenvalues: another way than the code's."""
    c = torch.diag(metric) if metric.dim() == 1 else metric
    c = c + RIDGE * c.diagonal().mean() * torch.eye(len(c)).double()
    values, vectors = torch.linalg.eigh(c)
    return vectors * values.sqrt() @ vectors.T


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from(["none", "diagonal", "whole"]))
def test_shrinking_keeps_the_best_part_in_the_metric_of_the_inputs(seed: int, rank: int, kind: str) -> None:
    update, c = drawn(seed), second_moment(seed + 1)
    metric = {"none": None, "diagonal": c.diagonal(), "whole": c}[kind]
    root = torch.eye(D_IN).double() if metric is None else root_of(metric)
    small, _ = resize(update, rank, 3.0, metric)
    error = torch.linalg.matrix_norm((small.delta() - update.delta()) @ root)
    best = torch.linalg.svdvals(update.delta() @ root)
    assert small.rank == rank
    torch.testing.assert_close(error, best[rank:].norm(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(spectrum(update, metric), best[:6], rtol=1e-8, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_rows_of_a_keep_their_size(seed: int, rank: int) -> None:
    update = drawn(seed)
    small, _ = resize(update, rank, 1.0)

    def size(a: Tensor) -> Tensor:
        return a.square().sum(dim=1).mean().sqrt()

    torch.testing.assert_close(size(small.a), size(update.a))


@pytest.mark.parametrize("scale", [2.0, 0.7])
def test_growing_changes_nothing(scale: float) -> None:
    update = drawn(0)
    grown, _ = resize(update, 10, scale, fresh=torch.randn(4, D_IN).double())
    assert grown.rank == 10
    assert not grown.b[:, 6:].any()
    torch.testing.assert_close(grown.delta(), update.delta(), rtol=1e-6, atol=1e-6)


def test_grown_and_shrunk_again_it_is_the_same_update() -> None:
    update = drawn(3)
    grown, _ = resize(update, 9, 1.0, fresh=torch.randn(3, D_IN))
    back, _ = resize(grown, 6, 2.0)
    torch.testing.assert_close(back.delta(), update.delta(), rtol=1e-8, atol=1e-10)


def test_an_untrained_update_keeps_rows_of_a() -> None:
    update = LowRank(drawn(1).a, torch.zeros(D_OUT, 6).double(), 2.0)
    small, _ = resize(update, 3, 2.0)
    assert not small.b.any()
    assert torch.linalg.matrix_rank(small.a) == 3


def test_an_update_of_lower_rank_than_asked_keeps_all_of_it_and_rows_that_can_learn() -> None:
    full = drawn(2)
    update = LowRank(full.a, torch.cat([full.b[:, :2], torch.zeros(D_OUT, 4).double()], 1), 2.0)
    small, _ = resize(update, 4, 1.0)
    torch.testing.assert_close(small.delta(), update.delta())
    assert torch.linalg.matrix_rank(small.a) == 4


def test_half_precision_comes_back_in_half_precision() -> None:
    full = drawn(4)
    small, _ = resize(LowRank(full.a.bfloat16(), full.b.bfloat16(), 2.0), 3, 2.0)
    assert small.a.dtype == small.b.dtype == torch.bfloat16


@pytest.mark.parametrize(("rank", "words"), [(0, "1 is the least"), (8, "fresh rows")])
def test_what_cannot_be_resized_says_why(rank: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resize(drawn(0), rank, 1.0)


# Moments


def gradients(update: LowRank, g: Tensor) -> tuple[Tensor, Tensor]:
    """Those of A and B where dL/dΔW is g."""
    return update.scale * update.b.T @ g, update.scale * g @ update.a.T


def averages(found: list[Tensor], beta1: float = 0.9, beta2: float = 0.99) -> Moments:
    first, second = torch.zeros_like(found[0]), torch.zeros_like(found[0])
    for gradient in found:
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient.square()
    return Moments(first, second)


def moments_of(update: LowRank, seen: list[Tensor]) -> tuple[Moments, Moments]:
    a, b = zip(*(gradients(update, g) for g in seen), strict=True)
    return averages(list(a)), averages(list(b))


def axis_aligned(seed: int) -> LowRank:
    """Orthogonal rows of A and columns of B: the best part then consists of some of them, mixed with no other."""
    rows = torch.linalg.qr(drawn(seed).a.T).Q.T.contiguous()
    columns = torch.linalg.qr(drawn(seed + 1).b).Q * torch.arange(6, 0, -1)
    return LowRank(rows, columns, 2.0)


@pytest.mark.parametrize("rank", [2, 4, 6, 8])
def test_first_moments_are_those_of_a_run_in_the_new_coordinates(rank: int) -> None:
    update = drawn(5)
    new, way = resize(update, rank, 3.0, fresh=torch.zeros(2, D_IN))
    seen = [torch.randn(D_OUT, D_IN).double() for _ in range(5)]
    a, b = moments_of(update, seen)
    wanted_a, wanted_b = moments_of(new, seen)
    got_a, got_b = carry_moments(way, a, b)
    torch.testing.assert_close(got_a.first, wanted_a.first)
    torch.testing.assert_close(got_b.first, wanted_b.first)


def test_second_moments_are_those_of_a_run_in_the_new_coordinates_where_no_directions_mix() -> None:
    update = axis_aligned(6)
    new, way = resize(update, 3, 3.0)
    seen = [torch.randn(D_OUT, D_IN).double() for _ in range(5)]
    a, b = moments_of(update, seen)
    wanted_a, wanted_b = moments_of(new, seen)
    got_a, got_b = carry_moments(way, a, b)
    torch.testing.assert_close(got_a.second, wanted_a.second)
    torch.testing.assert_close(got_b.second, wanted_b.second)


def test_new_columns_of_b_step_like_the_old_ones() -> None:
    update = drawn(7)
    _, way = resize(update, 8, 2.0, fresh=torch.randn(2, D_IN))
    old = Moments(torch.randn(D_OUT, 6).double(), torch.rand(D_OUT, 6).double())
    _, b = carry_moments(way, Moments(update.a, update.a.square()), old)
    assert not b.first[:, 6:].any()
    torch.testing.assert_close(b.second[:, 6], old.second.mean(dim=1))
