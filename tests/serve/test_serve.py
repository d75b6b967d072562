"""A server answers as the model that it serves, whatever it answers at the same time."""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from kd.data import Renderer
from kd.model import rendering_digest, tokenizer_digest
from kd.parallel import World
from kd.serve.config import ServeConfig
from kd.serve.server import bind
from kd.teacher.payload import Hidden, Payload, TopK, top_k
from kd.teacher.wire import Info, prompt_digest, unpack_head, unpack_reply
from kd.types import Rollout, UserError
from tests.precision import assert_same_rows, log_prob_rounding
from tests.processes import LIMIT_S, wait_for
from tests.serve.conftest import Local, Running, request, rollouts, serving

Asked = tuple[int, float, int] | None
FAMILIES = ("qwen3_5_hybrid", "lfm2_vl")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, folder: Callable[[str], Path], world: World
) -> Iterator[tuple[Running, Local]]:
    """A server of a family, and the model beside it."""
    path = folder(request.param)
    with serving(path, world) as server:
        yield server, Local(path)


@pytest.fixture(scope="module")
def slow(folder: Callable[[str], Path], world: World) -> Iterator[Running]:
    """A server that waits long for more rows, and has little room."""
    limits = {"window_ms": 400, "max_length": 128, "max_waiting_tokens": 150, "max_requests": 3}
    with serving(folder("qwen3_5_hybrid"), world, **limits) as server:
        yield server


def assert_is_of(payload: Payload, local: Local, row: Rollout, top: Asked = None) -> None:
    """The payload is what `payload.top_k`, or the model itself, says of the row."""
    dense = local.dense(row)
    if top is None:
        assert isinstance(payload, Hidden)
        assert_same_rows(payload.hidden_ND, dense.hidden_ND, local.vlm.model)
        return
    k, temperature, vocab = top
    wanted = top_k(dense, torch.tensor(row.response_ids), *top)
    assert isinstance(payload, TopK) and payload.ids_NK.shape == (len(row.response_ids), k)
    logits_NV = (dense.hidden_ND @ dense.weight_VD[:vocab].T) / temperature
    # By their log-probs: tokens that are equally likely may come in either order.
    found_NK = logits_NV.log_softmax(-1).gather(1, payload.ids_NK)
    pairs = [(payload.logp_NK, found_NK)]
    for name in ("logp_NK", "response_logp_N", "tail_N"):
        pairs.append((getattr(payload, name), getattr(wanted, name)))
    atol = log_prob_rounding(logits_NV, local.vlm.model)
    for got, right in pairs:
        torch.testing.assert_close(got, right, rtol=0, atol=atol)


def test_hidden_states_are_the_models(pair):
    server, local = pair
    rows = rollouts(7)
    reply = server.post(request(rows))
    assert reply.status_code == 200, reply.text
    unpacked = unpack_reply(reply.content)
    assert unpacked.teacher == server.model.info.digest
    payloads, prompts = unpacked.payloads, unpacked.prompts
    assert prompts == [prompt_digest(local.prompt_ids(row)) for row in rows]
    for row, payload in zip(rows, payloads, strict=True):
        assert_is_of(payload, local, row)


def test_top_k_is_the_models(pair):
    server, local = pair
    rows = rollouts(4, seed=1)
    vocab = server.model.info.vocab_size
    for top in ((5, 1.0, vocab), (12, 2.5, 290), (vocab - 1, 1.0, vocab)):
        k, temperature, entries = top
        payloads = server.payloads(rows, kind="topk", k=k, temperature=temperature, vocab=entries)
        for row, payload in zip(rows, payloads, strict=True):
            assert_is_of(payload, local, row, top)


def test_head_gives_the_logits(pair):
    server, local = pair
    weight_VD, bias_V = unpack_head(server.get("/v1/head").content)
    dense = local.dense(rollouts(1)[0])
    assert torch.equal(weight_VD, dense.weight_VD)
    assert bias_V is dense.bias_V is None


def test_info_says_what_is_served(pair):
    server, local = pair
    info = Info.read(server.get("/v1/info").json())
    assert info == server.model.info
    assert (info.vocab_size, info.hidden_size) == tuple(local.dense(rollouts(1)[0]).weight_VD.shape)
    processor = local.renderer.processor
    assert info.tokenizer == tokenizer_digest(processor)
    assert info.rendering == rendering_digest(processor, {})
    assert info.dtype == "float32"
    assert info.stop_ids == local.vlm.stop_ids(local.renderer.eos_token_id)


def test_everybody_gets_their_own_answer(pair):
    """Twenty at once, each with rows and a target kind of its own, in fewer forwards than that."""
    server, local = pair
    asks = [None, (4, 1.0, 300), (9, 2.0, 280)]
    jobs = [(rollouts(1 + i % 3, seed=10 + i), asks[i % 3]) for i in range(20)]
    before = server.metric("kd_serve_forward_seconds_count")
    tokens = server.metric("kd_serve_batch_tokens_sum")

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(trust_env=False, timeout=LIMIT_S) as client:

            async def ask(rows: list[Rollout], top: Asked):
                names = ("k", "temperature", "vocab")
                asked = (
                    {} if top is None else {"kind": "topk", **dict(zip(names, top, strict=True))}
                )
                return await client.post(f"{server.url}/v1/targets", json=request(rows, **asked))

            return await asyncio.gather(*(ask(rows, top) for rows, top in jobs))

    replies = asyncio.run(ask_all())
    forwards = server.metric("kd_serve_forward_seconds_count") - before
    assert 1 <= forwards < len(jobs)
    for (rows, top), reply in zip(jobs, replies, strict=True):
        assert reply.status_code == 200, reply.text
        unpacked = unpack_reply(reply.content)
        assert unpacked.prompts == [prompt_digest(local.prompt_ids(row)) for row in rows]
        for row, payload in zip(rows, unpacked.payloads, strict=True):
            assert_is_of(payload, local, row, top)
    read = sum(
        len(local.prompt_ids(row)) + len(row.response_ids) for rows, _ in jobs for row in rows
    )
    assert server.metric("kd_serve_batch_tokens_sum") - tokens == read
    assert server.metric("kd_serve_queue_tokens") == 0


def test_a_request_beyond_the_token_budget_takes_several_forwards(folder, world):
    path = folder("qwen3_5_hybrid")
    local = Local(path)
    rows = rollouts(9)
    limits = {"max_length": 128, "max_batch_tokens": 130, "max_waiting_tokens": 2000}
    with serving(path, world, **limits) as server:
        payloads = server.payloads(rows)
        assert server.metric("kd_serve_batch_rows_count") > 2
        assert server.metric("kd_serve_batch_rows_sum") == len(rows)
        assert server.metric("kd_serve_batch_tokens_bucket", '{le="256.0"}') == server.metric(
            "kd_serve_batch_tokens_count"
        )
    for row, payload in zip(rows, payloads, strict=True):
        assert_is_of(payload, local, row)


def test_who_comes_when_too_much_waits_is_sent_away_for_a_while(slow):
    row = rollouts(1)[0]
    prompt = Renderer(slow.model.processor).prompt(row.sample)
    fits = 150 // (len(prompt.ids_S) + len(row.response_ids))
    full, over = request([row] * fits), request([row] * (fits + 1))

    async def ask(client: httpx.AsyncClient, begin_s: float) -> httpx.Response:
        await asyncio.sleep(begin_s)
        return await client.post(f"{slow.url}/v1/targets", json=full)

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(trust_env=False, timeout=LIMIT_S) as client:
            return await asyncio.gather(ask(client, 0), ask(client, 0.15))

    first, second = asyncio.run(ask_all())
    assert first.status_code == 200, first.text
    assert second.status_code == 429
    assert float(second.headers["retry-after"]) >= 1
    assert "wait already" in second.json()["error"]["message"]
    assert slow.post(full).status_code == 200, "it has room again"
    never = slow.post(over)
    assert never.status_code == 413
    assert "serve.max_waiting_tokens" in never.json()["error"]["message"]


def test_so_many_requests_at_once_and_no_more(slow):
    async def ask_all() -> list[int]:
        async with httpx.AsyncClient(trust_env=False, timeout=LIMIT_S) as client:
            short = {"messages": [{"role": "user", "content": "A"}], "response_ids": [40]}
            body = {"rows": [short], "kind": "hidden"}
            posts = (client.post(f"{slow.url}/v1/targets", json=body) for _ in range(6))
            return [reply.status_code for reply in await asyncio.gather(*posts)]

    statuses = asyncio.run(ask_all())
    assert sorted(statuses) == [200] * 3 + [429] * 3


