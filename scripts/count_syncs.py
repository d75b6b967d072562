"""Where a training step makes the host wait for the GPU: host syncs per step, by source line.

    python scripts/count_syncs.py --config-name digits_kd kd_ratio=0 train.micro_batch_size=4
    python scripts/count_syncs.py --config-name qwen_vl_kd --steps 5 parallel.compute_dtype=bfloat16

Takes a config of either recipe, with overrides, and trains some steps after a first one; nothing is
written. On a GPU torch itself reports the syncs (`torch.cuda.set_sync_debug_mode`). On a CPU, where
there are none, counted are the operations that would be one on a GPU: reading a number, a list or
a mask's size, copies of host data made within a forward or the backward. That is a stand-in: it
sees neither what happens below an operation (an optimizer's fused kernels, collectives) nor
copies of batches. What is done with data, before a batch goes to the device, is left out on both.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kd.config import VlmKDConfig, register
from kd.config_dflash import register_dflash
from kd.launch import config_dir
from kd.metrics import Timer
from kd.run import checked
from recipes.dflash import DFlash
from recipes.vlm_kd import VlmKD

ROOTS = (Path(__file__).resolve().parents[1], Path(transformers.__file__).parents[1])
OURS = ("kd/", "recipes/", "transformers/")
HOST_PARTS = ("step", "data")
"""Of a step's timed parts: the whole, and what happens before there is a batch on the device."""

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.equal.default: "equal",
    aten.bincount.default: "bincount",
    aten._unique2.default: "unique",
    aten.unique_consecutive.default: "unique",
}
MASKED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
BOOLS = (torch.bool, torch.uint8)


class Tally:
    """Syncs by the innermost line of kd, a recipe or transformers."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str]] = Counter()

    def add(self, what: str) -> None:
        """One more, at the line that runs now."""
        frame = sys._getframe(1)
        while frame is not None:
            for root in ROOTS:
                name = frame.f_code.co_filename.removeprefix(f"{root}/")
                if name.startswith(OURS):
                    self.found[f"{name}:{frame.f_lineno}", what] += 1
                    return
            frame = frame.f_back
        self.found["elsewhere", what] += 1


class _Dispatched(TorchDispatchMode):
    """Operations whose result, or its size, the host has to know."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in WAITS:
            self.tally.add(WAITS[func])
        elif func in MASKED and any(x is not None and x.dtype in BOOLS for x in args[1]):
            self.tally.add("index by a mask")
        elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self.tally.add("repeat_interleave")
        return func(*args, **kwargs)


class _Called(TorchFunctionMode):
    """What reads or writes host memory without an operation of its own."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            self.tally.add(func.__name__)
        elif func is torch.tensor and kwargs.get("device") is not None:
            self.tally.add("tensor of host numbers")
        return func(*args, **kwargs)


@contextlib.contextmanager
def stand_in(tally: Tally) -> Iterator[None]:
    """Count on a CPU what would be a sync on a GPU."""
    with _Called(tally), _Dispatched(tally):
        yield


@contextlib.contextmanager
def reported(tally: Tally) -> Iterator[None]:
    """Count the syncs of a GPU that torch warns of."""

    def note(message: Warning | str, *rest: Any) -> None:
        if "called a synchronizing" in str(message):  # not what it says of the mode itself
            tally.add("sync")

    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


class CountingTimer(Timer):
    """Counts within the parts of a step that are timed, but for those on the host."""

    def __init__(self, device: torch.device, tally: Tally) -> None:
        super().__init__(device)
        self.tally = tally
        self.count = reported if self.cuda else stand_in

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """See the base class."""
        counting = contextlib.nullcontext() if name in HOST_PARTS else self.count(self.tally)
        with super().__call__(name), counting:
            yield


def count(recipe: VlmKD | DFlash, steps: int) -> Counter[tuple[str, str]]:
    """Syncs of so many steps, after one that makes what is made once."""
    recipe.train_step()
    recipe.timer = CountingTimer(recipe.device, Tally())
    for _ in range(steps):
        recipe.step += 1
        recipe.train_step()
    return recipe.timer.tally.found


def show(found: Counter[tuple[str, str]], steps: int, device: torch.device) -> None:
    """The table, most first."""
    title = "host syncs" if device.type == "cuda" else "would-be host syncs"
    table = Table(title=f"{title} per step", title_justify="left")
    for column in ("line", "what"):
        table.add_column(column, overflow="fold")
    table.add_column("per step", justify="right")
    for (line, what), number in found.most_common():
        table.add_row(line, what, f"{number / steps:g}")
    table.add_section()
    table.add_row("all", "", f"{found.total() / steps:g}")
    Console(width=None if Console().is_terminal else 110).print(table)


def main() -> None:
    """Build the recipe of a config, run it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-name", default="digits_kd")
    parser.add_argument("--steps", type=int, default=3)
    args, overrides = parser.parse_known_args()
    register()
    register_dflash()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = checked(compose(args.config_name, overrides=overrides))
    transformers.utils.logging.set_verbosity_error()
    world = config.parallel.build()
    try:
        recipe = (VlmKD if isinstance(config, VlmKDConfig) else DFlash)(config, world)
        show(count(recipe, args.steps), args.steps, world.device)
        recipe.source.close()
    finally:
        world.close()


if __name__ == "__main__":
    main()
