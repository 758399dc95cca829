"""Captions for stage I, as LLaVA-format records: of easy-VQA's pictures and of generated scenes.

The human text of a caption record is thrown away by the template `plain`. Nothing here needs torch.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra_vlm.data.scenes import caption, generate_scene

_OPENINGS = ("", "there is ", "this picture shows ", "you can see ")


def captions_of(records: Sequence[Mapping[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """One caption a picture from easy-VQA's questions: its colour and its shape, which is all that they tell.

    Pictures whose questions do not tell both are left out.
    """
    rng = random.Random(seed)
    words = {kind: {_answer(r) for r in records if r["task"] == kind} for kind in ("colour", "shape")}
    told: dict[str, dict[str, str]] = {}
    for record in records:
        told.setdefault(record["image"], {}).update(_facts(record, words))
    return [
        _record(f"caption-{Path(image).parent.name}-{Path(image).stem}", image, f"{rng.choice(_OPENINGS)}{noun}.")
        for image, facts in sorted(told.items())
        if len(facts) == 2
        for noun in (f"a {facts['colour']} {facts['shape']}",)
    ]


def _facts(record: Mapping[str, Any], words: Mapping[str, set[str]]) -> dict[str, str]:
    """Colour or shape that one question with its answer tells: named in the answer, or said to be there."""
    task, answer = record["task"], _answer(record)
    if task in words:
        return {task: answer}
    if (task, answer) not in (("existence", "yes"), ("absence", "no")):
        return {}
    asked = record["conversations"][0]["value"].rstrip("?").split()
    return {kind: word for kind, known in words.items() for word in asked if word in known}


def _answer(record: Mapping[str, Any]) -> str:
    return str(record["conversations"][1]["value"])


def write_scene_captions(images: Path, split: str, pictures: int, seed: int) -> list[dict[str, Any]]:
    """Draw `pictures` scenes of up to three objects into `images`/scenes and caption each: size, colour, shape, place.

    Image paths in the records are relative to `images`; record ids and file names carry `split`.
    """
    rng = random.Random(seed)
    (images / "scenes").mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(pictures):
        scene = generate_scene(rng, max_objects=3)
        name = f"scenes/{split}-{index}.png"
        scene.render().save(images / name)
        records.append(_record(f"scene-{split}-{index}", name, caption(scene, rng)))
    return records


def mixed(sets: Iterable[Sequence[dict[str, Any]]], seed: int) -> list[dict[str, Any]]:
    """Equally many records of each set (as many as the smallest has), shuffled."""
    rng = random.Random(seed)
    found = list(sets)
    count = min(map(len, found))
    records = [record for records in found for record in rng.sample(list(records), count)]
    rng.shuffle(records)
    return records


def _record(name: str, image: str, text: str) -> dict[str, Any]:
    return {
        "id": name,
        "image": image,
        "task": "caption",
        "conversations": [
            {"from": "human", "value": "<image>\ndescribe the picture."},
            {"from": "gpt", "value": text},
        ],
    }
