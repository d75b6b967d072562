from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from sklearn.datasets import load_digits

from kd.data import Collator, Renderer
from kd.data.digits import (
    BASIC_KINDS,
    HELD_OUT_IMAGES,
    KINDS,
    STRIP_STREAM,
    WORDS,
    DigitsConfig,
    all_texts,
    pool_images,
)
from kd.types import UserError

LABELS = np.asarray(load_digits().target)
TALK = ["count_up", "recite", "add"]


def digest(texts: list[str]) -> str:
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=8).hexdigest()


def test_pools_are_disjoint_and_complete():
    pools = [set(pool_images(name).tolist()) for name in ("held_out", "teacher", "student")]
    assert [len(pool) for pool in pools] == [HELD_OUT_IMAGES, 718, 719]
    assert set.union(*pools) == set(range(1797))
    assert set(pool_images("all").tolist()) == pools[1] | pools[2]


@pytest.mark.parametrize("pool", ["teacher", "student"])
def test_training_rows_show_images_of_their_pool_only(pool):
    rows = DigitsConfig(pool=pool).build("train")
    shown = {image for i in range(len(rows)) for image in rows.shown(i)}
    assert shown == set(pool_images(pool).tolist())


def test_validation_rows_show_held_out_images_only():
    rows = DigitsConfig().build("validation")
    assert len(rows) == HELD_OUT_IMAGES * len(BASIC_KINDS)
    assert len({rows[i].id for i in range(len(rows))}) == len(rows)
    shown = {image for i in range(len(rows)) for image in rows.shown(i)}
    assert shown == set(pool_images("held_out").tolist())


def test_few_images_are_the_only_ones_shown():
    rows = DigitsConfig(pool="student", num_images=7).build("train")
    shown = {image for i in range(len(rows)) for image in rows.shown(i)}
    assert len(rows) == 35
    assert shown == set(pool_images("student")[:7].tolist())


def test_answers_are_right():
    rows = DigitsConfig().build("train")
    for i in range(0, 600):
        sample, digits = rows[i], [int(LABELS[image]) for image in rows.shown(i)]
        said = sample.answer.rstrip(".").replace(",", "").split()
        if sample.kind == "which":
            assert WORDS.index(said[-1]) == digits[0]
        elif sample.kind == "parity":
            assert (said[-1] == "odd") == (digits[0] in (1, 3, 5, 7, 9))
        elif sample.kind == "larger":
            assert (said[0] == "Yes", "not" in said) == (digits[0] > 5, digits[0] <= 5)
        elif sample.kind == "next":
            assert WORDS.index(said[-1]) == (digits[0] + 1) % 10
        else:
            assert len(digits) == 3
            assert WORDS.index(said[2]) == len([d for d in digits if d in (0, 2, 4, 6, 8)])


def test_pictures_are_the_digits():
    rows = DigitsConfig(kinds=["count"]).build("train")
    image = np.asarray(rows[3].images[0])
    assert image.shape == (64, 192, 3)
    for column, number in enumerate(rows.shown(3)):
        tile = image[:, 64 * column : 64 * (column + 1), 0].reshape(8, 8, 8, 8).mean(axis=(1, 3))
        original = load_digits().images[number]
        assert np.corrcoef(tile.ravel(), original.ravel())[0, 1] > 0.9


def test_rows_hang_on_index_and_seed_only():
    first, again = DigitsConfig().build("train"), DigitsConfig().build("train")
    for i in (0, 4, 99):
        assert first[i].messages == again[i].messages
        assert first[i].images[0].tobytes() == again[i].images[0].tobytes()
    other = DigitsConfig(seed=1).build("train")
    assert any(first[i].messages != other[i].messages for i in range(20))
    assert [first[i].id for i in range(20)] == [other[i].id for i in range(20)]


def test_label_noise_makes_exactly_that_fraction_wrong():
    clean, noisy = DigitsConfig().build("train"), DigitsConfig(label_noise=0.25).build("train")
    sizes = range(len(clean))
    wrong = [clean[i].answer != noisy[i].answer for i in sizes]
    assert sum(wrong) == round(0.25 * len(clean))
    assert {noisy[i].answer for i in range(500)} <= set(all_texts())
    held_out = DigitsConfig(label_noise=1.0, val_samples=50).build("validation")
    assert [held_out[i].answer for i in range(50)] == [
        DigitsConfig(val_samples=50).build("validation")[i].answer for i in range(50)
    ]


def test_validation_choice_is_balanced_over_distinct_images():
    rows = DigitsConfig(val_samples=100).build("validation")
    kinds = [rows[i].kind for i in range(len(rows))]
    assert {kind: kinds.count(kind) for kind in BASIC_KINDS} == dict.fromkeys(BASIC_KINDS, 20)
    assert len({rows[i].id.split("/")[1] for i in range(100)}) == 100


