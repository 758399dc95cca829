"""What tests share: one thread, no network, a tiny MobileVLM and a small instruction set on disk.

Three variables let the tests run as on another machine: OMP_NUM_THREADS; ATEN_CPU_CAPABILITY (default, avx2, avx512),
which torch reads when it starts; HYDRA_TEST_WEIGHTS, where loaded weights lie (see `WEIGHTS`). `tools/test_matrix.sh`
tries combinations of them. The tests to which they could matter have the mark `compares`, by what their code says.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models lose time to a second thread
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits leaves its core to the other worker

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WEIGHTS = {"mapped": None, "copied": 0, "shifted": 8}
"""By HYDRA_TEST_WEIGHTS: mapped from their file as transformers does it, or so many bytes behind a multiple of 64."""


COMPARISON = re.compile(r"torch\.equal|assert_close|assert_same_sums|allclose|read_bytes\(\)|_losses|validation_loss")
"""What compares computed numbers, or files of them."""


SLOW = 7200
"""Seconds after which a slow test counts as hung; others have pyproject.toml's `timeout`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that compare computed numbers, themselves or by a function of their file; give slow ones time."""
    comparing: dict[Path, set[str]] = {}
    for item in items:
        if item.path not in comparing:
            comparing[item.path] = _comparing(item.path.read_text(encoding="utf-8"))
        if getattr(item, "originalname", item.name) in comparing[item.path]:
            item.add_marker("compares")
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(SLOW))


def _comparing(text: str) -> set[str]:
    """The names of a file's functions that compare computed numbers, or call one that does."""
    starts = re.split(r"^(?:async )?def (\w+)", text, flags=re.MULTILINE)
    bodies = dict(zip(starts[1::2], starts[2::2], strict=True))
    direct = {name for name, body in bodies.items() if COMPARISON.search(body)}
    calls = re.compile(rf"\b(?:{'|'.join(direct)})\(") if direct else None
    return direct | {name for name, body in bodies.items() if calls and calls.search(body)}


def pytest_report_header() -> str:
    own = {name: os.environ.get(name, "unset") for name in ("OMP_NUM_THREADS", "ATEN_CPU_CAPABILITY")}
    return f"computing: {own['OMP_NUM_THREADS']} threads, capability {own['ATEN_CPU_CAPABILITY']}, weights {_weights()}"


def _weights() -> str:
    chosen = os.environ.get("HYDRA_TEST_WEIGHTS", "mapped")
    if chosen not in WEIGHTS:
        raise pytest.UsageError(f"HYDRA_TEST_WEIGHTS={chosen!r}: use one of {', '.join(WEIGHTS)}")
    return chosen


@pytest.fixture(scope="session", autouse=True)
def _place_of_weights() -> Iterator[None]:
    """Have loaded models keep their weights where HYDRA_TEST_WEIGHTS says."""
    behind = WEIGHTS[_weights()]
    if behind is None:
        yield
        return
    from transformers import PreTrainedModel

    from weights_in_memory import move

    load = PreTrainedModel.from_pretrained.__func__

    def loading(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        loaded = load(cls, *args, **kwargs)
        move(loaded[0] if isinstance(loaded, tuple) else loaded, behind)
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "from_pretrained", classmethod(loading))
        yield


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers() -> None:
    """Progress bars off: they fill the output of failing tests."""
    import transformers

    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered about data files stays with the tests, subprocesses included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYDRA_VLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random MobileVLM of 4 layers, hidden 32, saved with its processor."""
    from tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def toy_data(tmp_path: Path) -> Path:
    """A folder with train.json, validation.json, test.json over eight pictures."""
    from tiny import write_toy_data

    return write_toy_data(tmp_path / "toy")
