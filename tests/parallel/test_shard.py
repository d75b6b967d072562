"""How weights reach the ranks, where parameters and buffers are on different devices."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from kd.parallel import ParallelConfig
from kd.parallel.shard import broadcast_weights


class Placed(nn.Module):
    """As FSDP2 with a CPUOffloadPolicy leaves it: parameters on the host, buffers on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))
        self.bias = nn.Buffer(torch.ones(4, device="cuda"))


def test_each_tensor_is_sent_from_device_to_device(monkeypatch):
    """A stand-in: there is no GPU here. FakeTensors have the device cuda, but no memory on it, and
    refuse what mixes devices as real ones do; what is sent goes nowhere.
    """
    sent: list[torch.device] = []
    world = ParallelConfig(device="cpu").build()
    object.__setattr__(world, "device", torch.device("cuda", 0))
    try:
        with FakeTensorMode():
            placed = Placed()
            full = {"weight": torch.zeros(4, 3), "bias": torch.zeros(4)}
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            with pytest.raises(ValueError, match="Multiple devices found"):
                set_model_state_dict(placed, full, options=options)
            monkeypatch.setattr(dist, "broadcast", lambda tensor, src: sent.append(tensor.device))
            broadcast_weights(placed, full, world)
        assert sent == [world.device] * 2
        assert placed.weight.device.type == "cpu" and placed.bias.device.type == "cuda"
    finally:
        dist.destroy_process_group()
