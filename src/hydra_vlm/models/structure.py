"""Which modules of a loaded model are its decoder, its projector and its vision tower, and what LoRA may adapt.

The paper adapts the linear projections of the decoder's layers; embeddings and the output head are not part of the
computation graph, and the tower and the projector only where they are asked for. Only names, types and shapes are read,
so a model on the meta device will do.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from hydra_vlm.errors import AdapterError, ConfigError
from hydra_vlm.graph import DECODER, ComputationGraph, Projection
from hydra_vlm.models.unreached import is_router, layers_with_experts, takes_expressions, takes_name, unreached

DECODER_NAMES = ("language_model", "text_model", "text_decoder", "decoder", "llm")
TOWER_NAMES = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_tower")
PROJECTOR_NAMES = (
    "mm_projector",
    "multi_modal_projector",
    "connector",
    "projector",
    "merger",
    "language_projection",
    "aligner",
)
MOST_REPEATS = 4
"""Repeats in a decoder_pattern: the time of a match grows with their power of a name's length."""

TOWER, PROJECTOR = "tower", "projector"
ADAPTABLE = (DECODER, TOWER, PROJECTOR)
"""The parts that LoRA may reach, in the order in which a graph lists them."""


@dataclass(frozen=True)
class ModelParts:
    """Where the parts of a model are; every path is a dotted module name within the model as it was given.

    `decoder` is "" when the model is nothing but a decoder. `layers` is the list of decoder layers, so that layer i
    is the module `{layers}.{i}`. `modules` maps (layer, component) to the full module name, with exactly one entry
    for each projection of `graph`. `lists` are the module lists whose members are the graph's layers: the decoder's,
    and the tower's where it is adapted. `transposed` says that weights are stored [in, out], as GPT-2's Conv1D does;
    `takes_expressions` that PEFT reads a regular expression of targets as it stands.
    """

    decoder: str
    projector: str | None
    tower: str | None
    layers: str
    modules: Mapping[tuple[int, str], str]
    graph: ComputationGraph
    lists: tuple[str, ...] = ()
    transposed: bool = False
    takes_expressions: bool = True

    def names(self) -> tuple[str, ...]:
        """Full module names, aligned with `graph.projections`."""
        return tuple(self.modules[p.layer, p.component] for p in self.graph.projections)


