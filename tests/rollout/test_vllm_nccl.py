"""Weights streamed into stand-ins of vLLM servers over gloo, which stands in for NCCL.

The stand-ins check what vLLM 0.32's routes check, and receive by a restatement of its
`packed_nccl_broadcast_consumer`. The real server's routes are in tests/vllm/test_live_nccl.py.
"""

from __future__ import annotations

import base64
import datetime
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor

from kd.model import VLM, LoRAConfig, TensorSpec, WeightStream
from kd.model.tiny import build_processor
from kd.parallel import ParallelConfig, World
from kd.rollout.nccl import NcclCommunicator
from kd.rollout.vllm import VllmEngine, VllmEngineConfig
from kd.rollout.vllm_nccl import NcclTransfer
from kd.rollout.vllm_packed import cut, packed
from kd.rollout.vllm_weights import write
from kd.types import UserError
from tests.processes import LIMIT_S
from tests.rollout import gloo_standin
from tests.rollout.gloo_standin import GlooCommunicator, Worker
from tests.rollout.test_vllm import (
    CHAT,
    SCRATCH,
    TEXTS,
    Handler,
    Standin,
    State,
    config,
    expected,
    fails,
    generate,
    hangs,
    make_policy,
    policy,
    processor,
    received,
    root,
)

__all__ = ["policy", "processor", "root"]  # fixtures
BUFFER_BYTES = 5_000
WEIGHT_ROUTES = (
    "/update_weight_version",
    "/pause",
    "/shutdown_weight_transfer_engine",
    "/get_world_size",
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/reset_encoder_cache",
    "/reset_prefix_cache",
    "/resume",
)


def receive(
    update: dict[str, Any], buffer_bytes: int, broadcast: Callable[[Tensor], object]
) -> dict[str, Tensor]:
    """As vLLM does: it knows names, types, shapes and the size, and cuts by itself."""
    weights: dict[str, Tensor] = {}
    left = list(zip(update["names"], update["dtype_names"], update["shapes"], strict=True))
    while left:
        taken, total = [], 0
        while left and total <= buffer_bytes:
            name, dtype_name, shape = left.pop(0)
            dtype = getattr(torch, dtype_name)
            taken.append((name, dtype, shape, math.prod(shape) * dtype.itemsize))
            total += taken[-1][-1]
        buffer = torch.empty(total, dtype=torch.uint8)
        broadcast(buffer)
        for (name, dtype, shape, _), part in zip(
            taken, buffer.split([size for *_, size in taken]), strict=True
        ):
            assert name not in weights
            weights[name] = part.view(dtype).view(shape)
    return weights


@dataclass
class NcclState(State):
    """Also of the routes that take weights over NCCL, with the names and errors of vLLM 0.32."""

    backend: str | None = "NCCLWeightTransferEngine"
    world_size: int = 1
    group: list[Worker] = field(default_factory=list)
    buffer_bytes: int = 0
    is_updating: bool = False
    weights: dict[str, Tensor] = field(default_factory=dict)

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        match path:
            case "/get_world_size":
                return {"world_size": self.world_size}
            case "/shutdown_weight_transfer_engine":
                assert not self.is_updating
                self.group = []
            case "/init_weight_transfer_engine":
                self.join(**body["init_info"])
            case "/start_weight_update":
                assert not self.is_updating and self.paused, "start"
                self.is_updating, self.weights = True, {}
            case "/update_weights":
                assert self.is_updating and self.group, "update"
                self.weights = receive(body["update_info"], self.buffer_bytes, self.broadcast)
            case "/finish_weight_update":
                assert self.is_updating and self.weights, "finish"
                self.is_updating = False
            case _:
                return super().answer(path, body)
        return {"message": "done"}

    @property
    def paused(self) -> bool:
        return self.count("/pause") > self.count("/resume")

    def broadcast(self, buffer: Tensor) -> None:
        """To all workers; each has all weights, and takes its part of them."""
        copies = [buffer, *(torch.empty_like(buffer) for _ in self.group[1:])]
        on_all([partial(w.broadcast, copy, 0) for w, copy in zip(self.group, copies, strict=True)])
        assert all(torch.equal(copy, buffer) for copy in copies)

    def join(
        self,
        *,
        nccl_unique_id_b64: str,
        rank_offset: int,
        world_size: int,
        packed: bool,
        packed_buffer_size_bytes: int,
        packed_num_buffers: int,
    ) -> None:
        unique_id = base64.b64decode(nccl_unique_id_b64, validate=True)
        assert len(unique_id) == 128 and packed and packed_num_buffers == 2
        assert world_size == rank_offset + self.world_size
        self.buffer_bytes = packed_buffer_size_bytes
        made: list[Worker] = []
        ranks = range(rank_offset, world_size)
        on_all([lambda r=r: made.append(Worker(unique_id, r, world_size)) for r in ranks])
        self.group = made


