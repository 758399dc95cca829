"""Reading a benchmark's folder, with errors that say what is missing and where to get it. No torch."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hydra_vlm.errors import DataError, FileError
from hydra_vlm.names import below
from hydra_vlm.reading import TABLE, read_json, read_json_lines

_SHOWN = 10  # how many missing images one error lists


def first_of(root: Path, names: Sequence[str]) -> Path | None:
    """The first of several places under `root` that exists."""
    return next((root / name for name in names if (root / name).exists()), None)


def require(root: Path, names: Sequence[str], source: str) -> Path:
    """The first of several places under `root` that exists.

    Raises:
        DataError: none does.
    """
    found = first_of(root, names)
    if found is None:
        raise DataError(f"{root} has no {' or '.join(names)}. {source}")
    return found


def image_path(images: Path, name: object) -> str:
    """The image of this name, as a benchmark's file gives it, in the folder `images`.

    Raises:
        DataError: the name is no path, or leaves the folder.
    """
    return str(below(images, name, "image", DataError))


def require_images(paths: Iterable[Path | str], source: str) -> None:
    """Raises DataError, naming up to ten, when image files do not exist."""
    missing = [str(path) for path in dict.fromkeys(map(str, paths)) if not Path(path).is_file()]
    if missing:
        shown = "\n  ".join(missing[:_SHOWN])
        more = f"\n  … and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise DataError(f"{len(missing)} image(s) do not exist:\n  {shown}{more}\n{source}")


def surplus_entries(root: Path, patterns: Sequence[str]) -> list[str]:
    """Names directly in `root` that fit none of the patterns; hidden files are nobody's business."""
    names = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)]


def read_object(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: the file is not JSON.
    """
    try:
        return read_json(path, TABLE)
    except FileError as problem:
        raise DataError(f"{problem}: it may be cut off, get it again") from None


def read_lines(path: Path, keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, each with these keys.

    Raises:
        DataError: naming file and line.
    """
    rows = []
    try:
        for number, row in read_json_lines(path):
            missing = [key for key in keys if not isinstance(row, dict) or key not in row]
            if missing:
                raise DataError(f"{path}, line {number} lacks the key {missing[0]!r}")
            rows.append(row)
    except FileError as problem:
        raise DataError(f"{problem}: the file may be cut off, get it again") from None
    return rows


def reference_answer(example_id: Any, prompt: str, text: str) -> dict[str, Any]:
    """One line of the reference's answer files (LLaVA's model_vqa_loader)."""
    return {
        "question_id": example_id,
        "prompt": prompt,
        "text": text,
        "answer_id": "",
        "model_id": "hydra-vlm",
        "metadata": {},
    }
