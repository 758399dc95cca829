"""Small files read on a user's behalf: what is no file is not opened, what is too large or too deep is not built."""

import json
import os
import socket
import time
from pathlib import Path

import pytest

from hydra_vlm.errors import FileError, MissingFileError
from hydra_vlm.reading import PAGE, read_bytes, read_json, read_json_lines, read_object, read_text, read_yaml
from hydra_vlm.strict import DEEPEST, MOST_NODES, parse_json, parse_yaml


def test_what_is_no_file_is_refused_and_not_opened(tmp_path: Path) -> None:
    """Opening a pipe would wait for a writer for ever, reading a device would never end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "to the pipe").symlink_to("pipe")
    here = os.getcwd()
    os.chdir(tmp_path)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind("socket")
    finally:
        os.chdir(here)
    wrong = {
        "pipe": "is a pipe, not a file",
        "to the pipe": "is a pipe, not a file",
        "folder": "is a folder, not a file",
        "socket": "is a socket, not a file",
        "loop": "cannot be read",
        "dangling": "is a link to nowhere, which does not exist",
        "absent": "does not exist",
        "a" * 300: "cannot be read",
        "a\0b": "cannot be read",
        "/dev/zero": "is a device, not a file",
    }
    for name, message in wrong.items():
        for read in (read_bytes, read_text, read_json, read_yaml, lambda path: list(read_json_lines(path))):
            with pytest.raises(FileError, match=message) as caught:
                read(tmp_path / name)
            assert isinstance(caught.value, MissingFileError) == message.endswith("not exist")


def test_sizes_are_known_before_anything_is_read(tmp_path: Path) -> None:
    """A sparse file of a tebibyte takes no time; /proc's files say 0 bytes and hold more."""
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(2**40)
    started = time.monotonic()
    with pytest.raises(FileError, match=r"huge\.json has 1,099,511,627,776 bytes, more than the 16,777,216"):
        read_json(huge)
    assert time.monotonic() - started < 1
    if Path("/proc/self/maps").exists():
        with pytest.raises(FileError, match="more than the 100"):
            read_bytes("/proc/self/maps", 100)
    (tmp_path / "long.yaml").write_text("a: '" + "x" * PAGE + "'")
    with pytest.raises(FileError, match="more than the 262,144"):
        read_yaml(tmp_path / "long.yaml")


def test_text_is_utf8_and_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa4"}')
    assert read_json(path) == {"a": "ä"}
    path.write_bytes('{"a": 1}'.encode("utf-16"))
    with pytest.raises(FileError, match="not UTF-8 text but UTF-16"):
        read_json(path)
    path.write_bytes(b'{"a": "\xe4"}')
    with pytest.raises(FileError, match=r"not UTF-8 text \(byte 7\)"):
        read_json(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"a": 1', "not valid JSON"),
        ('{\n"a": 1\n"b": 2}', "line 3"),
        ('{"a": 1, "a": 2}', "has the key 'a' twice"),
        ('{"a": ' + "9" * 5000 + "}", "a number of 5000 digits"),
        ("[" * 100_000, "nested deeper than 64"),
        ("[" * 100 + "]" * 100, "nested deeper than 64"),
        ('{"a":' * 100 + "1" + "}" * 100, "nested deeper than 64"),
        ('"\\ud800"', "half of a surrogate pair"),
        ("[" + "0," * 10_000_001 + "0]", "more than 10,000,000 values"),
    ],
)
def test_json_that_python_takes_or_breaks_on(text: str, message: str) -> None:
    with pytest.raises(FileError, match=rf"^it .*{message}"):
        parse_json(text, "it")


def test_json_as_python_and_transformers_write_it() -> None:
    """NaN in a record, no limit in a tokenizer's configuration, depth up to the limit."""
    assert str(parse_json("[NaN, -Infinity]", "it")) == "[nan, -inf]"
    assert parse_json(json.dumps({"model_max_length": int(1e30)}), "it") == {"model_max_length": int(1e30)}
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, "it")


def test_an_object_where_keys_are_read(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(FileError, match="must hold a JSON object, keys and values; found a list"):
        read_object(tmp_path / "list.json")


def test_lines_are_numbered_and_cut_at_line_ends_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "one\u2028two"}\n\n{"a": 2}\n', encoding="utf-8")
    assert list(read_json_lines(path)) == [(1, {"a": "one\u2028two"}), (3, {"a": 2})]
    path.write_text("1\n{\n")
    with pytest.raises(FileError, match=r"rows\.jsonl, line 2 is not valid JSON"):
        list(read_json_lines(path))


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{','.join([f'*{chr(97 + i)}'] * 9)}]}}\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "more than 20,000 values once its aliases are written out"),
        (MERGES, "more than 20,000 values once its aliases are written out"),
        ("- 1\n" * (MOST_NODES + 1), "more than 20,000 values"),
        ("a: &a [*a]", "alias .a before or within what it stands for"),
        ("a: *b", "alias .b before or within what it stands for"),
        ("a: " + "[" * 100 + "]" * 100, "nested deeper than 64"),
        ("[" * 100_000, "nest"),
        ("- " * 50_000, "nested deeper than 64"),
        ("a: 1\nb: {c: 1, c: 2}", r"has the key 'c' twice \(in the section at line 2\)"),
        ("a: " + "9" * 5000, "a number of 5000 digits"),
        ("a: !!timestamp 2026-99-99", "holds a value that does not read"),
        ("a: !!timestamp x", "holds a value that does not read"),
        ("a: !!python/object/apply:os.system [x]", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: [1", "not valid YAML"),
    ],
)
def test_yaml_that_grows_or_says_two_things(text: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(FileError, match=rf"^it .*{message}") as caught:
        parse_yaml(text, "it")
    assert time.monotonic() - started < 2
    assert "\n" not in str(caught.value)


def test_yaml_as_people_write_it() -> None:
    assert parse_yaml("", "it") is None
    assert parse_yaml("base: &b {rank: 4}\nother: {<<: *b, seed: 1}", "it")["other"] == {"rank": 4, "seed": 1}
