"""Which schedules RankBench tries, and in which order they run. Pure: everything follows from the seed.

First come schedules that are made by rule: uniform, HyDRA's and their rivals; then draws from the closed and the open
space in turn. A longer plan starts with the shorter one, so a table can be extended without losing what it has.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from hydra_vlm.allocation import ALLOCATORS, TABLE_VI, AllocationRequest, Budget, FineRule
from hydra_vlm.errors import BudgetError, ConfigError
from hydra_vlm.graph import ComputationGraph
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.rankbench.entry import SCALING, Entry, SpaceName, closed_space, open_space
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.search.membership import adopt
from hydra_vlm.search.proposals import mutate, repair, sample, scatter
from hydra_vlm.search.space import Candidate, Space

ENTRIES = 160
"""How many schedules a plan has unless asked otherwise."""

FIRST = 64
"""So many run first, with one seed; of every four of them three then run with a second seed."""

SECOND = 128
"""So many have run before any schedule beyond them does."""

UNIFORM_SEEDS = 8
"""The baseline that all gains are relative to has so many seeds."""

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj"}
TRIES = 1000


def plan(
    graph: ComputationGraph, budget: Budget, profile: GradientNormProfile, seed: int = 0, n: int = ENTRIES
) -> list[Entry]:
    """`n` entries with distinct ranks and g(G, Z) <= C, numbered from "z000", uniform first.

    Raises ConfigError where the spaces do not hold so many schedules.
    """
    spaces: dict[SpaceName, Space] = {
        "closed": closed_space(graph, budget, profile),
        "open": open_space(graph, budget, profile),
    }
    found: list[Entry] = []
    taken: set[tuple[int, ...]] = set()
    for origin, name, schedule in _by_rule(spaces["open"]):
        if schedule.ranks not in taken and len(found) < n:
            taken.add(schedule.ranks)
            found.append(_entry(spaces, len(found), origin, name, schedule))
    while len(found) < n:
        entry = _drawn(spaces, found, taken, seed)
        taken.add(entry.ranks)
        found.append(entry)
    return found


def runs(entries: Sequence[Entry], seeds: int = 2) -> list[tuple[str, int]]:
    """(entry id, training seed) in the order to run them; every entry has `seeds` seeds, uniform UNIFORM_SEEDS.

    A table is of use from early on: seed 0 of the first 64 entries, a second seed of 48 of them and three more of
    uniform, seed 0 of the next 64, all second seeds, then further entries and seeds.
    """
    ids = [entry.id for entry in entries]
    first, second, rest = ids[:FIRST], ids[FIRST:SECOND], ids[SECOND:]
    order = [(name, 0) for name in first]
    order += [(name, 1) for at, name in enumerate(first) if at % 4 != 3]
    order += [(name, seed) for name in ids[:1] for seed in (2, 3, 4)]
    order += [(name, 0) for name in second]
    order += [(name, 1) for name in (*second, *first)]
    order += [(name, seed) for name in ids[:1] for seed in range(UNIFORM_SEEDS)]
    order += [(name, 0) for name in rest]
    order += [(name, seed) for seed in range(1, seeds) for name in ids]
    return list(dict.fromkeys(run for run in order if run[1] < seeds or run[0] == ids[0]))


def _entry(spaces: dict[SpaceName, Space], number: int, origin: str, name: str, schedule: RankSchedule) -> Entry:
    """Closed where the closed space holds it, else open."""
    for space in ("closed", "open"):
        found = adopt(spaces[space], schedule)
        if found is not None:
            return Entry(f"z{number:03}", origin, name, space, found.schedule.ranks, found.choices)
    raise ConfigError(f"{schedule!r} ({name}) is in neither space: it leaves budget unspent, so spend it.")


# By rule


def _by_rule(space: Space) -> Iterator[tuple[str, str, RankSchedule]]:
    """(origin, name, schedule), uniform first; some may be equal."""
    graph, budget, profile = space.graph, space.budget, space.profile
    most = len(set(profile.layer_norms())) if profile is not None else 1
    high = max(2, budget.rank)
    base = partial(AllocationRequest, graph, budget, profile, scaling=SCALING)
    yield "uniform", "uniform", ALLOCATORS["uniform"](base())
    counts = [n for n in (2, 3, 4) if n <= most]
    asked: list[tuple[str, int, int, int, FineRule]]
    asked = [("coarse", n, delta, 1, "paper") for delta in sorted({1, 2, high}) for n in counts]
    asked += [("fine", min(3, most), 2, setting, "paper") for setting in TABLE_VI]
    asked += [("fine", n, high, 1, "paper") for n in counts[:1]]
    asked += [("fine", n, delta, 1, "profile") for delta in sorted({1, 2, high}) for n in counts[:2]]
    asked += [("decreasing", n, delta, 1, "paper") for delta in (2, high) for n in counts[:2]]
    for allocator, n, delta, setting, rule in asked:
        request = base(n_stages=n, delta=delta, setting=setting, rule=rule)
        try:
            made = ALLOCATORS[allocator](request)
        except BudgetError:
            continue  # so many stages do not fit so small a budget
        origin = "rival" if allocator == "decreasing" else allocator
        yield origin, f"{made.name}, {n} stages, delta {made.delta or delta}", made
    for name in ("linear", "exponential", "random"):
        yield "rival", name, ALLOCATORS[name](base())
    for name, weights in _hand_made(space):
        yield "rival", name, repair(space, weights).schedule


def _hand_made(space: Space) -> Iterator[tuple[str, list[int]]]:
    """Name -> weights of projections, 0 for those left out; those that leave out all or nothing are skipped."""
    graph, profile = space.graph, space.profile
    layers, last = graph.n_layers, graph.n_layers - 1
    norms = profile.layer_norms() if profile is not None else tuple(map(float, range(layers)))
    by_norm = sorted(range(layers), key=lambda layer: (norms[layer], layer))
    high, low = set(by_norm[layers // 2 :]), set(by_norm[: layers // 2])
    heavy = max(1, last)
    rules: dict[str, Callable[[int, str], int]] = {
        "attention only": lambda layer, c: c in ATTENTION,
        "feed-forward only": lambda layer, c: c not in ATTENTION,
        "first half": lambda layer, c: layer < layers / 2,
        "second half": lambda layer, c: layer >= layers / 2,
        "middle half": lambda layer, c: layers / 4 <= layer < 3 * layers / 4,
        "first and last quarter": lambda layer, c: not layers / 4 <= layer < 3 * layers / 4,
        "half of the budget in the last layer": lambda layer, c: heavy if layer == last else 1,
        "half of the budget in the first layer": lambda layer, c: heavy if layer == 0 else 1,
        "query and value only": lambda layer, c: c in ("q_proj", "v_proj"),
        "value and output only": lambda layer, c: c in ("v_proj", "o_proj"),
        "up and down only": lambda layer, c: c in ("up_proj", "down_proj"),
        "every second layer": lambda layer, c: layer % 2,
        "half of the layers, highest norm": lambda layer, c: layer in high,
        "half of the layers, lowest norm": lambda layer, c: layer in low,
        "last quarter": lambda layer, c: layer >= 3 * layers / 4,
    }
    for name, rule in rules.items():
        weights = [int(rule(p.layer, p.component.rsplit(".", 1)[-1])) for p in graph.projections]
        if len(set(weights)) > 1:
            yield name, weights
    if profile is not None and max(profile.norms) > 0:
        yield "in proportion to norm", [round(1000 * norm / max(profile.norms)) for norm in profile.norms]
        pairs = zip(profile.norms, graph.costs, strict=True)
        worth = [norm / cost for norm, cost in pairs]
        yield "in proportion to norm per parameter", [round(1000 * value / max(worth)) for value in worth]


# By draw


KINDS: tuple[tuple[SpaceName, str], ...] = (
    ("closed", "scattered"),
    ("open", "scattered"),
    ("closed", "sampled"),
    ("open", "mutated"),
    ("closed", "scattered"),
    ("open", "scattered"),
    ("closed", "mutated"),
    ("open", "sampled"),
)
"""The space and kind of draw, in turn."""


def _drawn(spaces: dict[SpaceName, Space], earlier: Sequence[Entry], taken: set[tuple[int, ...]], seed: int) -> Entry:
    """The next entry, from the seed, its number and the entries before."""
    number = len(earlier)
    name, kind = KINDS[number % len(KINDS)]
    digest = hashlib.sha256(f"rankbench {seed} {number}".encode()).digest()
    draw = random.Random(int.from_bytes(digest, "big"))
    for _ in range(TRIES):
        found, label = _draw_one(spaces[name], name, kind, earlier, draw)
        if found.schedule.ranks not in taken and not _single_stage(found):
            return _entry(spaces, number, name, label, found.schedule)
    raise ConfigError(
        f"no further distinct schedule is found after {number} of them: the space of this budget is too small; raise "
        "the budget, or ask for fewer entries."
    )


def _single_stage(found: Candidate) -> bool:
    """One stage only: most of the closed space is, and says nothing on where rank belongs."""
    return found.values.get("n_stages") == 1


def _draw_one(
    space: Space, name: SpaceName, kind: str, earlier: Sequence[Entry], draw: random.Random
) -> tuple[Candidate, str]:
    if kind == "scattered":
        return scatter(space, draw), kind
    if kind == "sampled":
        return sample(space, draw), kind
    start = draw.choice([entry for entry in earlier if name == "open" or entry.space == "closed"])
    found = repair(space, start.ranks)
    steps = draw.randint(1, 3)
    for _ in range(steps):
        found = mutate(space, found, draw)
    return found, f"{steps} {'step' if steps == 1 else 'steps'} from {start.id}"
