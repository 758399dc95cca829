"""Rank schedules become PEFT adapters, verified: what was built is compared with what was asked, every time.

Traps of PEFT 0.21 that this file steps around: lists of target modules match suffixes, so a vision tower with the
same module names would be adapted too, and overlapping pattern keys change their precedence on saving. Targets are
therefore one regular expression that fits whole names, and pattern keys are whole names anchored with "^". For some
mixtures of experts PEFT rewrites an expression into last names; there, targets are a list of whole names.
"""

import copy
import hashlib
import logging
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hydra_vlm.errors import AdapterError, ConfigError, FileError, GraphMismatchError, RunFolderError
from hydra_vlm.files import as_umask_says, write_json
from hydra_vlm.graph import ComputationGraph
from hydra_vlm.models.fingerprint import PROJECTOR as PROJECTOR_PART
from hydra_vlm.models.fingerprint import fingerprint
from hydra_vlm.models.quantization import quantization_of
from hydra_vlm.models.structure import ModelParts, find_parts
from hydra_vlm.models.weights import few, write_tensors
from hydra_vlm.reading import read_json
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.stored_adapter import (
    CONFIG,
    FOLDER_CONTENT,
    PROJECTOR,
    RECORD,
    SCHEDULE,
    WEIGHTS,
    WRAPPED,
    AdapterRecord,
    StoredAdapter,
    digests,
    read_adapter,
)
from hydra_vlm.verification import ADAPTER, lora_layers, require_modules, restoring, strictly

__all__ = ["CONFIG", "PROJECTOR", "SCHEDULE", "WEIGHTS", "WRAPPED"]  # of an adapter's folder, which is written here

_log = logging.getLogger(__name__)
_lent: WeakKeyDictionary[PeftModel, tuple[str | None, nn.Module | None]] = WeakKeyDictionary()
"""Where the projector of an adapted model is, and the base's own, which `detach` puts back."""


def lora_config(schedule: RankSchedule, parts: ModelParts, dropout: float = 0.0) -> LoraConfig:
    """The PEFT configuration of a schedule: ranks and scales per module, rank 0 left out of the targets.

    `r` is the largest rank, since servers check nothing else against their limit; modules of other ranks have a key in
    `rank_pattern`, and in `alpha_pattern` where their alpha differs.

    Raises GraphMismatchError for a schedule of other shapes, AdapterError when it adapts nothing.
    """
    require_schedule_fits(schedule, parts.graph)
    ranks = {name: rank for name, rank in zip(parts.names(), schedule.ranks, strict=True) if rank}
    if not ranks:
        raise AdapterError(
            f"schedule {schedule.name!r} has rank 0 everywhere, so there is nothing to adapt: give at least one "
            "projection a rank of 1 or more."
        )
    top = max(ranks.values())
    stabilised = schedule.scaling.rule == "rslora"

    def alpha(rank: int) -> float:
        exact = schedule.scaling.value if stabilised else schedule.scaling.alpha(rank)
        return int(exact) if float(exact).is_integer() else exact

    return LoraConfig(
        r=top,
        lora_alpha=alpha(top),
        lora_dropout=dropout,
        use_rslora=stabilised,
        target_modules=_whole_names(ranks, parts.lists) if parts.takes_expressions else list(ranks),
        rank_pattern={f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != top},
        alpha_pattern={f"^{re.escape(name)}": alpha(rank) for name, rank in ranks.items() if alpha(rank) != alpha(top)},
        fan_in_fan_out=parts.transposed,
    )


