"""teacher=server against a real `kd.serve`, through a network that fails in every way."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save
from transformers import AutoModelForImageTextToText, AutoProcessor

from kd.data import Collator, Renderer
from kd.model import FrozenVLM, ProcessorConfig
from kd.parallel import ParallelConfig, World
from kd.teacher import CachedTeacherConfig, KdServe, ServerTeacherConfig
from kd.teacher.payload import top_k
from kd.teacher.server import ServerTeacher
from kd.teacher.sparse import SparseTargets
from kd.types import Batch, DenseTargets, Sample, UserError
from tests.model.families import write
from tests.precision import assert_same_rows, log_prob_rounding
from tests.processes import LIMIT_S
from tests.teacher.serving import Server, proxied

pytestmark = pytest.mark.timeout(300)

COLOURS = ["red", "green", "blue", "black", "white", "orange"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("model") / "qwen3_5_hybrid"
    write("qwen3_5_hybrid", made)
    return made


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Server]:
    made = Server(folder)
    yield made
    made.stop()


@pytest.fixture
def world() -> Iterator[World]:
    made = ParallelConfig(device="cpu", cpu_threads=1).build()
    yield made
    made.close()


@pytest.fixture(scope="module")
def local(folder) -> FrozenVLM:
    return FrozenVLM(AutoModelForImageTextToText.from_pretrained(folder))


def sample(number: int) -> Sample:
    made = random.Random(number)
    content: list[dict] = [{"type": "text", "text": f"What is in picture {number}?"}]
    images = []
    for _ in range(number % 3):
        size = made.choice([(32, 32), (64, 32), (64, 64)])
        images.append(Image.new("RGB", size, made.choice(COLOURS)))
        content.insert(0, {"type": "image"})
    words = " ".join(made.choice(COLOURS) for _ in range(made.randint(1, 5)))
    return Sample(str(number), [{"role": "user", "content": content}], images, words)


@pytest.fixture
def batches(folder) -> list[Batch]:
    """Four batches of rows with no, one and two images."""
    collate = Collator(Renderer(AutoProcessor.from_pretrained(folder)), None, 512, lockstep=False)
    return [collate([sample(4 * i + j) for j in range(4)]) for i in range(4)]


@pytest.fixture
def connect(folder, server, world) -> Iterator[Callable[..., ServerTeacher]]:
    made: list[ServerTeacher] = []

    def connect(*urls: str, engine: KdServe | None = None, vocab: int = 320, **options):
        defaults = {"max_length": 512, "wait_s": 3, "timeout_s": LIMIT_S, "rows_per_request": 2}
        config = ServerTeacherConfig(
            name=str(folder),
            urls=list(urls or (server.url,)),
            engine=engine or KdServe(),
            **{**defaults, **options},
        )
        config.validate("teacher")
        processor = config.build_processor(list)
        made.append(config.build_teacher(processor, world, ParallelConfig(), vocab))
        return made[-1]

    yield connect
    for teacher in made:
        teacher.close()


def assert_dense(targets, batch: Batch, local: FrozenVLM) -> None:
    expected = local.targets(batch.teacher)
    assert isinstance(targets, DenseTargets)
    assert_same_rows(targets.hidden_ND, expected.hidden_ND, local.model)
    assert torch.equal(targets.weight_VD, expected.weight_VD)


def test_hidden_states_and_head_are_those_of_the_local_teacher(connect, batches, local):
    teacher = connect()
    teacher.expect(batches)
    for batch in batches:
        assert_dense(teacher.targets(batch), batch, local)


def test_top_k_is_that_of_the_local_teacher(connect, batches, local):
    teacher = connect(engine=KdServe(targets="topk", k=7), temperature=2.0)
    teacher.expect(batches)
    for batch in batches:
        targets = teacher.targets(batch)
        assert isinstance(targets, SparseTargets)
        ids_N = torch.tensor([i for r in batch.responses for i in r.response_ids])
        dense = local.targets(batch.teacher)
        expected = top_k(dense, ids_N, 7, 2.0, 320)
        assert torch.equal(targets.response_ids_N, ids_N)
        assert torch.equal(targets.top.ids_NK, expected.ids_NK)
        atol = log_prob_rounding(dense.hidden_ND @ dense.weight_VD.T / 2, local.model)
        torch.testing.assert_close(targets.top.logp_NK, expected.logp_NK, rtol=0, atol=atol)
        torch.testing.assert_close(targets.top.tail_N, expected.tail_N, rtol=0, atol=atol)


def test_replies_in_any_order_stay_with_their_rows(connect, server, batches, local):
    made = random.Random(0)
    wait = {number: made.random() / 3 for number in range(1, 100)}
    with proxied(server.url, before=lambda n: time.sleep(wait[n])) as (proxy, url):
        teacher = connect(url, rows_per_request=1, max_concurrency=16)
        teacher.expect(batches)
        for batch in reversed(batches):
            assert_dense(teacher.targets(batch), batch, local)
        assert proxy.requests == 16


def test_what_is_expected_is_asked_before_it_is_waited_for(connect, server, batches):
    arrived = threading.Semaphore(0)
    with proxied(server.url, before=lambda n: arrived.release()) as (_, url):
        teacher = connect(url)
        teacher.expect(batches)
        for _ in range(8):  # 16 rows, 2 per request
            assert arrived.acquire(timeout=LIMIT_S)
        teacher.expect(batches)  # once more changes nothing
        for batch in batches:
            teacher.targets(batch)
        assert not arrived.acquire(blocking=False)


GARBAGE = {
    "no safetensors": lambda body: (200, b"<html>sorry</html>"),
    "cut short": lambda body: (200, body[:-7]),
    "nothing": lambda body: (200, b""),
    "an error of its own": lambda body: (500, b"boom"),
    "hangs up": lambda body: None,
    "overloaded": lambda body: (429, b""),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_a_bad_reply_is_asked_for_again(connect, server, batches, local, name):
    def fault(number: int, body: bytes):
        return GARBAGE[name](body) if number in (1, 2, 5) else (200, body)

    with proxied(server.url, fault=fault) as (_, url):
        teacher = connect(url, wait_s=100)
        teacher.expect(batches)
        for batch in batches:
            assert_dense(teacher.targets(batch), batch, local)


def test_replies_that_stay_bad_end_the_run(connect, server, batches):
    with proxied(server.url, fault=lambda number, body: (200, b"<html>")) as (_, url):
        teacher = connect(url, retries=1)
        with pytest.raises(UserError, match=r"has failed 2 times, at last: .* sends no targets"):
            teacher.targets(batches[0])


Tensors = dict[str, torch.Tensor]

WRONG_TENSORS: dict[str, tuple[KdServe, Callable[[Tensors], object], str]] = {
    "no numbers": (KdServe(), lambda t: t["hidden_ND"].fill_(float("nan")), "not finite"),
    "narrow": (
        KdServe(),
        lambda t: t.update(hidden_ND=t["hidden_ND"][:, 1:].contiguous()),
        "of another shape",
    ),
    "without a width": (
        KdServe(),
        lambda t: t.update(hidden_ND=t["hidden_ND"][:, 0].contiguous()),
        "of another shape",
    ),
    "lengths in halves": (
        KdServe(),
        lambda t: t.update(row_lengths=t["row_lengths"] / 1),
        "sends no targets",
    ),
    "a prompt in halves": (
        KdServe(),
        lambda t: t.update(row_prompts=t["row_prompts"] / 1),
        "sends no targets",
    ),
    "hidden states instead": (
        KdServe(targets="topk", k=7),
        lambda t: [t.pop(name) for name in ("logp_NK", "tail_N")],
        "sends no targets",
    ),
    "beyond the vocabulary": (
        KdServe(targets="topk", k=7),
        lambda t: t["ids_NK"][-1].fill_(320),
        "tokens beyond the 313",
    ),
    "below it": (
        KdServe(targets="topk", k=7),
        lambda t: t["ids_NK"][0].fill_(-1),
        "tokens beyond the 313",
    ),
    "an infinite tail": (
        KdServe(targets="topk", k=7),
        lambda t: t["tail_N"].fill_(float("-inf")),
        "not finite",
    ),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_tensors_that_cannot_be_targets(connect, server, batches, name):
    """They are never trained on, and end nothing but the request: it is asked for again."""
    engine, spoil, says = WRONG_TENSORS[name]

    def fault(number: int, body: bytes):
        found = load(body)
        spoil(found)
        return 200, save(found)

    with proxied(server.url, fault=fault) as (proxy, url):
        teacher = connect(url, engine=engine, retries=1, rows_per_request=4)
        with pytest.raises(UserError, match=f"has failed 2 times, at last: .*{says}"):
            teacher.targets(batches[0])
        assert proxy.requests == 2


def without_row(body: bytes) -> bytes:
    return save({"weight": load(body)["weight"][1:].contiguous()})


@pytest.mark.parametrize(
    ("path", "spoil", "says"),
    [
        ("/v1/head", without_row, "a head of another shape than it tells of"),
        ("/v1/head", lambda body: b"<html>", "sends no head"),
        ("/v1/info", lambda body: b'{"model": "x"}', "is no server of kd.serve"),
        ("/v1/info", lambda body: b"[]", "answers no JSON object"),
    ],
)
def test_a_server_that_tells_something_else_at_the_start(connect, server, path, spoil, says):
    def others(asked: str, body: bytes) -> bytes:
        return spoil(body) if asked == path else body

    with proxied(server.url, others=others) as (_, url), pytest.raises(UserError, match=says):
        connect(url, retries=1)


def test_rows_of_somebody_else_are_not_taken(connect, server, batches):
    """A reply to another request: other lengths at least, or else another prompt."""
    kept: list[bytes] = []

    def fault(number: int, body: bytes):
        kept.append(body)
        return 200, kept[0]

    with proxied(server.url, fault=fault) as (_, url):
        teacher = connect(url, rows_per_request=4, retries=1)
        teacher.targets(batches[0])
        with pytest.raises(UserError, match=r"answers for \[.*\] tokens|reads another prompt"):
            teacher.targets(batches[1])


def test_a_slow_server_is_left_for_another(connect, server, batches, local):
    over = threading.Event()
    with proxied(server.url, before=lambda n: over.wait(LIMIT_S)) as (_, slow):
        teacher = connect(slow, server.url, timeout_s=4, wait_s=100)
        teacher.expect(batches)
        for batch in batches:
            assert_dense(teacher.targets(batch), batch, local)
        over.set()


def test_a_server_is_tried_before_the_run_gives_up(connect, server, batches, local):
    """However long another one has been waited for."""
    over = threading.Event()
    with proxied(server.url, before=lambda n: over.wait(LIMIT_S)) as (proxy, slow):
        teacher = connect(slow, server.url, timeout_s=4, wait_s=0.5, rows_per_request=4)
        assert_dense(teacher.targets(batches[0]), batches[0], local)
        over.set()
        assert proxy.requests == 1


def test_a_server_that_ends_or_starts_is_waited_for(connect, server, batches, local):
    """What answers 503 is not there, however often it says so."""
    with proxied(server.url, fault=lambda n, body: (503 if n < 4 else 200, body)) as (proxy, url):
        teacher = connect(url, retries=1, wait_s=100, rows_per_request=4)
        assert_dense(teacher.targets(batches[0]), batches[0], local)
        assert proxy.requests == 4


def test_a_server_killed_in_mid_request_is_waited_for(connect, folder, tmp_path, batches, local):
    server = Server(folder)
    try:
        teacher = connect(server.url, wait_s=100)
        assert_dense(teacher.targets(batches[0]), batches[0], local)
        teacher.expect(batches[1:])
        server.kill()
        server.start()
        for batch in batches[1:]:
            assert_dense(teacher.targets(batch), batch, local)
        server.kill()
        teacher.config.wait_s = teacher.pool.wait_s = 1
        with pytest.raises(UserError, match=r"no server was of use for 1 s.*\n.*last checkpoint"):
            teacher.targets(batches[0])
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_length": 5000}, r"start it with serve\.max_length=5000"),
        ({"engine": KdServe(targets="topk", k=1025)}, r"start it with serve\.max_top_k=1025"),
        ({"processor": ProcessorConfig(max_pixels=64 * 64)}, "renders prompts otherwise"),
    ],
)
def test_what_the_run_needs_is_asked_for_at_the_start(connect, options, says):
    with pytest.raises(UserError, match=says):
        connect(**options)


def test_one_cache_of_two_teachers_is_refused(server, folder, world, tmp_path, batches):
    """Runs that began together on an empty folder: whoever comes second has another head."""
    write("qwen3_5_hybrid", tmp_path / "other", seed=1)
    other = Server(tmp_path / "other")
    made = []
    try:
        for url in (server.url, other.url):
            source = ServerTeacherConfig(
                name=str(folder), urls=[url], engine=KdServe(), max_length=512, wait_s=3
            )
            config = CachedTeacherConfig(folder=str(tmp_path / "cache"), source=source)
            processor = config.build_processor(list)
            made.append(config.build_teacher(processor, world, ParallelConfig(), 320))
        made[0].targets(batches[0])
        with pytest.raises(UserError, match=r"is of another teacher or codec: teacher\.weights"):
            made[1].targets(batches[0])
        made[0].targets(batches[1])
    finally:
        for teacher in made:
            teacher.close()
        other.stop()


def test_another_tokenizer_is_refused(server, world, tmp_path):
    write("qwen3_vl", tmp_path / "other")
    config = ServerTeacherConfig(name=str(tmp_path / "other"), urls=[server.url], wait_s=1)
    config.engine = KdServe()
    processor = config.build_processor(list)
    with pytest.raises(UserError, match="whose tokenizer is not that of"):
        config.build_teacher(processor, world, ParallelConfig(), 320)


def test_another_teacher_in_its_place_is_refused(connect, folder, tmp_path, batches, local):
    """A server that comes back with other weights, which give no other prompts or sizes."""
    write("qwen3_5_hybrid", tmp_path / "other", seed=1)
    server = Server(folder)
    try:
        teacher = connect(server.url, wait_s=100)
        assert_dense(teacher.targets(batches[0]), batches[0], local)
        server.stop()
        server.model = tmp_path / "other"
        server.start()
        with pytest.raises(UserError, match="serves another teacher than at the start of this run"):
            teacher.targets(batches[1])
    finally:
        server.stop()


def test_nobody_there_is_told_after_a_while(connect):
    with pytest.raises(UserError, match=r"no server was of use for 1 s: .*\n"):
        connect("http://127.0.0.1:9", wait_s=1)


def test_a_server_of_something_else_is_refused(connect, server):
    with (
        proxied(f"{server.url}/nowhere") as (_, url),
        pytest.raises(UserError, match="refuses the request \\(404\\)"),
    ):
        connect(url)
