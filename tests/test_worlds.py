"""The embedded suite: whole in six formats, right in every answer, balanced, and never seen in training."""

import base64
import csv
import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hydra_vlm.benchmarks.protocol import Prediction
from hydra_vlm.benchmarks.suite import SIX, Task, average, load_tasks, score_task
from hydra_vlm.data import builtin, worlds
from hydra_vlm.data.records import check_images, read_records
from hydra_vlm.data.scenes import NUMBER_WORDS, SHAPES, Scene, SceneObject
from hydra_vlm.data.worlds import Drawn, Sizes, draw_all, mix, nicknames, write_benchmarks, write_worlds
from hydra_vlm.data.worlds.mme import CATEGORIES
from hydra_vlm.data.worlds.pictures import Gallery, Question, Sheet, shared_out
from hydra_vlm.data.worlds.pope import POPULAR
from hydra_vlm.data.worlds.textvqa import WORDS

SMALL = Sizes(
    benchmarks={"mme": 2, "pope": 4, "textvqa": 20, "gqa": 5, "mmbench": 21, "sqa": 20},
    train={"mme": 2, "pope": 3, "textvqa": 21, "gqa": 6, "mmbench": 22, "sqa": 21},
    validation={"mme": 1, "pope": 1, "textvqa": 10, "gqa": 2, "mmbench": 10, "sqa": 10},
)
# What the suite means, written down a second time.
NAME_OF = {"circle": "K", "rectangle": "M", "triangle": "N", "star": "P", "cross": "R", "ring": "T", "diamond": "Z"}
ROLLS = {"circle", "ring"}
WARM = {"red", "orange", "yellow", "pink", "brown"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "suite"
    write_worlds(folder, 0, SMALL)
    return folder


@pytest.fixture(scope="module")
def tasks(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    return {task.name: task for task in load_tasks(world / "benchmarks", (), tmp_path_factory.mktemp("scratch"))}


@pytest.fixture(scope="module")
def drawn() -> dict[str, Drawn]:
    """More of it, not written to the disk."""
    pictures = {"mme": 25, "pope": 30, "textvqa": 150, "gqa": 60, "mmbench": 210, "sqa": 200}
    return draw_all("7", pictures, Gallery())


def questions(drawn: Drawn) -> Iterator[tuple[Scene | None, Question]]:
    for sheet, _ in drawn:
        for question in sheet.questions:
            yield sheet.scene, question


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(world: Path) -> list[dict[str, str]]:
    with (world / "benchmarks/mmbench/mmbench_dev_en_20231003.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


# ---- files -------------------------------------------------------------------------------------------------


def test_every_benchmark_is_read_and_nothing_is_left_over(world: Path, tasks: dict[str, Task]) -> None:
    counts = {name: len(task.examples) for name, task in tasks.items()}
    labels = sum(len(rows(path)) for path in (world / "benchmarks/pope/coco").iterdir())
    pictured = sum("image" in r for r in json.loads((world / "benchmarks/sqa/llava_test_CQM-A.json").read_text()))
    assert counts == {
        "mme": 2 * 2 * 14,
        "mmbench": len(table(world)),
        "textvqa": 20,
        "pope": labels,
        "gqa": 5 * 5,
        "scienceqa": pictured,
    }
    assert 0 < pictured < 20
    for name, task in tasks.items():
        assert task.root is not None
        assert SIX[name]().surplus(task.root) == []
        for example in task.examples:
            if example.image:
                with Image.open(example.image) as image:
                    assert (image.size, image.mode) == ((64, 64), "RGB")


def test_right_answers_come_to_the_maximum_and_constant_ones_to_chance(tasks: dict[str, Task]) -> None:
    def scored(answer: str) -> dict[str, Any]:
        said = {
            name: [Prediction(e.id, "", answer or Counter(e.answers).most_common(1)[0][0]) for e in task.examples]
            for name, task in tasks.items()
        }
        return {name: score_task(task, said[name])[0] for name, task in tasks.items()}

    perfect = scored("")
    assert average(list(perfect.values())) == pytest.approx(100)
    assert (perfect["mme"].value, perfect["mme"].groups["cognition"]) == (2000, 800)
    assert set(perfect["mme"].groups) >= set(CATEGORIES)
    constant = scored("yes")
    assert constant["mme"].value == 10 * 50
    assert constant["pope"].value == pytest.approx(100 * 2 / 3)
    assert scored("A")["mmbench"].value == 0


def test_the_same_seed_writes_the_same_bytes(world: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    write_worlds(again, 0, SMALL)
    write_worlds(other, 1, SMALL)
    written, repeated, different = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (world, again, other)
    )
    assert repeated == written
    pictures = {content for name, content in written.items() if name.suffix == ".png"}
    assert not pictures & set(different.values())
    assert written[Path("train.json")] != different[Path("train.json")]


def test_no_evaluated_picture_is_in_the_mix(world: Path) -> None:
    def pixels(content: bytes) -> bytes:
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB").tobytes()

    asked = [pixels(path.read_bytes()) for path in (world / "benchmarks").rglob("*.png")]
    asked += [pixels(base64.b64decode(row["image"])) for row in table(world) if int(row["index"]) < 1_000_000]
    taught = [pixels(path.read_bytes()) for path in (world / "images").rglob("*.png")]
    assert len(asked) > 50
    assert len(taught) > 100
    assert len(set(asked + taught)) == len(asked) + len(taught)


def test_a_picture_that_hangs_already_is_drawn_again() -> None:
    scenes = [Scene((), (255, 255, n)) for n in (0, 0, 1)]
    waiting = iter(scenes)
    gallery = Gallery()
    kept = [gallery.fresh(lambda: Sheet(next(waiting), ()))[0].scene for _ in range(2)]
    assert kept == [scenes[0], scenes[2]]


def test_the_mix_is_read_and_asks_in_the_benchmarks_own_words(world: Path, tasks: dict[str, Task]) -> None:
    train, validation = (read_records(world / f"{name}.json", world / "images") for name in ("train", "validation"))
    check_images(world / "train.json", train)
    check_images(world / "validation.json", validation)
    assert not {r.id for r in train} & {r.id for r in validation}
    assert {r.task.split(": ")[0] for r in train} == {"mme", "pope", "textvqa", "gqa", "mmbench", "sqa"}
    endings = {name: {e.question.splitlines()[-1] for e in task.examples} for name, task in tasks.items()}
    for record in train:
        human = record.rounds[0][0]
        name = record.task.split(": ")[0].replace("sqa", "scienceqa")
        assert human.startswith("<image>\n") == (record.image is not None)
        assert endings[name] == {human.splitlines()[-1]}
    assert any(record.image is None for record in train)


def test_the_mix_puts_questions_as_the_benchmarks_do(tasks: dict[str, Task]) -> None:
    asked = draw_all("0 evaluation", SMALL.benchmarks, Gallery())
    for name, task in tasks.items():
        own = name.replace("scienceqa", "sqa")
        put = {mix.human(own, question) for scene, question in questions(asked[own]) if scene is not None}
        benchmark = {example.question for example in task.examples}
        assert put <= benchmark if name == "mmbench" else put == benchmark


def test_it_is_a_built_in_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "write_worlds", lambda folder, seed: write_worlds(folder, seed, SMALL))
    files = builtin.write_builtin("worlds", tmp_path)
    assert "worlds" in builtin.BUILTIN
    assert files.benchmarks is not None
    assert files.validation is not None
    assert not files.tests
    assert len(load_tasks(files.benchmarks, (), tmp_path / "scratch")) == 6
    assert read_records(files.train, files.images)
    assert read_records(files.validation, files.images)


# ---- each format -------------------------------------------------------------------------------------------


def test_mme_asks_a_yes_and_a_no_for_each_picture(world: Path) -> None:
    root = world / "benchmarks/mme"
    assert sorted(path.name for path in (root / "images").iterdir()) == sorted(CATEGORIES)
    for category in CATEGORIES:
        texts = sorted((root / "images" / category).glob("*.txt"))
        assert [path.name for path in texts] == ["001.txt", "002.txt"]
        for path in texts:
            lines = [line.split("\t") for line in path.read_text().splitlines()]
            assert sorted(answer for _, answer in lines) == ["No", "Yes"]
            assert all(question.endswith("? Please answer yes or no.") for question, _ in lines)


def test_pope_is_balanced_in_each_split_and_absent_things_are_of_its_kind(drawn: dict[str, Drawn]) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for sheet, _ in drawn["pope"]:
        assert sheet.scene is not None
        here = {(o.colour, o.kind) for o in sheet.scene.objects}
        positives: dict[str, set[str]] = {}
        for question in sheet.questions:
            thing = tuple(question.text.removesuffix("?").split()[-2:])
            counts[question.kind, question.answer] += 1
            assert (question.answer == "yes") == (thing in here)
            if question.answer == "yes":
                positives.setdefault(question.kind, set()).add(question.text)
            elif question.kind == "popular":
                assert thing in POPULAR
            elif question.kind == "adversarial":
                assert thing[0] in {c for c, _ in here} or thing[1] in {s for _, s in here}
        assert len(set(map(frozenset, positives.values()))) == 1
    assert len(counts) == 6
    assert all(counts[split, "yes"] == counts[split, "no"] for split, _ in counts)


def test_yes_and_no_are_equally_frequent_in_the_mix(world: Path) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for record in read_records(world / "train.json", world / "images"):
        for _, answer in record.rounds:
            if answer in ("yes", "no"):
                counts[record.task.split(": ")[0], answer] += 1
    assert {name for name, _ in counts} == {"mme", "pope", "gqa"}
    assert all(counts[name, "yes"] == counts[name, "no"] for name, _ in counts)


def test_textvqa_has_ten_answers_and_ocr_tokens_if_asked(drawn: dict[str, Drawn], tmp_path: Path) -> None:
    for ocr in (False, True):
        write_benchmarks(tmp_path / str(ocr), drawn | {"textvqa": drawn["textvqa"][-40:]}, 0, ocr)
        root = tmp_path / str(ocr) / "textvqa"
        asked = rows(root / "llava_textvqa_val_v051_ocr.jsonl")
        assert {row["text"].count("\n") for row in asked} == {2 if ocr else 1}
        assert all((row["text"].splitlines()[1].startswith("Reference OCR token: ")) == ocr for row in asked)
        data = json.loads((root / "TextVQA_0.5.1_val.json").read_text())["data"]
        assert [item["image_id"] for item in data] == [row["question_id"] for row in asked]
        assert all(len(item["answers"]) == 10 for item in data)
        assert all(Counter(item["answers"]).most_common(1)[0][1] >= 7 for item in data)
    words = [row["text"].splitlines()[1].split(": ")[1] for row in asked if "word?" in row["text"]]
    assert set(words) <= {word.upper() for word in WORDS}


def test_gqa_knows_its_structural_types(world: Path) -> None:
    told = json.loads((world / "benchmarks/gqa/testdev_balanced_questions.json").read_text())
    counts = Counter((q["types"]["structural"], q["answer"]) for q in told.values())
    assert {kind for kind, _ in counts} <= {"query", "verify", "logical", "compare", "choose"}
    for kind in ("verify", "logical", "compare"):
        assert counts[kind, "yes"] == counts[kind, "no"]
    assert all(q["isBalanced"] for q in told.values())


def test_mmbench_copies_go_round_the_circle(world: Path) -> None:
    groups: dict[int, list[dict[str, str]]] = {}
    for row in table(world):
        groups.setdefault(int(row["index"]) % 1_000_000, []).append(row)
    assert len(groups) == 21
    for copies in groups.values():
        choices = [[row[letter] for letter in "ABCD" if row[letter]] for row in copies]
        first = choices[0]
        assert len(copies) == len(first) >= 2
        assert len(set(first)) == len(first)
        assert sorted(choices) == sorted(first[n:] + first[:n] for n in range(len(first)))
        assert [int(row["index"]) // 1_000_000 for row in copies] == list(range(len(first)))
        assert {row["answer"] for row in copies} == set("ABCD"[: len(first)])
        assert len({row[row["answer"]] for row in copies}) == 1
        assert len({(row["question"], row["hint"], row["image"], row["category"]) for row in copies}) == 1
    assert any(row["hint"] for row in table(world))


def test_scienceqa_tells_lectures_and_contexts(world: Path) -> None:
    root = world / "benchmarks/sqa"
    problems = json.loads((root / "problems.json").read_text())
    asked = {r["id"]: r for r in json.loads((root / "llava_test_CQM-A.json").read_text())}
    assert json.loads((root / "pid_splits.json").read_text())["test"] == list(problems) == list(asked)
    assert {p["subject"] for p in problems.values()} == {"natural science", "social science", "language science"}
    for pid, problem in problems.items():
        human, answer = (turn["value"] for turn in asked[pid]["conversations"])
        assert problem["lecture"]
        assert (f"Context: {problem['hint']}\n" in human) == bool(problem["hint"])
        assert answer == f"The answer is {'ABCD'[problem['answer']]}."
        assert f"{answer[-2]}. {problem['choices'][problem['answer']]}" in human.splitlines()
        assert (problem["image"] is None) == ("image" not in asked[pid]) == ("<image>" not in human)
    assert any(p["hint"] for p in problems.values())


def test_shares_are_kept_as_whole_numbers_allow() -> None:
    kinds = {"a": 2, "b": 1, "c": 1}
    assert Counter(shared_out(kinds, 400)) == {"a": 200, "b": 100, "c": 100}
    for n in range(12):
        assert len(shared_out(kinds, n)) == n


# ---- answers, recomputed from what is in the picture ---------------------------------------------------------


def things(scene: Scene) -> list[SceneObject]:
    return [o for o in scene.objects if not o.is_glyph]


def matches(thing: SceneObject, words: str) -> bool:
    """Whether a thing is what the words say: size, colour and kind, any of them."""
    said = words.replace("something ", "").replace("digit ", "").replace("letter ", "").split()
    return all(word in (thing.size, thing.colour, thing.kind) for word in said)


def mme_truth(scene: Scene, question: str) -> bool:
    objects, last = scene.objects, question.removesuffix("?").split()[-1]
    if found := re.fullmatch(r"can you see (one|two|three) things?\?", question):
        return NUMBER_WORDS.index(found[1]) == len(objects)
    if found := re.fullmatch(r"can you see (?:a )?(.+)\?", question):
        return any(matches(o, found[1]) for o in objects)
    if found := re.fullmatch(r"is the (\w+ \w+) at the (.+)\?", question):
        return next(o for o in objects if matches(o, found[1])).position == found[2]
    if question.startswith("is the title"):
        return max(objects, key=lambda o: o.y).kind == last
    if question.startswith("is its name"):
        return NAME_OF[objects[0].kind] == last
    if question in ("can it roll?", "does it have corners?"):
        return (objects[0].kind in ROLLS) == ("roll" in question)
    if question.startswith("is the sum"):
        first, plus, second = sorted(objects, key=lambda o: o.x)
        assert plus.kind == "cross"
        return int(first.kind) + int(second.kind) == int(last)
    if question.startswith("is it number"):
        return ord(objects[0].kind) - ord("A") + 1 == int(last)
    assert question.startswith("does print(max) show")
    return max(int(o.kind) for o in objects) == int(last)


def test_mme_answers_are_right(drawn: dict[str, Drawn]) -> None:
    for scene, question in questions(drawn["mme"]):
        assert scene is not None
        assert mme_truth(scene, question.text) == (question.answer == "yes"), (scene, question)


def test_textvqa_answers_are_right(drawn: dict[str, Drawn]) -> None:
    for scene, question in questions(drawn["textvqa"]):
        assert scene is not None
        glyphs = sorted((o for o in scene.objects if o.is_glyph), key=lambda o: o.x)
        signs = [o.kind for o in glyphs]
        if "code" in question.text:
            assert question.answer == " ".join(signs)
        elif "word" in question.text:
            assert question.answer == "".join(signs).lower()
        else:
            *colour, kind = question.text.removeprefix("what is the ").removesuffix("?").split()
            assert [
                o.kind
                for o in glyphs
                if o.kind.isdigit() == (kind == "digit") and (not colour or o.colour == colour[0])
            ] == [question.answer]


def seen_from(one: SceneObject, other: SceneObject) -> str:
    across, down = one.x - other.x, one.y - other.y
    if abs(across) > abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def gqa_truth(scene: Scene, question: str) -> str:
    by_kind = {o.kind: o for o in scene.objects}
    words = question.removesuffix("?").split()
    if question.startswith("are they"):
        return "yes" if ("same" in words) == (len({o.colour for o in scene.objects}) == 1) else "no"
    if question.startswith("can you see"):
        shown = [word in by_kind for word in words if word in SHAPES]
        return "yes" if (all(shown) if "and" in words else any(shown)) else "no"
    if found := re.fullmatch(r"where is the (\w+) of the (\w+)\?", question):
        return seen_from(by_kind[found[1]], by_kind[found[2]]).removesuffix(" of")
    if found := re.fullmatch(
        r"what (shape|color) is (?:the thing )?(left of|right of|above|below) the (\w+)\?", question
    ):
        (one,) = [o for o in scene.objects if o.kind != found[3] and seen_from(o, by_kind[found[3]]) == found[2]]
        return one.kind if found[1] == "shape" else one.colour
    one = by_kind[next(word for word in words if word in SHAPES)]
    if question.startswith("what"):
        return one.colour if "color" in words else one.size
    return one.colour if "or" in words else ("yes" if words[-1] == one.colour else "no")


def test_gqa_answers_are_right(drawn: dict[str, Drawn]) -> None:
    for scene, question in questions(drawn["gqa"]):
        assert scene is not None
        assert gqa_truth(scene, question.text) == question.answer, (scene, question)
        if question.kind == "choose":
            assert sum(thing.colour in question.text.split(" is ")[-1] for thing in scene.objects) <= 2


def true_options(scene: Scene | None, question: Question) -> list[str]:
    """The options of a multiple choice that the picture makes true."""
    options = question.options
    if scene is None:
        return [min(options)]
    thing = scene.objects[0]
    match question.kind:
        case "attribute_recognition" | "attribute_reasoning":
            size = question.context.removesuffix(".").split()[-1] if question.context else ""
            return [w for w in options if any(matches(o, f"{size} {w}") for o in scene.objects)]
        case "object_recognition" | "ocr" | "image_scene" | "samples":
            return [w for w in options if any(matches(o, w) for o in scene.objects)]
        case "object_localization":
            return [w for w in options if w == thing.position]
        case "counting":
            return [w for w in options if NUMBER_WORDS.index(w) == len(scene.objects)]
        case "colors":
            return ["warm" if thing.colour in WARM else "cold"]
        case "rolling":
            return ["yes" if thing.kind in ROLLS else "no"]
        case "names":
            return [w for w in options if w == NAME_OF[thing.kind]]
        case "maps":
            return [min(scene.objects, key=lambda o: o.y).noun]
        case _:
            assert question.kind == "vowels"
            return ["vowel" if thing.kind in "AEU" else "consonant"]


@pytest.mark.parametrize("name", ["mmbench", "sqa"])
def test_one_option_is_right_and_no_letter_is_preferred(drawn: dict[str, Drawn], name: str) -> None:
    letters: Counter[str] = Counter()
    for scene, question in questions(drawn[name]):
        assert true_options(scene, question) == [question.answer], (scene, question)
        assert question.options["ABCD".index(question.letter)] == question.answer
        if len(question.options) == 2:
            letters[question.letter] += 1
    assert 0.35 < letters["A"] / letters.total() < 0.65


def test_scattered_things_stay_apart_and_inside(drawn: dict[str, Drawn]) -> None:
    pictures = random.Random(0).sample([sheet.scene for sheet, _ in drawn["pope"] + drawn["gqa"]], 60)
    for scene in pictures:
        assert scene is not None
        for a in scene.objects:
            assert a.radius <= min(a.x, a.y)
            assert max(a.x, a.y) <= 64 - a.radius
            assert all(
                a is b or (a.x - b.x) ** 2 + (a.y - b.y) ** 2 >= (a.radius + b.radius) ** 2 for b in scene.objects
            )


# Nicknames in the same six forms


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nicknames") / "suite"
    write_worlds(folder, 0, SMALL, sheets=nicknames.SHEETS)
    return folder


def test_every_nickname_is_one_things_alone_and_names_no_part_of_it() -> None:
    known = nicknames.nicknames()
    assert len(known) == len(set(known.values())) == 28
    assert all(word not in thing for thing, word in known.items())
    assert known == nicknames.NICKNAMES != nicknames.nicknames(1)


def test_answers_about_nicknames_are_right() -> None:
    known = nicknames.NICKNAMES
    pictures = {"mme": 10, "textvqa": 100, "gqa": 60, "sqa": 100}
    sheets = draw_all("7", {**pictures, "pope": 1, "mmbench": 1}, Gallery(), nicknames.SHEETS)
    for scene, question in questions(sheets["mme"] + sheets["textvqa"]):
        assert scene is not None
        (thing,) = scene.objects
        right = known[thing.colour, thing.kind]
        if question.text == "what is its nickname?":
            assert question.answer == right
        else:
            assert (question.text == f"is its nickname {right}?") == (question.answer == "yes")
    for scene, question in questions(sheets["sqa"]):
        (asked,) = re.fullmatch(r"which has nickname (\w+)\?", question.text).groups()  # type: ignore[union-attr]
        meant = [option for option in question.options if known[tuple(option.split())] == asked]  # type: ignore[index]
        assert meant == [question.answer]
        assert scene is None or scene.objects[0].noun == question.answer
    for scene, question in questions(sheets["gqa"]):
        assert scene is not None
        if "of the thing" in question.text:
            continue  # told by its place
        words = question.text.rstrip("?").partition("of the ")[2].split()
        colour, kind = words[:2] if question.kind == "query" and len(words) == 2 else ("", words[0])
        (thing,) = (t for t in scene.objects if t.kind == kind and colour in ("", t.colour))
        right = known[thing.colour, thing.kind]
        said = "yes" if words[-1] == right else "no"
        assert question.answer == (said if question.kind == "verify" else right)
        assert question.kind != "choose" or right in (words[1], words[3])


def test_the_six_of_nicknames_load_and_score(named: Path, tmp_path: Path) -> None:
    tasks = load_tasks(named / "benchmarks", (), tmp_path)
    assert {task.name for task in tasks} == set(SIX)
    right = {t.name: [Prediction(e.id, "", Counter(e.answers).most_common(1)[0][0]) for e in t.examples] for t in tasks}
    assert average([score_task(task, right[task.name])[0] for task in tasks]) == pytest.approx(100)
    train = read_records(named / "train.json", named / "images")
    check_images(named / "train.json", train)
    assert Counter(r.task.split(":")[0] for r in train)["textvqa"] == SMALL.train["textvqa"]


def test_built_in_nicknames_come_with_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "NICKNAMES", SMALL)
    files = builtin.write_builtin("nicknames", tmp_path)
    assert files.benchmarks is not None
    assert read_records(files.train, files.images)
    assert {task.name for task in load_tasks(files.benchmarks, (), tmp_path / "scratch")} == set(SIX)
