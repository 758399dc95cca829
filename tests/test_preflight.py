"""The check of a whole data set: every fault by row and line, one pass that is kept, skipping, late surprises."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader
from typer.testing import CliRunner, Result

from hydra_vlm import trials
from hydra_vlm.cli import app
from hydra_vlm.data import image_check, json_rows, preflight, record_file
from hydra_vlm.data.cache import CacheWarning, cache_folder
from hydra_vlm.data.instruction import InstructionDataset
from hydra_vlm.data.json_rows import rows_of
from hydra_vlm.data.preflight import Checked, check_file, check_reading, settle
from hydra_vlm.data.readers import Reader, open_reader
from hydra_vlm.data.record_file import RecordFile, scan
from hydra_vlm.data.records import read_records
from hydra_vlm.errors import DataError
from hydra_vlm.models.loading import load_model
from hydra_vlm.training.numbered import Numbered, NumberedBatch
from tiny import toy_config

Record = dict[str, Any]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for index in range(4):
        Image.new("RGB", (20 + index, 10), (index * 40, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    return tmp_path


@pytest.fixture(scope="module")
def reader(tiny_model: Path) -> Reader:
    return open_reader(load_model(str(tiny_model), "cpu").processor)


def record(index: int = 0, **changes: Any) -> Record:
    turns = [{"from": "human", "value": f"<image>\nwhat is {index}?"}, {"from": "gpt", "value": f"a {index}"}]
    return {"id": f"r{index}", "image": f"{index % 4}.png", "conversations": turns, **changes}


def lines(home: Path, *rows: str, name: str = "train.jsonl") -> Path:
    path = home / name
    path.write_bytes(b"\n".join(row.encode("utf-8", "surrogateescape") for row in rows))
    return path


def checked(home: Path, path: Path, **options: Any) -> Checked:
    return check_file(path, home / "images", cache=home / "cache", **options)


# Reading rows


@pytest.mark.parametrize("chunk", [1, 7, 64, 2**20])
@pytest.mark.parametrize("form", ["list", "indented", "lines", "crlf", "bom"])
def test_rows_are_what_json_reads_whatever_the_chunks(
    home: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, form: str
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK", chunk)
    rows: list[Any] = [record(i, note='ä€😀\\"]}[{') for i in range(5)] + [12, "a]", [1, [2]], None, 3.5, record(6)]
    texts = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    text = {
        "list": f"[{','.join(texts)}]",
        "indented": json.dumps(rows, indent=2),
        "lines": "\n\n".join(texts),
        "crlf": "[\r\n" + ",\r\n".join(texts) + "\r\n]\r\n",
        "bom": "\ufeff[" + ", ".join(texts) + "]",
    }[form]
    path = home / ("data.jsonl" if form == "lines" else "data.json")
    path.write_bytes(text.encode())
    found = list(rows_of(path))
    assert [row.value for row in found] == rows
    assert not any(row.fault for row in found)
    raw = path.read_bytes()
    for row in found:
        assert json.loads(raw[row.offset : row.offset + row.size]) == row.value
        assert row.line == raw[: row.offset].count(b"\n") + 1
        rest = list(rows_of(path, row.behind))  # going on behind any row
        assert [other.value for other in rest] == rows[row.number + 1 :]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "`,` or `]` must follow row 1, found 'the end'"),
        ("[1 2]", "must follow row 0"),
        ("[1,\n2,]", r"line 2, byte 6 on: row 2 is missing"),
        ('[{"a": 1}\n{"b": 2}]', r"line 2, byte 10 on: `,` or `\]` must follow row 0"),
        ('[{"a": }]', "line 1, byte 7 on: row 0 is not valid JSON"),
        ("[1] x", "stands behind the list"),
        ("[" * 100_000, "nested deeper"),
        ('["' + "x" * 100, "row 0 is not valid JSON"),
        ("", "is empty"),
        ("hello", "must hold a JSON list"),
        ("\ufeff".encode("utf-16-le").decode("latin-1"), "UTF-16"),
    ],
)
def test_what_ends_the_reading_is_told_with_its_place(home: Path, text: str, message: str) -> None:
    path = home / "data.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        list(rows_of(path))


def test_a_row_may_not_fill_the_memory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "LONGEST", 5_000)
    monkeypatch.setattr(json_rows, "CHUNK", 500)
    long = json.dumps({"x": "y" * 20_000})
    with pytest.raises(DataError, match="row 1 "):
        list(rows_of(lines(home, "[1,", long, "]", name="data.json")))
    found = list(rows_of(lines(home, "1", long, "2")))
    assert [row.fault for row in found] == ["", "is longer than 5,000 characters", ""]


# Every fault of a row, by row and line

FAULTS = {
    "not valid JSON": '{"id": }',
    "must be an object": "[1]",
    "has the key 'id' twice": '{"id": 1, "id": 2}',
    "holds NaN": '{"id": NaN}',
    "number of 5000 digits": '{"id": ' + "9" * 5000 + "}",
    "1e999, which is too large": '{"id": 1e999}',
    "nested deeper": '{"id": ' + "[" * 70 + "]" * 70 + "}",
    "is nested deeper": '{"id": ' + "[" * 10**5 + "]" * 10**5 + "}",
    "not UTF-8": json.dumps(record()).replace("what", "wh\udce4t"),
    "half of a surrogate pair": json.dumps(record()).replace("what", "wh\\ud800t"),
    "must be a non-empty list": json.dumps(record(conversations={})),
    "string `value`": json.dumps(record(conversations=[{"from": "human", "value": 3}])),
    "must be from 'human'": json.dumps(record(conversations=record()["conversations"][::-1])),
    "every human turn needs": json.dumps(record(conversations=record()["conversations"][:1])),
    "has an empty answer": json.dumps(record()).replace("a 0", " "),
    "no human turn contains": json.dumps(record()).replace("<image>", ""),
    "exactly once": json.dumps(record()).replace("<image>", "<image><image>"),
    "names no `image`": json.dumps(record(image=None)),
    "`image` must be one path": json.dumps(record(image=["0.png"])),
    "which is empty": json.dumps(record(image="")),
    "NUL": json.dumps(record(image="0.png\0")),
    "must be relative": json.dumps(record(image="/etc/passwd")),
    "must be relative to": json.dumps(record(image="C:\\0.png")),
    "by `..`": json.dumps(record(image="a/../../0.png")),
    "longer than files may have": json.dumps(record(image="a" * 300 + ".png")),
    "does not exist": json.dumps(record(image="none.png")),
    "cannot be read": json.dumps(record(image="cut.png")),
    "lies outside the image folder": json.dumps(record(image="link.png")),
    "pixels; made square that is 40,000,000,000": json.dumps(record(image="bomb.png")),
    "cannot be read (": json.dumps(record(image="script.eps")),
    "control mark": json.dumps(record()).replace("a 0", "a </s>"),
    "exceed": json.dumps(record()).replace("a 0", "a " + "long " * 100),
}


@pytest.fixture
def hostile(home: Path) -> Path:
    images = home / "images"
    Image.effect_noise((64, 64), 50).save(images / "cut.png")
    (images / "cut.png").write_bytes((images / "cut.png").read_bytes()[:2000])
    Image.new("RGB", (5, 5)).save(home / "outside.png")
    (images / "link.png").symlink_to(home / "outside.png")
    Image.new("1", (200_000, 1)).save(images / "bomb.png")
    (images / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    return home


def test_every_fault_is_named_by_row_and_line(hostile: Path, reader: Reader) -> None:
    texts = [json.dumps(record(50)), *FAULTS.values(), json.dumps(record(51))]
    found = check_reading(checked(hostile, lines(hostile, *texts)), reader, 512, hostile / "cache")
    assert found.total == len(texts)
    assert [finding.row for finding in found.bad] == list(range(1, len(texts) - 1))
    for finding, (reason, _) in zip(found.bad, FAULTS.items(), strict=True):
        assert reason in finding.reason
        assert finding.line == finding.row + 1
        assert len(finding.reason) < 1000
    assert [r.id for r in found.records] == ["r50", "r51"]
    assert found.lengths is not None
    assert found.lengths.tolist() == [reader.item(r)["length"] for r in found.records]


def test_repetitions_are_warnings(home: Path) -> None:
    same = record(1) | {"id": "other"}
    found = checked(home, lines(home, *map(json.dumps, [record(0), record(1), same, record(2) | {"id": "r0"}])))
    assert not found.bad
    assert [(w.row, w.kind, w.reason) for w in found.warnings] == [
        (2, "duplicate records", "has the image and conversation of record 1"),
        (3, "duplicate ids", "has the id of record 0"),
    ]
    assert len(found.records) == 4


# One pass, kept


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a row was parsed, an image decoded, a text measured."""
    counts = {"rows": 0, "images": 0}

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted_call(*words: Any) -> Any:
            counts[name] += 1
            return call(*words)

        return counted_call

    monkeypatch.setattr(image_check, "examine", counting("images", image_check.examine))
    plain = record_file.rows_of

    def rows(*words: Any) -> Any:
        for row in plain(*words):
            counts["rows"] += 1
            yield row

    monkeypatch.setattr(record_file, "rows_of", rows)
    return counts


