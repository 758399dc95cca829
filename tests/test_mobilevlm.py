"""MobileVLM as a transformers model: splicing, loss, generation, saving."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig

import hydra_vlm.models.mobilevlm
from hydra_vlm.models.mobilevlm import (
    MobileVLMConfig,
    MobileVLMForConditionalGeneration,
    MobileVLMModel,
    towers,
)
from tolerances import assert_same_sums

PAD, BOS, EOS, VOCAB, IMAGE = 0, 1, 2, 60, 59


def tiny_config(**overrides: Any) -> MobileVLMConfig:
    """A 32 px image in 4 x 4 patches, so 4 positions an image; two decoder layers."""
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "initializer_range": 0.3,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    arguments = {"text_config": text, "vision_config": vision, "image_token_id": IMAGE, **overrides}
    return MobileVLMConfig(**arguments)


def tiny_model(**overrides: Any) -> MobileVLMForConditionalGeneration:
    torch.manual_seed(0)
    model = MobileVLMForConditionalGeneration(tiny_config(**overrides)).eval()
    for parameter in model.model.mm_projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # images must matter to the logits
    return model


@pytest.fixture(scope="module")
def model() -> MobileVLMForConditionalGeneration:
    return tiny_model()


def test_a_frozen_tower_sees_few_images_at_once_on_a_cpu(
    model: MobileVLMForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    hook = model.model.vision_tower.embeddings.register_forward_hook(lambda _, __, output: sizes.append(len(output)))
    pixels = torch.randn(5, 3, 32, 32)
    monkeypatch.setattr(towers, "PIXELS_AT_ONCE", 2 * 32 * 32 // torch.get_num_threads() + 1)
    whole = model.encode_images(pixels)  # its parameters are open, so there is a graph
    with torch.no_grad():
        torch.testing.assert_close(model.encode_images(pixels), whole)
    hook.remove()
    assert sizes == [5, 2, 2, 1]


def rows(*prompts: list[int], images: int = 4, side: str = "left") -> dict[str, Tensor]:
    """Pad prompts to one length; IMAGE stands for one image and becomes `images` placeholders."""
    expanded = [[t for token in p for t in ([IMAGE] * images if token == IMAGE else [token])] for p in prompts]
    length = max(map(len, expanded))
    gaps = [[PAD] * (length - len(row)) for row in expanded]
    left = side == "left"
    pairs = list(zip(expanded, gaps, strict=True))
    ids = torch.tensor([gap + row if left else row + gap for row, gap in pairs])
    mask = torch.tensor(
        [[0] * len(gap) + [1] * len(row) if left else [1] * len(row) + [0] * len(gap) for row, gap in pairs]
    )
    return {"input_ids": ids, "attention_mask": mask}


PROMPTS = ([BOS, IMAGE, 7, 8], [BOS, 9, 10, 11, 12, 13], [BOS, 5, 6, IMAGE, 7, 9, 4, 3])


def test_config_builds_its_parts_and_counts_positions() -> None:
    published = MobileVLMConfig()
    assert isinstance(published.vision_config, CLIPVisionConfig)
    assert isinstance(published.text_config, LlamaConfig)
    assert published.vision_config.hidden_size == 1024
    assert published.image_tokens == 144
    odd = CLIPVisionConfig(image_size=40, patch_size=8)
    assert MobileVLMConfig(vision_config=odd).image_tokens == 4
    assert MobileVLMConfig(vision_config=odd, projector_type="ldpnet").image_tokens == 9


def test_config_refuses_values_it_does_not_know() -> None:
    with pytest.raises(Exception, match="projector_type"):
        MobileVLMConfig(projector_type="linear")  # type: ignore[arg-type]


def test_config_survives_json(tmp_path: Path) -> None:
    config = tiny_config(projector_type="ldpnet", image_aspect_ratio="square", vision_feature_layer=-1)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MobileVLMConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.vision_config.patch_size == 8


def test_registration_may_be_repeated() -> None:
    importlib.reload(hydra_vlm.models.mobilevlm)
    config = tiny_config()
    assert isinstance(AutoModel.from_config(config), MobileVLMModel)
    assert isinstance(AutoModelForImageTextToText.from_config(config), MobileVLMForConditionalGeneration)


@pytest.mark.parametrize("projector_type", ["ldpnetv2", "ldpnet"])
def test_parts_carry_the_names_the_project_relies_on(projector_type: str) -> None:
    model = tiny_model(projector_type=projector_type)
    assert model.get_decoder() is model.model.language_model
    assert model.get_input_embeddings() is model.model.language_model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    first = {"ldpnetv2": "mlp.mlp.0.weight", "ldpnet": "model.mlp.1.weight"}[projector_type]
    names = dict(model.named_parameters())
    assert f"model.mm_projector.{first}" in names
    assert "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight" in names
    assert "model.language_model.layers.1.mlp.down_proj.weight" in names


@pytest.mark.parametrize("layer", [-4, -2, -1, 0, 1, 3])
def test_tower_features_are_the_selected_hidden_state(layer: int) -> None:
    model = tiny_model(vision_feature_layer=layer)
    pixels = torch.randn(2, 3, 32, 32)
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(model.encode_images(pixels), hidden[layer][:, 1:])


def test_a_layer_the_tower_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="vision_feature_layer -5 does not exist: the tower has 3 blocks"):
        tiny_model(vision_feature_layer=-5).encode_images(torch.randn(1, 3, 32, 32))


def test_forward_is_projected_features_in_place_of_placeholders(
    model: MobileVLMForConditionalGeneration,
) -> None:
    batch, pixels = rows(*PROMPTS), torch.randn(2, 3, 32, 32)
    projected = model.model.mm_projector(model.encode_images(pixels))
    embeds = model.get_input_embeddings()(batch["input_ids"]).clone()
    images = iter(projected.flatten(0, 1))
    for row, position in (batch["input_ids"] == IMAGE).nonzero().tolist():
        embeds[row, position] = next(images)
    decoded = model.model.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
    expected = model.lm_head(decoded.last_hidden_state)
    torch.testing.assert_close(model(**batch, pixel_values=pixels).logits, expected)
    last = model(**batch, pixel_values=pixels, logits_to_keep=2).logits
    torch.testing.assert_close(last, expected[:, -2:])


def test_cached_features_give_what_pixels_give(model: MobileVLMForConditionalGeneration) -> None:
    batch, pixels = rows(*PROMPTS), torch.randn(2, 3, 32, 32)
    features = model.encode_images(pixels)
    assert features.shape == (2, 16, 16)
    from_pixels, from_features = model(**batch, pixel_values=pixels), model(**batch, image_features=features)
    assert torch.equal(from_pixels.logits, from_features.logits)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        model.generate(**batch, pixel_values=pixels, **greedy),
        model.generate(**batch, image_features=features, **greedy),
    )


def test_each_row_gets_its_own_image_and_text_rows_none(model: MobileVLMForConditionalGeneration) -> None:
    batch, pixels = rows(*PROMPTS, side="right"), torch.randn(2, 3, 32, 32)
    together = model(**batch, pixel_values=pixels).logits
    for row, (prompt, image) in enumerate(zip(PROMPTS, (pixels[:1], None, pixels[1:]), strict=True)):
        alone = model(**rows(prompt), pixel_values=image).logits[0]
        assert_same_sums(together[row, : len(alone)], alone)
    swapped = model(**batch, pixel_values=pixels.flip(0)).logits
    assert not torch.allclose(together[0], swapped[0], atol=1e-3)
    assert torch.allclose(together[1], swapped[1], atol=1e-6)


def test_two_images_in_one_row_are_taken_in_order(model: MobileVLMForConditionalGeneration) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    batch = rows([BOS, IMAGE, 4, IMAGE, 5])
    logits = model(**batch, pixel_values=pixels).logits
    one = model(**rows([BOS, IMAGE, 4]), pixel_values=pixels[:1]).logits
    assert_same_sums(logits[:, : one.shape[1]], one)


@pytest.mark.parametrize(("images", "message"), [(1, "8 image placeholders, but 1 images fill 4"), (3, "fill 12")])
def test_a_mismatch_names_both_counts(model: MobileVLMForConditionalGeneration, images: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**rows(*PROMPTS), pixel_values=torch.randn(images, 3, 32, 32))


def test_placeholders_without_images_are_refused(model: MobileVLMForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="8 image placeholders, but 0 images fill 0"):
        model(**rows(*PROMPTS))


def test_contradicting_inputs_are_refused(model: MobileVLMForConditionalGeneration) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="not both"):
        model(**rows(*PROMPTS), pixel_values=pixels, image_features=model.encode_images(pixels))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


def test_the_placeholder_need_not_be_in_the_vocabulary(model: MobileVLMForConditionalGeneration) -> None:
    outside = tiny_model(image_token_id=VOCAB + 3)
    outside.load_state_dict(model.state_dict())
    batch, pixels = rows(*PROMPTS), torch.randn(2, 3, 32, 32)
    expected = model.generate(**batch, pixel_values=pixels, max_new_tokens=3, do_sample=False)[:, -3:]
    batch["input_ids"][batch["input_ids"] == IMAGE] = VOCAB + 3
    assert torch.equal(
        outside.generate(**batch, pixel_values=pixels, max_new_tokens=3, do_sample=False)[:, -3:], expected
    )


def test_loss_is_the_mean_over_supervised_next_tokens(model: MobileVLMForConditionalGeneration) -> None:
    batch, pixels = rows(*PROMPTS, side="right"), torch.randn(2, 3, 32, 32)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 6:7], labels[2, -3:] = 8, torch.tensor([9, 4, 3])
    output = model(**batch, pixel_values=pixels, labels=labels)
    chances = output.logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    picked = [-chances[r, p, targets[r, p]] for r, p in (targets != -100).nonzero().tolist()]
    torch.testing.assert_close(output.loss, torch.stack(picked).mean())
    accumulated = model(**batch, pixel_values=pixels, labels=labels, num_items_in_batch=torch.tensor(10)).loss
    torch.testing.assert_close(accumulated, torch.stack(picked).sum() / 10)


def test_a_frozen_tower_gets_no_gradient_and_a_trained_one_does() -> None:
    model = tiny_model().train()
    batch, pixels = rows(PROMPTS[0]), torch.randn(1, 3, 32, 32)
    tower = model.model.vision_tower
    model(**batch, pixel_values=pixels, labels=batch["input_ids"]).loss.backward()
    assert tower.embeddings.patch_embedding.weight.grad is not None
    assert model.model.mm_projector.peg["peg"][0].weight.grad is not None
    tower.requires_grad_(False)
    assert not model.encode_images(pixels).requires_grad
    model.zero_grad(set_to_none=True)
    model(**batch, pixel_values=pixels, labels=batch["input_ids"]).loss.backward()
    assert all(parameter.grad is None for parameter in tower.parameters())
    assert model.model.mm_projector.mlp["mlp"][0].weight.grad is not None


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = tiny_model().train()
    model.model.vision_tower.requires_grad_(False)
    batch, pixels = rows(PROMPTS[0]), torch.randn(1, 3, 32, 32)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad(set_to_none=True)
        model(**batch, pixel_values=pixels, labels=batch["input_ids"], use_cache=False).loss.backward()
        gradients.append(model.model.language_model.layers[0].self_attn.q_proj.weight.grad)
    assert model.model.language_model.gradient_checkpointing
    torch.testing.assert_close(gradients[0], gradients[1])


def test_left_padded_batch_generates_what_each_row_generates_alone(
    model: MobileVLMForConditionalGeneration,
) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    greedy = {"max_new_tokens": 8, "do_sample": False}
    together = model.generate(**rows(*PROMPTS), pixel_values=pixels, **greedy)
    together = together[:, rows(*PROMPTS)["input_ids"].shape[1] :]
    for row, (prompt, image) in enumerate(zip(PROMPTS, (pixels[:1], None, pixels[1:]), strict=True)):
        alone_batch = rows(prompt)
        alone = model.generate(**alone_batch, pixel_values=image, **greedy)
        alone = alone[0, alone_batch["input_ids"].shape[1] :].tolist()
        assert together[row, : len(alone)].tolist() == alone
    uncached = model.generate(**rows(*PROMPTS), pixel_values=pixels, **greedy, use_cache=False)
    assert torch.equal(uncached[:, -together.shape[1] :], together)


def test_images_are_read_once_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    calls: list[int] = []
    encode = model.model.encode_images
    monkeypatch.setattr(model.model, "encode_images", lambda pixels: calls.append(1) or encode(pixels))
    model.generate(**rows(PROMPTS[0]), pixel_values=torch.randn(1, 3, 32, 32), max_new_tokens=5, min_new_tokens=5)
    assert len(calls) == 1


@pytest.mark.parametrize("projector_type", ["ldpnetv2", "ldpnet"])
def test_saved_and_loaded_it_is_the_same_model(projector_type: str, tmp_path: Path) -> None:
    model = tiny_model(projector_type=projector_type)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, MobileVLMForConditionalGeneration)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    batch, pixels = rows(*PROMPTS), torch.randn(2, 3, 32, 32)
    # Equal weights, but the loaded ones are mapped from the file and lie otherwise in memory.
    assert_same_sums(loaded(**batch, pixel_values=pixels).logits, model(**batch, pixel_values=pixels).logits)


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    model = tiny_model(text_config={**tiny_config().text_config.to_dict(), "tie_word_embeddings": True})
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for each in (model, loaded):
        assert each.lm_head.weight is each.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, loaded.lm_head.weight)
