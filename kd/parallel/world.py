"""Ranks: the process group, the device mesh and the few collectives the recipes use."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kd.parallel.cores import cores_per_rank, env_threads
from kd.types import AgreedError, UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
T = TypeVar("T")


@dataclass
class ParallelConfig:
    """How ranks are laid out and in which precision they compute (FSDP2 and HSDP)."""

    nproc: int = 1
    """Ranks that `kd.run` starts itself; leave at 1 under torchrun or SLURM."""
    dp_replicate: int = 1
    """Copies of the sharded model (HSDP); the rest of the ranks shard each copy."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu or cuda."""
    compute_dtype: str = "float32"
    """Weights are cast to it for forward and backward; the sharded master weights stay float32."""
    reduce_dtype: str = "float32"
    """Gradients are reduced and accumulated in it."""
    activation_checkpointing: bool = False
    cpu_offload: bool = False
    """What is trained, its gradients and AdamW's moments in host memory, where AdamW steps."""
    compile: bool = False
    """torch.compile for each block of the language models, where there is no cache to fill."""
    sync_every_micro_batch: bool | str = "auto"
    """true: reduce-scatter after each micro-batch, which keeps only sharded gradients in memory;
    false: once per optimizer step, which saves traffic and keeps unsharded gradients; auto: true
    on one node, and on several where the memory estimate does not fit the GPU otherwise."""
    cpu_threads: int = 0
    """CPU threads of each rank, also of one on a GPU; 0: OMP_NUM_THREADS, or without it the cores
    that this process may use, divided among the local ranks."""
    timeout_s: int = 1800
    tp_size: int = 1
    pp_size: int = 1
    """Only there to be refused."""

    def validate(self) -> None:
        """Refuse values out of range."""
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"parallel.device={self.device}: use auto, cpu or cuda")
        for name in ("compute_dtype", "reduce_dtype"):
            if getattr(self, name) not in DTYPES:
                raise UserError(
                    f"parallel.{name}={getattr(self, name)}: use one of {', '.join(DTYPES)}"
                )
        if self.tp_size != 1 or self.pp_size != 1:
            raise UserError(
                f"parallel.tp_size={self.tp_size}, parallel.pp_size={self.pp_size}: there is no "
                "tensor or pipeline parallelism; all ranks shard with FSDP2 (parallel.nproc), in "
                "copies of their own with parallel.dp_replicate"
            )
        if self.nproc < 1:
            raise UserError(f"parallel.nproc={self.nproc}: at least one rank is needed")
        if self.cpu_threads < 0 or self.timeout_s < 1:
            raise UserError(
                f"parallel.cpu_threads={self.cpu_threads}, parallel.timeout_s={self.timeout_s}: "
                "give threads of 0 or more and at least a second"
            )
        if isinstance(self.sync_every_micro_batch, str) and self.sync_every_micro_batch != "auto":
            raise UserError(
                f"parallel.sync_every_micro_batch={self.sync_every_micro_batch}: use auto, true or "
                "false"
            )
        ranks = self.num_ranks()
        if self.dp_replicate < 1 or ranks % self.dp_replicate:
            raise UserError(
                f"parallel.dp_replicate={self.dp_replicate} does not divide the {ranks} ranks"
            )

    def num_ranks(self) -> int:
        """Ranks of the run: those of the launcher if there is one, else `nproc`."""
        return int(os.environ.get("WORLD_SIZE", self.nproc))

    def num_nodes(self) -> int:
        """Machines of the run: by the launcher's LOCAL_WORLD_SIZE, and 1 without a launcher."""
        ranks = self.num_ranks()
        return -(-ranks // int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))

    def device_type(self) -> str:
        """`cpu` or `cuda`."""
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("parallel.device=cuda: no CUDA device here; use cpu or auto")
        return self.device

    def build(self) -> World:
        """Join the process group and lay out the mesh."""
        device_type = self.device_type()
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if device_type == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"rank {local_rank} of this machine has no GPU: it has "
                    f"{torch.cuda.device_count()}; start fewer ranks"
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
        torch.set_num_threads(self.cpu_threads or env_threads() or cores_per_rank())
        _init_process_group(device, self.timeout_s)
        size = dist.get_world_size()
        shape = (self.dp_replicate, size // self.dp_replicate)
        mesh = (
            init_device_mesh(device_type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))
            if self.dp_replicate > 1
            else init_device_mesh(device_type, (size,), mesh_dim_names=("dp_shard",))
        )
        return World(mesh, device, dist.get_rank(), size)


def _init_process_group(device: torch.device, timeout_s: int) -> None:
    _settle_at_exit()
    timeout = datetime.timedelta(seconds=timeout_s)
    is_gpu = device.type == "cuda"
    # gloo beside nccl: asynchronous checkpoints and object collectives run on the CPU.
    backend = "cpu:gloo,cuda:nccl" if is_gpu else "gloo"
    # Without its device NCCL would connect in the first step, and connect anew for each submesh.
    device_id = device if is_gpu else None
    try:
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout, device_id=device_id)
        else:  # one process: no address, no port
            dist.init_process_group(
                backend,
                store=dist.HashStore(),
                rank=0,
                world_size=1,
                timeout=timeout,
                device_id=device_id,
            )
    except RuntimeError as error:
        if "Unable to find interface" not in str(error):
            raise
        raise UserError(
            "ranks talk over a network interface, also one alone, and none is up here, not even "
            "the loopback one\nBring it up: ip link set lo up"
        ) from None


