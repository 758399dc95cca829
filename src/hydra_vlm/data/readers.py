"""How a model reads conversations: one protocol, three ways.

* `SplicingReader`: MobileVLM, whose images take a fixed number of positions, and text decoders. Texts are tokenized
  once at the start; images go in as pixels, or as features of the frozen tower where they are at hand.
* `ProcessorReader`: any other vision-language model of transformers. Text and image go through the model's own
  processor when a batch is made, and everything that the processor returns goes to the model.
* `SuffixReader`: PaliGemma, which has no conversations: a question is the prefix, the answer the suffix.

Rows are made one by one and put together here, so a batch may mix images of any size and rows without one.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from hydra_vlm.data.batches import stack
from hydra_vlm.data.features import image_inputs, load_image
from hydra_vlm.data.image_files import header_size
from hydra_vlm.data.records import IMAGE_TOKEN, Record
from hydra_vlm.data.templates import (
    AUTO,
    IGNORED,
    TEMPLATES,
    Form,
    Segment,
    count_tokens,
    encode,
    end_mark,
    form_of,
    labels_of,
    prompt,
    require_plain_text,
    segments,
    supervised_characters,
)
from hydra_vlm.errors import ConfigError, DataError

Row = dict[str, Any]


class Reader(Protocol):
    """The plug point: how one model reads conversations."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def end(self) -> str:
        """What closes every answer."""
        ...

    def item(self, record: Record) -> Row:
        """What a batch is made of, with `length`, the record's positions in the decoder.

        Raises:
            DataError: the record cannot be written out for this model.
        """
        ...

    def batch(self, items: Sequence[Row]) -> dict[str, Tensor]:
        """The model's arguments for training, padded on the right, with `labels` [B, L]."""
        ...

    def prompt(self, question: str, image: bool) -> str:
        """The text after which the model writes its answer to one question."""
        ...

    def prompts(self, texts: Sequence[str], images: Sequence[str | None]) -> dict[str, Tensor]:
        """The model's arguments for generation after these prompts, padded on the left; `images` are paths."""
        ...


def open_reader(processor: Any, template: str = AUTO) -> Reader:
    """The reader of a model by its processor (of a text decoder: its tokenizer), writing by `template`.

    Raises:
        ConfigError: the template does not exist, or `auto` finds none for this model.
    """
    form = form_of(template, processor)
    if "suffix" in inspect.signature(type(processor).__call__).parameters and not _chat(processor):
        if template != AUTO:
            raise ConfigError(f"data.template={template}: {type(processor).__name__} has its own form: use {AUTO}")
        return SuffixReader(processor)
    if form is None:
        raise ConfigError(
            f"{type(processor).__name__} has no chat template: choose data.template from {', '.join(TEMPLATES)}"
        )
    if hasattr(processor, "image_tokens") or not hasattr(processor, "tokenizer"):
        return SplicingReader(processor, form)
    return ProcessorReader(processor, form)