def find_parts(model: nn.Module, decoder_pattern: str | None = None, adapt: Sequence[str] = (DECODER,)) -> ModelParts:
    """The parts of a transformers-style model and the computation graph of what is to be adapted.

    `decoder_pattern` is a regular expression that the full names of all decoder layers match, and of no other
    module, such as r"model\\.language_model\\.layers\\.\\d+"; it is needed only where the decoder is not found.
    `adapt` names the parts that LoRA may reach, of `ADAPTABLE`. The tower's layers are those that lie before the
    selected feature layer; the projector is one layer with all its linears. What stays as it is in the layers that are
    adapted (experts in one tensor, routers) is said in the graph's notes.

    Raises ConfigError when the decoder is not found, the pattern does not describe one list of layers, or a part to be
    adapted is not there, AdapterError when the model carries an adapter already.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise AdapterError(
            "the model carries an adapter already: find its parts before attaching one, or detach it first."
        )
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    if decoder_pattern is None:
        decoder = _find_decoder(model, names)
        layers = _find_layers(model, decoder)
    else:
        layers = _layers_matching(model, decoder_pattern)
        decoder = layers.rpartition(".")[0]
    tower = _find_tower(model, names, decoder, layers)
    projector = _outside(model, PROJECTOR_NAMES, decoder)
    paths = {DECODER: layers, TOWER: tower, PROJECTOR: projector}
    reach = _reach(model, adapt, paths)
    roots = {
        part: _find_layers(model, path, part) if part == TOWER else path
        for part, path in paths.items()
        if path and part in reach
    }
    renamed = _drop_renamed(model, reach)
    modules: dict[tuple[int, str], str] = {}
    counts: list[tuple[str, int]] = []
    for part, located in reach.items():
        start, prefix = sum(n for _, n in counts), "" if part == DECODER else f"{part}."
        modules |= {(start + layer, prefix + component): name for (layer, component), name in located.items()}
        counts.append((part, 1 + max(layer for layer, _ in located)))
    linears = {name: model.get_submodule(name) for name in modules.values()}
    graph = ComputationGraph(
        _graph_name(model),
        tuple(Projection(layer, component, *_features(linears[name])) for (layer, component), name in modules.items()),
        tuple(counts),
        unreached(
            model,
            {
                root: None if part == PROJECTOR else {str(layer) for layer, _ in reach[part]}
                for part, root in roots.items()
            },
            modules.values(),
            renamed,
        ),
    )
    return ModelParts(
        decoder=decoder,
        projector=projector,
        tower=tower,
        layers=layers,
        modules=modules,
        graph=graph,
        lists=(layers, *([roots[TOWER]] if TOWER in reach else [])),
        transposed=any(isinstance(linear, Conv1D) for linear in linears.values()),
        takes_expressions=takes_expressions(model, next(iter(linears))),
    )


NO_TOKEN = -1


def image_token(config: Any, parts: ModelParts) -> int | None:
    """The token that stands where an image is; of a model that sees none, what no token is; None if it is not known."""
    if parts.tower is None and parts.projector is None:
        return NO_TOKEN
    found = getattr(config, "image_token_id", None)
    return found if isinstance(found, int) else None


def _reach(
    model: nn.Module, adapt: Sequence[str], paths: Mapping[str, str | None]
) -> dict[str, dict[tuple[int, str], str]]:
    """For each part to be adapted, (layer within it, component) -> full module name."""
    unknown = sorted(set(adapt) - set(ADAPTABLE))
    if unknown or not adapt:
        raise ConfigError(f"adapt names {unknown[0] if unknown else 'no part'}: choose from {', '.join(ADAPTABLE)}.")
    reach = {}
    for part in ADAPTABLE:
        if part not in adapt:
            continue
        path = paths[part]
        if path is None:
            raise ConfigError(f"adapt names the {part}, but {type(model).__name__} has none: leave it out.")
        if part == PROJECTOR:
            found = {name: m for name, m in model.get_submodule(path).named_modules() if _is_linear(m)}
            reach[part] = {(0, name or "linear"): f"{path}.{name}" if name else path for name in found}
        else:
            layers = path if part == DECODER else _find_layers(model, path, part)
            reach[part] = _components(_linears(model, layers), layers)
        if part == TOWER:
            used = _layers_used(model, 1 + max(layer for layer, _ in reach[part]))
            reach[part] = {key: name for key, name in reach[part].items() if key[0] < used}
        if not reach[part]:
            raise ConfigError(f"adapt names the {part}, but {path} has no linear layers that run: leave it out.")
    return reach


def _drop_renamed(model: nn.Module, reach: Mapping[str, dict[tuple[int, str], str]]) -> list[str]:
    """Take out of reach, and return, the linears whose names PEFT would take for those of fused experts."""
    leaves = {name.rpartition(".")[2] for located in reach.values() for name in located.values()}
    lost = {leaf for leaf in leaves if not takes_name(model, leaf)}
    dropped = []
    for located in reach.values():
        for key in [key for key, name in located.items() if name.rpartition(".")[2] in lost]:
            dropped.append(located.pop(key))
    return dropped


def _layers_used(model: nn.Module, layers: int) -> int:
    """How many of the tower's layers come before the deepest hidden state that the model reads (-1: all)."""
    selected = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    chosen = [selected] if isinstance(selected, int) else list(selected or [-1])
    return max(layer if layer >= 0 else layers + 1 + layer for layer in chosen)


