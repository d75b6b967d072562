"""Mistakes in a config: each is refused before anything starts, in plain words."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from kd.config import TrainConfig, register, to_object, validate
from kd.run import config_dir
from kd.types import UserError


@pytest.fixture
def refusal(kd_main, capfd, tmp_path, monkeypatch) -> Callable[..., str]:
    """What `python -m kd.run` says on stderr, having left with code 2 and written no file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*args: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            kd_main(*args)
        error = capfd.readouterr().err
        assert exit_.value.code == 2, error
        assert error.startswith("error: ")
        assert 1 <= len(error.splitlines()) <= 2, error
        assert "Traceback" not in error
        assert not list(tmp_path.iterdir())
        return error

    return run


def mistake(overrides: str, says: str) -> object:
    """Overrides of qwen_vl_kd, apart from each other by blanks, and a pattern of the answer."""
    return pytest.param(overrides.split(), says, id=overrides)


ONE_GROUP = [
    # run
    mistake("run.name=", r"run\.name=''"),
    mistake("run.name=/tmp/x", r"run\.name='/tmp/x'"),
    mistake("run.name=../x", r"run\.name='\.\./x'"),
    # train
    mistake("train.max_steps=0", r"train\.max_steps=0: must be at least 1"),
    mistake("train.micro_batch_size=0", r"train\.micro_batch_size=0"),
    mistake("train.log_every=0", r"train\.log_every=0"),
    mistake("train.grad_accum=0", r"train\.grad_accum=0: must be at least 1, or null"),
    mistake("train.global_batch_size=0", r"train\.global_batch_size=0"),
    mistake("train.val_every=0", r"train\.val_every=0"),
    mistake("train.save_every=-1", r"train\.save_every=-1"),
    mistake("train.max_grad_norm=0", r"train\.max_grad_norm=0"),
    mistake("train.max_grad_norm=nan", r"train\.max_grad_norm=nan"),
    mistake("train.export=newest", r"train\.export=newest: use last or best"),
    # batching
    mistake(
        "batching=token_budget batching.max_tokens=2047",
        r"batching\.max_tokens=2047 is less than data\.max_length=2048",
    ),
    mistake(
        "batching=token_budget batching.max_padding=1", r"batching\.max_padding=1\.0: a share, in"
    ),
    mistake(
        "batching.max_padding=0.1 batching=packed", r"unknown config key batching\.max_padding"
    ),
    mistake("batching=packing", r"batching/packing"),
    mistake("batching.max_tokens=4096", r"unknown config key batching\.max_tokens"),
    mistake(
        "batching=packed teacher=cached teacher.source.name=t teacher.folder=c",
        r"batching=packed is tried on every model .*\n?.*teacher\.require_full=true",
    ),
    # validation and checkpoint
    mistake("validation.max_new_tokens=0", r"validation.*max_new_tokens"),
    mistake("validation.batch_size=0", r"validation.*batch_size"),
    mistake("checkpoint.keep_last=0", r"checkpoint\.keep_last=0"),
    mistake("checkpoint.best_mode=most", r"checkpoint\.best_mode=most: use min or max"),
    # models
    mistake("student.dtype=float8", r"student\.dtype=float8: use float32, bfloat16 or float16"),
    mistake("student.export_dtype=int8", r"student\.export_dtype=int8"),
    mistake(
        "student.dtype=bfloat16", r"student\.dtype=bfloat16: the trained weights are kept in fl"
    ),
    mistake("student.lora.rank=-1", r"student\.lora\.rank=-1: at least 1, or 0"),
    mistake("student.lora.alpha=0", r"student\.lora\.alpha=0\.0: must be above 0"),
    mistake("student.lora.dropout=1", r"student\.lora\.dropout=1\.0: must be in \[0, 1\)"),
    mistake("student.lora.parts=[]", r"student\.lora\.parts=\[\]: name what has adapters"),
    mistake("student.lora.export=lora", r"student\.lora\.export=lora: use merged or adapters"),
    mistake("student.lora.export=adapters", r"there are none with student\.lora\.rank=0"),
    mistake("student.lora.rank=8", r"rank=8 trains adapters alone: set student\.freeze=\[\]"),
    mistake(
        "student=digits_small student.lora.rank=8 student.lora.export=adapters",
        r"student\.lora\.export=adapters: a model made from scratch",
    ),
    mistake("teacher.dtype=double", r"teacher\.dtype=double"),
    mistake(
        "teacher.processor.min_pixels=900 teacher.processor.max_pixels=400",
        r"teacher\.processor: min_pixels=900, max_pixels=400",
    ),
    # data
    mistake("data.on_broken_row=skip", r"data\.on_broken_row is 'skip'"),
    mistake("data.num_workers=-1", r"data\.num_workers is -1"),
    mistake("data.max_length=1", r"data\.max_length is 1"),
    mistake("data.val_samples=0", r"data\.val_samples is 0"),
    mistake("data=conversations", r"data\.path is not set"),
    mistake("data=conversations data.path=x data.val_fraction=1", r"data\.val_fraction is 1"),
    mistake("data=conversations data.path=x data.max_image_pixels=0", r"data\.max_image_pixels"),
    mistake("data=digits data.kinds=[colour]", r"data\.kinds is \['colour'\]; name some of which"),
    mistake("data=digits data.pool=theirs", r"data\.pool is 'theirs'"),
    mistake("data=digits data.label_noise=2", r"data\.label_noise is 2"),
    mistake("data=digits data.num_images=9999", r"data\.num_images is 9999"),
    mistake("data=digits data.val_samples=9999", r"data\.val_samples is 9999"),
    # loss
    mistake("loss.temperature=0", r"loss\.temperature is 0\.0"),
    mistake("loss.chunk_mib=0", r"loss\.chunk_mib is 0"),
    mistake("loss=jsd loss.beta=1.5", r"loss\.beta is 1\.5"),
    mistake("loss.compile=sometimes", r"loss\.compile=sometimes\n.*one of \[auto, always, never\]"),
    # rollout (kd_ratio=1: its samples have no reference answer)
    mistake(
        "rollout=student kd_ratio=1 rollout.sampling.temperature=-1",
        r"rollout\.sampling\.temperature=-1\.0: 0 \(greedy\) or more",
    ),
    mistake("rollout=student kd_ratio=1 rollout.sampling.top_p=0", r"rollout\.sampling\.top_p=0"),
    mistake("rollout=student kd_ratio=1 rollout.sampling.top_k=-1", r"sampling\.top_k=-1"),
    mistake("rollout=student kd_ratio=1 rollout.sampling.max_new_tokens=0", r"max_new_tokens=0"),
    mistake("rollout=student kd_ratio=1 rollout.num_generations=0", r"num_generations=0"),
    mistake("rollout=student kd_ratio=1 rollout.window_steps=0", r"window_steps=0"),
    mistake("rollout=student kd_ratio=1 rollout.async_steps=2", r"async_steps=2: 0, or 1"),
    mistake(
        "rollout=student kd_ratio=1 rollout.async_steps=1",
        r"async_steps=1 needs an engine that generates elsewhere.*rollout/engine=vllm",
    ),
    mistake("rollout=student kd_ratio=1 rollout.generation_batch_size=0", r"_batch_size=0"),
    mistake("rollout=student kd_ratio=1 rollout.engine.token_budget=0", r"token_budget=0"),
    mistake(
        "rollout=student kd_ratio=1 rollout.num_generations=4 rollout.sampling.temperature=0",
        r"num_generations=4 at sampling\.temperature=0",
    ),
    *(
        mistake(f"rollout=student kd_ratio=1 rollout/engine=vllm rollout.engine.{setting}", says)
        for setting, says in {
            "urls=[]": r"rollout\.engine\.urls=\[\]: give one or more",
            "urls=[localhost]": r"localhost should look like http://",
            "sync_every=0": r"sync_every=0: must be at least 1",
            "max_concurrency=0": r"max_concurrency=0",
            "timeout_s=0": r"timeout_s=0",
            "weights_dtype=float8": r"weights_dtype=float8: use one of",
            "transfer=ipc": r"rollout\.engine\.transfer=ipc: use disk or nccl",
        }.items()
    ),
    mistake("rollout=mixed rollout.lmbda=1.1", r"rollout\.lmbda=1\.1: a probability, in \[0, 1\]"),
    mistake("rollout=mixed rollout.lmbda=nan", r"rollout\.lmbda=nan"),
    mistake("rollout=mixed rollout.lmbda_end=-1", r"rollout\.lmbda_end=-1"),
    mistake("rollout=mixed rollout.lmbda_end=1", r"lmbda_end and rollout\.lmbda_steps go together"),
    mistake("rollout=mixed rollout.off_policy=me", r"off_policy=me: use dataset or teacher"),
    # parallel
    mistake("parallel.device=tpu", r"parallel\.device=tpu: use auto, cpu or cuda"),
    mistake("parallel.compute_dtype=float8", r"parallel\.compute_dtype=float8: use one of float32"),
    mistake("parallel.reduce_dtype=float8", r"parallel\.reduce_dtype=float8"),
    mistake("parallel.nproc=0", r"parallel\.nproc=0: at least one rank"),
    mistake("parallel.dp_replicate=0", r"parallel\.dp_replicate=0 does not divide the 1 ranks"),
    mistake("parallel.nproc=4 parallel.dp_replicate=3", r"dp_replicate=3 does not divide the 4"),
    # optim
    mistake("optim.schedule=step", r"optim\.schedule=step: use one of cosine, linear, constant"),
    mistake("optim.lr=0", r"optim\.lr=0"),
    mistake("optim.lr=nan", r"optim\.lr=nan"),
    mistake("optim.betas=[0.9]", r"optim\.betas=\[0\.9\]: give two numbers"),
    mistake("optim.betas=[0.9,1.0]", r"optim\.betas=\[0\.9, 1\.0\]"),
    mistake("optim.eps=0", r"optim\.eps=0"),
    mistake("optim.weight_decay=-1", r"optim\.weight_decay=-1"),
    mistake("optim.warmup_steps=-1", r"optim\.warmup_steps=-1"),
    mistake("optim.min_lr_ratio=1.1", r"optim\.min_lr_ratio=1\.1"),
    # logger
    mistake("logger.image_px=0", r"logger\.image_px=0"),
    mistake("logger=wandb logger.mode=on", r"logger\.mode=on: use online, offline, disabled"),
    mistake("logger=wandb logger.init_timeout_s=0", r"logger\.init_timeout_s"),
]