@dataclass(frozen=True)
class SplicingReader:
    """Reads for MobileVLM, or for a text decoder, whose `processor` is its tokenizer."""

    processor: Any
    form: Form
    features: Mapping[tuple[str, str], Tensor] | None = None

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def end(self) -> str:
        return end_mark(self.form)

    def item(self, record: Record) -> Row:
        ids, labels = self._encode(_written(self, self.form, record), record.image, f"record {record.id}")
        return {"input_ids": ids, "labels": labels, "image": record.image, "length": len(ids)}

    def length(self, record: Record) -> int:
        """`item`'s length by itself, in half the time: without labels and offsets. Raises as `item` does."""
        pieces = _written(self, self.form, record)
        self._require_images(record.image, f"record {record.id}")
        return count_tokens(pieces, self.tokenizer, getattr(self.processor, "image_tokens", 0))

    def batch(self, items: Sequence[Row]) -> dict[str, Tensor]:
        rows = [{key: torch.tensor([item[key]]) for key in ("input_ids", "labels")} for item in items]
        return self._with_images(rows, [item["image"] for item in items], "right")

    def prompt(self, question: str, image: bool) -> str:
        return prompt(self.form, question, image)

    def prompts(self, texts: Sequence[str], images: Sequence[str | None]) -> dict[str, Tensor]:
        encoded = [
            self._encode([Segment(text, False)], image, "prompt")[0] for text, image in zip(texts, images, strict=True)
        ]
        return self._with_images([{"input_ids": torch.tensor([ids])} for ids in encoded], images, "left")

    def _encode(self, pieces: Sequence[Segment], image: str | None, where: str) -> tuple[list[int], list[int]]:
        self._require_images(image, where)
        return encode(pieces, self.tokenizer, getattr(self.processor, "image_tokens", 0))

    def _require_images(self, image: str | None, where: str) -> None:
        if image is not None and not hasattr(self.processor, "image_tokens"):
            raise DataError(f"{where} has image {image}, but the model is a text decoder: give it text alone")

    def _with_images(self, rows: Sequence[Row], images: Sequence[str | None], side: str) -> dict[str, Tensor]:
        paths = [path for path in images if path is not None]
        return stack(rows, self.tokenizer.pad_token_id, side) | image_inputs(paths, self.features, self.processor)


@dataclass(frozen=True)
class ProcessorReader:
    """Reads for any model of transformers through its own processor; one image a record.

    `growth` remembers by how many tokens an image of some size (width, height) lengthens a text.
    """

    processor: Any
    form: Form
    growth: dict[tuple[int, int] | None, int] = field(default_factory=dict, compare=False, repr=False)

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def end(self) -> str:
        return end_mark(self.form)

    def item(self, record: Record) -> Row:
        pieces = _written(self, self.form, record)
        text = "".join(piece.text for piece in pieces)
        size = image_size(record.image)
        tokens = len(self.tokenizer(text, add_special_tokens=self._adds_marks(text))["input_ids"])
        if size not in self.growth:
            row = self._row(pieces, None if size is None else Image.new("RGB", size))
            _require_labels(row, pieces, self.tokenizer, record.id)
            self.growth[size] = row["input_ids"].shape[1] - tokens
        return {"pieces": pieces, "image": record.image, "length": tokens + self.growth[size]}

    def batch(self, items: Sequence[Row]) -> dict[str, Tensor]:
        rows = [self._row(item["pieces"], _opened(item["image"])) for item in items]
        return stack(rows, self.tokenizer.pad_token_id, "right")

    def prompt(self, question: str, image: bool) -> str:
        return prompt(self.form, question, image)

    def prompts(self, texts: Sequence[str], images: Sequence[str | None]) -> dict[str, Tensor]:
        rows = [self._row([Segment(text, False)], _opened(path)) for text, path in zip(texts, images, strict=True)]
        for row in rows:
            del row["labels"]
        return stack(rows, self.tokenizer.pad_token_id, "left")

    def _row(self, pieces: Sequence[Segment], image: Image.Image | None) -> dict[str, Tensor]:
        """One conversation through the processor, with its labels; every tensor has the row as its first dimension.

        The processor writes out the image's mark at length, so all that follows moves by as many characters as the
        written text is longer than ours; offsets say where its last token ends.
        """
        text = "".join(piece.text for piece in pieces)
        row = dict(
            self.processor(
                text=[text],
                images=None if image is None else [image],
                add_special_tokens=self._adds_marks(text),
                return_offsets_mapping=True,
                return_tensors="pt",
            )
        )
        offsets = torch.as_tensor(row.pop("offset_mapping"))[0]
        flags = supervised_characters(pieces)
        if image is not None:
            mark = self.form.image
            place = text.index(mark)
            longer = int(offsets.max()) - len(text)
            flags[place : place + len(mark)] = [False] * (len(mark) + longer)
        ids = row["input_ids"][0].tolist()
        return row | {"labels": torch.tensor([labels_of(ids, offsets.tolist(), flags)])}

    def _adds_marks(self, text: str) -> bool:
        """Whether the tokenizer is to add its BOS, as transformers does: unless the template wrote it."""
        bos = self.tokenizer.bos_token
        return bos is None or not text.startswith(bos)


