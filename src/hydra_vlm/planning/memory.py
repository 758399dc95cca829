"""Bytes at the peak of a training step, of validation and of generation, from plain numbers. No torch.

What autograd keeps of one layer with LoRA on a frozen base, per position (float32, eager attention; elements):

    two norms      2 C      their inputs (float32 always), with one factor each
    LoRA inputs    C + Hd + C + F, which q, k, v share, o, gate and up share, down; plus the ranks
    attention      3 Hd + H L    q, k, v, and the probabilities; fused attention keeps 2 H in place of H L
    feed-forward   3 F      gate, its activation, up (2 F less where there is no gate)

Under autocast, or where weights are in bfloat16, each adapted linear keeps an input of its own, since PEFT casts it for
the adapter; and autocast keeps bfloat16 copies of frozen float32 weights until the backward pass.
"""

from collections.abc import Iterable

from hydra_vlm.planning.shapes import Batch, Layer, Linear, Manner, Memory, Shape, Stack

FLOAT = 4
ADAM = {"adamw": 8.0, "adamw-8bit": 2.0, "paged-adamw-8bit": 2.0}
"""Optimizer bytes a trained parameter; eight-bit states have a scale every 256 values, which 2 bytes leave out."""
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a four-bit weight: half a byte, an eight-bit scale for 64 weights, a float32 one for 256 scales (Dettmers et
al. 2023, double quantisation)."""


MOST_SUPERVISED = 0.75
"""Above this share of supervised positions training computes them all (`training.supervised`)."""


ENDS = {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2"}
"""What the last layer computes at supervised positions alone, where that is asked for."""


def is_end(linear: Linear) -> bool:
    """Whether a linear of the last layer is computed at supervised positions alone, where that is asked for."""
    return linear.component.rpartition(".")[2] in ENDS


def saved_by_layer(
    stack: Stack, layer: Layer, batch: Batch, how: Manner, full: bool = False, end: int | None = None
) -> int:
    """Bytes that autograd keeps of one layer for its backward pass; `full` where all of the layer is trained.

    `end` is the number of positions that reach the end of the last layer (None: all, as in the others).
    """
    product = how.product
    own = product if how.autocast else FLOAT if how.weight < FLOAT else 0

    def of_linears(linears: Iterable[Linear]) -> int:
        """Inputs, and LoRA's inner values, of a position."""
        adapted = [p for p in linears if p.rank or full]
        ranks = (product if how.autocast else FLOAT) * sum(p.rank for p in adapted)
        if own:
            return own * sum(p.inputs for p in adapted) + ranks
        return FLOAT * sum({(p.inputs, _source(p.component)): p.inputs for p in adapted}.values()) + ranks

    norms = 2 * FLOAT * (stack.width + 1) + (2 * how.weight * stack.width if full else 0)
    attention = 3 * product * stack.attention
    if how.attention == "eager":
        attention += stack.heads * batch.length * (FLOAT + (product if product < FLOAT else 0))
    else:
        copies_result = own or batch.packed is not None
        attention += 2 * FLOAT * stack.heads + (product * stack.attention if copies_result else 0)
    between = product * _feed_forward(stack, layer)
    if end is None:
        values = batch.padded * attention + batch.positions * (norms + of_linears(layer) + between)
    else:
        ends = [p for p in layer if is_end(p)]
        kept = norms + of_linears(p for p in layer if not is_end(p))
        values = batch.padded * attention + batch.positions * kept + end * (of_linears(ends) + between)
    copies = 2 * sum(p.weights for p in layer) if how.autocast and how.weight == FLOAT and not how.four_bits else 0
    adapter_copies = 2 * sum(p.rank * (p.inputs + p.outputs) for p in layer) if how.autocast else 0
    return int(values) + copies + adapter_copies


def _source(component: str) -> str:
    """Which linears read the same tensor: by the usual names; an unknown one reads its own."""
    name = component.rpartition(".")[2]
    if name in ("q_proj", "k_proj", "v_proj"):
        return "attention"
    return "feed-forward" if name in ("gate_proj", "up_proj") else name


