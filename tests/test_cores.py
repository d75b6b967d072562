"""How many threads a process may keep busy, and that none is at work when the interpreter ends."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kd.data import DigitsConfig
from kd.parallel import ParallelConfig, cores_per_rank, num_cores, world
from kd.parallel.cores import cpu_quota, env_threads
from kd.parallel.world import settle
from tests.processes import completed, environment, python

THREADS = """
import sys
from kd.parallel import ParallelConfig
import torch
ParallelConfig(device="cpu", cpu_threads=int(sys.argv[1])).build()
print(torch.get_num_threads())
"""
VARIABLES = """
import kd, os
print({name: os.environ.get(name) for name in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")})
"""


@pytest.mark.parametrize(
    ("omp", "cpu_threads", "threads"),
    [("3", 0, 3), ("3,1", 0, 3), ("3", 2, 2), ("", 0, num_cores()), ("many", 0, num_cores())],
)
def test_threads_of_a_rank(omp, cpu_threads, threads):
    done = completed(*python("-c", THREADS, cpu_threads), env=environment(OMP_NUM_THREADS=omp))
    assert done.stdout == f"{threads}\n", done.tail()


def test_a_rank_on_a_gpu_has_threads_and_its_device(monkeypatch):
    """CUDA is not there: what it is asked for is noted, and the group is one of the CPU."""
    asked: dict[str, object] = {}

    def join(backend: str, **options: object) -> None:
        asked.update(options, backend=backend)
        own_join("gloo", **{**options, "device_id": None})

    own_join, own_mesh = dist.init_process_group, world.init_device_mesh
    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setattr(
        world, "init_device_mesh", lambda _, *more, **mesh: own_mesh("cpu", *more, **mesh)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(set=device))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    try:
        made = ParallelConfig(device="cuda").build()
        device = torch.device("cuda", 1)
        assert made.device == asked["set"] == asked["device_id"] == device
        assert asked["backend"] == "cpu:gloo,cuda:nccl"
        assert torch.get_num_threads() == 3
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("ranks", "cores"), [(1, 12), (2, 6), (5, 2), (100, 1)])
def test_workers_of_a_rank_are_its_cores_at_most_four(monkeypatch, ranks, cores):
    monkeypatch.setattr("kd.parallel.cores.num_cores", lambda: 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert cores_per_rank() == cores
    assert (DigitsConfig().workers(gpu), DigitsConfig().workers(cpu)) == (min(4, cores), 0)
    for number in (0, 7):
        given = DigitsConfig(num_workers=number)
        assert given.workers(gpu) == given.workers(cpu) == number


def test_torchrun_divides_the_cores_unless_it_is_told(tmp_path):
    """And not one for each rank, as torch's own does."""
    script = tmp_path / "rank.py"
    script.write_text("import os; print(os.environ['OMP_NUM_THREADS'], flush=True)")
    command = python("-m", "kd.torchrun", "--standalone", "--nproc-per-node=2", script)
    env = environment()
    del env["OMP_NUM_THREADS"]
    for more, threads in (({}, max(1, num_cores() // 2)), ({"OMP_NUM_THREADS": "5"}, 5)):
        done = completed(*command, env=env | more)
        assert done.stdout.split() == [str(threads)] * 2, done.tail()


def test_a_number_is_read_from_the_environment(monkeypatch):
    for value, threads in (("8", 8), (" 4 , 2", 4), ("", 0), ("x", 0)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert env_threads() == threads


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_how_memory_of_a_gpu_is_allocated_is_the_users_choice(name):
    """Else its pieces can grow."""
    program = (
        "import kd, os; print({n: v for n, v in os.environ.items() if n.endswith('_ALLOC_CONF')})"
    )
    env = environment()
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        env.pop(variable, None)
    own = completed(*python("-c", program), env=env)
    assert own.stdout == "{'PYTORCH_ALLOC_CONF': 'expandable_segments:True'}\n", own.tail()
    given = completed(*python("-c", program), env={**env, name: "max_split_size_mb:64"})
    assert given.stdout == f"{{'{name}': 'max_split_size_mb:64'}}\n"


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_how_long_threads_spin_is_the_users_choice(name):
    env = environment()
    for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        env.pop(variable, None)
    own = completed(*python("-c", VARIABLES), env=env)
    assert own.stdout == "{'GOMP_SPINCOUNT': '1500', 'KMP_BLOCKTIME': '1'}\n"
    given = completed(*python("-c", VARIABLES), env={**env, name: "7"})
    wanted = {"GOMP_SPINCOUNT": None, "KMP_BLOCKTIME": None}
    assert given.stdout == f"{wanted | ({name: '7'} if name in wanted else {})}\n"


def test_kernels_of_other_instructions_have_a_cache_of_their_own():
    """Else they would be compiled for another width than they were written for."""
    program = "import kd, os; print(os.environ.get('TORCHINDUCTOR_CACHE_DIR'))"
    env = environment(ATEN_CPU_CAPABILITY="avx2")
    env.pop("TORCHINDUCTOR_CACHE_DIR", None)
    own = completed(*python("-c", program), env=env).stdout.strip()
    assert own.startswith("/") and own.endswith("_avx2")
    given = completed(*python("-c", program), env={**env, "TORCHINDUCTOR_CACHE_DIR": "/there"})
    assert given.stdout == "/there\n"
    env.pop("ATEN_CPU_CAPABILITY")
    assert completed(*python("-c", program), env=env).stdout == "None\n"


def group(root: Path, folder: str, **files: str) -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / folder / name.replace("__", ".")).write_text(content)


def test_quotas_of_control_groups(tmp_path):
    membership = tmp_path / "membership"
    assert cpu_quota(tmp_path, membership) == math.inf  # no Linux
    membership.write_text("0::/user/job\n")
    assert cpu_quota(tmp_path, membership) == math.inf
    group(tmp_path, "user/job", cpu__max="max 100000\n")
    assert cpu_quota(tmp_path, membership) == math.inf
    group(tmp_path, "user", cpu__max="350000 100000\n")  # of the group above
    assert cpu_quota(tmp_path, membership) == 3.5
    group(tmp_path, "user/job", cpu__max="150000 100000\n")
    assert cpu_quota(tmp_path, membership) == 1.5
    membership.write_text("4:memory:/x\n1:cpu,cpuacct:/docker/abc\n0::/\n")  # version 1
    group(tmp_path, "cpu", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert cpu_quota(tmp_path, membership) == math.inf
    # In a container its own group is mounted as the root.
    group(tmp_path, "cpu", cpu__cfs_quota_us="200000\n", cpu__cfs_period_us="100000\n")
    assert cpu_quota(tmp_path, membership) == 2


def test_the_interpreter_is_not_torn_down_under_threads_at_work():
    """Work that goes on without the interpreter, as gloo's does."""
    work = threading.Thread(target=hashlib.pbkdf2_hmac, args=("sha256", b"", b"", 2_000_000))
    work.start()
    settle(limit_s=300)
    assert not work.is_alive()
    began = time.monotonic()
    settle(limit_s=300)
    assert time.monotonic() - began < 100
