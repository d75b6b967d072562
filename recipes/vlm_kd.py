"""Distil a large vision-language model into a small one.

loss = (1 - kd_ratio) * CE + kd_ratio * T^2 * D(teacher, student), per target token, divided by the
number of targets of the whole optimizer step. `kd_ratio: 0` with `teacher: none` trains by
cross-entropy alone, which is also how a small teacher is made.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from kd.align import Aligner, TokenBytes
from kd.checkpoint import Checkpoints, random_state, set_random_state
from kd.config import DoctorMode, VlmKDConfig
from kd.data import BatchStream, Collator, Renderer, Split, validation_batches
from kd.doctor import Doctor, report
from kd.footprint import print_plan, sync_every_micro_batch
from kd.logger import RolloutRecord
from kd.logger.report import write_report
from kd.loss import AlignedLossConfig
from kd.memory_options import options
from kd.metrics import Counts, Datasets, LossSum, Timer, memory
from kd.model import VLM, Pairing, Student, check_images, export, pair
from kd.optim import clip_gradients
from kd.out_of_memory import explain_out_of_memory
from kd.parallel import World, sync_gradients
from kd.profile import Profiler
from kd.rollout import Parts, Policy
from kd.rundir import RunDir
from kd.stop import Stopped, stop_request
from kd.teacher import NoTeacher
from kd.types import AgreedError, Batch, Source, UserError
from kd.validation import Validator
from kd.watch import rollout_records

log = logging.getLogger("kd")


class VlmKD:
    """Holds what a run is made of; `train` is the run."""

    def __init__(self, cfg: VlmKDConfig, world: World) -> None:
        self.cfg, self.world, self.device = cfg, world, world.device
        torch.manual_seed(cfg.run.seed)
        self.processor = cfg.student.build_processor(cfg.data.corpus)
        self.teacher_processor = cfg.asked_teacher.build_processor(cfg.data.corpus)
        self.pairing = self.build_pairing()
        self.rows = cfg.data.build("train")
        self.val_rows = cfg.data.build("validation") if cfg.train.val_every else None

        model = cfg.student.build(self.processor, with_weights=world.is_main)
        self.student = Student(model, cfg.loss.build(cfg.kd_ratio))
        self.student.freeze(cfg.student.freeze)
        self.student.adapt(cfg.student.lora, cfg.run.seed)
        if cfg.parallel.activation_checkpointing:
            self.student.checkpoint_activations()
        self.student.place(world, cfg.parallel, cpu_offload=cfg.parallel.cpu_offload)
        student_vocab = model.get_output_embeddings().out_features
        self.teacher = cfg.asked_teacher.build_teacher(
            self.teacher_processor, world, cfg.parallel, student_vocab
        )
        # A teacher may be there only to respond.
        self.judge = self.teacher if cfg.kd_ratio > 0 else NoTeacher()
        self.optimizer, self.scheduler = cfg.optim.build(self.student, cfg.train.max_steps)
        self.sync_every = sync_every_micro_batch(cfg, world)
        self.collator = self.build_collator()
        self.student_policy = self.policy(self.student, self.collator.student)
        self.teacher_policy = None
        if self.teacher.vlm is not None:
            self.teacher_policy = self.policy(self.teacher.vlm, self.collator.renderers[-1])
        self.check_images()
        self.check_batching()
        self.source = self.build_source()
        self.datasets = Datasets(cfg.data.dataset_names("train"))
        self.validator = self.build_validator()
        self.timer = Timer(self.device)
        self.trained: list[tuple[Batch, Tensor]] = []
        self.step = 0

    def build_pairing(self) -> Pairing | None:
        """How teacher and student are compared; None: there is no teacher."""
        cfg, teacher = self.cfg, self.teacher_processor
        if teacher is None:
            return None
        student_kwargs = cfg.student.processor.chat_template_kwargs
        kwargs = student_kwargs, cfg.teacher.processor.chat_template_kwargs
        pairing = pair(self.processor, teacher, kwargs, cfg.teacher.alignment)
        if cfg.kd_ratio > 0 and pairing.by_bytes and not isinstance(cfg.loss, AlignedLossConfig):
            raise UserError(
                f"teacher and student have {pairing.reason}\n"
                "This loss compares token by token: choose loss=uld or loss=gold, or a teacher of "
                "the student's family"
            )
        if self.world.is_main:
            log.info(pairing.explain())
        return pairing

    def build_collator(self) -> Collator:
        """Each model renders the prompts its own way; they meet at the tokens of the response."""
        cfg, pairing = self.cfg, self.pairing
        renderer = Renderer(self.processor, cfg.student.processor.chat_template_kwargs)
        teacher_renderer, aligner = None, None
        if pairing is not None and (pairing.by_bytes or not pairing.same_prompts):
            kwargs = cfg.teacher.processor.chat_template_kwargs
            teacher_renderer = Renderer(self.teacher_processor, kwargs)
        if pairing is not None and pairing.by_bytes:
            sides = (self.student, renderer), (self.teacher, teacher_renderer)
            aligner = Aligner(
                *(TokenBytes(r.processor.tokenizer, m.stop_ids(r.eos_token_id)) for m, r in sides)
            )
            self.teacher.matched = aligner.matched().to(self.device)
        positions = self.student.positions, self.teacher.positions
        more = cfg.data.max_length, self.world.size > 1, aligner, positions
        return Collator(renderer, teacher_renderer, *more)

    def policy(self, vlm: VLM, renderer: Renderer) -> Policy:
        """A model as one that responds."""
        is_teacher = vlm is not self.student
        return Policy(
            vlm,
            renderer.processor,
            functools.partial(self.collator.prompts, teacher=is_teacher),
            vlm.stop_ids(renderer.eos_token_id),
            vlm.forbidden_ids(len(renderer.processor.tokenizer)),
            self.world,
            self.cfg.data.max_length,
            renderer.chat_template_kwargs,
            self.cfg.run.path,
        )

    def check_images(self) -> None:
        """Models can read what their image processors make with other settings than their own."""
        sides = (self.cfg.student, self.student_policy), (self.cfg.teacher, self.teacher_policy)
        for config, policy in sides:
            if policy is not None and config.processor.image:
                check_images(policy.vlm, policy.prompts, self.device)

    def check_batching(self) -> None:
        """See that both models can read the micro-batches that are to be made."""
        self.student.eval()
        readers = {"student": self.student.read, "teacher": self.judge.read}
        self.cfg.batching.check(self.collator, readers, self.world)
        self.student.train()

    def build_source(self) -> Source:
        """Where the batches come from."""
        cfg, world = self.cfg, self.world
        rows = cfg.train.micro_batch_size, cfg.train.grad_accum

        def stream(collate: Callable, rows_at_a_time: int) -> BatchStream:
            return BatchStream(
                self.rows,
                collate,
                Split(rows_at_a_time, world.rank, world.size),
                seed=cfg.run.seed,
                shuffle=cfg.data.shuffle,
                num_workers=cfg.data.workers(self.device),
                pin_memory=self.device.type == "cuda",
            )

        return cfg.rollout.build(
            Parts(
                stream=stream,
                collate=self.collator,
                batching=cfg.batching.build(self.collator, *rows, world),
                student=self.student_policy,
                teacher=self.teacher_policy,
                told_ahead=self.judge if cfg.asked_teacher.is_told_ahead else None,
                micro_batch_size=cfg.train.micro_batch_size,
                grad_accum=cfg.train.grad_accum,
                seed=cfg.run.seed,
                on_broken_row=cfg.data.on_broken_row,
                world=world,
            )
        )

    def build_validator(self) -> Validator:
        """Losses and answers on the validation rows, which there are only with train.val_every."""
        cfg = self.cfg
        split = Split(cfg.validation.batch_size, self.world.rank, self.world.size)
        return Validator(
            lambda: validation_batches(self.val_rows, self.collator, split),
            self.student_policy,
            self.teacher_policy,
            cfg.kd_ratio,
            Datasets(cfg.data.dataset_names("validation")),
            cfg.validation,
            cfg.data.on_broken_row,
            self.world,
        )

    def examine(self) -> None:
        """See that data, models and teacher fit together; raises UserError where they do not."""
        before = random_state()
        doctor = Doctor(
            self.rows,
            self.collator,
            self.student,
            self.judge,
            teacher_sees_new_rows=not self.cfg.teacher.needs_fixed_responses,
            world=self.world,
        )
        report(doctor(), self.world)
        set_random_state(before)

    def train(self, run_dir: RunDir) -> None:
        """From the last checkpoint, or the first step, to the exported model."""
        cfg, self.run_dir = self.cfg, run_dir
        self.checkpoints = Checkpoints(self.run_dir.checkpoints, self.world, cfg.checkpoint)
        self.resume()
        if self.step == 0 and cfg.doctor is DoctorMode.auto:
            self.examine()
        logger = cfg.logger.build(cfg.run.path, self.world.rank)
        logger.start(dataclasses.asdict(cfg), cfg.train.max_steps, self.step)
        profiler = Profiler(cfg.profile, cfg.profile_steps, run_dir.path, self.world, self.step)
        self.run_dir.write_status("running", self.step)
        outcome = "failed"
        try:
            while self.step < cfg.train.max_steps:
                with profiler(self.step + 1):
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
                    logger.rollouts(self.step, self.rollout_records())
                    improved = self.checkpoints.record_best(self.step, metrics)
                stop = not last and self.world.any(stop_request.asked)
                save_every = cfg.train.save_every
                if last or improved or stop or (save_every and self.step % save_every == 0):
                    self.save()
                if stop:
                    self.checkpoints.finish()
                    outcome = "stopped"
                    raise Stopped
            self.checkpoints.finish()
            self.export()
            outcome = "finished"
        finally:
            self.checkpoints.close()
            profiler.close()
            self.source.close()
            self.teacher.close()
            logger.close(failed=outcome == "failed")
            self.run_dir.write_status(outcome, self.step)
            if self.world.is_main:
                write_report(self.run_dir.path)

    def train_step(self) -> dict[str, float]:
        """One optimizer step over equally many micro-batches on every rank."""
        cfg, world, timer = self.cfg, self.world, self.timer
        with timer("step"):
            with timer("data"):
                batches, problem = self.take()
            # Counted before any backward: every micro-batch is divided by the same number.
            problems, *numbers = world.sum_ints(
                problem is not None, *Counts.of(batches), *self.datasets.counts(batches)
            )
            if problems:
                world.agree(problem)
            counts, dataset_counts = Counts.split(numbers)
            with timer("teacher"):
                self.judge.expect(batches)
            losses = LossSum(self.device, self.datasets)
            self.trained.clear()
            for i, cpu_batch in enumerate(batches):
                batch = cpu_batch.to(self.device)
                with timer("teacher"):
                    targets = self.judge.targets(batch)
                sync_gradients(self.student, every=self.sync_every, last=i == len(batches) - 1)
                with timer("student"):
                    out = self.student.distill(batch, targets, *counts.divisors)
                with timer("backward"):
                    # FSDP2 averages gradients over the ranks; the loss is a global mean already.
                    (out.loss * world.size).backward()
                losses.add(batch, out)
                self.trained.append((cpu_batch, out.kd_N))
            with timer("optimizer"):
                grad_norm = clip_gradients(self.student, cfg.train.max_grad_norm)
                # The step's one host sync.
                loss, ce, kd, norm, *dataset_sums = losses.reduce(world, grad_norm)
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
            "train/tokens_per_s": counts.tokens / seconds["step"],
            "train/step_s": seconds["step"],
            "train/data_s": seconds["data"],
            "train/teacher_s": seconds["teacher"],
            **memory(self.device),
            "train/micro_batches": len(batches),
            **counts.metrics(),
            **self.datasets.metrics("train", cfg.kd_ratio, dataset_counts, dataset_sums),
            **self.source.metrics(),
            **self.judge.metrics(),
        }

    def take(self) -> tuple[list[Batch], str | None]:
        """The micro-batches of this rank, or what is wrong with a row, for all ranks to end by."""
        try:
            return self.source.take(), None
        except AgreedError:  # told by all ranks already
            raise
        except UserError as error:
            return [], str(error)

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
        metrics = self.validator.losses(self.student, self.judge)
        records = []
        if self.cfg.validation.generate:
            accuracy, records = self.validator.answers()
            metrics |= accuracy
        self.student.train()
        set_random_state(before)
        return metrics, records

    def rollout_records(self) -> list[RolloutRecord]:
        """Responses of the last step with the teacher's divergence; none without a teacher."""
        if isinstance(self.judge, NoTeacher):
            return []
        limit = self.cfg.validation.report_samples
        return rollout_records(self.trained, self.processor.tokenizer, self.step - 1, limit)

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
        export(self.run_dir.export, self.student, self.processor, self.cfg.student, self.world)


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
        with explain_out_of_memory(cfg, world, options):
            if cfg.doctor is DoctorMode.only:
                recipe = VlmKD(cfg, world)
                recipe.examine()
                recipe.teacher.close()
            else:
                run_dir = RunDir(cfg.run.path, world)
                run_dir.open(dataclasses.asdict(cfg), overrides, cfg.run.resume)
                VlmKD(cfg, world).train(run_dir)
    except Stopped:
        world.barrier()  # a launcher ends those who are left when the first has gone
        world.close()
        raise
    except BaseException:
        if world.size == 1:  # with more, closing may wait for ranks that never come
            world.close()
        raise
    world.close()
