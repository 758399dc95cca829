"""Damaged data files: the check tells its own errors alone, and what it accepts can be trained on.

Good files are damaged at random from fixed seeds, most of them more than once; whatever rows the check lets through are
made into a batch by the tiny model's reader, and one forward and backward pass follows.
"""

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hydra_vlm.data.instruction import InstructionDataset
from hydra_vlm.data.preflight import Checked, check_file, check_reading, settle
from hydra_vlm.data.readers import Reader, open_reader
from hydra_vlm.errors import HydraError
from hydra_vlm.models.loading import LoadedModel, load_model

FILES = 280
LONGEST = 512


@dataclass
class Draft:
    """A data file on its way: rows, then bytes; pictures by name."""

    rows: list[Any]
    pictures: dict[str, bytes]
    raw: bytes = b""


Damage = Callable[[Draft, random.Random], None]
PATHS = (
    *("/etc/passwd", "../0.png", "a/../../0.png", "~/0.png", "C:\\0.png", "\\\\host\\0.png", "file:///0.png", ""),
    *(
        "a" * 300,
        "a/" * 3000,
        "0.png\0",
        "\n",
        ".",
        "..",
        "./0.png",
        "0.png/",
        "con/0.png",
        "\ud800.png",
        "%00",
        " 0.png",
    ),
    *("link.png", "folder", "cut.png", "http://host/0.png", "ä.png", "\u202e0.png"),
)
VALUES = (
    *(
        None,
        True,
        0,
        -1,
        10**30,
        1e308,
        [],
        {},
        "",
        " ",
        "\n",
        "\0",
        "<image>",
        "</s>",
        "<s>",
        "<unk>",
        "\ufeff",
        "\ud800",
    ),
    *(
        "x" * 5000,
        "😀" * 50,
        "\u0000\u0001\u001b[31m",
        [[]],
        {"a": {"b": []}},
        "NaN",
        "\u2028",
        "\u3000",
        "\x85",
        "ﬁ\u0301",
    ),
)


def text_of(rng: random.Random) -> str:
    return " ".join(rng.choices(("red", "blau", "größe", "水", "😀", "a\tb", "1,2", '"so"', "\\", "{x}", "]"), k=4))


def good_file(rng: random.Random) -> Draft:
    """Six good records, with pictures or without, of one round or two."""
    rows = []
    for index in range(6):
        turns = []
        for turn in range(rng.choice((1, 2))):
            mark = "<image>\n" if index % 3 and turn == 0 else ""
            turns += [{"from": "human", "value": mark + text_of(rng)}, {"from": "gpt", "value": text_of(rng)}]
        rows.append({"id": f"r{index}", "conversations": turns} | ({"image": f"{index % 4}.png"} if index % 3 else {}))
    return Draft(rows, {})


# Damages to rows


def wrong_value(draft: Draft, rng: random.Random) -> None:
    """Another value for a key, at any depth, or in place of a whole row."""
    target: Any = draft.rows
    while isinstance(target, dict | list) and target:
        key = rng.choice(list(target)) if isinstance(target, dict) else rng.randrange(len(target))
        if not isinstance(target[key], dict | list) or not target[key] or rng.random() < 0.25:
            target[key] = rng.choice(VALUES)
            return
        target = target[key]


def spoilt_text(draft: Draft, rng: random.Random) -> None:
    row = rng.choice(draft.rows)
    turns = row.get("conversations") if isinstance(row, dict) else None
    if isinstance(turns, list) and turns and isinstance(turns[0], dict):
        turn = rng.choice([turn for turn in turns if isinstance(turn, dict)])
        told, extra = str(turn.get("value")), str(rng.choice(VALUES))
        place = rng.randint(0, len(told))
        turn["value"] = rng.choice((told[:place] + extra + told[place:], extra, told.replace("<image>", "")))


