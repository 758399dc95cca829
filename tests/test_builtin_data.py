"""The built-in sets: what they hold, and that nothing leaks between splits."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from hydra_vlm.data import builtin
from hydra_vlm.data.catalogue import facts, write_catalogue
from hydra_vlm.data.records import check_images, read_records
from hydra_vlm.data.scenes import COLOURS, SHAPES, SIDE, caption, generate_scene, plain_question


def test_scenes_follow_from_the_seed_and_do_not_overlap() -> None:
    first, again = (generate_scene(random.Random(5)) for _ in range(2))
    assert first == again
    assert first.render().tobytes() == again.render().tobytes()
    rng = random.Random(0)
    for _ in range(200):
        scene = generate_scene(rng)
        for a in scene.objects:
            assert a.radius <= a.x <= SIDE - a.radius
            for b in scene.objects:
                assert a is b or (a.x - b.x) ** 2 + (a.y - b.y) ** 2 >= (a.radius + b.radius) ** 2
        text = caption(scene, rng)
        assert all(thing.noun in text for thing in scene.objects)
        question, answer = plain_question(scene, rng)
        assert question[-1] in "?."
        assert answer


def test_the_catalogue_is_the_same_in_every_split(tmp_path: Path) -> None:
    known = facts()
    assert len(known) == len(COLOURS) * len(SHAPES) == 77
    splits = [write_catalogue(tmp_path, split, 3, seed) for seed, split in enumerate(("train", "test"))]
    for records in splits:
        assert len(records) == 3
        assert {r["conversations"][1]["value"] for r in records} <= set(known.values())
    assert not {r["image"] for r in splits[0]} & {r["image"] for r in splits[1]}
    assert len({(tmp_path / r["image"]).read_bytes() for records in splits for r in records}) == 6


def test_demo_files_are_whole_and_disjoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("easy_vqa", reason="easy-VQA is an extra")
    monkeypatch.setattr(builtin, "CATALOGUE_PICTURES", {"train": 21, "validation": 6, "test": 5})
    files = builtin.write_builtin("demo", tmp_path)
    assert files.validation is not None
    splits = {
        "train": read_records(files.train, files.images),
        "validation": read_records(files.validation, files.images),
        **{name: read_records(path, files.images) for name, path in files.tests.items()},
    }
    assert {name: len(records) for name, records in splits.items()} == {
        "train": 28,
        "validation": 8,
        "easy-vqa": 9673,
        "catalogue": 5,
    }
    pictures = {name: {r.image for r in records} for name, records in splits.items()}
    assert not pictures["train"] & (pictures["validation"] | pictures["easy-vqa"] | pictures["catalogue"])
    for name in ("train", "validation"):
        kinds = Counter("catalogue" in (r.image or "") for r in splits[name])
        assert kinds[True] == 3 * kinds[False]
    check_images(files.train, splits["train"])
    before = json.loads(files.train.read_text())
    assert json.loads(builtin.write_builtin("demo", tmp_path).train.read_text()) == before
