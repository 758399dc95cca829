import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hydra_vlm.errors import AdapterError, ConfigError
from hydra_vlm.graph import llama_graph
from hydra_vlm.models import structure
from hydra_vlm.models.audit import adaptation_summary
from hydra_vlm.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from hydra_vlm.models.structure import find_parts

TOWER = CLIPVisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=14, num_attention_heads=2, image_size=16, patch_size=4
)
TEXT = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
)
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def meta(model_class: type, config: object) -> nn.Module:
    with torch.device("meta"):
        return model_class(config)


def test_mobilevlm_parts_and_graph() -> None:
    config = MobileVLMConfig(vision_config=TOWER.to_dict(), text_config=TEXT.to_dict())
    parts = find_parts(meta(MobileVLMForConditionalGeneration, config))
    assert parts.decoder == "model.language_model"
    assert parts.layers == "model.language_model.layers"
    assert parts.projector == "model.mm_projector"
    assert parts.tower == "model.vision_tower"
    assert parts.graph.projections == llama_graph("", 12, 32, 48, kv_features=16).projections
    assert parts.graph.name == "mobilevlm"
    assert parts.modules[11, "down_proj"] == "model.language_model.layers.11.mlp.down_proj"
    assert len(parts.names()) == len(set(parts.names())) == 12 * 7


def test_mobilellama_has_the_graph_of_the_paper() -> None:
    config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16)
    assert find_parts(meta(LlamaForCausalLM, config)).graph.cost * 128 == 121_110_528


@pytest.mark.parametrize(
    ("name", "decoder", "projector", "tower"),
    [
        ("Llava", "model.language_model", "model.multi_modal_projector", "model.vision_tower"),
        ("LlavaOnevision", "model.language_model", "model.multi_modal_projector", "model.vision_tower"),
        ("SmolVLM", "model.text_model", "model.connector", "model.vision_model"),
        ("Qwen2_5_VL", "model.language_model", "model.visual.merger", "model.visual"),
        ("Qwen3VL", "model.language_model", "model.visual.merger", "model.visual"),
        ("PaliGemma", "model.language_model", "model.multi_modal_projector", "model.vision_tower"),
        ("Gemma3", "model.language_model", "model.multi_modal_projector", "model.vision_tower"),
        ("InternVL", "model.language_model", "model.multi_modal_projector", "model.vision_tower"),
    ],
)
def test_transformers_vlms_are_found(name: str, decoder: str, projector: str, tower: str) -> None:
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    parts = find_parts(meta(model_class, model_class.config_class()))
    assert (parts.decoder, parts.projector, parts.tower) == (decoder, projector, tower)
    assert parts.graph.components == LLAMA
    assert all(name.startswith(f"{decoder}.layers.") for name in parts.names())


def test_plain_decoders() -> None:
    parts = find_parts(meta(LlamaForCausalLM, TEXT))
    assert (parts.decoder, parts.projector, parts.tower, parts.layers) == ("model", None, None, "model.layers")
    bare = find_parts(meta(LlamaModel, TEXT))
    assert (bare.decoder, bare.layers) == ("", "layers")
    assert bare.graph.projections == parts.graph.projections
    assert not any("lm_head" in name for name in parts.names())


def test_fused_projections_are_fewer_components() -> None:
    config = Phi3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    graph = find_parts(meta(Phi3ForCausalLM, config)).graph
    assert sorted(graph.components) == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert graph.projections[graph.index(1, "qkv_proj")].out_features == 64
    assert graph.projections[graph.index(1, "gate_up_proj")].out_features == 96


def test_equal_names_within_a_layer_get_their_parents_name() -> None:
    gpt2 = find_parts(meta(GPT2LMHeadModel, GPT2Config(n_layer=2, n_embd=32, n_head=2)))
    assert gpt2.graph.components == ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")
    assert gpt2.graph.projections[0].out_features == 96  # Conv1D keeps its weight as [in, out]
    assert gpt2.transposed
    t5 = find_parts(meta(T5ForConditionalGeneration, T5Config(d_model=32, d_ff=32, num_layers=2, num_heads=2)))
    assert t5.layers == "decoder.block"
    assert {"SelfAttention.q", "EncDecAttention.q", "wi"} < set(t5.graph.components)


