"""A learning rate for a Trainer's own model and data: a few short trainings from one start, all undone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .live import optim_name
from .optim.registry import OptionError
from .rehearsal import Rehearsal, rehearse


DECADES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
UPDATES, LEAST_UPDATES = 14, 6
WARM_UP_SHARE, LAST_SHARE = 0.3, 0.4
LIMITS = """\
What it can't know: it saw {updates} updates a rate, without your schedule. From random
weights a long run may want a third of this rate. An adapter may want three to
ten times as much: its best rates are behind at first. Where a loss stays at
chance for long, no short test can tell: take the documented rate. A loss that
is no measure of progress, as GRPO's, tells nothing."""


@dataclass(frozen=True)
class Trial:
    """
    One short training.

    Args:
        learning_rate (`float`): At its peak, between a linear warm-up and a linear decay.
        losses (`list[float]`): Of each update's batches, before that update; fewer than planned where it diverged.
        planned (`int`): Updates that it would have made.
    """

    learning_rate: float
    losses: list[float]
    planned: int

    @property
    def last(self) -> list[float]:
        """The losses that count; empty where it diverged."""
        count = max(3, round(LAST_SHARE * self.planned))
        return self.losses[-count:] if len(self.losses) == self.planned else []

    @property
    def score(self) -> float:
        """The mean of the last losses; infinity where it diverged."""
        return statistics.mean(self.last) if self.last else math.inf

    def is_as_good_as(self, other: Trial) -> bool:
        """
        Whether the losses of the same batches are not higher by more than two standard errors of their difference.
        """
        if not self.last:
            return False
        gaps = [mine - others for mine, others in zip(self.last, other.last, strict=True)]
        return statistics.mean(gaps) <= 2 * statistics.stdev(gaps) / math.sqrt(len(gaps))


@dataclass(frozen=True)
class LRTest:
    """
    What [`lr_find`] found.

    Args:
        optimizer (`str`): As `args.optim` names it.
        given (`float`): `args.learning_rate`.
        trials (`list[Trial]`): By learning rate.
    """

    optimizer: str
    given: float
    trials: list[Trial]

    @property
    def best(self) -> Trial:
        """The trial with the lowest score."""
        return min(self.trials, key=lambda trial: trial.score)

    @property
    def alike(self) -> list[float]:
        """Learning rates that noise does not tell from the best one's, without a gap."""
        place = self.trials.index(self.best)
        low = high = place
        while low > 0 and self.trials[low - 1].is_as_good_as(self.best):
            low -= 1
        while high + 1 < len(self.trials) and self.trials[high + 1].is_as_good_as(self.best):
            high += 1
        return [trial.learning_rate for trial in self.trials[low : high + 1]]

    @property
    def is_clear(self) -> bool:
        """Whether noise tells the best trial from that of the smallest rate, which hardly moves anything."""
        return bool(self.best.last) and not self.trials[0].is_as_good_as(self.best)

    @property
    def suggestion(self) -> float | None:
        """
        Where the parabola through the best trial and its neighbours is lowest, over the logarithm of the rate, to two
        digits; `None` where every trial diverged.
        """
        best, place = self.best, self.trials.index(self.best)
        if not best.last:
            return None
        around = self.trials[max(0, place - 1) : place + 2]
        found = best.learning_rate
        if len(around) == 3 and around[2].last:
            found = math.exp(_lowest([(math.log(each.learning_rate), each.score) for each in around]))
        return float(f"{found:.1e}")

    def to_text(self) -> str:
        """For a terminal: each rate's loss, the suggestion, and what it can't know."""
        planned, count = self.trials[0].planned, len(self.best.last)
        made = sum(len(trial.losses) for trial in self.trials)
        lines = [f"Learning rates for {self.optimizer}: {made} updates of this training, all undone.", ""]
        lines.append(f"{'rate':>9}  loss, mean of the last {count} of {planned} updates")
        for trial in self.trials:
            shown = f"{trial.score:.4f}" if trial.last else f"diverged after {len(trial.losses)}"
            lines.append(f"{trial.learning_rate:>9.2g}  {shown}{'  lowest' if trial is self.best and count else ''}")
        return "\n".join([*lines, "", *self._verdict(), "", LIMITS.format(updates=planned)])

    def _verdict(self) -> list[str]:
        if self.suggestion is None:
            return ["No suggestion: every rate diverged. Look at the data and the loss first."]
        lines = [f"Try learning_rate={self.suggestion:g}. (Yours is {self.given:g}.)"]
        if not self.is_clear:
            lines.append("This is weak: noise hides what the smallest rate does worse. Test more updates.")
        elif len(self.alike) > 1:
            lines.append(f"Noise does not tell {self.alike[0]:.2g} to {self.alike[-1]:.2g} apart.")
        return lines

    def save_picture(self, path: str | Path) -> None:
        """
        Draws the losses of all trials, and their scores over the rates.

        Args:
            path (`str` or path): Of a PNG.

        Raises:
            `ImportError`: matplotlib is not installed.
        """
        from .report.plots import lr_test_png

        Path(path).write_bytes(lr_test_png(self))