def wrong_turns(draft: Draft, rng: random.Random) -> None:
    row = rng.choice(draft.rows)
    turns = row.get("conversations") if isinstance(row, dict) else None
    if isinstance(turns, list) and turns:
        kind = rng.randrange(5)
        if kind == 0:
            turns.reverse()
        elif kind == 1:
            turns.pop(rng.randrange(len(turns)))
        elif kind == 2:
            turns.insert(rng.randrange(len(turns)), rng.choice(turns))
        elif kind == 3 and isinstance(turns[0], dict):
            turns[0]["from"] = rng.choice(("gpt", "Human", "system", "user", None, 1))
        else:
            turns *= rng.choice((2, 40))


def hostile_path(draft: Draft, rng: random.Random) -> None:
    row = rng.choice(draft.rows)
    if isinstance(row, dict):
        row["image"] = rng.choice(PATHS)


def missing_key(draft: Draft, rng: random.Random) -> None:
    row = rng.choice(draft.rows)
    if isinstance(row, dict) and row:
        del row[rng.choice(list(row))]


def repeated_row(draft: Draft, rng: random.Random) -> None:
    draft.rows.insert(rng.randrange(len(draft.rows)), rng.choice(draft.rows))


# Damages to pictures


def broken_picture(draft: Draft, rng: random.Random) -> None:
    name = f"{rng.randrange(4)}.png"
    raw = bytearray(draft.pictures[name])
    kind = rng.randrange(4)
    if kind == 0:
        del raw[rng.randrange(len(raw)) :]
    elif kind == 1:
        for _ in range(rng.choice((1, 3, 20))):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    elif kind == 2:
        raw[16:24] = rng.randrange(2**32).to_bytes(4, "big") + rng.randrange(2**32).to_bytes(4, "big")  # its size
    else:
        raw = bytearray(
            rng.choice((b"", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"P6 99999999 9 255\n", b"II*\0" * 9))
        )
    draft.pictures[name] = bytes(raw)


# Damages to bytes


def flipped_bytes(draft: Draft, rng: random.Random) -> None:
    raw = bytearray(draft.raw)
    for _ in range(rng.choice((1, 2, 8))):
        raw[rng.randrange(len(raw))] = rng.choice((rng.randrange(256), rng.choice(b'{}[]",:\\\n0')))
    draft.raw = bytes(raw)


def cut_off(draft: Draft, rng: random.Random) -> None:
    draft.raw = draft.raw[: rng.randrange(len(draft.raw))]


def cut_out(draft: Draft, rng: random.Random) -> None:
    start = rng.randrange(len(draft.raw))
    draft.raw = draft.raw[:start] + draft.raw[start + rng.choice((1, 5, 60)) :]


def brackets(draft: Draft, rng: random.Random) -> None:
    places = [i for i, byte in enumerate(draft.raw) if byte in b"{}[]"]
    place = rng.choice(places) if places else 0
    more = rng.choice((b"", draft.raw[place : place + 1] * 2, b"[" * rng.choice((30, 500, 20_000)), b"{}", b"]"))
    draft.raw = draft.raw[:place] + more + draft.raw[place + 1 :]


def inserted(draft: Draft, rng: random.Random) -> None:
    place = rng.randrange(len(draft.raw))
    scraps = (
        b"\0",
        b"\x80",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\r",
        b"9" * 5000,
        b"1e9999",
        b"NaN",
        b"\x1b[0m",
    )
    scraps += (b"\\ud800", b"\\u", b'"', b"//", b",", b"'", b"\n", b"-Infinity", b'"a":1,"a":2,')
    draft.raw = draft.raw[:place] + rng.choice(scraps) + draft.raw[place:]


def other_encoding(draft: Draft, rng: random.Random) -> None:
    text = draft.raw.decode("utf-8", "replace")
    draft.raw = rng.choice(
        (text.encode("utf-16"), text.encode("latin-1", "replace"), b"\xef\xbb\xbf" + draft.raw, text.encode("utf-32"))
    )


