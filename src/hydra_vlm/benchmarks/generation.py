"""Batched greedy answers with a KV cache; knows nothing of scoring."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hydra_vlm.benchmarks.protocol import Example, Prediction
from hydra_vlm.data.features import image_inputs
from hydra_vlm.data.templates import Template, prompt


def answer(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    form: Template,
    batch_size: int,
    max_new_tokens: int,
    features: Mapping[str, Tensor] | None = None,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> list[Prediction]:
    """One prediction an example, in the examples' order; batches hold questions of similar length."""
    prompts = [prompt(form, e.question, e.image is not None) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: (len(prompts[i]), i))
    said: dict[int, str] = {}
    for chunk in progress([order[i : i + batch_size] for i in range(0, len(order), batch_size)]):
        images = [path for i in chunk if (path := examples[i].image)]
        texts = _generate(
            model,
            processor,
            [prompts[i] for i in chunk],
            image_inputs(images, features, processor),
            max_new_tokens,
        )
        said.update(zip(chunk, texts, strict=True))
    return [Prediction(e.id, prompts[i], said[i]) for i, e in enumerate(examples)]


@torch.no_grad()
def _generate(
    model: Any, processor: Any, prompts: list[str], images: dict[str, Tensor], max_new_tokens: int
) -> list[str]:
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token or ""
    inputs = tokenizer(
        [bos + processor.expand(text) for text in prompts],
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    place = next(model.parameters()).device
    ids, mask = inputs["input_ids"].to(place), inputs["attention_mask"].to(place)
    generated = model.generate(
        input_ids=ids,
        attention_mask=mask,
        **{name: value.to(place) for name, value in images.items()},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return [text.strip() for text in tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)]
