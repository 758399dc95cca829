"""Model folders that ask for what no machine holds, or whose files are none: refused by arithmetic, within seconds."""

import json
import os
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hydra_vlm.errors import CheckpointError, ConfigError
from hydra_vlm.models.folder import require_readable, require_tokenizer_possible
from hydra_vlm.models.loading import load_model, resolve_model
from hydra_vlm.models.sizes import require_images_possible, require_possible
from tiny import save_tiny_model

HOSTILE: dict[str, tuple[str, Any, str]] = {
    "layers": ("text_config.num_hidden_layers", 10**7, "from 1 to 512"),
    "layers, few tensors": ("text_config.num_hidden_layers", 500, "asks for 502 layers, its weights are"),
    "width": ("text_config.hidden_size", 10**9, "from -1 to 4,194,304"),
    "width, few bytes": ("text_config.hidden_size", 2**20, "asks for .* weights, its files hold"),
    "vocabulary": ("text_config.vocab_size", 10**12, "from 1 to 4,194,304"),
    "vocabulary, few bytes": ("text_config.vocab_size", 2**22, "asks for .* weights, its files hold"),
    "feed-forward": ("text_config.intermediate_size", 2**22, "asks for .* weights, its files hold"),
    "no layers": ("text_config.num_hidden_layers", 0, "from 1 to 512"),
    "negative width": ("text_config.hidden_size", -32, "-32"),
    "half a layer": ("text_config.num_hidden_layers", 4.5, "a size is a whole number"),
    "a text": ("text_config.vocab_size", "many", "a size is a whole number"),
    "true": ("text_config.hidden_size", True, "a size is a whole number"),
    "heads": ("text_config.num_attention_heads", 10**6, "from 1 to 4,096"),
    "odd groups": ("text_config.num_key_value_heads", 3, "a multiple of the second"),
    "image": ("vision_config.image_size", 10**6, "from 1 to 16,384"),
    "patches": ("vision_config.image_size", 16_384, r"makes 4,194,304 patches"),
    "no patch": ("vision_config.patch_size", 0, "patch_size = 0"),
    "patch above image": ("vision_config.patch_size", 64, "makes 0 patches"),
    "tower": ("vision_config.num_hidden_layers", 10**9, "from 1 to 512"),
    "labels": ("num_labels", 10**9, "num_labels = 1000000000"),
    "image tokens": ("image_seq_length", 10**12, "image_seq_length"),
}


def edited(folder: Path, name: str, value: Any, file: str = "config.json") -> Path:
    """The folder with one number of a file changed."""
    *sections, leaf = name.split(".")
    config = json.loads((folder / file).read_text())
    part = config
    for section in sections:
        part = part[section]
    part[leaf] = value
    (folder / file).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", HOSTILE)
def test_sizes_that_no_machine_holds(tmp_path: Path, case: str) -> None:
    name, value, message = HOSTILE[case]
    folder = edited(save_tiny_model(tmp_path / "model", layers=1), name, value)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ConfigError, CheckpointError), match=message) as caught:
        load_model(str(folder), "cpu")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # in KiB: half a GiB


def test_every_family_of_transformers_has_possible_sizes() -> None:
    """The bounds are for damage: the defaults of the usual kinds of models pass, mixtures of experts among them."""
    from transformers import CONFIG_MAPPING

    kinds = "llava qwen2_5_vl qwen3_vl_moe internvl smolvlm idefics3 paligemma gemma3 mllama deepseek_v3 glm4_moe gpt2"
    for kind in kinds.split():
        require_possible(json.loads(json.dumps(CONFIG_MAPPING[kind]().to_dict(), default=str)), kind)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"height": 10**6, "width": 10**6}}, r"size = .*images of 1,000,000,000,000 pixels"),
        ({"image_processor": {"crop_size": 10**5}}, r"image_processor\.crop_size"),
        ({"size": {"shortest_edge": 0}}, "images of 0 pixels"),
        ({"size": {"longest_edge": 20_000}}, "images of 400,000,000 pixels"),
        ({"max_pixels": 10**12, "merge_size": 2}, "images of 1,000,000,000,000 pixels"),
        ({"max_image_tiles": 10**9}, "max_image_tiles = 1000000000"),
        ({"image_grid_pinpoints": [[336, 672], [10**6, 10**6]]}, "image_grid_pinpoints"),
        ({"image_seq_length": 10**9}, "image_seq_length = 1000000000"),
    ],
)
def test_images_that_no_machine_holds(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_images_possible(settings, "it")


def test_images_as_processors_make_them() -> None:
    for settings in (
        {"size": {"height": 384, "width": 384}, "crop_size": 336},
        {"size": {"shortest_edge": 3136, "longest_edge": 12_845_056}, "merge_size": 2, "max_pixels": 16_777_216},
        {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
    ):
        require_images_possible(settings, "it")


FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
    "additional_chat_templates/other.jinja",
)


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_in_the_place_of_a_models_file(tmp_path: Path, name: str) -> None:
    """In another process, for one that opened it would wait for ever."""
    folder = save_tiny_model(tmp_path / "model", layers=1)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ConfigError, match=rf"{name}.*is a pipe|is a pipe.*{name}"):
        resolve_model(str(folder))


@pytest.mark.parametrize("name", FILES[:-2])
@pytest.mark.parametrize(
    ("text", "message"),
    [("[" * 100_000, "nested deeper"), ('{"a":' * 90 + "1" + "}" * 90, "nested deeper"), ("[1]", "must hold a JSON")],
)
def test_deep_json_in_a_models_file(tmp_path: Path, name: str, text: str, message: str) -> None:
    folder = save_tiny_model(tmp_path / "model", layers=1)
    (folder / name).write_text(text)
    check = require_tokenizer_possible if name == "tokenizer.json" else require_readable
    with pytest.raises(ConfigError, match=rf"{name} .*{message}"):
        check(folder)


def growing(tokenizer: dict[str, Any]) -> None:
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [rule] * 40}


def padded(tokenizer: dict[str, Any]) -> None:
    tokenizer["padding"] = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}


@pytest.mark.parametrize(
    ("change", "message"), [(growing, "1.1e.12 times longer"), (padded, "1,000,000,000,000 tokens")]
)
def test_tokenizers_that_make_texts_endless(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = save_tiny_model(tmp_path / "model", layers=1)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=message):
        load_model(str(folder), "cpu")


def test_a_tokenizer_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", layers=1)
    with (folder / "tokenizer.json").open("ab") as file:
        file.truncate(2**30)
    with pytest.raises(ConfigError, match=r"tokenizer\.json has 1,073,741,824 bytes, more than"):
        load_model(str(folder), "cpu")


def test_commands_end_at_once(tmp_path: Path) -> None:
    """`plan` and `chat`, as they are run, with a configuration that asks for everything at once; 4 GiB at most."""
    folder = edited(save_tiny_model(tmp_path / "model", layers=1), "text_config.hidden_size", 10**9)
    code = textwrap.dedent(
        """
        import resource, sys
        resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
        from hydra_vlm.cli import main
        sys.argv = ["hydra-vlm", *sys.argv[1:]]
        main()
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", f"model={folder}"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 2
    assert "text_config.hidden_size = 1000000000" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
