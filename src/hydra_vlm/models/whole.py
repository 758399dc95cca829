"""A stored model is whole: every weight that its configuration asks for is there, finite, of the right kind and shape.

transformers fills what a folder lacks with random numbers and says so in its log; here that is an error. Stored
tensors that the model has no place for are named in a warning, or refused where they continue a numbered list of the
model's own, such as the layers beyond the configuration's last.

Looking for NaN and infinity takes one pass over mapped files, some 2.5 GB a second on one core, once a process.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from hydra_vlm.errors import CheckpointError
from hydra_vlm.models.untrusted import refusing_code
from hydra_vlm.models.weights import few, read_files, weight_files

AGAIN = "fetch the folder again, or save it again from a whole model"

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_log = logging.getLogger(__name__)
_sound: set[tuple[Path, int, int, torch.dtype]] = set()  # files that were found sound, as they were then


def load_whole(kind: Any, folder: Path, **how: Any) -> PreTrainedModel:
    """`kind.from_pretrained(folder, **how)`, refused unless all of the model comes from the folder's files.

    Raises:
        CheckpointError: a tensor is missing, of another shape or kind, NaN or infinite, or a file cannot be read.
    """
    files = {} if "gguf_file" in how else read_files(_stored(folder))
    try:
        with refusing_code(f"model {folder}"), _without_report():
            model, found = kind.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **how
            )
    except (SafetensorError, OSError) as problem:
        raise CheckpointError(f"model {folder} cannot be read ({str(problem).splitlines()[0]}): {AGAIN}.") from None
    _require_complete(folder, model, found)
    own_rule = getattr(model.config, "quantization_config", None) is not None and "quantization_config" not in how
    integers = None if own_rule else integer_buffers(model)
    for path, tensors in files.items():
        _require_sound_file(path, tensors, integers, model.dtype)
    if not files:
        require_sound(dict(model.named_parameters()), f"model {folder}", integers, model.dtype)
    loaded: PreTrainedModel = model
    return loaded


def require_sound(
    tensors: Mapping[str, Tensor], what: str, integers: Iterable[str] | None = (), dtype: torch.dtype = torch.float32
) -> None:
    """Raises CheckpointError about `what` for NaN, infinity, values beyond `dtype`, or tensors that are no floats.

    Integers are expected, and floats are not, under names that end in one of `integers`; None: no kind is asked for.
    """
    problem = unsound(tensors, integers, dtype)
    if problem is not None:
        raise CheckpointError(f"{what}: {problem}: {AGAIN}.")


def unsound(
    tensors: Mapping[str, Tensor], integers: Iterable[str] | None = (), dtype: torch.dtype = torch.float32
) -> str | None:
    """The first thing that is wrong with these tensors, in words; see `require_sound`."""
    counts = None if integers is None else set(integers)
    for name, tensor in tensors.items():
        is_count = counts is not None and name.rpartition(".")[2] in counts
        if counts is not None and tensor.is_floating_point() == is_count:
            kind = str(tensor.dtype).removeprefix("torch.")
            return f"{name} holds {kind}, not {'whole' if is_count else 'floating-point'} numbers"
        if tensor.is_floating_point() and tensor.numel():
            wide = tensor.float() if tensor.element_size() == 1 else tensor
            least, largest = (float(end) for end in torch.aminmax(wide.detach()))  # NaN if any is, without a copy
            limit = torch.finfo(dtype).max
            if not (-limit <= least and largest <= limit):
                return f"{name} holds NaN or infinity" + f", or more than {dtype} does" * (tensor.dtype != dtype)
    return None


def integer_buffers(model: nn.Module) -> set[str]:
    """The last part of the names of buffers that hold whole numbers, such as BatchNorm's num_batches_tracked."""
    return {name.rpartition(".")[2] for name, buffer in model.named_buffers() if not buffer.is_floating_point()}


def _stored(folder: Path) -> tuple[Path, ...]:
    """The files that transformers will load."""
    files = weight_files(folder)
    if not files:
        raise CheckpointError(
            f"model {folder} holds no weights: neither model.safetensors nor pytorch_model.bin, whole or in shards. "
            "Fetch the folder again."
        )
    if len(files) > 1 and not list(folder.glob("*.index.json")):
        raise CheckpointError(f"model {folder} has its weights in {len(files)} shards, but no index of them: {AGAIN}.")
    return files


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers' log of what it missed is left out: the same findings are an error here."""
    theirs = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    theirs.addFilter(is_other)
    try:
        yield
    finally:
        theirs.removeFilter(is_other)


def _require_sound_file(
    path: Path, tensors: Mapping[str, Tensor], integers: Iterable[str] | None, dtype: torch.dtype
) -> None:
    seen = path.stat()
    key = (path.resolve(), seen.st_size, seen.st_mtime_ns, dtype)
    if key not in _sound:
        require_sound(tensors, str(path), integers, dtype)
        _sound.add(key)


def _require_complete(folder: Path, model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    expected = model.state_dict().keys()
    missing, strange = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        also = f", while {len(strange)} stored tensors have no place in it, such as {strange[0]}" if strange else ""
        raise CheckpointError(
            f"model {folder} is not whole: of the {len(expected)} tensors that its config.json asks for, "
            f"{len(missing)} are not in its weights ({few(missing)}){also}: {AGAIN}."
        )
    if found["mismatched_keys"]:
        others = len(found["mismatched_keys"]) - 1
        name, stored, wanted = sorted(found["mismatched_keys"])[0]
        raise CheckpointError(
            f"model {folder}: {name} is stored as {list(stored)}, its config.json asks for {list(wanted)}"
            + (f", and {others} more differ: " if others else ": ")
            + f"config.json and weights are of two models. {AGAIN.capitalize()}."
        )
    patterns = {_NUMBER.sub("*", name) for name in expected}
    beyond = [name for name in strange if _NUMBER.sub("*", name) in patterns]
    if beyond:
        raise CheckpointError(
            f"model {folder} holds {len(beyond)} tensors beyond those that its config.json asks for ({few(beyond)}): "
            f"it says fewer layers than are stored. {AGAIN.capitalize()}."
        )
    if strange:
        _log.warning("model %s: %d stored tensors are not used: %s", folder, len(strange), few(strange))
