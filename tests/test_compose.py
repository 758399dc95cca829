"""A MobileVLM from parts: towers behind their protocol, the composed model, its training, and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from typer.testing import CliRunner

from hydra_vlm.cli import app
from hydra_vlm.commands.init import init_model
from hydra_vlm.errors import ConfigError, RunFolderError
from hydra_vlm.models.compose import Parts, compose, load_decoder, load_tower
from hydra_vlm.models.loading import load_model
from hydra_vlm.models.mobilevlm import EfficientNetLiteConfig, EfficientNetLiteModel
from hydra_vlm.models.mobilevlm.efficientnet_lite import SamePadConv2d
from hydra_vlm.models.mobilevlm.projector import LDPNetV2
from hydra_vlm.models.mobilevlm.towers import tower_kind
from tiny import byte_tokenizer

TEXT = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
SHORT_TEXT = {**VISION, "vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
STAGES = ((1, 3, 1, 1, 8), (2, 3, 2, 2, 8), (1, 5, 2, 6, 16))  # with the stem's 2: 32 pixels become 4 x 4 x 16

TOWERS: dict[str, Callable[[], PreTrainedModel]] = {
    "clip": lambda: CLIPModel(CLIPConfig(text_config=SHORT_TEXT, vision_config=VISION)),
    "clip-tower": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    "siglip": lambda: SiglipModel(SiglipConfig(text_config=SHORT_TEXT, vision_config=VISION)),
    "siglip-tower": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),
    "conv": lambda: EfficientNetLiteModel(EfficientNetLiteConfig(image_size=32, stem_width=8, stages=STAGES)),
}


def save_llm(folder: Path, model: PreTrainedModel | None = None, mark: bool = True) -> Path:
    """A random decoder with a byte tokenizer that knows `<image>` (or does not)."""
    torch.manual_seed(1)
    (model or LlamaForCausalLM(LlamaConfig(**TEXT))).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    if not mark:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            path = folder / name
            path.write_text(path.read_text().replace("<image>", "<other>"))
    return folder


def shake(tower: nn.Module) -> None:
    """Statistics and norms as a trained network has them: a fresh network's would hide their absence."""
    for name, tensor in tower.state_dict().items():
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) * 0.3)


def save_tower(folder: Path, kind: str) -> Path:
    torch.manual_seed(2)
    tower = TOWERS[kind]()
    shake(tower)
    tower.save_pretrained(folder)
    return folder


def own_features(tower: Any, pixels: Tensor) -> Tensor:
    """What the tower's own forward says of its second last hidden state, or of its last map."""
    if isinstance(tower, EfficientNetLiteModel):
        x = torch.relu(tower._bn0(tower._conv_stem(pixels))).clamp(max=6)
        for block in tower._blocks:
            x = block(x)
        return x.permute(0, 2, 3, 1).flatten(1, 2)
    hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
    return hidden[:, 1:] if isinstance(tower, CLIPVisionModel) else hidden


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llm(tmp_path_factory.mktemp("llm"), mark=False)


@pytest.mark.parametrize("projector", ["ldpnetv2", "ldpnet"])
@pytest.mark.parametrize("kind", TOWERS)
def test_parts_become_a_model_that_loads(kind: str, projector: str, llm: Path, tmp_path: Path) -> None:
    vision = save_tower(tmp_path / "vision", kind)
    done = init_model(tmp_path / "model", llm, vision, projector, seed=3)
    loaded = load_model(str(tmp_path / "model"), "cpu")
    model, processor = loaded.model, loaded.processor
    assert (loaded.parts.graph.n_layers, loaded.parts.tower, loaded.parts.projector) == (
        2,
        "model.vision_tower",
        "model.mm_projector",
    )
    assert done.image_tokens == model.config.image_tokens == processor.image_tokens == 4
    assert processor.image_token_id == model.config.image_token_id == 260  # behind the vocabulary
    assert model.get_input_embeddings().weight.shape[0] == 260
    pixels = torch.randn(2, 3, 32, 32)
    source = AutoModel.from_pretrained(vision)
    source = getattr(source, "vision_model", source)
    torch.testing.assert_close(model.encode_images(pixels), own_features(source, pixels))
    decoder = LlamaForCausalLM.from_pretrained(llm)
    ids = torch.tensor([[1, 70, 71, 72]])
    torch.testing.assert_close(model(input_ids=ids).logits, decoder(input_ids=ids).logits)
    image = Image.new("RGB", (20, 30), (200, 30, 30))
    inputs = processor(text="<image>\nhi", images=image)
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2
    kept = tower_kind(model.config.vision_config)
    assert tuple(processor.image_processor.image_mean) == kept.image_mean