ACROSS_GROUPS = [
    mistake("kd_ratio=1.5", r"kd_ratio=1\.5: must be in \[0, 1\]"),
    mistake("kd_ratio=-0.1", r"kd_ratio=-0\.1"),
    mistake("kd_ratio=nan", r"kd_ratio=nan"),
    mistake("teacher=none", r"kd_ratio=0\.5 needs a teacher: .*teacher=…, or kd_ratio=0"),
    mistake("rollout=student", r"kd_ratio=0\.5 asks for cross-entropy.*set kd_ratio=1, or .*mixed"),
    mistake("rollout=mixed rollout.lmbda=1", r"kd_ratio=0\.5 asks for cross-entropy"),
    mistake(
        "data=conversations data.path=x data.require_answer=false",
        r"data\.require_answer=false .*learns the data set's answers: choose rollout=student",
    ),
    mistake(
        "data=conversations data.path=x data.require_answer=false rollout=student kd_ratio=1",
        r"nothing to validate by: give .*data\.validation_path .*train\.val_every=null",
    ),
    mistake("rollout=mixed kd_ratio=0", r"kd_ratio=0 leaves nothing to learn"),
    mistake("rollout=teacher kd_ratio=0 teacher=none", r"to be a teacher's, but there is none"),
    mistake(
        "rollout=student kd_ratio=1 rollout.num_generations=3",
        r"num_generations=3 does not divide micro_batch_size 16 x grad_accum 1 = 16 rows",
    ),
    mistake(
        "rollout=student kd_ratio=1 rollout.num_generations=4 rollout.generation_batch_size=16",
        r"generation_batch_size=16 x num_generations 4 = 64 rollouts, but micro_batch_size 16 x "
        r"grad_accum 1 = 16 rows per optimizer step and rank: give 4, or null",
    ),
    mistake(
        "rollout=student kd_ratio=1 rollout.window_steps=2 rollout.generation_batch_size=16",
        r"= 16 rows per optimizer step and rank x window_steps 2: give 32, or null",
    ),
    mistake(
        "rollout=student kd_ratio=1 rollout.sampling.max_new_tokens=2048",
        r"max_new_tokens=2048 leaves no room for a prompt in data\.max_length=2048",
    ),
    mistake("run.seed=-1", r"run\.seed=-1: must be 0 or more"),
    mistake(
        "checkpoint.best_metric=val/accuracy validation.generate=false",
        r"best_metric=val/accuracy needs validation\.generate=true",
    ),
    mistake("+teacher.freeze=[model.visual]", r"unknown config key teacher\.freeze"),
    mistake("student.dtype=bfloat16", r"student\.dtype=bfloat16: .*float32.*compute_dtype"),
    mistake("train.export=best", r"train\.export=best needs checkpoint\.best_metric"),
    mistake(
        "checkpoint.best_metric=val/loss train.val_every=null",
        r"checkpoint\.best_metric needs train\.val_every",
    ),
    mistake("train.max_steps=7 optim.warmup_steps=8", r"warmup_steps=8 exceeds train\.max_steps=7"),
    mistake(
        "train.micro_batch_size=3 parallel.nproc=4",
        r"global_batch_size=16 is not micro_batch_size 3 x 4 ranks x grad_accum 1",
    ),
    mistake(
        "train.micro_batch_size=null train.global_batch_size=null",
        r"micro_batch_size=null reads all rows .*give their number, or train\.global_batch_size",
    ),
    mistake(
        "train.micro_batch_size=null parallel.nproc=3",
        r"global_batch_size=16 is not micro_batch_size 5 x 3 ranks x grad_accum 1",
    ),
    mistake(
        "parallel.sync_every_micro_batch=sometimes",
        r"parallel\.sync_every_micro_batch=sometimes: use auto, true or false",
    ),
    mistake(
        "train.micro_batch_size=2 train.grad_accum=3",
        r"global_batch_size=16 is not micro_batch_size 2 x 1 ranks x grad_accum 3",
    ),
]

