"""What the performance models see of a rank schedule, as numbers. No torch.

Every rank r is read as log2(1 + r / R), R being the reference rank of its schedule: the budget C over the cost of rank
1 everywhere. What is not adapted is 0 and uniform LoRA at the budget 1 in every place, so that schedules of other
graphs and budgets compare; the logarithm because further rank is worth less and less (diminishing returns), and because
free ranks have a long upper tail.

Shapes: n schedules, L layers, K components, P projections, s scalars.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hydra_vlm.errors import DataError, GraphMismatchError
from hydra_vlm.graph import ComputationGraph
from hydra_vlm.profile import GradientNormProfile, require_same_graph
from hydra_vlm.schedule import RankSchedule, uniform_rank

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

SCALARS = ("used budget", "log2 reference rank", "log2 scale")
"""The numbers of a whole schedule: g / C, C in rank, and log2 of LoRA's scale at the budget's uniform rank."""

PROFILE_SCALARS = ("share by norm", "rank by norm")
"""Two more with a profile: the budget's shares and the mean of log2(1 + r / R), weighted with relative norms."""

THIRDS = ("first third", "middle third", "last third")
MOMENTS = ("depth mean", "depth spread", "rank variation", "largest rank", "not adapted", "mean rank")

NEGLIGIBLE = 0.02
"""Differences of the scalars above that are too small to matter: what rounding leaves unspent is no signal."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """n schedules as numbers, in the forms that different models read.

    `tokens` [n, L, K] is a token for each layer, holding log2(1 + r / R) of its components (0 where one is not adapted
    or does not exist), and `ranks` [n, P] the same in a row. `norms` [L, K], with a profile, are gradient norms over
    their mean. `scalars` [n, s] are SCALARS, PROFILE_SCALARS with a profile, then `n_extras` extras. `features` [n, f]
    are sums that a person would look at, named by `feature_names`. `groups` [n] are equal where the schedule is.
    """

    tokens: FloatArray
    ranks: FloatArray
    norms: FloatArray | None
    scalars: FloatArray
    n_extras: int
    features: FloatArray
    groups: IntArray

    @property
    def flat(self) -> FloatArray:
        """Ranks and scalars in one vector, [n, P + s]."""
        return np.hstack([self.ranks, self.scalars])


def encode(
    schedules: Sequence[RankSchedule],
    profile: GradientNormProfile | None = None,
    extras: npt.ArrayLike | None = None,
) -> Encoded:
    """Schedules of one graph as numbers; `extras` [n, k] (or [n]) are further numbers known of each.

    Extras may be the early training loss of the run or the logarithm of its learning rate.

    Raises DataError without schedules or when extras do not fit, GraphMismatchError when graphs differ.
    """
    graph = require_one_graph(schedules)
    further = check_extras(extras, len(schedules))
    absolute = np.array([schedule.ranks for schedule in schedules], dtype=np.float64)
    costs = np.array(graph.costs, dtype=np.float64)
    budgets = np.array([schedule.budget for schedule in schedules], dtype=np.float64)
    shares = absolute * costs / budgets[:, None]
    relative = np.log2(1 + absolute * graph.cost / budgets[:, None])

    columns = [shares.sum(axis=1), np.log2(budgets / graph.cost), np.array([_log2_scale(s) for s in schedules])]
    norms = None
    if profile is not None:
        require_same_graph(profile, graph)
        weights = np.array(profile.norms) / (np.mean(profile.norms) or 1.0)
        norms = _by_layer(weights[None], graph)[0]
        columns += [shares @ weights, relative @ weights / len(weights)]
    return Encoded(
        tokens=_by_layer(relative, graph),
        ranks=relative,
        norms=norms,
        scalars=np.hstack([np.column_stack(columns), further]),
        n_extras=further.shape[1],
        features=np.hstack([_sums(graph, shares, relative), np.column_stack(columns), further]),
        groups=distinct(schedules),
    )


def feature_names(graph: ComputationGraph, profile: bool = False, n_extras: int = 0) -> tuple[str, ...]:
    """Names of `Encoded.features`, in their order.

    Shares are of the budget; depth runs from 0 (first layer of a part) to 1 (last); ranks are log2(1 + r / R).
    """
    shares = (*graph.components, *THIRDS)
    extras = (f"extra {i + 1}" for i in range(n_extras))
    return (
        *(f"share of {name}" for name in shares),
        *MOMENTS,
        *SCALARS,
        *(PROFILE_SCALARS if profile else ()),
        *extras,
    )


def distinct(schedules: Sequence[RankSchedule]) -> IntArray:
    """[n] numbers from 0, in order of appearance, equal for schedules with equal ranks and scaling rule."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault((s.ranks, s.scaling), len(numbers)) for s in schedules], dtype=np.int64)


