"""Answers are kept batch by batch, adapters leave no trace, and scores can be repeated without a model."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_vlm import evaluation
from hydra_vlm.benchmarks import generation
from hydra_vlm.benchmarks.generation import Answering, answer
from hydra_vlm.benchmarks.images import on_device
from hydra_vlm.benchmarks.protocol import Score
from hydra_vlm.benchmarks.rescoring import rescore
from hydra_vlm.benchmarks.suite import open_tasks
from hydra_vlm.compare import compare
from hydra_vlm.config import load_config
from hydra_vlm.data.readers import open_reader
from hydra_vlm.errors import ConfigError, DataError, RunFolderError
from hydra_vlm.evaluation import EvaluationRequest, evaluate
from hydra_vlm.lora import adapted
from hydra_vlm.models.loading import load_model
from hydra_vlm.records import TrialRecord
from tiny import toy_config, write_toy_data


def quiet(_: str) -> None:
    """Say nothing."""


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two schedules over the toy data, which lies beside it."""
    home = tmp_path_factory.mktemp("evaluated")
    config = toy_config(tiny_model, write_toy_data(home / "toy"), "schedules=[uniform,coarse]")
    compare(config, home / "run", quiet)
    return home / "run"


@pytest.fixture
def request_(tiny_model: Path, run: Path) -> EvaluationRequest:
    """Both adapters and the base, in batches of three, as the run's own evaluation."""
    adapters = [str(run / f"trials/{name}-seed0/adapter") for name in ("uniform", "coarse")]
    return EvaluationRequest(
        model=str(tiny_model),
        data=str(run.parent / "toy" / "test.json"),
        adapters=tuple(adapters),
        base=True,
        batch_size=3,
        max_new_tokens=4,
        device="cpu",
        template="v1-short",
    )


def trial(run: Path, key: str) -> TrialRecord:
    return TrialRecord.from_json(json.loads((run / "trials" / key / "record.json").read_text()))


def test_adapters_score_as_their_trials_did(request_: EvaluationRequest, run: Path, tmp_path: Path) -> None:
    settings = load_config(run / "config.yaml")
    same = replace(
        request_,
        template=settings.data.template,
        batch_size=settings.evaluation.batch_size,
        max_new_tokens=settings.evaluation.max_new_tokens,
    )
    scores = evaluate(same, tmp_path / "out", quiet)
    assert list(scores) == ["base", "uniform-seed0", "coarse-seed0"]
    for label, key in (("base", "zero-shot-seed0"), ("uniform-seed0",) * 2, ("coarse-seed0",) * 2):
        (ours,), (theirs,) = scores[label], trial(run, key).scores
        assert replace(ours, benchmark="toy") == theirs
        said = (tmp_path / "out/answers" / label / "predictions/test.jsonl").read_text()
        assert said == (run / "trials" / key / "predictions/toy.jsonl").read_text()


def test_adapters_leave_no_trace(tiny_model: Path, run: Path) -> None:
    """To the bit: the base's weights, its projector's too, stay in the memory they are in."""
    loaded = load_model(str(tiny_model), "cpu")
    reader = open_reader(loaded.processor, "v1-short")
    picture = str(run.parent / "toy/0.png")
    batch = on_device(loaded.model, reader.prompts([reader.prompt("what?", True)], [picture]))

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(**batch).logits

    before = logits(loaded.model)
    answers = []
    for _ in range(5):
        for name in ("uniform", "coarse"):
            with adapted(loaded.model, run / f"trials/{name}-seed0/adapter") as model:
                answers.append(logits(model))
                assert not torch.equal(answers[-1], before)
            assert torch.equal(logits(loaded.model), before)
    assert all(torch.equal(first, again) for first, again in zip(answers, answers[2:], strict=False))
    with pytest.raises(KeyError), adapted(loaded.model, run / "trials/coarse-seed0/adapter"):
        raise KeyError("a fault while the adapter is on")
    assert torch.equal(logits(loaded.model), before)


