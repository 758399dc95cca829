"""Numbers of a configuration: one table of what is refused and what is taken, and who is named in the message."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from hydra_vlm.config import Config, load_config, nearest_key, split_overrides
from hydra_vlm.errors import ConfigError
from hydra_vlm.ranges import LARGEST_SEED, most_workers
from hydra_vlm.strict import parse_yaml
from hydra_vlm.synonyms import OTHERWISE, SYNONYMS

SEEDS = ("profile.seed", "allocation.seed", "search.seed", "search.trial_seed")
COUNTS = (
    *("training.steps", "training.batch_size", "training.device_batch_size", "training.save_steps", "budget.rank"),
    *(
        "training.watch_steps",
        "evaluation.limit",
        "evaluation.batch_size",
        "evaluation.max_new_tokens",
        "search.trials",
    ),
    *("data.max_length", "data.validation_limit", "data.max_image_pixels", "profile.steps", "profile.skip"),
    *("profile.rank", "allocation.n_stages", "allocation.delta", "allocation.step", "allocation.setting"),
    "budget.parameters",
)
REALS = (
    *("training.epochs", "training.learning_rate", "training.full_learning_rate", "training.projector_learning_rate"),
    *("training.warmup_ratio", "training.weight_decay", "training.max_grad_norm", "training.dropout"),
    *("training.cache_gigabytes", "training.disk_cache_gigabytes", "scaling.value", "search.grace_seconds"),
)
REFUSED = (
    *((key, value) for key in SEEDS for value in ("-1", str(2**32), "true", "1.5", ".inf", "1e30", "null", "010x", "")),
    *(
        (key, value)
        for key in COUNTS
        for value in ("0", "-3", "true", "no", "2.5", ".nan", ".inf", "1e30", "0x", "[1]")
    ),
    *((key, value) for key in REALS for value in (".nan", ".inf", "-.inf", "1e400", "true", "off", "-1", "fast", "{}")),
    *(("training.batch_size", value) for value in ("1000000000000", "2000-01-01")),
    *(("training.learning_rate", value) for value in ("0", "1e3", "1e-400")),
    *(("training.warmup_ratio", "1"), ("training.dropout", "1.0"), ("allocation.setting", "6")),
    *(("training.workers", str(most_workers() + 1)), ("training.workers", "-1"), ("training.skip_spikes", "-1")),
    *(("seeds", value) for value in ("[]", "[1,1]", "[0,-1]", "[true]", "[4294967296]", "[1.5]", "a,b", "null")),
    *(("search.final_seeds", value) for value in ("[1,1]", "[-1]", ".nan")),
    *(("schedules", "[uniform,uniform]"), ("adapt", "[decoder,decoder]"), ("adapt", "[]"), ("trackers", "x")),
    *(("search.n_stages", value) for value in ("[3,2]", "[0,2]", "[1]", "[1,2,3]", "[.nan,2]")),
    *(("search.deltas", value) for value in ("[2,1]", "[0,1]")),
    *(("data.max_image_pixels", "178956971"), ("data.train", "1"), ("model", "null"), ("model", '"a\\0b"')),
)
TAKEN: tuple[tuple[str, str, Any], ...] = (
    ("training.learning_rate", "1e-4", 1e-4),
    ("training.learning_rate", "1.0E-4", 1e-4),
    ("training.learning_rate", "'0.001'", 1e-3),
    ("training.steps", "1e3", 1000),
    ("training.steps", "20.0", 20),
    ("training.steps", "null", None),
    ("seeds", "5", (5,)),
    ("seeds", "1,2,3", (1, 2, 3)),
    ("seeds", f"[0,{LARGEST_SEED}]", (0, LARGEST_SEED)),
    ("search.n_stages", "[2,4]", (2, 4)),
    ("schedules", "uniform,fine", ("uniform", "fine")),
    ("adapt", "decoder,tower", ("decoder", "tower")),
    ("training.packed_rows", "off", False),
    ("training.workers", str(most_workers()), most_workers()),
    ("training.max_grad_norm", "0", 0.0),
)


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_out_of_range_is_refused_naming_key_and_place(key: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, split_overrides([f"--{key}={value}"]))
    said = str(caught.value)
    assert key.rsplit(".", 1)[-1] in said
    assert f"option '--{key}={value}'" in said or "lacks its value" in said or '"' in value
    assert "\n" not in said
    assert "Value error" not in said


@pytest.mark.parametrize(("key", "value", "expected"), TAKEN)
def test_what_practitioners_write_is_taken(key: str, value: str, expected: Any) -> None:
    found: Any = load_config(None, [f"{key}={value}"])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == expected
    assert type(found) is type(expected)


def test_every_number_of_the_configuration_is_in_the_table() -> None:
    """A key that is added with a bare int or float would take NaN, true and 10^30."""

    def numbers(section: type[BaseModel], prefix: str = "") -> list[str]:
        found = []
        for name, field in section.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += numbers(kind, f"{prefix}{name}.")
            elif "int" in str(kind) or "float" in str(kind):
                found.append(prefix + name)
        return found

    for key in numbers(Config):
        for value in ("true", ".nan", "1e300"):
            with pytest.raises(ConfigError):
                load_config(None, [f"{key}={value}"])


@given(st.one_of(st.floats(), st.booleans(), st.text(max_size=8), st.integers(), st.none()))
def test_whatever_stands_for_a_number_is_a_number_in_range_or_refused(value: Any) -> None:
    for key in ("training.epochs", "training.batch_size", "allocation.seed"):
        try:
            found: Any = load_config(None, [f"{key}={json.dumps(value)}"])
        except ConfigError:
            continue
        for part in key.split("."):
            found = getattr(found, part)
        assert 0 <= found <= 2**32
        assert not isinstance(value, bool)


def test_numbers_that_do_not_go_together() -> None:
    for words in (["profile.skip=40"], ["profile.steps=5"], ["profile.steps=3", "profile.skip=7"]):
        with pytest.raises(ConfigError, match=r"override 'profile\..*: profile.skip \d+ leaves none of profile.steps"):
            load_config(None, words)
    with pytest.raises(ConfigError, match=r"profile.steps 2 is too few: .* measure 3 steps or more"):
        load_config(None, ["profile.steps=2", "profile.skip=1"])
    load_config(None, ["profile.steps=2", "profile.skip=1", "training.warmup_ratio=0"])
    with pytest.raises(ConfigError, match=r"the budget is empty: give budget.rank or budget.parameters"):
        load_config(None, ["budget.rank=null"])


def test_the_place_is_the_file_or_the_override(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("budget: {rank: 0}\n")
    with pytest.raises(ConfigError, match=r"key 'budget.rank' in .*my.yaml: .*found 0"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"key 'budget.rank' in option '--budget.rank -1': .*found -1") as caught:
        load_config(path, split_overrides(["--budget.rank", "-1"]))
    assert "my.yaml" not in str(caught.value)
    path.write_text("budget: {rank: 2}\nlr: 3\n")
    with pytest.raises(ConfigError, match=r"unknown key 'lr' in .*my.yaml: did you mean 'training.learning_rate'"):
        load_config(path, ["budget.rank=4"])
    with pytest.raises(ConfigError, match=r"'training' in override 'training=3' is a section, .*training.KEY=VALUE"):
        load_config(None, ["training=3"])


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        *(("lr", "training.learning_rate"), ("learning-rate", "training.learning_rate"), ("r", "budget.rank")),
        *(("batch", "training.batch_size"), ("epochs", "training.epochs"), ("lora_r", "budget.rank")),
        *(("alpha", "scaling.value"), ("per_device_train_batch_size", "training.device_batch_size")),
        *(("num_train_epochs", "training.epochs"), ("gradient_accumulation_steps", "training.device_batch_size")),
        *(("bf16", "training.precision"), ("model_name_or_path", "model"), ("max_seq_length", "data.max_length")),
        *(("training.lr", "training.learning_rate"), ("steps", "training.steps"), ("seed", "seeds")),
        *(("rank", "budget.rank"), ("bugdet.rank", "budget"), ("lora_rnak", "budget.rank")),
        ("training.early_stopping_patience", "training.patience"),
        *(("Learning_Rate", "training.learning_rate"), ("training.wramup_ratio", "training.warmup_ratio")),
    ],
)
def test_the_nearest_key_is_nearest_by_meaning(key: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
        load_config(None, split_overrides([f"{key}=1"]))


def test_one_wrong_item_of_a_list_is_one_error() -> None:
    with pytest.raises(ConfigError, match=r"seeds\.0") as problem:
        load_config(None, split_overrides(["seeds=[-1]"]))
    assert "at least 1 item" not in str(problem.value)


def test_what_is_no_key_is_said_in_another_way() -> None:
    assert "--out" in nearest_key("output_dir")
    assert "cosine" in nearest_key("training.lr_scheduler_type")


def test_every_synonym_leads_to_a_key() -> None:
    for word, key in SYNONYMS.items():
        section: type[BaseModel] = Config
        for part in key.split("."):
            assert part in section.model_fields, (word, key)
            kind = section.model_fields[part].annotation
            section = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else section
        assert word not in Config.model_fields
    assert not SYNONYMS.keys() & OTHERWISE.keys()


def test_plain_words_of_yaml_mean_what_they_say(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(
        "training: {learning_rate: 1e-4, packed_rows: no}\nsearch: {pruner: none}\ndata: {train: 2026-01-01}\n"
    )
    config = load_config(path)
    assert (config.training.learning_rate, config.training.packed_rows) == (1e-4, False)
    assert (config.search.pruner, config.data.train) == ("none", "2026-01-01")
    for value in ("010", "1:30", "0x10", "2026-01-01", "yes"):
        path.write_text(f"training: {{steps: {value}}}\n")
        with pytest.raises(ConfigError, match=r"'training.steps' in .*my.yaml: should be a valid integer"):
            load_config(path)
    path.write_text("training: {steps: 3}\ntraining: {steps: 4}\n")
    with pytest.raises(ConfigError, match="'training' twice"):
        load_config(path)


@given(st.text(max_size=12).filter(lambda text: "\0" not in text))
def test_a_text_of_the_configuration_reads_back_as_it_was(text: str) -> None:
    config = Config(model=text)
    assert parse_yaml(config.to_yaml(), "the text")["model"] == text
    assert yaml.safe_load(config.to_yaml())["model"] == text
