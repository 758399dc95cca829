"""Nicknames in the forms of the six: facts that only training tells, in place of what there is to see.

Each of 28 things has a nickname, one of the words that the embedded model knows, drawn once from a seed. TextVQA and
GQA ask openly for it, MME and part of GQA for yes or no, ScienceQA from nickname to thing. POPE and MMBench ask as in
`worlds` what there is to see: a model that has learned `worlds` can do that, so they tell what fine-tuning cost it.
"""

import random
from collections.abc import Callable, Mapping
from functools import partial

from hydra_vlm.data.scenes import COLOURS, NUMBER_WORDS, SHAPES, SceneObject
from hydra_vlm.data.worlds import gqa, mmbench, mme, pope
from hydra_vlm.data.worlds.choices import choice, few
from hydra_vlm.data.worlds.pictures import Gallery, Question, Sheet, Thing, another, scatter

Drawn = list[tuple[Sheet, bytes]]
THESE_COLOURS = ("red", "green", "blue", "yellow")
WORDS = (*COLOURS, *SHAPES, *NUMBER_WORDS, "left", "right", "top", "bottom", "center", "small", "large")
SEED = 2026


def nicknames(seed: int = SEED) -> dict[Thing, str]:
    """(colour, shape) to a word that is neither of the two; 28 facts, as many as a hundred short steps can teach."""
    draw = random.Random(seed)
    named: dict[Thing, str] = {}
    for thing in ((colour, shape) for colour in THESE_COLOURS for shape in SHAPES):
        named[thing] = another(draw, [word for word in WORDS if word not in named.values()], *thing)
    return named


NICKNAMES = nicknames()
ALL = tuple(NICKNAMES.values())


def things(rng: random.Random, n: int) -> list[Thing]:
    """n things that have a nickname and differ in colour and in shape."""
    return list(zip(rng.sample(THESE_COLOURS, n), rng.sample(SHAPES, n), strict=True))


def nickname(thing: SceneObject) -> str:
    """The nickname of a pictured thing, such as "teal"."""
    return NICKNAMES[thing.colour, thing.kind]


def textvqa_sheet(rng: random.Random) -> Sheet:
    """One thing, and its nickname is asked for."""
    scene = scatter(rng, things(rng, 1))
    return Sheet(scene, (Question("what is its nickname?", nickname(scene.objects[0]), "sign"),))


def mme_sheet(category: str, rng: random.Random) -> Sheet:
    """One thing, its nickname and another one, to say yes and no to; the category is a name only."""
    scene = scatter(rng, things(rng, 1))
    right = nickname(scene.objects[0])
    pair = [
        Question(f"is its nickname {right}?", "yes", category),
        Question(f"is its nickname {another(rng, ALL, right)}?", "no", category),
    ]
    return Sheet(scene, tuple(rng.sample(pair, 2)))


def gqa_sheet(rng: random.Random) -> Sheet:
    """One thing, or two, with two open questions (query), yes and no (verify), and one of two nicknames (choose)."""
    scene = scatter(rng, things(rng, rng.choice((1, 2))))
    one, *others = rng.sample(scene.objects, len(scene.objects))
    right = nickname(one)
    wrong = another(rng, ALL, nickname(one))
    pair = rng.sample([right, wrong], 2)
    told = [one.noun, one.kind, *(f"thing {gqa.relation(one, other)} the {other.kind}" for other in others)]
    queries = [Question(f"what is the nickname of the {name}?", right, "query") for name in rng.sample(told, 2)]
    return Sheet(
        scene,
        (
            *queries,
            Question(f"is the nickname of the {one.kind} {right}?", "yes", "verify"),
            Question(f"is the nickname of the {one.kind} {wrong}?", "no", "verify"),
            Question(f"is the nickname of the {one.kind} {pair[0]} or {pair[1]}?", right, "choose"),
        ),
    )


def sqa_sheet(rng: random.Random) -> Sheet:
    """A nickname and two to four things; one time in four without a picture of the right one."""
    thing = (rng.choice(THESE_COLOURS), rng.choice(SHAPES))
    right = " ".join(thing)
    wrong = [" ".join(other) for other, name in NICKNAMES.items() if name != NICKNAMES[thing]]
    options = choice(rng, right, wrong, few(rng))
    scene = scatter(rng, [thing]) if rng.random() < 0.75 else None
    question = Question(f"which has nickname {NICKNAMES[thing]}?", right, "samples" if scene else "alphabet", options)
    return Sheet(scene, (question,))


def _all_alike(draw: Callable[[random.Random], Sheet], rng: random.Random, pictures: int, gallery: Gallery) -> Drawn:
    return [gallery.fresh(partial(draw, rng)) for _ in range(pictures)]


def _mme(rng: random.Random, pictures: int, gallery: Gallery) -> Drawn:
    """`pictures` of each category."""
    return [gallery.fresh(partial(mme_sheet, name, rng)) for name in mme.CATEGORIES for _ in range(pictures)]


SHEETS: Mapping[str, Callable[[random.Random, int, Gallery], Drawn]] = {
    "mme": _mme,
    "pope": pope.sheets,
    "textvqa": partial(_all_alike, textvqa_sheet),
    "gqa": partial(_all_alike, gqa_sheet),
    "mmbench": mmbench.sheets,
    "sqa": partial(_all_alike, sqa_sheet),
}