def test_layers_may_differ() -> None:
    config = MllamaConfig()
    config.text_config.num_hidden_layers = 5
    parts = find_parts(meta(MllamaForConditionalGeneration, config))
    crossing = parts.modules[3, "q_proj"]
    assert crossing == "model.language_model.layers.3.cross_attn.q_proj"
    assert parts.modules[4, "q_proj"] == "model.language_model.layers.4.self_attn.q_proj"


def test_numbers_of_experts_do_not_hide_the_layers() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.Linear(4, 4)
            self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 8)}) for _ in range(9))

    model = nn.ModuleDict({"decoder": nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(3))})})
    parts = find_parts(model)
    assert parts.layers == "decoder.layers"
    assert parts.graph.components[:3] == ("attention", "experts.0.w1", "experts.1.w1")


class Unusual(nn.Module):
    """Two lists of equal length, none under a usual name."""

    def __init__(self) -> None:
        super().__init__()
        self.eyes = nn.ModuleList(nn.ModuleDict({"attention": nn.Linear(4, 4)}) for _ in range(11))
        self.tongue = nn.ModuleDict(
            {"blocks": nn.ModuleList(nn.ModuleDict({"attention": nn.Linear(4, 4)}) for _ in range(11))}
        )


def test_unknown_model_is_described_by_a_pattern() -> None:
    model = Unusual()
    with pytest.raises(ConfigError, match=r"decoder_pattern.*eyes \(11 x ModuleDict\), tongue\.blocks"):
        find_parts(model)
    parts = find_parts(model, r"tongue\.blocks\.\d+")
    assert (parts.decoder, parts.layers, parts.graph.n_layers) == ("tongue", "tongue.blocks", 11)
    assert parts.modules[10, "attention"] == "tongue.blocks.10.attention"


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (r"nose\.\d+", "matches no module"),
        (r".*\.\d+", "modules of eyes, tongue.blocks"),
        (r"eyes\.\d", "10 of the 11 members"),
        (r"eyes\.(", "not a regular expression"),
    ],
)
def test_bad_patterns_are_explained(pattern: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        find_parts(Unusual(), pattern)


def test_a_vision_model_has_no_decoder() -> None:
    with pytest.raises(ConfigError, match="reads pixel_values"):
        find_parts(meta(transformers.CLIPVisionModel, TOWER))


# PEFT asks transformers for an attribute that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_wrapped_model_is_refused() -> None:
    model = get_peft_model(LlamaForCausalLM(TEXT), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="carries an adapter already"):
        find_parts(model)
    with pytest.raises(AdapterError, match="carries an adapter already"):
        find_parts(model.get_base_model())


def test_summary_counts_every_parameter_once() -> None:
    model = meta(LlavaForConditionalGeneration, LlavaConfig(vision_config=TOWER, text_config=TEXT, image_token_id=5))
    parts = find_parts(model)
    model.requires_grad_(False)
    projector = model.get_submodule(parts.projector).requires_grad_(True)
    lines = {line.split("  ")[0]: line.split() for line in adaptation_summary(model, parts).splitlines()}
    trained = sum(p.numel() for p in projector.parameters())
    assert lines["projector"][-2:] == [f"{trained:,}", "0"]
    assert lines["vision tower"][-2:] == ["0", f"{sum(p.numel() for p in model.model.vision_tower.parameters()):,}"]
    assert lines["total"][-1] == f"{sum(p.numel() for p in model.parameters()) - trained:,}"


@pytest.mark.parametrize(
    "pattern", [r"(\w+)+x", r"(a|a)*b", r"((\w*)\.)*\d+", ".*.*.*.*.*x", "a" * 501, r"([a-z]+\.?){9}!"]
)
def test_patterns_that_could_take_for_ever_are_not_run(pattern: str) -> None:
    assert not structure._is_quick(pattern)


@pytest.mark.parametrize(
    "pattern",
    [r"model\.layers\.\d+", r"(model|base)\.language_model\.layers\.[0-9]+", r".*\.text\..*layers\.\d+?", "[+*]"],
)
def test_patterns_as_people_write_them_are_run(pattern: str) -> None:
    assert structure._is_quick(pattern)
