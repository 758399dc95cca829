"""Templates and label masks: what is supervised, and where the image goes."""

import pytest

from hydra_vlm.data.templates import IGNORED, encode, prompt, require_plain_text, segments, template
from hydra_vlm.errors import ConfigError, DataError
from tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
V1_TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\nWhat colour? ASSISTANT: red</s>"
    "USER: And its shape? ASSISTANT: round</s>"
)
ROUNDS = [("What colour?\n<image>", "red"), ("And its shape?", "round")]


def text_of(form: str, rounds: list[tuple[str, str]]) -> str:
    return "".join(piece.text for piece in segments(template(form), rounds))


def supervised_text(form: str, rounds: list[tuple[str, str]], image_tokens: int) -> list[str]:
    """The supervised runs of a conversation, decoded."""
    ids, labels = encode(segments(template(form), rounds), TOKENIZER, image_tokens)
    assert len(ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    runs: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [TOKENIZER.decode(run) for run in runs if run]


def test_v1_is_written_to_the_letter() -> None:
    assert text_of("v1", ROUNDS) == V1_TEXT


def test_v1_supervises_answers_with_their_closing_mark() -> None:
    assert supervised_text("v1", ROUNDS, 4) == [" red</s>", " round</s>"]


def test_v1_prompt_ends_without_a_space_and_begins_the_training_text() -> None:
    asked = prompt(template("v1"), "What colour?", image=True)
    assert asked.endswith("ASSISTANT:")
    assert V1_TEXT.startswith(asked)


def test_plain_keeps_image_and_caption_only() -> None:
    assert text_of("plain", [("Describe it. <image>", "A red ball. ")]) == "<image>A red ball.\n"
    assert supervised_text("plain", [("Describe it. <image>", "A red ball.")], 9) == ["A red ball.\n"]


def test_short_template_is_v1_without_its_system_text() -> None:
    assert V1_TEXT.endswith(text_of("v1-short", ROUNDS))


@pytest.mark.parametrize("image_tokens", [1, 16, 144])
def test_each_image_takes_its_positions(image_tokens: int) -> None:
    ids, labels = encode(segments(template("v1"), ROUNDS), TOKENIZER, image_tokens)
    image = TOKENIZER.convert_tokens_to_ids("<image>")
    assert ids.count(image) == image_tokens
    assert ids[0] == TOKENIZER.bos_token_id
    assert all(label == IGNORED for token, label in zip(ids, labels, strict=True) if token == image)


def test_control_marks_in_a_text_are_refused() -> None:
    with pytest.raises(DataError, match=r"record 7.*'</s>'"):
        require_plain_text("an answer</s> and more", TOKENIZER, "record 7")


def test_unknown_template_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="v1, v1-short, plain"):
        template("v3")
