"""Who decides the ranks at which a wider adapter ends: four rules behind one signature. No torch.

    uniform   the budget's uniform rank
    spectral  rank by rank to the direction that carries most for its parameters
    hydra     stages and fine ranks from the gradient norms seen so far (Eq. 5-10)
    phi       candidates are probed by forward passes alone; Φ learns from the probes and proposes better ones

A probe is the validation loss of the wide adapter cut to a schedule, without further training.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from hydra_vlm.allocation import AllocationRequest, allocate
from hydra_vlm.errors import BudgetError, ConfigError, StageError
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.search.objective import Objective
from hydra_vlm.search.phi import DEFAULT, Observation, propose
from hydra_vlm.search.proposals import repair as into_space
from hydra_vlm.search.space import Candidate, Space
from hydra_vlm.spending import Worth, fill, repair

Probe = Callable[[RankSchedule], float]
"""The validation loss of the adapter cut to these ranks."""

PROBES = 24
"""Schedules that `phi` probes: uniform, spectral and HyDRA's own among them."""


@dataclass(frozen=True)
class Evidence:
    """What is known when ranks are decided.

    `request` holds graph, budget, scaling and the gradient norms so far. `spectra` has, for each projection, the
    singular values of its update in the metric of its inputs, largest first, as many as its rank is now.

    Raises ConfigError unless there is a spectrum for each projection, from the largest value on.
    """

    request: AllocationRequest
    spectra: tuple[tuple[float, ...], ...]
    seed: int = 0
    probes: int = PROBES

    def __post_init__(self) -> None:
        if len(self.spectra) != len(self.request.graph.projections):
            raise ConfigError(
                f"{len(self.spectra)} spectra for {len(self.request.graph.projections)} projections: one each is needed"
            )
        if any(list(found) != sorted(found, reverse=True) for found in self.spectra):
            raise ConfigError("a spectrum lists singular values from the largest to the smallest.")

    @property
    def widest(self) -> tuple[int, ...]:
        """The ranks now: no decision exceeds them, and where there is none there stays none."""
        return tuple(map(len, self.spectra))


@dataclass(frozen=True)
class Decision:
    """The schedule that was decided on, and what was probed on the way: ranks and loss, in order."""

    schedule: RankSchedule
    probed: tuple[tuple[tuple[int, ...], float], ...] = ()


Decider = Callable[[Evidence, Probe], Decision]


def uniform(evidence: Evidence, probe: Probe) -> Decision:
    """The same rank everywhere, and no more than what a projection has; what that leaves raises it for the others."""
    return Decision(_level(evidence))


def spectral(evidence: Evidence, probe: Probe) -> Decision:
    """From rank 1 up, each further rank to the singular value with the largest square per parameter."""
    return Decision(_by_spectra(evidence))


def hydra(evidence: Evidence, probe: Probe) -> Decision:
    """The fine schedule of the gradient norms seen so far, cut to the ranks that there are."""
    return Decision(_within(evidence, _staged(evidence.request)))


def phi(evidence: Evidence, probe: Probe) -> Decision:
    """The best of the probed schedules: the other deciders' first, then those that Φ proposes."""
    request = evidence.request
    space = Space(request.graph, request.budget, request.profile, open=True, scaling=request.scaling)
    seen: list[Observation] = []
    first = [_level(evidence), _by_spectra(evidence)]
    if request.profile is not None:
        first.append(_within(evidence, _staged(request)))
    waiting = [into_space(space, schedule.ranks) for schedule in first]
    while len(seen) < evidence.probes:
        known = {one.candidate.key for one in seen}
        waiting = [one for one in waiting if one.key not in known]
        asked = waiting[0] if waiting else propose(space, seen, (), LOSS, None, SETTINGS, evidence.seed + len(seen))
        seen.append(_probed(evidence, probe, asked))
    best = min(seen, key=lambda one: one.loss)
    ranks = tuple((_cut(evidence, one.candidate).ranks, one.loss) for one in seen)
    return Decision(_cut(evidence, best.candidate), ranks)


LOSS = Objective("loss")
SETTINGS = replace(DEFAULT, n_startup=6)

DECIDERS: Mapping[str, Decider] = {"uniform": uniform, "spectral": spectral, "hydra": hydra, "phi": phi}


def _probed(evidence: Evidence, probe: Probe, asked: Candidate) -> Observation:
    return Observation(asked, {}, probe(_cut(evidence, asked)))


def _cut(evidence: Evidence, asked: Candidate) -> RankSchedule:
    return _within(evidence, replace(asked.schedule, name="phi"))


def _level(evidence: Evidence) -> RankSchedule:
    request = evidence.request

    def ranks(level: int) -> tuple[int, ...]:
        return tuple(min(level, most) for most in evidence.widest)

    affordable = bisect_right(
        range(1, max(evidence.widest) + 1),
        request.budget.parameters,
        key=lambda level: request.graph.parameters(ranks(level)),
    )
    return request.schedule("uniform", ranks(max(1, affordable)))


def _by_spectra(evidence: Evidence) -> RankSchedule:
    request, worth = evidence.request, _worth(evidence)
    ones = [min(1, most) for most in evidence.widest]
    ranks = fill(ones, request.graph, request.budget.parameters, worth, most=evidence.widest)
    return request.schedule("spectral", ranks)


def _staged(request: AllocationRequest) -> RankSchedule:
    """Fine ranks of as many stages as were asked for, or as the budget can keep apart; the schedule names them."""
    for stages in range(request.n_stages, 1, -1):
        with suppress(BudgetError, StageError):
            return allocate("fine", replace(request, n_stages=stages))
    return allocate("fine", replace(request, n_stages=1))


def _within(evidence: Evidence, schedule: RankSchedule) -> RankSchedule:
    """The schedule with no rank below 1 or above what there is; what is then left goes where the spectra say."""
    request, worth = evidence.request, _worth(evidence)
    clipped = [min(max(rank, 1), most) for rank, most in zip(schedule.ranks, evidence.widest, strict=True)]
    graph, parameters = request.graph, request.budget.parameters
    ranks = fill(repair(clipped, graph, parameters, worth), graph, parameters, worth, most=evidence.widest)
    return replace(schedule, ranks=ranks)


def _worth(evidence: Evidence) -> Worth:
    """The square of the singular value that the r-th rank keeps, per parameter."""
    costs = evidence.request.graph.costs

    def worth(position: int, rank: int) -> float:
        found = evidence.spectra[position]
        return found[rank - 1] ** 2 / costs[position] if 1 <= rank <= len(found) else 0.0

    return worth
