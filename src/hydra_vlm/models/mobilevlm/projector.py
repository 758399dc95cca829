"""The lightweight downsample projectors of MobileVLM, in plain PyTorch.

LDP (v1) and LDPv2 turn the tower's patch features into a quarter as many decoder positions. Module
names are chosen so that parameters carry exactly the names of the authors' checkpoints, for example
`model.mb_block.1.block.0.0.weight` (LDP) and `peg.peg.0.weight` (LDPv2).

Shapes: B images, N = side * side patches (row-major), D tower width, C decoder width.
"""

from math import isqrt

from torch import Tensor, nn
from torch.nn import functional


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each cell of a [B, C, H, W] map."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate in [0, 1] computed from the mean of every channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = _divisible_by_8(channels // 4)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = functional.relu(self.fc1(x.mean(dim=(2, 3), keepdim=True)))
        return x * functional.hardsigmoid(self.fc2(gate))


class InvertedResidual(nn.Module):
    """MobileNetV3's block without expansion: depthwise 3 x 3, squeeze and excite, pointwise."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.residual = stride == 1
        self.block = nn.Sequential(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
                LayerNorm2d(channels),
                nn.Hardswish(),
            ),
            SqueezeExcitation(channels),
            nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), LayerNorm2d(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class LDPNet(nn.Module):
    """LDP, the projector of MobileVLM v1: two linear layers, two inverted residuals (the second of stride 2).

    18,936,832 parameters for D = 1024 and C = 2048.
    """

    def __init__(self, vision_hidden: int, text_hidden: int) -> None:
        super().__init__()
        mlp = nn.Sequential(
            nn.Identity(),
            nn.Linear(vision_hidden, text_hidden),
            nn.GELU(),
            nn.Linear(text_hidden, text_hidden),
        )
        mb_block = nn.Sequential(
            nn.Identity(), InvertedResidual(text_hidden, stride=1), InvertedResidual(text_hidden, stride=2)
        )
        self.model = nn.ModuleDict({"mlp": mlp, "mb_block": mb_block})

    def forward(self, features: Tensor) -> Tensor:
        """Project [B, N, D] to [B, ceil(side / 2) ** 2, C].

        Raises:
            ValueError: N is not a square.
        """
        return _to_tokens(self.model["mb_block"](_to_grid(self.model["mlp"](features))))


class LDPNetV2(nn.Module):
    """LDPv2, the projector of MobileVLM V2: two linear layers, mean pooling, a depthwise positional residual.

    6,316,032 parameters for D = 1024 and C = 2048.
    """

    def __init__(self, vision_hidden: int, text_hidden: int) -> None:
        super().__init__()
        mlp = nn.Sequential(nn.Linear(vision_hidden, text_hidden), nn.GELU(), nn.Linear(text_hidden, text_hidden))
        peg = nn.Sequential(nn.Conv2d(text_hidden, text_hidden, 3, padding=1, groups=text_hidden))
        self.mlp = nn.ModuleDict({"mlp": mlp})
        self.peg = nn.ModuleDict({"peg": peg})

    def forward(self, features: Tensor) -> Tensor:
        """Project [B, N, D] to [B, (side // 2) ** 2, C].

        Raises:
            ValueError: N is not a square.
        """
        grid = _to_grid(self.mlp["mlp"](features))
        # The authors pool to 12 x 12; half the side is the same for their 24 x 24 grid and serves any other.
        pooled = functional.adaptive_avg_pool2d(grid, grid.shape[-1] // 2)
        return _to_tokens(pooled + self.peg["peg"](pooled))


PROJECTORS: dict[str, type[LDPNet] | type[LDPNetV2]] = {"ldpnetv2": LDPNetV2, "ldpnet": LDPNet}


def build_projector(projector_type: str, vision_hidden: int, text_hidden: int) -> LDPNet | LDPNetV2:
    """Build the projector that a configuration names, from tower width to decoder width.

    Raises:
        ValueError: no projector has that name.
    """
    if projector_type not in PROJECTORS:
        raise ValueError(f"projector_type {projector_type!r} is unknown: use one of {', '.join(PROJECTORS)}.")
    return PROJECTORS[projector_type](vision_hidden, text_hidden)


def _to_grid(tokens: Tensor) -> Tensor:
    """[B, side * side, C] -> [B, C, side, side]."""
    batch, count, channels = tokens.shape
    side = isqrt(count)
    if side * side != count or side < 2:
        raise ValueError(
            f"The projector needs a square grid of at least 2 x 2 patches, got {count} patches: "
            "pass the tower's patch features without the class token."
        )
    return tokens.transpose(1, 2).reshape(batch, channels, side, side)


def _to_tokens(grid: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H * W, C]."""
    return grid.flatten(2).transpose(1, 2)


def _divisible_by_8(width: int) -> int:
    """Round to a multiple of 8, never below nine tenths of the width (MobileNetV3's rule)."""
    rounded = max(8, (width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded
