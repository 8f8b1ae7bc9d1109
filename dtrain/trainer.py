"""The training loop: the only file that knows every part.

config -> process group -> mesh -> model on meta -> parallelize -> parameters -> optimizer -> checkpoint ->
for each step: batches -> forward and backward -> AdamW, clipping and EMA -> metrics -> samples -> checkpoint
"""

import gc
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from dtrain.activations.policy import stash_meter
from dtrain.build import build_sharded
from dtrain.checkpoint import (
    Checkpointer,
    Progress,
    TrainingState,
    check_resume,
    choose_checkpoint,
    read_progress,
)
from dtrain.comm import attached
from dtrain.config import RunConfig, build_recipe, check_world, to_toml
from dtrain.data import index_at, leave_out
from dtrain.dist import World, environment_world_size, process_group
from dtrain.faults.agreement import Agreement
from dtrain.faults.badsteps import BadRun, Judge, RollBack
from dtrain.faults.replicas import check_alike, check_replicas, code_digest
from dtrain.faults.signals import StopSignals
from dtrain.faults.tally import Tally
from dtrain.faults.watchdog import Watchdog
from dtrain.metrics import NullLog
from dtrain.metrics.flops import training_flops
from dtrain.metrics.memory import MemoryReport
from dtrain.metrics.records import disk_faults_said
from dtrain.optim import build_optimizer, set_learning_rate
from dtrain.optim.ema import EMA
from dtrain.outputs import draw_loss, first_words, open_log, write_config, write_samples
from dtrain.recipe import Batch, DataState, Recipe
from dtrain.rng import seed_everything
from dtrain.sampling import draw_clips
from dtrain.sharding.mesh import build_mesh, mean_over
from dtrain.sharding.shard import to_empty
from dtrain.step import StepResult, train_step

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> None:
    """Run or resume the training run that `config` describes, on this process's rank of the world.

    Raises:
        ValueError: the config does not fit the world, the data or the checkpoint; before any process group
            starts where that can be known.
    """
    check_world(config, environment_world_size())
    recipe = build_recipe(config)
    check_resume(config.checkpoint, config.run_dir / "checkpoints")
    if recipe.fingerprint:
        recipe.fingerprint(config.seed)  # opens the data, which may be missing
    with process_group(config.train.timeout_s) as world:
        _run(config, recipe, world)


def _run(config: RunConfig, recipe: Recipe, world: World) -> None:
    """Train; where weights have gone bad, again from a checkpoint on."""
    back: RollBack | None = None
    tally, times = Tally(), 0
    while True:
        trainer = Trainer(config, recipe, world, back, tally)
        try:
            return trainer.run()
        except RollBack as asked:
            back = asked
        del trainer  # and its memory, before there is another
        gc.collect()
        tally.rollbacks += 1
        times = 1 if back.saved else times + 1
        if times > config.faults.max_rollbacks:
            raise BadRun(
                f"{back.said}. Going back did not help, {config.faults.max_rollbacks} time(s) in a row "
                "(faults.max_rollbacks): look at these samples, or lower optim.lr."
            )
        if world.is_main:
            where = back.checkpoint.name if back.checkpoint else "its start"
            logger.warning("the run goes back to %s and leaves out samples %s", where, back.left_out)


def materialise(recipe: Recipe, config: RunConfig, world: World, mesh: Any) -> nn.Module:
    """Build the model without memory, shard it, then give each rank its filled shards."""
    model = build_sharded(recipe, config, mesh)
    to_empty(model, config.shard, world.device)
    seed_everything(config.seed, "init")
    recipe.init(model)
    return model


