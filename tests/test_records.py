"""LLaVA-format files: bad records are refused before training, with file, index and reason."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hydra_vlm.data.records import check_images, read_records, sample
from hydra_vlm.errors import DataError


def turns(human: str = "<image>\nwhat?", answer: str = "red") -> list[dict[str, str]]:
    return [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    return tmp_path


def write(home: Path, *records: Any) -> Path:
    path = home / "data.json"
    path.write_text(json.dumps(list(records)))
    return path


def test_good_records_read(home: Path) -> None:
    text_only = {"id": 5, "conversations": turns("hello?", "hi")}
    several = {"id": "m", "image": "a.png", "conversations": turns() + turns("and?", "blue"), "extra": 1}
    first, second = read_records(write(home, text_only, several))
    assert (first.id, first.image, first.rounds) == ("5", None, (("hello?", "hi"),))
    assert second.image == str(home / "a.png")
    assert second.rounds == (("<image>\nwhat?", "red"), ("and?", "blue"))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"image": "b.png", "conversations": turns()}, r"image .*b\.png does not exist"),
        ({"image": "a.png", "conversations": turns("what?")}, "no human turn contains <image>"),
        ({"conversations": turns()}, "contains <image> but names no `image`"),
        ({"image": "a.png", "conversations": turns("<image><image>")}, "exactly once"),
        ({"image": "a.png", "conversations": turns("hm?") + turns()}, "in the first human turn"),
        ({"image": "a.png", "conversations": turns()[:1]}, "every human turn needs an answer"),
        ({"image": "a.png", "conversations": turns()[::-1]}, "turn 0 must be from 'human'"),
        ({"image": "a.png", "conversations": turns(answer="  ")}, "empty answer"),
        ({"image": "a.png", "conversations": []}, "non-empty list of turns"),
        ({"image": "a.png"}, "non-empty list of turns"),
        ("text", "must be an object"),
        ({"conversations": [{"from": "human", "value": 3}]}, "string `value`"),
    ],
)
def test_a_bad_record_is_named_with_its_reason(home: Path, record: Any, reason: str) -> None:
    good = {"image": "a.png", "conversations": turns()}
    with pytest.raises(DataError, match=rf"(?s)data\.json: 1 bad record.*record 1: .*{reason}"):
        read_records(write(home, good, record))


def test_many_bad_records_are_counted_and_the_first_ones_listed(home: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)30 bad.*record 9.*and 20 more"):
        read_records(write(home, *[{"conversations": []}] * 30))


def test_truncated_and_undecodable_images_are_found_before_training(home: Path) -> None:
    Image.effect_noise((64, 64), 50).save(home / "cut.png")
    whole = (home / "cut.png").read_bytes()
    (home / "cut.png").write_bytes(whole[: len(whole) // 2])
    (home / "text.png").write_text("not a picture")
    records = read_records(
        write(home, *({"image": n, "conversations": turns()} for n in ("a.png", "cut.png", "text.png")))
    )
    with pytest.raises(DataError, match=r"(?s)2 bad.*record 1 .*cut\.png cannot be read.*record 2 .*text\.png"):
        check_images(home / "data.json", records)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '"x"'])
def test_files_that_hold_no_list_are_refused(home: Path, content: str) -> None:
    (home / "data.json").write_text(content)
    with pytest.raises(DataError, match=r"data\.json"):
        read_records(home / "data.json")
    with pytest.raises(DataError, match="does not exist"):
        read_records(home / "none.json")


def test_a_sample_is_seeded_and_keeps_the_order() -> None:
    items = list(range(100))
    assert sample(items, 10, seed=1) == sorted(sample(items, 10, seed=1))
    assert sample(items, 10, seed=1) != sample(items, 10, seed=2)
    assert sample(items, None) == sample(items, 200) == items
