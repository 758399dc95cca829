"""An adapter's folder, read and checked: nothing in it is run, matched or looked up.

The folder is plain PEFT. `adapter.json` beside it records what belongs to it: the SHA-256 of every file, the base it
was trained on and how that was quantised. What adapter_config.json says of modules is compared with the tensors'
finite list of names; expressions of a stranger are never given to a matcher, for which a short one may take for ever.
"""

import hashlib
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydra_vlm.errors import AdapterError, HydraError
from hydra_vlm.models.fingerprint import Fingerprint
from hydra_vlm.models.quantization import NF4, NONE, can_quantize
from hydra_vlm.models.weights import few, read_file
from hydra_vlm.models.whole import unsound
from hydra_vlm.reading import open_file, read_object

WRAPPED = "base_model.model."
"""What PEFT puts before the names of the model that it wraps."""

CONFIG, WEIGHTS, SCHEDULE, PROJECTOR, RECORD = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "schedule.json",
    "projector.safetensors",
    "adapter.json",
)
OLD_WEIGHTS = "adapter_model.bin"
FOLDER_CONTENT = frozenset({CONFIG, WEIGHTS, SCHEDULE, PROJECTOR, RECORD, "README.md"})

_OTHER_FORMS = (
    "use_dora", "lora_bias", "modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "use_qalora", "arrow_config", "megatron_config", "layers_pattern", "use_bdlora",
    "velora_config", "monteclora_config",
)  # fmt: skip
"""Keys of PEFT's LoRA that make something else of it than scale · B A on named modules."""

