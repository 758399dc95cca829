"""Training that goes on from an adapter there is already: ours, or anybody's plain LoRA of the same base by PEFT.

The adapter is read as tensors, and names are matched as names: no expression of its configuration is run. What it adds
to the base is then written into the adapter that is trained, at that one's ranks and scales (`resizing`).
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from hydra_vlm.errors import AdapterError, BudgetError, CheckpointError, FileError, RunFolderError
from hydra_vlm.files import write_json
from hydra_vlm.graph import DECODER
from hydra_vlm.lora import CONFIG, PROJECTOR, WEIGHTS, WRAPPED, require_base
from hydra_vlm.models.structure import ModelParts
from hydra_vlm.models.weights import read_file
from hydra_vlm.reading import read_json
from hydra_vlm.resizing import LowRank, resize, spectrum
from hydra_vlm.schedule import RankSchedule, Scaling
from hydra_vlm.stored_adapter import read_record, whole_record
from hydra_vlm.verification import ADAPTER, lora_layers

T = TypeVar("T")

OWN = "adapter"
"""The schedule that has the ranks of the adapter that a run starts from."""

BESIDE_THE_POINT = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
        "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
        "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern", "revision", "target_modules", "task_type",
        "use_rslora", "eva_config", "runtime_config", "ensure_weight_tying",
    }
)  # fmt: skip
"""Keys of PEFT's configuration that are read here, or that the tensors' names and shapes make superfluous."""

PLAIN_START = (True, False, None, "gaussian", "orthogonal", "eva")
"""Ways to begin a LoRA that leave the base's weights as they are."""

