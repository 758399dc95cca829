"""The built-in data sets as LLaVA-format files: `easy-vqa`, and `demo`, which adds the catalogue.

easy-VQA comes from its PyPI package. Its test split stays the test split; validation records come from the last
training images, which no training record shares.
"""

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_vlm.data.catalogue import write_catalogue
from hydra_vlm.data.records import write_records
from hydra_vlm.errors import DataError

BUILTIN = ("demo", "easy-vqa")
VALIDATION_IMAGES = 400
CATALOGUE_PICTURES = {"train": 3000, "validation": 300, "test": 300}


@dataclass(frozen=True)
class DataFiles:
    """LLaVA-format files of a data set; `tests` by benchmark name, `images` the image folder of all (None: each
    file's own)."""

    train: Path
    validation: Path | None
    tests: dict[str, Path]
    images: Path | None


def write_builtin(name: str, folder: Path, seed: int = 0) -> DataFiles:
    """Write a built-in data set under `folder`, images included; the same content every time.

    Raises:
        DataError: the easy-VQA package is not installed.
    """
    images = folder / "images"
    splits = easy_vqa_records(images)
    tests = {"easy-vqa": splits.pop("test")}
    if name == "demo":
        catalogue = {
            split: write_catalogue(images, split, count, seed + position)
            for position, (split, count) in enumerate(CATALOGUE_PICTURES.items())
        }
        tests["catalogue"] = catalogue["test"]
        easy = splits["train"][: len(catalogue["train"])]
        splits["train"] = easy + catalogue["train"]
        splits["validation"] = splits["validation"][: len(catalogue["validation"])] + catalogue["validation"]
        random.Random(seed).shuffle(splits["train"])
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
