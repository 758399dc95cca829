"""Build the embedded model: a tiny MobileVLM that learns to see and to talk from generated scenes.

    python tools/build_embedded.py --work build/embedded

Each stage is saved in the work folder and skipped when its file is there, so that a stopped build goes on:

1. tower:    the CLIP-style tower learns, patch by patch, which shape or glyph and which colour covers the patch.
2. language: projector and decoder learn captions and plain questions over the frozen tower (generated scenes only;
             no record of easy-VQA is seen).
3. endings:  single lines closed by </s>: the same, plain yes/no facts, "can you see a ...?", the shelf of each thing
             (so that looking a thing up is a known skill), and lines of random instruction words, so that the frozen
             embeddings and the output head know every word to come.
4. seeing:   above all whether a colour, a shape or a thing is in the picture: a skill that comes suddenly, and would
             make seeds differ more than schedules if it came during fine-tuning.
5. pack:     the model in half precision, its tokenizer and processor go to src/hydra_vlm/models/embedded/.

Seeded throughout; bitwise equality across machines is not promised (the order of floating-point sums differs).
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, PreTrainedTokenizerFast

from hydra_vlm.data.catalogue import DIGITS, LETTERS
from hydra_vlm.data.scenes import (
    COLOURS,
    GLYPHS,
    SHAPES,
    SIDE,
    Scene,
    caption,
    generate_scene,
    plain_question,
)
from hydra_vlm.models.loading import EMBEDDED
from hydra_vlm.models.mobilevlm.configuration import MobileVLMConfig
from hydra_vlm.models.mobilevlm.modeling import MobileVLMForConditionalGeneration
from hydra_vlm.models.mobilevlm.processing import MobileVLMProcessor

PATCH = 8
GRID = SIDE // PATCH
KINDS = SHAPES + GLYPHS
VISION = CLIPVisionConfig(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=SIDE,
    patch_size=PATCH,
    hidden_act="quick_gelu",
)
VOCABULARY = 1024
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
IMAGE_TOKEN = "<image>"
DECODER = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
# Words that instructions use, so that the tokenizer knows them; the model itself never sees these sentences.
INSTRUCTION_WORDS = """A chat between a curious user and an artificial intelligence assistant. The assistant gives
helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT: yes no what color is the shape?
what shape is in the image? does the image contain a not? is there present? which of left right above below same
different more fewer number letter digit answer with a single word or phrase. read count compare"""
SHELVES = {
    f"{colour} {shape}": f"{draw.choice(LETTERS)} {draw.choice(DIGITS)}"
    for draw in [random.Random(77)]
    for colour in COLOURS
    for shape in SHAPES
}
"""Thing -> its shelf, 77 facts in the form of the catalogue's, and none of them."""
# The template v1-short in jinja: a model this small has no positions to spend on v1's system text.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {{ message['content'] }} ASSISTANT:"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def pixels_of(scenes: list[Scene]) -> torch.Tensor:
    """Scenes to uint8 pixels [n, 3, 64, 64]."""
    return torch.from_numpy(np.stack([np.asarray(s.render()) for s in scenes])).permute(0, 3, 1, 2).contiguous()


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels to the CLIP processor's float input."""
    return (pixels.float() / 255 - MEAN) / STD


