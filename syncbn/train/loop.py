"""The training loop: build, train, measure, close.

Decisions: each rank's loss is its summed loss times W / B, so that the gradients that are averaged over ranks are
those of the mean over the whole global batch, however unevenly it is shared; gradients are clipped after they
are reduced; and whether to go on is decided only where ranks agree (`Agreement`).
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.config import RunConfig, config_hash
from syncbn.errors import Interrupted, NonFinite, OutOfTime, Stopped, UsageError
from syncbn.norm import NonFiniteStatistics
from syncbn.optim import learning_rate, set_rate
from syncbn.probes import Batch
from syncbn.runtime.base import Runtime
from syncbn.structure import count
from syncbn.tasks import Task, loss_of, outputs_of, weight_of
from syncbn.tracking import Tracker
from syncbn.train.accumulate import accumulate, own_sizes
from syncbn.train.agreement import Agreement
from syncbn.train.evaluation import evaluate, own_batches, settle_buffers
from syncbn.train.precision import autocast
from syncbn.train.progress import Advance, progress
from syncbn.train.saving import Saving
from syncbn.train.state import State, build, resume
from syncbn.train.stopping import StopRequest, stop_on_signals
from syncbn.train.summary import RunSummary
from syncbn.train.tables import write_tables


def train(cfg: RunConfig, runtime: Runtime, tracker: Tracker) -> RunSummary:
    """Train the model of `cfg` on the ranks of `runtime`, reporting to `tracker`.

    A collective: every rank calls it with an equal config. The same config on the same number of ranks gives
    the same bits on CPU, whatever launched them.

    Returns:
        The same summary on every rank.

    Raises:
        SyncbnError: bad data, config or checkpoint; `NonFinite`; with a checkpoint saved, `Stopped` by a signal, or
            `OutOfTime`.
    """
    torch.set_num_threads(cfg.train.num_threads)
    state = build(cfg, runtime)
    resume(state, tracker)
    with stop_on_signals() as stop, progress(cfg, runtime.is_main) as advance, state.probes:
        return Loop(state, tracker, stop).run(advance)


class Loop:
    """One run of the loop, from the state's step to the end of the budget, or sooner."""

    def __init__(self, state: State, tracker: Tracker, stop: StopRequest) -> None:
        self.state, self.tracker, self.stop = state, tracker, stop
        self.agreement = Agreement(state.runtime)
        self.saving = Saving(state, tracker)
        self.save_due = False
        """Whether all ranks know that a save is due by the clock."""
        self.started = time.monotonic()
        self.seconds_before = state.standing.seconds

    def run(self, advance: Advance) -> RunSummary:
        """Take the steps that are left, measure, save, and summarise."""
        state, cfg = self.state, self.state.cfg
        try:
            self._call("start")
            for step in self.steps():
                advance(step)
            if state.standing.measured_at != state.step:
                self._measure()
            concluded = self._conclude() if state.probes else {}
            self._name_best()
            self._end()
        except Interrupted:
            self._save_at_last()
            raise
        except (NonFinite, NonFiniteStatistics) as error:
            raise NonFinite(str(error), state.step) from error
        finally:
            self.saving.close()
        return RunSummary(
            final=state.standing.final(state.task) | concluded,
            steps=state.step,
            seconds=state.standing.seconds,
            world_size=state.runtime.world_size,
            config_hash=config_hash(cfg),
        )

    def steps(self) -> Iterator[int]:
        """Take the steps that are left, each when it is asked for, with what it makes due; yields its number."""
        for global_batch, x, y in self.state.batches():
            self._step(global_batch, x, y)
            enough = self._enough()
            yield self.state.step
            if enough:
                return

    def _step(self, global_batch: int, x: Any, y: Any) -> None:
        """One optimiser step, and what its number makes due."""
        state, cfg = self.state, self.state.cfg
        rate = learning_rate(state.step, cfg.optim, cfg.train.steps, cfg.global_batch)
        set_rate(state.optimizer, rate)
        loss, whole = _gradients(state, global_batch, x, y)
        if state.scale is not None:
            state.scale.unscale(state.optimizer)
        if state.probes:
            self._probe(rate, Batch(x, y, global_batch, loss / whole))
        if cfg.optim.clip_norm is not None:
            nn.utils.clip_grad_norm_(state.model.parameters(), cfg.optim.clip_norm)
        _move(state)
        _clear_gradients(state)
        state.step += 1
        self.agreement.add(state.step, loss, whole)
        if state.callbacks:
            self._call("after_step")

    def _call(self, moment: str) -> None:
        """Let the callbacks of extensions act, where there are any."""
        state = self.state
        if state.callbacks:
            state.callbacks.call(
                moment,
                step=state.step,
                steps=state.cfg.train.steps,
                model=state.model,
                measured=dict(state.standing.measured),
                folder=state.cfg.folder,
                _record=self.tracker.metrics,
            )

    def _end(self) -> None:
        """Let the callbacks act for the last time; whatever they do, all steps are saved."""
        try:
            self._call("end")
        finally:
            self._save_at_last()

    def _name_best(self) -> None:
        """Say in the journal which evaluation was best, where its checkpoint is kept."""
        standing = self.state.standing
        if standing.kept_step >= 0:
            decides = self.state.task.decides
            value = standing.final(self.state.task)[f"best_{decides}"]
            self.tracker.event(
                "note",
                text=f"best test_{decides}: {value:.6g} after step {standing.kept_step}, whose checkpoint is kept and "
                f"stands for the run (checkpoints/BEST); the last step is {self.state.step}",
            )

    def _probe(self, rate: float, batch: Batch) -> None:
        """Let the probes see `batch` with its gradients in place, and record what they look at."""
        points = self.state.probes.before_step(self.state.step, rate, batch)
        if points:
            self.tracker.metrics(self.state.step, points)

    def _conclude(self) -> dict[str, float]:
        """The probes' last look, recorded, and what they add to the final metrics."""
        points, finals = self.state.probes.after_last(self.state.step)
        if points:
            self.tracker.metrics(self.state.step, points)
        return finals

    def _enough(self) -> bool:
        """Do what is due after this step; whether to end before the budget does."""
        state, train = self.state, self.state.cfg.train
        last = state.step == train.steps
        measuring, saving = (
            _due(state.step, train.eval_every),
            _due(state.step, train.checkpoint_every),
        )
        agreeing = _due(state.step, train.agree_every)
        late, asked = self._agree(agreeing, at_once=last or measuring or saving)
        if measuring or last:
            self._measure()
        enough = measuring and self._good_enough()
        if state.callbacks and (measuring or agreeing):
            enough = state.callbacks.want_to_stop() or enough
        if asked:  # what this step made due is done: resuming repeats and loses nothing
            raise Stopped(asked)
        if late and not (enough or last):
            raise OutOfTime(
                f"train.time_limit_s={train.time_limit_s:g} was over after {state.step} of {train.steps} steps, "
                "checkpoint saved: the same command continues"
            )
        self.saving.check()
        best = state.standing.kept_step == state.step
        by_clock = self.save_due and (agreeing or measuring) and not self.agreement.started
        if (saving or best or by_clock) and not (last or enough):
            self._take_time()
            self.saving.start()
            self.save_due = False
        return enough

    def _agree(self, due: bool, at_once: bool) -> tuple[bool, int]:
        """Whether all ranks know that time is over, and the signal to stop, or 0.

        What they agree on where it is `due` they know a step later, when the exchange has cost no time; `at_once`
        waits for it. A save by the clock is made where an agreement is due anyway, so that no number depends on it.
        """
        late, asked = self._heard()
        at_once = at_once or late or asked > 0  # the losses since then belong to this attempt
        at_once = at_once or (due and self.save_due)
        if due or at_once:
            self.agreement.start(self.stop.signal_number, self._out_of_time(), self.saving.is_due())
        if at_once or self.state.runtime.world_size == 1:
            late_now, asked_now = self._heard()
            late, asked = late or late_now, asked or asked_now
        return late, asked

    def _out_of_time(self) -> bool:
        limit = self.state.cfg.train.time_limit_s
        return limit is not None and time.monotonic() - self.started > limit

    def _heard(self) -> tuple[bool, int]:
        """What `_agree` returns, of an agreement that has been started; records its losses."""
        if not self.agreement.started:
            return False, 0
        cfg = self.state.cfg
        losses, late, save_due, asked = self.agreement.finish()
        self.save_due = self.save_due or save_due
        for step, loss in losses.items():
            if _due(step, cfg.train.log_every):
                rate = learning_rate(step - 1, cfg.optim, cfg.train.steps, cfg.global_batch)
                self.tracker.metrics(step, {"train_loss": loss, "lr": rate})
        self._remember(losses)
        if self.state.scale is not None:
            scale = self.state.scale.require_usable()
            self.tracker.metrics(self.state.step, {"loss_scale": scale})
        return late, asked

    def _remember(self, losses: Mapping[int, float]) -> None:
        """Have `standing.train_loss` be the mean over steps that no save and no stop decides."""
        standing, train = self.state.standing, self.state.cfg.train
        for step, loss in losses.items():
            if _due(step - 1, train.agree_every) or _due(step - 1, train.eval_every):
                standing.losses.clear()
            standing.losses.append(loss)
        if losses:
            standing.train_loss = sum(standing.losses) / len(standing.losses)

    def _measure(self) -> None:
        state, cfg = self.state, self.state.cfg
        self.saving.wait()  # loaders of an evaluation are forks, made while no thread is at work
        settle_buffers(state.model, cfg.norm.name, state.runtime)
        batches = own_batches(len(state.sets.test), state.runtime, cfg.train.eval_batch)
        averaged = nullcontext() if state.ema is None else state.ema.in_place()
        half = autocast(cfg.train.precision, state.runtime.device)
        with averaged, half, state.parallel.evaluation():
            measured, tables = evaluate(
                state.model,
                state.task,
                state.sets.test.batches(batches),
                state.runtime,
                state.dtype,
                state.sets.num_classes,
            )
        if state.runtime.is_main:
            write_tables(cfg.folder / "measures", state.step, tables)
        state.standing.measured, state.standing.measured_at = measured, state.step
        self.tracker.metrics(state.step, measured)
        standing = state.standing
        if cfg.train.keeps_best and self._decided() < standing.kept_error:
            standing.kept_error, standing.kept_step = self._decided(), state.step
        self._call("after_evaluation")

    def _save_at_last(self) -> None:
        self._take_time()
        self.saving.finish()

    def _take_time(self) -> None:
        self.state.standing.seconds = self.seconds_before + time.monotonic() - self.started

    def _decided(self) -> float:
        """The last value of the measure that the task decides by, as an error: lower is better."""
        value = self.state.standing.measured[f"test_{self.state.task.decides}"]
        return value if self.state.task.lower_is_better else -value

    def _good_enough(self) -> bool:
        """Whether the target is reached, or patience with the measure that decides is at an end."""
        train, standing = self.state.cfg.train, self.state.standing
        error = self._decided()
        standing.evaluations_since_best += 1
        if error < standing.best_error:
            standing.best_error, standing.evaluations_since_best = error, 0
        reached = train.target_error is not None and error <= train.target_error
        tired = train.patience is not None and standing.evaluations_since_best >= train.patience
        return reached or tired