class Trainer:
    """One run on one rank.

    Args:
        config: the whole run's configuration.
        recipe: the model, its data and its loss.
        world: this rank's place; the process group is up.
        back: where to begin instead of where the config says.
        tally: what the run has met before.
    """

    def __init__(
        self,
        config: RunConfig,
        recipe: Recipe,
        world: World,
        back: RollBack | None = None,
        tally: Tally | None = None,
    ) -> None:
        self.config, self.recipe, self.world = config, recipe, world
        self.accumulation = config.train.accumulation(world.size)
        self.mesh = build_mesh(config.mesh, world.size, world.device.type)
        self.model = materialise(recipe, config, world, self.mesh)
        self.optimizer = build_optimizer(self.model, config.optim, config.seed)
        self.ema = EMA(self.model, config.ema, config.seed) if config.ema.enabled else None
        self.comm = attached(self.model)
        self.stash = stash_meter(self.model)
        self.state = TrainingState(
            self.model, self.optimizer, self.ema, self.comm.state if self.comm else None
        )
        # Saving runs collectives on a background thread, which needs a group of its own.
        self.checkpointer = Checkpointer(
            config.run_dir / "checkpoints",
            config.checkpoint,
            dist.new_group(backend="gloo"),
            world.is_main,
            to_toml(config),
        )
        self.agreement = Agreement(dist.new_group(backend="gloo"))
        self.signals = StopSignals()
        self._stopped = False
        self.tally = tally or Tally()
        check_alike("config", to_toml(config))
        check_alike("code", code_digest("dtrain", config.recipe.partition(":")[0]))
        self.fingerprint = self._agreed_fingerprint()
        self._from: Path | None = None
        self.progress = self._resume(back)
        self.judge = Judge(config.faults, self.mesh, self.progress.losses)
        self._good_sample = self.progress.sample  # where the newest update ended
        self._metered = self.progress.step

    def run(self) -> None:
        """Train to the last step, saving and sampling on the way."""
        total = self.config.train.steps
        if self.world.is_main:
            write_config(self.config)
        preset = self.comm.preset if self.comm else "none"
        with (
            self.signals,
            Watchdog(self.world, self.config.faults.hang_s, self.config.run_dir) as self.watchdog,
            open_log(self.config, self.world, self.progress.step) as log,
            MemoryReport(self.config, self.world, preset) as memory,
        ):
            self._say_start(log)
            batches, begun = iter(self._data()), self.progress.step + 1
            while self.progress.step < total and not self._stopped:
                number = self.progress.step + 1
                patience_s = None if number > begun else 0.9 * self.config.train.timeout_s
                self.watchdog.at(number, "waits for data", patience_s)
                taken = self._next(batches)
                self.watchdog.at(number, "forward and backward", patience_s)
                self._step(number - 1, taken, log)
                with log.untimed():
                    memory.poll(log)
                    self._after_step(number, log)
            self.watchdog.at(self.progress.step, "ends", 0.9 * self.config.train.timeout_s)
            self.agreement.finish()
            self.checkpointer.close()
            self.tally.failed_saves += self.checkpointer.failures
            log.tally(self.tally.gathered())
            memory.finish(log)
        if self.world.is_main:
            draw_loss(self.config)
        dist.barrier()

    def _next(self, batches: Iterator[Batch]) -> list[Batch]:
        taken = list(itertools.islice(batches, self.accumulation))
        if len(taken) < self.accumulation:
            raise ValueError(f"Recipe.data ended after step {self.progress.step}: it must be endless.")
        return taken

    def _step(self, step: int, batches: list[Batch], log: NullLog) -> None:
        config = self.config
        lr = set_learning_rate(self.optimizer, config.optim, step, config.train.steps)
        for meter in (self.comm and self.comm.meter, self.stash):
            if meter:
                meter.sample = log.due(step + 1)
        result = train_step(
            self.model,
            self.recipe,
            self.optimizer,
            batches,
            seed=config.seed,
            device=self.world.device,
            clip_norm=config.optim.clip_norm,
            reduce_each=config.shard.reduce_each_micro_batch,
            ema=self.ema.at(step) if self.ema else None,
            accepts=self._accepts(step + 1, batches) if config.faults.max_bad_steps else None,
        )
        self.tally.read(batches)
        self._log_step(step + 1, batches, log, lr=lr, loss=result.loss, grad_norm=result.grad_norm)
        self.progress = Progress(
            step + 1,
            self.progress.sample + config.train.global_batch,
            config.seed,
            self.world.size,
            self.fingerprint,
            self.progress.left_out,
            tuple(self.judge.losses),
        )

    def _accepts(self, step: int, batches: list[Batch]) -> Callable[[StepResult], bool]:
        samples = [batch["index"] for batch in batches]
        return lambda result: self.judge.accepts(step, result, samples)

    def _look_back(self, log: NullLog) -> None:
        """After an update that was passed over, or was made."""
        judge, end = self.judge, self.progress.sample
        if not judge.in_a_row:
            self._good_sample = end
            return
        log.note(judge.said)
        self.tally.passed_over += 1
        if self.comm is not None:
            self.comm.state.forget_errors()
        if judge.in_a_row >= self.config.faults.max_bad_steps:
            self.agreement.finish()
            self.checkpointer.wait()
            self.tally.failed_saves += self.checkpointer.failures
            before = self.progress.left_out
            bad = (index_at(place, before) for place in (self._good_sample, end - 1))
            newest = self.checkpointer.newest
            raise RollBack(newest or self._from, leave_out(before, *bad), judge.said, newest is not None)

    def _log_step(self, step: int, batches: list[Batch], log: NullLog, **values: Any) -> None:
        if log.due(step):
            values["loss"] = mean_over(self.mesh, values["loss"])
            values |= self._meters(step)
        tokens = self.recipe.tokens
        log.step(
            step,
            samples=self.config.train.global_batch,
            tokens=self.world.size * sum(map(tokens, batches)) if tokens else None,
            flops=self.world.size * training_flops(sum(map(self.recipe.flops, batches))),
            **values,
        )

    def _meters(self, step: int) -> dict[str, float]:
        """What this rank's collectives sent and lost since the last record, and what its blocks put away."""
        steps, self._metered = step - self._metered, step
        values: dict[str, float] = {}
        if self.comm is not None and self.comm.scheme is not None:
            values |= self.comm.meter.read(steps)
        return values | (self.stash.read(steps) if self.stash else {})

    def _after_step(self, step: int, log: NullLog) -> None:
        config, last = self.config, step == self.config.train.steps
        self._look_back(log)
        often = config.faults.check_replicas_every
        if often and step % often == 0 and self.mesh.ndim > 1:
            check_replicas(self.model, self.mesh, step)
        known = self.agreement.exchange(self.signals.asked is not None, self.checkpointer.written)
        if known.written:
            self.checkpointer.wait()
        self._stopped = known.stop and not last
        # Not amid updates that are passed over: it may have to go back to before them.
        if last or self._stopped or (self.checkpointer.due(step) and not self.judge.in_a_row):
            self.watchdog.at(step, "saving")
            self.checkpointer.save(self.state, self.progress)
        every = config.train.sample_every
        if every and not self._stopped and (last or step % every == 0):
            self.watchdog.at(step, "sampling", 0.9 * config.train.timeout_s)
            self._sample(step, log)
        if self._stopped:
            log.note(f"stopped after step {step} as {self.signals.asked or 'another rank'} asked: saving")

    def _sample(self, step: int, log: NullLog) -> None:
        """Generate clips from the averaged weights on all ranks; rank 0 writes and scores them."""
        if self.recipe.sample is None:
            return
        clips = draw_clips(
            self.recipe, self.model, self.ema, self.world, self.config.train.samples, self.config.seed
        )
        if not self.world.is_main:
            return
        with disk_faults_said(f"step {step}: samples"):
            log.note(write_samples(self.recipe, clips, self.config, step))

    def _data(self) -> Iterator[Batch]:
        config, world = self.config, self.world
        state = DataState(
            config.seed,
            self.progress.sample,
            config.train.micro_batch,
            str(world.device),
            self.progress.left_out,
        )
        return iter(self.recipe.data(world.rank, world.size, state))

    def _resume(self, back: RollBack | None) -> Progress:
        """Load the checkpoint that the config selects, or that to go back to."""
        config = self.config.checkpoint
        if back is not None:
            config = replace(config, resume=str(back.checkpoint) if back.checkpoint else "never")
        chosen = self._from = choose_checkpoint(config, self.checkpointer.folder)
        left_out = back.left_out if back else ()
        if chosen is None:
            return Progress(0, 0, self.config.seed, self.world.size, self.fingerprint, left_out)
        progress = read_progress(chosen)
        if progress.seed != self.config.seed:
            raise ValueError(
                f"seed = {self.config.seed}, but {chosen} was trained with seed {progress.seed}, which "
                f"decides its data order and noise: set seed = {progress.seed}, or start a new run."
            )
        self.state.load(chosen)
        if progress.fingerprint != self.fingerprint and self.world.is_main:
            logger.warning("the data has changed since %s was written: samples will differ", chosen)
        return replace(progress, left_out=left_out) if back else progress

    def _agreed_fingerprint(self) -> str:
        mine = self.recipe.fingerprint(self.config.seed) if self.recipe.fingerprint else ""
        check_alike("data", mine)
        return mine

    def _say_start(self, log: NullLog) -> None:
        for line in first_words(self.config, self.world, self.model, self.comm):
            log.note(line)
        if self.progress.step:
            log.note(f"resumed at step {self.progress.step}, sample {self.progress.sample}")
