"""Real tokenizers and processors, made on the spot.

A model trained from scratch needs a tokenizer that fits it; nothing can be downloaded for it. The
result is the family's own processor class, which saves and loads like any processor of the hub.
"""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'text' -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def train_bpe(texts: list[str], vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE; the same texts give the same result."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return tokenizer.get_vocab(), [tuple(pair) for pair in merges]


def build_processor(
    texts: list[str],
    vocab_size: int = 512,
    min_pixels: int = 32 * 32,
    max_pixels: int = 1024 * 1024,
) -> Qwen3VLProcessor:
    """A Qwen3.5 processor (patches of 16, merged 2 by 2) whose tokenizer is trained on `texts`.

    `vocab_size` counts the 256 bytes and the special tokens; fewer merges may be found in `texts`.
    """
    vocab, merges = train_bpe(texts, vocab_size)
    tokenizer = Qwen3_5Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS[1:],
    )
    patches = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    half = [0.5, 0.5, 0.5]
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            size=pixels, image_mean=half, image_std=half, **patches
        ),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=pixels, **patches),
        chat_template=CHAT_TEMPLATE,
    )