def on_all(works: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)


class NcclHandler(Handler):
    """What a worker does not accept comes back as vLLM's error 500."""

    def reply(self, body: dict[str, Any]) -> None:
        state = self.state
        assert isinstance(state, NcclState)
        if "init_info" in body and body["init_info"] == {}:
            name = state.backend
            said = f"Invalid init_info for {name}: missing" if name else "not configured"
            content = f'{{"error": {{"message": "Worker failed with error \'{said}\'"}}}}'.encode()
            self.send_response(500)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        super().reply(body)


@pytest.fixture
def standin(processor, root) -> Iterator[Callable[..., Standin]]:
    """Starts stand-ins."""
    from kd.data import Renderer

    render = Renderer(processor)
    started: list[Standin] = []

    def start(**changes: Any) -> Standin:
        state = NcclState(str(root), lambda m: render.prompt(received(m)).ids_S.tolist(), **changes)
        handler = type("Of", (NcclHandler,), {"state": state})
        made = Standin(state, ThreadingHTTPServer(("127.0.0.1", 0), handler))
        made.server.daemon_threads = True
        threading.Thread(target=made.server.serve_forever, args=(0.05,), daemon=True).start()
        started.append(made)
        return made

    yield start
    for made in started:
        made.stop()


def engine_of(policy, *standins: Standin, **changes) -> VllmEngine:
    settings = config(*standins, **changes)
    return settings.connect(policy, NcclTransfer(policy, settings, GlooCommunicator, BUFFER_BYTES))


def on_disk(folder: Path, policy, dtype: str = "bfloat16") -> dict[str, Tensor]:
    """What `transfer=disk` would have given the servers."""
    from kd.model import gather

    write(folder / "disk", gather(policy.vlm), policy, dtype)
    return load_file(folder / "disk" / "model.safetensors")


def assert_same_bytes(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
        bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (ours[name], value)]
        assert torch.equal(*bits), name


def change(policy) -> None:
    """A step of training."""
    with torch.no_grad():
        for parameter in policy.vlm.parameters():
            parameter.add_(torch.randn_like(parameter))


# ---- buffers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer_bytes", [0, 1, 4_096, 100_000, 2**30])
def test_vllm_cuts_as_we_do(policy, tmp_path, buffer_bytes):
    """Also where one buffer holds all, or each tensor has its own."""
    stream = WeightStream(policy.vlm, torch.bfloat16, policy.world)
    buffers = list(packed(stream, buffer_bytes, torch.device("cpu")))
    update = {
        "names": [spec.name for spec in stream.specs],
        "dtype_names": [str(spec.dtype).removeprefix("torch.") for spec in stream.specs],
        "shapes": [list(spec.shape) for spec in stream.specs],
    }
    left = iter(buffers)
    found = receive(update, buffer_bytes, lambda buffer: buffer.copy_(next(left)))
    assert next(left, None) is None
    assert_same_bytes(found, on_disk(tmp_path, policy))


def test_a_number_in_the_middle_of_which_a_tensor_begins_is_refused():
    flag = TensorSpec("flag", torch.bool, (3,))
    weight = TensorSpec("weight", torch.bfloat16, (2, 2))
    assert cut([weight, flag], 100) == [[weight, flag]]
    with pytest.raises(UserError, match=r"weight .*begins in the middle of a number"):
        cut([flag, weight], 100)