_LITERAL = r"(?:[A-Za-z0-9_]|\\?[.\-])+"
_CHOICE = re.compile(rf"({_LITERAL})(?:\(\?:(\d+(?:\|\d+)*)\)({_LITERAL}))?")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterRecord:
    """What belongs to an adapter: its files' SHA-256, its base and the base's quantisation ("none" or "nf4")."""

    files: Mapping[str, str]
    base: Fingerprint
    quantization: str

    def to_json(self) -> dict[str, Any]:
        return {"files": dict(self.files), "quantization": self.quantization, "base": self.base.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "AdapterRecord":
        files = {str(name): str(digest) for name, digest in value["files"].items()}
        return cls(files, Fingerprint.from_json(value["base"]), str(value["quantization"]))


@dataclass(frozen=True)
class LoraUpdate:
    """What LoRA adds to one module's weight: scale · B A, with A [rank, in] and B [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


@dataclass(frozen=True)
class StoredAdapter:
    """A checked folder: updates by the module's full name, the projector's tensors where it holds them, its record."""

    folder: Path
    config: Mapping[str, Any]
    updates: Mapping[str, LoraUpdate]
    projector: Mapping[str, Tensor] | None
    record: AdapterRecord | None


def read_adapter(folder: Path) -> StoredAdapter:
    """A plain LoRA adapter, of ours or of anybody's PEFT; tensors are mapped, not copied.

    Raises:
        AdapterError: a file is missing, damaged or another than was recorded; a tensor is missing, no float, NaN or
            infinite; the configuration asks for more than LoRA on named modules.
    """
    weights = folder / (WEIGHTS if (folder / WEIGHTS).exists() else OLD_WEIGHTS)
    if not (folder / CONFIG).exists() or not weights.exists():
        lacking = CONFIG if not (folder / CONFIG).exists() else WEIGHTS
        hint = f" Did you mean {folder / 'adapter'}?" if (folder / "adapter" / CONFIG).is_file() else ""
        raise AdapterError(f"{folder} has no {lacking}: it is not the folder of an adapter.{hint}")
    record = whole_record(folder)
    config = read_object(folder / CONFIG)
    _require_plain(config, folder / CONFIG)
    updates = _updates(_sound(weights), config, weights)
    _require_targets(config, updates, folder / CONFIG)
    projector = _sound(folder / PROJECTOR) if (folder / PROJECTOR).exists() else None
    return StoredAdapter(folder, config, updates, projector, record)


def whole_record(folder: Path) -> AdapterRecord | None:
    """The folder's record, whose files are all there and are those that it names; None as `read_record` has it.

    Raises:
        AdapterError: a file is missing or another than was recorded, or the record is damaged.
    """
    record = read_record(folder)
    if record is not None:
        _require_files(folder, record)
    return record


def read_record(folder: Path) -> AdapterRecord | None:
    """The folder's record; None for adapters of other tools, or of ours before records were written.

    Raises:
        AdapterError: it is damaged.
    """
    if not (folder / RECORD).exists():
        return None
    try:
        return AdapterRecord.from_json(read_object(folder / RECORD))
    except (HydraError, KeyError, TypeError, ValueError, AttributeError) as problem:
        raise AdapterError(f"{folder / RECORD} is damaged ({problem}): copy or train the adapter again.") from None


def recorded_quantization(folder: Path) -> str:
    """How the base was quantised that the adapter was trained on, as far as is recorded: none or nf4.

    Raises:
        AdapterError: the record is damaged.
    """
    record = read_record(folder)
    if record is not None and record.quantization not in (NONE, NF4):
        raise AdapterError(
            f"{folder / RECORD} names the quantization {record.quantization!r}, which is not known here."
        )
    return record.quantization if record is not None else NONE


def base_quantization(folder: Path, place: torch.device) -> str:
    """How the base is to be loaded for the adapter: as it was trained, or plainly where four bits are not to be had."""
    return recorded_quantization(folder) if can_quantize(place) else NONE


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that belong to an adapter."""
    return {name: _sha256(folder / name) for name in (CONFIG, WEIGHTS, SCHEDULE, PROJECTOR) if (folder / name).exists()}


def expanded(expression: str) -> set[str] | None:
    """The names that an expression of our own making fits; None for any other, which is not run to find out."""
    names: set[str] = set()
    at = 0
    while at <= len(expression):
        found = _CHOICE.match(expression, at)
        if found is None or expression[found.end() : found.end() + 1] not in ("", "|"):
            return None
        before, numbers, after = found.groups()
        plain = [part.replace("\\", "") for part in (before, after or "")]
        names |= {number.join(plain) for number in numbers.split("|")} if numbers else {plain[0]}
        at = found.end() + 1
    return names


def _require_files(folder: Path, record: AdapterRecord) -> None:
    for name, digest in record.files.items():
        if name not in FOLDER_CONTENT:
            raise AdapterError(f"{folder / RECORD} names {name!r}, which is no file of an adapter: copy it again.")
        if not (folder / name).exists():
            what = ", the projector that was trained with it" if name == PROJECTOR else ""
            raise AdapterError(f"{folder} lacks {name}{what}: copy the whole folder again.")
        if _sha256(folder / name) != digest:
            raise AdapterError(
                f"{folder / name} is not the file that was saved with the adapter (its SHA-256 differs): copy the "
                f"whole folder again, or remove {RECORD} if you changed it on purpose."
            )
    stray = sorted(name for name in digests(folder) if name not in record.files)
    if stray:
        raise AdapterError(f"{folder / stray[0]} does not belong to the adapter, whose {RECORD} does not name it.")


def _require_plain(config: Mapping[str, Any], where: Path) -> None:
    """Raises AdapterError for anything but LoRA on named modules with finite numbers."""

    def refuse(key: str, rule: str) -> None:
        raise AdapterError(f"{where}: {key} is {str(config.get(key))[:80]!r}: {rule}.")

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "only LORA is read here")
    if not _is_whole(config.get("r")):
        refuse("r", "a rank is a whole number of 1 or more")
    if not _is_positive(config.get("lora_alpha")):
        refuse("lora_alpha", "alpha is a finite number above 0")
    dropout = config.get("lora_dropout", 0.0)
    if not (dropout == 0 or (_is_positive(dropout) and dropout < 1)):
        refuse("lora_dropout", "dropout is a number from 0 to below 1")
    for key in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(config.get(key, False), bool):
            refuse(key, "it is true or false")
    if config.get("bias") not in (None, "none"):
        refuse("bias", "trained biases are not read")
    for key in _OTHER_FORMS:
        if config.get(key):
            refuse(key, "only scale · B A on named modules is read; merge such an adapter with the tool that made it")
    for key, is_value, rule in (
        ("rank_pattern", _is_whole, "it gives ranks, whole numbers of 1 or more, by module name"),
        ("alpha_pattern", _is_positive, "it gives alphas, finite numbers above 0, by module name"),
    ):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(is_value, pattern.values())):
            refuse(key, rule)
        strange = next((name for name in pattern if _literal(name) is None), None)
        if strange is not None:
            raise AdapterError(f"{where}: {key} has the key {strange[:80]!r}: {_NO_EXPRESSIONS}.")
    excluded = config.get("exclude_modules")
    if excluded and not _is_names(excluded):
        refuse("exclude_modules", _NO_EXPRESSIONS)


