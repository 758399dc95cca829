"""Conversation templates and label masks: the only place that knows the value -100.

A conversation becomes a list of segments, each supervised or not; the text is tokenized once as a whole and every
token takes the flag of the segment in which it begins, so the mask cannot drift from the text. The segments are
written by a `Template` of this file or by the model's own chat template (`ChatTemplate`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra_vlm.data.records import IMAGE_TOKEN
from hydra_vlm.data.template_trial import bounded, require_ending
from hydra_vlm.errors import ConfigError, DataError

IGNORED = -100  # what PyTorch's cross entropy leaves out
AUTO, CHAT = "auto", "chat"

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
    """How rounds are written out. `end` closes each answer and is supervised with it; `image` marks an image."""

    name: str
    system: str
    user: str
    assistant: str
    end: str
    keep_question: bool = True
    image: str = IMAGE_TOKEN


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The model's own way of writing: `render(messages, add_generation_prompt)` is its jinja chat template.

    `image` is the mark that the template writes for an image. `typed` says that a message's content is a list of
    typed parts, as templates of vision-language models want it; those of text models want a string. `header` is what
    the generation prompt adds. `eos` closes an answer where the template writes no mark of its own behind it.
    """

    render: Callable[[Sequence[Mapping[str, Any]], bool], str]
    image: str
    typed: bool
    eos: str
    header: str = ""


Form = Template | ChatTemplate

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
    require_template(name)
    return TEMPLATES[name]


def require_template(name: str) -> None:
    """Check a template's name, `auto` and `chat` included, before a model is loaded.

    Raises:
        ConfigError: naming the templates there are.
    """
    if name not in (AUTO, CHAT, *TEMPLATES):
        raise ConfigError(f"template {name!r} does not exist: choose one of {', '.join((AUTO, CHAT, *TEMPLATES))}")


def form_of(name: str, processor: Any) -> Form | None:
    """The way of writing that `name` asks for, in the marks of this model's tokenizer.

    `auto` is the processor's (or its tokenizer's) own chat template; without one it is v1 for MobileVLM, and None for
    every other model. `processor` may be a bare tokenizer.

    Raises:
        ConfigError: an unknown name, or a chat template that is missing or does not place the image.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    image = image_mark(processor)
    own = getattr(processor, "chat_template", None) or tokenizer.chat_template
    if name in (AUTO, CHAT) and own:
        return _chat_template(own, tokenizer, image)
    if name == CHAT:
        raise ConfigError(
            f"data.template=chat: {type(processor).__name__} has no chat template: choose {', '.join(TEMPLATES)}"
        )
    if name == AUTO:
        name = "v1" if hasattr(processor, "image_tokens") else ""
    if not name:
        return None
    form = template(name)
    end = tokenizer.eos_token if form.end == "</s>" and tokenizer.eos_token else form.end
    return replace(form, end=end, image=image)


def image_mark(processor: Any) -> str:
    """What stands for one image in a text given to the processor; "<image>" where it does not say."""
    return getattr(processor, "image_token", None) or IMAGE_TOKEN


def segments(form: Form, rounds: Sequence[tuple[str, str]]) -> list[Segment]:
    """Write out whole rounds: questions unsupervised, answers with their closing mark supervised.

    Raises:
        DataError: a chat template that cannot be cut into questions and answers.
    """
    if isinstance(form, ChatTemplate):
        return _chat_segments(form, rounds)
    pieces = [Segment(form.system, False)] if form.system else []
    for human, answer in rounds:
        space = " " if form.assistant else ""
        pieces.append(Segment(_question(form, human), False))
        pieces.append(Segment(f"{space}{answer.strip()}{form.end}", True))
    return pieces


def prompt(form: Form, question: str, image: bool) -> str:
    """The text after which the model writes its answer to one question."""
    human = f"{IMAGE_TOKEN}\n{question}" if image else question
    if isinstance(form, ChatTemplate):
        return form.render([_message(form, "user", human)], True)
    return form.system + _question(form, human)


def end_mark(form: Form) -> str:
    """What closes every answer."""
    if isinstance(form, Template):
        return form.end
    return _chat_segments(form, [("question", "answer")])[1].text.partition("answer")[2]


def _question(form: Template, human: str) -> str:
    """One human turn; an `<image>` anywhere in it moves to the front, on a line of its own."""
    image = IMAGE_TOKEN in human
    if not form.keep_question:
        return form.image if image else ""
    text = human.replace(IMAGE_TOKEN, "").strip()
    return form.user + (f"{form.image}\n" if image else "") + text + form.assistant


def _chat_template(source: str | dict[str, str], tokenizer: Any, image: str) -> ChatTemplate:
    """The form of a chat template, told by a trial whether content is typed parts or a string."""
    text = source if isinstance(source, str) else source.get("default", next(iter(source.values())))

    def own(messages: Sequence[Mapping[str, Any]], ask: bool) -> str:
        rendered: str = tokenizer.apply_chat_template(
            list(messages), chat_template=text, add_generation_prompt=ask, tokenize=False
        )
        return rendered

    require_ending(text, own)
    render = bounded(own)
    for typed in (True, False):
        form = ChatTemplate(render, image, typed, tokenizer.eos_token or "")
        try:
            shown, said = prompt(form, "what is it?", image=True), prompt(form, "what is it?", image=False)
        except Exception:  # jinja's errors and whatever a template raises on content that it does not expect
            continue
        # A template that wants a string prints typed parts as Python would: {'type': 'image'}.
        if shown.count(image) == 1 and "what is it?" in said and "'type'" not in shown + said:
            bare = render([_message(form, "user", "what is it?")], False)
            return replace(form, header=said.removeprefix(bare) if said.startswith(bare) else said)
    raise ConfigError(
        f"the model's chat template does not write {image!r} once for a question with an image: choose data.template "
        f"from {', '.join(TEMPLATES)}"
    )


def _message(form: ChatTemplate, role: str, text: str) -> dict[str, Any]:
    """One turn as the template reads it, an image before the text."""
    words = text.replace(IMAGE_TOKEN, "").strip()
    if not form.typed:
        return {"role": role, "content": f"{form.image}\n{words}" if IMAGE_TOKEN in text else words}
    images = [{"type": "image"}] if IMAGE_TOKEN in text else []
    return {"role": role, "content": [*images, {"type": "text", "text": words}]}


def _chat_segments(form: ChatTemplate, rounds: Sequence[tuple[str, str]]) -> list[Segment]:
    """Cut a rendered conversation into questions and answers by rendering it turn by turn.

    A question reaches to the end of the generation prompt, so that the model is trained on what it will be asked.
    Supervised are the answer, what the template puts between generation prompt and answer, and the closing mark;
    white space behind that mark is written but not supervised, for the model never has to say it. Where the template
    closes an answer with nothing but white space, the tokenizer's end of text takes the mark's place.
    """
    pieces: list[Segment] = []
    messages: list[dict[str, Any]] = []
    before = ""
    for human, answer in rounds:
        messages.append(_message(form, "user", human))
        asked = form.render(messages, True)
        bare = asked.removesuffix(form.header)
        messages.append(_message(form, "assistant", answer))
        done = form.render(messages, False)
        if not (asked.startswith(before) and asked.endswith(form.header) and done.startswith(bare)):
            raise DataError(
                "the model's chat template rewrites earlier turns when a later one is added, so questions and answers "
                f"cannot be told apart: give it records of one round, or choose data.template from "
                f"{', '.join(TEMPLATES)}"
            )
        lead, closing = _around_answer(done[len(bare) :], form.header, answer.strip())
        mark = closing.rstrip()
        pieces += [
            Segment(asked[len(before) :], False),
            Segment(f"{lead}{answer.strip()}{mark or form.eos}", True),
            Segment(closing[len(mark) :], False),
        ]
        before = done
    return [piece for piece in pieces if piece.text]


def _around_answer(turn: str, header: str, answer: str) -> tuple[str, str]:
    """What a rendered assistant's turn has between its header and the answer, and behind the answer.

    Templates are known whose turns and generation prompts differ in white space (LLaVA-OneVision); the prompt's is
    taken, for the prompt is what the model will answer to.
    """
    place = turn.rfind(answer)
    if place < 0:
        raise DataError(f"the model's chat template does not keep the answer {answer!r} as it is")
    opening, closing = turn[:place], turn[place + len(answer) :]
    if opening.startswith(header):
        return opening[len(header) :], closing
    if opening.split() == header.split():
        return "", closing
    raise DataError(
        f"the model's chat template opens an answer with {opening!r}, but asks for one with {header!r}: choose "
        f"data.template from {', '.join(TEMPLATES)}"
    )


def encode(pieces: Sequence[Segment], tokenizer: Any, image_tokens: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation; each `<image>` takes `image_tokens` positions, BOS comes first.

    Labels equal the ids where a token begins in a supervised segment and `IGNORED` elsewhere.
    """
    text = "".join(piece.text for piece in pieces).replace(IMAGE_TOKEN, IMAGE_TOKEN * image_tokens)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    flags = supervised_characters(pieces, image_tokens)
    ids = encoded["input_ids"]
    labels = labels_of(ids, encoded["offset_mapping"], flags)
    if tokenizer.bos_token is not None and not text.startswith(tokenizer.bos_token):
        ids, labels = [tokenizer.bos_token_id, *ids], [IGNORED, *labels]
    return ids, labels