def attach(
    model: nn.Module,
    schedule: RankSchedule,
    parts: ModelParts | None = None,
    seed: int | None = None,
    dropout: float = 0.0,
) -> PeftModel:
    """The model with the schedule's adapter, all else frozen; the adapter's output is zero until B is trained.

    A copy takes the place of a projector that LoRA does not reach: it may be trained, `detach` puts the own one back,
    and every training computes on memory laid out alike, which weights mapped from a file are not.

    With `seed`, A is drawn per module from that seed and the module's name, and a smaller rank gets the first rows of
    what a larger rank would: schedules to be compared share as much of the initial noise as their ranks allow. Without,
    PEFT draws from torch's global generator; the distribution is the same.

    Raises GraphMismatchError for a schedule of other shapes; AdapterError when the adapter built is not the one asked
    for, or PEFT warns. The model is then as it was.
    """
    _require_bare(model)
    parts = parts if parts is not None else find_parts(model, adapt=tuple(schedule.graph.part_layers))
    config = lora_config(schedule, parts, dropout)
    replaced = _lend_projector(model, parts)
    with _giving_back(model, parts, replaced), restoring(model), strictly(f"adapter of schedule {schedule.name!r}"):
        peft_model: PeftModel = get_peft_model(model, config)
        _verify(peft_model, schedule, parts)
        _verify_trainable(peft_model, schedule, parts)
        layers = lora_layers(peft_model)
        for name, layer in layers.items():
            layer.train(layer.get_base_layer().training)  # new dropout layers start in training mode
            if seed is not None:
                _draw(layer, seed, name)
    _lent[peft_model] = (parts.projector, replaced)
    return peft_model


def ranks_of(peft_model: PeftModel, parts: ModelParts) -> tuple[int, ...]:
    """The ranks of the adapter's tensors, aligned with `parts.graph.projections`; 0 where nothing is adapted."""
    layers = lora_layers(peft_model)
    return tuple(layers[name].lora_A[ADAPTER].weight.shape[0] if name in layers else 0 for name in parts.names())


def save_adapter(
    peft_model: PeftModel,
    folder: str | Path,
    schedule: RankSchedule,
    parts: ModelParts,
    projector_state: bool,
) -> None:
    """Writes a plain PEFT folder with `schedule.json` and, with `projector_state`, `projector.safetensors` beside it.

    The projector's keys are relative to the projector. It is not stored as PEFT's `modules_to_save`, which vLLM and
    llama.cpp refuse. The folder appears whole or not at all; an earlier adapter in its place is replaced.

    Raises AdapterError when the model does not carry this schedule or has no projector, RunFolderError when the folder
    holds anything but an adapter.
    """
    folder = Path(folder)
    others = (
        sorted(path.name for path in folder.iterdir() if path.name not in FOLDER_CONTENT) if folder.exists() else []
    )
    if others:
        raise RunFolderError(f"{folder} is not an adapter's folder: it holds {others[0]}. Choose another folder.")
    _verify(peft_model, schedule, parts)
    projector = _projector(peft_model.get_base_model(), parts).state_dict() if projector_state else None
    base: Any = peft_model.get_base_model()
    without = frozenset({PROJECTOR_PART} if projector_state else ())
    found = fingerprint(base, parts, without)
    draft = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    # PEFT's automatic answer about embeddings, which are never trained here, would ask the hub.
    peft_model.save_pretrained(str(draft), save_embedding_layers=False)
    as_umask_says(draft)
    write_json(draft / SCHEDULE, schedule.to_json())
    if projector is not None:
        write_tensors(draft / PROJECTOR, projector)
    write_json(draft / RECORD, AdapterRecord(digests(draft), found, quantization_of(base)).to_json())
    if folder.exists():
        retired = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(retired, ignore_errors=True)
        folder.rename(retired)
        draft.rename(folder)
        shutil.rmtree(retired)
    else:
        draft.rename(folder)


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    parts: ModelParts | None = None,
    trainable: bool = False,
    other_base: bool = False,
) -> PeftModel:
    """The model with an adapter that `save_adapter` wrote, and the projector's weights in place where it wrote them.

    `other_base` permits a base of the same shapes with other weights than the adapter was trained on. Another
    configuration or quantisation of the base is said in a warning.

    Raises GraphMismatchError for an adapter of another model; AdapterError when a file is missing, damaged or swapped,
    the base is another, or the adapter does not have the ranks and scales of its schedule. The model is then as it was.
    """
    _require_bare(model)
    folder = Path(folder)
    stored = read_adapter(folder)
    schedule = own_schedule(folder)
    parts = parts if parts is not None else _adapted_parts(model, schedule, folder)
    require_schedule_fits(schedule, parts.graph)
    _require_same(stored, _wanted(schedule, parts))
    require_base(folder, stored.record, model, parts, other_base)
    config = lora_config(schedule, parts, float(stored.config.get("lora_dropout") or 0.0))
    replaced = _lend_projector(model, parts)
    with _giving_back(model, parts, replaced), restoring(model), strictly(f"adapter in {folder}"):
        peft_model: PeftModel = get_peft_model(model, config)
        _verify(peft_model, schedule, parts)
        _fill(peft_model, stored)
        if stored.projector is not None:
            _load_projector(model, parts, stored)
        if trainable:
            _verify_trainable(peft_model, schedule, parts)
        else:
            peft_model.requires_grad_(False).eval()
    _lent[peft_model] = (parts.projector, replaced)
    return peft_model


