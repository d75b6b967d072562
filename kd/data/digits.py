"""Questions about scikit-learn's 1,797 handwritten digits: a small real task, nothing to download.

Every image is asked every kind of question; an answer has one form per kind, so exact match tells
right from wrong. Some kinds show no image: there, its number only seeds what is asked. Images are
split once and for all into three disjoint pools: held out (the validation split), one for training
a teacher, and one for a student, whose images the teacher has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from kd.data.base import SPLITS, DataConfig, with_system_prompt
from kd.types import Sample, UserError

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDS += ["ten", "eleven", "twelve", "thirteen", "fourteen"]
WORDS += ["fifteen", "sixteen", "seventeen", "eighteen"]
TILE_PX = 64
STRIP_TILES = 3
STRIP_STREAM = 5
"""Seeds the draw of a strip's neighbours; see `Kind.stream`."""
HELD_OUT_IMAGES = 360
POOLS = ("teacher", "student", "all")

Numbers = Sequence[int]


@dataclass(frozen=True)
class Kind:
    """A kind of question about numbers: the digits shown or, without images, some that it names."""

    stream: int
    """Seeds what a row draws; another number gives other rows, and no two kinds have the same."""
    phrasings: tuple[str, str, str]
    """With a {} for each number that is named."""
    answer: Callable[[Numbers], str]
    """The one right answer about the numbers (digits from left to right)."""
    cases: Sequence[tuple[int, ...]]
    """Numbers to ask about: each answer is that of a case."""
    num_tiles: int = 1
    """Digits in the image; 0: text alone, about one of the cases."""

    def questions(self, numbers: Numbers) -> list[str]:
        """Each phrasing, with the numbers in words where it names them."""
        words = [WORDS[number] for number in numbers]
        return [phrasing.format(*words) for phrasing in self.phrasings]

    def wrong_answers(self, numbers: Numbers) -> list[str]:
        """Those to another first digit shown, or to the other cases of a question without image."""
        shown = [(digit, *numbers[1:]) for digit in range(10)]
        answers = [self.answer(other) for other in (shown if self.num_tiles else self.cases)]
        return [text for text in answers if text != self.answer(numbers)]


def _which(digits: Numbers) -> str:
    return f"The digit is {WORDS[digits[0]]}."


def _parity(digits: Numbers) -> str:
    return f"The digit is {'odd' if digits[0] % 2 else 'even'}."


def _larger(digits: Numbers) -> str:
    return "Yes, it is larger." if digits[0] > 5 else "No, it is not larger."


def _next(digits: Numbers) -> str:
    return f"The next digit is {WORDS[(digits[0] + 1) % 10]}."


def _count(digits: Numbers) -> str:
    even = sum(digit % 2 == 0 for digit in digits)
    return f"Of these, {WORDS[even]} {'is' if even == 1 else 'are'} even."


def _recite(ends: Numbers) -> str:
    first, last = ends
    return f"{', '.join(WORDS[first : last + 1])}.".capitalize()


def _count_up(digits: Numbers) -> str:
    return _recite((digits[0], 9))


def _add(summands: Numbers) -> str:
    first, second = summands
    return f"{WORDS[first]} plus {WORDS[second]} is {WORDS[first + second]}.".capitalize()


ONE_DIGIT = [(digit,) for digit in range(10)]
PAIRS = [(first, second) for first in range(10) for second in range(10)]

KINDS: dict[str, Kind] = {
    "which": Kind(
        0,
        (
            "Which digit is this?",
            "What digit is shown in the image?",
            "Name the digit in the picture.",
        ),
        _which,
        ONE_DIGIT,
    ),
    "parity": Kind(
        1,
        (
            "Is this digit odd or even?",
            "Is the digit in the image even or odd?",
            "Odd or even: what is this digit?",
        ),
        _parity,
        ONE_DIGIT,
    ),
    "larger": Kind(
        2,
        (
            "Is this digit larger than five?",
            "Is the digit in the image more than five?",
            "Tell whether this digit is above five.",
        ),
        _larger,
        ONE_DIGIT,
    ),
    "next": Kind(
        3,
        (
            "Which digit comes after this one? After nine comes zero.",
            "Add one to this digit, nine giving zero. What do you get?",
            "Counting up, with zero after nine, what follows this digit?",
        ),
        _next,
        ONE_DIGIT,
    ),
    "count": Kind(
        4,
        (
            "How many of these digits are even?",
            "Count the even digits in the image.",
            "There are three digits here. How many are even?",
        ),
        _count,
        [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2)],
        num_tiles=STRIP_TILES,
    ),
    "count_up": Kind(
        6,
        (
            "Count from this digit up to nine.",
            "Starting at the digit in the image, count up to nine.",
            "List the digits from this one to nine.",
        ),
        _count_up,
        ONE_DIGIT,
    ),
    "recite": Kind(
        7,
        (
            "Count from {} to {}.",
            "Say the numbers from {} to {}.",
            "Starting at {}, count up to {}.",
        ),
        _recite,
        [(first, last) for first, last in PAIRS if first <= last],
        num_tiles=0,
    ),
    "add": Kind(
        8,
        (
            "What is {} plus {}?",
            "Add {} and {}.",
            "How much are {} and {} together?",
        ),
        _add,
        PAIRS,
        num_tiles=0,
    ),
}
BASIC_KINDS = ("which", "parity", "larger", "next", "count")


