"""LDP and LDPv2: the authors' parameter names and counts, and their formulas recomputed by hand."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hydra_vlm.models.mobilevlm.projector import LDPNet, LDPNetV2, build_projector

torch.set_num_threads(1)

COUNTS = [
    ("ldpnet", 2048, 18_936_832),
    ("ldpnet", 2560, 28_913_920),
    ("ldpnetv2", 2048, 6_316_032),
    ("ldpnetv2", 2560, 9_205_760),
]


@pytest.mark.parametrize(("projector_type", "width", "count"), COUNTS)
def test_parameter_count_of_the_published_sizes(projector_type: str, width: int, count: int) -> None:
    with torch.device("meta"):
        projector = build_projector(projector_type, 1024, width)
    assert sum(parameter.numel() for parameter in projector.parameters()) == count


def test_ldp_has_the_authors_keys() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LDPNet(1024, 2048).state_dict().items()}
    expected: dict[str, tuple[int, ...]] = {
        "model.mlp.1.weight": (2048, 1024),
        "model.mlp.1.bias": (2048,),
        "model.mlp.3.weight": (2048, 2048),
        "model.mlp.3.bias": (2048,),
    }
    for number in (1, 2):
        block = f"model.mb_block.{number}.block"
        expected |= {
            f"{block}.0.0.weight": (2048, 1, 3, 3),
            f"{block}.0.1.weight": (2048,),
            f"{block}.0.1.bias": (2048,),
            f"{block}.1.fc1.weight": (512, 2048, 1, 1),
            f"{block}.1.fc1.bias": (512,),
            f"{block}.1.fc2.weight": (2048, 512, 1, 1),
            f"{block}.1.fc2.bias": (2048,),
            f"{block}.2.0.weight": (2048, 2048, 1, 1),
            f"{block}.2.1.weight": (2048,),
            f"{block}.2.1.bias": (2048,),
        }
    assert shapes == expected


def test_ldpv2_has_the_authors_keys() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LDPNetV2(1024, 2048).state_dict().items()}
    assert shapes == {
        "mlp.mlp.0.weight": (2048, 1024),
        "mlp.mlp.0.bias": (2048,),
        "mlp.mlp.2.weight": (2048, 2048),
        "mlp.mlp.2.bias": (2048,),
        "peg.peg.0.weight": (2048, 1, 3, 3),
        "peg.peg.0.bias": (2048,),
    }


@pytest.mark.parametrize("projector_type", ["ldpnet", "ldpnetv2"])
@pytest.mark.parametrize(("patches", "tokens"), [(576, 144), (64, 16), (4, 1), (196, 49)])
def test_a_quarter_of_the_patches_remains(projector_type: str, patches: int, tokens: int) -> None:
    projected = build_projector(projector_type, 6, 16)(torch.randn(2, patches, 6))
    assert projected.shape == (2, tokens, 16)


@pytest.mark.parametrize("projector_type", ["ldpnet", "ldpnetv2"])
@pytest.mark.parametrize("patches", [1, 63, 65, 577])
def test_patches_off_a_square_grid_are_refused(projector_type: str, patches: int) -> None:
    with pytest.raises(ValueError, match=f"square grid .* got {patches} patches"):
        build_projector(projector_type, 6, 16)(torch.randn(1, patches, 6))


def test_unknown_projector_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'linear' is unknown: use one of ldpnetv2, ldpnet"):
        build_projector("linear", 6, 16)


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def _depthwise(grid: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """A 3 x 3 depthwise convolution as nine shifted products; grid [B, H, W, C], weight [C, 1, 3, 3]."""
    _, height, width, _ = grid.shape
    padded = functional.pad(grid, (0, 0, 1, 1, 1, 1))
    total = torch.zeros_like(grid)
    for row in range(3):
        for column in range(3):
            total += padded[:, row : row + height, column : column + width] * weight[:, 0, row, column]
    return total[:, ::stride, ::stride]


def _channel_norm(grid: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = grid - grid.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def _randomised(projector: torch.nn.Module) -> dict[str, Tensor]:
    """Give every parameter, norms and biases too, a random value; the state as a dict."""
    torch.manual_seed(0)
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return {name: tensor.detach() for name, tensor in projector.state_dict().items()}


def test_ldpv2_formula() -> None:
    projector = LDPNetV2(6, 16).double()
    state = _randomised(projector)
    features = torch.randn(2, 36, 6, dtype=torch.float64)

    hidden = _gelu(features @ state["mlp.mlp.0.weight"].T + state["mlp.mlp.0.bias"])
    grid = (hidden @ state["mlp.mlp.2.weight"].T + state["mlp.mlp.2.bias"]).reshape(2, 6, 6, 16)
    pooled = (grid[:, ::2, ::2] + grid[:, 1::2, ::2] + grid[:, ::2, 1::2] + grid[:, 1::2, 1::2]) / 4
    expected = pooled + _depthwise(pooled, state["peg.peg.0.weight"]) + state["peg.peg.0.bias"]

    torch.testing.assert_close(projector(features), expected.reshape(2, 9, 16), atol=1e-12, rtol=1e-12)


def _inverted_residual(grid: Tensor, state: dict[str, Tensor], block: str, stride: int) -> Tensor:
    x = _depthwise(grid, state[f"{block}.0.0.weight"], stride)
    x = _channel_norm(x, state[f"{block}.0.1.weight"], state[f"{block}.0.1.bias"])
    x = x * (x + 3).clamp(0, 6) / 6
    squeezed = x.mean(dim=(1, 2)) @ state[f"{block}.1.fc1.weight"][:, :, 0, 0].T + state[f"{block}.1.fc1.bias"]
    gate = squeezed.clamp(min=0) @ state[f"{block}.1.fc2.weight"][:, :, 0, 0].T + state[f"{block}.1.fc2.bias"]
    x = x * ((gate + 3).clamp(0, 6) / 6)[:, None, None]
    x = x @ state[f"{block}.2.0.weight"][:, :, 0, 0].T
    return _channel_norm(x, state[f"{block}.2.1.weight"], state[f"{block}.2.1.bias"])


def test_ldp_formula() -> None:
    projector = LDPNet(6, 48).double()
    state = _randomised(projector)
    assert state["model.mb_block.1.block.1.fc1.weight"].shape[0] == 16  # 48 // 4 = 12, made divisible by 8
    features = torch.randn(2, 36, 6, dtype=torch.float64)

    hidden = _gelu(features @ state["model.mlp.1.weight"].T + state["model.mlp.1.bias"])
    grid = (hidden @ state["model.mlp.3.weight"].T + state["model.mlp.3.bias"]).reshape(2, 6, 6, 48)
    grid = grid + _inverted_residual(grid, state, "model.mb_block.1.block", stride=1)
    grid = _inverted_residual(grid, state, "model.mb_block.2.block", stride=2)

    torch.testing.assert_close(projector(features), grid.reshape(2, 9, 48), atol=1e-10, rtol=1e-10)
