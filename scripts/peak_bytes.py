"""Where the memory of a step of `bench_step.py` is at its peak, by what allocated it.

    python scripts/peak_bytes.py ours --length 64
    PYTHONPATH=. DIR/bin/python scripts/peak_bytes.py "TRL Distillation" --length 64

Printed are the tensors that are held between steps, the allocations of one step that are alive when
most are (torch.profiler records each on a CPU), and what the process takes beside both.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_step import SIZES, VARIANTS, make_case, make_step, preload, status_mib
from torch._C._profiler import _EventType
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from kd.parallel import ParallelConfig

MIB = 2**20
WARM_UP_STEPS = 2


class Allocation(NamedTuple):
    """Or a release, where the size is negative."""

    time_ns: int
    address: int
    size: int
    where: str


def allocations(event: Any, chain: tuple[str, ...] = ()) -> list[Allocation]:
    """Of an event and all inside it."""
    if event.tag == _EventType.Allocation:
        fields, where = event.extra_fields, " > ".join(chain[-6:])
        return [Allocation(event.start_time_ns, fields.ptr, fields.alloc_size, where)]
    chain = (*chain, event.name.split("/")[-1][:48])
    return [found for child in event.children for found in allocations(child, chain)]


def alive_at_peak(events: list[Allocation]) -> list[Allocation]:
    """Those of the moment when most bytes are held."""
    held: dict[int, Allocation] = {}
    size = most = 0
    alive: list[Allocation] = []
    for event in sorted(events):
        size += event.size
        held.pop(event.address, None)
        if event.size > 0:
            held[event.address] = event
        if size > most:
            most, alive = size, list(held.values())
    return alive


def held_tensors() -> int:
    """Bytes of all tensors that there are."""
    sizes: dict[int, int] = {}
    for x in gc.get_objects():
        if type(x) in (torch.Tensor, torch.nn.Parameter, DTensor):  # not what compiling pretends
            storage = (x.to_local() if isinstance(x, DTensor) else x).untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def main() -> None:
    """Take steps, record the last, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("variant", choices=list(VARIANTS))
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--kd-ratio", type=float, default=1.0)
    parser.add_argument("--min-mib", type=float, default=4)
    args = parser.parse_args()
    world = ParallelConfig(cpu_threads=1, device="cpu").build()
    preload(args.variant)
    before_mib = status_mib("VmRSS")
    step = make_step(VARIANTS[args.variant](make_case(args, world)), world)
    for _ in range(WARM_UP_STEPS):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        step()
    peak_mib = status_mib("VmHWM") - before_mib
    gc.collect()
    rest_mib = held_tensors() / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    assert run.profiler is not None and run.profiler.kineto_results is not None
    roots = run.profiler.kineto_results.experimental_event_tree()
    alive = alive_at_peak([found for root in roots for found in allocations(root)])
    large = sorted((x for x in alive if x.size >= args.min_mib * MIB), key=lambda x: -x.size)
    print(f"{rest_mib:8.1f} MiB  held between steps")
    for x in large:
        print(f"{x.size / MIB:8.1f} MiB  {x.where}")
    step_mib = sum(x.size for x in alive) / MIB
    print(f"{step_mib - sum(x.size for x in large) / MIB:8.1f} MiB  smaller ones")
    print(f"{peak_mib - rest_mib - step_mib:8.1f} MiB  of the process, beside tensors")
    print(f"{peak_mib:8.1f} MiB  peak of the step before, resident")
    world.close()


if __name__ == "__main__":
    main()
