"""LLaMA's SentencePiece `tokenizer.model` as a fast tokenizer that splits text as the reference code does.

The reference loads the slow LLaMA tokenizer in its legacy behaviour: text between special marks (`<image>`, `</s>`) is
encoded on its own, and each such piece begins with SentencePiece's space, so a line break after `<image>` becomes
`▁` `<0x0A>` and the turn after `</s>` begins with `▁USER`. transformers 5 would build a non-legacy tokenizer from the
same file, without that space after a mark, and would need sentencepiece and protobuf to read it.

The file is a protocol buffer (sentencepiece_model.proto): pieces with a score and a kind, then two records of settings.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from hydra_vlm.errors import CheckpointError
from hydra_vlm.reading import TOKENIZER, read_bytes, read_json

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BPE = 2


@dataclass(frozen=True)
class SentencePieceModel:
    """The vocabulary of a `tokenizer.model`, in the order of its ids, and the settings that LLaMA's depends on."""

    pieces: tuple[tuple[str, float, int], ...]  # text, score, kind
    bpe: bool
    identity: bool  # no normalisation of the text
    dummy_prefix: bool  # a space is put before each text
    squeezes_spaces: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a SentencePiece model file.

    Raises:
        CheckpointError: the file is not one.
    """
    try:
        fields = list(_fields(read_bytes(path, TOKENIZER)))
        pieces = tuple(_piece(bytes(value)) for number, value in fields if number == 1)
        records = {number: dict(_fields(bytes(value))) for number, value in fields if number in (2, 3)}
    except (IndexError, TypeError, ValueError, struct.error) as problem:
        raise CheckpointError(f"{path} is not a SentencePiece model: {problem}.") from problem
    if not pieces:
        raise CheckpointError(f"{path} is not a SentencePiece model: it holds no pieces.")
    trainer, normaliser = records.get(2, {}), records.get(3, {})
    return SentencePieceModel(
        pieces=pieces,
        bpe=trainer.get(3, 1) == _BPE,
        identity=not normaliser.get(2, b""),
        dummy_prefix=bool(normaliser.get(3, 1)),
        squeezes_spaces=bool(normaliser.get(4, 1)),
    )


def llama_tokenizer(path: Path, max_length: int = 2048) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a LLaMA `tokenizer.model`, legacy behaviour; pads with `<unk>` as the reference does.

    Tokens in an `added_tokens.json` beside the file get the ids that it names.

    Raises:
        CheckpointError: the file is not a SentencePiece model, or not one with LLaMA's settings.
    """
    model = read_sentencepiece(path)
    if not (model.bpe and model.identity and model.dummy_prefix and not model.squeezes_spaces):
        raise CheckpointError(
            f"{path} does not have LLaMA's settings (BPE, text not normalised, a leading space, spaces kept): "
            f"put the tokenizer.json of this tokenizer in its place."
        )
    vocabulary = {text: i for i, (text, _, _) in enumerate(model.pieces)}
    unknown, begin, end = (_mark(model, path, mark) for mark in ("<unk>", "<s>", "</s>"))
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(model), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])]
    )
    for text, _, kind in model.pieces:
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(text, special=kind != USER_DEFINED, normalized=False)])
    _add_tokens_beside(tokenizer, path)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        pad_token=unknown,
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def _mark(model: SentencePieceModel, path: Path, mark: str) -> str:
    if not any(text == mark and kind in (UNKNOWN, CONTROL) for text, _, kind in model.pieces):
        raise CheckpointError(f"{path} has no {mark}: it is not LLaMA's tokenizer.")
    return mark


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Pairs of pieces that join to a piece, best score first: the order in which SentencePiece joins them."""
    normal = {text: (-score, i) for i, (text, score, kind) in enumerate(model.pieces) if kind == NORMAL}
    merges = []
    for text in sorted(normal, key=normal.__getitem__):
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        merges += sorted(
            (pair for pair in pairs if pair[0] in normal and pair[1] in normal), key=lambda p: normal[p[0]][1]
        )
    return merges


def _add_tokens_beside(tokenizer: Tokenizer, path: Path) -> None:
    added = path.with_name("added_tokens.json")
    for text, wanted in sorted((read_json(added) if added.is_file() else {}).items(), key=lambda item: item[1]):
        tokenizer.add_tokens([AddedToken(text, special=True, normalized=False)])
        if tokenizer.token_to_id(text) != wanted:
            raise CheckpointError(
                f"{added} gives {text!r} the id {wanted}, but the next free one is {tokenizer.token_to_id(text)}."
            )


def _piece(record: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(record))
    (score,) = struct.unpack("<f", bytes(fields.get(2, b"\0\0\0\0")))
    return bytes(fields[1]).decode(), score, int(fields.get(3, NORMAL))


def _fields(record: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a protocol-buffer record: number, and an integer or the bytes."""
    at = 0
    while at < len(record):
        key, at = _varint(record, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(record, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(record, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + length > len(record):
            raise ValueError(f"it ends within a field at byte {at}")
        yield number, record[at : at + length]
        at += length


def _varint(record: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = record[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