@functools.cache
def _settle_at_exit() -> None:
    atexit.register(settle)


def settle(limit_s: float = 10.0) -> None:
    """Wait until the other threads of this process are asleep, before the interpreter is torn down.

    A thread of gloo may still hold the tensors of the last collective, and needs the interpreter to
    let go of them. Where it comes too late for that (its core is taken), the process aborts, and a
    run that has finished fails: "terminate called without an active exception". The thread outlives
    the process group, to which caches of torch refer.
    """
    deadline = time.monotonic() + limit_s
    asleep = 0
    while asleep < 2 and time.monotonic() < deadline:
        time.sleep(0.002)  # in which one that waits for the interpreter gets it
        asleep = asleep + 1 if _others_are_asleep() else 0


def _others_are_asleep() -> bool:
    me = threading.get_native_id()
    states = []
    for path in Path("/proc/self/task").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            if int(path.parent.name) != me:
                states.append(path.read_text().rpartition(")")[2].split()[0])
    return "R" not in states


@dataclass(frozen=True)
class World:
    """One rank and its place among all ranks."""

    mesh: DeviceMesh
    device: torch.device
    rank: int
    size: int

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks to the user."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks; `values` stays as it is."""
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def sum_ints(self, *values: int) -> list[int]:
        """The sums over all ranks of numbers known on the host, without a device sync."""
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, value: bool) -> bool:
        """Whether it is so on some rank; the same answer on every rank."""
        return value if self.size == 1 else self.sum_ints(value)[0] > 0

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """The picklable values of all ranks, in rank order, on every rank.

        `group`: of all ranks as well, for collectives apart from those of other threads.
        """
        if self.size == 1:
            # Not only faster: a large gather runs in gloo's own thread, which then has OpenMP
            # threads of its own; with more of those than cores, libgomp stops spinning, and every
            # later step on a 2-core CPU takes 1.4 times as long.
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=group)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's picklable value on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def scatter(self, values: list[T] | None) -> T:
        """One of rank 0's picklable values, one per rank, on each; the others give None."""
        if self.size == 1:
            assert values is not None
            return values[0]
        box: list[T | None] = [None]
        dist.scatter_object_list(box, values, src=0)
        return cast(T, box[0])

    def collect(self, value: T) -> list[T]:
        """The picklable values of all ranks, in rank order, on rank 0; nothing on the others."""
        if self.size == 1:
            return [value]
        values = [value] * self.size if self.is_main else None
        dist.gather_object(value, values, dst=0)
        return values or []

    def agree(self, problem: str | None) -> None:
        """End the run on every rank if one of them has a problem; rank 0 tells of it, once."""
        problems = [p for p in self.gather(problem) if p]
        if not problems:
            return
        if self.is_main:
            raise AgreedError(problems[0])
        with contextlib.suppress(RuntimeError):
            self.sum_ints(0)  # until rank 0 has spoken and gone: a launcher kills who is left
        raise SystemExit(2)

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()

    def close(self) -> None:
        """Leave the process group, so that another run in this process can start."""
        dist.destroy_process_group()
