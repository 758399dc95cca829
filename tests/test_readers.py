"""Chat templates cut into questions and answers, what each kind of reader refuses, and `hydra-vlm chat`."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from families import FAMILIES, LLAVA, ONEVISION, chatml, tokenizer
from hydra_vlm.data.batches import stack
from hydra_vlm.data.instruction import InstructionDataset
from hydra_vlm.data.readers import Reader, open_reader
from hydra_vlm.data.records import Record
from hydra_vlm.data.templates import IGNORED, ChatTemplate, end_mark, form_of, prompt, segments
from hydra_vlm.errors import ConfigError, DataError
from hydra_vlm.models.loading import load_model
from hydra_vlm.models.mobilevlm.processing import MobileVLMProcessor
from tiny import byte_tokenizer

ROUNDS = [("<image>\nWhat colour?", "red"), ("And its shape?", " round ")]
# ChatML of a text model: content is a string, and there is a system turn.
SMOL = (
    "{% for message in messages %}{% if loop.first %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(template: str | None, image: str = "<image>") -> PreTrainedTokenizerFast:
    words = tokenizer(["<|im_start|>", image], "<|im_start|>", "<|im_end|>", "<|endoftext|>")
    words.chat_template = template
    return words


def form(template: str) -> ChatTemplate:
    found = form_of("auto", chat_tokenizer(template))
    assert isinstance(found, ChatTemplate)
    return found


def supervised(pieces: list[Any]) -> list[str]:
    return [piece.text for piece in pieces if piece.supervised]


def whole(pieces: list[Any]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize(
    ("template", "typed", "text", "answers"),
    [
        (
            SMOL,
            False,
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n<image>\nWhat colour?<|im_end|>\n"
            "<|im_start|>assistant\nred<|im_end|>\n<|im_start|>user\nAnd its shape?<|im_end|>\n"
            "<|im_start|>assistant\nround<|im_end|>\n",
            ["red<|im_end|>", "round<|im_end|>"],
        ),
        (
            chatml("<image>"),
            True,
            "<|im_start|>user\n<image>What colour?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
            "<|im_start|>user\nAnd its shape?<|im_end|>\n<|im_start|>assistant\nround<|im_end|>\n",
            ["red<|im_end|>", "round<|im_end|>"],
        ),
        # No mark behind an answer: the tokenizer's end of text stands there.
        (
            LLAVA,
            True,
            "USER: <image>\nWhat colour? ASSISTANT: red<|im_end|> USER: And its shape? ASSISTANT: round<|im_end|> ",
            [" red<|im_end|>", " round<|im_end|>"],
        ),
        # A turn opens otherwise than the generation prompt: the prompt's opening is trained.
        (
            ONEVISION,
            True,
            "<|im_start|>user <image>\nWhat colour?<|im_end|><|im_start|>assistant\nred<|im_end|>"
            "<|im_start|>user \nAnd its shape?<|im_end|><|im_start|>assistant\nround<|im_end|>",
            ["red<|im_end|>", "round<|im_end|>"],
        ),
    ],
)
def test_chat_templates_are_cut_by_their_turns(template: str, typed: bool, text: str, answers: list[str]) -> None:
    ours = form(template)
    assert ours.typed == typed
    pieces = segments(ours, ROUNDS)
    assert whole(pieces) == text
    assert supervised(pieces) == answers
    assert text.startswith(prompt(ours, "What colour?", image=True))
    assert end_mark(ours) == "<|im_end|>"


def test_templates_that_rewrite_what_was_said_are_refused() -> None:
    forgetful = form("{% for m in messages[-2:] %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    assert supervised(segments(forgetful, ROUNDS[:1])) == ["assistant: red<|im_end|>"]
    with pytest.raises(DataError, match="rewrites earlier turns"):
        segments(forgetful, ROUNDS)
    shouting = form("{% for m in messages %}{{ m['content'] | replace('red', 'RED') }}{% endfor %}")
    with pytest.raises(DataError, match="does not keep the answer 'red'"):
        segments(shouting, ROUNDS)
    blind = "{% for m in messages %}{{ m['content'] | replace('<image>', '') }}{% endfor %}"
    with pytest.raises(ConfigError, match="does not write '<image>' once"):
        form(blind)


def test_auto_is_the_models_own_template_where_there_is_one() -> None:
    embedded = load_model("embedded", "cpu").processor
    auto, short = open_reader(embedded), open_reader(embedded, "v1-short")
    for rounds in (ROUNDS, ROUNDS[1:], [("Is it\nred ?", "yes.")]):
        record = Record("r", "picture.png" if rounds is ROUNDS else None, tuple(rounds))
        assert auto.item(record) == short.item(record)  # to the token
    for image in (True, False):
        assert auto.prompt("what is it?", image) == short.prompt("what is it?", image)
    bare = MobileVLMProcessor(embedded.image_processor, byte_tokenizer(), 4)
    assert open_reader(bare).form.name == "v1"


def test_mobilevlm_speaks_the_chat_format_of_its_decoder() -> None:
    """A decoder with ChatML, whose BOS is its template's first mark."""
    words = chat_tokenizer(SMOL)
    processor = MobileVLMProcessor(load_model("embedded", "cpu").processor.image_processor, words, image_tokens=4)
    reader = open_reader(processor)
    item = reader.item(Record("r", "picture.png", tuple(ROUNDS)))
    ids, labels = item["input_ids"], item["labels"]
    assert ids.count(words.convert_tokens_to_ids("<image>")) == 4
    assert ids[:2] == [words.bos_token_id, *words("s", add_special_tokens=False)["input_ids"]]
    assert words.decode([token for token in labels if token != IGNORED]) == "red<|im_end|>round<|im_end|>"
    asked = reader.prompts([reader.prompt("What colour?", True)], [None])["input_ids"][0].tolist()
    assert ids[: len(asked)] == asked
    # v1 closes an answer with this tokenizer's end of text, not with letters that spell "</s>".
    assert end_mark(open_reader(processor, "v1").form) == "<|im_end|>"


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    home = tmp_path_factory.mktemp("families")
    return {
        name: open_reader(load_model(str(FAMILIES[name].save(home / name)), "cpu").processor)
        for name in ("qwen2_vl", "paligemma", "llama")
    }


