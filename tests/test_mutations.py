"""The mutation table: kind of folder → cases tried → outcome. `mutations.py` says what is damaged and what counts.

`HYDRA_VLM_MUTATIONS=10 pytest -m slow tests/test_mutations.py` tries ten times as many, from other seeds.
"""

import json
import os
import selectors
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_run import fake_run
from mutations import SUBJECTS
from tiny import save_tiny_model, toy_config

CASES = {"model": 300, "adapter": 100, "run": 100, "configuration": 100}
SECONDS = 20
GOOD = ("refused", "harmless", "another")
MORE = int(os.environ.get("HYDRA_VLM_MUTATIONS", "3"))
TABLE: dict[str, Counter[str]] = {}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undamaged folder of each kind."""
    from PIL import Image

    from hydra_vlm.allocation import AllocationRequest, Budget, allocate
    from hydra_vlm.lora import attach, save_adapter
    from hydra_vlm.models.loading import load_model

    root = tmp_path_factory.mktemp("pristine")
    model = save_tiny_model(root / "model", layers=2)
    Image.effect_noise((40, 32), 60).convert("RGB").save(model / "toy.png")
    loaded = load_model(str(model), "cpu")
    loaded.model.save_pretrained(model, max_shard_size="40KB")
    (model / "model.safetensors").unlink()
    graph = loaded.parts.graph
    schedule = allocate("uniform", AllocationRequest(graph, Budget.of_rank(graph, 2)))
    adapted = attach(loaded.model, schedule, loaded.parts, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    save_adapter(adapted, root / "adapter", schedule, loaded.parts, projector_state=True)
    run = fake_run(root / "run", names=("zero-shot", "uniform", "fine"), seeds=(0, 1), questions=20)
    made = toy_config(model, Path("data"), "schedules=[uniform,fine]", "seeds=[0,1]")
    (run / "config.yaml").write_text(made.to_yaml())
    answered(run)
    (root / "configuration").mkdir()
    (root / "configuration/config.yaml").write_text(made.to_yaml())
    return root


def answered(run: Path) -> None:
    """Examples and predictions of a benchmark beside the verdicts, so that `rescore` has something to read."""
    from hydra_vlm.benchmarks.protocol import Example, Prediction
    from hydra_vlm.files import write_lines

    write_lines(run / "examples/easy-vqa.jsonl", (Example(f"q{i}", None, "?", ("a",)).to_json() for i in range(20)))
    for trial in (run / "trials").iterdir():
        lines = (Prediction(f"q{i}", "?", "a").to_json() for i in range(20))
        write_lines(trial / "predictions/easy-vqa.jsonl", lines)
        write_lines(trial / "metrics.jsonl", ({"step": i, "loss": 1.0} for i in range(5)))


def tried(kind: str, pristine: Path, scratch: Path, first: int, last: int) -> Iterator[dict[str, Any]]:
    """How each case ended; a process that hangs or dies is replaced, and its case counted."""
    while first < last:
        scratch.mkdir(exist_ok=True)
        words = [kind, str(pristine / kind), str(scratch), str(first), str(last)]
        with (
            open(scratch.with_suffix(".log"), "ab") as log,
            subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / "mutations.py"), *words],
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            ) as process,
            selectors.DefaultSelector() as ready,
        ):
            assert process.stdout is not None
            ready.register(process.stdout, selectors.EVENT_READ)
            begun = False
            while True:
                if not ready.select(SECONDS if begun else 300):
                    process.kill()
                    assert begun, f"{kind}: nothing could be tried, see {log.name}"
                    yield {"number": first, "end": "hang", "said": "", "damage": "", "file": ""}
                    first += 1
                    break
                line = process.stdout.readline()
                if not line:
                    code = end_of(process)
                    if first < last:
                        assert begun, f"{kind}: nothing could be tried, see {log.name}"
                        yield {"number": first, "end": "died", "said": f"exit code {code}", "damage": "", "file": ""}
                        first += 1
                    break
                told = json.loads(line)
                begun = True
                if "end" in told:
                    yield told
                    first += 1


def end_of(process: "subprocess.Popen[bytes]") -> int:
    """The exit code of a process that has closed its output; one that does not end is killed."""
    try:
        return process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def table() -> str:
    ends = sorted({end for counts in TABLE.values() for end in counts})
    lines = ["".join(["kind".ljust(14), "cases".rjust(8), *(end.rjust(10) for end in ends)])]
    for kind, counts in TABLE.items():
        numbers = (f"{counts[end]:>10,}" for end in ends)
        lines.append("".join([kind.ljust(14), f"{counts.total():>8,}", *numbers]))
    return "\n".join(lines)


def check(kind: str, pristine: Path, scratch: Path, first: int, last: int) -> None:
    ends = list(tried(kind, pristine, scratch / kind, first, last))
    TABLE[kind] = Counter(told["end"] for told in ends)
    print(f"\n{table()}")
    bad = [told for told in ends if told["end"] not in GOOD]
    assert not bad, "\n".join(json.dumps(told) for told in bad)
    assert len(ends) == last - first
    assert all(TABLE[kind][end] for end in ("refused", "harmless"))  # the damages reach both


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", SUBJECTS)
def test_damaged_files_end_in_the_right_result_or_in_one_clear_line(kind: str, pristine: Path, tmp_path: Path) -> None:
    check(kind, pristine, tmp_path, 0, CASES[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SUBJECTS)
def test_more_of_them(kind: str, pristine: Path, tmp_path: Path) -> None:
    check(kind, pristine, tmp_path, CASES[kind], (MORE + 1) * CASES[kind])
