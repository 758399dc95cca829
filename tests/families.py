"""One tiny random model of each supported family, with its own processor class, in the format of the hub.

Tokenizers are small byte-level ones with the family's control marks; chat templates say what the published ones say for
one image and text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from hydra_vlm.models.processors import VideoSettings
from tiny import save_tiny_model

LAYERS = 3  # of every decoder; towers have 2, so that they cannot be taken for each other
HIDDEN = 32
DECODER = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Family:
    """`build` gives model and processor; `lead` and `end` are what opens and closes an answer in its own format."""

    name: str
    build: Callable[[], tuple[torch.nn.Module, Any]]
    end: str
    tower: str | None
    projector: str | None
    decoder: str = "model.language_model"
    lead: str = ""

    def save(self, folder: Path) -> Path:
        """Write a random model and its processor to `folder`."""
        if self.name == "mobilevlm":
            return save_tiny_model(folder, layers=LAYERS)
        torch.manual_seed(0)
        model, processor = self.build()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder


def tokenizer(
    marks: Sequence[str], bos: str | None, eos: str, pad: str, adds_bos: bool = False, **named: str
) -> PreTrainedTokenizerFast:
    """Every byte a token behind the control marks; `named` marks become attributes, such as `image_token`."""
    everything = list(dict.fromkeys([pad, eos, *([bos] if bos else []), *marks, *named.values()]))
    vocabulary = {token: i for i, token in enumerate([*everything, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(everything)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, vocabulary[bos])],
        )
    else:
        core.post_processor = processors.ByteLevel(trim_offsets=True)  # as GPT-2's: white space has no width
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=named or list(marks),
    )


def chatml(image: str, system: str = "") -> str:
    """ChatML with typed parts, as Qwen-VL and InternVL write it."""
    return (
        system + "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
PARTS = "{% for part in message['content'] if part['type'] == "
# LLaVA 1.5 closes an answer with a space alone.
LLAVA = (
    "{% for message in messages %}{{ message['role'] | upper }}: " + PARTS + "'image' %}<image>\n{% endfor %}"
    + PARTS + "'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)  # fmt: skip
# LLaVA-OneVision opens a turn with "role \n", but asks for an answer with "assistant\n".
ONEVISION = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + ' ' }}" + PARTS + "'image' %}<image>{% endfor %}"
    + PARTS + "'text' %}{{ '\n' + part['text'] }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def llama_text(words: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {**DECODER, "model_type": "llama", "vocab_size": len(words), "pad_token_id": words.pad_token_id}


def qwen_text(words: PreTrainedTokenizerFast, model_type: str = "qwen2", **more: Any) -> dict[str, Any]:
    return {**llama_text(words), "model_type": model_type, **more}


def llava() -> tuple[Any, Any]:
    words = tokenizer(["<image>"], "<s>", "</s>", "<unk>", adds_bos=True)
    config = hf.LlavaConfig(
        vision_config={**TOWER, "model_type": "clip_vision_model"},
        text_config=llama_text(words),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
    )
    images = LlavaImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = hf.LlavaProcessor(
        images,
        words,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
    )
    return hf.LlavaForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    words = tokenizer(["<|im_start|>", "<image>", "<video>"], None, "<|im_end|>", "<|endoftext|>")
    config = hf.LlavaOnevisionConfig(
        vision_config={**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=qwen_text(words),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        video_token_id=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[16, 16], [16, 32], [32, 16]],
        vision_feature_layer=-1,
    )
    images = LlavaOnevisionImageProcessorPil(
        size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 16], [16, 32], [32, 16]]
    )
    processor = hf.LlavaOnevisionProcessor(
        images,
        words,
        VideoSettings({"video_processor_type": "LlavaOnevisionVideoProcessor"}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def idefics_words() -> PreTrainedTokenizerFast:
    grid = [f"<row_{i + 1}_col_{j + 1}>" for i in range(2) for j in range(2)]
    marks = ["<fake_token_around_image>", "<image>", "<global-img>", *grid]
    return tokenizer(marks, "<|im_start|>", "<end_of_utterance>", "<|im_end|>")


def idefics_settings(words: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vision_config": {**TOWER, "image_size": 32, "patch_size": 8},
        "text_config": llama_text(words),
        "image_token_id": words.convert_tokens_to_ids("<image>"),
        "scale_factor": 2,
        "pad_token_id": words.pad_token_id,
    }


SPLITTING = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": True}


def smolvlm() -> tuple[Any, Any]:
    words = idefics_words()
    processor = hf.SmolVLMProcessor(
        SmolVLMImageProcessorPil(**SPLITTING),
        words,
        VideoSettings({"video_processor_type": "SmolVLMVideoProcessor", "num_frames": 4, "fps": 1}),
        image_seq_len=4,
        chat_template=IDEFICS,
    )
    return hf.SmolVLMForConditionalGeneration(hf.SmolVLMConfig(**idefics_settings(words))), processor


def idefics3() -> tuple[Any, Any]:
    words = idefics_words()
    processor = hf.Idefics3Processor(
        Idefics3ImageProcessorPil(**SPLITTING), words, image_seq_len=4, chat_template=IDEFICS
    )
    return hf.Idefics3ForConditionalGeneration(hf.Idefics3Config(**idefics_settings(words))), processor


def qwen_words() -> PreTrainedTokenizerFast:
    marks = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    return tokenizer(marks, None, "<|im_end|>", "<|endoftext|>")


def qwen_settings(words: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        f"{name}_token_id": words.convert_tokens_to_ids(f"<|{mark}|>")
        for name, mark in [
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        ]
    }


def qwen_images() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": 64, "longest_edge": 1024}, patch_size=4, merge_size=2, temporal_patch_size=2
    )


QWEN = chatml("<|vision_start|><|image_pad|><|vision_end|>", SYSTEM)
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}


def qwen2_vl() -> tuple[Any, Any]:
    words = qwen_words()
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    text = qwen_text(words, "qwen2_vl_text", rope_parameters=ROPE)
    config = hf.Qwen2VLConfig(vision_config=vision, text_config=text, **qwen_settings(words))
    processor = hf.Qwen2VLProcessor(
        qwen_images(), words, VideoSettings({"video_processor_type": "Qwen2VLVideoProcessor"}), chat_template=QWEN
    )
    return hf.Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl() -> tuple[Any, Any]:
    words = qwen_words()
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "out_hidden_size": HIDDEN,
    }
    text = qwen_text(words, "qwen2_5_vl_text", rope_parameters=ROPE)
    config = hf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **qwen_settings(words))
    processor = hf.Qwen2_5_VLProcessor(
        qwen_images(), words, VideoSettings({"video_processor_type": "Qwen2VLVideoProcessor"}), chat_template=QWEN
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl() -> tuple[Any, Any]:
    return _qwen3(hf.Qwen3VLForConditionalGeneration, hf.Qwen3VLConfig, "qwen3_vl_text")


def qwen3_vl_moe() -> tuple[Any, Any]:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return _qwen3(hf.Qwen3VLMoeForConditionalGeneration, hf.Qwen3VLMoeConfig, "qwen3_vl_moe_text", **experts)


def _qwen3(model: Any, config: Any, text_type: str, **more: Any) -> tuple[Any, Any]:
    words = qwen_words()
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    text = qwen_text(words, text_type, head_dim=8, rope_parameters={**ROPE, "mrope_interleaved": True}, **more)
    processor = hf.Qwen3VLProcessor(
        qwen_images(), words, VideoSettings({"video_processor_type": "Qwen3VLVideoProcessor"}), chat_template=QWEN
    )
    return model(config(vision_config=vision, text_config=text, **qwen_settings(words))), processor


def paligemma() -> tuple[Any, Any]:
    words = tokenizer(["<image>"], "<bos>", "<eos>", "<pad>", adds_bos=False)
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(images, words)
    config = hf.PaliGemmaConfig(
        vision_config={**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**llama_text(words), "model_type": "gemma", "head_dim": 8},
        image_token_id=words.convert_tokens_to_ids("<image>"),
        projection_dim=HIDDEN,
    )
    return hf.PaliGemmaForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    words = tokenizer(
        [],
        "<bos>",
        "<eos>",
        "<pad>",
        adds_bos=True,
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        turn_token="<start_of_turn>",
        closing_token="<end_of_turn>",
    )
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    processor = hf.Gemma3Processor(images, words, image_seq_length=4, chat_template=GEMMA)
    config = hf.Gemma3Config(
        vision_config={**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**llama_text(words), "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 16},
        mm_tokens_per_image=4,
        image_token_id=words.image_token_id,
        boi_token_id=words.boi_token_id,
        eoi_token_id=words.eoi_token_id,
    )
    return hf.Gemma3ForConditionalGeneration(config), processor


def internvl() -> tuple[Any, Any]:
    words = tokenizer(
        [],
        None,
        "<|im_end|>",
        "<|endoftext|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
        turn_token="<|im_start|>",
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=2
    )
    processor = hf.InternVLProcessor(
        images,
        words,
        VideoSettings({"video_processor_type": "InternVLVideoProcessor"}),
        image_seq_length=4,
        chat_template=chatml("<IMG_CONTEXT>\n", SYSTEM),
    )
    config = hf.InternVLConfig(
        vision_config={**TOWER, "model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [4, 4]},
        text_config=qwen_text(words),
        image_token_id=words.context_image_token_id,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return hf.InternVLForConditionalGeneration(config), processor


def llama() -> tuple[Any, Any]:
    words = tokenizer(
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
    )
    words.chat_template = LLAMA
    settings = {key: value for key, value in llama_text(words).items() if key != "model_type"}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**settings, bos_token_id=words.bos_token_id)), words


def _none() -> tuple[Any, Any]:
    raise NotImplementedError("saved by tiny.save_tiny_model")


PROJECTOR, CLIPLIKE = "model.multi_modal_projector", "model.vision_tower"
IDEFICS_PARTS = ("model.vision_model", "model.connector", "model.text_model")
FAMILIES = {
    family.name: family
    for family in (
        Family("llava", llava, "</s>", CLIPLIKE, PROJECTOR, lead=" "),
        Family("llava_onevision", llava_onevision, "<|im_end|>", CLIPLIKE, PROJECTOR),
        Family("smolvlm", smolvlm, "<end_of_utterance>", *IDEFICS_PARTS, lead=" "),
        Family("idefics3", idefics3, "<end_of_utterance>", *IDEFICS_PARTS, lead=" "),
        Family("qwen2_vl", qwen2_vl, "<|im_end|>", "model.visual", "model.visual.merger"),
        Family("qwen2_5_vl", qwen2_5_vl, "<|im_end|>", "model.visual", "model.visual.merger"),
        Family("qwen3_vl", qwen3_vl, "<|im_end|>", "model.visual", "model.visual.merger"),
        Family("paligemma", paligemma, "<eos>", CLIPLIKE, PROJECTOR),
        Family("gemma3", gemma3, "<end_of_turn>", CLIPLIKE, PROJECTOR),
        Family("internvl", internvl, "<|im_end|>", CLIPLIKE, PROJECTOR),
        Family("mobilevlm", _none, "</s>", CLIPLIKE, "model.mm_projector", lead=" "),
        Family("llama", llama, "<|eot_id|>", None, None, decoder="model"),
    )
}

MIXTURE = Family("qwen3_vl_moe", qwen3_vl_moe, "<|im_end|>", "model.visual", "model.visual.merger")
"""A mixture of experts, whose experts LoRA does not reach."""
