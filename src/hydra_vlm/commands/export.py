"""`hydra-vlm export`: transformers' own bars and notices off, then one call into the library."""

from pathlib import Path

import transformers

from hydra_vlm.export.outcome import Exported
from hydra_vlm.export.run import Format, export


def run_export(
    model: str,
    adapter: Path,
    destination: Path,
    form: Format,
    rank: int | None,
    device: str,
    decoder_pattern: str | None,
    other_base: bool = False,
) -> Exported:
    """The finished export; raises what `export` raises."""
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    return export(model, adapter, destination, form, rank, device, decoder_pattern, other_base)
