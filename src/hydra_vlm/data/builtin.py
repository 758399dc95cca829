"""The built-in data sets as LLaVA-format files.

For stage II `easy-vqa`, `demo`, which adds the catalogue, and `worlds` and `nicknames`, which come with six small
benchmarks; for stage I `easy-vqa-captions`, `scene-captions`, and `captions`, which mixes both.

easy-VQA comes from its PyPI package. Its test split stays the test split; validation records come from the last
training images, which no training record shares.
"""

import os
import random
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_vlm.data.captions import captions_of, mixed, write_scene_captions
from hydra_vlm.data.catalogue import write_catalogue
from hydra_vlm.data.records import write_records
from hydra_vlm.data.worlds import write_nicknames, write_worlds
from hydra_vlm.errors import DataError
from hydra_vlm.files import write_text
from hydra_vlm.reading import read_text

TESTS = {"demo": ("easy-vqa", "catalogue"), "easy-vqa": ("easy-vqa",)}
QUESTIONS = tuple(TESTS)
CAPTIONS = "captions"
WORLDS = {"worlds": write_worlds, "nicknames": write_nicknames}
BUILTIN = (*QUESTIONS, *WORLDS, CAPTIONS, "easy-vqa-captions", "scene-captions")
VALIDATION_IMAGES = 400
SCENES = {"train": 1600, "validation": 160}
CATALOGUE_PICTURES = {"train": 3000, "validation": 300, "test": 500}
EASY_SHARE = 3  # the catalogue has so many records to one of easy-VQA, whose answers are mostly "yes" or "no"
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class DataFiles:
    """LLaVA-format files of a data set; `tests` by benchmark name, `images` the image folder of all (None: each
    file's own), `benchmarks` the folder of benchmarks in their official formats (None: there is none)."""

    train: Path
    validation: Path | None
    tests: dict[str, Path]
    images: Path | None
    benchmarks: Path | None = None


def write_builtin(name: str, folder: Path, seed: int = 0) -> DataFiles:
    """Write a built-in data set under `folder`, images included; the same content every time.

    Raises:
        DataError: the easy-VQA package is not installed.
    """
    images = folder / "images"
    if name in WORLDS:
        WORLDS[name](folder, seed)
        return DataFiles(folder / "train.json", folder / "validation.json", {}, images, folder / "benchmarks")
    splits, tests = _captions(name, images, seed) if "captions" in name else _questions(name, images, seed)
    files = DataFiles(
        train=folder / "train.json",
        validation=folder / "validation.json",
        tests={benchmark: folder / f"test-{benchmark}.json" for benchmark in tests},
        images=images,
    )
    write_records(files.train, splits["train"])
    write_records(folder / "validation.json", splits["validation"])
    for benchmark, records in tests.items():
        write_records(files.tests[benchmark], records)
    return files


def write_builtin_once(name: str, folder: Path) -> DataFiles:
    """The set in `folder`, written there unless it is there: whole or not at all, whoever else does the same.

    Another set that is there goes; `set.txt` says which one it is.

    Raises:
        DataError: the easy-VQA package is not installed.
    """
    stored = folder / "set.txt"
    if stored.is_file() and read_text(stored).strip() != name:
        shutil.rmtree(folder)
    if not folder.is_dir():
        draft = folder.with_name(f".{folder.name}.{os.getpid()}.new")
        try:
            write_builtin(name, draft)
            write_text(draft / "set.txt", f"{name}\n")
            with suppress(OSError):  # another process was first
                draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    validation, benchmarks = folder / "validation.json", folder / "benchmarks"
    tests = {test: folder / f"test-{test}.json" for test in TESTS.get(name, ())}
    return DataFiles(
        folder / "train.json", validation, tests, folder / "images", benchmarks if name in WORLDS else None
    )


def _questions(name: str, images: Path, seed: int) -> tuple[dict[str, Records], dict[str, Records]]:
    """Training and validation records, and test records by benchmark, for stage II."""
    splits = easy_vqa_records(images)
    tests = {"easy-vqa": splits.pop("test")}
    if name == "demo":
        catalogue = {
            split: write_catalogue(images, split, count, seed + position)
            for position, (split, count) in enumerate(CATALOGUE_PICTURES.items())
        }
        tests["catalogue"] = catalogue["test"]
        for split in ("train", "validation"):
            splits[split] = splits[split][: len(catalogue[split]) // EASY_SHARE] + catalogue[split]
        random.Random(seed).shuffle(splits["train"])
    return splits, tests


def _captions(name: str, images: Path, seed: int) -> tuple[dict[str, Records], dict[str, Records]]:
    """Training and validation captions for stage I; there is nothing to ask in a test."""
    sets: list[dict[str, Records]] = []
    if name != "scene-captions":
        questions = easy_vqa_records(images)
        sets.append({split: captions_of(questions[split], seed) for split in SCENES})
    if name != "easy-vqa-captions":
        sets.append(
            {
                split: write_scene_captions(images, split, count, seed + position)
                for position, (split, count) in enumerate(SCENES.items())
            }
        )
    return {split: mixed((records[split] for records in sets), seed) for split in SCENES}, {}


def easy_vqa_records(images: Path, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Copy easy-VQA's pictures to `images` and return its records as train, validation and test."""
    try:
        import easy_vqa
    except ImportError:
        raise DataError("easy-VQA is not installed: pip install 'hydra-vlm[easy-vqa]'") from None
    root = Path(easy_vqa.__file__).parent / "data"
    for split in ("train", "test"):
        shutil.copytree(root / split / "images", images / "easy-vqa" / split, dirs_exist_ok=True)
    train = _records("train", *easy_vqa.get_train_questions())
    held_out = {f"easy-vqa/train/{i}.png" for i in sorted(easy_vqa.get_train_image_paths())[-VALIDATION_IMAGES:]}
    random.Random(seed).shuffle(train)
    return {
        "train": [r for r in train if r["image"] not in held_out],
        "validation": [r for r in train if r["image"] in held_out],
        "test": _records("test", *easy_vqa.get_test_questions()),
    }


def _records(split: str, questions: list[str], answers: list[str], images: list[int]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{split}-{index}",
            "image": f"easy-vqa/{split}/{image}.png",
            "task": _task(question),
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for index, (question, answer, image) in enumerate(zip(questions, answers, images, strict=True))
    ]


def _task(question: str) -> str:
    """The kind of question: what colour, what shape, is there …, is there no …."""
    words = question.rstrip("?").split()
    if "color" in words:
        return "colour"
    if words[0] == "what":
        return "shape"
    return "absence" if {"no", "not"} & set(words) else "existence"
