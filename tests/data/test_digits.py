from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from kd.data.digits import HELD_OUT_IMAGES, QUESTIONS, WORDS, DigitsConfig, all_texts, pool_images
from kd.types import UserError

LABELS = np.asarray(load_digits().target)


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
    assert len(rows) == HELD_OUT_IMAGES * len(QUESTIONS)
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
    assert {kind: kinds.count(kind) for kind in QUESTIONS} == dict.fromkeys(QUESTIONS, 20)
    assert len({rows[i].id.split("/")[1] for i in range(100)}) == 100


def test_corpus_holds_every_text():
    rows, texts = DigitsConfig().build("train"), set(all_texts())
    assert len(texts) == len(all_texts())
    for i in range(300):
        assert rows[i].answer in texts
        assert rows[i].messages[0]["content"][1]["text"] in texts


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