KEYS_AND_VALUES = [
    mistake("train.max_step=3", r"unknown config key train\.max_step;"),
    mistake("+train.max_step=3", r"unknown config key train\.max_step; known here:.* max_steps"),
    mistake("++train.max_step=3", r"unknown config key train\.max_step; known here:.* max_steps"),
    mistake("+ratio=3", r"unknown config key ratio; known here:.* kd_ratio"),
    mistake("+teacher.processor.size=3", r"unknown config key teacher\.processor\.size;"),
    mistake(
        "student.processor.image.max_tiles=4",
        r"student\.processor\.image\.max_tiles has no such entry yet; with a \+ .*max_tiles=…",
    ),
    mistake("loss.beta=0.5", r"unknown config key loss\.beta;"),
    mistake("loos=jsd", r"unknown config key loos;"),
    mistake("train.max_steps=many", r"train\.max_steps=many\n.*'many'.* Integer"),
    mistake("train.max_steps=1.5", r"train\.max_steps=1\.5\n.*'1\.5'.* Integer"),
    mistake("optim.lr=fast", r"optim\.lr=fast\n.*'fast'.* Float"),
    mistake("dry_run=perhaps", r"dry_run=perhaps\n.*'perhaps'"),
    mistake("train.max_steps=null", r"max_steps=null\n.*'train\.max_steps' is not Opt"),
    mistake("train=3", r"train=3\n.*TrainConfig"),
    mistake("train.max_steps", r"'train\.max_steps'\nmissing EQUAL"),
    mistake("student=pretrained student.name=???", r"student\.name has no value: give one"),
    mistake("student=pretrained", r"student\.name has no value: give one, e\.g\. student\.name=…"),
    mistake("teacher=local", r"teacher\.name has no value"),
    mistake("loss=kl", r"kl.*\n.*forward_kl, gold, jsd, reverse_kl, uld"),
    mistake("kd_ratio=${run.ratio}", r"'run\.ratio' not found"),
]