def lr_find(trainer: Any, updates: int = UPDATES) -> LRTest:
    """
    Finds a learning rate by short trainings of a Trainer's own model on its own data; then all is as before.

    Each rate gets the same start: weights, optimizer, batches, random numbers, and so for SGD-SaI the same scales,
    which its first step measures. It makes `updates` updates, a small whole training: linear warm-up over the first
    30%, then linear decay. Its own momentum fills up in them, and none comes from another rate. First five decades
    from 1e-5 to 1e-1 are tried, then 0.3 and 3 times the best. What counts is the mean loss of the last 40% of the
    updates, each batch new to the model. A training that diverges ends early.

    Afterwards weights, buffers, gradients, modes, the optimizer, random generators and the order of the data are as
    before; a training that follows is the same, bit for bit, as without. One process; no DeepSpeed, no FSDP.

    Args:
        trainer (`transformers.Trainer`): Before its `train()`, with any optimizer.
        updates (`int`, *optional*, defaults to 14): Of each rate; seven rates in all.

    Returns:
        [`LRTest`]: With `suggestion`, `to_text()` and `save_picture(path)`.

    Raises:
        `OptionError`: There are several processes, a mode that splits tensors, or too few updates or batches.

    Example:

    ```python
    found = hf_sai.lr_find(trainer)
    print(found.to_text())
    trainer.args.learning_rate = found.suggestion
    trainer.train()
    ```
    """
    if updates < LEAST_UPDATES:
        raise OptionError(f"updates must be >= {LEAST_UPDATES} but is {updates}; {UPDATES} is the default")
    trials = rehearse(trainer, updates, _trials)
    return LRTest(optim_name(trainer.args), trainer.args.learning_rate, trials)


def _trials(rehearsal: Rehearsal) -> list[Trial]:
    """One for each rate, in the order of the rates."""
    planned = len(rehearsal)
    if planned < LEAST_UPDATES:
        raise OptionError(
            f"a test of learning rates needs the batches of {LEAST_UPDATES} updates but the data has {planned}; give "
            "more data, or a smaller batch"
        )
    warm_up = max(1, round(WARM_UP_SHARE * planned))
    shares = [min((index + 1) / (warm_up + 1), (planned - index) / (planned - warm_up)) for index in range(planned)]
    ceiling = math.inf

    def is_over(losses: list[float]) -> bool:
        return not math.isfinite(losses[-1]) or min(losses[-2:]) > ceiling

    def trial(rate: float) -> Trial:
        losses = rehearsal.run([rate * share for share in shares], is_over)
        if is_over(losses):
            losses = losses[: planned - 1]
        return Trial(rate, losses, planned)

    trials = [trial(DECADES[0])]
    ceiling = 3 * max(abs(loss) for loss in trials[0].losses)
    trials += [trial(rate) for rate in DECADES[1:]]
    best = min(trials, key=lambda each: each.score)
    if best.last:
        trials += [trial(best.learning_rate * factor) for factor in (0.3, 3.0)]
    return sorted(trials, key=lambda each: each.learning_rate)


def _lowest(points: Sequence[tuple[float, float]]) -> float:
    """Where the parabola through three points is lowest; the middle point's place where it opens downwards."""
    (a, fa), (b, fb), (c, fc) = points
    left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
    return b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right) if left != right else b
