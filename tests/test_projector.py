"""LDP and LDPv2: the authors' parameter names and counts, and their formulas recomputed by hand."""

import pytest
import torch
from torch import Tensor

from hydra_vlm.models.mobilevlm.projector import LDPNet, LDPNetV2, build_projector
from plain_mobilevlm import ldp, ldpv2

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
    torch.testing.assert_close(projector(features), ldpv2(features, state), atol=1e-12, rtol=1e-12)


def test_ldp_formula() -> None:
    projector = LDPNet(6, 48).double()
    state = _randomised(projector)
    assert state["model.mb_block.1.block.1.fc1.weight"].shape[0] == 16  # 48 // 4 = 12, made divisible by 8
    features = torch.randn(2, 36, 6, dtype=torch.float64)
    torch.testing.assert_close(projector(features), ldp(features, state), atol=1e-10, rtol=1e-10)
