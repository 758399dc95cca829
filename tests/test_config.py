"""Configuration: overrides in both spellings, and errors that name key, place and remedy."""

from pathlib import Path

import pytest

from hydra_vlm.config import Config, load_config, split_overrides
from hydra_vlm.errors import ConfigError


def test_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("budget: {rank: 16}\ntraining: {learning_rate: 1e-4}\n")
    words = ["budget.rank=8", "--training.batch-size", "64", "--seeds=[1,2,3]"]
    config = load_config(path, split_overrides(words))
    assert (config.budget.rank, config.training.learning_rate) == (8, 1e-4)
    assert (config.training.batch_size, config.seeds) == (64, (1, 2, 3))


def test_resolved_configuration_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    config = load_config(None, ["budget.parameters=5000", "data.images=/pictures"])
    path.write_text(config.to_yaml())
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.learning_rat=1", "unknown key 'training.learning_rat' .* did you mean 'training.learning_rate'"),
        ("budgt.rank=3", "unknown key 'budgt' .* did you mean 'budget'"),
        ("learning_rate=1", "unknown key 'learning_rate' .* did you mean 'training.learning_rate'"),
        ("budget.rank=0", "'budget.rank' .*greater than or equal to 1.*found 0"),
        ("training.steps=many", "'training.steps' .*valid integer.*found 'many'"),
        ("model.size=3", "'model'"),
    ],
)
def test_wrong_keys_and_values_are_explained(override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(None, [override])


def test_stray_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="neither a configuration file nor key"):
        split_overrides(["budget.rank=4", "fast"])
    with pytest.raises(ConfigError, match="lacks its value"):
        split_overrides(["--budget.rank"])


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")


def test_defaults_are_complete() -> None:
    assert load_config(None) == Config()
