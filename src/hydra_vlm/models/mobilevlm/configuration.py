"""The configuration of a MobileVLM: a vision tower, a projector, a decoder; published ones have CLIP and LLaMA."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from hydra_vlm.models.mobilevlm.towers import grid_side

# The tower of every published MobileVLM: openai/clip-vit-large-patch14-336.
_CLIP_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


@strict
class MobileVLMConfig(PreTrainedConfig):
    """What a MobileVLM is made of.

    `image_token_id` marks the positions that image features fill; it need not be in the vocabulary
    (the authors' 32,000 tokens have none, so the default is the first id after them).
    `vision_feature_layer` indexes the tower's hidden states, where 0 is the embedding and -1 the last
    block; the authors use -2, a convolutional tower has -1 alone. `image_aspect_ratio` "pad" squares an
    image before it is resized, "square" crops its middle.
    """

    model_type = "mobilevlm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vision_config": SubConfigSpec(AutoConfig, model_type="clip_vision_model", init_kwargs=_CLIP_LARGE_336),
        "text_config": SubConfigSpec(AutoConfig, model_type="llama"),
    }

    vision_config: Any = None  # a dict becomes the configuration of its `model_type`, by default CLIP's
    text_config: Any = None  # likewise, by default LLaMA's
    projector_type: Literal["ldpnetv2", "ldpnet"] = "ldpnetv2"
    vision_feature_layer: int = -2
    image_token_id: int = 32000
    image_aspect_ratio: Literal["pad", "square"] = "pad"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # A decoder that ties its head says so in its own configuration; the head is ours, so we must know.
        self.tie_word_embeddings = self.tie_word_embeddings or bool(
            getattr(self.text_config, "tie_word_embeddings", False)
        )

    @property
    def image_tokens(self) -> int:
        """Decoder positions that one image takes: the patch grid with each side halved, 144 for 24 x 24.

        LDP's stride-2 convolution rounds an odd side up, LDPv2's pooling rounds it down.
        """
        side = grid_side(self.vision_config)
        return (side // 2 if self.projector_type == "ldpnetv2" else (side + 1) // 2) ** 2
