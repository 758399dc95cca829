"""Damage to files from fixed seeds, what must come of it, and the process that tries it.

    python tests/mutations.py KIND PRISTINE SCRATCH FIRST LAST

tries seeds FIRST to LAST on copies of the folder PRISTINE and writes a line of JSON for each to standard output. A
case ends in one of these:

    refused       one of our errors, in one line that names the place
    harmless      success, and the result is that of the undamaged files
    another       success with another result, after a legible change of a configuration, template or record: keys or
                  values of JSON, YAML or text that is as valid as before. No digest binds those files, so the result
                  is what the files now say. Damaged weights may never end so.
    wrong         success with another result, though weights were damaged or a file no longer reads
    foreign       an exception that is not ours
    hang, memory  over 20 seconds, over 2 GiB above the need (the parent process sees to that)

Weights are damaged in their headers, names, types, shapes, lengths and by numbers that are none. A flipped bit that
leaves a number a number is not among the damages: no reader can know it where no digest is kept.
"""

import json
import os
import random
import resource
import shutil
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

GIBIBYTE = 2**30
Json = Any
Result = Any

NUMBERS = (0, -1, 1, 2, 3, 7, 10**6, 10**12, 10**30, -(10**30), 0.5, 1e-30, 1e308, float("nan"), float("inf"))
VALUES: tuple[Json, ...] = (
    *(None, True, False, "", " ", "x", "\0", "\ud800", "../../etc/passwd", "/dev/zero", "nan", "x" * 5000, "(a+)+$"),
    *([], {}, [None], [[]], {"a": {"b": []}}, ["q_proj"], [1] * 1000),
    *NUMBERS,
)
ODD_YAML = (
    *("[", "{", "- a", "a: b: c", "!!python/object/apply:os.system [ls]", "&a [*a]", "\t", "---\na: 1\n---\nb: 2"),
    *("? x", "<<: 3", "!!binary x", "0x10", "1e400", "-.inf", ".nan", "12_000", "1:30", "2001-01-01", "~", "yes", "''"),
    *("'2'", "[1, 2]", "{a: 1}", "-5", "0", "1e9", "99999999999999999999", "'x'", '"\\0"', '"\\uD800"', "0o17", "1.5"),
)
TEMPLATES = (
    *("{{", "{% for i in range(10**12) %}x{% endfor %}", "{% for m in messages %}{{ m.nothing.at.all }}{% endfor %}"),
    *("{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}", "", "x", "{{ messages | undefined_filter }}"),
    *("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ 'x' * 10**10 }}", "{% include 'config.json' %}"),
)


@dataclass
class Damage:
    """What was done, to which file, and whether that left something legible (see the head of this file)."""

    kind: str
    file: str
    legible: bool = False


# To files of any kind


def removed(path: Path, rng: random.Random) -> None:
    path.unlink()


def emptied(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def made_a_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def made_a_link(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(rng.choice(("nowhere", path.name, "/dev/zero", ".")))


def made_a_pipe(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def truncated(path: Path, rng: random.Random) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: rng.randrange(len(raw))])


def flipped(path: Path, rng: random.Random) -> None:
    """Bytes that no text has, or a byte that its syntax has elsewhere."""
    raw = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 3, 20))):
        raw[rng.randrange(len(raw))] = rng.choice(b'\x00\xff\x80{}[]",:\\\n')
    path.write_bytes(bytes(raw))


def inserted(path: Path, rng: random.Random) -> None:
    raw, scraps = path.read_bytes(), (b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"[" * 50_000, b"9" * 6000, b"NaN", b",,")
    place = rng.randrange(len(raw))
    path.write_bytes(raw[:place] + rng.choice(scraps) + raw[place:])


def other_encoding(path: Path, rng: random.Random) -> None:
    text = path.read_bytes().decode("utf-8", "replace")
    path.write_bytes(
        rng.choice((text.encode("utf-16"), text.encode("utf-32"), bytes(len(text)), b"PK\3\4" + bytes(60)))
    )


def other_content(path: Path, rng: random.Random) -> None:
    path.write_bytes(
        rng.choice((b"null", b"[]", b"{}", b"3", b'"x"', b"<html>Not found</html>", b"version https://git"))
    )


ANY: tuple[Callable[[Path, random.Random], None], ...] = (
    removed,
    emptied,
    made_a_folder,
    made_a_link,
    made_a_pipe,
    truncated,
    flipped,
    inserted,
    other_encoding,
    other_content,
)