# Let through, or answered with a traceback or in words that do not help.
MORE = [
    mistake("experiment=none_such", r"none_such'\n.*digits_ce"),
    mistake("run.name=???", r"run\.name has no value"),
    mistake("~loss", r"loss"),
    mistake("student.processor.min_pixels=0", r"student\.processor: min_pixels=0"),
    mistake("student.attn_implementation=quick", r"cannot build a qwen3_5 model: .*quick"),
    mistake("validation.report_samples=-1", r"report_samples"),
    mistake("optim.weight_decay=nan", r"optim\.weight_decay=nan"),
    mistake("optim.lr=inf", r"optim\.lr=inf"),
    mistake("parallel.timeout_s=0", r"parallel\.timeout_s=0"),
    mistake("parallel.cpu_threads=-1", r"parallel\.cpu_threads=-1"),
    mistake("student=digits_small student.vocab_size=10", r"student\.vocab_size=10"),
    mistake("kd_ratio=0.1,0.5", r"kd_ratio=0\.1,0\.5.*(\n.*)?(-m|--multirun)"),
]


REFUSALS = ONE_GROUP + ACROSS_GROUPS + KEYS_AND_VALUES + MORE


@pytest.mark.parametrize(("overrides", "says"), REFUSALS)
def test_mistakes_are_refused_in_plain_words(refusal, overrides, says):
    assert re.search(says, refusal("--config-name", "qwen_vl_kd", "dry_run=true", *overrides))