def all_texts(kinds: Iterable[str] = BASIC_KINDS) -> list[str]:
    """Every question and every answer of `kinds`, once: what a tokenizer for them is trained on."""
    asked = [KINDS[kind] for kind in kinds]
    texts = [text for kind in asked for case in kind.cases for text in kind.questions(case)]
    texts += [kind.answer(case) for kind in asked for case in kind.cases]
    return list(dict.fromkeys(texts))


@dataclass
class DigitsConfig(DataConfig):
    """Digits as visual question answering."""

    max_length: int = 256
    kinds: list[str] = field(default_factory=lambda: list(BASIC_KINDS))
    """Of `which`, `parity`, `larger`, `next`, `count`, `count_up`; `recite`, `add` (no image)."""
    pool: str = "all"
    """Training images: `teacher`, `student` (disjoint halves) or `all` (both)."""
    num_images: int | None = None
    """Only the first so many images of the pool; None: all of it."""
    label_noise: float = 0.0
    """Fraction of the training answers replaced by that to other numbers, always a wrong one."""
    seed: int = 0
    """Decides phrasings, a strip's neighbours, numbers in words, wrong answers; never the pools."""

    def validate(self) -> None:
        """Raise UserError on a value that cannot work."""
        super().validate()
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise UserError(
                f"data.kinds is {self.kinds}; name some of {', '.join(KINDS)}, each once."
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
        """All that the basic kinds ask and answer; with another kind, what all of them do.

        So there are two tokenizers, not one for every choice of kinds.
        """
        return all_texts(BASIC_KINDS if set(self.kinds) <= set(BASIC_KINDS) else KINDS)

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

    The turn moves on by one each round, or an image would meet the same kind again where the number
    of images is a multiple of that of kinds.
    """
    total = len(images) * len(kinds) if count is None else count
    assert math.gcd(len(images) + 1, len(kinds)) == 1
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
        image, name = self.rows[index]
        kind = KINDS[name]
        rng = np.random.default_rng([self.seed, image, kind.stream])
        phrasing = int(rng.integers(len(kind.phrasings)))
        shown = self.shown(index)
        numbers = [int(self.labels[i]) for i in shown] or rng.choice(kind.cases).tolist()
        reply = kind.answer(numbers)
        if index in self.noisy:
            reply = str(rng.choice(kind.wrong_answers(numbers)))
        content = [{"type": "image"}] if shown else []
        content += [{"type": "text", "text": kind.questions(numbers)[phrasing]}]
        messages = with_system_prompt([{"role": "user", "content": content}], self.system_prompt)
        images = [self._picture(shown)] if shown else []
        return Sample(f"digits/{image}/{name}", messages, images, reply, name)

    def shown(self, index: int) -> list[int]:
        """Numbers of the images that row `index` shows, left to right; none where it is text."""
        image, name = self.rows[index]
        num_tiles = KINDS[name].num_tiles
        if num_tiles <= 1:
            return [image][:num_tiles]
        rng = np.random.default_rng([self.seed, image, STRIP_STREAM])
        return [image, *rng.choice(self.images, num_tiles - 1).tolist()]

    def _picture(self, shown: list[int]) -> Image.Image:
        """The 8x8 greys (0..16) of the images, enlarged and side by side, as RGB."""
        strip = Image.new("RGB", (TILE_PX * len(shown), TILE_PX))
        for column, image in enumerate(shown):
            grey = (self.pixels[image] * 255 / 16).astype(np.uint8)
            tile = Image.fromarray(grey).resize((TILE_PX, TILE_PX), Image.Resampling.BILINEAR)
            strip.paste(tile.convert("RGB"), (TILE_PX * column, 0))
        return strip
