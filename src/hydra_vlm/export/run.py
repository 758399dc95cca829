"""Export an adapter: cheap questions first, then write, load again and compare, then let the folder appear."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from hydra_vlm.errors import ConfigError
from hydra_vlm.export.merged import export_merged, require_quantized_base, stored_dtype
from hydra_vlm.export.original import export_original, original_config
from hydra_vlm.export.outcome import Exported, Outcome
from hydra_vlm.export.plain_peft import export_peft
from hydra_vlm.export.snippet import export_snippet
from hydra_vlm.export.source import Source, open_source
from hydra_vlm.export.uniform import export_uniform, uniform_rank
from hydra_vlm.files import require_free, whole_folder

Format = Literal["merged", "peft", "uniform", "original", "snippet"]
Writer = Callable[[Path], Outcome]


def export(
    model: str,
    adapter: str | Path,
    destination: str | Path,
    form: Format,
    rank: int | None = None,
    device: str = "cpu",
    decoder_pattern: str | None = None,
    other_base: bool = False,
) -> Exported:
    """Write an adapter (a snippet: or a schedule.json) in another form to a folder that appears whole or not at all.

    `rank` is the one rank of `uniform`. Everything is computed in float32 on `device`. `decoder_pattern` is for
    `find_parts`, as the model was trained with. `other_base` permits a base with other weights than it was trained on.

    Raises ConfigError, AdapterError or RunFolderError, for whatever can be known beforehand before a model is loaded.
    """
    destination = Path(destination)
    require_free(destination)
    source = open_source(model, adapter, device, decoder_pattern, other_base)
    write = _writer(source, form, rank)
    with whole_folder(destination) as draft:
        outcome = write(draft)
    files = sorted(path for path in destination.rglob("*") if path.is_file())
    sizes = tuple((str(path.relative_to(destination)), path.stat().st_size) for path in files)
    return Exported(form, destination, sizes, outcome)


def _writer(source: Source, form: Format, rank: int | None) -> Writer:
    """The writer of a form, with all questions asked that need no weights."""
    if form not in get_args(Format):
        raise ConfigError(f"export format {form!r} does not exist: choose one of {', '.join(get_args(Format))}.")
    if rank is not None and form != "uniform":
        raise ConfigError(f"--rank is the one rank of a uniform export; {form} keeps its own: leave --rank out.")
    if form == "snippet":
        return lambda draft: export_snippet(source, draft)
    folder = source.folder  # a schedule alone ends here
    assert folder.is_dir()
    if form == "merged":
        stored_dtype(source)
        require_quantized_base(source)
        return lambda draft: export_merged(source, draft)
    if form == "uniform":
        padded = uniform_rank(source.schedule, rank)
        return lambda draft: export_uniform(source, draft, padded)
    if form == "original":
        original_config(source)
        return lambda draft: export_original(source, draft)
    return lambda draft: export_peft(source, draft)
