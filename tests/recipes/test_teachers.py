"""Teachers that are not beside the student all the time: the same training as with one that is."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from kd.checkpoint import verify
from tests.conftest import metrics
from tests.teacher.serving import Server, proxied

LOSSES = ("train/loss", "train/ce", "train/kd", "train/grad_norm", "val/loss", "val/kd")


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("teacher") / "export"


@pytest.fixture
def teacher(train, teacher_folder) -> str:
    """A trained teacher's folder, made once."""
    if not teacher_folder.exists():
        options = ["student=digits_small", "optim.lr=0.01", "train.max_steps=12"]
        made = train("digits_teacher", "teacher", *options)
        (made / "export").rename(teacher_folder)
    return str(teacher_folder)


def test_offloaded_between_its_uses(train, teacher):
    options = [f"teacher.name={teacher}", "train.max_steps=3", "train.global_batch_size=12"]
    options += ["train.val_every=3", "validation.generate=false", "teacher.dtype=float32"]
    beside = train("digits_kd", "beside", *options)
    away = train("digits_kd", "away", *options, "teacher.offload=true")
    for key in LOSSES:
        assert metrics(away, key) == metrics(beside, key), key


def test_a_cache_is_filled_by_one_that_is_offloaded(train, teacher, tmp_path):
    options = ["train.max_steps=3", "train.global_batch_size=12", "doctor=never"]
    local = [f"teacher.name={teacher}", "teacher.dtype=float32"]
    beside = train("digits_kd", "beside", *options, *local)
    cached = ["teacher=cached", "teacher.dtype=float32", f"teacher.folder={tmp_path / 'cache'}"]
    cached += [x.replace("teacher.", "teacher.source.", 1) for x in local]
    filled = train("digits_kd", "filled", *options, *cached, "teacher.source.offload=true")
    for key in LOSSES[:4]:
        assert metrics(filled, key) == pytest.approx(metrics(beside, key), rel=1e-5), key


@pytest.fixture(scope="module")
def served(teacher_folder):
    """Started when the first test has made the teacher."""
    servers: list[Server] = []

    def serve() -> Server:
        if not servers:
            servers.append(Server(teacher_folder, compute_dtype="float64"))
        return servers[0]

    yield serve
    for server in servers:
        server.stop()


@pytest.fixture
def from_server(teacher, served) -> list[str]:
    """Overrides of digits_kd."""
    server = served()
    return ["teacher=server", f"teacher.name={teacher}", f"teacher.urls=[{server.url}]", *WAIT]


WAIT = ["teacher.wait_s=60", "data.max_length=400"]
EXACT = ["parallel.compute_dtype=float64", "parallel.reduce_dtype=float64"]
SHORT = [*EXACT, "train.max_steps=4", "train.global_batch_size=12", "train.val_every=2"]
SHORT += ["validation.generate=false", "data.max_length=400"]


@pytest.mark.parametrize("loss", ["forward_kl", "jsd"])
def test_served_hidden_states_train_as_the_local_teacher_does(train, teacher, from_server, loss):
    options = [*SHORT, f"loss={loss}", "loss.temperature=2"]
    local = train(
        "digits_kd", "local", *options, f"teacher.name={teacher}", "teacher.dtype=float32"
    )
    served = train("digits_kd", "served", *options, *from_server)
    for key in LOSSES:
        assert metrics(served, key) == pytest.approx(metrics(local, key), rel=1e-6, abs=1e-9), key


def test_a_served_top_k_of_all_but_one_token_trains_as_the_local_teacher_does(
    train, teacher, from_server
):
    vocab = AutoConfig.from_pretrained(teacher).get_text_config().vocab_size
    options = [*SHORT, "loss=reverse_kl", "loss.temperature=2"]
    local = train(
        "digits_kd", "local", *options, f"teacher.name={teacher}", "teacher.dtype=float32"
    )
    top_k = ["teacher.engine.targets=topk", f"teacher.engine.k={vocab - 1}"]
    served = train("digits_kd", "served", *options, *from_server, *top_k)
    for key in LOSSES:
        assert metrics(served, key) == pytest.approx(metrics(local, key), rel=1e-6, abs=1e-9), key
    few = train("digits_kd", "few", *options, *from_server, *top_k[:1], "teacher.engine.k=4")
    kd, dense = metrics(few, "train/kd"), metrics(local, "train/kd")
    assert 0 < kd[1] < dense[1]


