"""Tiny targets of three kinds, rows with no, one or two images, and drafts for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, ProcessorMixin

from kd.data import Collator, Renderer
from kd.dflash import (
    BlockMaker,
    DecayWeighting,
    Draft,
    DraftConfig,
    DraftOutput,
    Target,
    read_blocks,
)
from kd.model import cut
from kd.types import Batch, Rollout, Sample
from tests.model.conftest import image
from tests.model.families import qwen3_5, qwen3_vl

LAYERS = 4
KINDS = {
    "hybrid": lambda: qwen3_5(["linear_attention"] * (LAYERS - 1) + ["full_attention"]),
    "full": lambda: qwen3_5(["full_attention"] * LAYERS),
    "qwen3_vl": lambda: qwen3_vl(LAYERS),
}
TAPS = [0, 2]
BLOCK = 4
TOKENS = 25
"""Of a response, if it does not end before: the first, and six whole blocks."""


@dataclass
class Pair:
    """A target and what belongs to it."""

    target: Target
    processor: ProcessorMixin
    collator: Collator
    config: DraftConfig

    def draft(self, seed: int = 0) -> Draft:
        """A random one."""
        vocab = self.target.vocab_size
        mask = self.config.find_mask_token(self.processor.tokenizer, vocab)
        draft = Draft(self.config.resolve(self.target.model.config, vocab, mask))
        draft.init_weights(seed)
        return draft

    @property
    def stop_ids(self) -> list[int]:
        return [self.processor.tokenizer.eos_token_id]

    @property
    def forbidden_ids(self) -> list[int]:
        return self.target.forbidden_ids(len(self.processor.tokenizer))

    def greedy(self, samples: list[Sample]) -> list[Rollout]:
        """By transformers' own generate, without a draft."""
        prompts = self.collator.prompts(samples)
        ids = self.target.generate(prompts, TOKENS, self.stop_ids, self.forbidden_ids)
        said = cut(ids[: len(samples)], self.stop_ids)
        return [Rollout(s, *row, 0, "teacher") for s, row in zip(samples, said, strict=True)]

    def maker(self, draft: Draft, num_anchors: int | None = None) -> BlockMaker:
        return BlockMaker(draft.block_size, draft.mask_token_id, num_anchors)

    def read(self, draft: Draft, batch: Batch, kind: str = "dense") -> DraftOutput:
        """What the draft says at every token of the responses, and its loss."""
        blocks = self.maker(draft)(batch)
        weighting = self.config.weighting
        norm = weighting.normaliser(blocks.counts(), blocks.num_blocks)
        states = self.target.states(batch.student, blocks.ids_BQ)
        return read_blocks(draft, states, blocks, weighting, norm, kind)

    def fitted(self, rollouts: list[Rollout], steps: int) -> Draft:
        """One trained on these responses, until it says all of them right."""
        draft = self.draft()
        batch = self.collator(list(rollouts))
        optimizer = torch.optim.AdamW(draft.parameters(), lr=4e-3, weight_decay=0.0)
        for _ in range(steps):
            optimizer.zero_grad()
            out = self.read(draft, batch)
            if out.num_correct_T.tolist() == self.maker(draft)(batch).counts():
                break
            out.loss.backward()
            optimizer.step()
        return draft.eval()


def build(kind: str) -> Pair:
    config, processor = KINDS[kind]()
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(config)
    draft = DraftConfig(
        block_size=BLOCK,
        num_layers=2,
        target_layer_ids=TAPS,
        mask_token="<|video_pad|>",
        weighting=DecayWeighting(),
        export_dtype="float32",
    )
    collator = Collator(Renderer(processor), None, 2048, False)
    return Pair(Target(model, TAPS), processor, collator, draft)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return build(request.param)


@pytest.fixture(scope="module")
def full() -> Pair:
    return build("full")


def sample(i: int) -> Sample:
    """The i-th of endlessly many prompts: one image, none, or two in different turns."""
    count = (1, 0, 2)[i % 3]
    images = [image(32 + 16 * (k % 2), 32, 100 * i + k) for k in range(count)]
    letters = "".join(chr(97 + (i * j * 7 + j) % 26) for j in range(1, 4 + i % 9))
    parts = [{"type": "image"} for _ in images]
    text = {"type": "text", "text": letters}
    messages = [{"role": "user", "content": [*parts, text]}]
    if count == 2:
        first = [parts[0], {"type": "text", "text": "What is in the picture?"}]
        messages = [
            {"role": "user", "content": first},
            {"role": "assistant", "content": "A red square."},
            {"role": "user", "content": [text, parts[1]]},
        ]
    return Sample(f"row{i}", messages, images, "A blue circle.")


def save(pair: Pair, folder: Path) -> Path:
    """The target as a folder that runs can name."""
    pair.target.model.generation_config.eos_token_id = pair.stop_ids[0]
    pair.target.model.save_pretrained(folder)
    pair.processor.save_pretrained(folder)
    return folder