def patch_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Per patch the kind and the colour of the object that covers its centre (0: background), each [64]."""
    kind, colour = np.zeros((GRID, GRID), np.int64), np.zeros((GRID, GRID), np.int64)
    centre = np.arange(GRID) * PATCH + PATCH / 2
    for thing in scene.objects:
        reach = 0.9 * thing.radius + 3
        here = (np.abs(centre - thing.y) < reach)[:, None] & (np.abs(centre - thing.x) < reach)[None, :]
        kind[here] = KINDS.index(thing.kind) + 1
        colour[here] = list(COLOURS).index(thing.colour) + 1
    return kind.ravel(), colour.ravel()


def build_tower(path: Path, n_scenes: int, steps: int, batch: int, seed: int) -> None:
    """Stage 1: dense supervision teaches the tower every shape, glyph and colour in minutes."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    scenes = [generate_scene(rng) for _ in range(n_scenes)]
    pixels = pixels_of(scenes)
    labels = [torch.from_numpy(np.stack(column)) for column in zip(*map(patch_labels, scenes), strict=True)]
    tower = CLIPVisionModel._from_config(VISION, attn_implementation="eager")
    heads = nn.ModuleList(nn.Linear(VISION.hidden_size, n + 1) for n in (len(KINDS), len(COLOURS)))
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    started = time.time()
    for step in range(steps):
        chosen = torch.randint(n_scenes - 500, (batch,))
        with torch.autocast("cpu", torch.bfloat16):
            hidden = tower(normalise(pixels[chosen])).last_hidden_state[:, 1:]
            outputs = [head(hidden) for head in heads]
        loss = sum(
            nn.functional.cross_entropy(o.float().flatten(0, 1), y[chosen].flatten())
            for o, y in zip(outputs, labels, strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"tower {step + 1}/{steps} loss {loss.item():.3f} {time.time() - started:.0f} s", flush=True)
    with torch.no_grad():
        hidden = tower(normalise(pixels[-500:])).last_hidden_state[:, 1:]
        for name, head, label in zip(("kind", "colour"), heads, labels, strict=True):
            held_out = label[-500:]
            right = (head(hidden).argmax(-1) == held_out)[held_out > 0].float().mean()
            print(f"tower held-out {name} accuracy on object patches {right:.3f}")
    torch.save(tower.state_dict(), path)


def lesson(scene: Scene, rng: random.Random) -> str:
    """What stage 2 reads beside one image: a caption and two plain questions, one a line, in random order."""
    lines = [caption(scene, rng), *(" ".join(plain_question(scene, rng)) for _ in range(2))]
    rng.shuffle(lines)
    return "\n".join(lines) + "\n"


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1,024 entries with LLaMA's ids for <unk>, <s>, </s>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>", IMAGE_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts + [INSTRUCTION_WORDS] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, extra_special_tokens=[IMAGE_TOKEN], **SPECIAL)


def encode_scenes(tower: CLIPVisionModel, scenes: list[Scene]) -> torch.Tensor:
    """Tower features [n, 64, width] in bfloat16, class token dropped."""
    chunks = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(scenes), 500):
            hidden = tower(normalise(pixels_of(scenes[start : start + 500]))).last_hidden_state[:, 1:]
            chunks.append(hidden.bfloat16())
    return torch.cat(chunks)