def _adapted_parts(model: nn.Module, schedule: RankSchedule, folder: Path) -> ModelParts:
    """The model's parts that a stored schedule reaches."""
    try:
        return find_parts(model, adapt=tuple(schedule.graph.part_layers))
    except ConfigError as problem:
        raise ConfigError(f"{folder / SCHEDULE} does not fit the model: {problem}") from None


def own_schedule(folder: Path) -> RankSchedule:
    """The schedule beside an adapter; raises AdapterError for an adapter that another tool wrote."""
    if not (folder / SCHEDULE).is_file():
        raise AdapterError(
            f"{folder} has no {SCHEDULE}: it is not an adapter saved by hydra-vlm. Give one that is, or use this one "
            "with the tool that wrote it."
        )
    return read_schedule(folder / SCHEDULE)


def read_schedule(path: str | Path) -> RankSchedule:
    """The schedule in a JSON file; raises ConfigError that names the file when it is not one."""
    try:
        return RankSchedule.from_json(read_json(Path(path)))
    except FileError as error:
        raise ConfigError(f"schedule {error}") from None
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error


def merge(peft_model: PeftModel, check_inputs: Mapping[str, Any] | None = None, tolerance: float = 1e-4) -> nn.Module:
    """The base model with the adapter added into its weights.

    With `check_inputs` (keyword arguments of the model's forward), logits before and after are compared: their largest
    difference may be `tolerance` times the largest logit. The default suits float32; bfloat16 weights need about 5e-2.

    Raises AdapterError when logits differ by more or are not finite; the weights have been merged by then.
    """
    before = None if check_inputs is None else _logits(peft_model, check_inputs)
    try:
        merged: nn.Module = peft_model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise AdapterError(f"the adapter cannot be merged: {error}") from error
    if before is not None and check_inputs is not None:
        difference = float((_logits(merged, check_inputs) - before).abs().max())
        allowed = tolerance * float(before.abs().max())
        if not difference <= allowed:  # also true for NaN
            raise AdapterError(
                f"merging changed the logits by {difference:.3g}, more than the {allowed:.3g} allowed: the weights' "
                f"precision ({next(merged.parameters()).dtype}) is too low for this adapter. Merge in float32."
            )
    return merged


def detach(peft_model: PeftModel) -> nn.Module:
    """The base model without the adapter, to the bit what it was in weights, its own projector in place; parameters
    stay frozen.

    Raises AdapterError when the adapter is merged into the weights.
    """
    if any(layer.merged for layer in lora_layers(peft_model).values()):
        raise AdapterError("the adapter is merged into the weights: unmerge it before detaching.")
    base: nn.Module = peft_model.unload()
    path, replaced = _lent.pop(peft_model, (None, None))
    if path is not None and replaced is not None:
        base.set_submodule(path, replaced.requires_grad_(False))
    return base


@contextmanager
def adapted(
    model: nn.Module, folder: str | Path, parts: ModelParts | None = None, other_base: bool = False
) -> Iterator[PeftModel]:
    """The model with a saved adapter while the block lasts; then it is as it was to the bit, its projector included.

    Raises as `load_adapter` does.
    """
    peft_model = load_adapter(model, folder, parts, other_base=other_base)
    try:
        yield peft_model
    finally:
        detach(peft_model)


