"""What FSDP2 is said to hold beside the shards, against torch's own count of its tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForImageTextToText

from kd.parallel import ParallelConfig, blocks
from kd.sharded import Whole, gathered
from tests.test_activations import QWEN_VISION, ROPE, config


@pytest.fixture(params=[1, 2], ids=["1 rank", "2 ranks"])
def ranks(request) -> Iterator[int]:
    """Collectives of the others are left out: no matter what the tensors hold."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gathered_bytes_are_those_that_torch_counts(ranks, tied):
    text = {"tie_word_embeddings": tied, "vocab_size": 4000}
    made = config("qwen3_vl", QWEN_VISION, rope_parameters=ROPE, **text)
    made.tie_word_embeddings = tied
    model = AutoModelForImageTextToText.from_config(made)
    model.model.visual = nn.Identity()  # groups that no row needs are nothing the tracker knows
    parallel, whole = ParallelConfig(nproc=ranks, compute_dtype="bfloat16"), Whole.of(model)
    expected = gathered(whole.block, whole.embedding, whole.root, parallel)
    mesh, policy = (
        init_device_mesh("cpu", (ranks,)),
        MixedPrecisionPolicy(torch.bfloat16, torch.float32),
    )
    groups = [*blocks(model), *([] if tied else [model.get_input_embeddings()]), model]
    for group in groups:
        fully_shard(group, mesh=mesh, mp_policy=policy)
    found = tracked(model, torch.arange(64)[None] + 20)

    def most(*kinds: str, of: str) -> int:
        named = (kinds_ for name, kinds_ in found if of in name)
        return max(sum(kinds_[kind] for kind in kinds) for kinds_ in named)

    # When the second block runs, the flat buffer of the root group has gone.
    assert most("Unsharded Param", "All Gather", of=".layers.1") == expected.root + expected.blocks
    at_start = most("Unsharded Param", "All Gather", of="" if tied else "embed_tokens")
    # Or a norm more, while both flat buffers are there: between two points of the tracker.
    at_most = expected.root + max(expected.start, expected.blocks)
    assert at_start == pytest.approx(at_most, rel=1e-3)
    if ranks == 1:  # the flat buffer of gradients, which no collective reads, is not told apart
        return
    assert most("Unsharded Grad", "Reduce Scatter", of=".layers.0") == expected.block_gradients
    assert most("Reduce Scatter", of="") == 4 * max(whole.root.trained, whole.embedding.trained)


def tracked(model: nn.Module, ids_BS: torch.Tensor) -> list[tuple[str, dict[str, int]]]:
    """Bytes by kind at each point of a forward and backward, by the module that is at work."""
    tracker = FSDPMemTracker(model)
    with tracker:
        model(input_ids=ids_BS, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    return [
        (stats.mod_fqn, {kind.value: size for kind, size in kinds.items() if kind != "Total"})
        for stats in tracker.memory_tracking.values()
        for snapshots in stats.snapshots.values()
        for snapshot in snapshots
        for kinds in snapshot.values()
    ]