# ---- hand-over ---------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_server_receives_what_the_disk_would_hold(policy, standin, tmp_path, dtype, adapted):
    if adapted:
        policy.vlm.adapters = LoRAConfig(rank=2, alpha=6.0).inject(policy.vlm.model, 0)
    server = standin()
    engine = engine_of(policy, server, weights_dtype=dtype)
    for step in (0, 1):
        change(policy)
        engine.sync(step)
        assert_same_bytes(server.state.weights, on_disk(tmp_path, policy, dtype))
        assert {r.policy_step for r in generate(engine)} == {step}
    assert [r.response_ids for r in generate(engine)] == expected(policy)
    assert not (policy.folder / "rollout_weights").exists()
    engine.close()


def test_the_order_is_that_of_the_disk_and_a_group_is_joined_once(policy, standin):
    server = standin()
    engine = engine_of(policy, server)
    server.state.asked.clear()
    engine.sync(0)
    asked = [path for path in server.state.asked if path in WEIGHT_ROUTES]
    first = [*WEIGHT_ROUTES[:-1], "/update_weight_version", "/resume"]
    assert asked == first
    server.state.asked.clear()
    engine.sync(1)
    joining = WEIGHT_ROUTES[2:5]
    asked = [path for path in server.state.asked if path in WEIGHT_ROUTES]
    assert asked == [path for path in first if path not in joining]


def test_several_servers_of_several_workers(policy, standin, tmp_path):
    servers = standin(), standin(world_size=3)
    engine = engine_of(policy, *servers)
    engine.sync(0)
    for server in servers:
        assert_same_bytes(server.state.weights, on_disk(tmp_path, policy))
    assert [r.response_ids for r in generate(engine)] == expected(policy)
    assert all(server.state.count(CHAT) == 3 for server in servers)


def test_a_server_brought_back_gets_weights_with_the_next(policy, standin):
    one, two = standin(), standin()
    engine = engine_of(policy, one, two)
    engine.sync(0)
    two.state.version, two.state.group, two.state.weights = "default", [], {}
    assert [r.response_ids for r in generate(engine)] == expected(policy)
    assert one.state.count(CHAT) == 6 and two.state.count(CHAT) == 0
    assert two.state.version == "default" and not two.state.paused, "left alone"
    engine.sync(1)
    assert two.state.count("/init_weight_transfer_engine") == 2
    assert one.state.count("/init_weight_transfer_engine") == 1
    generate(engine)
    assert two.state.count(CHAT) == 3


def test_weights_that_all_servers_have_lost_end_the_run(policy, standin):
    server = standin()
    engine = engine_of(policy, server)
    engine.sync(0)
    server.state.version = "default"
    with pytest.raises(UserError, match=r"does not hold this step's weights.*(?s:.*)Start it"):
        generate(engine)


def test_a_server_that_is_away_is_left_out(policy, standin, caplog, tmp_path):
    one, two = standin(), standin()
    engine = engine_of(policy, one, two)
    engine.sync(0)
    one.stop()
    change(policy)
    engine.sync(1)
    assert f"not handed over yet: {one.url}" in caplog.text
    assert_same_bytes(two.state.weights, on_disk(tmp_path, policy))
    assert {r.policy_step for r in generate(engine)} == {1}
    two.stop()
    with pytest.raises(UserError, match=r"no vLLM server was of use for 0 s"):
        engine.sync(2)


@pytest.mark.parametrize(
    "path", ["/init_weight_transfer_engine", "/start_weight_update", "/finish_weight_update"]
)
def test_what_a_server_refuses_ends_the_run(policy, standin, path):
    server = standin()
    engine = engine_of(policy, server)
    body = b'{"error": {"message": "no module named layers.2"}}'
    server.state.trouble = fails(path, 99, 500, body)
    with pytest.raises(UserError, match=r"cannot take the weights .*no module named layers\.2"):
        engine.sync(0)
    assert server.state.version == "loading" and server.state.paused


@pytest.fixture
def quick_gloo(monkeypatch) -> None:
    """gloo has no abort: what nobody receives ends with its time-out."""
    monkeypatch.setattr(gloo_standin, "TIMEOUT", datetime.timedelta(seconds=15))