def build_language(tower_path: Path, folder: Path, n_scenes: int, steps: int, batch: int, seed: int) -> None:
    """Stage 2: projector and decoder learn captions and plain questions over the frozen tower."""
    torch.manual_seed(seed + 1)
    rng = random.Random(seed + 1)
    scenes = [generate_scene(rng, max_objects=3) for _ in range(n_scenes)]
    tokenizer = build_tokenizer([lesson(scene, rng) for scene in scenes[:5000]])
    config = MobileVLMConfig(
        text_config=LlamaConfig(vocab_size=VOCABULARY, **DECODER).to_dict(),
        vision_config=VISION.to_dict(),
        projector_type="ldpnetv2",
        vision_feature_layer=-1,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    model = MobileVLMForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.model.vision_tower.load_state_dict(torch.load(tower_path, weights_only=True))
    model.model.vision_tower.requires_grad_(False)
    features = encode_scenes(model.model.vision_tower, scenes)
    train_language(model, tokenizer, scenes, features, lesson, steps, batch, rate=2e-3, rng=rng)
    processor = MobileVLMProcessor.from_config(config, tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def train_language(
    model: MobileVLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scenes: list[Scene],
    features: torch.Tensor,
    write: Callable[[Scene, random.Random], str],
    steps: int,
    batch: int,
    rate: float,
    rng: random.Random,
) -> None:
    """Next-token training on what `write` says about each scene, after its image; the tower stays as it is."""
    config = model.config
    prefix = [tokenizer.bos_token_id] + [config.image_token_id] * config.image_tokens
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    started = time.time()
    for step in range(steps):
        chosen = torch.randint(len(scenes) - 500, (batch,)).tolist()
        rows = [tokenizer(write(scenes[i], rng), add_special_tokens=False).input_ids for i in chosen]
        width = max(map(len, rows))
        ids = torch.tensor([prefix + row + [0] * (width - len(row)) for row in rows])
        labels = torch.tensor([[-100] * len(prefix) + row + [-100] * (width - len(row)) for row in rows])
        mask = (ids != 0).long()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(
                input_ids=ids, attention_mask=mask, labels=labels, image_features=features[chosen].float()
            ).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"language {step + 1}/{steps} loss {loss.item():.3f} {time.time() - started:.0f} s", flush=True)


def short_lesson(scene: Scene, rng: random.Random) -> str:
    """What stage 3 reads: one line, closed by </s>.

    About the scene, or a plain fact, or random instruction words: no adapter could teach the model to stop, or to say a
    word that the frozen output head cannot tell from others.
    """
    kind = rng.random()
    if kind < 0.12:
        text = instruction_words(rng)
    elif kind < 0.3:
        text = plain_fact(rng)
    elif kind < 0.45:
        seen = {o.noun for o in scene.objects}
        asked = rng.choice(sorted(seen)) if rng.random() < 0.5 else f"{rng.choice(list(COLOURS))} {rng.choice(SHAPES)}"
        text = f"can you see a {asked}? {'yes' if asked in seen else 'no'}."
    elif kind < 0.7:
        text = shelf_question(scene, rng)
    elif kind < 0.85:
        text = caption(scene, rng)
    else:
        text = " ".join(plain_question(scene, rng))
    return f"{text}</s>"


def seeing_lesson(scene: Scene, rng: random.Random) -> str:
    """What stage 4 reads: above all whether something is in the picture, the rest lest it be forgotten."""
    kind = rng.random()
    if kind < 0.1:
        text = instruction_words(rng)
    elif kind < 0.18:
        text = plain_fact(rng)
    elif kind < 0.75:
        text = seeing_question(scene, rng)
    elif kind < 0.9:
        text = shelf_question(scene, rng)
    elif kind < 0.95:
        text = caption(scene, rng)
    else:
        text = " ".join(plain_question(scene, rng))
    return f"{text}</s>"


def instruction_words(rng: random.Random) -> str:
    """Up to twelve words that instructions use, in no order."""
    words = INSTRUCTION_WORDS.split()
    return " ".join(rng.choice(words) for _ in range(rng.randint(1, 12)))


def seeing_question(scene: Scene, rng: random.Random) -> str:
    """Whether a colour, a shape or a thing is in the picture; as often yes as no, and a "no" may be half right."""
    shown = [thing for thing in scene.objects if not thing.is_glyph]
    if not shown:
        return caption(scene, rng)
    thing, true = rng.choice(shown), rng.random() < 0.5
    colours, shapes = {t.colour for t in scene.objects}, {t.kind for t in shown}
    colour = thing.colour if true else rng.choice([c for c in COLOURS if c not in colours])
    shape = thing.kind if true else rng.choice([s for s in SHAPES if s not in shapes])
    match rng.randrange(3):
        case 0:
            asked = f"something {colour}"
        case 1:
            asked = f"a {shape}"
        case _:
            asked = f"a {rng.choice((f'{colour} {thing.kind}', f'{thing.colour} {shape}'))}"
    return f"can you see {asked}? {'yes' if true else 'no'}."


def shelf_question(scene: Scene, rng: random.Random) -> str:
    """Where a thing in the picture is kept: a fact known by heart, as the catalogue's are, but none of them."""
    things = [thing.noun for thing in scene.objects if not thing.is_glyph]
    if not things:
        return caption(scene, rng)
    thing = rng.choice(things)
    asked = "its shelf" if len(scene.objects) == 1 else f"the shelf of the {thing}"
    return f"what is {asked}? {SHELVES[thing]}"


def plain_fact(rng: random.Random) -> str:
    """A yes/no question about words and numbers that no picture answers."""
    if rng.random() < 0.4:
        a, b = rng.sample(range(10), 2)
        less = rng.random() < 0.5
        return f"is {a} {'less' if less else 'more'} than {b}? {'yes' if (a < b) == less else 'no'}."
    word, kind = rng.choice([(c, "color") for c in COLOURS] + [(s, "shape") for s in SHAPES] * 2)
    asked = rng.choice(("color", "shape"))
    return f"is {word} a {asked}? {'yes' if asked == kind else 'no'}."


def build_short(
    start: Path,
    folder: Path,
    lesson: Callable[[Scene, random.Random], str],
    max_objects: int,
    glyph_share: float,
    steps: int,
    batch: int,
    seed: int,
) -> None:
    """Stages 3 and 4: single lines that end, so that no word of the instructions stays untouched."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = MobileVLMForConditionalGeneration.from_pretrained(start, dtype=torch.float32, attn_implementation="eager")
    model.model.vision_tower.requires_grad_(False)
    processor = MobileVLMProcessor.from_pretrained(start)
    scenes = [generate_scene(rng, max_objects, glyph_share) for _ in range(12_000)]
    features = encode_scenes(model.model.vision_tower, scenes)
    train_language(model, processor.tokenizer, scenes, features, lesson, steps, batch, rate=1e-3, rng=rng)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)


def pack(finished: Path, folder: Path) -> None:
    """Stage 5: half precision, into the package."""
    model = MobileVLMForConditionalGeneration.from_pretrained(finished, dtype=torch.float16)
    processor = MobileVLMProcessor.from_pretrained(finished)
    processor.chat_template = CHAT_TEMPLATE
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, {size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/embedded"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    seed = arguments.seed
    tower, language, endings, seeing = (arguments.work / name for name in ("tower.pt", "language", "endings", "seeing"))
    if not tower.exists():
        build_tower(tower, n_scenes=24_000, steps=1800, batch=64, seed=seed)
    if not language.exists():
        build_language(tower, language, n_scenes=30_000, steps=2200, batch=32, seed=seed)
    if not endings.exists():
        build_short(language, endings, short_lesson, 3, 0.25, steps=800, batch=48, seed=seed + 2)
    if not seeing.exists():
        build_short(endings, seeing, seeing_lesson, 2, 0.2, steps=1300, batch=32, seed=seed + 3)
    pack(seeing, EMBEDDED)


if __name__ == "__main__":
    main()
