"""Which functions the layers of a model run by: fused kernels, or plain PyTorch in their place.

Layers of a linear attention, a state-space model or a short convolution call functions for which
transformers looks for a package when it is imported (`use_kernel_func_from_hub_with_fallback`).
Where there is none they fall back to PyTorch: correct, much slower, and a recurrence keeps far more
for the backward. transformers warns of it in a log that runs of `kd` silence.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from kd.parallel import World
from kd.types import UserError

log = logging.getLogger("kd")

CONVOLUTION = "causal_conv1d"
"""The package of the one function that is fast enough without it: a convolution of a few tokens."""
DISTRIBUTIONS = {"fla": "flash-linear-attention"}
"""Where pip's name is another than that of the package."""


@dataclass(frozen=True)
class LayerFunction:
    """One that a layer calls, and that a package may replace by a kernel."""

    name: str
    package: str
    plain: Callable[..., Any]
    """In PyTorch."""
    fused: bool
    """Whether the package is there, so that `plain` is not called."""


def layer_functions(kind: type[nn.Module]) -> list[LayerFunction]:
    """Those that the methods of a class of layers call."""
    found: dict[str, LayerFunction] = {}
    for base in kind.__mro__:
        for method in vars(base).values():
            if not inspect.isfunction(method):
                continue
            method = inspect.unwrap(method)
            for name in method.__code__.co_names:
                function = _replaceable(method.__globals__.get(name))
                if function is not None:
                    found[name] = function
    return list(found.values())


def _replaceable(value: Any) -> LayerFunction | None:
    """What transformers' decorator has made of a function; None: it is something else."""
    if isinstance(value, nn.Module):  # by the package `kernels`, which puts functions into modules
        value = inspect.getclosurevars(type(value).forward).nonlocals.get("func")
    # Not public: tests/model/test_kernels.py sees that it still is so.
    if not inspect.isfunction(value) or "is_new_implementation" not in value.__code__.co_freevars:
        return None
    held = inspect.getclosurevars(value).nonlocals
    return LayerFunction(
        held["func_name"], held["package"], held["torch_function"], held["is_new_implementation"]
    )


@dataclass(frozen=True)
class Kernels:
    """Of a model: the packages whose functions its layers call."""

    fused: frozenset[str] = frozenset()
    """Those that are installed."""
    missing: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module) -> Kernels:
        """Those of the functions that the layers of `model` hold."""
        kinds = {type(module) for module in model.modules()}
        functions = [function for kind in kinds for function in layer_functions(kind)]
        missing = frozenset(function.package for function in functions if not function.fused)
        return cls(frozenset(function.package for function in functions) - missing, missing)

    @property
    def recurs_in_torch(self) -> bool:
        """Whether a recurrence runs in PyTorch, chunk by chunk."""
        return bool(self.missing - {CONVOLUTION})

    @property
    def bounds_rows(self) -> bool:
        """Whether all of them are kernels, which can be told where packed rows begin."""
        return bool(self.fused) and not self.missing

    @property
    def finding(self) -> str:
        """What is missing, for a sentence that begins with a model."""
        parts = "linear attention runs" if self.recurs_in_torch else "short convolutions run"
        return f"{parts} in plain PyTorch: no {' and no '.join(self.distributions)} is installed"

    @property
    def distributions(self) -> list[str]:
        """What is missing, as pip calls it; a recurrence's first."""
        packages = sorted(self.missing, key=lambda package: (package == CONVOLUTION, package))
        return [DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in packages]

    @property
    def fix(self) -> str:
        """The command that installs what is missing."""
        return f"pip install {' '.join(self.distributions)}"


def check_kernels(kernels: Kernels, role: str, world: World, *, compiled: bool) -> None:
    """Warn, on rank 0, where a model on a GPU lacks kernels.

    Raises UserError where its blocks are to be `compiled` and a recurrence is in PyTorch: its loop
    over chunks makes another graph for every number of them, until torch gives up.
    """
    if world.device.type == "meta":  # a plan, of a run that may be on another machine
        return
    if compiled and kernels.recurs_in_torch:
        raise UserError(
            f"parallel.compile=true: the {role}'s {kernels.finding}; torch would compile it anew "
            f"for every number of chunks\nSet parallel.compile=false, or {kernels.fix}"
        )
    warning = gpu_warning(kernels, role, world.device.type)
    if warning and world.is_main:
        log.warning(warning)


def gpu_warning(kernels: Kernels, role: str, device_type: str) -> str | None:
    """What to say of a model on such a device; None: nothing."""
    if device_type != "cuda" or not kernels.missing:
        return None
    cost = ", which is slower" + " and takes more memory" * kernels.recurs_in_torch
    return f"warning: the {role}'s {kernels.finding}{cost}\nInstall what is missing: {kernels.fix}"
