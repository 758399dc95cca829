"""`hydra-vlm convert`: the authors' layout in and out, strictly; LoRA and stage-I folders, towers, loading."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, SiglipVisionConfig

from authors import (
    LAYERS,
    TOWER,
    TOWER_PREFIX,
    WIDTH,
    authors_config,
    authors_shapes,
    fill,
    refused,
    rewrite,
    same,
    save_authors,
    theirs_in,
    tower_shapes,
)
from hydra_vlm.commands.convert import convert
from hydra_vlm.errors import CheckpointError, ConfigError, RunFolderError
from hydra_vlm.models.loading import load_model
from hydra_vlm.models.mobilevlm import MobileVLMConfig
from hydra_vlm.models.mobilevlm.conversion import to_hydra, to_original
from hydra_vlm.models.mobilevlm.original_layout import our_config, their_config
from hydra_vlm.models.weights import read_weights, weight_files

RECORDED = Path(__file__).parent / "recorded"
QUERY = "model.layers.0.self_attn.q_proj.weight"
OUR_QUERY = "model.language_model.layers.0.self_attn.q_proj.weight"


def ours_in(folder: Path) -> dict[str, Tensor]:
    return read_weights(weight_files(folder))


# The round trip.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_there_and_back_every_bit_is_kept(version: str, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = fill(authors_shapes(version), dtype)
    weights["model.norm.weight"] = weights["model.norm.weight"].float()  # a dtype of its own stays
    config = authors_config(version, torch_dtype=str(dtype).removeprefix("torch."))
    source = save_authors(tmp_path / "theirs", version, weights, config)
    done = convert(source, tmp_path / "ours", "hydra")
    assert (done.tensors, done.left) == (len(weights), ())
    assert done.size == sum(tensor.nbytes for tensor in weights.values())
    assert torch.equal(ours_in(tmp_path / "ours")[OUR_QUERY], weights[QUERY])
    convert(tmp_path / "ours", tmp_path / "back", "original")
    assert same(theirs_in(tmp_path / "back"), weights)
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: back.get(key) for key in config} == config | {"mm_vision_tower": "vision_tower"}
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    to_hydra(tmp_path / "back", tmp_path / "again")  # finds the tower's settings in its own folder
    assert same(ours_in(tmp_path / "again"), ours_in(tmp_path / "ours"))
    again, first = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("again", "ours"))
    assert again == first
    tower = torch.load(tmp_path / "back" / "vision_tower" / "pytorch_model.bin", weights_only=True)
    assert same(tower, {n.replace(TOWER_PREFIX, "vision_model."): weights[n] for n in tower_shapes()})


def test_the_configuration_says_what_theirs_says(tmp_path: Path) -> None:
    save = {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "image_aspect_ratio": "square", "mm_vision_select_layer": -1}
    to_hydra(save_authors(tmp_path / "a", "v1", config=authors_config("v1", **save)), tmp_path / "ours")
    config = AutoConfig.from_pretrained(tmp_path / "ours")
    assert isinstance(config, MobileVLMConfig)
    assert (config.projector_type, config.vision_feature_layer, config.image_aspect_ratio) == ("ldpnet", -1, "square")
    text = config.text_config
    assert (text.hidden_size, text.num_hidden_layers, text.rms_norm_eps) == (WIDTH, LAYERS, 1e-5)
    assert text.rope_parameters["rope_theta"] == 5e5
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (1, 2, 0)
    assert (config.image_token_id, config.dtype, config.vision_config.hidden_act) == (420, torch.float32, "quick_gelu")


def test_the_left_over_keys_of_the_3b_configurations_are_not_read(tmp_path: Path) -> None:
    stale = {"n_head": 2, "n_query_groups": 2, "n_embd": 64, "n_layer": 7, "padded_vocab_size": 512, "norm_eps": 1e-3}
    to_hydra(save_authors(tmp_path / "a", "v2", config=authors_config("v2", **stale)), tmp_path / "ours")
    to_hydra(save_authors(tmp_path / "b", "v2"), tmp_path / "plain")
    config, plain = (AutoConfig.from_pretrained(tmp_path / name) for name in ("ours", "plain"))
    assert config.text_config.num_attention_heads == 4
    assert config.to_diff_dict() == plain.to_diff_dict()


def test_the_published_tower_is_known_by_its_name() -> None:
    published = authors_config("v2", mm_vision_tower="openai/clip-vit-large-patch14-336", mm_hidden_size=1024)
    config = our_config(published, None, "config.json")
    assert config.vision_config.to_dict() == MobileVLMConfig().vision_config.to_dict()
    keys = their_config(config, published["mm_vision_tower"])
    assert {key: keys.get(key) for key in published} == published


@pytest.mark.parametrize("form", ["bin-3", "bin-3-index", "safetensors", "safetensors-2", "safetensors-2-index"])
def test_every_form_of_the_weights_is_read_alike(form: str, tmp_path: Path) -> None:
    source = save_authors(tmp_path / "theirs", "v2")
    whole = theirs_in(source)
    rewrite(source, form)
    to_hydra(source, tmp_path / "ours")
    assert torch.equal(ours_in(tmp_path / "ours")[OUR_QUERY], whole[QUERY])
    to_original(tmp_path / "ours", tmp_path / "back")
    assert same(theirs_in(tmp_path / "back"), whole)


def test_large_weights_are_written_in_shards_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydra_vlm.models.weights._LARGEST_SHARD", 2**14)
    to_hydra(save_authors(tmp_path / "theirs", "v1"), tmp_path / "ours")
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 4
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    assert same(dict(loaded.state_dict()), ours_in(tmp_path / "ours"))
    to_original(tmp_path / "ours", tmp_path / "back")
    assert same(theirs_in(tmp_path / "back"), theirs_in(tmp_path / "theirs"))


def test_computed_buffers_are_left_and_named(tmp_path: Path) -> None:
    buffers = {
        f"{TOWER_PREFIX}embeddings.position_ids": torch.arange(577)[None],
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    source = save_authors(tmp_path / "theirs", "v2", fill(authors_shapes("v2")) | buffers)
    done = to_hydra(source, tmp_path / "ours")
    assert sorted(done.left) == sorted(buffers)
    assert all(name in done.summary() for name in buffers)


def test_tensors_that_share_memory_are_kept_apart(tmp_path: Path) -> None:
    weights = fill(authors_shapes("v2"))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    both = torch.randn(2 * WIDTH, WIDTH)
    weights[QUERY], weights[QUERY.replace("q_", "k_")] = both[:WIDTH], both[WIDTH:].T
    source = save_authors(tmp_path / "theirs", "v2", weights)
    to_hydra(source, tmp_path / "ours")
    to_original(tmp_path / "ours", tmp_path / "back")
    assert same(theirs_in(tmp_path / "back"), weights)


# What does not fit is named.


def test_a_missing_an_unknown_and_a_misshapen_weight_are_named(tmp_path: Path) -> None:
    weights = fill(authors_shapes("v1"))
    norm = "model.layers.1.input_layernorm.weight"
    broken = {
        rf"{re.escape(norm)} missing": {k: v for k, v in weights.items() if k != norm},
        r"model\.layers\.2\.extra\.weight not part of this model": weights
        | {"model.layers.2.extra.weight": torch.ones(3)},
        r"model\.vision_resampler\.x not part": weights | {"model.vision_resampler.x": torch.ones(3)},
        rf"{re.escape(QUERY)} \(32, 31\) instead of \(32, 32\)": weights | {QUERY: torch.ones(32, 31)},
        r"lm_head\.weight missing; something not part": {
            ("something" if k == "lm_head.weight" else k): v for k, v in weights.items()
        },
    }
    for number, (message, state) in enumerate(broken.items()):
        refused(message, save_authors(tmp_path / f"a{number}", "v1", state), tmp_path / "ours")


def test_our_own_layout_is_checked_on_the_way_back(tmp_path: Path) -> None:
    to_hydra(save_authors(tmp_path / "theirs", "v2"), tmp_path / "ours")
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    del weights[OUR_QUERY]
    save_file(weights, tmp_path / "ours" / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(f"{QUERY} missing")):
        to_original(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_attention_heads": None}, CheckpointError, "has no num_attention_heads"),
        ({"mm_projector_type": None}, CheckpointError, "has no mm_projector_type"),
        ({"mm_projector_type": "mlp2x_gelu"}, ConfigError, "mm_projector_type 'mlp2x_gelu' is not supported"),
        (
            {"mm_projector_type": "ldpnet"},
            CheckpointError,
            r"mb_block\.1\.block.* missing; .*mlp\.mlp\.0\.bias.* and 3 more not part",
        ),
        ({"mm_vision_select_feature": "cls_patch"}, ConfigError, "mm_vision_select_feature 'cls_patch'"),
        ({"mm_use_im_start_end": True}, ConfigError, "mm_use_im_start_end True"),
        ({"mm_hidden_size": 24}, CheckpointError, "mm_hidden_size 24, but the tower's width is 16"),
        ({"mm_vision_tower": "laion/some-clip"}, ConfigError, "'laion/some-clip' are not known: .* --vision"),
        ({"num_hidden_layers": 3}, CheckpointError, r"model\.layers\.2\..* and 6 more missing"),
    ],
)
def test_a_configuration_that_does_not_fit(changes: dict[str, Any], error: type, message: str, tmp_path: Path) -> None:
    source = save_authors(tmp_path / "theirs", "v2", config=authors_config("v2", **changes))
    refused(message, source, tmp_path / "ours", error)


def test_a_grid_on_which_the_reference_pools_otherwise_is_refused(tmp_path: Path) -> None:
    source = save_authors(tmp_path / "theirs", "v2")
    (source / "tower" / "config.json").write_text(json.dumps(TOWER | {"image_size": 224}))
    refused("LDPv2 pools to 12 x 12 .* this tower has 16 x 16", source, tmp_path / "ours", ConfigError)


def test_files_that_are_damaged_missing_or_not_weights(tmp_path: Path) -> None:
    source = save_authors(tmp_path / "theirs", "v2")
    whole = (source / "pytorch_model.bin").read_bytes()
    (source / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    refused(r"pytorch_model\.bin cannot be read", source, tmp_path / "ours")
    torch.save({"model.norm.weight": Path("a class, not a tensor")}, source / "pytorch_model.bin")
    refused("holds more than tensors", source, tmp_path / "ours")
    torch.save({"epoch": 3}, source / "pytorch_model.bin")
    refused("is not a state dict", source, tmp_path / "ours")
    (source / "pytorch_model.bin").unlink()
    refused("holds no weights", source, tmp_path / "ours")
    (source / "model.safetensors").write_bytes(b"nothing")
    refused(r"model\.safetensors cannot be read", source, tmp_path / "ours")


def test_a_missing_shard_is_named_and_a_repeated_weight_too(tmp_path: Path) -> None:
    for form in ("bin-3", "bin-3-index"):
        source = save_authors(tmp_path / form, "v2")
        rewrite(source, form)
        second = source / "pytorch_model-00002-of-00003.bin"
        kept = second.read_bytes()
        second.unlink()
        refused("pytorch_model-00002-of-00003.bin is missing", source, tmp_path / "ours")
        second.write_bytes(kept)
        shutil.copyfile(second, source / "pytorch_model-00003-of-00003.bin")
        refused("which another file of the checkpoint holds, too", source, tmp_path / "ours")


def test_a_target_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    source = save_authors(tmp_path / "theirs", "v2")
    (tmp_path / "ours").mkdir()
    to_hydra(source, tmp_path / "ours")  # an empty folder will do
    before = sorted((tmp_path / "ours").iterdir())
    with pytest.raises(RunFolderError, match="is not empty"):
        to_hydra(source, tmp_path / "ours")
    assert sorted((tmp_path / "ours").iterdir()) == before


def test_wrong_directions_and_options_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    source = save_authors(tmp_path / "theirs", "v2")
    with pytest.raises(ConfigError, match="in the authors' layout already"):
        to_original(source, tmp_path / "x")
    with pytest.raises(ConfigError, match="is not in the authors' layout"):
        to_hydra(tiny_model, tmp_path / "x")
    with pytest.raises(ConfigError, match="this tower has 4 x 4"):
        to_original(tiny_model, tmp_path / "x")
    with pytest.raises(ConfigError, match="holds no config"):
        to_hydra(tmp_path / "nowhere", tmp_path / "x")
    with pytest.raises(ConfigError, match="--vision is for reading"):
        convert(tiny_model, tmp_path / "x", "original", vision=source)
    with pytest.raises(ConfigError, match="--base is for LoRA folders"):
        to_hydra(source, tmp_path / "x", base=source)


def test_parts_for_which_their_layout_has_no_place_are_named() -> None:
    other_tower = MobileVLMConfig(vision_config=SiglipVisionConfig())
    with pytest.raises(ConfigError, match="no place for a tower of type siglip_vision_model: only CLIP"):
        their_config(other_tower, "x")
    wide = MobileVLMConfig(text_config={"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32})
    with pytest.raises(ConfigError, match="no place for heads of width 32"):
        their_config(wide, "x")


# Loading.


def test_their_layout_is_not_loaded_but_told_how(tmp_path: Path) -> None:
    source = save_authors(tmp_path / "theirs", "v2")
    with pytest.raises(ConfigError, match=r"authors' layout: convert it once with `hydra-vlm convert .*theirs"):
        load_model(str(source), "cpu")


def test_a_converted_model_is_loaded_with_its_parts_and_its_words(tmp_path: Path) -> None:
    source = save_authors(tmp_path / "theirs", "v2")
    shutil.copyfile(RECORDED / "tokenizer.model", source / "tokenizer.model")
    to_hydra(source, tmp_path / "ours")
    loaded = load_model(str(tmp_path / "ours"), "cpu")
    assert loaded.parts.graph.n_layers == LAYERS
    assert loaded.parts.projector == "model.mm_projector"
    assert loaded.processor.image_token_id == loaded.model.config.image_token_id == 420
    inputs = loaded.processor(text="USER: what? ASSISTANT:")
    assert (
        loaded.model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] <= inputs["input_ids"].shape[1] + 2
    )


def test_bfloat16_and_the_meta_device(tmp_path: Path) -> None:
    weights = fill(authors_shapes("v2"), torch.bfloat16)
    config = authors_config("v2", torch_dtype="bfloat16")
    to_hydra(save_authors(tmp_path / "theirs", "v2", weights, config), tmp_path / "ours")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")  # dtype: the configuration's
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert same(dict(loaded.state_dict()), ours_in(tmp_path / "ours"))
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path / "ours"))
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in loaded.state_dict().items()}


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    config = authors_config("v2", tie_word_embeddings=True)
    source = save_authors(tmp_path / "theirs", "v2", config=config)
    done = to_hydra(source, tmp_path / "ours")
    assert "lm_head.weight" not in ours_in(tmp_path / "ours")
    assert any("lm_head.weight" in name for name in done.left)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    assert torch.equal(loaded.lm_head.weight, theirs_in(source)["model.embed_tokens.weight"])