def test_a_server_that_stops_receiving_does_not_stop_the_others(
    policy, standin, tmp_path, quick_gloo
):
    """It answers early; what is on its way to it is given up."""
    one, two = standin(), standin()
    engine = engine_of(policy, one, two)
    body = b'{"error": {"message": "no parameter of that name"}}'
    two.state.trouble = fails("/update_weights", 1, 500, body)
    with pytest.raises(UserError, match=rf"{two.url} cannot take the weights .*of that name"):
        engine.sync(0)
    assert_same_bytes(one.state.weights, on_disk(tmp_path, policy))


def test_a_server_that_hangs_is_given_up_and_tried_again(
    policy, standin, tmp_path, caplog, quick_gloo
):
    server = standin()
    engine = engine_of(policy, server, timeout_s=5, retries=5)
    over = threading.Event()

    def hang_once(state: State, path: str, count: int) -> None:
        if path == "/update_weights" and count == 1:
            state.is_updating = False
            over.wait(LIMIT_S)

    server.state.trouble = hang_once
    engine.sync(0)
    over.set()
    assert "update_weights has not answered within 5 s" in caplog.text
    assert_same_bytes(server.state.weights, on_disk(tmp_path, policy))
    assert server.state.count("/init_weight_transfer_engine") > 1


def test_a_server_that_never_joins_is_given_up(policy, standin, quick_gloo):
    server = standin()
    engine = engine_of(policy, server, timeout_s=2, retries=0)
    over = threading.Event()
    server.state.trouble = hangs(over, "/init_weight_transfer_engine")
    with pytest.raises(UserError, match=r"no vLLM server has taken the weights after step 0"):
        engine.sync(0)
    over.set()


# ---- refused at the start ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "SparseNCCLWeightTransferEngine"])
def test_a_server_without_the_backend_is_refused(policy, standin, backend):
    with pytest.raises(UserError, match=r"takes no weights over NCCL .*KD_VLLM_TRANSFER=nccl"):
        engine_of(policy, standin(backend=backend))


def test_without_a_gpu_it_is_refused(policy, standin):
    with pytest.raises(UserError, match=r"transfer=nccl needs a GPU, and this run is on a cpu"):
        config(standin(), transfer="nccl").build(policy)
    with pytest.raises(UserError, match=r"rollout.engine.transfer=ipc: use disk or nccl"):
        replace(VllmEngineConfig(), transfer="ipc").validate("rollout.engine")


def test_the_nccl_library_is_called_as_its_header_says():
    """As far as it goes without a GPU: its version, and ids that differ."""
    try:
        one, two = (NcclCommunicator(torch.device("cuda", 0)) for _ in range(2))
    except OSError:
        pytest.skip("torch comes without NCCL here")
    assert int(one.version().split(".")[0]) == 2
    assert len(one.unique_id) == 128 and one.unique_id != two.unique_id


# ---- ranks -------------------------------------------------------------------------------------


def rank_of_two(rank: int, urls: list[str], folder: Path) -> None:
    """Shards of two ranks reach the server whole, and a refusal ends both."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    world = World(mesh, torch.device("cpu"), rank, 2)
    processor = build_processor(TEXTS, 320)
    vlm = VLM(SCRATCH.build(processor, with_weights=True))
    vlm.adapters = LoRAConfig(rank=2, alpha=6.0).inject(vlm.model, 0)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
    vlm.distribute(world, ParallelConfig(device="cpu", compute_dtype="bfloat16"))
    policy = make_policy(processor, world, folder, vlm)
    settings = VllmEngineConfig(urls=urls, timeout_s=LIMIT_S, wait_s=0.0)
    engine = settings.connect(
        policy, NcclTransfer(policy, settings, GlooCommunicator, BUFFER_BYTES)
    )
    engine.sync(0)
    from kd.model import gather

    state = gather(vlm)
    if rank == 0:
        write(folder / "disk", state, policy, "bfloat16")
    assert generate(engine)[0].policy_step == 0
    world.barrier()
    engine.close()
    with pytest.raises(UserError if rank == 0 else SystemExit):
        replace(settings, transfer="nccl").build(policy)


def test_two_ranks(standin, tmp_path):
    server = standin()
    mp.start_processes(rank_of_two, ([server.url], tmp_path), nprocs=2, start_method="forkserver")
    assert_same_bytes(server.state.weights, load_file(tmp_path / "disk" / "model.safetensors"))
    assert server.state.count("/update_weights") == 1
