"""A MobileVLM and an instruction set small enough to train in a test."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from hydra_vlm.config import Config, load_config
from hydra_vlm.data.records import write_records
from hydra_vlm.data.scenes import generate_scene
from hydra_vlm.models.mobilevlm.configuration import MobileVLMConfig
from hydra_vlm.models.mobilevlm.modeling import MobileVLMForConditionalGeneration
from hydra_vlm.models.mobilevlm.processing import MobileVLMProcessor


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token, after <unk>, <s>, </s>, <image>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {mark: i for i, mark in enumerate(["<unk>", "<s>", "</s>", "<image>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<image>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        extra_special_tokens=["<image>"],
    )


def save_tiny_model(folder: Path, layers: int = 4, kv_heads: int = 2, hidden: int = 32, intermediate: int = 48) -> Path:
    """Write a random MobileVLM and its processor to `folder`."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    config = MobileVLMConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        projector_type="ldpnetv2",
        vision_feature_layer=-1,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    MobileVLMForConditionalGeneration(config).save_pretrained(folder)
    MobileVLMProcessor.from_config(config, tokenizer).save_pretrained(folder)
    return folder


def write_toy_data(folder: Path) -> Path:
    """Eight pictures with a question each, the same records for training, validation and test."""
    rng = random.Random(0)
    records = []
    folder.mkdir(parents=True)
    for index in range(8):
        scene = generate_scene(rng, max_objects=1, glyph_share=0)
        scene.render().save(folder / f"{index}.png")
        records.append(
            {
                "id": f"toy-{index}",
                "image": f"{index}.png",
                "task": "colour" if index % 2 else "shape",
                "conversations": [
                    {"from": "human", "value": "<image>\nwhat is it?"},
                    {"from": "gpt", "value": scene.objects[0].colour},
                ],
            }
        )
    for split in ("train", "validation", "test"):
        write_records(folder / f"{split}.json", records)
    return folder


def toy_config(model: Path, data: Path, *overrides: str) -> Config:
    """A run of seconds over the toy data."""
    return load_config(
        None,
        [
            f"model={model}",
            f"data.train={data / 'train.json'}",
            f"data.validation={data / 'validation.json'}",
            f"data.tests={{toy: {data / 'test.json'}}}",
            "budget.rank=4",
            "profile.steps=4",
            "profile.skip=1",
            "allocation.n_stages=2",
            "training.steps=6",
            "training.batch_size=4",
            "training.save_steps=2",
            "evaluation.max_new_tokens=3",
            "device=cpu",
            *overrides,
        ],
    )
