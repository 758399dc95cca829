"""LLaMA's tokenizer.model as a fast tokenizer: ids and label masks as the reference's slow tokenizer gives them.

`recorded/tokenizer.model` was trained with sentencepiece 0.2.3 as LLaMA's was (BPE, byte fallback, text not normalised,
spaces kept, digits split), with 420 pieces. The expected pieces were made with sentencepiece itself, piece by piece as
the legacy slow tokenizer works, and with the reference's arithmetic on token counts for the masks; below they are
written out as strings, `_` for SentencePiece's space, and a supervised piece is one after the bar.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor, PreTrainedTokenizerFast

from authors import save_authors
from hydra_vlm.data.templates import IGNORED, encode, prompt, segments, template
from hydra_vlm.errors import CheckpointError
from hydra_vlm.models.mobilevlm.conversion import to_hydra, to_original
from hydra_vlm.models.mobilevlm.llama_tokenizer import llama_tokenizer, read_sentencepiece

MODEL = Path(__file__).parent / "recorded" / "tokenizer.model"

SYSTEM = (
    "_A _c hat _b etwe en _a _cur ious _user _and _an _art ifi cial _ int ell ig ence _assistant . _The _assistant "
    "_ giv es _he lp ful , _d et ail ed , _and _p ol ite _a nswer s _to _the _user ' s _questio ns ."
)
V1 = (
    f"<s> {SYSTEM} _USER : _ <image> _ <0x0A> W hat _col our _ _is _ it ? _ASSISTANT : | _red </s> "
    "| _USER : _And _ its _s hape ? _ASSISTANT : | _It _is _r ound _ <0xE2> <0x98> <0xBA> . </s>"
)
PLAIN = "<s> <image> | _A _red _ball _on _a _t <0xC3> <0xA4> b le . <0x0A>"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = llama_tokenizer(MODEL)
    made.add_tokens(["<image>"], special_tokens=True)
    return made


def expected(text: str) -> tuple[list[str], list[str | None]]:
    """Pieces, and what of them is supervised: bars open and close supervision."""
    pieces, marks, supervised = [], [], False
    for word in text.replace("_", "▁").split():
        if word == "|":
            supervised = not supervised
        else:
            pieces.append(word)
            marks.append(word if supervised else None)
    return pieces, marks


def seen(form: str, rounds: list[tuple[str, str]], tokenizer: Any) -> tuple[list[str], list[str | None]]:
    ids, labels = encode(segments(template(form), rounds), tokenizer, image_tokens=1)
    marks = [None if label == IGNORED else tokenizer.convert_ids_to_tokens(label) for label in labels]
    return tokenizer.convert_ids_to_tokens(ids), marks


def test_v1_is_cut_and_masked_as_the_reference_does(tokenizer: PreTrainedTokenizerFast) -> None:
    rounds = [("<image>\nWhat colour  is it?", "red"), ("And its shape?", "It is round ☺.")]
    assert seen("v1", rounds, tokenizer) == expected(V1)


def test_plain_is_cut_and_masked_as_the_reference_does(tokenizer: PreTrainedTokenizerFast) -> None:
    assert seen("plain", [("<image>", "A red ball on a täble.")], tokenizer) == expected(PLAIN)
    pieces, marks = seen("plain", [("<image>", "it")], tokenizer)  # the leading space is a piece of its own
    assert (pieces, marks) == expected("<s> <image> | _ it <0x0A>")


def test_a_prompt_is_the_beginning_of_the_training_text(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = prompt(template("v1"), "What colour  is it?", image=True)
    ids = tokenizer(asked)["input_ids"]
    pieces, _ = expected(V1)
    assert tokenizer.convert_ids_to_tokens(ids) == pieces[: len(ids)]
    assert pieces[len(ids)] == "▁red"


def test_ids_are_the_files(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("A red ball")["input_ids"] == [1, 260, 314, 317]  # from sentencepiece
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 0
    assert tokenizer.convert_tokens_to_ids("<image>") == 420
    text = "USER: How many  apples? 12\tgrün ☺"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_file_is_read_as_it_is() -> None:
    model = read_sentencepiece(MODEL)
    assert len(model.pieces) == 420
    assert [text for text, _, _ in model.pieces[:4]] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert (model.bpe, model.identity, model.dummy_prefix, model.squeezes_spaces) == (True, True, True, False)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    for content in (b"", b"{}", MODEL.read_bytes()[:-3], b"\x08\x01"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a SentencePiece model"):
            llama_tokenizer(path)
    whole = MODEL.read_bytes()
    squeezing = whole.replace(b"\x20\x00", b"\x20\x01") if whole.count(b"\x20\x00") == 1 else whole
    path.write_bytes(squeezing)
    assert read_sentencepiece(path).squeezes_spaces
    with pytest.raises(CheckpointError, match="does not have LLaMA's settings"):
        llama_tokenizer(path)


def test_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    shutil.copyfile(MODEL, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<b>": 421, "<a>": 420}))
    made = llama_tokenizer(tmp_path / "tokenizer.model")
    assert made.convert_tokens_to_ids(["<a>", "<b>"]) == [420, 421]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<a>": 430}))
    with pytest.raises(CheckpointError, match="'<a>' the id 430, but the next free one is 420"):
        llama_tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_a_converted_checkpoint_carries_its_tokenizer(kind: str, tmp_path: Path) -> None:
    source = save_authors(tmp_path / "theirs", "v2")
    if kind == "tokenizer.model":
        shutil.copyfile(MODEL, source / kind)
    else:
        llama_tokenizer(MODEL).backend_tokenizer.save(str(source / kind))
    done = to_hydra(source, tmp_path / "ours")
    assert any(kind in note for note in done.notes)
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert seen("v1", [("<image>\nWhat colour  is it?", "red"), ("And its shape?", "It is round ☺.")],
                processor.tokenizer) == expected(V1)  # fmt: skip
    assert (processor.image_token_id, processor.image_tokens, processor.image_aspect_ratio) == (420, 144, "pad")
    assert processor.tokenizer.model_max_length == 2048
    to_original(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.model").exists() == (kind == "tokenizer.model")
    if kind == "tokenizer.model":
        assert (tmp_path / "back" / kind).read_bytes() == MODEL.read_bytes()
        stored = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
        assert (stored["tokenizer_class"], stored["legacy"], stored["model_max_length"]) == (
            "LlamaTokenizer",
            True,
            2048,
        )


def test_without_a_tokenizer_the_weights_are_converted_and_it_is_said(tmp_path: Path) -> None:
    done = to_hydra(save_authors(tmp_path / "theirs", "v2"), tmp_path / "ours")
    assert any("no tokenizer: the weights alone are converted. Put LLaMA's tokenizer.model" in n for n in done.notes)
    assert (tmp_path / "ours" / "preprocessor_config.json").is_file()


def test_tokenizers_and_image_processors_of_another_model_are_refused(tmp_path: Path) -> None:
    source = save_authors(tmp_path / "theirs", "v2")
    shutil.copyfile(MODEL, source / "tokenizer.model")
    (source / "added_tokens.json").write_text(json.dumps({"<a>": 420}))
    with pytest.raises(CheckpointError, match="has 421 tokens, but the model embeds 420"):
        to_hydra(source, tmp_path / "ours")
    (source / "added_tokens.json").unlink()
    (source / "preprocessor_config.json").write_text(json.dumps({"crop_size": {"height": 224, "width": 224}}))
    with pytest.raises(CheckpointError, match="crops to 224 x 224, the tower takes 336 x 336"):
        to_hydra(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