ROWS: tuple[Damage, ...] = (wrong_value, spoilt_text, wrong_turns, hostile_path, missing_key, repeated_row)
PICTURES: tuple[Damage, ...] = (broken_picture,)
BYTES: tuple[Damage, ...] = (flipped_bytes, cut_off, cut_out, brackets, inserted, other_encoding)


def damaged(seed: int, folder: Path) -> Path:
    """A damaged file with its pictures in `folder`."""
    rng = random.Random(seed)
    draft = good_file(rng)
    for index in range(4):
        image = Image.effect_noise((20 + index, 12), 60).convert(("RGB", "L", "P", "RGBA")[index])
        image.save(folder / f"{index}.png")
        draft.pictures[f"{index}.png"] = (folder / f"{index}.png").read_bytes()
    draft.pictures["cut.png"] = draft.pictures["0.png"][:60]
    kinds = rng.choices((ROWS, PICTURES, BYTES), (4, 1, 3), k=rng.choice((1, 1, 2, 3)))
    for kind in kinds:
        if kind is not BYTES:
            rng.choice(kind)(draft, rng)
    form = rng.choice(("json", "json", "jsonl"))
    texts = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in draft.rows]
    whole = "\n".join(texts) if form == "jsonl" else f"[{', '.join(texts)}]"
    draft.raw = whole.encode("utf-8", "surrogatepass")
    for kind in kinds:
        if kind is BYTES and draft.raw:
            rng.choice(kind)(draft, rng)
    for name, raw in draft.pictures.items():
        (folder / name).write_bytes(raw)
    (folder / "link.png").symlink_to("/etc/hostname")
    (folder / "folder").mkdir()
    path = folder / f"train.{form}"
    path.write_bytes(draft.raw)
    return path


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> LoadedModel:
    found = load_model(str(tiny_model), "cpu")
    found.model.requires_grad_(False)
    found.model.get_submodule(found.parts.projector or "").requires_grad_(True)
    found.model.get_output_embeddings().requires_grad_(True)
    return found


def train_on(checked: Checked, loaded: LoadedModel, reader: Reader) -> None:
    """One forward and backward pass over all rows."""
    data = InstructionDataset.of_checked(checked, reader)
    batch = reader.batch(list(data))
    assert batch["labels"].shape[0] == len(data)
    assert batch["input_ids"].shape[1] == int(data.lengths.max()) <= LONGEST
    assert ((batch["labels"] != -100).sum(1) > 0).all()
    loss = loaded.model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    loaded.model.zero_grad()


def outcome(seed: int, folder: Path, loaded: LoadedModel, reader: Reader) -> str:
    """How one damaged file ends: refused, good, or with rows left out; what is left was trained on."""
    path = damaged(seed, folder)
    try:
        checked = check_reading(check_file(path, cache=folder / "cache"), reader, LONGEST, folder / "cache")
        settle([checked], "skip", folder / "report", lambda _: None)
    except HydraError as problem:
        return f"refused: {problem}"
    for line in (folder / "report" / "preflight-rows.jsonl").read_text().splitlines():
        assert json.loads(line)["reason"]
    train_on(checked, loaded, reader)
    return "rows left out" if checked.bad else "good"


def test_damaged_files_are_refused_in_our_words_or_can_be_trained_on(loaded: LoadedModel, tmp_path: Path) -> None:
    reader, ends = open_reader(loaded.processor), Counter[str]()
    for seed in range(FILES):
        folder = tmp_path / str(seed)
        folder.mkdir()
        told = outcome(seed, folder, loaded, reader)
        ends[told.partition(":")[0]] += 1
        if told.startswith("refused"):
            assert str(folder) in told
            assert "Traceback" not in told
    assert ends.total() == FILES
    assert min(ends["refused"], ends["rows left out"], ends["good"]) > 20  # the damages reach all three ends
