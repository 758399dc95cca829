"""What LoRA does not reach in the layers that it adapts, said by name: above all experts, which have no linears.

transformers keeps the experts of a mixture in one tensor of three dimensions a layer. PEFT can put LoRA on a bare
tensor (`target_parameters`), but then it multiplies all experts out in every step, so that each step holds the update
and the gradient of all experts in full, and it takes no dropout; so such experts are named as not adapted. Experts that
are linears of their own are adapted. Routers never are: which expert sees a token is what the experts were trained for.
"""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

EXPERTS = "experts"
ROUTERS = frozenset({"router", "gate", "shared_expert_gate"})
"""What transformers calls the modules that choose experts, and the one that weighs a shared expert."""

ROUTER, FUSED, RENAMED, OTHER = (
    "routers keep sending tokens where they were trained to",
    "fused experts, one tensor for all of a layer",
    "PEFT takes the names of these linears for those of fused experts",
    "no linear layers",
)


def is_router(name: str, layers: str, with_experts: frozenset[str]) -> bool:
    """Whether a module of a layer (full name) chooses among that layer's experts."""
    layer, _, path = name.removeprefix(f"{layers}.").partition(".")
    return layer in with_experts and bool(ROUTERS & set(path.split(".")))


def layers_with_experts(stack: nn.Module) -> frozenset[str]:
    """The numbers of the layers that have experts."""
    return frozenset(name.partition(".")[0] for name, _ in stack.named_modules() if EXPERTS in name.split("."))


def takes_expressions(model: nn.Module, name: str) -> bool:
    """Whether PEFT reads a regular expression of targets, such as one of this module's name, as it stands.

    For many mixtures of experts it makes a set of last names of it, so that every layer's modules of such a name would
    be adapted; a list of whole names is left as it is.
    """
    return isinstance(_converted(model, re.escape(name)).target_modules, str)


def takes_name(model: nn.Module, leaf: str) -> bool:
    """Whether PEFT looks for a module of this last name, and not for the tensor that fused experts have instead."""
    try:
        return leaf in (_converted(model, [leaf]).target_modules or ())
    except ValueError:  # one of the names that were fused, without the others
        return False


def unreached(
    model: nn.Module, roots: Mapping[str, Iterable[str] | None], adapted: Iterable[str], renamed: Sequence[str]
) -> tuple[str, ...]:
    """A line for each kind of weight matrix that stays as it is, with names, layers and numbers of parameters.

    `roots` are the lists of layers that are adapted, each with the numbers of the layers (None: no list, but a module
    by itself); `adapted` and `renamed` are full names of linears.
    """
    known, taken = set(adapted), set(renamed)
    found: dict[str, dict[str, list[int]]] = {}
    for root, numbers in roots.items():
        stack = model.get_submodule(root)
        with_experts = layers_with_experts(stack) if numbers is not None else frozenset()
        wanted = None if numbers is None else set(numbers)
        for name, parameter in stack.named_parameters():
            owner, _, leaf = f"{root}.{name}".rpartition(".")
            layer, _, path = name.partition(".")
            if parameter.dim() < 2 or "bias" in leaf or owner in known or (wanted is not None and layer not in wanted):
                continue
            kind = OTHER
            if owner in taken:
                kind = RENAMED
            elif is_router(owner, root, with_experts):
                kind = ROUTER
            elif layer in with_experts and (parameter.dim() > 2 or EXPERTS in path.split(".")):
                kind = FUSED
            said = (name if wanted is None else path).removesuffix(".weight")
            found.setdefault(kind, {}).setdefault(said, []).append(parameter.numel())
    return tuple(_line(kind, found[kind]) for kind in (FUSED, ROUTER, RENAMED, OTHER) if kind in found)


def _line(kind: str, sizes: Mapping[str, Sequence[int]]) -> str:
    layers = max(len(counts) for counts in sizes.values())
    total = sum(sum(counts) for counts in sizes.values())
    where = f" of {layers} layers" if layers > 1 else ""
    return f"not adapted: {', '.join(sizes)}{where}, {total:,} parameters ({kind})"


def _converted(model: nn.Module, targets: str | list[str]) -> LoraConfig:
    """A configuration as PEFT rewrites it for this model before it looks for the targets."""
    config = LoraConfig(target_modules=copy.copy(targets))
    convert_peft_config_for_transformers(config, model, None)
    return config
