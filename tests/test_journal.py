"""A damaged study journal: what is readable is kept and said, and what is not is read back from records."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from fake_search import fake_plan, fake_runner, fake_study
from hydra_vlm.errors import RunFolderError
from hydra_vlm.search.journal import aside
from hydra_vlm.search.repair import read
from hydra_vlm.search.study import create_study, journal, load_study, open_storage
from hydra_vlm.search.worker import work

TRIALS = 5

Lines = list[bytes]


def quiet(_: str) -> None:
    """Say nothing."""


def go_on(run: Path, trials: int = TRIALS) -> tuple[list[str], list[object]]:
    """The same command again: what was said, and what the study holds."""
    said: list[str] = []
    plan = fake_plan(run, trials)
    study = fake_study(plan, say=said.append)
    work(study, plan, fake_runner(run, 0.0), said.append)
    return said, outcome(study)


def outcome(study: optuna.Study) -> list[object]:
    kept = ("key", "baseline", "scores", "record", "candidate")
    return [(t.number, t.state.name, t.values, [t.user_attrs.get(key) for key in kept]) for t in study.trials]


def logged(run: Path) -> list[str]:
    return [" ".join(line.split()[:2]) for line in (run / "log").read_text().splitlines()]


def op(line: bytes) -> int:
    return int(json.loads(line)["op_code"])


def at(place: str, lines: Lines) -> int:
    """The position of a line of some kind in the middle of a journal."""
    kinds: dict[str, Callable[[bytes], bool]] = {
        "create": lambda line: op(line) == 4,
        "candidate": lambda line: b'"user_attr":{"candidate"' in line,
        "scores": lambda line: b'"user_attr":{"scores"' in line,
        "told": lambda line: op(line) == 6,
        "parameter": lambda line: op(line) == 5,
        "study": lambda line: op(line) == 0,
    }
    found = [i for i, line in enumerate(lines) if kinds[place](line)]
    return found[len(found) // 2]


DAMAGES: dict[str, Callable[[Lines, int], Lines]] = {
    "garbage": lambda lines, i: [*lines[:i], random.Random(0).randbytes(500).replace(b"\n", b""), *lines[i + 1 :]],
    "bad UTF-8": lambda lines, i: [*lines[:i], lines[i].replace(b":", b":\xff", 2), *lines[i + 1 :]],
    "cut and glued": lambda lines, i: [*lines[:i], lines[i][:20] + lines[i + 1], *lines[i + 2 :]],
    "two in one": lambda lines, i: [*lines[:i], lines[i] + lines[i + 1], *lines[i + 2 :]],
    "twice": lambda lines, i: [*lines[:i], lines[i], *lines[i:]],
    "missing": lambda lines, i: [*lines[:i], *lines[i + 1 :]],
    "foreign": lambda lines, i: [*lines[:i], b'{"hello": 1}', *lines[i + 1 :]],
    "a number": lambda lines, i: [*lines[:i], b"17", *lines[i + 1 :]],
    "an unknown operation": lambda lines, i: [*lines[:i], b'{"op_code":99,"worker_id":"w"}', *lines[i + 1 :]],
    "deep": lambda lines, i: [*lines[:i], b"[" * 100_000, *lines[i + 1 :]],
    "huge": lambda lines, i: [*lines[:i], b"x" * 2_000_000, *lines[i + 1 :]],
    "NULs": lambda lines, i: [*lines[:i], b"\0" * 4096 + lines[i][2:], *lines[i + 1 :]],
    "a page of NULs": lambda lines, i: [*lines[: i - 1], b"\0" * 4096 + lines[i + 2][9:], *lines[i + 3 :]],
    "another trial's": lambda lines, i: [
        *lines[:i],
        lines[i].replace(b'"trial_id":', b'"trial_id":9'),
        *lines[i + 1 :],
    ],
    "blank": lambda lines, i: [*lines[:i], b"", *lines[i + 1 :]],
}
PLACES = ("create", "candidate", "scores", "told", "parameter", "study")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    go_on(run)
    return run


def copied(whole: Path, run: Path, content: bytes) -> Path:
    import shutil

    shutil.copytree(whole, run)
    journal(run).write_bytes(content)
    return run


def check(whole: Path, run: Path, content: bytes) -> list[str]:
    """After damage the study is what it was; nothing is trained again, nothing lost, and Optuna reads the file."""
    copied(whole, run, content)
    said, found = go_on(run)
    assert found == go_on(whole)[1]
    assert logged(run) == logged(whole)
    own = JournalStorage(JournalFileBackend(str(journal(run))))
    assert outcome(optuna.load_study(study_name="search", storage=own)) == found
    kept = journal(run).read_bytes() + (aside(journal(run)).read_bytes() if aside(journal(run)).exists() else b"")
    assert all(line in kept for line in content.split(b"\n"))
    after = journal(run).read_bytes()
    assert go_on(run) == ([], found)
    assert journal(run).read_bytes().startswith(after), "a repaired journal is whole"
    return said


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("place", PLACES)
def test_a_damaged_journal_is_what_it_was(whole: Path, tmp_path: Path, damage: str, place: str) -> None:
    lines = journal(whole).read_bytes().splitlines()
    i = at(place, lines)
    content = b"\n".join(DAMAGES[damage](lines, i)) + b"\n"
    said = check(whole, tmp_path / "run", content)
    told = [one for one in said if "was damaged" in one]
    assert len(told) == 1 or damage in ("missing", "twice", "another trial's"), "where nothing may be wanting"
    assert all("finished trials are kept" in line for line in told)


def test_many_damages_at_once(whole: Path, tmp_path: Path) -> None:
    lines = journal(whole).read_bytes().splitlines()
    for seed in range(12):
        draw, hurt = random.Random(seed), list(lines)
        for _ in range(draw.randint(1, 6)):
            i = draw.randrange(1, len(hurt) - 3)
            hurt = DAMAGES[draw.choice([name for name in DAMAGES if name not in ("huge", "deep")])](hurt, i)
        check(whole, tmp_path / str(seed), b"\n".join(hurt) + b"\n")


@pytest.mark.parametrize("content", [b"", b"\0" * 9000, b"\n\n", b"nothing of the kind", b"\xff\xfe\n", None])
def test_a_journal_that_is_lost_is_filled_from_the_records(whole: Path, tmp_path: Path, content: bytes | None) -> None:
    run = copied(whole, tmp_path / "run", content or b"")
    if content is None:
        journal(run).unlink()
    said, found = go_on(run)
    assert found == go_on(whole)[1]
    assert logged(run) == logged(whole)
    assert sum("made anew" in line for line in said) == 1


def test_line_ends_of_other_systems_are_read(whole: Path, tmp_path: Path) -> None:
    content = journal(whole).read_bytes()
    assert check(whole, tmp_path / "windows", content.replace(b"\n", b"\r\n")) == []
    [line] = check(whole, tmp_path / "old", content.replace(b"\n", b"\r"))[:1]
    assert f"{TRIALS} finished trials are kept" in line


def test_an_undamaged_journal_is_left_alone(whole: Path) -> None:
    content = journal(whole).read_bytes()
    found = read(content, "search")
    assert found.is_whole
    assert found.finished == TRIALS
    assert b"".join(line + b"\n" for line in found.kept) == content


def test_damage_while_it_is_in_use_is_one_clear_error(whole: Path, tmp_path: Path) -> None:
    run = copied(whole, tmp_path / "run", journal(whole).read_bytes())
    study = fake_study(fake_plan(run, TRIALS))
    with journal(run).open("ab") as file:
        file.write(b"\xff\n" + b"x\n")
    with pytest.raises(RunFolderError, match="was damaged while it was in use"):
        study.get_trials()
    other = fake_study(fake_plan(run, TRIALS), say=quiet)
    with pytest.raises(RunFolderError, match="was replaced while it was in use"):
        study.get_trials()
    assert len(other.trials) == TRIALS


def test_what_stands_in_the_journals_place_is_named(tmp_path: Path) -> None:
    for name, make in (("folder", os.mkdir), ("pipe", os.mkfifo)):
        run = tmp_path / name
        run.mkdir()
        make(journal(run))
        with pytest.raises(RunFolderError, match=f"study.journal is a {name}, not a file"):
            open_storage(run)


# study.json


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "{}", "[" * 100_000, "\0" * 100),
        '{"name": 1, "storage": "study.journal", "values": 1}',
        '{"name": "other", "storage": "study.journal", "values": 1}',
        '{"name": "search", "storage": "x", "values": 1}',
    ],
)
def test_a_damaged_description_is_made_again(whole: Path, tmp_path: Path, content: str) -> None:
    run = copied(whole, tmp_path / "run", journal(whole).read_bytes())
    (run / "study.json").write_text(content)
    storage = open_storage(run)
    assert outcome(load_study(run, storage)) == go_on(whole)[1]
    assert go_on(run)[1] == go_on(whole)[1]
    assert (run / "study.json").read_bytes() == (whole / "study.json").read_bytes()


def test_another_study_is_not_taken_for_this_one(whole: Path, tmp_path: Path) -> None:
    content = journal(whole).read_bytes()
    run = copied(whole, tmp_path / "name", content.replace(b'"study_name":"search"', b'"study_name":"theirs"'))
    with pytest.raises(RunFolderError, match="holds the study 'theirs' and not 'search'"):
        go_on(run)
    run = copied(whole, tmp_path / "directions", content.replace(b'"directions":[2]', b'"directions":[1]', 1))
    with pytest.raises(
        RunFolderError, match=r"is to minimize 1 values and the objective asked for has 1 to\s+maximize"
    ):
        go_on(run)
    run = copied(whole, tmp_path / "values", content)
    with pytest.raises(RunFolderError, match="has 2 to maximize"):
        create_study(run, open_storage(run), None, 2)
    (run / "study.json").write_text('{"name": "a", "storage": 5, "values": 1}')
    with pytest.raises(RunFolderError, match="with the name in the database"):
        create_study(run, open_storage(run), "postgresql+psycopg://me@host/db", 1)
