"""Batched greedy answers with a KV cache; knows nothing of scoring."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hydra_vlm.benchmarks.protocol import Example, Prediction
from hydra_vlm.data.readers import Reader


def answer(
    model: Any,
    reader: Reader,
    examples: Sequence[Example],
    batch_size: int,
    max_new_tokens: int,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> list[Prediction]:
    """One prediction an example, in the examples' order; batches hold questions of similar length."""
    prompts = [reader.prompt(e.question, e.image is not None) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: (len(prompts[i]), i))
    said: dict[int, str] = {}
    for chunk in progress([order[i : i + batch_size] for i in range(0, len(order), batch_size)]):
        inputs = reader.prompts([prompts[i] for i in chunk], [examples[i].image for i in chunk])
        said.update(zip(chunk, _generate(model, reader, inputs, max_new_tokens), strict=True))
    return [Prediction(e.id, prompts[i], said[i]) for i, e in enumerate(examples)]


@torch.no_grad()
def _generate(model: Any, reader: Reader, inputs: dict[str, Tensor], max_new_tokens: int) -> list[str]:
    place = next(model.parameters())
    generated = model.generate(
        **{k: v.to(place.device, place.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=reader.tokenizer.pad_token_id,
        eos_token_id=stop_tokens(model, reader),
    )
    new = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in reader.tokenizer.batch_decode(new, skip_special_tokens=True)]


def stop_tokens(model: Any, reader: Reader) -> list[int]:
    """What ends an answer: the tokenizer's end of text, the model's own, and the template's mark if it is one token."""
    own = model.generation_config.eos_token_id
    mark = reader.tokenizer(reader.end, add_special_tokens=False)["input_ids"]
    found = {reader.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    found |= set(mark) if len(mark) == 1 else set()
    return sorted(token for token in found if token is not None)