def require_schedule_fits(schedule: RankSchedule, graph: ComputationGraph) -> None:
    """Raises GraphMismatchError, naming the first difference, unless the schedule has the graph's projections."""
    difference = schedule.graph.difference(graph)
    if difference is not None:
        raise GraphMismatchError(
            f"schedule {schedule.name!r} is for {schedule.graph.name!r}, the model is {graph.name!r}: the schedule has "
            f"{difference}. Make a schedule for this model."
        )


def _whole_names(names: Iterable[str], lists: Sequence[str]) -> str:
    """A regular expression that fits these names as a whole and no other; layers are grouped to keep it short."""
    numbers: dict[tuple[str, str], list[str]] = {}
    choices = []
    for name in names:
        inside = next((path for path in lists if name.startswith(f"{path}.")), None)
        if inside is None:
            choices.append(re.escape(name))
            continue
        number, _, path = name.removeprefix(f"{inside}.").partition(".")
        numbers.setdefault((inside, path), []).append(number)
    choices += [
        rf"{re.escape(inside)}\.(?:{'|'.join(found)})\.{re.escape(path)}" for (inside, path), found in numbers.items()
    ]
    return "|".join(choices)


def _require_bare(model: nn.Module) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise AdapterError("the model carries an adapter already: detach or merge it first.")


def _wanted(schedule: RankSchedule, parts: ModelParts) -> dict[str, tuple[int, float]]:
    """Rank and scale of every adapted module by name."""
    ranks = zip(parts.names(), schedule.ranks, strict=True)
    return {name: (rank, schedule.scaling.scale(rank)) for name, rank in ranks if rank}


def _require_same(stored: StoredAdapter, wanted: Mapping[str, tuple[int, float]]) -> None:
    """Raises AdapterError unless the folder's tensors and scales are those of its schedule."""
    has = f"{stored.folder}: its files are of two adapters: {SCHEDULE} has"
    other = sorted(stored.updates.keys() ^ wanted.keys())
    if other:
        which = "no tensors are there for it" if other[0] in wanted else "it is not adapted"
        raise AdapterError(f"{has} another list of modules, {other[0]} for one ({which} by {CONFIG}).")
    for name, (rank, scale) in wanted.items():
        update = stored.updates[name]
        if update.rank != rank:
            raise AdapterError(f"{has} rank {rank} for {name}, the tensors {update.rank}.")
        if abs(update.scale - scale) > 1e-9 * scale:
            raise AdapterError(f"{has} scale {scale:g} for {name}, {CONFIG} {update.scale:g}.")


def require_base(
    folder: Path, record: AdapterRecord | None, model: nn.Module, parts: ModelParts, other_base: bool = False
) -> None:
    """Raises AdapterError for a base with other weights, unless permitted; what else differs is said."""
    if record is None:
        _log.warning(
            "adapter %s has no %s, as older ones and other tools' have none: whether it is complete and of this base "
            "is not checked",
            folder,
            RECORD,
        )
        return
    now, quantization = fingerprint(model, parts), quantization_of(model)
    other = record.base.other_weights(now)
    if other and not other_base:
        raise AdapterError(
            f"{folder} was trained on another base: other weights in {', '.join(other)}. Give the base it was "
            "trained on; to use it on this one all the same, say so (--other-base, other_base=True)."
        )
    if other:
        _log.warning("adapter %s was trained on a base with other weights in %s", folder, ", ".join(other))
    settings = record.base.other_settings(now)
    if settings:
        _log.warning("adapter %s was trained on a base configured otherwise: %s", folder, few(settings))
    if quantization != record.quantization:
        _log.warning(
            "adapter %s was trained on a base with quantization=%s, this one has %s, so it answers otherwise than it "
            "was trained to (four bits need bitsandbytes, on CUDA or a CPU)",
            folder,
            record.quantization,
            quantization,
        )


@torch.no_grad()
def _fill(peft_model: PeftModel, stored: StoredAdapter) -> None:
    """Give the adapter's layers the stored tensors, whose shapes must be theirs."""
    for name, layer in lora_layers(peft_model).items():
        for matrix, tensor in ((layer.lora_A, stored.updates[name].a), (layer.lora_B, stored.updates[name].b)):
            weight = matrix[ADAPTER].weight
            if weight.shape != tensor.shape:
                raise AdapterError(
                    f"{stored.folder}: {name} has a matrix {list(tensor.shape)}, this model takes {list(weight.shape)}."
                )
            weight.copy_(tensor)