# To JSON


def change_json(path: Path, rng: random.Random) -> str:
    """Another key, value or kind of value somewhere in a JSON file; for JSON Lines in one of its lines."""
    lines = path.read_text().splitlines()
    number = rng.randrange(len(lines)) if path.suffix == ".jsonl" and lines else None
    root = json.loads(path.read_text() if number is None else lines[number])
    kind = rng.choice(
        ("value", "value", "number", "key removed", "key renamed", "key added", "swapped", "deep", "root")
    )
    holder, key = _somewhere(root, rng)
    if kind == "root" or holder is None:
        root = rng.choice((VALUES[rng.randrange(len(VALUES))], [root], {"x": root}))
    elif kind == "key removed":
        del holder[key]
    elif kind == "key renamed" and isinstance(holder, dict):
        holder[rng.choice((key + "x", "", "../x", key.upper()))] = holder.pop(key)
    elif kind == "key added" and isinstance(holder, dict):
        holder[rng.choice(("x", "auto_map", "_name_or_path", "quantization_config", "__class__"))] = rng.choice(VALUES)
    elif kind == "swapped":
        other, place = _somewhere(root, rng)
        if other is holder:
            holder[key], other[place] = other[place], holder[key]
    elif kind == "deep":
        holder[key] = "DEEP"
    elif kind == "number":
        numbers = list(_numbers(root))
        if numbers:
            holder, key = rng.choice(numbers)
        holder[key] = rng.choice(NUMBERS)
    else:
        holder[key] = rng.choice(VALUES)
    deep = rng.choice((("[" * 30, "]" * 30), ("[" * 100_000, "]" * 100_000), ('{"a":' * 5000 + "1", "}" * 5000)))
    text = json.dumps(root).replace('"DEEP"', "".join(deep))
    if number is not None:
        lines[number] = text
        text = "\n".join(lines) + "\n"
    path.write_text(text)
    return kind


def _somewhere(root: Json, rng: random.Random) -> tuple[Any, Any]:
    """A container in the value and a key of it; (None, None) where there is none."""
    holder, key = None, None
    target = root
    while isinstance(target, dict | list) and target:
        holder, key = target, rng.choice(list(target)) if isinstance(target, dict) else rng.randrange(len(target))
        target = holder[key]
        if rng.random() < 0.3:
            break
    return holder, key


def _numbers(root: Json) -> Any:
    for key, value in root.items() if isinstance(root, dict) else enumerate(root) if isinstance(root, list) else ():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield root, key
        yield from _numbers(value)


# To safetensors