class Broken(Exception):
    """What ends a pass in the middle."""


def test_a_second_start_reads_nothing_again(home: Path, reader: Reader, counted: dict[str, int]) -> None:
    path = lines(home, *(json.dumps(record(i)) for i in range(40)), json.dumps(record(41, image="5.png")), "{}")
    first = check_reading(checked(home, path), reader, 512, home / "cache")
    assert counted == {"rows": 42, "images": 4}
    second = check_reading(checked(home, path), reader, 512, home / "cache")
    assert counted == {"rows": 42, "images": 4}
    assert (first.findings, list(first.records)) == (second.findings, list(second.records))
    assert np.array_equal(first.lengths, second.lengths)
    os.utime(path)  # touched, not changed
    (home / "images/0.png").write_bytes((home / "images/1.png").read_bytes())
    checked(home, path)
    assert counted == {"rows": 42, "images": 5}  # the one that is new
    lines(home, *(json.dumps(record(i)) for i in range(40, 82)))
    assert checked(home, path).records[0].id == "r40"
    assert counted["rows"] == 84


@pytest.mark.parametrize("form", ["train.json", "train.jsonl"])
def test_a_stopped_pass_goes_on(
    home: Path, reader: Reader, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(record_file, "BLOCK", 10)
    monkeypatch.setattr(preflight, "BLOCK", 10)
    texts = [json.dumps(record(i) if i % 9 else {"id": i}) for i in range(35)]
    path = lines(home, *(texts if form.endswith("l") else ["[", ",\n".join(texts), "]"]), name=form)
    plain, calls = record_file.write_block, []

    def stop(*words: Any) -> None:
        plain(*words)
        calls.append(words)
        if len(calls) in (2, 6):  # in the first pass, and in the third
            raise Broken

    monkeypatch.setattr(record_file, "write_block", stop)
    monkeypatch.setattr(preflight, "write_block", stop)
    with pytest.raises(Broken):
        checked(home, path)
    assert counted["rows"] == 20
    done = checked(home, path)
    assert counted["rows"] == 35
    with pytest.raises(Broken):
        check_reading(done, reader, 512, home / "cache")
    found = check_reading(done, reader, 512, home / "cache")
    whole = check_reading(check_file(path, home / "images", cache=home / "other"), reader, 512, home / "other")
    assert (found.findings, list(found.records)) == (whole.findings, list(whole.records))
    assert np.array_equal(found.lengths, whole.lengths)
    assert [finding.row for finding in found.bad] == [0, 9, 18, 27]


@pytest.mark.parametrize("name", ["rows.npy", "scan.json", "lengths.npy", "lengths.json"])
@pytest.mark.parametrize("how", ["a byte", "shorter", "empty", "older"])
def test_a_damaged_cache_entry_is_named_and_made_anew(home: Path, reader: Reader, name: str, how: str) -> None:
    path = lines(home, *(json.dumps(record(i)) for i in range(40)), json.dumps(record(41, image="5.png")), "{}")
    first = check_reading(checked(home, path), reader, 512, home / "cache")
    (entry,) = (home / "cache").rglob(name)
    raw = bytearray(entry.read_bytes())
    if how == "a byte":
        raw[-40] ^= 1
    entry.write_bytes({"a byte": bytes(raw), "shorter": raw[:-5], "empty": b"", "older": raw[:-16]}[how])
    with pytest.warns(CacheWarning, match=f"{name} in the cache is damaged .* made anew"):
        second = check_reading(checked(home, path), reader, 512, home / "cache")
    third = check_reading(checked(home, path), reader, 512, home / "cache")  # it is whole again: no warning
    for again in (second, third):
        assert (first.findings, list(first.records)) == (again.findings, list(again.records))
        assert np.array_equal(first.lengths, again.lengths)


def test_a_cache_that_takes_nothing_is_said_and_missed_by_nobody(
    home: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "file").touch()
    path = lines(home, *(json.dumps(record(i)) for i in range(5)))
    with pytest.warns(CacheWarning, match="takes no new files .*HYDRA_VLM_CACHE"):
        found = check_reading(checked(home, path), reader, 512, home / "file/cache")
    assert len(found.records) == 5
    monkeypatch.setenv("HYDRA_VLM_CACHE", str(home / "file/cache"))
    own: list[Any] = []
    monkeypatch.setattr("hydra_vlm.data.cache._OWN", own)
    with pytest.warns(CacheWarning, match="takes no new files"):
        first = cache_folder()
    assert cache_folder() == first  # said once
    own[0].cleanup()


def test_records_read_by_number_equal_those_read_at_once(home: Path) -> None:
    path = lines(
        home, "[", ",\n".join(json.dumps(record(i, task="ä"), ensure_ascii=i % 2 == 0) for i in range(30)), "]"
    )
    path = path.rename(home / "train.json")
    found = scan(path, home / "images", home / "cache").records
    assert list(found) == read_records(path, home / "images")
    assert found.select([3, 5])[1] == found[5]
    assert found[-1] == found[29]
    path.write_text(path.read_text().replace("what is 7?", "what is 8!"))
    with pytest.raises(DataError, match=r"train\.json, row 7 \(line 9\) is no longer what it was"):
        found[7]


# Bad rows: stop, or leave them out


def test_skipped_rows_are_counted_listed_and_said(tiny_model: Path, home: Path) -> None:
    rows = [record(i) for i in range(8)]
    rows[3]["image"], rows[5]["conversations"][1]["value"] = "none.png", "a </s>"
    path = home / "train.json"
    path.write_text(json.dumps(rows))
    shared = [f"data.images={home / 'images'}", f"data.train={path}", "data.validation=null", "data.tests={}"]
    config = toy_config(tiny_model, home, *shared)
    with pytest.raises(DataError, match=r"(?s)1 bad record.*skip.*record 3 \(id r3\): image .*none\.png does not"):
        trials.prepare_study(config, home / "run", lambda _: None)
    said: list[str] = []
    study = trials.prepare_study(
        toy_config(tiny_model, home, *shared, "data.on_bad_row=skip"), home / "new", said.append
    )
    assert [r.id for r in study.data.train.records] == ["r0", "r1", "r2", "r4", "r6", "r7"]
    assert any("2 of 8 records are bad and left out" in line for line in said)
    report = json.loads((home / "new" / "preflight.json").read_text())
    assert (report["on_bad_row"], report["files"][0]["bad"]) == ("skip", {"image": 1, "text": 1})
    listed = [json.loads(line) for line in (home / "new" / "preflight-rows.jsonl").read_text().splitlines()]
    assert [(row["row"], row["level"]) for row in listed] == [(3, "bad"), (5, "bad")]


def test_a_file_without_a_good_row_is_refused_even_when_skipping(home: Path) -> None:
    found = checked(home, lines(home, "{}", "[]"))
    with pytest.raises(DataError, match="no record is left"):
        settle([found], "skip")


# What goes bad later


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_goes_bad_names_its_row(home: Path, reader: Reader, workers: int) -> None:
    path = lines(home, *(json.dumps(record(i)) for i in range(4)))
    done = check_reading(checked(home, path), reader, 512, home / "cache")
    data = InstructionDataset.of_checked(done, reader)
    (home / "images/2.png").write_bytes((home / "images/2.png").read_bytes()[:40])
    numbered = Numbered(data)
    loader = DataLoader(numbered, 4, collate_fn=NumberedBatch(reader.batch), num_workers=workers)
    with pytest.raises(DataError, match=r"record r2 \(\S*train\.jsonl, row 2 \(line 3\)\) with image \S*2\.png can no"):
        next(iter(loader))


def test_a_large_set_keeps_nothing_but_numbers(home: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lines(home, *(json.dumps(record(i)) for i in range(20)))
    small = InstructionDataset.of_checked(check_reading(checked(home, path), reader, 512, home / "a"), reader)
    monkeypatch.setattr(preflight, "KEPT_TOKENS", 100)
    large = InstructionDataset.of_checked(check_reading(checked(home, path), reader, 512, home / "b"), reader)
    assert (len(small._kept), len(large._kept)) == (20, 0)
    assert list(small) == list(large)
    assert isinstance(large.records, RecordFile)
    assert large.lengths.dtype == np.int32


def test_lengths_alone_are_those_of_whole_items(hostile: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*(json.dumps(record(i, id=f"ä{i}")) for i in range(9)), *FAULTS.values()]
    done = checked(hostile, lines(hostile, *texts))
    whole = check_reading(done, reader, 512, hostile / "a")
    monkeypatch.setattr(preflight, "KEPT_RECORDS", 3)
    alone = check_reading(done, reader, 512, hostile / "b")
    assert np.array_equal(whole.lengths, alone.lengths)
    assert whole.findings == alone.findings
    assert len(whole.items or {}) == 9
    assert not alone.items


# The command


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_file_is_checked_by_the_command(home: Path, tiny_model: Path) -> None:
    path = lines(home, *(json.dumps(record(i)) for i in range(3)), json.dumps(record(0)), "{}")
    done = invoke("data", "check", path, "--images", home / "images", "--out", home / "report")
    assert done.exit_code == 1
    assert "5 records, 1 bad (1 record); 1 duplicate ids; 1 duplicate records" in done.stdout
    assert "record 4: `conversations` must be a non-empty list of turns (line 5)" in done.stdout
    assert len((home / "report" / "preflight-rows.jsonl").read_text().splitlines()) == 3
    lines(home, *(json.dumps(record(i)) for i in range(3)), json.dumps(record(5)).replace("a 5", "</s>"))
    words = ("data", "check", path, "--images", home / "images", "--json")
    assert invoke(*words).exit_code == 0
    done = invoke(*words, "--model", tiny_model)
    assert done.exit_code == 1
    assert json.loads(done.stdout)["bad"] == {"text": 1}
    assert json.loads(invoke(*words, "--model", tiny_model, "--max-length", 40).stdout)["bad"]["too long"] == 3


@pytest.mark.parametrize("command", ["pretrain", "profile", "train", "tune", "search"])
def test_on_bad_row_reaches_the_configuration(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hydra_vlm.config.load_config",
        lambda path, overrides: pytest.exit(f"{path} {[(each.key, each.text) for each in overrides]}", 7),
    )
    for words in (["--on-bad-row", "skip"], ["mine.yaml", "--on-bad-row=skip", "seeds=[1]"]):
        with pytest.raises(pytest.exit.Exception, match=r"'data\.on_bad_row', 'skip'"):
            CliRunner().invoke(app, [command, *words], catch_exceptions=False)
    done = CliRunner().invoke(app, [command, "--on-bad-row", "ignore"])
    assert done.exit_code == 2


@pytest.mark.slow
def test_twenty_thousand_records_stream_in_little_memory(tmp_path: Path) -> None:
    tool = Path(__file__).parents[1] / "tools" / "bench_streaming.py"
    asked = ["--records", "2000", "20000", "--template", "v1-short", "--folder", str(tmp_path), "--grouped"]
    done = subprocess.run([sys.executable, str(tool), *asked], capture_output=True, text=True, check=True)
    small, _, first, again = ([*map(float, words[3:])] for words in map(str.split, done.stdout.splitlines()[1:]))
    rows, lengths, step, peak, _ = range(5)
    assert first[peak] < small[peak] + 0.2  # GiB
    assert again[rows] + again[lengths] < 0.1 * (first[rows] + first[lengths])
    assert again[step] < 0.5 * first[step]