def test_a_stopped_evaluation_goes_on_after_the_last_batch(
    request_: EvaluationRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = evaluate(request_, whole, quiet)
    honest, calls = generation._generate, []

    def dying(*arguments: Any) -> list[str]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return honest(*arguments)

    monkeypatch.setattr(generation, "_generate", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate(request_, parts, quiet)
    kept = parts / "answers/base/predictions/test.jsonl"
    lines = kept.read_text().splitlines(keepends=True)
    assert len(lines) == 6  # two batches of three
    kept.write_text("".join(lines) + lines[0][:20])  # and a line that was cut off
    assert evaluate(request_, parts, quiet) == expected
    assert len(calls) == 3 + 7  # the third batch of the base again, and three of each adapter
    unlike = {"evaluation.json", "environment.json"}
    assert {k: v for k, v in files(parts).items() if k not in unlike} == {
        k: v for k, v in files(whole).items() if k not in unlike
    }


def test_a_finished_evaluation_loads_no_model(
    request_: EvaluationRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(request_, tmp_path / "out", quiet)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(evaluation, "load_model", refuse)
    assert evaluate(request_, tmp_path / "out", quiet) == first
    with pytest.raises(RunFolderError, match="limit: None there, 2 now"):
        evaluate(replace(request_, limit=2), tmp_path / "out", quiet)
    with pytest.raises(AssertionError, match="loaded"):
        evaluate(replace(request_, limit=2), tmp_path / "limited", quiet)


def test_scores_are_repeated_without_a_model_and_without_torch(
    request_: EvaluationRequest, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = evaluate(request_, out, quiet)
    before = files(out)
    program = (
        "import sys, json; from hydra_vlm.cli import app\n"
        f"app(['rescore', {str(out)!r}, '--json'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    again = {label: tuple(map(Score.from_json, found)) for label, found in json.loads(done.stdout).items()}
    assert again == first
    assert files(out) == before
    records = files(run / "trials")
    assert rescore(run)["coarse-seed0"] == trial(run, "coarse-seed0").scores
    assert files(run / "trials") == records


def test_scoring_again_keeps_the_order_that_reports_follow(tiny_model: Path, tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "toy")
    tests = f"data.tests={{zebra: {data / 'test.json'}, apple: {data / 'test.json'}}}"
    config = toy_config(tiny_model, data, tests, "schedules=[uniform]", "training.steps=1")
    compare(config, tmp_path / "run", quiet)
    before = files(tmp_path / "run/trials")
    assert [score.benchmark for score in rescore(tmp_path / "run")["uniform-seed0"]] == ["zebra", "apple"]
    assert files(tmp_path / "run/trials") == before


def test_weights_may_be_loaded_in_half_precision(tiny_model: Path) -> None:
    assert load_model(str(tiny_model), "cpu").model.dtype == torch.float32
    assert load_model(str(tiny_model), "cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_labels_are_told_apart() -> None:
    wish = EvaluationRequest("m", "d", ("a/x/adapter", "b/x/adapter", "c/mine"))
    assert list(wish.labels) == ["x", "x-2", "mine"]
    assert list(EvaluationRequest("m", "d").labels) == ["base"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": "nowhere"}, DataError, "nowhere does not exist"),
        ({"adapters": ("nowhere",)}, ConfigError, "no schedule.json"),
        ({"model": "nowhere"}, ConfigError, "holds no config.json"),
        ({"template": "v9"}, ConfigError, "v9"),
        ({"benchmarks": ("mme",)}, ConfigError, "come from a folder"),
    ],
)
def test_bad_requests_are_refused(
    request_: EvaluationRequest, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluate(replace(request_, **change), tmp_path / "out", quiet)


def test_a_folder_of_something_else_is_left_alone(request_: EvaluationRequest, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match="holds no evaluation"):
        evaluate(request_, tmp_path, quiet)
    with pytest.raises(RunFolderError, match="keeps no examples"):
        rescore(tmp_path)


@pytest.mark.slow
def test_batched_answers_are_those_of_single_questions_on_the_whole_suite(tmp_path: Path) -> None:
    loaded = load_model("embedded", "cpu")
    reader = open_reader(loaded.processor)
    for task in open_tasks("worlds", (), tmp_path):
        many = Answering(64, max_new_tokens=8)
        one = replace(many, batch_size=1, cache_gigabytes=0.0)
        batched, alone = (answer(loaded.model, reader, task.examples, how, task.benchmark.pads) for how in (many, one))
        assert batched == alone, task.name
