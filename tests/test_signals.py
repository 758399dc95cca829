"""A measured signal as a value, which kinds there are, and schedules made of its file."""

import json
import math
from pathlib import Path

import pytest

from hydra_vlm.commands.schedule import make_schedule
from hydra_vlm.config import load_config
from hydra_vlm.errors import ConfigError, GraphMismatchError
from hydra_vlm.files import write_json
from hydra_vlm.graph import ComputationGraph, Projection
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.signals import Signal, kinds, require_kind

GRAPH = ComputationGraph(
    "uneven",
    (Projection(0, "q_proj", 8, 8), Projection(0, "up_proj", 8, 24), Projection(1, "up_proj", 8, 24)),
)
SIGNAL = Signal(GRAPH, "effective_rank", (1.0, 2.0, 4.0), 8, "How many.")


def test_a_signal_reads_back_and_tells_itself() -> None:
    assert Signal.from_json(json.loads(json.dumps(SIGNAL.to_json(), sort_keys=True))) == SIGNAL
    assert repr(SIGNAL) == "Signal('effective_rank' of 'uneven', 8 steps, 1-4)"
    assert SIGNAL.by_layer() == [{"q_proj": 1.0, "up_proj": 2.0}, {"up_proj": 4.0}]
    table = SIGNAL.table().splitlines()
    assert table[0] == "effective rank over 8 steps"
    assert [line.split()[1] for line in table if line.startswith(("q_proj", "up_proj"))] == ["1", "3"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": (1.0, 2.0)}, GraphMismatchError, "2 values.*3 projections"),
        ({"values": (1.0, math.nan, 2.0)}, ConfigError, "layer 1, up_proj is nan"),
        ({"values": (1.0, 2.0, -1.0)}, ConfigError, "layer 2, up_proj is -1"),
        ({"kind": "Effective rank"}, ConfigError, "short name in lower case"),
        ({"steps": 0}, ConfigError, "one step or more"),
    ],
)
def test_bad_signals(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Signal(**{"graph": GRAPH, "kind": "x", "values": (1.0, 2.0, 4.0), "steps": 1} | change)


def test_damaged_files_are_no_signals() -> None:
    for damage in ({"values": [{}]}, {"kind": 3}, {"graph": None}, {"steps": "many"}):
        with pytest.raises(ConfigError, match=r"not a (measured signal|computation graph)"):
            Signal.from_json(SIGNAL.to_json() | damage)


def test_a_profile_gives_its_signal() -> None:
    still = ((0.0, 0.0),) * 3
    profile = GradientNormProfile(GRAPH, ((1.0, 3.0), (2.0, 6.0), (8.0, 10.0)), still, 5, 2)
    signal = profile.signal()
    assert (signal.kind, signal.values, signal.steps) == ("gradient_norm", profile.norms, 5)


def test_kinds_are_files() -> None:
    assert "gradient_norm" in kinds()
    assert require_kind("Gradient-Norm") == "gradient_norm"
    with pytest.raises(ConfigError, match="did you mean 'gradient_norm'"):
        require_kind("gradientnorms")
    for key in ("profile.signal", "allocation.signal"):
        with pytest.raises(
            ConfigError, match=rf"key '{key}'.*no signal is called 'magic': choose from .*gradient_norm"
        ):
            load_config(None, [f"{key}=magic"])


def test_a_schedule_is_made_of_a_signals_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    write_json(path, Signal(GRAPH, "of_my_own", (1.0, 2.0, 4.0), 1).to_json())
    wishes = {"graph": None, "rank": 3, "budget_parameters": None, "profile": path, "stages": None, "rule": "paper"}
    made = make_schedule(allocator="proportional", **wishes)
    assert made.ranks[0] < made.ranks[1] < made.ranks[2]
    with pytest.raises(ConfigError, match=r"coarse ranks follow the signal gradient_norm.*given: of_my_own"):
        make_schedule(allocator="coarse", **wishes)