def _find_decoder(model: nn.Module, names: Mapping[int, str]) -> str:
    """transformers' own answer where there is one, otherwise the outermost module with a decoder's usual name."""
    get_decoder = getattr(model, "get_decoder", None)
    found = get_decoder() if callable(get_decoder) else None
    if isinstance(found, nn.Module) and id(found) in names:
        if getattr(found, "main_input_name", "input_ids") == "input_ids":
            return names[id(found)]
        raise ConfigError(
            f"{type(model).__name__} reads {found.main_input_name}, not text: it has no language decoder to adapt. "
            + _describe(model)
        )
    named = _shallowest(name for name in names.values() if name.rpartition(".")[2] in DECODER_NAMES)
    return named if named is not None else ""


def _find_layers(model: nn.Module, part: str, what: str = DECODER) -> str:
    """The longest of a part's outermost module lists whose members all have attention and linears."""
    lists = {
        name: module
        for name, module in _outermost_lists(model.get_submodule(part), part)
        if len(module) and all(_is_decoder_layer(layer) for layer in module)
    }
    longest = max((len(module) for module in lists.values()), default=0)
    candidates = [name for name, module in lists.items() if len(module) == longest]
    if len(candidates) != 1:
        why = f"{' and '.join(candidates)} are equally long" if candidates else "none has attention in every layer"
        where = f"{what} {part!r}" if part else "model"
        remedy = _describe(model) if what == DECODER else f"Leave {what} out of adapt."
        raise ConfigError(
            f"the {what} layers of {type(model).__name__} are not clear: of the module lists in its {where}, {why}. "
            + remedy
        )
    return candidates[0]


def _layers_matching(model: nn.Module, pattern: str) -> str:
    """The module list whose members' names the pattern matches."""
    if not _is_quick(pattern):
        raise ConfigError(
            f"decoder_pattern {pattern[:80]!r} could take for ever to match: at most {MOST_REPEATS} of * + {{}}, none "
            "of them behind a group with another or with | in it, and 500 characters are run. "
            r"Write the layers' names out, as in 'model\.language_model\.layers\.\d+'."
        )
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"decoder_pattern {pattern!r} is not a regular expression: {error}.") from error
    matched = [name for name, _ in model.named_modules() if expression.fullmatch(name)]
    containers = {name.rpartition(".")[0] for name in matched}
    if len(containers) != 1:
        what = f"matches modules of {', '.join(sorted(containers))}" if containers else "matches no module"
        raise ConfigError(
            f"decoder_pattern {pattern!r} {what}: it must match the layers of one list. " + _describe(model)
        )
    container = containers.pop()
    members = {f"{container}.{name}" for name, _ in model.get_submodule(container).named_children()}
    if members != set(matched) or not all(name.rpartition(".")[2].isdecimal() for name in matched):
        raise ConfigError(
            f"decoder_pattern {pattern!r} matches {len(matched)} of the {len(members)} members of {container}: it must "
            r"match every layer and nothing else, as in '" + re.escape(container) + r"\.\d+'."
        )
    return container


def _is_quick(pattern: str) -> bool:
    """Whether a regular expression takes polynomial time: no repeats of repeats or of choices, and few repeats."""
    bare = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "a", pattern, flags=re.DOTALL)  # escapes and classes are one character
    repeats, inside, closed = 0, [False], False
    for place, mark in enumerate(bare):
        if mark == "(":
            inside.append(False)
        elif mark in "*+{" and bare[place - 1 : place] not in ("*", "+", "}", "?"):
            if closed:
                return False
            repeats, inside[-1] = repeats + 1, True
        elif mark == "|":
            inside[-1] = True
        closed = mark == ")" and inside.pop() if len(inside) > 1 or mark != ")" else True
        inside[-1] |= closed
    return repeats <= MOST_REPEATS and len(pattern) <= 500


