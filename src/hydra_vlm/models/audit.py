"""What of a model is adapted, what is trained whole and what is frozen, part by part."""

from torch import nn

from hydra_vlm.models.structure import ModelParts

COLUMNS = ("part", "module", "modules adapted", "LoRA", "trained whole", "frozen")


def adaptation_summary(model: nn.Module, parts: ModelParts) -> str:
    """A table of parameters, one line for each part, and what LoRA leaves out; `model` may be bare or wrapped by PEFT.

    A part within another (a projector inside the tower, the layers inside the decoder) is counted by itself; what lies
    in no part, such as the output head, is "other".
    """
    paths = {
        "vision tower": parts.tower,
        "projector": parts.projector,
        "decoder layers": parts.layers,
        "rest of decoder": parts.decoder,
    }
    known = {part: path for part, path in paths.items() if path is not None}
    counts = {part: [0, 0, 0, 0] for part in (*known, "other")}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.")
        count = counts[_part(name, known)]
        if ".lora_" in name:
            count[0] += ".lora_A." in name
            count[1] += parameter.numel()
        else:
            count[2 if parameter.requires_grad else 3] += parameter.numel()
    present = {part: count for part, count in counts.items() if any(count)}
    present["total"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    rows = [[part, known.get(part, ""), *(f"{n:,}" for n in count)] for part, count in present.items()]
    return "\n".join([_aligned([list(COLUMNS), *rows]), *parts.graph.notes])


def _part(name: str, paths: dict[str, str]) -> str:
    """The innermost part that a parameter belongs to."""
    owners = [part for part, path in paths.items() if not path or name.startswith(f"{path}.")]
    return max(owners, key=lambda part: len(paths[part]), default="other")


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = (
        [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    )
    return "\n".join("  ".join(cells).rstrip() for cells in lines)
