"""Conversation templates and label masks: the only place that knows the value -100.

A conversation becomes a list of segments, each supervised or not; the text is tokenized once as a whole and every
token takes the flag of the segment in which it begins, so the mask cannot drift from the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra_vlm.data.records import IMAGE_TOKEN
from hydra_vlm.errors import ConfigError, DataError

IGNORED = -100  # what PyTorch's cross entropy leaves out

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a conversation; only supervised pieces enter the loss."""

    text: str
    supervised: bool


@dataclass(frozen=True, slots=True)
class Template:
    """How rounds are written out. `end` closes each answer and is supervised with it."""

    name: str
    system: str
    user: str
    assistant: str
    end: str
    keep_question: bool = True


TEMPLATES = {
    # Instruction tuning and evaluation. No space follows the closing </s>; a prompt ends with "ASSISTANT:".
    "v1": Template("v1", _SYSTEM, "USER: ", " ASSISTANT:", "</s>"),
    # The same without its 30-odd tokens of system text, for models too small to spend them.
    "v1-short": Template("v1-short", "", "USER: ", " ASSISTANT:", "</s>"),
    # Projector pretraining: the image, then the caption; the human text is thrown away.
    "plain": Template("plain", "", "", "", "\n", keep_question=False),
}


def template(name: str) -> Template:
    """The template of that name.

    Raises:
        ConfigError: naming the templates there are.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"template {name!r} does not exist: choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def segments(form: Template, rounds: Sequence[tuple[str, str]]) -> list[Segment]:
    """Write out whole rounds: questions unsupervised, answers with their closing mark supervised."""
    pieces = [Segment(form.system, False)] if form.system else []
    for human, answer in rounds:
        space = " " if form.assistant else ""
        pieces.append(Segment(_question(form, human), False))
        pieces.append(Segment(f"{space}{answer.strip()}{form.end}", True))
    return pieces


def prompt(form: Template, question: str, image: bool) -> str:
    """The text after which the model writes its answer to one question."""
    human = f"{IMAGE_TOKEN}\n{question}" if image else question
    return form.system + _question(form, human)


def _question(form: Template, human: str) -> str:
    """One human turn; an `<image>` anywhere in it moves to the front, on a line of its own."""
    image = IMAGE_TOKEN in human
    if not form.keep_question:
        return IMAGE_TOKEN if image else ""
    text = human.replace(IMAGE_TOKEN, "").strip()
    return form.user + (f"{IMAGE_TOKEN}\n" if image else "") + text + form.assistant


def encode(pieces: Sequence[Segment], tokenizer: Any, image_tokens: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation; each `<image>` takes `image_tokens` positions, BOS comes first.

    Labels equal the ids where a token begins in a supervised segment and `IGNORED` elsewhere.

    Raises:
        DataError: a text contains the tokenizer's own special marks, which would change the conversation.
    """
    ids, labels = [], []
    text = "".join(piece.text.replace(IMAGE_TOKEN, IMAGE_TOKEN * image_tokens) for piece in pieces)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    flags = _flags(pieces, image_tokens)
    if tokenizer.bos_token_id is not None:
        ids, labels = [tokenizer.bos_token_id], [IGNORED]
    for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ids.append(token)
        labels.append(token if flags[start] else IGNORED)
    return ids, labels


def require_plain_text(text: str, tokenizer: Any, where: str) -> None:
    """Check that no special mark hides in a record's text.

    Raises:
        DataError: naming the mark and the record.
    """
    for mark in tokenizer.all_special_tokens:
        if mark != IMAGE_TOKEN and mark in text:
            raise DataError(
                f"{where}: the text contains {mark!r}, which the tokenizer reads as a control mark: remove it"
            )


def _flags(pieces: Sequence[Segment], image_tokens: int) -> list[bool]:
    """Whether each character of the expanded text is supervised."""
    flags: list[bool] = []
    for piece in pieces:
        flags += [piece.supervised] * len(piece.text.replace(IMAGE_TOKEN, IMAGE_TOKEN * image_tokens))
    return flags
