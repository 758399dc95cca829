"""`hydra-vlm schedule`: a budget and stages, or a measured profile, become ranks. No torch."""

from pathlib import Path
from typing import Any

from hydra_vlm.allocation import AllocationRequest, Budget, allocate
from hydra_vlm.errors import ConfigError
from hydra_vlm.graph import PRESETS, ComputationGraph, preset
from hydra_vlm.profile import GradientNormProfile, require_same_graph
from hydra_vlm.reading import read_json
from hydra_vlm.schedule import RankSchedule, parse_stages
from hydra_vlm.signals import GRADIENT_NORM, Signal


def make_schedule(
    graph: str | None,
    rank: int | None,
    budget_parameters: int | None,
    profile: Path | None,
    allocator: str,
    stages: str | None,
    **wishes: Any,
) -> RankSchedule:
    """The schedule that the command's options describe; `wishes` are further fields of `AllocationRequest`.

    Raises:
        HydraError: contradicting or missing options, an infeasible budget, a profile of another model.
    """
    measured = _profile(profile)
    target = _graph(graph, measured)
    if measured is not None:
        require_same_graph(measured, target)
    profiled = measured if isinstance(measured, GradientNormProfile) else None
    if stages is not None and profiled is not None and wishes["rule"] != "profile":
        raise ConfigError(
            "--stages and --profile both say what the stages are: give one (both only with --rule profile)"
        )
    request = AllocationRequest(
        graph=target,
        budget=_budget(target, rank, budget_parameters),
        profile=profiled,
        signals=(measured,) if isinstance(measured, Signal) else (),
        signal=measured.kind if isinstance(measured, Signal) else GRADIENT_NORM,
        stages=parse_stages(stages, target.n_layers) if stages else None,
        **wishes,
    )
    return allocate(allocator, request)


def _profile(path: Path | None) -> GradientNormProfile | Signal | None:
    if path is None:
        return None
    try:
        data = read_json(path)
        is_signal = isinstance(data, dict) and "kind" in data
        return Signal.from_json(data) if is_signal else GradientNormProfile.from_json(data)
    except FileNotFoundError:
        raise ConfigError(f"profile {path} does not exist: measure one with `hydra-vlm profile`") from None
    except ValueError as problem:
        raise ConfigError(f"{path} is not a profile ({problem}): measure one with `hydra-vlm profile`") from None


def _graph(name: str | None, profile: GradientNormProfile | Signal | None) -> ComputationGraph:
    if name is None:
        if profile is None:
            raise ConfigError(f"which model? give --graph ({', '.join(PRESETS)}, or a graph.json) or --profile")
        return profile.graph
    if name.endswith(".json"):
        try:
            return ComputationGraph.from_json(read_json(Path(name)))
        except FileNotFoundError:
            raise ConfigError(f"graph file {name} does not exist") from None
    return preset(name)


def _budget(graph: ComputationGraph, rank: int | None, parameters: int | None) -> Budget:
    if (rank is None) == (parameters is None):
        raise ConfigError("give the budget once: --rank R (as uniform LoRA of rank R) or --budget-parameters N")
    return Budget.asked(graph, rank, parameters, least=0)
