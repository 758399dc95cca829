"""The catalogue: facts about pictured things, which a decoder can only learn by heart.

Each of 40 combinations of colour and shape has a part number, drawn once from a seed. Each picture shows one thing; the
question does not name it. Facts are many, small and independent, so they are learned gradually and take capacity in
proportion: what a rank budget buys shows in the loss, without sudden skills.
"""

import random
from pathlib import Path
from typing import Any

from hydra_vlm.data.scenes import COLOURS, GLYPHS, SHAPES, generate_scene

LETTERS = tuple(g for g in GLYPHS if g.isalpha())
DIGITS = tuple(g for g in GLYPHS if g.isdigit())
ATTRIBUTES = {"part number": (LETTERS, DIGITS)}
LISTED_COLOURS = tuple(COLOURS)[:8]
LISTED_SHAPES = SHAPES[:5]
FACTS_SEED = 2024


def facts(seed: int = FACTS_SEED) -> dict[tuple[str, str, str], str]:
    """(colour, shape, attribute) to its answer, two glyphs such as "K 7"; 40 facts."""
    rng = random.Random(seed)
    return {
        (colour, shape, attribute): " ".join(rng.choice(glyphs) for glyphs in columns)
        for colour in LISTED_COLOURS
        for shape in LISTED_SHAPES
        for attribute, columns in ATTRIBUTES.items()
    }


def write_catalogue(images: Path, split: str, pictures: int, seed: int) -> list[dict[str, Any]]:
    """Draw `pictures` things into `images`/catalogue and return a record for each fact about each of them.

    Image paths in the records are relative to `images`; record ids and file names carry `split`.
    """
    rng, known = random.Random(seed), facts()
    records = []
    (images / "catalogue").mkdir(parents=True, exist_ok=True)
    for index in range(pictures):
        scene = generate_scene(rng, max_objects=1, glyph_share=0.0)
        while (scene.objects[0].colour, scene.objects[0].kind, "part number") not in known:
            scene = generate_scene(rng, max_objects=1, glyph_share=0.0)
        name = f"catalogue/{split}-{index}.png"
        scene.render().save(images / name)
        thing = scene.objects[0]
        for attribute in ATTRIBUTES:
            records.append(
                {
                    "id": f"catalogue-{split}-{index}-{attribute.replace(' ', '-')}",
                    "image": name,
                    "task": attribute,
                    "conversations": [
                        {"from": "human", "value": f"<image>\nwhat is its {attribute}?"},
                        {"from": "gpt", "value": known[thing.colour, thing.kind, attribute]},
                    ],
                }
            )
    return records
