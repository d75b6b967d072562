"""A vLLM server as the teacher: its log-probs are those of the Hugging Face model."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from kd.data import Collator, Renderer
from kd.model import FrozenVLM
from kd.parallel import ParallelConfig
from kd.teacher import ServerTeacherConfig, VllmServe
from kd.teacher.payload import top_k
from kd.teacher.sparse import SparseTargets
from kd.types import Sample, UserError
from tests.conftest import metrics
from tests.vllm.conftest import MAX_LENGTH, random_model
from tests.vllm.test_live_engine import PROMPTS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

K = 16


def rows() -> list[Sample]:
    answers = ["a seven", "an even number, larger", "two", "blue and green", "Nothing is odd."]
    pairs = zip(PROMPTS, answers, strict=True)
    return [Sample(p.id, p.messages, p.images, answer) for p, answer in pairs]


def config(server, **options) -> ServerTeacherConfig:
    engine = VllmServe(**{"k": K, **options.pop("engine", {})})
    defaults = {"max_length": MAX_LENGTH - 1, "wait_s": 60, "timeout_s": 120}
    values = {"name": str(server.folder), "urls": [server.url], "engine": engine, **defaults}
    return ServerTeacherConfig(**values | options)


def connect(made: ServerTeacherConfig, processor, world, vocab: int):
    return made.build_teacher(processor, world, ParallelConfig(), vocab)


@pytest.fixture
def local(processor) -> FrozenVLM:
    """The weights that the server was started with."""
    return FrozenVLM(random_model(processor, seed=1))


def test_top_k_of_responses_with_images(teacher_server, processor, world, local):
    batch = Collator(Renderer(processor), None, MAX_LENGTH, lockstep=False)(rows())
    vocab = local.model.get_output_embeddings().out_features
    made = connect(config(teacher_server), processor, world, vocab)
    made.expect([batch])
    targets = made.targets(batch)
    made.close()
    assert isinstance(targets, SparseTargets)
    ids_N = torch.tensor([i for r in batch.responses for i in r.response_ids])
    expected = top_k(local.targets(batch.teacher), ids_N, K, 1.0, vocab)
    assert torch.equal(targets.top.ids_NK, expected.ids_NK)
    torch.testing.assert_close(targets.top.logp_NK, expected.logp_NK, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        targets.top.response_logp_N, expected.response_logp_N, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(targets.top.tail_N.exp(), expected.tail_N.exp(), rtol=0, atol=1e-5)
    logits = torch.randn(9, vocab)
    for ours, theirs in zip(
        targets.align(logits, slice(0, 9), 1.0),
        SparseTargets(expected, ids_N, vocab, 1.0).align(logits, slice(0, 9), 1.0),
        strict=True,
    ):
        torch.testing.assert_close(ours.exp(), theirs.exp(), rtol=0, atol=1e-5)


def test_all_but_one_token_trains_as_the_local_teacher_does(
    train, teacher_server, processor, local, tmp_path
):
    """The whole recipe: a student that learns from prompt_logprobs."""
    random_model(processor, seed=2).save_pretrained(tmp_path / "student")
    processor.save_pretrained(tmp_path / "student")
    vocab = local.model.get_output_embeddings().out_features
    options = ["student=pretrained", f"student.name={tmp_path / 'student'}", "optim.lr=0.002"]
    options += ["student.dtype=float32", f"teacher.name={teacher_server.folder}"]
    options += ["data.max_length=256"]
    remote = ["teacher=server", "teacher/engine=vllm", f"teacher.urls=[{teacher_server.url}]"]
    remote += [f"teacher.engine.k={vocab - 1}", "teacher.wait_s=60"]
    alone = train("digits_kd", "local", *options, "teacher.dtype=float32")
    served = train("digits_kd", "served", *options, *remote)
    losses = metrics(alone, "train/kd")
    assert losses[6] != losses[1]
    for key in ("train/loss", "train/ce", "train/kd", "train/grad_norm"):
        assert metrics(served, key) == pytest.approx(metrics(alone, key), rel=1e-5), key


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"engine": {"k": 500}}, "--max-logprobs 500"),
        ({"max_length": MAX_LENGTH}, "--max-model-len 513"),
        ({"engine": {"model": "other"}}, "does not serve other"),
    ],
)
def test_limits_are_asked_for(teacher_server, processor, world, options, says):
    with pytest.raises((UserError, SystemExit), match=says):
        connect(config(teacher_server, **options), processor, world, 400)


def test_another_rendering_is_refused(teacher_server, processor, world):
    wide = rows()[1:2]
    wide[0].images = [Image.new("RGB", (200, 64), (9, 9, 9))]
    batch = Collator(Renderer(processor), None, MAX_LENGTH, lockstep=False)(wide)
    batch.responses[0].prompt_ids = batch.responses[0].prompt_ids[1:]
    made = connect(config(teacher_server), processor, world, 400)
    with pytest.raises(UserError, match="tokens where the run has"):
        made.targets(batch)
    made.close()
