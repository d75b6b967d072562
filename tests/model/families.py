"""Tiny random models of real families, each with its real processor, built without network.

A builder gives the config and the processor of one family; `write` makes the Hugging Face folder.
Images are 32 to 64 pixels, and every family that tiles, crops or resizes an image does it here too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from kd.model.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, build_processor

TEXTS = ["What is in the picture?", "A red square.", "A blue circle.", "user assistant model"]
Built = tuple[PreTrainedConfig, ProcessorMixin]

# Weights large enough that attention and images matter to the hidden states.
INIT = {"initializer_range": 0.2}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    **INIT,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    **INIT,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 32,
    **INIT,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}


def tokenizer(
    specials: list[str], eos: str, pad: str, merges: int = 44, **named: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE; `named` are the special tokens that a processor asks it for by name."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges + len(specials),
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    return with_specials(bpe, specials, eos, pad, named)


def sentencepiece(specials: list[str], eos: str, pad: str, **named: Any) -> PreTrainedTokenizerFast:
    """A BPE of characters with a byte fallback, spaces written as ▁: Gemma's kind."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=70, special_tokens=[*specials, "<unk>"], show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    model = json.loads(bpe.to_str())["model"]
    pieces = [*model["vocab"], *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe.model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)},
        [tuple(pair) for pair in model["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
    )
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return with_specials(bpe, specials, eos, pad, {"unk_token": "<unk>", **named})


def with_specials(
    bpe: Tokenizer, specials: list[str], eos: str, pad: str, named: dict[str, str]
) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens={**{f"special_{i}": s for i, s in enumerate(specials)}, **named},
    )


def template(
    image: str, start: str, end: str, assistant: str = "assistant", bos: str = "", named: str = "\n"
) -> str:
    """A chat template that writes `image` for an image part; a turn is start, role, `named`, …"""
    return (
        f"{bos}{{%- for message in messages -%}}"
        f"{start}{{{{ '{assistant}' if message.role == 'assistant' else message.role }}}}{named}"
        "{% if message.content is string -%}{{ message.content }}{%- else -%}"
        "{%- for part in message.content -%}"
        f"{{%- if part.type == 'image' -%}}{image}"
        "{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}"
        f"{end}\n{{% endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{start}{assistant}{named}{{% endif -%}}"
    )


def chatml(image: str) -> str:
    return template(image, "<|im_start|>", "<|im_end|>")


def configure(processor: ProcessorMixin, model_type: str, text: dict, **values: Any) -> Built:
    """The config, its text part with the vocabulary and special tokens of `processor`."""
    words = processor.tokenizer
    ids = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    text = {**TEXT, "vocab_size": len(words), "bos_token_id": None, **ids, **text}
    return AutoConfig.for_model(model_type, text_config=text, **values), processor


# ---- Qwen --------------------------------------------------------------------------------------


def qwen_tokens(processor: ProcessorMixin) -> dict[str, int]:
    convert = processor.tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": processor.image_token_id,
        "video_token_id": processor.video_token_id,
        "vision_start_token_id": convert("<|vision_start|>"),
        "vision_end_token_id": convert("<|vision_end|>"),
    }


def qwen3_5(layer_types: list[str]) -> Built:
    processor = build_processor(TEXTS, 320)
    rope = {**MROPE, "partial_rotary_factor": 1.0, "mrope_interleaved": True}
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    return configure(
        processor,
        "qwen3_5",
        {
            "layer_types": layer_types,
            "num_hidden_layers": len(layer_types),
            "rope_parameters": rope,
            **linear,
        },
        vision_config={**QWEN_VISION, "num_position_embeddings": 16},
        tie_word_embeddings=True,
        **qwen_tokens(processor),
    )


def qwen3_5_full() -> Built:
    return qwen3_5(["full_attention", "full_attention"])


def qwen3_5_hybrid() -> Built:
    return qwen3_5(["linear_attention", "full_attention"])


def qwen_parts(patch_size: int, chat_template: str) -> dict[str, Any]:
    words = tokenizer(SPECIAL_TOKENS, "<|im_end|>", "<|endoftext|>")
    patches = {"patch_size": patch_size, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"shortest_edge": 32 * 32, "longest_edge": 96 * 96}
    return {
        "tokenizer": words,
        "image_processor": Qwen2VLImageProcessor(size=pixels, **patches),
        "chat_template": chat_template,
        **{"video": {"size": pixels, **patches}},
    }


