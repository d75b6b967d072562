"""Distil a large vision-language model into a small one.

loss = (1 - kd_ratio) * CE + kd_ratio * T^2 * D(teacher, student), per target token, divided by the
number of targets of the whole optimizer step. `kd_ratio: 0` with `teacher: none` trains by
cross-entropy alone, which is also how a small teacher is made.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator

import torch
from transformers.utils import logging as transformers_logging

from kd.checkpoint import Checkpoints, export, random_state, set_random_state
from kd.config import VlmKDConfig
from kd.data import BatchStream, Collator, Renderer, Split, validation_batches
from kd.logger.report import write_report
from kd.metrics import LossSum, Timer, peak_mem_gib
from kd.model import Student, check_same_tokenizer, same_rendering
from kd.parallel import World
from kd.plan import print_plan
from kd.rundir import RunDir
from kd.types import Batch, UserError
from kd.validation import Validator

log = logging.getLogger("kd")


class VlmKD:
    """Holds what a run is made of; `train` is the run."""

    def __init__(self, cfg: VlmKDConfig, world: World) -> None:
        self.cfg, self.world, self.device = cfg, world, world.device
        torch.manual_seed(cfg.run.seed)

        rows = cfg.data.build("train")
        val_rows = cfg.data.build("validation") if cfg.train.val_every else None
        self.processor = cfg.student.build_processor(cfg.data.corpus)
        teacher_processor = cfg.asked_teacher.build_processor(cfg.data.corpus)
        renderer = Renderer(self.processor, cfg.student.processor.chat_template_kwargs)
        teacher_renderer = None
        if teacher_processor is not None:
            check_same_tokenizer(self.processor.tokenizer, teacher_processor.tokenizer)
            kwargs = cfg.teacher.processor.chat_template_kwargs
            alike = same_rendering(self.processor, teacher_processor)
            if not alike or kwargs != cfg.student.processor.chat_template_kwargs:
                teacher_renderer = Renderer(teacher_processor, kwargs)
        collator = Collator(
            renderer, teacher_renderer, cfg.data.max_length, lockstep=world.size > 1
        )

        model = cfg.student.build(self.processor, with_weights=world.is_main)
        self.student = Student(model, cfg.loss.build(cfg.kd_ratio))
        self.student.freeze(cfg.student.freeze)
        if cfg.parallel.activation_checkpointing:
            self.student.checkpoint_activations()
        self.student.distribute(world, cfg.parallel)
        self.teacher = cfg.asked_teacher.build_teacher(teacher_processor, world, cfg.parallel)
        self.optimizer, self.scheduler = cfg.optim.build(self.student, cfg.train.max_steps)

        stream = BatchStream(
            rows,
            collator,
            Split(cfg.train.micro_batch_size, world.rank, world.size),
            seed=cfg.run.seed,
            shuffle=cfg.data.shuffle,
            num_workers=cfg.data.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        self.source = cfg.rollout.build(stream, cfg.data.on_broken_row)
        split = Split(cfg.validation.batch_size, world.rank, world.size)

        def batches() -> Iterator[Batch]:
            assert val_rows is not None  # there is no validation without train.val_every
            return validation_batches(val_rows, collator, split)

        self.validator = Validator(
            batches,
            collator,
            self.processor.tokenizer,
            cfg.validation,
            cfg.data.on_broken_row,
            world,
        )
        self.timer = Timer(self.device)
        self.step = 0

    def train(self, run_dir: RunDir) -> None:
        """From the last checkpoint, or the first step, to the exported model."""
        cfg, self.run_dir = self.cfg, run_dir
        self.checkpoints = Checkpoints(self.run_dir.checkpoints, self.world, cfg.checkpoint)
        self.resume()
        logger = cfg.logger.build(cfg.run.path, self.world.rank)
        logger.start(dataclasses.asdict(cfg), cfg.train.max_steps, self.step)
        self.run_dir.write_status("running", self.step)
        failed = True
        try:
            while self.step < cfg.train.max_steps:
                metrics = self.train_step()
                self.step += 1
                self.checkpoints.poll()
                last = self.step == cfg.train.max_steps
                if last or self.step % cfg.train.log_every == 0:
                    logger.log(self.step, metrics)
                improved = False
                if cfg.train.val_every and (last or self.step % cfg.train.val_every == 0):
                    metrics, records = self.validate()
                    logger.log(self.step, metrics)
                    logger.samples(self.step, records)
                    improved = self.checkpoints.record_best(self.step, metrics)
                save_every = cfg.train.save_every
                if last or improved or (save_every and self.step % save_every == 0):
                    self.save()
            self.checkpoints.finish()
            self.export()
            failed = False
        finally:
            logger.close(failed=failed)
            self.run_dir.write_status("failed" if failed else "finished", self.step)
            if self.world.is_main:
                write_report(self.run_dir.path)

    def train_step(self) -> dict[str, float]:
        """One optimizer step over `grad_accum` micro-batches on every rank."""
        cfg, world, timer = self.cfg, self.world, self.timer
        with timer("step"):
            with timer("data"):
                batches, problem = self.take()
            # Counted before any backward: every micro-batch is divided by the same number.
            problems, num_targets, num_tokens, *dropped = world.sum_ints(
                problem is not None,
                sum(b.num_targets for b in batches),
                sum(b.num_tokens for b in batches),
                *self.source.counters.values(),
            )
            if problems:
                world.agree(problem)
            losses = LossSum(self.device)
            for i, batch in enumerate(batches):
                batch = batch.to(self.device)
                with timer("teacher"):
                    targets = self.teacher.targets(batch)
                last = i == len(batches) - 1
                self.student.set_requires_gradient_sync(last or cfg.parallel.sync_every_micro_batch)
                out = self.student.distill(batch, targets, max(1, num_targets))
                # FSDP2 averages gradients over the ranks; the loss is already a global mean.
                (out.loss * world.size).backward()
                losses.add(out)
            grad_norm = self.clip_gradients()
            loss, ce, kd, norm = losses.reduce(world, grad_norm)  # the step's one host sync
            if not math.isfinite(loss + norm):
                self.refuse_non_finite(batches, loss, norm)
            lr = float(self.scheduler.get_last_lr()[0])
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        seconds = timer.flush()
        return {
            "train/loss": loss,
            "train/ce": ce,
            "train/kd": kd,
            "train/grad_norm": norm,
            "train/lr": lr,
            "train/num_targets": num_targets,
            "train/tokens_per_s": num_tokens / seconds["step"],
            "train/step_s": seconds["step"],
            "train/data_s": seconds["data"],
            "train/teacher_s": seconds["teacher"],
            "train/peak_mem_gib": peak_mem_gib(self.device),
            **{f"data/{name}": n for name, n in zip(self.source.counters, dropped, strict=True)},
        }

    def take(self) -> tuple[list[Batch], str | None]:
        """The micro-batches of this rank, or what is wrong with a row, for all ranks to end by."""
        try:
            return self.source.take(self.cfg.train.grad_accum), None
        except UserError as error:
            return [], str(error)

    def clip_gradients(self) -> torch.Tensor:
        """Scale the gradients to `max_grad_norm`; returns the norm before."""
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        for p in parameters:
            # A tower that saw no image: an absent gradient would leave a hole in the optimizer's
            # state, which then could not be resumed, and would differ from other ranks' zeros.
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.cfg.train.max_grad_norm)
        return norm.full_tensor() if isinstance(norm, torch.distributed.tensor.DTensor) else norm

    def refuse_non_finite(self, batches: list[Batch], loss: float, norm: float) -> None:
        """End the run before the weights are touched, naming the rows of the step."""
        ranks = self.world.gather([sample.id for batch in batches for sample in batch.samples])
        ids = [sample_id for rank in ranks for sample_id in rank]
        self.world.agree(
            f"step {self.step + 1}: loss {loss}, gradient norm {norm}; neither the weights nor the "
            f"last checkpoint were touched\nIts samples: {', '.join(ids)}"
        )

    def validate(self) -> tuple[dict[str, float], list]:
        """Losses and answers on the validation split; training state stays as it is."""
        before = random_state()
        self.student.eval()
        metrics = self.validator.losses(self.student, self.teacher)
        records = []
        if self.cfg.validation.generate:
            accuracy, records = self.validator.answers(self.student, self.teacher)
            metrics |= accuracy
        self.student.train()
        set_random_state(before)
        return metrics, records

    def save(self) -> None:
        """Checkpoint the state after `self.step`."""
        small = {"source": self.source.state_dict(), "scheduler": self.scheduler.state_dict()}
        self.checkpoints.save(self.step, self.student, self.optimizer, small)
        self.run_dir.write_status("running", self.step)

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        step = self.checkpoints.newest_whole()
        if step is None:
            return
        small = self.checkpoints.load(step, self.student, self.optimizer)
        self.source.load_state_dict(small["source"])
        self.scheduler.load_state_dict(small["scheduler"])
        self.step = step
        if self.world.is_main:
            log.info("resuming %s after step %d", self.run_dir.path, step)

    def export(self) -> None:
        """Write the student as a Hugging Face folder."""
        best = self.checkpoints.best_step()
        if self.cfg.train.export == "best" and best is not None:
            self.checkpoints.load(best, self.student, self.optimizer)
        export(
            self.run_dir.export,
            self.student,
            self.student.model,
            self.processor,
            self.world,
            self.cfg.student.export_dtype,
        )


def main(cfg: VlmKDConfig, overrides: list[str]) -> None:
    """Run the recipe in this process, as one of its ranks."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if cfg.dry_run:
        print_plan(cfg)
        return
    if type(cfg.asked_teacher) is not type(cfg.teacher):
        log.info("kd_ratio=0: no teacher is loaded")
    world = cfg.parallel.build()
    try:
        run_dir = RunDir(cfg.run.path, world)
        run_dir.open(dataclasses.asdict(cfg), overrides, cfg.run.resume)
        VlmKD(cfg, world).train(run_dir)
    except BaseException:
        if world.size == 1:  # with more, closing may wait for ranks that never come
            world.close()
        raise
    world.close()
