"""Batched greedy answers with a KV cache; knows nothing of scoring.

The plan is fixed before the first answer: images are taken in blocks whose tower features fit into memory, so that
each image goes through the tower once for all its questions, and within a block questions of similar length make a
batch. A run that was stopped repeats the unfinished batch whole, so that it ends with the same answers.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, LogitsProcessorList

from hydra_vlm.benchmarks.images import Images, once_per_image
from hydra_vlm.benchmarks.protocol import Example, Prediction
from hydra_vlm.data.readers import Reader, SplicingReader
from hydra_vlm.errors import CheckpointError

ReaderT = TypeVar("ReaderT", bound=Reader)
Progress = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Answering:
    """How questions are answered: `cache_gigabytes` bounds the tower features kept at a time.

    `max_new_tokens` None stands for a benchmark's own, which whoever knows the benchmark puts in.
    """

    batch_size: int
    max_new_tokens: int | None
    cache_gigabytes: float = 2.0


def answer(
    model: Any,
    reader: Reader,
    examples: Sequence[Example],
    settings: Answering,
    pads: bool = True,
    done: Collection[str] = (),
    save: Callable[[list[Prediction]], None] | None = None,
    progress: Progress = iter,
) -> list[Prediction]:
    """Predictions in the examples' order, without those whose ids are in `done`.

    `save` is given the new predictions of each batch. `pads` False cuts a MobileVLM's images to the square in their
    middle, in place of padding them.
    """
    reader = reader if pads else cutting(reader)
    prompts = [reader.prompt(e.question, e.image is not None) for e in examples]
    images = once_per_image(model, reader, keep=settings.cache_gigabytes > 0)
    blocks = image_blocks(images, examples, prompts, settings.cache_gigabytes)
    said: dict[int, Prediction] = {}
    current = -1
    for block, chunk in progress(plan(examples, prompts, blocks, settings.batch_size)):
        if all(examples[i].id in done for i in chunk):
            continue
        if block != current:
            current = block
            images.hold([image for image, number in blocks.items() if number == block])
        inputs = images.inputs([prompts[i] for i in chunk], [examples[i].image for i in chunk])
        texts = _generate(model, reader, inputs, settings.max_new_tokens)
        new = {
            i: Prediction(examples[i].id, prompts[i], text)
            for i, text in zip(chunk, texts, strict=True)
            if examples[i].id not in done
        }
        said |= new
        if save is not None:
            save(list(new.values()))
    return [said[i] for i in sorted(said)]


def plan(
    examples: Sequence[Example], prompts: Sequence[str], blocks: Mapping[str, int], batch_size: int
) -> list[tuple[int, list[int]]]:
    """(block, indices) a batch; examples without an image come with the first block."""
    members: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        members.setdefault(blocks.get(example.image or "", 0), []).append(index)
    batches = []
    for block, indices in sorted(members.items()):
        order = sorted(indices, key=lambda i: (len(prompts[i]), i))
        batches += [(block, order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    return batches


def image_blocks(
    images: Images, examples: Sequence[Example], prompts: Sequence[str], gigabytes: float
) -> dict[str, int]:
    """Image path to the block in which it is kept encoded; empty where nothing is kept."""
    prompt_of = {e.image: prompt for e, prompt in zip(examples, prompts, strict=True) if e.image}
    paths = list(prompt_of)
    each = images.bytes_each(prompt_of[paths[0]], paths[0]) if paths else 0
    if not each:
        return {}
    held = max(1, int(gigabytes * 1e9 / each))
    return {path: position // held for position, path in enumerate(paths)}


def cutting(reader: ReaderT) -> ReaderT:
    """The reader whose MobileVLM images are cut to the square in their middle, in place of padded."""
    if not isinstance(reader, SplicingReader) or not hasattr(reader.processor, "image_aspect_ratio"):
        return reader  # other families' processors decide for themselves
    processor = copy.copy(reader.processor)
    processor.image_aspect_ratio = "square"
    return replace(reader, processor=processor)


@torch.no_grad()
def _generate(model: Any, reader: Reader, inputs: dict[str, Any], max_new_tokens: int | None) -> list[str]:
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        bos_token_id=reader.tokenizer.bos_token_id,
        pad_token_id=reader.tokenizer.pad_token_id,
        eos_token_id=stop_tokens(model, reader),
    )
    with _alone(model, settings):
        generated = model.generate(**inputs, logits_processor=LogitsProcessorList([_numbers]))
    new = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in reader.tokenizer.batch_decode(new, skip_special_tokens=True)]


@contextmanager
def _alone(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """While the block lasts these settings stand alone.

    transformers puts those of a model's generation_config.json beside whatever a caller gives: penalties, beams, a time
    after which an answer is cut off. Then answers were neither greedy nor the same on every machine.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, base.generation_config = base.generation_config, settings
    try:
        yield
    finally:
        base.generation_config = own


def _numbers(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The logits; NaN would be answered with the vocabulary's first token, as if it had been said."""
    if logits.isnan().any():
        raise CheckpointError(
            "the model's logits are NaN, so there is no answer: a number in its config.json or its processor's files "
            "is wrong, or its weights are too large for this dtype. Put the model's own files in place, or use "
            "dtype=float32"
        )
    return logits


def stop_tokens(model: Any, reader: Reader) -> list[int]:
    """What ends an answer: the tokenizer's end of text, the model's own, and the template's mark if it is one token."""
    own = model.generation_config.eos_token_id
    mark = reader.tokenizer(reader.end, add_special_tokens=False)["input_ids"]
    found = {reader.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    found |= set(mark) if len(mark) == 1 else set()
    return sorted(token for token in found if token is not None)