_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.|\\-)+\$?")
_TENSOR = re.compile(r"(?P<name>.+)\.lora_(?P<matrix>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class Start:
    """An adapter to start from: its updates by full module name, the projector's weights where it brings them.

    `digest` is the SHA-256 of its files, `rule` and `alphas` say how its scales came about.
    """

    folder: Path
    digest: str
    updates: Mapping[str, LowRank]
    alphas: Mapping[str, float]
    stabilised: bool
    projector: Mapping[str, Tensor] | None

    def summary(self) -> str:
        ranks = sorted({update.rank for update in self.updates.values()})
        spread = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        beside = " and its projector" if self.projector is not None else ""
        return f"start from {self.folder}: {len(self.updates)} projections of {spread}{beside}, SHA-256 {self.digest}"


def digest_of(folder: Path) -> str:
    """The SHA-256 of an adapter's files, which tells whether it is still the same one."""
    digest = hashlib.sha256()
    for path in (folder / CONFIG, folder / WEIGHTS, folder / PROJECTOR):
        if path.is_file():
            with path.open("rb") as file:
                digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_start(folder: Path, model: nn.Module, parts: ModelParts, trains_projector: bool = True) -> Start:
    """The adapter in a folder, in terms of this model's projections.

    Raises:
        AdapterError: it is not a plain LoRA, was trained on something else, or is damaged; named with what is wrong.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(f"training.start_from: {folder} has no {name}: give the folder of an adapter.")
    _told(lambda: whole_record(folder))
    try:
        config, tensors = read_json(folder / CONFIG), read_file(folder / WEIGHTS)
        beside = read_file(folder / PROJECTOR) if (folder / PROJECTOR).is_file() else None
    except (FileError, CheckpointError) as problem:
        raise AdapterError(f"training.start_from: {problem}") from problem
    _require_plain(folder, config)
    known = _Names(model, parts)
    pairs: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        _require_finite(folder, key, tensor)
        found = _TENSOR.fullmatch(key)
        if found:
            pairs.setdefault(known.module(folder, found["name"]), {})[found["matrix"]] = tensor
        else:
            saved[known.projector(folder, key)] = tensor
    updates, alphas, stabilised = {}, {}, bool(config.get("use_rslora"))
    for name, matrices in pairs.items():
        a, b = _fitting(folder, name, matrices, known.shapes[name])
        alphas[name] = _alpha(folder, config, name)
        scale = alphas[name] / (math.sqrt(len(a)) if stabilised else len(a))
        updates[name] = LowRank(a, b, scale)
    if not updates:
        raise AdapterError(f"training.start_from: {folder / WEIGHTS} holds no LoRA tensors, so nothing to start from.")
    projector = beside if beside is not None else saved or None
    if projector is not None:
        _require_projector(folder, projector, model, parts, trains_projector)
    return Start(folder, digest_of(folder), updates, alphas, stabilised, projector)


def require_own_base(folder: Path, model: nn.Module, parts: ModelParts) -> None:
    """Raises AdapterError where a record beside the adapter says that it was trained on other weights than these."""
    record = _told(lambda: read_record(folder))
    if record is not None:
        _told(lambda: require_base(folder, record, model, parts))


def _told(work: Callable[[], T]) -> T:
    """What `work` returns; its AdapterError names the key that asked for the adapter."""
    try:
        return work()
    except AdapterError as problem:
        raise AdapterError(f"training.start_from: {problem}") from None


def require_same_start(start: Start, stored: Path) -> None:
    """Note in a run folder what the run starts from, or compare with the note.

    Raises:
        RunFolderError: the run was begun from an adapter of other content.
    """
    if stored.is_file():
        before = read_json(stored)
        if before != {"sha256": start.digest}:
            raise RunFolderError(
                f"{start.folder} (training.start_from) is no longer the adapter that this run started from, whose "
                f"digest is in {stored}: put it back, or begin a run in another --out"
            )
    else:
        write_json(stored, {"sha256": start.digest})


def own_schedule(start: Start, parts: ModelParts, budget: int, otherwise: Scaling) -> RankSchedule:
    """The schedule with the adapter's own ranks, 0 where it adapts nothing, and its own scaling.

    Where no rule gives all of its scales, the scaling is `otherwise`, and B carries the difference.

    Raises:
        BudgetError: it has more parameters than the budget allows.
    """
    ranks = tuple(start.updates[name].rank if name in start.updates else 0 for name in parts.names())
    scaling = _scaling(start, Scaling("balanced", 1.0).under(parts.graph, budget)) or otherwise
    schedule = RankSchedule(OWN, parts.graph, ranks, budget, scaling=scaling)
    if schedule.over_budget:
        raise BudgetError(
            f"the adapter in {start.folder} has {schedule.parameters:,} parameters, the budget is {budget:,}: set "
            f"budget.parameters={schedule.parameters}, or give another schedule than {OWN!r}, to which it is resized.",
            nearest=f"A budget of {schedule.parameters:,} parameters allows it.",
            budget=schedule.parameters,
        )
    return schedule


def kept_share(start: Start, schedule: RankSchedule, parts: ModelParts) -> float:
    """What a schedule's ranks keep of the adapter's updates: the share of their squared Frobenius norms, all together.

    1 where no rank is smaller than the adapter's, or where what is cut off is nothing.
    """
    kept = whole = 0.0
    for name, rank in zip(parts.names(), schedule.ranks, strict=True):
        if name in start.updates:
            squares = spectrum(start.updates[name]).square()
            whole += float(squares.sum())
            kept += float(squares[:rank].sum())
    return kept / whole if whole else 1.0


@torch.no_grad()
def begin(start: Start, peft_model: PeftModel, schedule: RankSchedule, parts: ModelParts) -> None:
    """Put the adapter's updates and projector into a freshly attached one.

    Larger ranks keep an update exactly: B gets columns of zeros, A keeps the fresh rows that it has. Smaller ones keep
    its best part, rank 0 nothing.
    """
    layers = lora_layers(peft_model)
    for name, rank in zip(parts.names(), schedule.ranks, strict=True):
        if name not in start.updates or not rank:
            continue
        update = start.updates[name]
        a, b = layers[name].lora_A[ADAPTER].weight, layers[name].lora_B[ADAPTER].weight
        fresh = a[update.rank :].cpu() if rank > update.rank else None
        made, _ = resize(update, rank, schedule.scaling.scale(rank), fresh=fresh)
        a.copy_(made.a)
        b.copy_(made.b)
    if start.projector is not None and parts.projector is not None:
        peft_model.get_base_model().get_submodule(parts.projector).load_state_dict(dict(start.projector))


class _Names:
    """What the names in an adapter's file mean in this model, those of transformers 4 included."""

    def __init__(self, model: nn.Module, parts: ModelParts) -> None:
        self.parts = parts
        shapes = zip(parts.names(), parts.graph.projections, strict=True)
        self.shapes = {name: (p.in_features, p.out_features) for name, p in shapes}
        self.all = {name for name, _ in model.named_modules()}
        conversions = get_model_conversion_mapping(model) if hasattr(model, "config") else []
        self.renamings = [found for found in conversions if isinstance(found, WeightRenaming)]

    def module(self, folder: Path, key: str) -> str:
        """The full name of an adapted module; raises AdapterError unless this run may adapt it."""
        name = self._here(key)
        if name in self.shapes:
            return name
        if name not in self.all:
            raise AdapterError(
                f"training.start_from: the adapter in {folder} adapts {name}, which this model does not have: it was "
                "trained on another base."
            )
        adapted = ", ".join(self.parts.graph.part_layers) or DECODER
        raise AdapterError(
            f"training.start_from: the adapter in {folder} adapts {name}, which is not among what this run adapts "
            f"(adapt: {adapted}): add its part to adapt; embeddings, the output head and experts are never adapted."
        )

    def projector(self, folder: Path, key: str) -> str:
        """A projector tensor's name within the projector; raises AdapterError for any other tensor."""
        name, inside = self._here(key).replace(".modules_to_save.default", ""), f"{self.parts.projector}."
        if ".lora_" in key or self.parts.projector is None or not name.startswith(inside):
            raise AdapterError(
                f"training.start_from: {folder / WEIGHTS} holds {key}: only LoRA's A and B of linear layers, and the "
                "weights of the projector, can be started from."
            )
        return name.removeprefix(inside)

    def _here(self, key: str) -> str:
        name = key.removeprefix(WRAPPED)
        if name in self.all or any(f"{name}.".startswith(f"{known}.") for known in self.shapes):
            return name
        renamed, _ = rename_source_key(name, self.renamings, [])
        return str(renamed)


def _require_plain(folder: Path, config: Any) -> None:
    """Raises AdapterError, naming the key, unless the configuration is of LoRA and nothing more."""
    where = f"training.start_from: the adapter in {folder}"
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterError(f"{where} is of type {kind}, not LORA: only a plain LoRA can be started from.")
    defaults = LoraConfig().to_dict()
    for key, value in config.items():
        if key not in BESIDE_THE_POINT and value and value != defaults.get(key):
            raise AdapterError(f"{where} has {key}={value!r}: only a plain LoRA can be started from.")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{where} has trained biases (bias={config['bias']!r}), which a LoRA schedule has not.")
    started = config.get("init_lora_weights", True)
    if started not in PLAIN_START:
        raise AdapterError(
            f"{where} began with init_lora_weights={started!r}, which changes the base's own weights: convert it to a "
            "plain LoRA first (PEFT's save_pretrained(path_initial_model_for_weight_conversion=...))."
        )


def _require_finite(folder: Path, key: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
        what = "numbers that are not finite" if tensor.is_floating_point() else f"numbers of type {tensor.dtype}"
        raise AdapterError(f"training.start_from: {folder / WEIGHTS} is damaged: {key} holds {what}.")


def _fitting(folder: Path, name: str, matrices: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    where = f"training.start_from: {folder / WEIGHTS}"
    if set(matrices) != {"A", "B"}:
        raise AdapterError(
            f"{where} is damaged: {name} has lora_{next(iter(matrices))} alone, A and B belong together."
        )
    a, b = matrices["A"].float(), matrices["B"].float()
    rank = a.shape[0]
    if tuple(a.shape) != (rank, shape[0]) or tuple(b.shape) != (shape[1], rank) or not rank:
        raise AdapterError(
            f"{where}: {name} has A of {tuple(a.shape)} and B of {tuple(b.shape)}, the model's layer takes "
            f"{shape[0]} and gives {shape[1]} features: it was trained on another base."
        )
    return a, b


def _alpha(folder: Path, config: Mapping[str, Any], name: str) -> float:
    """lora_alpha of a module: the first pattern that names it, or the one for all."""
    alpha = config.get("lora_alpha", LoraConfig().lora_alpha)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if not _PLAIN.fullmatch(pattern):
            raise AdapterError(
                f"training.start_from: {folder / CONFIG}: alpha_pattern has {pattern!r}: expressions are not run, "
                "write whole names or the ends of names."
            )
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\", "")
        if name == plain or (not pattern.startswith("^") and name.endswith(f".{plain}")):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
        raise AdapterError(
            f"training.start_from: {folder / CONFIG}: alpha of {name} is {alpha!r}, not a number above 0."
        )
    return float(alpha)


def _scaling(start: Start, balanced: Scaling) -> Scaling | None:
    """The rule that gives all of the adapter's scales; None where none does. `balanced` has the run's r_0, value 1."""
    alphas = set(start.alphas.values())
    if start.stabilised:
        return Scaling("rslora", alphas.pop()) if len(alphas) == 1 else None
    scales = [update.scale for update in start.updates.values()]
    if _equal(scales):
        return Scaling("constant", max(scales))
    if len(alphas) == 1:
        return Scaling("fixed", alphas.pop())
    values = [update.scale / balanced.scale(update.rank) for update in start.updates.values()]
    return replace(balanced, value=max(values)) if _equal(values) else None


def _equal(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= 1e-9 * max(values)


def _require_projector(
    folder: Path, state: Mapping[str, Tensor], model: nn.Module, parts: ModelParts, is_trained: bool
) -> None:
    if parts.projector is None or not is_trained:
        why = "adapts it by LoRA" if parts.projector is not None else "has none"
        raise AdapterError(
            f"training.start_from: the adapter in {folder} brings a trained projector, but this run {why}."
        )
    for key, value in state.items():
        if value.is_floating_point():  # batch normalisation counts in integers
            _require_finite(folder, key, value)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    wanted = {key: tuple(value.shape) for key, value in model.get_submodule(parts.projector).state_dict().items()}
    wrong = sorted(shapes.items() ^ wanted.items())
    if wrong:
        key = wrong[0][0]
        raise AdapterError(
            f"training.start_from: the projector of the adapter in {folder} does not fit: {key} is "
            f"{shapes.get(key, 'absent')} there and {wanted.get(key, 'absent')} in the model."
        )