def qwen3_vl(num_layers: int = 2) -> Built:
    parts = qwen_parts(16, CHAT_TEMPLATE)
    video = Qwen3VLVideoProcessor(**parts.pop("video"))
    processor = Qwen3VLProcessor(video_processor=video, **parts)
    deepstack = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return configure(
        processor,
        "qwen3_vl",
        {
            "num_hidden_layers": num_layers,
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
        },
        vision_config={**QWEN_VISION, **deepstack},
        **qwen_tokens(processor),
    )


def qwen2_5_vl() -> Built:
    parts = qwen_parts(14, CHAT_TEMPLATE)
    video = Qwen2VLVideoProcessor(**parts.pop("video"))
    processor = Qwen2_5_VLProcessor(video_processor=video, **parts)
    # Windows of 28 pixels: every image has several, so that the window attention is one.
    windows = {"window_size": 28, "fullatt_block_indexes": [1]}
    return configure(
        processor,
        "qwen2_5_vl",
        {"rope_parameters": MROPE},
        vision_config={**QWEN_VISION, **windows},
        **qwen_tokens(processor),
    )


# ---- the others --------------------------------------------------------------------------------


def gemma3() -> Built:
    boi, eoi, image = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
    specials = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", boi, eoi, image]
    words = sentencepiece(
        specials, "<end_of_turn>", "<pad>", boi_token=boi, eoi_token=eoi, image_token=image
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer=words,
        image_seq_length=4,
        chat_template=template(boi, "<start_of_turn>", "<end_of_turn>", "model", "<bos>"),
    )
    return configure(
        processor,
        "gemma3",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            # It multiplies embeddings by sqrt(32), and they are the head: else a token repeats.
            "initializer_range": 0.02,
        },
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
        image_token_index=words.image_token_id,
    )


def internvl() -> Built:
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *names.values()]
    words = tokenizer(specials, "<|im_end|>", "<|endoftext|>", merges=20, **names)
    square = {"height": 32, "width": 32}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size=square, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=words,
        video_processor=InternVLVideoProcessor(size=square),
        image_seq_length=4,
        chat_template=chatml("<IMG_CONTEXT>"),
    )
    return configure(
        processor,
        "internvl",
        {"model_type": "qwen2"},
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=processor.image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def llava_onevision() -> Built:
    names = {"image_token": "<image>", "video_token": "<video>"}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *names.values()]
    words = tokenizer(specials, "<|im_end|>", "<|endoftext|>", merges=20, **names)
    square = {"height": 32, "width": 32}
    grid = [[32, 32], [32, 64], [64, 32], [64, 64]]
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=grid),
        tokenizer=words,
        video_processor=LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>"),
    )
    return configure(
        processor,
        "llava_onevision",
        {"model_type": "qwen2"},
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=words.image_token_id,
        video_token_index=words.video_token_id,
        image_grid_pinpoints=grid,
    )


def idefics_tokens(**named: str) -> PreTrainedTokenizerFast:
    places = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    image = ["<fake_token_around_image>", "<image>", "<global-img>", *places]
    specials = ["<|im_start|>", "<end_of_utterance>", "<pad>", *image, *named.values()]
    return tokenizer(specials, "<end_of_utterance>", "<pad>", **named)


IDEFICS_IMAGES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
IDEFICS_TEMPLATE = template("<image>", "<|im_start|>", "<end_of_utterance>")


def idefics3() -> Built:
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(**IDEFICS_IMAGES),
        tokenizer=idefics_tokens(),
        image_seq_len=4,
        chat_template=IDEFICS_TEMPLATE,
    )
    return configure(
        processor,
        "idefics3",
        {"model_type": "llama"},
        vision_config=VISION,
        image_token_id=processor.image_token_id,
    )


def smolvlm() -> Built:
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**IDEFICS_IMAGES),
        tokenizer=idefics_tokens(video_token="<video>"),
        video_processor=SmolVLMVideoProcessor(**IDEFICS_IMAGES),
        image_seq_len=4,
        chat_template=IDEFICS_TEMPLATE,
    )
    return configure(
        processor,
        "smolvlm",
        {"model_type": "llama"},
        vision_config=VISION,
        image_token_id=processor.image_token_id,
    )


