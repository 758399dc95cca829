"""The same LoRA update at another rank: (A, B, scale) becomes (A', B', scale'), and an optimizer's moments go along.

Growing adds rows to A and columns of zeros to B, so the update stays what it was. Shrinking keeps the best part of the
wished rank, in the metric of what the layer reads: with C the second moment of its inputs, the error is
E|(s B A - s' B' A') x|², the Frobenius norm of (s B A - s' B' A') C^½. All of it goes through two QR decompositions and
the SVD of an r × r matrix.

Symbols: r and k the rank before and after, d_in and d_out the layer's features, s and s' the scales,
A [r, d_in], B [d_out, r].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 0.01
"""Share of C's mean diagonal that is added to it: directions that the inputs seen so far lack still count a little."""

NEGLIGIBLE = 1e-7
"""Singular values below this share of the largest one carry nothing: B may still be zero, or of lower rank."""


@dataclass(frozen=True)
class LowRank:
    """An update ΔW = scale · b @ a; `a` [r, d_in], `b` [d_out, r]."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def delta(self) -> Tensor:
        """ΔW [d_out, d_in]."""
        return self.scale * self.b @ self.a


@dataclass(frozen=True)
class Coordinates:
    """How an update was written anew: b' = b @ left and a' = right @ a (plus new rows, where it grew).

    `left` [r, k], `right` [k, r]; `ratio` is scale' / scale.
    """

    left: Tensor
    right: Tensor
    ratio: float


@dataclass(frozen=True)
class Moments:
    """Adam's averages of a tensor's gradient and of its square, of the tensor's shape."""

    first: Tensor
    second: Tensor


def resize(
    update: LowRank,
    rank: int,
    scale: float,
    metric: Tensor | None = None,
    fresh: Tensor | None = None,
    in_order: bool = False,
) -> tuple[LowRank, Coordinates]:
    """The update at another rank and scale, in its own dtype, and how to get there.

    `metric` is C, as a matrix [d_in, d_in] or its diagonal [d_in]; None counts all inputs alike. `fresh` holds the rows
    [k - r or more, d_in] that A gets when it grows. The root mean square of A's row norms stays what it was when it
    shrinks. `in_order`: its directions stand from the one that carries most to that which carries least, also where the
    rank stays; where it shrinks they always do.

    Raises ValueError for a rank below 1, or when it grows without enough fresh rows.
    """
    if rank < 1:
        raise ValueError(f"an update cannot be resized to rank {rank}: 1 is the least.")
    anew = rank < update.rank or (in_order and rank == update.rank)
    way = _shrunk(update, rank, scale, metric) if anew else _grown(update, rank, scale)
    new = max(0, rank - update.rank)
    if new and (fresh is None or len(fresh) < new):
        raise ValueError(f"growing from rank {update.rank} to {rank} needs {new} fresh rows for A.")
    a = (way.right @ update.a.to(way.right)).to(update.a)
    if new and fresh is not None:
        a[update.rank :] = fresh[:new].to(a)
    return LowRank(a, (update.b.to(way.left) @ way.left).to(update.b), scale), way


def carry_moments(way: Coordinates, a: Moments, b: Moments) -> tuple[Moments, Moments]:
    """Adam's moments of A and B in the new coordinates; the number of steps taken stays.

    With G = dL/dΔW the gradients are s BᵀG and s G Aᵀ, so those of a' and b' are ratio · leftᵀ · (of a) and
    ratio · (of b) · rightᵀ. First moments follow exactly. Squares do so where `left` and `right` mix no directions, and
    are else what they would be if the mixed gradients were uncorrelated. A new column of B, whose gradients nobody has
    seen, gets the mean square of the others.
    """
    left, right = way.left.T * way.ratio, way.right.T * way.ratio
    new_a = Moments(_times(left, a.first), _times(left.square(), a.second))
    new_b = Moments(_times(b.first, right), _times(b.second, right.square()))
    unseen = ~right.any(dim=0)
    if unseen.any() and not unseen.all():
        new_b.second[:, unseen] = new_b.second[:, ~unseen].mean(dim=1, keepdim=True)
    return new_a, new_b


def spectrum(update: LowRank, metric: Tensor | None = None) -> Tensor:
    """The singular values of ΔW C^½ [r], largest first, in float64: what each further rank is worth."""
    r_a, r_b = _triangles(update, metric)
    return update.scale * torch.linalg.svdvals(r_b @ r_a.T)


def _grown(update: LowRank, rank: int, scale: float) -> Coordinates:
    same = torch.eye(update.rank, rank, dtype=torch.float64, device=update.a.device)
    return Coordinates(same * (update.scale / scale), same.T.clone(), scale / update.scale)


def _shrunk(update: LowRank, rank: int, scale: float, metric: Tensor | None) -> Coordinates:
    """B = Q_B R_B, (A C^½)ᵀ = Q_A R_A, R_B R_Aᵀ = U Σ Vᵀ; the best part is Q_B U_k Σ_k V_kᵀ Q_Aᵀ.

    R_B⁻¹ U Σ^½ and Σ^½ Vᵀ R_A⁻ᵀ, which take B and A there, are R_Aᵀ V Σ^-½ and Σ^-½ Uᵀ R_B: no inverse is needed.
    """
    r_a, r_b = _triangles(update, metric)
    u, sigma, vt = torch.linalg.svd(r_b @ r_a.T)
    u, sigma, vt = u[:, :rank], sigma[:rank], vt[:rank]
    carries = sigma > NEGLIGIBLE * sigma[0]
    root = torch.where(carries, sigma, 1).rsqrt() * carries
    left, right = r_a.T @ vt.T * root, root[:, None] * (u.T @ r_b)
    if not carries.all():  # B has zeros there, and A what the other rows lack
        right[~carries] = torch.linalg.lstsq(r_a, vt[~carries].T).solution.T
    a = update.a.to(right)
    wanted, rows = _root_mean_square(a), right @ a
    f = torch.ones_like(sigma)
    f[carries] = wanted / _root_mean_square(rows[carries])
    f[~carries] = wanted / torch.linalg.vector_norm(rows[~carries], dim=1)
    return Coordinates(left * (update.scale / scale / f), f[:, None] * right, scale / update.scale)


def _triangles(update: LowRank, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """R_A and R_B [r, r], in float64."""
    a, b = update.a.double(), update.b.double()
    if metric is not None:
        c = metric.double()
        diagonal = c if c.dim() == 1 else c.diagonal()
        ridge = RIDGE * diagonal.mean()
        a = a * (c + ridge).sqrt() if c.dim() == 1 else a @ torch.linalg.cholesky(c + ridge * torch.eye(len(c)).to(c))
    return _triangle(a.T), _triangle(b)


def _triangle(tall: Tensor) -> Tensor:
    """R [r, r] of the QR decomposition of a matrix [d, r], padded with zeros where d < r."""
    r = torch.linalg.qr(tall, mode="r").R
    return torch.nn.functional.pad(r, (0, 0, 0, r.shape[1] - r.shape[0]))


def _root_mean_square(rows: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(rows) / len(rows) ** 0.5


def _times(x: Tensor, y: Tensor) -> Tensor:
    dtype = x.dtype if x.dtype != torch.float64 else y.dtype
    return (x.double() @ y.double()).to(dtype)