@dataclass(frozen=True)
class SuffixReader:
    """Reads for PaliGemma: image and question attend to each other, the answer is the suffix with labels."""

    processor: Any

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def end(self) -> str:
        return str(self.tokenizer.eos_token)

    def item(self, record: Record) -> Row:
        if record.image is None or len(record.rounds) != 1:
            what = "no image" if record.image is None else f"{len(record.rounds)} rounds"
            raise DataError(
                f"record {record.id} has {what}: {type(self.processor).__name__} reads one image, one question and "
                "one answer"
            )
        _require_plain(self, record, self.processor.image_token)
        ((human, answer),) = record.rounds
        question = human.replace(IMAGE_TOKEN, "").strip()
        texts = (f"{question}\n", f"{answer.strip()}{self.end}")
        length = sum(len(self.tokenizer(text)["input_ids"]) for text in texts) + 1 + self.processor.image_seq_length
        return {"question": question, "answer": answer.strip(), "image": record.image, "length": length}

    def batch(self, items: Sequence[Row]) -> dict[str, Tensor]:
        rows = [self._row(self.prompt(item["question"], True), item["image"], item["answer"]) for item in items]
        return stack(rows, self.tokenizer.pad_token_id, "right")

    def prompt(self, question: str, image: bool) -> str:
        return f"{self.processor.image_token}{question}"

    def prompts(self, texts: Sequence[str], images: Sequence[str | None]) -> dict[str, Tensor]:
        rows = [self._row(text, path, None) for text, path in zip(texts, images, strict=True)]
        return stack(rows, self.tokenizer.pad_token_id, "left")

    def _row(self, text: str, path: str | None, answer: str | None) -> dict[str, Tensor]:
        if path is None:
            raise DataError(f"the question {text!r} has no image: {type(self.processor).__name__} needs one")
        suffix = None if answer is None else [answer]
        row = dict(self.processor(text=[text], images=[load_image(path)], suffix=suffix).convert_to_tensors("pt"))
        if answer is None:
            del row["labels"]  # of a suffix that is not there
        return row


def image_size(path: str | None) -> tuple[int, int] | None:
    """(width, height) from the file's header."""
    return None if path is None else header_size(path)


def _opened(path: str | None) -> Image.Image | None:
    return None if path is None else load_image(path)


def _chat(processor: Any) -> bool:
    return bool(getattr(processor, "chat_template", None) or processor.tokenizer.chat_template)


def _written(reader: Reader, form: Form, record: Record) -> list[Segment]:
    """A record's segments, after a check of its texts."""
    _require_plain(reader, record, form.image)
    try:
        return segments(form, record.rounds)
    except DataError as problem:
        raise DataError(f"record {record.id}: {problem}") from None


def _require_plain(reader: Reader, record: Record, image: str) -> None:
    for human, answer in record.rounds:
        require_plain_text(human.replace(IMAGE_TOKEN, ""), reader.tokenizer, f"record {record.id}", image)
        require_plain_text(answer, reader.tokenizer, f"record {record.id}", image)


def _require_labels(row: Mapping[str, Tensor], pieces: Sequence[Segment], tokenizer: Any, name: str) -> None:
    """Check that the labelled tokens spell the supervised text (white space apart).

    Raises:
        DataError: the processor changed the text in a way that this reader does not follow.
    """
    kept = row["labels"][row["labels"] != IGNORED].tolist()
    spelt = "".join(tokenizer.decode(kept).split())
    meant = "".join("".join(piece.text for piece in pieces if piece.supervised).split())
    if spelt != meant and tokenizer.unk_token_id not in kept:
        raise DataError(f"record {name}: the labels spell {spelt!r}, but the answers are {meant!r}")