def test_what_a_model_cannot_read_is_refused_by_name(readers: dict[str, Reader], tmp_path: Path) -> None:
    path = str(tmp_path / "picture.png")
    Image.new("RGB", (32, 32)).save(path)
    two, text = Record("two", path, tuple(ROUNDS)), Record("text", None, tuple(ROUNDS[1:]))
    with pytest.raises(DataError, match="record two has 2 rounds"):
        readers["paligemma"].item(two)
    with pytest.raises(DataError, match="record text has no image"):
        readers["paligemma"].item(text)
    with pytest.raises(DataError, match=r"record two has image .* text decoder"):
        readers["llama"].item(two)
    for hidden in ("a <|image_pad|> b", "now <|im_end|>", "an <image> too"):
        with pytest.raises(DataError, match="record sly: the text contains"):
            readers["qwen2_vl"].item(Record("sly", path, (("<image>\nwhat?", hidden),)))
    with pytest.raises(ConfigError, match="has its own form"):
        open_reader(readers["paligemma"].processor, "v1")
    words = chat_tokenizer(None)
    for wish in ("auto", "chat"):
        with pytest.raises(ConfigError, match=r"no chat template.*v1, v1-short, plain"):
            open_reader(words, wish)


def test_lengths_are_foreseen_from_the_images_header(readers: dict[str, Reader], tmp_path: Path) -> None:
    records = []
    for name, size in (("small", (16, 16)), ("large", (32, 32))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        records.append(Record(name, str(tmp_path / f"{name}.png"), tuple(ROUNDS[:1])))
    small, large = (readers["qwen2_vl"].item(record)["length"] for record in records)
    assert large - small == (32 // 8) ** 2 - (16 // 8) ** 2  # patches of 4, merged 2 x 2
    InstructionDataset(records, readers["qwen2_vl"], large)
    with pytest.raises(DataError, match=f"record large: {large} tokens with the image exceed {large - 1}"):
        InstructionDataset(records, readers["qwen2_vl"], large - 1)


def test_rows_are_stacked_on_either_side() -> None:
    rows = [
        {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[IGNORED, 6, 7]])},
        {
            "input_ids": torch.tensor([[8]]),
            "labels": torch.tensor([[8]]),
            "pixel_values": torch.ones(1, 2, 3),
            "image_sizes": torch.tensor([[4, 4]]),
        },
    ]
    right, left = stack(rows, 9, "right"), stack(rows, 9, "left")
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert left["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert right["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    grown = stack([rows[1], {**rows[1], "pixel_values": torch.ones(2, 4, 3)}], 9, "left")["pixel_values"]
    assert grown.shape == (3, 4, 3)
    assert float(grown.sum()) == 2 * 3 + 2 * 4 * 3
    assert float(grown[0, 2:].abs().sum()) == 0.0


def test_a_pattern_describes_the_decoder(tmp_path: Path) -> None:
    folder = str(FAMILIES["llama"].save(tmp_path / "model"))
    found = load_model(folder, "cpu").parts
    assert load_model(folder, "cpu", r"model\.layers\.\d+").parts.names() == found.names()
    with pytest.raises(ConfigError, match=r"decoder_pattern 'eyes\.\.\*' matches no module"):
        load_model(folder, "cpu", "eyes..*")


def chat(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hydra_vlm.cli", "chat", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_chat_answers_on_the_command_line(tmp_path: Path) -> None:
    Image.new("RGB", (48, 32), (200, 30, 30)).save(tmp_path / "red.png")
    about = chat("embedded", str(tmp_path / "red.png"), "what color is the shape?", "--device", "cpu")
    assert (about.returncode, about.stderr) == (0, "")
    assert about.stdout.endswith("\n")
    model = FAMILIES["qwen2_vl"].save(tmp_path / "model")
    said = chat(str(model), str(tmp_path / "red.png"), "what is it?", "--max-new-tokens", "3", "--device", "cpu")
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("embedded", "nowhere.png", "what is it?"), "image nowhere.png cannot be read"),
        (("embedded", "what", "is", "it?"), "quote the last"),
        (("embedded", "what?", "--template", "v9"), "template 'v9' does not exist"),
    ],
)
def test_chat_refuses_in_one_line(words: tuple[str, ...], message: str) -> None:
    done = chat(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