def test_who_hangs_up_is_not_worked_for(folder, world):
    with serving(folder("qwen3_5_hybrid"), world, window_ms=1000) as server:
        before = server.metric("kd_serve_batch_rows_sum")
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=LIMIT_S)
        connection.request("POST", "/v1/targets", json.dumps(request(rollouts(1))))
        wait_for(lambda: server.metric("kd_serve_queue_tokens") > 0)
        connection.close()
        wait_for(lambda: server.metric("kd_serve_requests_total", '{status="499"}') > 0)
        assert server.metric("kd_serve_queue_tokens") == 0
        assert server.payloads(rollouts(1))
        assert server.metric("kd_serve_batch_rows_sum") == before + 1


def test_a_row_that_the_model_fails_at_harms_no_other(folder, world):
    bad = 222

    def fail(module: torch.nn.Module, args: tuple, options: dict) -> None:
        if (options["input_ids"] == bad).any():
            raise RuntimeError("a fault of the model's\nand more")

    path = folder("qwen3_5_hybrid")
    local = Local(path)
    good = rollouts(2)
    for row in good:
        row.response_ids = [token for token in row.response_ids if token != bad] + [60]
    with serving(path, world, window_ms=200) as server:
        base = server.model.vlm.model.base_model
        base.register_forward_pre_hook(fail, with_kwargs=True)  # a fault, put in on purpose

        async def ask_all() -> list[httpx.Response]:
            broken = dataclasses.replace(good[0], response_ids=[bad])
            async with httpx.AsyncClient(trust_env=False, timeout=LIMIT_S) as client:
                posts = (
                    client.post(f"{server.url}/v1/targets", json=request([row]))
                    for row in (good[0], broken, good[1])
                )
                return await asyncio.gather(*posts)

        first, failed, last = asyncio.run(ask_all())
        assert failed.status_code == 500
        message = failed.json()["error"]["message"]
        assert message == "the teacher fails at this request: a fault of the model's"
        for row, reply in zip(good, (first, last), strict=True):
            assert reply.status_code == 200, reply.text
            assert_is_of(unpack_reply(reply.content).payloads[0], local, row)


def test_a_signal_lets_requests_under_way_be_answered(folder, world):
    path = folder("qwen3_5_hybrid")
    rows = rollouts(3)
    with serving(path, world, window_ms=1000) as server, ThreadPoolExecutor() as threads:
        under_way = threads.submit(server.post, request(rows))
        wait_for(lambda: server.metric("kd_serve_queue_tokens") > 0)
        server.uvicorn.handle_exit(signal.SIGTERM, None)  # as the signal does
        wait_for(lambda: server.get("/health").status_code == 503)
        refused = server.post(request(rows))
        assert refused.status_code == 503
        assert refused.json()["error"]["message"] == "the server ends"
        assert under_way.result(LIMIT_S).status_code == 200
        assert len(unpack_reply(under_way.result(LIMIT_S).content).payloads) == len(rows)


@pytest.mark.parametrize(("limits", "room"), [({}, 512), ({"max_batch_tokens": 300}, 300)])
def test_without_a_length_the_model_and_the_budget_say_it(folder, world, limits, room):
    row = rollouts(1)[0]
    with serving(folder("qwen3_5_hybrid"), world, max_length=None, **limits) as server:
        assert server.get("/v1/info").json()["max_length"] == room
        prompt = Renderer(server.model.processor).prompt(row.sample)
        row.response_ids = [40] * (room - len(prompt.ids_S))
        assert len(server.payloads([row])[0]) == len(row.response_ids)
        row.response_ids.append(40)
        reply = server.post(request([row]))
        assert reply.status_code == 413
        assert f"at most {room} (serve.max_length)" in reply.json()["error"]["message"]


def test_more_than_the_model_has_room_for_is_refused(folder, world):
    with (
        pytest.raises(UserError, match=r"max_length=513, but the teacher has room for 512 tokens"),
        serving(folder("qwen3_5_hybrid"), world, max_length=513),
    ):
        pass


def test_a_port_that_is_taken_is_named(pair):
    server, _ = pair
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(UserError, match=rf"cannot listen at 127.0.0.1, port {port}: .*serve.port"):
        bind(ServeConfig(port=port))