@pytest.mark.parametrize("codec", ["hidden", "topk"])
def test_a_cache_is_filled_by_a_server_and_read_without(
    train, teacher, from_server, tmp_path, codec
):
    options = [*SHORT, "loss=reverse_kl", "loss.temperature=2", "doctor=never"]
    chosen = {
        "hidden": ["teacher.dtype=float32"],
        "topk": [
            "teacher.k=12",
            "teacher.source.engine.targets=topk",
            "teacher.source.engine.k=12",
        ],
    }[codec]
    source = [x.replace("teacher.", "teacher.source.", 1) for x in from_server[1:]]
    cached = ["teacher=cached", "teacher@teacher.source=server", f"teacher.codec={codec}"]
    cached += [f"teacher.folder={tmp_path / 'cache'}", *chosen, *source]
    filled = train("digits_kd", "filled", *options, *cached)
    plain = [x.replace("source.", "", 1) for x in chosen if "source." in x]
    straight = train("digits_kd", "straight", *options, *from_server, *plain)
    away = ["teacher.source.urls=[http://127.0.0.1:9]", "teacher.require_full=true"]
    read = train("digits_kd", "read", *options, *cached, *away)
    for key in LOSSES:
        assert metrics(read, key) == metrics(filled, key), key
        tolerance = {"hidden": 1e-5, "topk": 1e-2}[codec]
        assert metrics(filled, key) == pytest.approx(metrics(straight, key), rel=tolerance), key
    assert set(metrics(read, "cache/hit_rate").values()) == {1}


def test_two_tokenizers_and_the_student_s_own_responses(train, from_server, teacher):
    options = ["experiment=digits_cross", *SHORT, "rollout=student", "kd_ratio=1"]
    options += ["rollout.sampling.max_new_tokens=6"]
    local = train(
        "digits_kd", "local", *options, f"teacher.name={teacher}", "teacher.dtype=float32"
    )
    served = train("digits_kd", "served", *options, *from_server)
    for key in LOSSES:
        assert metrics(served, key) == pytest.approx(metrics(local, key), rel=1e-6), key


def test_a_server_gone_for_good_leaves_a_whole_checkpoint(
    train, teacher, served, from_server, capsys, tmp_path
):
    """Resuming reads again what was read ahead: the run equals one that was never stopped."""
    options = [*SHORT, *from_server, "train.save_every=1", "train.val_every=4", "doctor=never"]
    whole = train("digits_kd", "whole", *options)
    options.append("data.num_workers=1")
    number = iter(range(1000))

    def gone(_: int, body: bytes):  # 6 requests are a step
        return (200, body) if next(number) < 14 else None

    with proxied(served().url, fault=gone) as (_, url), pytest.raises(SystemExit) as exit_:
        train(
            "digits_kd", "stopped", *options, f"teacher.urls=[{url}]", "teacher.wait_s=0.5",
            "teacher.rows_per_request=2",
        )  # fmt: skip
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert "error: no server was of use for 0.5 s" in said and "from its last checkpoint" in said
    stopped = tmp_path / "runs" / "stopped"
    steps = sorted(path.name for path in (stopped / "checkpoints").glob("step_*"))
    assert steps[-1] in ("step_000001", "step_000002")
    assert verify(stopped / "checkpoints" / steps[-1]) is None
    train("digits_kd", "stopped", *options)
    for key in LOSSES:
        assert metrics(stopped, key) == pytest.approx(metrics(whole, key), rel=1e-6), key


TOP_K = "teacher.engine.targets=topk"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([TOP_K, "loss=uld"], "serves its top-k"),
        ([TOP_K, "teacher.temperature=1", "loss.temperature=2"], "set both alike"),
        ([TOP_K, "teacher.engine.tail=false", "loss=jsd"], "keep the tail"),
        ([TOP_K, "teacher.engine.tail=false", "teacher.engine.k=1"], "or raise k"),
        (["teacher/engine=vllm", "loss.temperature=2"], "temperature 1"),
        (["rollout=teacher"], "this teacher does not generate"),
    ],
)
def test_what_this_teacher_cannot_serve_is_refused_before_anything_is_loaded(
    train, capsys, options, says
):
    with pytest.raises(SystemExit) as exit_:
        train("digits_kd", "refused", "teacher=server", "teacher.name=nowhere", *options)
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err
