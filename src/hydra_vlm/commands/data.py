"""`hydra-vlm data`: write the embedded suite, check a data file or a folder of benchmarks. No torch without a model."""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra_vlm.benchmarks.suite import SIX, find_folders, load_tasks
from hydra_vlm.data.builtin import write_builtin
from hydra_vlm.data.preflight import Checked as CheckedFile
from hydra_vlm.data.preflight import check_file, check_reading, write_report
from hydra_vlm.errors import DataError
from hydra_vlm.files import require_free, require_place, whole_folder
from hydra_vlm.reading import file_fault


@dataclass(frozen=True)
class Checked:
    """A benchmark in a folder: how many questions it has, or what is wrong; `surplus` names what nobody reads."""

    benchmark: str
    folder: str
    questions: int = 0
    problem: str = ""
    surplus: tuple[str, ...] = ()

    def summary(self) -> str:
        state = f"{self.questions:,} questions in {self.folder}" if not self.problem else f"incomplete: {self.problem}"
        return f"{self.benchmark}: {state}" + (f"\n  not read: {', '.join(self.surplus)}" if self.surplus else "")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class FileRequest:
    """What a data file is checked for: alone, or for a model, whose reader then sees every record."""

    file: Path
    images: Path | None
    model: str | None
    template: str
    max_length: int
    max_image_pixels: int


def check_data_file(request: FileRequest, out: Path | None) -> CheckedFile:
    """The preflight of one file, its report in `out` where that is given.

    Raises:
        HydraError: the file cannot be read to its end, or the model cannot be loaded.
    """
    if out is not None:
        require_place(out)
    checked = check_file(request.file, request.images, request.max_image_pixels)
    if request.model is not None:
        from transformers import AutoConfig

        from hydra_vlm.data.readers import open_reader
        from hydra_vlm.models.loading import resolve_model
        from hydra_vlm.models.processors import load_processor

        folder = resolve_model(request.model)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        reader = open_reader(load_processor(folder, config), request.template)
        longest = getattr(config.get_text_config(), "max_position_embeddings", request.max_length)
        checked = check_reading(checked, reader, min(request.max_length, longest))
    if out is not None:
        write_report([checked], "error", out)
    return checked


def check_folder(data: Path) -> list[Checked]:
    """Load each of the six benchmarks as `evaluate` would.

    Raises:
        DataError: the folder does not exist.
    """
    if not data.is_dir():
        raise DataError(
            f"{data} {file_fault(data) or 'is a file'}, no folder: give one that holds a folder for each benchmark"
        )
    folders = find_folders(data)
    found = []
    for name, kind in SIX.items():
        if name not in folders:
            found.append(Checked(name, "", problem=f"{data} has no folder for it. {kind().source}"))
            continue
        place = folders[name]
        try:
            with tempfile.TemporaryDirectory() as scratch:
                (task,) = load_tasks(data, (name,), Path(scratch))
            found.append(Checked(name, str(place), len(task.examples), surplus=tuple(kind().surplus(place))))
        except DataError as problem:
            found.append(Checked(name, str(place), problem=str(problem), surplus=tuple(kind().surplus(place))))
    return found


def write_suite(folder: Path, seed: int) -> str:
    """Write the suite `worlds`, whole or not at all; returns what was written.

    Raises:
        RunFolderError: the folder is not empty.
    """
    require_free(folder)
    with whole_folder(folder) as draft:
        write_builtin("worlds", draft, seed)
    return f"instruction data: {folder / 'train.json'}\nbenchmarks: {folder / 'benchmarks'}"