def _lend_projector(model: nn.Module, parts: ModelParts) -> nn.Module | None:
    """Put a copy in the projector's place, where LoRA does not reach it; returns the model's own."""
    if parts.projector is None or PROJECTOR_PART in parts.graph.part_layers:
        return None
    own = model.get_submodule(parts.projector)
    model.set_submodule(parts.projector, copy.deepcopy(own))
    return own


@contextmanager
def _giving_back(model: nn.Module, parts: ModelParts, own: nn.Module | None) -> Iterator[None]:
    """On any error the model gets its own projector back."""
    try:
        yield
    except BaseException:
        if own is not None and parts.projector is not None:
            model.set_submodule(parts.projector, own)
        raise


def _verify(peft_model: PeftModel, schedule: RankSchedule, parts: ModelParts) -> None:
    """Raises AdapterError unless modules, ranks and scales are exactly the schedule's."""
    require_modules(peft_model, _wanted(schedule, parts), f"schedule {schedule.name!r}")


def _verify_trainable(peft_model: PeftModel, schedule: RankSchedule, parts: ModelParts) -> None:
    """Raises AdapterError unless A and B of the schedule's modules, and nothing else, are trainable: g(G, Z)."""
    trainable = {name: p.numel() for name, p in peft_model.named_parameters() if p.requires_grad}
    intended = {
        f"{WRAPPED}{name}.lora_{matrix}.{ADAPTER}.weight"
        for name, rank in zip(parts.names(), schedule.ranks, strict=True)
        for matrix in "AB"
        if rank
    }
    wrong = sorted(set(trainable) ^ intended)
    if wrong:
        state = "trainable, but not in the schedule" if wrong[0] in trainable else "in the schedule, but not trainable"
        raise AdapterError(f"{len(wrong)} parameters are not as intended: {wrong[0]} is {state}.")
    count = sum(trainable.values())
    if count != schedule.parameters:
        raise AdapterError(f"{count:,} LoRA parameters are trainable, the schedule has {schedule.parameters:,}.")


def fresh_rows(name: str, rank: int, features: int, seed: int) -> Tensor:
    """A [rank, features] as a module of this name begins with; a smaller rank has the first rows of a larger one.

    Uniform in ±1/sqrt(features), which is PEFT's kaiming_uniform(a = sqrt(5)).
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return (2 * torch.rand(rank, features, generator=generator) - 1) / math.sqrt(features)


@torch.no_grad()
def _draw(layer: LoraLayer, seed: int, name: str) -> None:
    """A as it begins; B stays zero."""
    weight = layer.lora_A[ADAPTER].weight
    weight.copy_(fresh_rows(name, weight.shape[0], weight.shape[1], seed))


def _projector(model: nn.Module, parts: ModelParts) -> nn.Module:
    if parts.projector is None:
        raise AdapterError(f"{parts.graph.name!r} has no projector, so there are no projector weights to keep.")
    return model.get_submodule(parts.projector)


def _load_projector(model: nn.Module, parts: ModelParts, stored: StoredAdapter) -> None:
    projector, state, path = _projector(model, parts), dict(stored.projector or {}), stored.folder / PROJECTOR
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    wanted = {key: tuple(value.shape) for key, value in projector.state_dict().items()}
    wrong = sorted(shapes.items() ^ wanted.items())
    if wrong:
        key = wrong[0][0]
        raise AdapterError(
            f"{path} does not fit the projector {parts.projector}: {key} is {shapes.get(key, 'absent')} in the file "
            f"and {wanted.get(key, 'absent')} in the model."
        )
    projector.load_state_dict(state)


@torch.no_grad()
def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Float32 logits in evaluation mode; each module's own mode is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        logits: Tensor = model(**inputs).logits
        return logits.float()
    finally:
        for module in training:
            module.training = True