def validation_rows(groups: IntArray, members: int, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """[m, n] booleans: each member's own validation rows, about `share` of the distinct schedules and at least one.

    All rows of one schedule are on the same side.
    """
    draw = np.random.default_rng(seed)
    names = np.unique(groups)
    count = min(max(1, round(share * len(names))), len(names) - 1)
    return np.stack([np.isin(groups, draw.permutation(names)[:count]) for _ in range(members)])


def require_one_graph(schedules: Sequence[RankSchedule]) -> ComputationGraph:
    """The schedules' graph; raises DataError when there are none, GraphMismatchError when their graphs differ."""
    if not schedules:
        raise DataError("a performance model needs schedules, got none.")
    graph = schedules[0].graph
    for schedule in schedules:
        difference = None if schedule.graph is graph else schedule.graph.difference(graph)
        if difference is not None:
            raise GraphMismatchError(
                f"schedules {schedules[0].name!r} and {schedule.name!r} are of different models: the latter has "
                f"{difference}. A performance model serves one graph: fit one for each."
            )
    return graph


def check_extras(extras: npt.ArrayLike | None, n: int) -> FloatArray:
    """Extras as [n, k] float64, k = 0 without any; raises DataError unless they are finite and one row a schedule."""
    if extras is None:
        return np.zeros((n, 0))
    values = np.asarray(extras, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or len(values) != n:
        raise DataError(f"extras of shape {values.shape} do not fit {n} schedules: give [{n}] or [{n}, k] numbers.")
    if not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0, 0])
        raise DataError(f"the extras of schedule {row + 1} are not finite: leave the schedule out or measure them.")
    return values


def _by_layer(values: FloatArray, graph: ComputationGraph) -> FloatArray:
    """[n, P] as [n, L, K], 0 where a layer lacks the component."""
    column = {component: k for k, component in enumerate(graph.components)}
    layers = np.zeros((len(values), graph.n_layers, len(column)))
    layers[:, [p.layer for p in graph.projections], [column[p.component] for p in graph.projections]] = values
    return layers


def _log2_scale(schedule: RankSchedule) -> float:
    # At one rank, so that what follows from the ranks alone is no second account of them.
    return math.log2(schedule.scaling.scale(uniform_rank(schedule.graph, schedule.budget)))


def _sums(graph: ComputationGraph, shares: FloatArray, relative: FloatArray) -> FloatArray:
    """Shares by component and by thirds of depth, then MOMENTS, [n, K + 3 + 6]."""
    depth = np.array([graph.depth(p.layer) for p in graph.projections])
    third = np.minimum((3 * depth).astype(np.int64), 2)
    names = np.array([p.component for p in graph.projections])
    groups = [names == component for component in graph.components] + [third == i for i in range(3)]
    spent = np.maximum(shares.sum(axis=1), 1e-12)
    mean_depth = shares @ depth / spent
    depth_variance = np.maximum(shares @ depth**2 / spent - mean_depth**2, 0.0)
    moments = [
        mean_depth,
        np.sqrt(depth_variance),
        relative.std(axis=1),
        relative.max(axis=1),
        (relative == 0).mean(axis=1),
        relative.mean(axis=1),
    ]
    return np.column_stack([*(shares[:, group].sum(axis=1) for group in groups), *moments])


@dataclass(frozen=True, eq=False)
class InputScaling:
    """Puts ranks and scalars at mean 0 and about unit size, as on the schedules that it was made `of`.

    Ranks keep their proportions: one factor for all of them, so that a rank that hardly varies is not blown up. A
    scalar that did not vary becomes 0 whatever its value, since nothing is known of its effect.
    """

    tokens_at: FloatArray
    ranks_at: FloatArray
    rank_factor: float
    scalars_at: FloatArray
    scalar_factors: FloatArray

    @classmethod
    def of(cls, encoded: Encoded) -> "InputScaling":
        """The scaling that standardises these schedules."""
        spread = float(np.sqrt(encoded.ranks.var(axis=0).mean()))
        size = encoded.scalars.std(axis=0)
        least = np.full(len(size), NEGLIGIBLE)
        least[len(size) - encoded.n_extras :] = 0.0  # an extra's unit is not known
        varies = size > 1e-9 * (1 + np.abs(encoded.scalars).max(axis=0))
        factors = np.where(varies, 1 / np.where(varies, np.maximum(size, least), 1.0), 0.0)
        return cls(
            tokens_at=encoded.tokens.mean(axis=0),
            ranks_at=encoded.ranks.mean(axis=0),
            rank_factor=1 / spread if spread > 1e-9 else 1.0,
            scalars_at=encoded.scalars.mean(axis=0),
            scalar_factors=factors,
        )

    def tokens(self, encoded: Encoded) -> FloatArray:
        """Scaled ranks by layer, [n, L, K]; with a profile the norms less 1 follow, [n, L, 2K]."""
        scaled = (encoded.tokens - self.tokens_at) * self.rank_factor
        if encoded.norms is None:
            return scaled
        return np.concatenate([scaled, np.broadcast_to(encoded.norms - 1, scaled.shape)], axis=2)

    def scalars(self, encoded: Encoded) -> FloatArray:
        """Scaled scalars, [n, s]."""
        return (encoded.scalars - self.scalars_at) * self.scalar_factors

    def flat(self, encoded: Encoded) -> FloatArray:
        """Scaled ranks and scalars in one vector, [n, P + s]."""
        return np.hstack([(encoded.ranks - self.ranks_at) * self.rank_factor, self.scalars(encoded)])
