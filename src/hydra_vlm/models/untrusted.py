"""Files of strangers: nothing in them may run.

torch reads pickles here with `weights_only` alone, transformers and PEFT do so by themselves; code that a model's
folder brings (`auto_map`) is never imported. What they refuse becomes our error.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from hydra_vlm.errors import CheckpointError


@contextmanager
def refusing_code(what: str) -> Iterator[None]:
    """While the block lasts, a pickle of more than tensors is a CheckpointError about `what`; it did not run."""
    try:
        yield
    except pickle.UnpicklingError as problem:
        raise CheckpointError(
            f"{what} holds a pickle with more than tensors, and loading it could run code, so it was refused "
            f"({_first_line(problem)}): get the weights as safetensors, or remove the file if you did not write it"
        ) from None


def _first_line(problem: Exception) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return (lines or [type(problem).__name__])[0][:200]
