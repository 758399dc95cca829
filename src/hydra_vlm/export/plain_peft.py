"""`peft`: the adapter as it is, for any program that loads PEFT, with the projector beside it."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from hydra_vlm.export.comparison import (
    EXACT,
    Comparison,
    Probe,
    adapted_logits,
    compare,
    logits,
    quantization_notes,
)
from hydra_vlm.export.outcome import Outcome
from hydra_vlm.export.source import Source
from hydra_vlm.lora import CONFIG, PROJECTOR, SCHEDULE, WEIGHTS
from hydra_vlm.models.loading import LoadedModel
from hydra_vlm.stored_adapter import RECORD
from hydra_vlm.verification import require_modules, strictly

PROJECTOR_NOTE = (
    f"the projector was trained too: whoever loads the adapter must put {PROJECTOR} into the model's projector "
    "(keys are relative to it), or serve the merged export"
)


def export_peft(source: Source, draft: Path) -> Outcome:
    """Copy the adapter's files, then load them with PEFT alone.

    Raises AdapterError when PEFT does not give what the adapter gives.
    """
    loaded, before, probe = adapted_logits(source)
    wanted = source.scales(loaded.parts)
    del loaded
    for name in (CONFIG, WEIGHTS, SCHEDULE, PROJECTOR, RECORD):
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, draft / name)
    seen = check_peft_folder(source, draft, wanted, before, probe)
    notes = (*projector_notes(draft), *quantization_notes(source))
    return Outcome("loaded with PeftModel.from_pretrained", seen, notes)


def check_peft_folder(
    source: Source, folder: Path, wanted: Mapping[str, tuple[int, float]], before: Tensor, probe: Probe
) -> Comparison:
    """Load a folder with nothing but PEFT over the bare model: the modules, ranks and scales wanted, and the logits.

    Raises AdapterError on any difference.
    """
    loaded = source.base()
    load_projector(loaded, folder / PROJECTOR)
    with strictly(f"adapter for {source.model}"):
        peft_model = PeftModel.from_pretrained(loaded.model, str(folder))
    require_modules(peft_model, wanted, "the export")
    return compare(before, logits(peft_model, probe), EXACT, probe)


def load_projector(loaded: LoadedModel, path: Path) -> None:
    """Put a projector's weights, named relative to it, into the bare model; a file that is not there is none."""
    if path.is_file():
        assert loaded.parts.projector is not None
        loaded.model.get_submodule(loaded.parts.projector).load_state_dict(load_file(path))


def projector_notes(folder: Path) -> tuple[str, ...]:
    """What has to be said where the folder holds a projector."""
    return (PROJECTOR_NOTE,) if (folder / PROJECTOR).is_file() else ()
