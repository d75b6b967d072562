"""`profile=true`: where the time of some steps goes, by torch.profiler, on rank 0.

The parts of a step are named by `record_function("kd::…")`, which `kd.metrics.Timer` does; without
a profiler that costs some microseconds. Times in this file are microseconds, as in a trace, until a
table shows milliseconds.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
from bisect import bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile

from kd.files import write_atomic
from kd.metrics import peak_mem_gib
from kd.parallel import World

log = logging.getLogger("kd")

PREFIX = "kd::"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
COMMUNICATION, REST = "communication", "rest"
NUM_OPERATORS = 12


class Profiler:
    """Records the steps from `steps[0]` to `steps[1]`; the step before them warms it up."""

    def __init__(
        self, enabled: bool, steps: list[int], run_dir: Path, world: World, done: int
    ) -> None:
        """`done`: steps of the run that lie behind."""
        self.first, self.last = steps
        self.run_dir, self.world = run_dir, world
        self.recorder: profile | None = None
        self.recording = False
        self.waiting = enabled and world.is_main
        if self.waiting and done >= self.first:
            log.warning(
                "profile_steps=%s: nothing is recorded, as the run goes on after step %d; "
                "name later steps",
                steps,
                done,
            )
            self.waiting = False

    @contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Around the step of that number, the first being 1."""
        if self.waiting and step >= self.first - 1:
            self._prepare()
        if self.recorder is not None and step == self.first:
            self.recorder.start_trace()
            self.recording = True
        yield
        if self.recording and step == self.last:
            self._report()

    def _prepare(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it tells of its starts on stderr
        activities = [ProfilerActivity.CPU]
        if self.world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.recorder = profile(activities=activities)
        self.recorder.prepare_trace()
        self.waiting = False

    def _report(self) -> None:
        recorder, trace, text = self.recorder, self.run_dir / "trace.json.gz", "profile.txt"
        assert recorder is not None
        memory = f"peak memory {peak_mem_gib(self.world.device):.2f} GiB"  # without that of a table
        self.close()
        recorder.export_chrome_trace(str(trace))
        with gzip.open(trace) as file:
            found = breakdown(json.load(file)["traceEvents"])
        world = self.world
        head = (
            f"steps {self.first} to {self.last}, rank {world.rank} of {world.size}, "
            f"{world.device.type}: ms per step"
        )
        table = "\n".join([head, "", *found.lines(), "", memory, ""])
        write_atomic(self.run_dir / text, table)
        print(f"\n{table}\nwritten: {trace} and {text}\n", flush=True)  # rich keeps its bar below

    def close(self) -> None:
        """End a recording, also one that will not be reported: there is one per process."""
        if self.recorder is None:
            return
        if not self.recording:  # one that was prepared has to start before it can stop
            self.recorder.start_trace()
        self.recorder.stop_trace()
        self.recorder, self.recording = None, False


@dataclass
class Breakdown:
    """Of the recorded steps together."""

    steps: int
    parts: dict[str, float]
    """In the order of a step; at every moment exactly one has the time."""
    operators: list[tuple[str, float, int]]
    """Name, time and calls; on a GPU the time of the kernels that the operator launched."""
    on_device: bool
    idle: float
    """Of a GPU: within the parts, nothing was computed or communicated."""
    collectives: float
    """With what is computed at the same time; `parts` has the time that is not."""

    def lines(self) -> list[str]:
        """As a table, per step."""
        total = sum(self.parts.values())

        def row(name: str, time: float) -> str:
            return f"{name:<24}{self._ms(time)}{100 * time / total:8.1f}"

        lines = [f"{'part':<24}{'ms':>10}{'%':>8}"]
        lines += [row(name, time) for name, time in self.parts.items()]
        lines.append(row("step", total))
        if self.on_device:
            lines += ["", row("device idle", self.idle), row("collectives", self.collectives)]
        lines += ["", f"{'operator':<48}{'ms':>10}{'calls':>8}"]
        lines += [
            f"{name[:46]:<48}{self._ms(time)}{calls / self.steps:8.0f}"
            for name, time, calls in self.operators[:NUM_OPERATORS]
        ]
        return lines

    def _ms(self, time: float) -> str:
        return f"{time / self.steps / 1000:10.1f}"


class Span(NamedTuple):
    """Some time of a trace, and who claims it."""

    start: float
    end: float
    priority: float
    name: str


def owners(spans: list[Span]) -> list[Span]:
    """Disjoint spans, in order: each moment is that of the claim of highest priority."""
    edges = [(span.start, 1, span) for span in spans] + [(span.end, 0, span) for span in spans]
    claims: list[tuple[float, float, Span]] = []
    found, since = [], 0.0
    for time, begins, span in sorted(edges):  # at the same time ends come first
        if claims and time > since:
            found.append(claims[-1][2]._replace(start=since, end=time))
        claim = (span.priority, -span.end, span)  # of two alike the one that ends first
        insort(claims, claim) if begins else claims.remove(claim)
        since = time
    return found


def length(spans: list[Span]) -> float:
    """Time together."""
    return sum(span.end - span.start for span in spans)


def breakdown(trace: list[dict[str, Any]]) -> Breakdown:
    """Divide the time of the steps among their parts, by the events of a Chrome trace.

    A moment at which a GPU computes is that of the part that launched the kernel, however late it
    runs; else one at which a collective runs, waiting for other ranks included, is communication;
    else it is that of what the host is in. Without a GPU the last two decide.
    """
    events = [event for event in trace if event.get("ph") == "X" and event["dur"] > 0]
    notes = [event for event in events if event.get("cat") == "user_annotation"]
    steps = [event for event in notes if event["name"] == f"{PREFIX}step"]
    host = owners(
        [
            # What begins later is the inner one.
            _span(event, event["ts"], event["name"].removeprefix(PREFIX))
            for event in notes
            if event["name"].startswith(PREFIX) and event["tid"] == steps[0]["tid"]
        ]
    )
    starts = [span.start for span in host]

    def part_at(time: float) -> str | None:
        i = bisect_right(starts, time) - 1
        return host[i].name if i >= 0 and time < host[i].end else None

    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    kernels = [  # with the part that launched each; none: between steps, as in a validation
        (event, part)
        for event in events
        if event.get("cat") in ON_DEVICE
        and (part := part_at(launched.get(event["args"].get("correlation"), event["ts"])))
    ]
    computing = [_span(e, 2, part) for e, part in kernels if not _is_nccl(e)]
    collectives = [_span(e, 1, COMMUNICATION) for e, _ in kernels if _is_nccl(e)] + [
        _span(e, 1, COMMUNICATION)
        for e in notes
        if e["name"].startswith("gloo:") and part_at(e["ts"])
    ]
    moments = owners([*computing, *collectives, *(span._replace(priority=0) for span in host)])
    parts = {span.name: 0.0 for span in host if span.name != "step"} | {COMMUNICATION: 0.0}
    parts[REST] = 0.0
    for span in moments:
        parts[REST if span.name == "step" else span.name] += span.end - span.start
    operators = [e for e in events if e.get("cat") == "cpu_op" and part_at(e["ts"])]
    return Breakdown(
        steps=len(steps),
        parts=parts,
        operators=_ranked(
            Counter(event["name"] for event in operators),
            _device_times(operators, [e for e, _ in kernels])
            if kernels
            else _self_times(operators),
        ),
        on_device=bool(kernels),
        idle=length([span for span in moments if span.priority == 0]),
        collectives=length(owners(collectives)),
    )


def _span(event: dict[str, Any], priority: float, name: str) -> Span:
    return Span(event["ts"], event["ts"] + event["dur"], priority, name)


def _is_nccl(event: dict[str, Any]) -> bool:
    return event["name"].startswith("nccl")


def _device_times(
    operators: list[dict[str, Any]], kernels: list[dict[str, Any]]
) -> list[tuple[str, float]]:
    """The name of the operator that launched each kernel, and the kernel's time."""
    names = {event["args"].get("External id"): event["name"] for event in operators}
    return [(names.get(e["args"].get("External id"), e["name"]), e["dur"]) for e in kernels]


def _self_times(operators: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Each operator's time without that of the operators in it."""
    threads = defaultdict(list)
    for event in operators:
        # Inner ones begin later.
        threads[event["tid"]].append(_span(event, event["ts"], event["name"]))
    return [
        (span.name, span.end - span.start) for spans in threads.values() for span in owners(spans)
    ]


def _ranked(calls: Counter[str], times: list[tuple[str, float]]) -> list[tuple[str, float, int]]:
    totals: dict[str, float] = defaultdict(float)
    for name, time in times:
        totals[name] += time
    ranked = sorted(totals.items(), key=lambda row: -row[1])
    return [(name, time, calls[name]) for name, time in ranked]