def change_tensors(path: Path, rng: random.Random) -> str:
    """A header that lies, tensors that are missing, renamed, of another type or no numbers."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    begin, end = header[name]["data_offsets"]
    kind = rng.choice(
        (
            *("length", "header", "offsets", "dtype", "shape", "missing", "renamed", "no number", "integers", "cut"),
            *("surplus", "metadata", "transposed"),
        )
    )
    size = None
    if kind == "length":
        size = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**62, 2**64 - 1))
    elif kind == "header":
        header = rng.choice(([], {}, None, {"__metadata__": 3}, {name: []}, {name: {"dtype": "F32"}}))
    elif kind == "offsets":
        header[name]["data_offsets"] = rng.choice(
            ([0, 4], [begin, end + 4], [end, begin], [-4, 0], [begin, 2**60], header[other]["data_offsets"], [], "x")
        )
        if header[name]["data_offsets"] == [begin, end]:
            header[name]["data_offsets"] = [begin + 1, end]
    elif kind == "dtype":
        header[name]["dtype"] = rng.choice(("I32", "F16", "F64", "BOOL", "X", None, "U32"))
    elif kind == "shape":
        header[name]["shape"] = rng.choice(([], [0], [2**40], [-1], [1, *header[name]["shape"]], ["a"], None))
    elif kind == "transposed":
        header[name]["shape"] = [*header[name]["shape"], 1]
    elif kind == "missing":
        header, data = _without(header, data, {name, *rng.sample(names, len(names) // rng.choice((2, 10, 100)))})
    elif kind == "renamed":
        header[name + rng.choice(("x", ".lora", "\0"))] = header.pop(name)
    elif kind == "no number":
        place = begin + 4 * rng.randrange((end - begin) // 4)
        data[place : place + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), float("-inf"))))
    elif kind == "integers":
        header[name]["dtype"] = "I32"
    elif kind == "cut":
        data = data[: rng.randrange(len(data))]
    elif kind == "surplus":
        header["one.more"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
        data += b"\0\0\x80\x3f"
    else:
        header["__metadata__"] = rng.choice((None, {}, {"format": 3}, {"format": "tf"}, [], {"format": "pt", "x": "y"}))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + bytes(data))
    return kind


def _without(header: dict[str, Any], data: bytearray, gone: set[str]) -> tuple[dict[str, Any], bytearray]:
    kept, rest = {}, bytearray()
    for name, told in header.items():
        if name == "__metadata__":
            kept[name] = told
        elif name not in gone:
            begin, end = told["data_offsets"]
            kept[name] = told | {"data_offsets": [len(rest), len(rest) + end - begin]}
            rest += data[begin:end]
    return kept, rest


# To YAML


def change_yaml(path: Path, rng: random.Random) -> str:
    """An odd value for a key of the text, a line more or less, or wrong indentation."""
    lines = path.read_text().splitlines()
    number = rng.randrange(len(lines))
    kind = rng.choice(("value", "value", "value", "value", "removed", "repeated", "indented", "renamed", "bomb"))
    key, colon, _ = lines[number].partition(":")
    if kind == "value" and colon:
        lines[number] = f"{key}: {rng.choice(ODD_YAML)}"
    elif kind == "removed":
        del lines[number]
    elif kind == "repeated":
        lines.insert(number, lines[number])
    elif kind == "indented":
        lines[number] = " " * rng.choice((1, 2, 40)) + lines[number]
    elif kind == "renamed" and colon:
        lines[number] = lines[number].replace(key.strip(), key.strip() + rng.choice(("s", "_", "é")), 1)
    else:
        bomb = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['x'] * 9)}]" for i in range(12)]
        lines = rng.choice((bomb, ["a: " + "[" * 5000], ["x: y"] * 100_000, ['"\\x00": 1']))
    path.write_text("\n".join(lines) + "\n")
    return kind


def damage(folder: Path, seed: str) -> Damage:
    """One damage to one file of a folder."""
    rng = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in ("toy.png", "README.md"))
    weights = [path for path in files if path.suffix == ".safetensors"]
    path = rng.choice(weights if weights and rng.random() < 0.35 else files)
    name = str(path.relative_to(folder))
    if not path.stat().st_size or rng.random() < 0.35:
        act = rng.choice([act for act in ANY if act is not flipped or path not in weights])
        if path.stat().st_size or act not in (truncated, flipped, inserted):
            act(path, rng)
        return Damage(act.__name__, name, legible=False)
    if path.suffix == ".safetensors":
        return Damage(change_tensors(path, rng), name)
    if path.suffix == ".jinja":
        path.write_text(rng.choice(TEMPLATES))
        return Damage("template", name, legible=True)
    if path.suffix in (".yaml", ".yml"):
        return Damage(change_yaml(path, rng), name, legible=True)
    if path.suffix in (".json", ".jsonl"):
        return Damage(change_json(path, rng), name, legible=True)
    flipped(path, rng)
    return Damage("flipped", name)


def is_legible(path: Path) -> bool:
    """Whether a file that was damaged as bytes reads as text of its kind all the same."""
    if not path.is_file():
        return False
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            json.loads(text)
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in text.splitlines() if line]
        elif path.suffix in (".yaml", ".yml"):
            yaml.safe_load(text)
        return path.suffix != ".safetensors"
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False


# What is done with damaged files


def model_subject(pristine: Path) -> Callable[[Path], Result]:
    """Logits of one record with an image, in training form."""
    import transformers

    from hydra_vlm.data.readers import open_reader
    from hydra_vlm.data.records import Record
    from hydra_vlm.models.loading import load_model

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    record = Record("r", str(pristine / "toy.png"), (("<image>\nwhat is it?", "a red disc"),))

    def act(folder: Path) -> Result:
        loaded = load_model(str(folder), "cpu")
        reader = open_reader(loaded.processor)
        return loaded.model(**reader.batch([reader.item(record)])).logits.detach()

    return act


def adapter_subject(pristine: Path) -> Callable[[Path], Result]:
    """Logits of a model (beside the adapter) with the adapter; afterwards the model must be as it was."""
    import torch
    import transformers

    from hydra_vlm.lora import adapted
    from hydra_vlm.models.loading import load_model

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = load_model(str(pristine.parent / "model"), "cpu").model
    inputs = {"input_ids": torch.tensor([[1, 3, 3, 3, 3, 5, 6, 7]]), "pixel_values": torch.ones(1, 3, 32, 32)}
    bare = model(**inputs).logits.detach()

    def act(folder: Path) -> Result:
        try:
            with adapted(model, folder) as opened:
                return opened(**inputs).logits.detach()
        finally:
            assert torch.equal(model(**inputs).logits, bare), "the model is not what it was"

    return act


def run_subject(pristine: Path) -> Callable[[Path], Result]:
    """What `report` and `rescore` say of a run folder, and whether the run may go on."""
    from hydra_vlm.benchmarks.rescoring import rescore
    from hydra_vlm.config import load_config
    from hydra_vlm.errors import RunFolderError
    from hydra_vlm.report.comparison import compare
    from hydra_vlm.report.page import write_report
    from hydra_vlm.report.run import load_run
    from hydra_vlm.run_folder import open_run

    config = load_config(pristine / "config.yaml")

    def act(folder: Path) -> Result:
        compared = compare(load_run(folder)).to_json()
        page = write_report(folder)
        assert page.stat().st_size > 10_000
        scores = {label: [score.to_json() for score in found] for label, found in rescore(folder).items()}
        try:
            open_run(folder, config, {})
        except RunFolderError as problem:
            if "another configuration" not in str(problem):
                raise
            return compared, scores, "another configuration"
        return compared, scores, "goes on"

    return act


def configuration_subject(pristine: Path) -> Callable[[Path], Result]:
    """The configuration, which can be written and read again as what it is."""
    from hydra_vlm.config import load_config

    def act(folder: Path) -> Result:
        config = load_config(folder / "config.yaml")
        again = folder / "again.yaml"
        again.write_text(config.to_yaml())
        assert load_config(again) == config
        return config.to_yaml()

    return act


SUBJECTS = {
    "model": model_subject,
    "adapter": adapter_subject,
    "run": run_subject,
    "configuration": configuration_subject,
}


def equal(first: Result, second: Result) -> bool:
    if hasattr(first, "shape"):
        import torch

        return first.shape == second.shape and torch.allclose(first, second, rtol=1e-5, atol=1e-6)
    return repr(first) == repr(second)


def outcome(act: Callable[[Path], Result], folder: Path, seed: str, expected: Result) -> dict[str, str]:
    """Damage a copy, use it, and say how that ended."""
    from hydra_vlm.errors import HydraError

    done = damage(folder, seed)
    damaged = folder / done.file
    legible = damaged.suffix != ".safetensors" and (done.legible or done.kind == "removed" or is_legible(damaged))
    told = {"damage": done.kind, "file": done.file}
    try:
        result = act(folder)
    except HydraError as problem:
        message = str(problem)
        clear = "\n" not in message and (str(folder) in message or damaged.name in message)
        return told | {"end": "refused" if clear else "unclear", "said": message}
    except BaseException as problem:
        frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(problem.__traceback__)]
        ours = [frame for frame in frames if not frame.startswith("mutations")][-12:]
        return told | {"end": "foreign", "said": f"{type(problem).__name__}: {problem}"[:300] + f" {' '.join(ours)}"}
    if equal(result, expected):
        return told | {"end": "harmless", "said": ""}
    return told | {"end": "another" if legible or admits(result) else "wrong", "said": ""}


def admits(result: Result) -> bool:
    """Whether a run's scores say themselves that answers are missing."""
    scores = result[1].values() if isinstance(result, tuple) else ()
    return any(score["unanswered"] for found in scores for score in found)


def main(kind: str, pristine: str, scratch: str, first: str, last: str) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no result
    source = Path(pristine)
    act = SUBJECTS[kind](source)

    def copy(name: str) -> Path:
        target = Path(scratch) / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        return target

    expected = act(copy("undamaged"))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 3 * GIBIBYTE  # past what is allowed, before the machine suffers
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for number in range(int(first), int(last)):
        need = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"begun": number}), file=out, flush=True)
        told = outcome(act, copy("case"), f"{kind}-{number}", expected)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - need) * 1024
        if grown > 2 * GIBIBYTE:
            told["end"] = "memory"
        print(json.dumps({"number": number} | told), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