def _backward(state: State, whole: int | Tensor, x: Any, y: Any) -> Tensor:
    """Leave the gradient of the global mean loss in `.grad`; the summed loss of this rank's samples, `()`.

    `whole` is what the global batch counts for.
    """
    loss = loss_of(state.task, _outputs(state, x, y), y)
    # The backward pass begins with W / B, which spares it two small operations: 30 us of an MLP's 600.
    if isinstance(whole, int):
        weight = _weight(state.runtime.world_size, whole, loss.dtype, loss.device)
    else:
        weight = (state.runtime.world_size / whole).to(loss.dtype)
    with _in_place_named():
        (loss if state.scale is None else state.scale.scaled(loss)).backward(weight)
    return loss.detach()


@contextmanager
def _in_place_named() -> Iterator[None]:
    """Raise `UsageError` where autograd finds that a model or a task has overwritten what its gradient needs."""
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        reason = str(error).partition(". Hint")[0]
        raise UsageError(
            f"the model or the task changes in-place what its backward pass needs ({reason}): write y = f(y) for "
            "f_(y), such as y * 2 for y.mul_(2)"
        ) from error


@lru_cache(maxsize=16)
def _weight(world_size: int, global_batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """W / B, `()`: the gradient of what DistributedDataParallel averages by a rank's summed loss."""
    return torch.ones((), dtype=dtype, device=device) * world_size / global_batch


def _whole(state: State, global_batch: int, y: Any) -> int | Tensor:
    """What the global batch counts for: its samples, unless the task says its weight; 1 where that is 0."""
    if type(state.task).weight is Task.weight:
        return global_batch
    total = state.runtime.sum(weight_of(state.task, y).detach().to(state.runtime.device, copy=True))
    return torch.where(total > 0, total, 1.0)


def _gradients(state: State, global_batch: int, x: Any, y: Any) -> tuple[Tensor, int | Tensor]:
    """`_backward` of the whole step, micro-batch by micro-batch where it has several; and what its batch counts for."""
    cfg, runtime = state.cfg, state.runtime
    whole = _whole(state, global_batch, y)
    if cfg.train.accumulate == 1:
        return _backward(state, whole, x, y), whole
    sizes = own_sizes(global_batch, cfg.micro_batch, runtime.rank, runtime.world_size)
    backward = partial(_backward, state, whole)
    return accumulate(backward, state.parallel.unreduced, sizes, x, y), whole


def _clear_gradients(state: State) -> None:
    """Zeros where DistributedDataParallel keeps gradients in its buckets, nothing elsewhere."""
    if state.parallel.sets_gradients_to_none:
        state.optimizer.zero_grad()
        return
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    # `Optimizer.zero_grad` does the same in 19 us, this takes 3.
    torch._foreach_zero_([p.grad for p in parameters if p.grad is not None])  # pyright: ignore[reportPrivateImportUsage]


def _move(state: State) -> None:
    """The optimiser's step, and what follows the parameters."""
    if state.scale is None:
        state.optimizer.step()
    else:
        state.scale.step(state.optimizer)
    if state.ema is not None:
        state.ema.update()


def _outputs(state: State, x: Any, y: Any) -> Any:
    """The network's outputs in training; whether a norm gets too few values shows here for networks with poolings.

    Raises:
        UsageError: a batch norm with one value per channel.
    """
    try:
        return outputs_of(state.task, state.wrapped, x, y)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UsageError(
            f"{count(x)} sample(s) on rank {state.runtime.rank} are too few for norm={state.cfg.norm.name} in this "
            f"network: use a larger train.per_rank_batch, and train.drop_last=true ({error})"
        ) from error


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
