"""MobileVLM: a vision tower (CLIP), a lightweight downsample projector, a decoder (LLaMA).

    input_ids ──embed──▶ text embeddings ──────────────▶ masked_scatter ──▶ decoder ──▶ logits, loss
    pixel_values ──tower──▶ patch features ──projector──▶      ▲

`input_ids` already hold `config.image_tokens` copies of `config.image_token_id` for each image, so the
sequence length never changes inside the model. Images are consumed in the order of their placeholders;
a row without placeholders consumes none.

Shapes: B rows of L tokens, n images, N patches, D tower width, C decoder width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from hydra_vlm.models.mobilevlm.configuration import MobileVLMConfig
from hydra_vlm.models.mobilevlm.projector import build_projector
from hydra_vlm.models.mobilevlm.towers import images_at_once, tower_kind


class MobileVLMPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of every MobileVLM model."""

    config: MobileVLMConfig
    config_class = MobileVLMConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class MobileVLMModel(MobileVLMPreTrainedModel):
    """The tower, the projector and the decoder, without the language-modelling head."""

    def __init__(self, config: MobileVLMConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.mm_projector = build_projector(
            config.projector_type, config.vision_config.hidden_size, config.text_config.hidden_size
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Patch features of the selected tower layer, before the projector: [n, 3, H, W] -> [n, N, D].

        Only the blocks up to that layer run. Gradients flow only if some parameter of the tower
        requires them, so freezing the tower is `model.vision_tower.requires_grad_(False)`.
        """
        tower = self.vision_tower
        trained = any(parameter.requires_grad for parameter in tower.parameters())
        kind, layer = tower_kind(self.config.vision_config), self.config.vision_feature_layer
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            if torch.is_grad_enabled():
                return kind.features(tower, pixel_values, layer)
            portions = pixel_values.split(images_at_once(pixel_values))
            return torch.cat([kind.features(tower, portion, layer) for portion in portions])

    def project(self, image_features: Tensor) -> Tensor:
        """Tower features as decoder positions: [n, N, D] -> [n, image_tokens, C]."""
        dtype = next(self.mm_projector.parameters()).dtype
        return self.mm_projector(image_features.to(dtype))

    def embed(self, input_ids: Tensor, image_features: Tensor | None) -> Tensor:
        """Embed [B, L] tokens and put the projected images where their placeholders are: [B, L, C].

        Raises:
            ValueError: the placeholders are not as many as the projected features.
        """
        placeholders = input_ids == self.config.image_token_id
        if image_features is None:
            _require_match(placeholders, (0, 0))
            return self.get_input_embeddings()(input_ids)
        images = self.project(image_features)
        _require_match(placeholders, images.shape[:2])
        # The placeholder may lie outside the vocabulary: look up any token there, it is overwritten.
        text = self.get_input_embeddings()(input_ids.masked_fill(placeholders, 0))
        return text.masked_scatter(placeholders.unsqueeze(-1), images.to(text.dtype))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Decode tokens [B, L] with images as `pixel_values` [n, 3, H, W] or `image_features` [n, N, D].

        `image_features` is what `encode_images` returned; with it the tower does not run.
        `inputs_embeds` [B, L, C], if given, is taken as already spliced.

        Raises:
            ValueError: placeholders and image features differ in number, or the inputs contradict.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if pixel_values is not None and image_features is not None:
            raise ValueError("Give pixel_values or image_features, not both.")
        if pixel_values is not None:
            image_features = self.encode_images(pixel_values)
        # Once decoding has begun, a placeholder can only have been generated: a token like any other.
        decoding = past_key_values is not None and past_key_values.get_seq_length() > 0
        if inputs_embeds is None and decoding and image_features is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        elif input_ids is not None:
            inputs_embeds = self.embed(input_ids, image_features)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )


class MobileVLMForConditionalGeneration(MobileVLMPreTrainedModel, GenerationMixin):
    """MobileVLM with its language-modelling head: training loss and batched generation with a KV cache.

    Batches for `generate` are padded on the left.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MobileVLMConfig) -> None:
        super().__init__(config)
        self.model = MobileVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Patch features of the tower, before the projector: [n, 3, H, W] -> [n, N, D]."""
        return self.model.encode_images(pixel_values)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, L, V] and, given `labels` [B, L] (-100 = not supervised), the next-token loss.

        The loss is the mean over supervised tokens, or their sum over `num_items_in_batch` if that is
        given (what `Trainer` passes so that accumulated micro-batches weigh every token alike).
        `logits_to_keep` k > 0 computes logits for the last k positions only.
        Image arguments are those of `MobileVLMModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_features=image_features,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Pass the images with the prompt only; with a cache, later steps have nothing to splice."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        if kwargs.get("use_cache", True) and not kwargs.get("is_first_iteration", False):
            inputs.pop("pixel_values", None)
            inputs.pop("image_features", None)
        return inputs


def _require_match(placeholders: Tensor, images: Sequence[int]) -> None:
    """Check that the placeholders [B, L] are as many as the features of `images` = (n, tokens each)."""
    count = int(placeholders.sum())
    n_images, tokens = images
    if count != n_images * tokens:
        raise ValueError(
            f"input_ids hold {count} image placeholders, but {n_images} images fill {n_images * tokens}: "
            "write config.image_tokens placeholders for every image passed."
        )
