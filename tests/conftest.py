"""What tests share: one thread, no network, a tiny MobileVLM and a small instruction set on disk."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models lose time to a second thread

from collections.abc import Iterator
from pathlib import Path

import pytest


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