def test_unknown_config_names_the_shipped_ones(refusal):
    error = refusal("--config-name", "qwen_vl")
    assert "'qwen_vl'" in error
    assert "digits_kd, digits_opd, digits_teacher, " in error and "qwen_vl_kd" in error


def test_no_config_named(refusal):
    assert "--config-name" in refusal()
    assert "--config-name" in refusal("train.max_steps=3")


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("train: {max_stepz: 3}", "max_stepz"),
        ("train: 3", "TrainConfig"),
        ("train: {max_steps: 3", "while parsing"),
    ],
)
def test_broken_yaml_of_ones_own(kd_main, capfd, tmp_path, lines, says):
    (tmp_path / "mine.yaml").write_text(f"defaults: [qwen_vl_kd, _self_]\n{lines}\n")
    with pytest.raises(SystemExit) as exit_:
        kd_main("--config-dir", str(tmp_path), "--config-name", "mine")
    error = capfd.readouterr().err
    assert exit_.value.code == 2
    assert len(error.splitlines()) <= 2
    assert says in error and "mine" in error


def test_missing_cuda_is_refused(kd_main, capfd, tmp_path):
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("there is a CUDA device here")
    with pytest.raises(SystemExit) as exit_:
        kd_main(
            *("--config-name", "digits_teacher", "dry_run=true"),
            *("parallel.device=cuda", f"run.dir={tmp_path}"),
        )
    assert exit_.value.code == 2
    assert "no CUDA device here; use cpu or auto" in capfd.readouterr().err


def test_traceback_on_request(kd_main):
    with pytest.raises(UserError, match="kd_ratio=2"):
        kd_main("--config-name", "qwen_vl_kd", "kd_ratio=2", "traceback=true")


@pytest.mark.parametrize(
    ("numbers", "ranks", "grad_accum", "global_batch_size"),
    [
        ({}, 2, 1, 8),
        ({"grad_accum": 3}, 2, 3, 24),
        ({"global_batch_size": 24}, 2, 3, 24),
        ({"grad_accum": 3, "global_batch_size": 24}, 2, 3, 24),
    ],
)
def test_batch_sizes_are_settled(numbers, ranks, grad_accum, global_batch_size):
    train = TrainConfig(micro_batch_size=4, **numbers)
    train.resolve(ranks)
    assert (train.grad_accum, train.global_batch_size) == (grad_accum, global_batch_size)


def test_all_rows_of_a_rank_at_once():
    train = TrainConfig(micro_batch_size=None, global_batch_size=24)
    train.resolve(2)
    assert (train.micro_batch_size, train.grad_accum) == (12, 1)
    train = TrainConfig(micro_batch_size=None, global_batch_size=24, grad_accum=3)
    train.resolve(2)
    assert train.micro_batch_size == 4


def test_batch_sizes_follow_the_ranks_of_a_launcher(monkeypatch):
    register()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = to_object(compose("qwen_vl_kd"))
    monkeypatch.setenv("WORLD_SIZE", "8")
    validate(config)
    assert (config.train.micro_batch_size, config.train.grad_accum) == (2, 1)


def test_own_config_dir_extends_the_shipped_ones(kd_main, capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [qwen_vl_kd, {override loss: jsd}, _self_]\nrun: {name: mine}\nkd_ratio: 0.25\n"
    )
    kd_main("--config-dir", str(tmp_path), "--config-name", "mine", "--cfg", "job")
    printed = capsys.readouterr().out
    assert "kd_ratio: 0.25" in printed and "beta: 0.5" in printed


def test_config_dir_of_the_checkout():
    assert (Path(config_dir()) / "qwen_vl_kd.yaml").is_file()
