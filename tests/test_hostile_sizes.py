"""Files that are small or well-formed and ask for everything: lists of tensors, tokenizers, strips of an image."""

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hydra_vlm.benchmarks.generation import Answering, answer
from hydra_vlm.benchmarks.protocol import Example
from hydra_vlm.data.image_files import decode, examine
from hydra_vlm.data.readers import open_reader
from hydra_vlm.errors import CheckpointError, ConfigError, DataError
from hydra_vlm.models import tokenizer_trial
from hydra_vlm.models.folder import require_tokenizer_possible
from hydra_vlm.models.loading import load_model
from hydra_vlm.models.tokenizer_trial import require_working
from hydra_vlm.models.weights import read_file
from tiny import byte_tokenizer, save_tiny_model

EMPTY = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
HEADERS = {
    "a million empty tensors": "{" + ",".join(EMPTY % i for i in range(250_000)) + "}",
    "as many words about them": '{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(600_000)) + "}}",
    "longer than any": "{" + " " * 2**24 + "}",
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_list_of_tensors_is_bounded(case: str, tmp_path: Path) -> None:
    text = HEADERS[case].encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=rf"{path} begins with a list of .* more than are read"):
        read_file(path)
    assert time.monotonic() - started < 5


def test_a_number_that_stands_for_a_terabyte_is_no_tensor(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="must hold dense tensors"):
        read_file(tmp_path / "pytorch_model.bin")


def test_two_shards_with_one_tensor_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", layers=1)
    weights = load_file(folder / "model.safetensors")
    first, last = min(weights), max(weights)
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    save_file({first: weights[first], last: weights[last] + 1}, folder / shards[0], metadata={"format": "pt"})
    save_file({name: t for name, t in weights.items() if name != first}, folder / shards[1], metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    where = {name: shards[name != first] for name in weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(CheckpointError, match=f"{shards[1]} holds {last}, which another file"):
        load_model(str(folder), "cpu")


def changed(change: Callable[[dict[str, Any]], object]) -> PreTrainedTokenizerFast:
    """The byte tokenizer after a change to its file."""
    settings = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    change(settings)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(settings)), eos_token="</s>")


def by_chance() -> PreTrainedTokenizerFast:
    """Merges that are left out at random."""
    words = {mark: i for i, mark in enumerate(["a", "aa", "aaaa", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=words, merges=[("a", "a"), ("aa", "aa")], dropout=0.5))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=core)


TEN = {"type": "Replace", "pattern": {"Regex": "(.)"}, "content": "xxxxxxxxxx"}
TOKENIZERS: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    "answers that grow": (
        lambda: changed(lambda s: s.update(decoder={"type": "Sequence", "decoders": [TEN] * 3})),
        "wri",
    ),
    "answers without end": (
        lambda: changed(lambda s: s.update(decoder={"type": "Sequence", "decoders": [TEN] * 14})),
        "does not end|takes too much|fails",
    ),
    "a long beginning": (
        lambda: changed(lambda s: s.update(normalizer={"type": "Prepend", "prepend": "x" * 10**5})),
        "make",
    ),
    "chance": (by_chance, "reads the same text differently"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_is_none_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_trial, "SECONDS", 1)
    made, says = TOKENIZERS[case]
    with pytest.raises(ConfigError, match=f"the tokenizer in {tmp_path} ({says})") as told:
        require_working(made(), tmp_path)
    assert "\n" not in str(told.value)


def test_a_tokenizer_that_works_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    require_working(byte_tokenizer(), tmp_path)
    monkeypatch.setattr(tokenizer_trial, "tried_in_a_copy", lambda *_: pytest.fail("tried again"))
    require_working(byte_tokenizer(), tmp_path)


def test_lists_of_a_tokenizer_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{}] * 40_000}))
    with pytest.raises(ConfigError, match="lists 40,000 added_tokens"):
        require_tokenizer_possible(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"post_processor": {"single": [{}] * 2000}}))
    with pytest.raises(ConfigError, match="lists 2,000 single in its post_processor"):
        require_tokenizer_possible(tmp_path)


@pytest.mark.parametrize("size", [(1, 201), (4020, 20 - 1)])
def test_a_strip_is_no_image(size: tuple[int, int], tmp_path: Path) -> None:
    path = str(tmp_path / "strip.png")
    Image.new("RGB", size).save(path)
    assert "more than 200 times the other" in examine(path, 10**8)[1]
    with pytest.raises(DataError, match="more than 200 times the other"):
        decode(path)


def asked(folder: Path) -> str:
    loaded = load_model(str(folder), "cpu")
    (said,) = answer(loaded.model, open_reader(loaded.processor), [Example("q", None, "what?", ())], Answering(1, 4))
    return said.text


def test_an_answer_is_greedy_whatever_a_folder_says_of_generation(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", layers=1)
    before = asked(folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    others = {"max_time": 1e-9, "num_beams": 3, "repetition_penalty": 9.0, "suppress_tokens": list(range(4, 200))}
    (folder / "generation_config.json").write_text(json.dumps(settings | others))
    assert asked(folder) == before


def test_logits_that_are_nan_are_no_answer(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", layers=1)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = float("nan")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="logits are NaN"):
        asked(folder)
