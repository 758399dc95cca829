"""Stored weights, read without filling memory: tensors are mapped from their files and come in when they are used.

A folder holds `model.safetensors` or `pytorch_model.bin`, or either in shards, with an index or without. Files of
torch are read with `weights_only`, so nothing in them can run. Which file is taken where there are several is
transformers' order, so that what is checked here is what it loads.
"""

import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hydra_vlm.errors import CheckpointError, FileError
from hydra_vlm.files import as_umask_says, write_json
from hydra_vlm.reading import open_file, read_json, require_file

LONGEST_HEADER = 2**24
"""Bytes of a safetensors file's list of tensors (16 MiB)."""

MOST_TENSORS = 2**16
"""Tensors of one file; safetensors takes half a minute to list a million, even if all of them are empty."""

_LARGEST_SHARD, _SMALLEST_SHARD = 10**9, 64 * 2**20  # bytes
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.(?:safetensors|bin)$")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files with a model's weights in a folder, safetensors first; empty where there are none.

    Raises:
        CheckpointError: a shard is missing, or the index is damaged.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if (folder / f"{stem}.{suffix}").is_file():
            return (folder / f"{stem}.{suffix}",)
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            return _all_there([folder / name for name in _indexed(index)])
        shards = sorted(path for path in folder.glob(f"{stem}-*.{suffix}") if _SHARD.search(path.name))
        if shards:
            count = _SHARD.search(shards[0].name).group(2)  # type: ignore[union-attr]
            names = (f"{stem}-{number:05d}-of-{count}.{suffix}" for number in range(1, int(count) + 1))
            return _all_there([folder / name for name in names])
    return ()


def read_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of all files by their names, mapped from disk.

    Raises:
        CheckpointError: a file cannot be read, holds more than tensors, or repeats a name of another.
    """
    return {name: tensor for tensors in read_files(files).values() for name, tensor in tensors.items()}


def read_files(files: Iterable[Path]) -> dict[Path, dict[str, Tensor]]:
    """The same file by file; raises as `read_weights` does."""
    found: dict[Path, dict[str, Tensor]] = {}
    seen: set[str] = set()
    for path in files:
        tensors = read_file(path)
        twice = seen & tensors.keys()
        if twice:
            raise CheckpointError(
                f"{path} holds {min(twice)}, which another file of the checkpoint holds, too: fetch or save it again."
            )
        found[path] = tensors
        seen |= tensors.keys()
    return found


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped from disk.

    Raises:
        CheckpointError: the file cannot be read, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            read_header(path)
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tensors = _load(path)
    except (OSError, EOFError, RuntimeError, SafetensorError) as problem:
        raise CheckpointError(f"{path} cannot be read ({str(problem).splitlines()[0]}): fetch it again.") from problem
    except pickle.UnpicklingError as problem:
        raise CheckpointError(
            f"{path} holds more than tensors, and loading it could run code: get it as safetensors, or save its state "
            "dict by itself."
        ) from problem
    if not isinstance(tensors, Mapping) or not all(map(_is_dense, tensors.values())):
        raise CheckpointError(
            f"{path} is not a state dict: it must hold dense tensors by name and nothing else. Save it again."
        )
    return dict(tensors)


def read_header(path: Path) -> bytes:
    """The list of tensors at the head of a safetensors file, as it is written; empty where the file has none.

    Raises:
        CheckpointError: it is longer than those of models, so that reading it would hold up the machine.
    """
    with open_file(path) as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= LONGEST_HEADER else b""
    if length > max(LONGEST_HEADER, path.stat().st_size):  # no list at all, which safetensors says
        return b""
    if length > LONGEST_HEADER or header.count(b":") > 4 * MOST_TENSORS:  # four a tensor
        raise CheckpointError(
            f"{path} begins with a list of {length:,} bytes, longer than one of {MOST_TENSORS:,} tensors, more than "
            "are read from one file: fetch it again, or save the model in shards."
        )
    return header


def write_weights(
    folder: Path, weights: Mapping[str, Tensor], finish: Callable[[str, Tensor], Tensor] | None = None
) -> None:
    """Write `model.safetensors`, in shards of up to 1 GB with an index where it is larger.

    `finish` makes of each mapped tensor the one to write, of the same shape and dtype. What it makes lies in memory for
    one shard at a time, so shards are then a sixteenth of the whole (64 MiB at least).
    """
    total = sum(tensor.nbytes for tensor in weights.values())
    limit = min(_LARGEST_SHARD, max(total // 16, _SMALLEST_SHARD)) if finish else _LARGEST_SHARD
    split = split_torch_state_dict_into_shards(dict(weights), max_shard_size=limit)
    for filename, names in split.filename_to_tensors.items():
        write_tensors(
            folder / filename, {name: finish(name, weights[name]) if finish else weights[name] for name in names}
        )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, readable as the umask says."""
    on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    save_file(_apart(on_cpu), path, metadata={"format": "pt", **(metadata or {})})
    as_umask_says(path)


def write_model(folder: Path, model: Any, processor: Any) -> None:
    """Write a transformers model and its processor, readable as the umask says."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    as_umask_says(folder)


def few(names: Iterable[str]) -> str:
    """The first three names and how many more."""
    every = list(names)
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")


def _indexed(index: Path) -> list[str]:
    """The files that an index names; they lie beside it."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        inside = bool(names) and all(Path(name).name == name for name in names)
    except (FileError, KeyError, TypeError, AttributeError):
        inside = False
    if not inside:
        raise CheckpointError(f"{index} is no index of weights: it must name files beside it. Fetch or save it again.")
    return names


def _all_there(files: list[Path]) -> tuple[Path, ...]:
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, one of {len(files)} files of the checkpoint: fetch it again.")
    return tuple(files)


def _is_dense(value: Any) -> bool:
    """Whether it is a tensor with a number in the file for each of its elements, not one number for millions."""
    return (
        isinstance(value, Tensor) and value.layout == torch.strided and value.nbytes <= value.untyped_storage().nbytes()
    )


def _load(path: Path) -> object:
    require_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as problem:
        if "mmap" not in str(problem):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # torch's format before 1.6


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, contiguous and with no memory in common, as safetensors wants them."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        shared = whole.data_ptr() in seen or whole.untyped_storage().nbytes() != whole.nbytes
        apart[name] = whole.clone() if shared else whole
        seen.add(apart[name].data_ptr())
    return apart
