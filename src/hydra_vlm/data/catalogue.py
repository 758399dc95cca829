"""The catalogue: facts about pictured things, which a decoder can only learn by heart.

Each of the 77 combinations of colour and shape has a part number, drawn once from a seed. Each picture shows one thing;
the question does not name it. Facts are many, small and independent, so they are learned gradually and take capacity in
proportion: what a rank budget buys shows in loss and score, without sudden skills.
"""

import random
from pathlib import Path
from typing import Any

from hydra_vlm.data.scenes import COLOURS, GLYPHS, SHAPES, generate_scene

LETTERS = tuple(g for g in GLYPHS if g.isalpha())
DIGITS = tuple(g for g in GLYPHS if g.isdigit())
FACTS_SEED = 2024


def facts(seed: int = FACTS_SEED) -> dict[tuple[str, str], str]:
    """(colour, shape) to the part number, a letter and a digit such as "K 7"; 77 facts."""
    rng = random.Random(seed)
    return {(colour, shape): f"{rng.choice(LETTERS)} {rng.choice(DIGITS)}" for colour in COLOURS for shape in SHAPES}


def write_catalogue(images: Path, split: str, pictures: int, seed: int) -> list[dict[str, Any]]:
    """Draw `pictures` things into `images`/catalogue and return a record for each.

    Image paths in the records are relative to `images`; record ids and file names carry `split`.
    """
    rng, known = random.Random(seed), facts()
    records = []
    (images / "catalogue").mkdir(parents=True, exist_ok=True)
    for index in range(pictures):
        scene = generate_scene(rng, max_objects=1, glyph_share=0.0)
        thing = scene.objects[0]
        name = f"catalogue/{split}-{index}.png"
        scene.render().save(images / name)
        records.append(
            {
                "id": f"catalogue-{split}-{index}",
                "image": name,
                "task": "part number",
                "conversations": [
                    {"from": "human", "value": "<image>\nwhat is its part number?"},
                    {"from": "gpt", "value": known[thing.colour, thing.kind]},
                ],
            }
        )
    return records
