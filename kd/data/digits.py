"""Questions about scikit-learn's 1,797 handwritten digits: a small real task, nothing to download.

Every image is asked every kind of question; an answer has one form per kind, so exact match tells
right from wrong. Images are split once and for all into three disjoint pools: held out (the
validation split), one for training a teacher, and one for a student, whose images the teacher has
not seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from kd.data.base import SPLITS, DataConfig, with_system_prompt
from kd.types import Sample, UserError

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TILE_PX = 64
STRIP_TILES = 3
HELD_OUT_IMAGES = 360
POOLS = ("teacher", "student", "all")

QUESTIONS: dict[str, tuple[str, ...]] = {
    "which": (
        "Which digit is this?",
        "What digit is shown in the image?",
        "Name the digit in the picture.",
    ),
    "parity": (
        "Is this digit odd or even?",
        "Is the digit in the image even or odd?",
        "Odd or even: what is this digit?",
    ),
    "larger": (
        "Is this digit larger than five?",
        "Is the digit in the image more than five?",
        "Tell whether this digit is above five.",
    ),
    "next": (
        "Which digit comes after this one? After nine comes zero.",
        "Add one to this digit, nine giving zero. What do you get?",
        "Counting up, with zero after nine, what follows this digit?",
    ),
    "count": (
        "How many of these digits are even?",
        "Count the even digits in the image.",
        "There are three digits here. How many are even?",
    ),
}


def answer(kind: str, digits: list[int]) -> str:
    """The one right answer to a question of `kind` about the digits shown, left to right."""
    digit = digits[0]
    if kind == "which":
        return f"The digit is {WORDS[digit]}."
    if kind == "parity":
        return f"The digit is {'odd' if digit % 2 else 'even'}."
    if kind == "larger":
        return f"{'Yes' if digit > 5 else 'No'}, it is {'' if digit > 5 else 'not '}larger."
    if kind == "next":
        return f"The next digit is {WORDS[(digit + 1) % 10]}."
    even = sum(d % 2 == 0 for d in digits)
    return f"Of these, {WORDS[even]} {'is' if even == 1 else 'are'} even."


def all_texts() -> list[str]:
    """Every question and every answer, once: what a tokenizer for this task is trained on."""
    texts = [question for phrasings in QUESTIONS.values() for question in phrasings]
    texts += [answer(kind, [d]) for kind in QUESTIONS if kind != "count" for d in range(10)]
    texts += [answer("count", [2] * even + [1] * (3 - even)) for even in range(4)]
    return list(dict.fromkeys(texts))


@dataclass
class DigitsConfig(DataConfig):
    """Digits as visual question answering."""

    max_length: int = 256
    kinds: list[str] = field(default_factory=lambda: list(QUESTIONS))
    """Of `which`, `parity`, `larger`, `next`, `count`."""
    pool: str = "all"
    """Training images: `teacher`, `student` (disjoint halves) or `all` (both)."""
    num_images: int | None = None
    """Only the first so many images of the pool; None: all of it."""
    label_noise: float = 0.0
    """Fraction of the training answers replaced by another digit's, always a wrong one."""
    seed: int = 0
    """Decides phrasings, the neighbours in a strip and the wrong answers; never the pools."""

    def validate(self) -> None:
        """Raise UserError on a value that cannot work."""
        super().validate()
        unknown = [kind for kind in self.kinds if kind not in QUESTIONS]
        if unknown or not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise UserError(
                f"data.kinds is {self.kinds}; name some of {', '.join(QUESTIONS)}, each once."
            )
        if self.pool not in POOLS:
            raise UserError(f"data.pool is '{self.pool}'; it can be {', '.join(POOLS)}.")
        if self.seed < 0:
            raise UserError(f"data.seed is {self.seed}; it must be 0 or more.")
        if not 0 <= self.label_noise <= 1:
            raise UserError(f"data.label_noise is {self.label_noise}; it is a fraction, 0 to 1.")
        size = len(pool_images(self.pool))
        if self.num_images is not None and not 1 <= self.num_images <= size:
            raise UserError(
                f"data.num_images is {self.num_images}; pool '{self.pool}' has 1 to {size}."
            )
        most = HELD_OUT_IMAGES * len(self.kinds)
        if self.val_samples is not None and self.val_samples > most:
            raise UserError(
                f"data.val_samples is {self.val_samples}, but {HELD_OUT_IMAGES} held-out images "
                f"and {len(self.kinds)} kinds make {most} rows. Lower it or set it to null."
            )

    def corpus(self) -> list[str]:
        """All there is to ask and to answer, whatever the kinds and images."""
        return all_texts()

    def build(self, split: str) -> DigitRows:
        """Rows of split `train` (the pool) or `validation` (the held-out images)."""
        self.validate()
        assert split in SPLITS, split
        if split == "validation":
            images = pool_images("held_out")
            rows = _balanced_rows(images, self.kinds, self.val_samples)
            return DigitRows(rows, images, 0.0, self.seed, self.system_prompt)
        images = pool_images(self.pool)[: self.num_images]
        rows = [(int(image), kind) for image in images for kind in self.kinds]
        return DigitRows(rows, images, self.label_noise, self.seed, self.system_prompt)