def _is_gated(layer: Layer) -> bool:
    return any("gate" in p.component for p in layer)


def _feed_forward(stack: Stack, layer: Layer) -> int:
    """Values a position between the feed-forward's linears that autograd keeps beside its last linear's input."""
    widest = max((p.outputs for p in layer if "qkv" not in p.component), default=0)
    return (3 if _is_gated(layer) else 1) * (widest if widest > stack.width else 0)


def backward_of_layer(stack: Stack, layer: Layer, batch: Batch, how: Manner) -> int:
    """Bytes that come and go in one layer's backward pass: gradients of probabilities, or of the feed-forward."""
    wide = max(p.outputs for p in layer)
    # Of three gradients as wide as the feed-forward, the first has its room from the last linear's input.
    gradients = batch.positions * (2 * how.product * wide + 2 * how.weight * stack.width)
    probabilities = 2 * FLOAT * batch.rows * stack.heads * batch.length**2 if how.attention == "eager" else 0
    dequantized = max(p.weights for p in layer) * how.product if how.four_bits else 0
    return max(gradients, probabilities + 2 * how.weight * batch.positions * stack.width) + dequantized


def forward_of_layer(stack: Stack, layer: Layer, batch: Batch, how: Manner) -> int:
    """Bytes that come and go in one layer without a graph: the residual stream with the wider of the two halves."""
    wide = max(p.outputs for p in layer)
    halves = [3 * how.product * wide * batch.positions]
    if how.attention == "eager":
        each = 2 * FLOAT if how.product == FLOAT else FLOAT + how.product
        halves.append(
            each * batch.rows * stack.heads * batch.length**2 + 3 * how.product * batch.padded * stack.attention
        )
    dequantized = max(p.weights for p in layer) * how.product if how.four_bits else 0
    return max(halves) + 3 * how.weight * batch.positions * stack.width + dequantized


def mask_of(batch: Batch, how: Manner) -> int:
    """Bytes of a mask for eager attention: one for all rows where they are packed, since padding is behind all else."""
    rows = batch.rows if batch.packed is None else 1
    return how.weight * rows * batch.length**2 if how.attention == "eager" else 0


def head_positions(batch: Batch, how: Manner) -> int:
    """Positions whose logits a training step or a validation batch computes."""
    few = batch.supervised <= MOST_SUPERVISED * batch.padded
    return batch.supervised if how.supervised_only and few else batch.padded


def weights(shape: Shape, how: Manner, trained_projector: bool) -> Memory:
    """The model itself, by part: frozen weights in their type, a trained projector in float32."""
    sizes: dict[str, int] = {}
    for part, count in shape.parameters.items():
        if part == "decoder" and how.four_bits:
            sizes["weights: decoder, 4 bits"] = int(shape.quantizable * NF4 + (count - shape.quantizable) * how.weight)
        else:
            size = FLOAT if part == "projector" and trained_projector else how.weight
            sizes[f"weights: {part}"] = count * size
    sizes["weights: adapter"] = FLOAT * shape.adapter
    return Memory({name: size for name, size in sizes.items() if size})


def trained_count(shape: Shape, full: bool, trained_projector: bool) -> int:
    """Parameters that a run trains."""
    base = shape.parameters.get("decoder", 0) + shape.parameters.get("embeddings", 0) + shape.parameters.get("head", 0)
    return (base if full else shape.adapter) + (shape.projector.parameters if trained_projector else 0)


