"""Train a draft that makes a vision-language model decode faster, without changing what it says.

The target is frozen. Its own responses are what the draft learns: at anchors in them, the draft is
to say the tokens of the block that follows. loss = Σ w · CE / norm over the blocks of the whole
optimizer step, w by `draft.weighting`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable

import torch
from transformers.utils import logging as transformers_logging

from kd.batching import FixedBatching
from kd.checkpoint import Checkpoints, random_state, set_random_state
from kd.config_dflash import DFlashConfig
from kd.data import BatchStream, Collator, Renderer, Split, validation_batches
from kd.dflash import (
    LEAST_TOKENS,
    BlockMaker,
    Blocks,
    Draft,
    Target,
    export_draft,
    read_blocks,
)
from kd.logger.report import write_report
from kd.metrics import Timer, memory
from kd.optim import clip_gradients
from kd.out_of_memory import explain_out_of_memory
from kd.parallel import World, sync_gradients
from kd.plan_dflash import options, print_plan, sync_every_micro_batch
from kd.profile import Profiler
from kd.rollout import Parts, Policy
from kd.rundir import RunDir
from kd.states_dflash import build_states
from kd.stop import Stopped, stop_request
from kd.types import AgreedError, Batch, Source, UserError
from kd.validation_dflash import DraftEvaluator

log = logging.getLogger("kd")


class DFlash:
    """Holds what a run is made of; `train` is the run."""

    def __init__(self, cfg: DFlashConfig, world: World) -> None:
        self.cfg, self.world, self.device = cfg, world, world.device
        torch.manual_seed(cfg.run.seed)
        self.processor = cfg.target.build_processor(cfg.data.corpus)
        self.rows = cfg.data.build("train")
        self.val_rows = cfg.data.build("validation") if cfg.train.val_every else None
        self.target, self.draft = self.build_models()
        self.optimizer, self.scheduler = cfg.optim.build(self.draft, cfg.train.max_steps)
        self.sync_every = sync_every_micro_batch(cfg, world)
        renderer = Renderer(self.processor, cfg.target.processor.chat_template_kwargs)
        sides = renderer, None, cfg.data.max_length, world.size > 1
        positions = self.target.positions, self.target.positions
        self.collator = Collator(*sides, positions=positions)
        self.policy = self.build_policy(renderer)
        self.states = build_states(cfg, self.target, self.processor, world)
        self.source = self.build_source()
        self.blocks = BlockMaker(
            cfg.draft.block_size, self.draft.mask_token_id, cfg.draft.num_anchors, cfg.run.seed
        )
        self.evaluator = self.build_evaluator()
        self.timer = Timer(self.device)
        self.num_too_short = 0
        self.step = 0

    def build_models(self) -> tuple[Target, Draft]:
        """The frozen target with its taps, and the draft beside it."""
        cfg, world = self.cfg, self.world
        model = cfg.target.build(self.processor, with_weights=world.is_main)
        vocab = model.get_output_embeddings().weight.shape[0]
        mask = cfg.draft.find_mask_token(self.processor.tokenizer, vocab)
        draft = Draft(cfg.draft.resolve(model.config, vocab, mask))
        draft.init_weights(cfg.draft.seed)
        target = Target(model, draft.target_layer_ids, cfg.draft.embed_key, cfg.draft.lm_head_key)
        target.place(world, cfg.parallel, cpu_offload=cfg.target.cpu_offload)
        draft.distribute(world, cfg.parallel, cpu_offload=cfg.parallel.cpu_offload)
        return target, draft

    def build_policy(self, renderer: Renderer) -> Policy:
        """The target as one that responds."""
        return Policy(
            self.target,
            renderer.processor,
            functools.partial(self.collator.prompts, teacher=False),
            self.target.stop_ids(renderer.eos_token_id),
            self.target.forbidden_ids(len(renderer.processor.tokenizer)),
            self.world,
            self.cfg.data.max_length,
            renderer.chat_template_kwargs,
            self.cfg.run.path,
        )

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
                batching=FixedBatching().build(self.collator, *rows, world),
                student=self.policy,
                teacher=self.policy,
                told_ahead=None,
                micro_batch_size=cfg.train.micro_batch_size,
                grad_accum=cfg.train.grad_accum,
                seed=cfg.run.seed,
                on_broken_row=cfg.data.on_broken_row,
                world=world,
            )
        )

    def build_evaluator(self) -> DraftEvaluator:
        """Accept lengths on the validation rows, which there are only with train.val_every."""
        cfg = self.cfg
        split = Split(cfg.validation.batch_size, self.world.rank, self.world.size)
        return DraftEvaluator(
            lambda: validation_batches(self.val_rows, self.collator, split),
            self.collator,
            self.policy,
            self.states,
            self.draft,
            dataclasses.replace(self.blocks, num_anchors=None),
            cfg.draft,
            cfg.validation,
            cfg.data.on_broken_row,
            self.world,
        )

    def train(self, run_dir: RunDir) -> None:
        """From the last checkpoint, or the first step, to the exported draft."""
        cfg, self.run_dir = self.cfg, run_dir
        self.checkpoints = Checkpoints(run_dir.checkpoints, self.world, cfg.checkpoint)
        self.resume()
        logger = cfg.logger.build(cfg.run.path, self.world.rank)
        logger.start(dataclasses.asdict(cfg), cfg.train.max_steps, self.step)
        profiler = Profiler(cfg.profile, cfg.profile_steps, run_dir.path, self.world, self.step)
        run_dir.write_status("running", self.step)
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
            logger.close(failed=outcome == "failed")
            run_dir.write_status(outcome, self.step)
            if self.world.is_main:
                write_report(run_dir.path)

    def train_step(self) -> dict[str, float]:
        """One optimizer step over `grad_accum` micro-batches on every rank."""
        cfg, world, timer = self.cfg, self.world, self.timer
        with timer("step"):
            with timer("data"):
                batches, blocks, problem = self.take()
            # Counted before any backward: every micro-batch is divided by the same number.
            problems, num_blocks, num_short, num_tokens, *counts = world.sum_ints(
                problem is not None,
                sum(b.num_blocks for b in blocks),
                sum(len(r.response_ids) < LEAST_TOKENS for b in batches for r in b.responses),
                sum(b.num_tokens for b in batches),
                *(sum(at_k) for at_k in zip(*(b.counts() for b in blocks), strict=True)),
            )
            if problems:
                world.agree(problem)
            self.num_too_short += num_short
            norm = cfg.draft.weighting.normaliser(counts, num_blocks) or 1.0
            sums = torch.zeros(2 + len(counts), device=self.device, dtype=torch.float64)
            for i, (batch, chosen) in enumerate(zip(batches, blocks, strict=True)):
                batch, chosen = batch.to(self.device), chosen.to(self.device)
                with timer("target"):
                    states = self.states(batch, chosen)
                sync_gradients(self.draft, every=self.sync_every, last=i == len(batches) - 1)
                with timer("draft"):
                    out = read_blocks(
                        self.draft, states, chosen, cfg.draft.weighting, norm, cfg.draft.attention
                    )
                with timer("backward"):
                    # FSDP2 averages gradients over the ranks; the loss is already a global mean.
                    (out.loss * world.size).backward()
                accepted = out.num_accepted_A.sum()[None]
                sums += torch.cat([out.loss.detach()[None], accepted, out.num_correct_T]).double()
            with timer("optimizer"):
                grad_norm = clip_gradients(self.draft, cfg.train.max_grad_norm)
                # The step's one host sync.
                loss, accepted, *correct, norm = torch.cat(
                    [world.sum(sums), grad_norm.detach().to(sums).reshape(1)]
                ).tolist()
                if not math.isfinite(loss + norm):
                    self.refuse_non_finite(batches, loss, norm)
                lr = float(self.scheduler.get_last_lr()[0])
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        seconds = timer.flush()
        return {
            "train/loss": loss,
            "train/accuracy": sum(correct) / max(1, sum(counts)),
            "train/accept_length": 1 + accepted / max(1, num_blocks),
            "train/grad_norm": norm,
            "train/lr": lr,
            "train/num_blocks": num_blocks,
            "train/num_targets": sum(counts),
            "train/tokens_per_s": num_tokens / seconds["step"],
            "train/step_s": seconds["step"],
            "train/data_s": seconds["data"],
            "train/target_s": seconds["target"],
            **memory(self.device),
            "data/too_short": self.num_too_short,
            **self.states.metrics(),
            **self.source.metrics(),
        }

    def take(self) -> tuple[list[Batch], list[Blocks], str | None]:
        """The micro-batches of this rank with their blocks, or what is wrong with a row."""
        try:
            batches = self.source.take()
            return batches, [self.blocks(batch, self.step) for batch in batches], None
        except AgreedError:  # told by all ranks already
            raise
        except UserError as error:
            nothing = self.blocks.at([], [], [], 0)
            return [], [nothing], str(error)

    def refuse_non_finite(self, batches: list[Batch], loss: float, norm: float) -> None:
        """End the run before the weights are touched, naming the rows of the step."""
        ranks = self.world.gather([sample.id for batch in batches for sample in batch.samples])
        ids = [sample_id for rank in ranks for sample_id in rank]
        self.world.agree(
            f"step {self.step + 1}: loss {loss}, gradient norm {norm}; neither the weights nor the "
            f"last checkpoint were touched\nIts samples: {', '.join(ids)}"
        )

    def validate(self) -> tuple[dict[str, float], list]:
        """Accept lengths on the validation split; training state stays as it is."""
        before = random_state()
        self.draft.eval()
        found = self.evaluator()
        self.draft.train()
        set_random_state(before)
        return found

    def save(self) -> None:
        """Checkpoint the state after `self.step`."""
        self.states.publish()
        small = {
            "source": self.source.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "too_short": self.num_too_short,
        }
        self.checkpoints.save(self.step, self.draft, self.optimizer, small)
        self.run_dir.write_status("running", self.step)

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        step = self.checkpoints.newest_whole()
        if step is None:
            return
        small = self.checkpoints.load(step, self.draft, self.optimizer)
        self.source.load_state_dict(small["source"])
        self.scheduler.load_state_dict(small["scheduler"])
        self.num_too_short = small["too_short"]
        self.step = step
        if self.world.is_main:
            log.info("resuming %s after step %d", self.run_dir.path, step)

    def export(self) -> None:
        """Write the draft as a folder that serving engines load."""
        best = self.checkpoints.best_step()
        if self.cfg.train.export == "best" and best is not None:
            self.checkpoints.load(best, self.draft, self.optimizer)
        export_draft(self.run_dir.export, self.draft, self.cfg.draft.export_dtype, self.world)


def main(cfg: DFlashConfig, overrides: list[str]) -> None:
    """Run the recipe in this process, as one of its ranks."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if cfg.dry_run:
        print_plan(cfg)
        return
    world = cfg.parallel.build()
    try:
        with explain_out_of_memory(cfg, world, options):
            run_dir = RunDir(cfg.run.path, world)
            run_dir.open(dataclasses.asdict(cfg), overrides, cfg.run.resume)
            DFlash(cfg, world).train(run_dir)
    except Stopped:
        world.barrier()  # a launcher ends those who are left when the first has gone
        world.close()
        raise
    except BaseException:
        if world.size == 1:  # with more, closing may wait for ranks that never come
            world.close()
        raise
    world.close()
