"""What a base model is, in a few numbers: its configuration and digests of its weights, part by part.

A digest knows values, not files or names: it is the same however the weights are sharded, mapped or renamed. It is
taken of the values rounded to bfloat16 and once more to float16, so a base that was cast keeps one of the two. Of a
large tensor 64 blocks of 1,024 values are taken, spread from its beginning to its end: some 0.1 MB a tensor, and
another training has changed every one of them, while a change of single values may lie between.

The decoder's linear layers of a base in four bits are left out: their rounding depends on dtype and device.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hydra_vlm.models.structure import ModelParts

BLOCKS, BLOCK = 64, 1024
PRECISIONS = (torch.bfloat16, torch.float16)
PROJECTOR, LINEARS = "projector", "the decoder's linear layers"

_STORAGE = frozenset(
    {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "name_or_path"}
    | {"quantization_config", "use_cache", "_attn_implementation", "attn_implementation", "experts_implementation"}
    | {"initializer_range", "return_dict", "bos_token_id", "eos_token_id", "pad_token_id"}
)
"""Keys of a configuration that say how a model is stored, begun or asked, not what it computes."""


@dataclass(frozen=True)
class Fingerprint:
    """`configuration`: plain values by dotted key; `weights`: part -> its digest at each precision."""

    configuration: Mapping[str, Any]
    weights: Mapping[str, tuple[str, ...]]

    def other_weights(self, now: "Fingerprint") -> list[str]:
        """The parts that both know and that hold other weights now."""
        shared = [part for part in self.weights if part in now.weights]
        return [
            part
            for part in shared
            if not any(a == b for a, b in zip(self.weights[part], now.weights[part], strict=True))
        ]

    def other_settings(self, now: "Fingerprint") -> list[str]:
        """The keys that both know and that say something else now, in words."""
        return [
            f"{key} {value!r} (now {now.configuration[key]!r})"
            for key, value in self.configuration.items()
            if key in now.configuration and now.configuration[key] != value
        ]

    def to_json(self) -> dict[str, Any]:
        return {"configuration": dict(self.configuration), "weights": {k: list(v) for k, v in self.weights.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Fingerprint":
        return cls(dict(value["configuration"]), {part: (str(a), str(b)) for part, (a, b) in value["weights"].items()})


def fingerprint(model: Any, parts: ModelParts, without: frozenset[str] = frozenset()) -> Fingerprint:
    """The fingerprint of a base model, which may carry an adapter; parts in `without` are left out."""
    digests: dict[str, list[tuple[bytes, ...]]] = defaultdict(list)
    quantized: set[str] = set()
    for module, name, tensor in _own_tensors(model):
        group = _group(module, name, parts)
        if group in without:
            continue
        if not tensor.is_floating_point():
            quantized |= {group} if isinstance(module, nn.Linear) else set()
            continue
        digests[group].append(_digest(tensor))
    weights = {}
    for group in sorted(digests.keys() - quantized):
        halves = [sorted(each[i] for each in digests[group]) for i in range(len(PRECISIONS))]
        weights[group] = tuple(hashlib.sha256(b"".join(half)).hexdigest()[:32] for half in halves)
    config = getattr(model, "config", None)
    return Fingerprint(dict(_plain(config.to_dict())) if config is not None else {}, weights)


def _own_tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(module, its full name, tensor) of all that the base stores, each tensor once; nothing of an adapter."""
    seen: set[int] = set()
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        base = name.removesuffix(".base_layer")
        if name == base and name.startswith(inside) and inside:
            continue  # LoRA's own modules
        stored = [*module._parameters.values(), *(b for n, b in module._buffers.items() if n not in _fleeting(module))]
        for tensor in stored:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield module, base, tensor


def _fleeting(module: nn.Module) -> set[str]:
    return module._non_persistent_buffers_set


def _group(module: nn.Module, name: str, parts: ModelParts) -> str:
    def within(path: str | None) -> bool:
        return path is not None and (not path or name == path or name.startswith(f"{path}."))

    if within(parts.projector):
        return PROJECTOR
    if within(parts.tower):
        return "vision tower"
    if within(parts.layers) and isinstance(module, nn.Linear):
        return LINEARS
    return "the rest of the decoder" if within(parts.decoder) else "the output head"


def _digest(tensor: Tensor) -> tuple[bytes, ...]:
    flat = tensor.detach().reshape(-1)
    if flat.numel() > BLOCKS * BLOCK:
        last = flat.numel() - BLOCK
        flat = torch.cat([flat[(at := last * i // (BLOCKS - 1)) : at + BLOCK] for i in range(BLOCKS)])
    values, shape = flat.cpu(), str(list(tensor.shape)).encode()
    rounded = ((values + 0.0).to(precision).view(torch.int16).numpy().tobytes() for precision in PRECISIONS)
    return tuple(hashlib.sha256(shape + data).digest() for data in rounded)


def _plain(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in _STORAGE:
            continue
        if isinstance(value, Mapping):
            yield from _plain(value, f"{before}{key}.")
        elif isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
            yield f"{before}{key}", value