def training_step(
    shape: Shape, batch: Batch, how: Manner, full: bool = False, trained_projector: bool = True
) -> Memory:
    """The peak of a training step: at the loss, or in the last layer's backward pass, whichever takes more."""
    trained = trained_count(shape, full, trained_projector)
    *others, last = shape.decoder.layers
    layers = [saved_by_layer(shape.decoder, layer, batch, how, full) for layer in others]
    few = head_positions(batch, how)
    layers.append(saved_by_layer(shape.decoder, last, batch, how, full, few if few < batch.positions else None))
    layers += tower_saved(shape, batch, how)
    head = few * shape.vocabulary * 3 * FLOAT
    backward = backward_of_layer(shape.decoder, last, batch, how)
    stream = how.weight * batch.positions * shape.decoder.width
    again = max(layers) - stream if how.checkpointing else 0  # a layer's input is kept in any case
    at_loss = head > backward + again
    if how.checkpointing:
        inputs = 0 if how.offload else stream * len(shape.decoder.layers)
        kept = {"layer inputs": inputs, "one layer, computed again": 0 if at_loss else again}
    else:
        kept = {"activations": sum(layers)}
    top = {"logits and their gradients": head} if at_loss else {"backward of one layer": backward}
    ends = FLOAT * batch.positions * shape.decoder.width  # embeddings
    if at_loss or not how.checkpointing:
        ends += 2 * stream  # the last norm and its output
    mask = mask_of(batch, how)
    width = how.weight if full else FLOAT  # adapters are float32; what is trained of the base is in its own type
    adam = min(ADAM[how.optimizer], 2.0 * width)
    states = {"gradients": width * trained, "optimizer states": int(adam * trained)}
    images = {"projector activations": shape.projector.saved * batch.images} if trained_projector else {}
    return (
        weights(shape, how, trained_projector)
        + Memory(states)
        + Memory({**kept, **images, "embeddings, mask, last norm": ends + mask, **top})
        + images_of(shape, batch, how)
    )


def tower_saved(shape: Shape, batch: Batch, how: Manner) -> list[int]:
    """What autograd keeps of each layer of a tower that LoRA reaches."""
    stack = shape.tower_stack
    if stack is None or not any(p.rank for layer in stack.layers for p in layer):
        return []
    images = Batch(batch.images, shape.patches, 0, 0)
    return [saved_by_layer(stack, layer, images, how) for layer in stack.layers]


def images_of(shape: Shape, batch: Batch, how: Manner) -> Memory:
    """The images of a batch as the model is given them."""
    each = shape.tower.features * how.weight // FLOAT if shape.tower.is_cached else shape.tower.pixels
    return Memory({"images of the batch": each * batch.images} if each and batch.images else {})


def validation_step(shape: Shape, batch: Batch, how: Manner, trained_projector: bool = True) -> Memory:
    """The peak of a validation batch: no graph, but logits, and the optimizer's states still there."""
    trained = trained_count(shape, False, trained_projector)
    head = head_positions(batch, how) * shape.vocabulary * (2 * FLOAT + (2 if how.product < FLOAT else 0))
    forward = forward_of_layer(shape.decoder, shape.decoder.layers[-1], batch, how)
    top = {"logits": head} if head > forward else {"forward of one layer": forward}
    stream = 2 * how.weight * batch.positions * shape.decoder.width
    mask = mask_of(batch, how)
    rest = {"optimizer states": int(ADAM[how.optimizer] * trained), "hidden states, mask": stream + mask, **top}
    return weights(shape, how, trained_projector) + Memory(rest) + images_of(shape, batch, how)


def generation(shape: Shape, batch: Batch, new_tokens: int, how: Manner) -> Memory:
    """The peak of answering a batch: the prompts' forward pass, or the end of the longest answer."""
    stack = shape.decoder
    per_token = 2 * len(stack.layers) * stack.kv_heads * stack.head_width * how.weight
    prompt, grown = per_token * batch.positions, per_token * batch.rows * (batch.length + new_tokens)
    plain = Manner(weight=how.weight, attention=how.attention, four_bits=how.four_bits)
    forward = forward_of_layer(stack, stack.layers[-1], batch, plain)
    forward += how.weight * batch.rows * batch.length**2 if how.attention == "eager" else 0
    logits = batch.rows * shape.vocabulary * 3 * FLOAT
    one_layer = grown // len(stack.layers)  # a layer's cache is copied when it grows
    at_prompt = {"keys and values": prompt, "forward of one layer": forward + logits}
    at_end = {"keys and values": grown, "one layer's cache, growing": one_layer + logits}
    top = max(at_prompt, at_end, key=lambda parts: sum(parts.values()))
    return weights(shape, how, True) + Memory(top) + images_of(shape, batch, how)