def mistral3() -> Built:
    image = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    specials = ["<s>", "</s>", "<pad>", "[INST]", "[/INST]", *image]
    words = tokenizer(specials, "</s>", "<pad>", merges=30)
    processor = PixtralProcessor(
        image_processor=PixtralImageProcessor(
            size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}
        ),
        tokenizer=words,
        patch_size=8,
        spatial_merge_size=2,
        chat_template=template("[IMG]", "[INST]", "[/INST]", bos="<s>"),
    )
    return configure(
        processor,
        "mistral3",
        {"model_type": "mistral", "sliding_window": None},
        vision_config={**VISION, "model_type": "pixtral", "image_size": 64, "head_dim": 16},
        image_token_index=processor.image_token_id,
        tie_word_embeddings=False,
    )


def lfm2_vl() -> Built:
    names = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail": "<|img_thumbnail|>",
    }
    tiles = [f"<|img_row_{i + 1}_col_{j + 1}|>" for i in range(4) for j in range(4)]
    specials = ["<|pad|>", "<|startoftext|>", "<|im_start|>", "<|im_end|>", *names.values(), *tiles]
    words = tokenizer(specials, "<|im_end|>", "<|pad|>", **names)
    processor = Lfm2VlProcessor(
        image_processor=Lfm2VlImageProcessor(
            encoder_patch_size=8,
            tile_size=32,
            min_tiles=2,
            max_tiles=4,
            min_image_tokens=2,
            max_image_tokens=4,
        ),
        tokenizer=words,
        chat_template=template("<image>", "<|im_start|>", "<|im_end|>", bos="<|startoftext|>"),
    )
    vision = {"model_type": "siglip2_vision_model", "vision_use_head": False, "num_patches": 16}
    return configure(
        processor,
        "lfm2_vl",
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        vision_config={**VISION, **vision},
        image_token_id=processor.image_token_id,
        projector_hidden_size=32,
    )


def llava() -> Built:
    names = {"image_token": "<image>"}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *names.values()]
    words = tokenizer(specials, "<|im_end|>", "<|endoftext|>", merges=20, **names)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chatml("<image>"),
    )
    return configure(
        processor,
        "llava",
        {"model_type": "llama"},
        vision_config={**VISION, "model_type": "clip_vision_model"},
        image_token_index=processor.image_token_id,
        image_seq_length=16,
    )


def glm4v(model_type: str = "glm4v", **text: Any) -> Built:
    names = {"image_token": "<|image|>", "video_token": "<|video|>"}
    frame = {
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    }
    turns = ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"]
    words = tokenizer(
        [*turns, *names.values(), *frame.values()], "<|user|>", "<|endoftext|>", **names
    )
    patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"shortest_edge": 2 * 28 * 28, "longest_edge": 2 * 96 * 96}
    place = f"{frame['image_start_token_id']}<|image|>{frame['image_end_token_id']}"
    processor = Glm4vProcessor(
        image_processor=Glm4vImageProcessor(size=pixels, **patches),
        tokenizer=words,
        video_processor=Glm4vVideoProcessor(size=pixels, **patches),
        chat_template=template(place, "<|", "", bos="[gMASK]<sop>", named="|>\n"),
    )
    return configure(
        processor,
        model_type,
        {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}, **text},
        vision_config={**QWEN_VISION, "image_size": 56, "patch_size": 14},
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
        **{name: words.convert_tokens_to_ids(token) for name, token in frame.items()},
    )


def glm4v_moe() -> Built:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return glm4v("glm4v_moe", first_k_dense_replace=1, **experts)


FAMILIES: dict[str, Callable[[], Built]] = {
    "qwen3_5": qwen3_5_full,
    "qwen3_5_hybrid": qwen3_5_hybrid,
    "qwen3_vl": qwen3_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "gemma3": gemma3,
    "internvl": internvl,
    "llava_onevision": llava_onevision,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "mistral3": mistral3,
    "llava": llava,
    "glm4v": glm4v,
    "lfm2_vl": lfm2_vl,
}
WITH_BUFFERS: dict[str, Callable[[], Built]] = {"glm4v_moe": glm4v_moe}
"""Families whose weights are not all parameters: none of those above has a persistent buffer."""


def write(family: str, folder: Path, seed: int = 0) -> None:
    """Write model and processor; the same seed gives the same weights."""
    config, processor = {**FAMILIES, **WITH_BUFFERS}[family]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        # Biases, norms and some projections begin at 0 or 1, which would hide what they are for.
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.any():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
        for name, buffer in model.named_buffers():
            if name in model.state_dict():
                buffer.add_(torch.randn_like(buffer), alpha=0.2)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