def _find_tower(model: nn.Module, names: Mapping[int, str], decoder: str, layers: str) -> str | None:
    get_encoder = getattr(model, "get_encoder", None)
    if callable(get_encoder):
        try:
            found = names.get(id(get_encoder("image")))
        except TypeError:  # models with an encoder of their own define get_encoder() without a modality
            found = None
        # transformers answers with the model itself when there is no tower
        if found and not _within(layers, found):
            return found
    return _outside(model, TOWER_NAMES, decoder)


def _outside(model: nn.Module, wanted: tuple[str, ...], decoder: str) -> str | None:
    """The shallowest module outside the decoder with one of the wanted names."""
    return _shallowest(
        name
        for name, _ in model.named_modules()
        if name.rpartition(".")[2] in wanted and not (decoder and _within(name, decoder))
    )


def _shallowest(names: Iterable[str]) -> str | None:
    return min(names, key=lambda name: name.count("."), default=None)


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _outermost_lists(module: nn.Module, name: str) -> Iterable[tuple[str, nn.ModuleList]]:
    """Module lists that lie in no other list: lists of experts within the layers are not among them."""
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}" if name else child_name
        if isinstance(child, nn.ModuleList):
            yield full, child
        else:
            yield from _outermost_lists(child, full)


def _is_decoder_layer(layer: nn.Module) -> bool:
    attends = any(
        "attn" in name.lower() or "attention" in name.lower() or "attention" in type(module).__name__.lower()
        for name, module in layer.named_modules()
    )
    return attends and any(_is_linear(module) for module in layer.modules())


def _is_linear(module: nn.Module) -> bool:
    """Whether LoRA can adapt it: linears, quantised ones of bitsandbytes included, and GPT-2's Conv1D.

    nn.MultiheadAttention reads its output projection's weight without calling the module, so LoRA there would do
    nothing.
    """
    return isinstance(module, nn.Linear | Conv1D) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _features(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def _linears(model: nn.Module, layers: str) -> dict[str, nn.Module]:
    """Linear modules of the decoder layers by full name, in the model's own order; routers among experts left out."""
    stack = model.get_submodule(layers)
    with_experts = layers_with_experts(stack)
    found = {f"{layers}.{name}": module for name, module in stack.named_modules() if _is_linear(module)}
    return {name: module for name, module in found.items() if not is_router(name, layers, with_experts)}


def _components(linears: Iterable[str], layers: str) -> dict[tuple[int, str], str]:
    """(layer, component) -> full name; a component is the module's own name.

    Where a layer has that name twice (experts, self- and cross-attention), as much of the path as tells them apart is
    put before it, in every layer.
    """
    located = [(name, *name.removeprefix(f"{layers}.").split(".", 1)) for name in linears]
    paths = list(dict.fromkeys(path for _, _, path in located))
    seen = Counter((layer, path.rpartition(".")[2]) for _, layer, path in located)
    repeated = {leaf for (_, leaf), count in seen.items() if count > 1}
    short: dict[str, str] = {}
    for path in paths:
        leaf = path.rpartition(".")[2]
        rivals = [other for other in paths if other != path and other.rpartition(".")[2] == leaf]
        short[path] = _shortest_suffix(path, rivals) if leaf in repeated else leaf
    return {(int(layer), short[path]): name for name, layer, path in located}


def _shortest_suffix(path: str, rivals: list[str]) -> str:
    parts = path.split(".")
    for start in range(len(parts) - 2, 0, -1):
        suffix = ".".join(parts[start:])
        unique = not any(f".{rival}".endswith(f".{suffix}") for rival in rivals)
        if unique and not parts[start].isdecimal():
            return suffix
    return path


def _graph_name(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    return str(getattr(config, "model_type", None) or type(model).__name__)


def _describe(model: nn.Module) -> str:
    lists = [
        f"{name} ({len(module)} x {type(module[0]).__name__})"
        for name, module in _outermost_lists(model, "")
        if len(module)
    ]
    return (
        "Set decoder_pattern to a regular expression that the full names of the decoder layers match, as in "
        rf"'model\.language_model\.layers\.\d+'. Module lists of this model: {', '.join(lists) or 'none'}."
    )