def test_the_projector_follows_from_the_seed(llm: Path, tmp_path: Path) -> None:
    vision = save_tower(tmp_path / "vision", "clip-tower")
    made = [compose(Parts(*load_decoder(llm), *load_tower(vision)), "ldpnetv2", seed)[0] for seed in (3, 3, 4)]
    first, again, other = (m.model.mm_projector.state_dict()["mlp.mlp.0.weight"] for m in made)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(3)
    assert torch.equal(first, LDPNetV2(16, 32).state_dict()["mlp.mlp.0.weight"])  # torch's own initialisation


def test_dtype_and_tied_heads_are_kept(tmp_path: Path) -> None:
    tied = Qwen2ForCausalLM(Qwen2Config(**TEXT, tie_word_embeddings=True)).to(torch.bfloat16)
    llm = save_llm(tmp_path / "llm", tied)
    init_model(tmp_path / "model", llm, save_tower(tmp_path / "vision", "conv"))
    from safetensors import safe_open

    with safe_open(tmp_path / "model/model.safetensors", "pt") as stored:
        names = set(stored.keys())
        kinds = {stored.get_tensor(name).dtype for name in names} - {torch.int64}
    assert kinds == {torch.bfloat16}
    assert "lm_head.weight" not in names
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert str(tmp_path) not in json.dumps(config)  # where a part lay is nobody's business
    model = load_model(str(tmp_path / "model"), "cpu").model
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_the_tower_s_own_normalisation_is_taken(llm: Path, tmp_path: Path) -> None:
    vision = save_tower(tmp_path / "vision", "siglip-tower")
    (vision / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "resample": 2}))
    init_model(tmp_path / "model", llm, vision)
    images = load_model(str(tmp_path / "model"), "cpu").processor.image_processor
    assert [*images.image_mean, *images.image_std, int(images.resample)] == [0.1, 0.2, 0.3, 0.5, 0.5, 0.5, 2]


def test_a_convolutional_tower_does_not_move_in_training(llm: Path, tmp_path: Path) -> None:
    model, _ = compose(Parts(*load_decoder(llm), *load_tower(save_tower(tmp_path / "v", "conv"))), "ldpnetv2")
    model.requires_grad_(False)
    model.model.mm_projector.requires_grad_(True)
    pixels, ids = torch.randn(2, 3, 32, 32), torch.tensor([[1] + [260] * 4 + [70, 71]] * 2)
    before, state = (
        model.encode_images(pixels),
        {k: v.clone() for k, v in model.model.vision_tower.state_dict().items()},
    )
    model.train()
    assert not any(module.training for module in model.model.vision_tower.modules())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, pixel_values=pixels, labels=ids.where(ids != 260, -100)).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(state[k], v) for k, v in model.model.vision_tower.state_dict().items())
    assert torch.equal(model.eval().encode_images(pixels), before)


