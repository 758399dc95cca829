"""Generated scenes: several objects with shape, colour, size, position and count, rendered letters and digits.

The embedded model learns to see and to talk from these (`tools/build_embedded.py`). Everything follows from a seed;
nothing here needs torch.
"""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIDE = 64
SHAPES = ("circle", "rectangle", "triangle", "star", "cross", "ring", "diamond")
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "yellow": (255, 255, 0),
    "orange": (255, 150, 0),
    "purple": (130, 0, 180),
    "pink": (255, 110, 190),
}
GLYPHS = tuple("ABCDEFGHJKLMNPRSTUVXYZ0123456789")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six")
_ROWS = ("top", "middle", "bottom")
_COLUMNS = ("left", "center", "right")
_SCALE = 4  # drawn at four times the size, then averaged down: smooth edges


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object; x and y are the centre and `radius` half the width, in pixels of a 64-pixel image."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def is_glyph(self) -> bool:
        return self.kind in GLYPHS

    @property
    def size(self) -> str:
        return "small" if self.radius < 8.5 else "large"

    @property
    def position(self) -> str:
        """One of nine places, as in "top left", "left", "center"."""
        row = _ROWS[min(2, int(3 * self.y / SIDE))]
        column = _COLUMNS[min(2, int(3 * self.x / SIDE))]
        if row == "middle":
            return column
        return row if column == "center" else f"{row} {column}"

    @property
    def noun(self) -> str:
        """What it is called without size or place: "red circle", "green letter K", "blue digit 7"."""
        if not self.is_glyph:
            return f"{self.colour} {self.kind}"
        return f"{self.colour} {'digit' if self.kind.isdigit() else 'letter'} {self.kind}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects on a light background, in reading order (top to bottom, then left to right)."""

    objects: tuple[SceneObject, ...]
    background: tuple[int, int, int]

    def render(self) -> Image.Image:
        """The picture, RGB, 64 x 64 pixels."""
        canvas = Image.new("RGB", (SIDE * _SCALE, SIDE * _SCALE), self.background)
        draw = ImageDraw.Draw(canvas)
        for thing in self.objects:
            _draw(draw, thing)
        return canvas.resize((SIDE, SIDE), Image.Resampling.BOX)


def generate_scene(rng: random.Random, max_objects: int = 4, glyph_share: float = 0.25) -> Scene:
    """A random scene of one to `max_objects` objects that do not overlap; deterministic for a given `rng`."""
    wanted = rng.randint(1, max_objects)
    placed: list[SceneObject] = []
    for _ in range(20 * wanted):
        if len(placed) == wanted:
            break
        radius = rng.uniform(5, 8) if rng.random() < 0.5 else rng.uniform(9.5, 15)
        x, y = (rng.uniform(radius, SIDE - radius) for _ in range(2))
        if any(math.hypot(x - o.x, y - o.y) < radius + o.radius + 1 for o in placed):
            continue
        kind = rng.choice(GLYPHS) if rng.random() < glyph_share else rng.choice(SHAPES)
        placed.append(SceneObject(kind, rng.choice(list(COLOURS)), x, y, radius))
    placed.sort(key=lambda o: (_ROWS.index(_ROWS[min(2, int(3 * o.y / SIDE))]), o.x))
    background = (rng.randint(225, 255), rng.randint(225, 255), rng.randint(225, 255))
    return Scene(tuple(placed), background)


def _draw(draw: ImageDraw.ImageDraw, thing: SceneObject) -> None:
    colour = COLOURS[thing.colour]
    x, y, r = thing.x * _SCALE, thing.y * _SCALE, thing.radius * _SCALE
    box = (x - r, y - r, x + r, y + r)
    match thing.kind:
        case "circle":
            draw.ellipse(box, fill=colour)
        case "ring":
            draw.ellipse(box, outline=colour, width=max(1, round(r * 0.4)))
        case "rectangle":
            draw.rectangle((x - r * 0.85, y - r, x + r * 0.85, y + r), fill=colour)
        case "triangle":
            draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=colour)
        case "diamond":
            draw.polygon([(x, y - r), (x + r * 0.75, y), (x, y + r), (x - r * 0.75, y)], fill=colour)
        case "cross":
            draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=colour)
            draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=colour)
        case "star":
            angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
            radii = [r if i % 2 == 0 else r * 0.42 for i in range(10)]
            points = [(x + q * math.cos(a), y + q * math.sin(a)) for a, q in zip(angles, radii, strict=True)]
            draw.polygon(points, fill=colour)
        case glyph:
            font = ImageFont.load_default(size=2.4 * r)
            draw.text((x, y), glyph, font=font, fill=colour, anchor="mm")


# ---- language ------------------------------------------------------------------------------------------------


def caption(scene: Scene, rng: random.Random) -> str:
    """A sentence that names every object with size and place."""
    opening = rng.choice(("", "there is ", "this picture shows ", "you can see "))
    parts = [f"a {o.size} {o.noun} at the {o.position}" for o in scene.objects]
    return opening + " and ".join(parts) + "."


def plain_question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question in plain words and its full-sentence answer (count, place, what is where)."""
    thing = rng.choice(scene.objects)
    kind = rng.randrange(4)
    if kind == 0:
        n = len(scene.objects)
        return "how many things can you see?", f"i can see {NUMBER_WORDS[n]}."
    if kind == 1:
        nouns = [o.noun for o in scene.objects]
        if nouns.count(thing.noun) == 1:
            return f"where is the {thing.noun}?", f"it is at the {thing.position}."
    if kind == 2:
        here = [o for o in scene.objects if o.position == thing.position]
        return f"describe the {thing.position}.", " and ".join(f"a {o.size} {o.noun}" for o in here) + "."
    order = " then ".join(o.noun for o in scene.objects)
    return "list the things you see.", f"{order}."