def count_tokens(pieces: Sequence[Segment], tokenizer: Any, image_tokens: int) -> int:
    """How many ids `encode` makes of a conversation."""
    text = "".join(piece.text for piece in pieces).replace(IMAGE_TOKEN, IMAGE_TOKEN * image_tokens)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.truncation or backend.padding:  # then not the bare tokenizer
        return len(encode(pieces, tokenizer, image_tokens)[0])
    (encoded,) = backend.encode_batch_fast([text], add_special_tokens=False)
    return len(encoded) + (tokenizer.bos_token is not None and not text.startswith(tokenizer.bos_token))


def labels_of(ids: Sequence[int], offsets: Sequence[Sequence[int]], flags: Sequence[bool]) -> list[int]:
    """The ids where a token begins at a supervised character, `IGNORED` elsewhere.

    A token without width stands for white space that a tokenizer trims from its offsets: it belongs to the character
    before its end; at position 0 it is a mark or padding that the tokenizer added.
    """
    labels = []
    for token, (start, end) in zip(ids, offsets, strict=True):
        place = start if end > start else start - 1
        labels.append(token if 0 <= place < len(flags) and flags[place] else IGNORED)
    return labels


def supervised_characters(pieces: Sequence[Segment], image_tokens: int = 1) -> list[bool]:
    """Whether each character of the text is supervised, with each `<image>` written `image_tokens` times."""
    flags: list[bool] = []
    for piece in pieces:
        flags += [piece.supervised] * len(piece.text.replace(IMAGE_TOKEN, IMAGE_TOKEN * image_tokens))
    return flags


def require_plain_text(text: str, tokenizer: Any, where: str, image: str = IMAGE_TOKEN) -> None:
    """Check that no special mark hides in a text; `image` is the model's own mark of an image.

    Raises:
        DataError: naming the mark and the record.
    """
    for mark in (*tokenizer.all_special_tokens, IMAGE_TOKEN, image):
        if mark in text:
            raise DataError(
                f"{where}: the text contains {mark!r}, which the tokenizer reads as a control mark: remove it"
            )