_NO_EXPRESSIONS = "regular expressions of others are not run on names: write the modules' names"


def _require_targets(config: Mapping[str, Any], updates: Mapping[str, LoraUpdate], where: Path) -> None:
    """Raises AdapterError unless the tensors' modules are those that target_modules names."""
    targets = config.get("target_modules")
    if targets == "all-linear":
        return
    if isinstance(targets, str):
        names = expanded(targets)
        if names is None:
            raise AdapterError(f"{where}: target_modules is {targets[:80]!r}: {_NO_EXPRESSIONS}, as a list.")
        missing, strange = sorted(names - updates.keys()), sorted(updates.keys() - names)
    elif _is_names(targets) and targets:
        ends = set(targets)
        missing = [t for t in targets if not any(_ends(name, t) for name in updates)]
        strange = [name for name in updates if not any(tail in ends for tail in _tails(name))]
    else:
        raise AdapterError(f"{where}: target_modules is {str(targets)[:80]!r}: it is a list of module names.")
    if missing or strange:
        what = f"has no tensors for {few(missing)}" if missing else f"has tensors for {few(strange)}, which are no"
        raise AdapterError(f"{where.parent} {what}{'' if missing else ' target'}: its files are of two adapters.")


def _updates(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: Path) -> dict[str, LoraUpdate]:
    """Pairs of A and B by module, with the scale that the configuration gives each."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if found is None or tensor.dim() != 2:
            raise AdapterError(f"{where} holds {key} {list(tensor.shape)}, which is no LoRA matrix of a linear module.")
        pairs.setdefault(found[1], {})[found[2]] = tensor
    ranks, alphas = (_resolved(config.get(key) or {}) for key in ("rank_pattern", "alpha_pattern"))
    updates = {}
    for name, pair in pairs.items():
        if len(pair) < 2:
            raise AdapterError(f"{where} has no lora_{'B' if 'A' in pair else 'A'} for {name}: copy it again.")
        rank, alpha = _of(ranks, name, config["r"]), _of(alphas, name, config["lora_alpha"])
        if (pair["A"].shape[0], pair["B"].shape[1]) != (rank, rank):
            raise AdapterError(
                f"{where}: {name} has A {list(pair['A'].shape)} and B {list(pair['B'].shape)}, {CONFIG} says rank "
                f"{rank}: its files are of two adapters."
            )
        updates[name] = LoraUpdate(
            pair["A"], pair["B"], alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        )
    if not updates:
        raise AdapterError(f"{where} holds no tensors: copy it again.")
    return updates


def _sound(path: Path) -> dict[str, Tensor]:
    try:
        tensors = read_file(path)
    except HydraError as problem:
        raise AdapterError(str(problem)) from None
    fault = unsound(tensors)
    if fault is not None:
        raise AdapterError(f"{path}: {fault}: copy or train the adapter again.")
    return tensors


def _literal(key: Any) -> tuple[str, bool] | None:
    """The name that a pattern's key means, and whether it is the whole name; None for a real expression."""
    if not isinstance(key, str) or re.fullmatch(rf"\^?{_LITERAL}\$?", key) is None:
        return None
    return key.removeprefix("^").removesuffix("$").replace("\\", ""), key.startswith("^")


def _resolved(pattern: Mapping[str, Any]) -> dict[tuple[str, bool], Any]:
    return {literal: value for key, value in pattern.items() if (literal := _literal(key)) is not None}


def _of(pattern: Mapping[tuple[str, bool], Any], name: str, otherwise: Any) -> Any:
    """A module's value: PEFT takes the first key that is its name, or the end of it; ours are whole names."""
    if (name, True) in pattern:
        return pattern[name, True]
    loose = [(key, value) for (key, whole), value in pattern.items() if not whole]
    return next((value for key, value in loose if _ends(name, key)), otherwise)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _tails(name: str) -> list[str]:
    words = name.split(".")
    return [".".join(words[i:]) for i in range(len(words))]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _sha256(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
