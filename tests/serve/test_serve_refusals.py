"""Whatever a client sends: one plain sentence, and the server goes on."""

from __future__ import annotations

import base64
import http.client
import io
import json
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from kd.parallel import World
from kd.remote import data_uri
from kd.serve.config import MIB
from tests.processes import LIMIT_S
from tests.serve.conftest import Running, request, rollouts, serving


@pytest.fixture(scope="module")
def server(folder: Callable[[str], Path], world: World) -> Iterator[Running]:
    """A server with small limits."""
    limits = {
        "max_length": 64,
        "max_rows": 3,
        "max_images": 2,
        "max_image_pixels": 10_000,
        "max_request_pixels": 15_000,
        "max_request_mib": 1,
        "max_top_k": 100,
    }
    with serving(folder("qwen3_5_hybrid"), world, **limits) as running:
        yield running


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims this size, and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(3000)))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


def uri(raw: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def encoded(kind: str, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


def text(content: Any = "What?", role: str = "user", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def pictures(*urls: Any) -> list[dict[str, Any]]:
    return [text([{"type": "image_url", "image_url": {"url": url}} for url in urls])]


def row(messages: Any = None, ids: Any = (40, 41)) -> dict[str, Any]:
    messages = [text()] if messages is None else messages
    return {"messages": messages, "response_ids": list(ids) if isinstance(ids, tuple) else ids}


def hidden(*rows: Any, **more: Any) -> dict[str, Any]:
    return {"kind": "hidden", "rows": list(rows), **more}


def topk(*rows: Any, k: Any = 4, temperature: Any = 1.0, vocab: Any = 300) -> dict[str, Any]:
    asked = {"k": k, "temperature": temperature, "vocab": vocab}
    return {"kind": "topk", "rows": list(rows or [row()]), **asked}


RED = data_uri(Image.new("RGB", (32, 32), "red"))
BIG = data_uri(Image.new("RGB", (100, 90), "red"))

CASES: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b"{", 400, "the body is no JSON"),
    "nothing": (b"", 400, "the body is no JSON"),
    "deep": (b"[" * 100_000, 400, "the body is no JSON"),
    "not text": (b'{"kind": "\xff"}', 400, "the body is no JSON"),
    "a list": ([], 422, "the body: "),
    "unknown kind": ({"kind": "logits", "rows": [row()]}, 422, "kind: use hidden or topk"),
    "no kind": ({"rows": [row()]}, 422, "kind: use hidden or topk"),
    "no rows": (hidden(), 422, "rows: "),
    "rows missing": ({"kind": "hidden"}, 422, "rows: "),
    "a row is no object": (hidden(3), 422, "rows.0: "),
    "unread option": (hidden(row(), temperature=2.0), 422, "temperature: "),
    "unread key of a row": (hidden({**row(), "answer": "A"}), 422, "rows.0.answer: "),
    "too many rows": (hidden(*[row()] * 4), 413, "4 rows, at most 3"),
    "ids are text": (hidden(row(ids=["4"])), 422, "rows.0.response_ids.0: "),
    "ids are true": (hidden(row(ids=[True])), 422, "rows.0.response_ids.0: "),
    "ids are fractions": (hidden(row(ids=[1.5])), 422, "rows.0.response_ids.0: "),
    "ids are negative": (hidden(row(), row(ids=[-1])), 422, "rows.1.response_ids.0: "),
    "ids beyond int64": (hidden(row(ids=[2**70])), 422, "row 0: response_ids has 1180"),
    "ids beyond the vocabulary": (hidden(row(ids=[5, 313])), 422, "beyond the 313 tokens"),
    "ids beyond the vocab asked": (topk(row(ids=[300])), 422, "beyond the 300 tokens"),
    "k is 0": (topk(k=0), 422, "k: "),
    "k beyond the limit": (topk(k=101), 422, "k: 101, at most 100 (serve.max_top_k)"),
    "k reaches the vocab": (topk(k=50, vocab=50), 422, "k: 50, must be below the vocab of 50"),
    "k missing": ({"kind": "topk", "rows": [row()]}, 422, "k: "),
    "vocab beyond the head": (topk(vocab=314), 422, "vocab: 314, the teacher has 313"),
    "vocab of 1": (topk(vocab=1), 422, "vocab: "),
    "temperature of 0": (topk(temperature=0), 422, "temperature: "),
    "temperature below 0": (topk(temperature=-1), 422, "temperature: "),
    "hardly a temperature": (topk(temperature=1e-30), 422, "temperature: "),
    "no temperature": (topk(temperature=None), 422, "temperature: "),
    "infinite": (topk(temperature=float("inf")), 422, "temperature: "),
    "not a number": (topk(temperature=float("nan")), 422, "temperature: "),
    "messages are text": (hidden(row("What?")), 422, "rows.0.messages: "),
    "no messages": (hidden(row([])), 422, "row 0: messages"),
    "no role": (hidden(row([{"content": "A"}])), 422, "row 0: turn 0 has no role"),
    "unknown role": (hidden(row([text(role="robot")])), 422, "row 0: turn 0 has no role"),
    "content is a number": (hidden(row([text(7)])), 422, "row 0: the content of turn 0"),
    "unknown part": (hidden(row([text([{"type": "audio"}])])), 422, "row 0: turn 0 has a part"),
    "an answer": (hidden(row([text(), text("A", "assistant")])), 422, "ends in an assistant turn"),
    "control token": (hidden(row([text("A<|im_end|>")])), 422, "the control token '<|im_end|>'"),
    "image token": (hidden(row([text("<|image_pad|>")])), 422, "the control token '<|image_pad|>'"),
    "too long a prompt": (hidden(row([text("A" * 99)])), 413, "tokens of prompt and response"),
    "too long a response": (hidden(row(), row(ids=[40] * 64)), 413, "row 1: "),
    "no data URI": (hidden(row(pictures("http://a.b/c.png"))), 422, "image 0 is no data URI"),
    "a file": (hidden(row(pictures("file:///etc/passwd"))), 422, "image 0 is no data URI"),
    "a path": (
        hidden(row([text([{"type": "image", "path": "/etc/passwd"}])])),
        422,
        "image 0 is no data URI",
    ),
    "bytes of a part": (
        hidden(row([text([{"type": "image", "bytes": "AAAA"}])])),
        422,
        "image 0 is no data URI",
    ),
    "no url": (hidden(row([text([{"type": "image_url"}])])), 422, "turn 0 has no url"),
    "an image without data": (hidden(row([text([{"type": "image"}])])), 422, "0 images beside"),
    "URI without data": (hidden(row(pictures("data:image/png"))), 422, "data URI without data"),
    "no base64": (hidden(row(pictures("data:image/png;base64,%%"))), 422, "not base64"),
    "no image": (hidden(row(pictures(uri(b"hello")))), 422, "image 0 cannot be decoded"),
    "cut off": (hidden(row(pictures(RED[:-40]))), 422, "row 0: image"),
    "a format that runs programs": (
        hidden(row(pictures(uri(encoded("EPS"), "eps")))),
        422,
        "it is no image of the formats PNG, JPEG, WEBP",
    ),
    "16 bits": (hidden(row(pictures(uri(encoded("PNG", mode="I;16"))))), 422, "pixel mode I;16"),
    "too thin": (
        hidden(row(pictures(uri(encoded("PNG", (1, 900)))))),
        422,
        "the processor refuses it",
    ),
    "too many pixels": (
        hidden(row(pictures(uri(encoded("PNG", (101, 100)))))),
        422,
        "image 0: 101x100 pixels, more than serve.max_image_pixels 10000",
    ),
    "a bomb": (
        hidden(row(pictures(uri(png_header(60_000, 60_000))))),
        422,
        "row 0: image 0 cannot be decoded: Image size (3600000000 pixels)",
    ),
    "a smaller bomb": (
        hidden(row(pictures(uri(png_header(9000, 9000))))),
        422,
        "row 0: image 0: 9000x9000 pixels, more than serve.max_image_pixels 10000",
    ),
    "pixels of a request": (
        hidden(row(pictures(BIG)), row(pictures(BIG))),
        413,
        "row 1: images of more than 15000 pixels",
    ),
    "too many images": (
        hidden(row(pictures(RED)), row(pictures(RED, RED))),
        413,
        "row 1: more than 2 images",
    ),
}


@pytest.mark.parametrize(("body", "status", "said"), CASES.values(), ids=CASES)
def test_malformed(server, body, status, said):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = server.post(content=raw)
    message = reply.json()["error"]["message"]
    assert (reply.status_code, said in message) == (status, True), message
    assert "\n" not in message and len(message) < 300, message
    assert "at 0x" not in message and "Traceback" not in message, message


def test_the_image_token_as_an_answer(server):
    (image,) = [i for i in server.model.media_ids if i == server.model.processor.image_token_id]
    reply = server.post(hidden(row(ids=[40, image])))
    assert reply.status_code == 422
    assert "stands for an image" in reply.json()["error"]["message"]


def test_the_largest_that_is_taken(server):
    assert server.post(hidden(row(pictures(RED, RED)), row(), row())).status_code == 200
    limits = topk(row(ids=[299]), k=100, vocab=300)
    assert server.post(limits).status_code == 200
    assert server.post(hidden(row(ids=[]))).status_code == 200


def test_a_body_that_is_too_large(server):
    """Whether its length is told beforehand or not."""
    body = json.dumps(hidden(row([text("A" * 2 * MIB)]))).encode()
    pieces = (body[i : i + 50_000] for i in range(0, len(body), 50_000))
    for content in (body, pieces):
        reply = server.post(content=content)
        assert reply.status_code == 413
        assert "serve.max_request_mib" in reply.json()["error"]["message"]


def sent(server: Running, pieces: Iterable[bytes], length: int) -> http.client.HTTPResponse:
    """The answer to a body of so many bytes, of which these come, when they come."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=LIMIT_S)
    connection.putrequest("POST", "/v1/targets")
    connection.putheader("Content-Length", str(length))
    connection.endheaders()
    for piece in pieces:
        connection.send(piece)
    return connection.getresponse()


def test_a_body_that_does_not_come(folder, world):
    """It has its time as a whole: some bytes now and then do not stretch it."""

    def slowly(pieces: int, pause_s: float) -> Iterator[bytes]:
        size = -(-len(body) // pieces)
        for i in range(pieces):
            yield body[i * size : (i + 1) * size]
            time.sleep(pause_s)

    body = json.dumps(hidden(row())).encode()
    limits = {"body_timeout_s": 3.0, "max_requests": 1}
    with serving(folder("qwen3_5_hybrid"), world, **limits) as server:
        for pieces in ([], [body[:-1]], slowly(4, 1.5)):
            start = time.monotonic()
            reply = sent(server, pieces, len(body))
            assert reply.status == 408
            message = json.loads(reply.read())["error"]["message"]
            assert message == "no whole body within 3 s (serve.body_timeout_s)"
            assert time.monotonic() - start > 2.9
            assert server.post(hidden(row())).status_code == 200, "its place is free again"
        assert sent(server, slowly(3, 0.1), len(body)).status == 200
        assert server.metric("kd_serve_requests_total", '{status="408"}') == 3


def test_unknown_routes_and_methods(server):
    for path, status in (("/v1/nothing", 404), ("/docs", 404), ("/v1/targets", 405)):
        reply = server.get(path)
        assert reply.status_code == status
        assert reply.json()["error"]["message"].startswith(path)


def test_statuses_are_counted(server):
    before = server.metric("kd_serve_requests_total", '{status="422"}')
    server.post(hidden())
    assert server.metric("kd_serve_requests_total", '{status="422"}') == before + 1


def test_the_token(folder, world):
    with serving(folder("qwen3_5_hybrid"), world, token="open sesame") as server:
        health = httpx.get(f"{server.url}/health", trust_env=False)
        assert health.status_code == 200 and health.json() == {"status": "ok"}
        paths = ("/metrics", "/v1/info", "/v1/head", "/v1/nothing")
        for given in ("", "Bearer", "Bearer open", "open sesame", "Basic open sesame"):
            for path in paths:
                reply = server.get(path, headers={"Authorization": given})
                assert reply.status_code == 401, (given, path)
                assert "token" in reply.json()["error"]["message"]
            strange = {"Authorization": given}
            assert server.post(request(rollouts(1)), headers=strange).status_code == 401
        assert server.get("/v1/info").status_code == 200
        assert server.payloads(rollouts(1))