@pytest.mark.parametrize("kinds", [BASIC_KINDS, KINDS])
def test_corpus_holds_every_text(kinds):
    config = DigitsConfig(kinds=list(kinds))
    rows, texts = config.build("train"), config.corpus()
    assert len(texts) == len(set(texts))
    for i in range(400):
        assert {rows[i].answer, rows[i].messages[0]["content"][-1]["text"]} <= set(texts)


def test_tokenizer_hangs_only_on_whether_a_kind_beyond_the_basic_ones_is_asked():
    assert DigitsConfig(kinds=["which"]).corpus() == DigitsConfig().corpus() == all_texts()
    assert DigitsConfig(kinds=["add"]).corpus() == DigitsConfig(kinds=list(KINDS)).corpus()
    assert set(all_texts()) < set(DigitsConfig(kinds=["add"]).corpus())


# What trained tokenizers, caches and published results rest on; see `Kind.stream`.
def test_rows_of_the_basic_kinds_stay_what_they_are():
    rows = DigitsConfig(pool="student", num_images=300, label_noise=0.3).build("train")
    samples = [rows[i] for i in range(len(rows))]
    said = [json.dumps([s.id, s.messages, s.answer, rows.shown(i)]) for i, s in enumerate(samples)]
    assert digest(all_texts()) == "36fcdc602dd0cec8"
    assert digest(said) == "ccea3bb2258d010c"


def test_kinds_draw_independently():
    streams = {kind.stream for kind in KINDS.values()}
    assert len(streams) == len(KINDS) and STRIP_STREAM not in streams


def test_counting_up_from_the_digit_shown():
    rows = DigitsConfig(kinds=["count_up"]).build("train")
    for i in range(60):
        (image,) = rows.shown(i)
        said = ", ".join(WORDS[LABELS[image] : 10])
        assert rows[i].answer == said[0].upper() + said[1:] + "."
        assert [part["type"] for part in rows[i].messages[0]["content"]] == ["image", "text"]


def test_text_rows_show_nothing_and_answer_what_they_ask():
    rows = DigitsConfig(kinds=["recite", "add"]).build("train")
    asked = set()
    for i in range(400):
        sample = rows[i]
        (part,) = sample.messages[0]["content"]
        assert part["type"] == "text" and sample.images == rows.shown(i) == []
        first, second = (
            WORDS.index(word)
            for word in part["text"].lower().rstrip("?.").replace(",", "").split()
            if word in WORDS
        )
        said = sample.answer.lower().rstrip(".")
        if sample.kind == "recite":
            assert first <= second and said.split(", ") == WORDS[first : second + 1]
        else:
            assert said == f"{WORDS[first]} plus {WORDS[second]} is {WORDS[first + second]}"
        asked.add((sample.kind, first, second))
    assert len(asked) > 100  # of 155


def test_text_rows_of_all_kinds_make_one_batch(processor):
    rows = DigitsConfig(kinds=list(KINDS)).build("train")
    batch = Collator(Renderer(processor), None, 256, lockstep=False)([rows[i] for i in range(8)])
    assert [sample.kind for sample in batch.samples] == list(KINDS)
    assert batch.rejected == [] and len(batch.student.media["image_grid_thw"]) == 6


@pytest.mark.parametrize("kind", TALK)
def test_label_noise_of_the_other_kinds_is_wrong_as_well(kind):
    clean = DigitsConfig(kinds=[kind]).build("train")
    noisy = DigitsConfig(kinds=[kind], label_noise=1.0).build("train")
    answers = set(all_texts([kind]))
    for i in range(300):
        assert noisy[i].messages == clean[i].messages
        assert noisy[i].answer != clean[i].answer and noisy[i].answer in answers


@pytest.mark.parametrize("count", range(1, len(KINDS) + 1))
def test_any_number_of_kinds_is_held_out_once_per_image(count):
    rows = DigitsConfig(kinds=list(KINDS)[:count]).build("validation")
    assert len({(image, kind) for image, kind in rows.rows}) == len(rows) == 360 * count
    assert len({image for image, _ in rows.rows[:360]}) == 360


def test_system_prompt_comes_first():
    rows = DigitsConfig(system_prompt="Be brief.").build("train")
    assert rows[0].messages[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kinds": ["which", "colour"]}, "data.kinds"),
        ({"kinds": []}, "data.kinds"),
        ({"pool": "mine"}, "data.pool is 'mine'"),
        ({"pool": "teacher", "num_images": 800}, "has 1 to 718"),
        ({"label_noise": 1.5}, "data.label_noise"),
        ({"val_samples": 400, "kinds": ["which"]}, "make 360 rows"),
        ({"on_broken_row": "skip"}, "'raise' or 'drop'"),
        ({"max_length": 0}, "data.max_length"),
        ({"num_workers": -1}, "data.num_workers"),
    ],
)
def test_impossible_settings_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        DigitsConfig(**settings).validate()
