"""MobileVLM (v1 and V2) in the form transformers 5 expects, registered with its Auto classes.

Importing this package is what makes `AutoConfig`, `AutoModel`, `AutoModelForImageTextToText` and
`AutoProcessor` understand `model_type: mobilevlm`; importing it again changes nothing.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from hydra_vlm.models.mobilevlm.configuration import MobileVLMConfig
from hydra_vlm.models.mobilevlm.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel
from hydra_vlm.models.mobilevlm.modeling import (
    MobileVLMForConditionalGeneration,
    MobileVLMModel,
    MobileVLMPreTrainedModel,
)
from hydra_vlm.models.mobilevlm.processing import MobileVLMProcessor, pad_to_square
from hydra_vlm.models.mobilevlm.projector import LDPNet, LDPNetV2, build_projector

AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
AutoConfig.register(MobileVLMConfig.model_type, MobileVLMConfig, exist_ok=True)
AutoModel.register(MobileVLMConfig, MobileVLMModel, exist_ok=True)
AutoModelForImageTextToText.register(MobileVLMConfig, MobileVLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MobileVLMConfig, MobileVLMProcessor, exist_ok=True)

__all__ = [
    "EfficientNetLiteConfig",
    "EfficientNetLiteModel",
    "LDPNet",
    "LDPNetV2",
    "MobileVLMConfig",
    "MobileVLMForConditionalGeneration",
    "MobileVLMModel",
    "MobileVLMPreTrainedModel",
    "MobileVLMProcessor",
    "build_projector",
    "pad_to_square",
]