def pool_images(pool: str) -> np.ndarray:
    """Numbers of the images in `held_out`, `teacher`, `student` or `all` (teacher and student)."""
    order = np.random.default_rng(1797).permutation(1797)
    held_out, rest = order[:HELD_OUT_IMAGES], order[HELD_OUT_IMAGES:]
    half = len(rest) // 2
    pools = {"held_out": held_out, "teacher": rest[:half], "student": rest[half:], "all": rest}
    return pools[pool]


def _balanced_rows(
    images: np.ndarray, kinds: list[str], count: int | None
) -> list[tuple[int, str]]:
    """Kinds in turn, and no image twice before all were used once.

    The number of images is a multiple of that of kinds: the turn moves on by one each round, or an
    image would meet the same kind again.
    """
    total = len(images) * len(kinds) if count is None else count
    assert len(images) % len(kinds) == 0
    return [
        (int(images[i % len(images)]), kinds[(i + i // len(images)) % len(kinds)])
        for i in range(total)
    ]


class DigitRows:
    """Map-style rows (image, kind). Strips are filled up from `images`, the rows' own pool."""

    def __init__(
        self,
        rows: list[tuple[int, str]],
        images: np.ndarray,
        label_noise: float,
        seed: int,
        system_prompt: str | None,
    ):
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        self.pixels = np.asarray(pixels, dtype=np.float32).reshape(-1, 8, 8)
        self.labels = np.asarray(labels)
        self.rows, self.images, self.seed = rows, images, seed
        self.system_prompt = system_prompt
        order = np.random.default_rng([seed, len(rows)]).permutation(len(rows))
        self.noisy = {int(row) for row in order[: round(label_noise * len(rows))]}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Row `index`; its text and neighbours hang on the image, the kind and the seed only."""
        image, kind = self.rows[index]
        rng = np.random.default_rng([self.seed, image, list(QUESTIONS).index(kind)])
        question = str(rng.choice(QUESTIONS[kind]))
        shown = self.shown(index)
        digits = [int(self.labels[i]) for i in shown]
        reply = answer(kind, digits)
        if index in self.noisy:
            others = [answer(kind, [d, *digits[1:]]) for d in range(10)]
            reply = str(rng.choice([text for text in others if text != reply]))
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = with_system_prompt([{"role": "user", "content": content}], self.system_prompt)
        return Sample(f"digits/{image}/{kind}", messages, [self._picture(shown)], reply, kind)

    def shown(self, index: int) -> list[int]:
        """Numbers of the images that row `index` shows, left to right."""
        image, kind = self.rows[index]
        if kind != "count":
            return [image]
        rng = np.random.default_rng([self.seed, image, len(QUESTIONS)])
        return [image, *rng.choice(self.images, STRIP_TILES - 1).tolist()]

    def _picture(self, shown: list[int]) -> Image.Image:
        """The 8x8 greys (0..16) of the images, enlarged and side by side, as RGB."""
        strip = Image.new("RGB", (TILE_PX * len(shown), TILE_PX))
        for column, image in enumerate(shown):
            grey = (self.pixels[image] * 255 / 16).astype(np.uint8)
            tile = Image.fromarray(grey).resize((TILE_PX, TILE_PX), Image.Resampling.BILINEAR)
            strip.paste(tile.convert("RGB"), (TILE_PX * column, 0))
        return strip