@pytest.mark.parametrize(("side", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (8, 5, 2), (9, 5, 1)])
def test_same_padding_keeps_the_ceiling_of_the_side(side: int, kernel: int, stride: int) -> None:
    made = SamePadConv2d(1, 1, kernel, stride)(torch.ones(1, 1, side, side))
    assert made.shape[-1] == -(-side // stride)


@pytest.mark.parametrize(
    ("llm_model", "vision_model", "message"),
    [
        (
            BertModel(BertConfig(**{k: v for k, v in TEXT.items() if "key_value" not in k})),
            None,
            "not built like LLaMA",
        ),
        (GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4)), None, "not built like LLaMA"),
        (CLIPVisionModel(CLIPVisionConfig(**VISION)), None, "'clip_vision_model', which is no text decoder"),
        (
            Gemma2ForCausalLM(Gemma2Config(**TEXT, head_dim=8, final_logit_softcapping=0.001)),
            None,
            "more to its logits than a matrix product",
        ),
        (None, LlamaForCausalLM(LlamaConfig(**TEXT)), "'llama', which is no known vision tower"),
        (None, CLIPVisionModel(CLIPVisionConfig(**{**VISION, "patch_size": 32})), "1 x 1 patches"),
    ],
    ids=["bert", "gpt2", "tower-as-llm", "soft-capped", "llm-as-tower", "one-patch"],
)
@pytest.mark.filterwarnings("ignore:.*")
def test_parts_that_do_not_fit_are_refused(
    llm_model: PreTrainedModel | None, vision_model: PreTrainedModel | None, message: str, llm: Path, tmp_path: Path
) -> None:
    given = save_llm(tmp_path / "llm", llm_model) if llm_model is not None else llm
    vision = tmp_path / "vision"
    if vision_model is None:
        save_tower(vision, "conv")
    else:
        vision_model.save_pretrained(vision)
    with pytest.raises(ConfigError, match=message):
        init_model(tmp_path / "model", given, vision)
    assert not (tmp_path / "model").exists()


def test_a_grid_that_is_not_square_is_refused(llm: Path, tmp_path: Path) -> None:
    tower = CLIPVisionModel(CLIPVisionConfig(**VISION))
    tower.config.image_size = (32, 48)
    with pytest.raises(ConfigError, match="do not give a square grid"):
        compose(Parts(*load_decoder(llm), tower), "ldpnetv2")
    wrong = EfficientNetLiteModel(EfficientNetLiteConfig(image_size=36, stem_width=8, stages=STAGES))
    with pytest.raises(ConfigError, match=r"features of shape \(1, 25, 16\)"):  # 36 / 8 is no whole number
        compose(Parts(*load_decoder(llm), wrong), "ldpnetv2")


def test_requests_that_make_no_sense_are_refused(llm: Path, tmp_path: Path) -> None:
    vision, model = save_tower(tmp_path / "vision", "conv"), tmp_path / "model"
    with pytest.raises(ConfigError, match="'mlp' does not exist: choose one of ldpnetv2, ldpnet"):
        init_model(model, llm, vision, "mlp")
    with pytest.raises(ConfigError, match="give --llm and --vision, or --preset"):
        init_model(model, llm)
    with pytest.raises(ConfigError, match="brings both parts"):
        init_model(model, llm, preset="smol")
    with pytest.raises(ConfigError, match="'large' does not exist: choose one of smol"):
        init_model(model, preset="large")
    with pytest.raises(ConfigError, match=r"--llm .* holds no config\.json"):
        init_model(model, tmp_path, vision)
    with pytest.raises(ConfigError, match="does not exist: give the folder"):
        init_model(model, tmp_path / "none.gguf", vision)
    with pytest.raises(RunFolderError, match="is not empty"):
        init_model(vision, llm, vision)


def test_the_command_composes_and_tells(llm: Path, tmp_path: Path) -> None:
    vision = save_tower(tmp_path / "vision", "clip-tower")
    words = ["init", str(tmp_path / "model"), "--llm", str(llm), "--vision", str(vision)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert "4 tokens an image" in result.stdout
    assert (tmp_path / "model/config.json").is_file()
