"""When a network is pruned, and which filters go: three rules with the same few methods (paper section 3.3).

Where does tau rise? In `raise_threshold` for the paper's rule, block by block, as training settles; in `budget_tau` on
the way to a budget.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch
from torch import Tensor

from lib.models.nnUNet import nnUNet
from lib.models.size import milliseconds, resized, summary
from lib.pruning.selection import deletable, fewest_filters, fewest_that_fit, kept, next_group, ranking
from lib.system import distributed
from lib.system.device import device_of

FIRST_TAU = 0.001
SHARE_STEP = 0.05  # of a block's filters
Measured = dict[str, tuple[Tensor, int]]  # delta_prune by block: (C,) in [0, 1], and the reference r


@dataclass
class Threshold:
    """A block's threshold, and what it must remember to raise it."""

    step: float = 0  # tau is the step-th of kappa + 1 equidistant values (a published run's may lie between two)
    patience: int = 0
    lost: int = 0  # filters that went at the end of the epoch before ...
    filters_before: int = 1  # ... of so many


def tau(threshold: Threshold, tau_max: float, kappa: int) -> float:
    """The step-th value of linspace(0.001, tau_max, kappa + 1)."""
    return FIRST_TAU + (tau_max - FIRST_TAU) * threshold.step / kappa


def step_of(value: float, tau_max: float, kappa: int) -> float:
    """The step at which a threshold has this value: a whole one if it is among the kappa + 1 values."""
    step = (value - FIRST_TAU) / (tau_max - FIRST_TAU) * kappa if tau_max > FIRST_TAU else 0.0
    return round(step) if abs(step - round(step)) < 1e-6 else step


def training_settled(train_losses: list[float], validation_losses: list[float] | None, rho: int) -> bool:
    """The two conditions on the losses (oldest first); without a validation set (None) only the first one."""
    if len(train_losses) < rho + 1 or (validation_losses is not None and len(validation_losses) < rho + 1):
        return False
    *_, newest = train_losses
    window = train_losses[-rho - 1 : -1]
    if not min(window) <= newest <= max(window):
        return False
    return validation_losses is None or validation_losses[-1] >= min(validation_losses[:-1])


def raise_threshold(threshold: Threshold, settled: bool, kappa: int, rho: int, mu: float) -> None:
    """One epoch's step of a block's threshold: count patience down, or take the next value."""
    if threshold.patience > 0:
        threshold.patience -= 1
    elif settled and threshold.lost < math.ceil(mu * threshold.filters_before) and threshold.step < kappa:
        threshold.step = math.floor(threshold.step) + 1
        threshold.patience = rho


def budget_tau(epoch: int, between: tuple[float, float]) -> float:
    """The threshold of all blocks on the way to a budget: from 0.001 at the first of the two moments (in epochs) it
    climbs at an even pace to 1, the largest delta_prune, at the second one."""
    first, last = between
    return FIRST_TAU + (1 - FIRST_TAU) * min(max((epoch - first) / (last - first), 0.0), 1.0)


@dataclass(frozen=True)
class Bounds:
    """What keeps a rule from deleting too much: nothing goes but after the epochs `between` (first excluded, last
    included), a block keeps `min_filters` (see `fewest_filters`) and loses at most `max_prune_fraction`, or else one
    filter, in an epoch. Filters go in groups that leave a block a multiple of `multiple`."""

    between: tuple[float, float]
    min_filters: int = 2
    max_prune_fraction: float = 1.0
    multiple: int = 1

    def allow(self, epoch: int) -> bool:
        return self.between[0] < epoch <= self.between[1]

    def deletable(self, measured: tuple[Tensor, int], threshold: float, least: int) -> list[int]:
        """The filters of a block that may go at the end of an epoch, of which `least` must stay."""
        return deletable(*measured, threshold, least, self.max_prune_fraction, self.multiple)


class Rule:
    """Nothing is pruned. What the other rules share with this one:

    measures: whether the last batch of an epoch is to measure delta_prune. done: the epoch at whose end pruning was
    over for good, 0 until then. notes: lines for the log about the newest epoch.
    """

    measures = False
    done = 0
    notes: tuple[str, ...] = ()

    def choose(self, epoch: int, model: nnUNet, rows: list[dict], measured: Measured) -> dict[str, Tensor]:
        """At the end of an epoch, the newest of `rows` of the history: the filters that stay, of the blocks that lose
        some."""
        return {}

    def row(self) -> dict:
        """What the history says of the rule after this epoch."""
        return {}

    def state_dict(self) -> dict:
        """What must be saved beside the history."""
        return {}

    def load_state_dict(self, saved: dict, rows: list[dict]) -> None:
        """Go on after the newest of `rows`, with what `state_dict` gave then."""

    def take_over(self, taus: dict[str, float], patiences: dict[str, int], widths: list[dict[str, int]]) -> None:
        """Go on after an epoch of the published code: thresholds and patiences then, and filters by block before and
        after it (or after it alone)."""


class PaperRule(Rule):
    """Each block has a threshold, which rises where training has settled; the filters below it go (paper section 3.3).

    tau_max, kappa, rho, mu: as in the paper. validates: whether there is a validation loss to look at, too.
    """

    measures = True

    def __init__(self, tau_max: float, kappa: int, rho: int, mu: float, bounds: Bounds, validates: bool = True):
        self.tau_max, self.kappa, self.rho, self.mu = tau_max, kappa, rho, mu
        self.bounds, self.validates = bounds, validates
        self.thresholds: dict[str, Threshold] = {}

    def choose(self, epoch: int, model: nnUNet, rows: list[dict], measured: Measured) -> dict[str, Tensor]:
        validated = [row["val_loss"] for row in rows if row["val_loss"] is not None]
        settled = training_settled([row["train_loss"] for row in rows], validated if self.validates else None, self.rho)
        stays = {}
        for name, least in fewest_filters(model, self.bounds.min_filters).items():
            threshold = self.thresholds.setdefault(name, Threshold())
            if not self.bounds.allow(epoch):
                continue
            raise_threshold(threshold, settled, self.kappa, self.rho, self.mu)
            n, gone = len(measured[name][0]), self.bounds.deletable(measured[name], self._tau(name), least)
            threshold.lost, threshold.filters_before = len(gone), n
            if gone:
                stays[name] = kept(n, gone)
        return stays

    def _tau(self, name: str) -> float:
        return tau(self.thresholds[name], self.tau_max, self.kappa)

    def row(self) -> dict:
        patience = {name: threshold.patience for name, threshold in self.thresholds.items()}
        return {"tau": {name: self._tau(name) for name in self.thresholds}, "patience": patience}

    def state_dict(self) -> dict:
        return {name: asdict(threshold) for name, threshold in self.thresholds.items()}

    def load_state_dict(self, saved: dict, rows: list[dict]) -> None:
        self.thresholds = {name: Threshold(**values) for name, values in saved.items()}

    def take_over(self, taus: dict[str, float], patiences: dict[str, int], widths: list[dict[str, int]]) -> None:
        before, now = widths[-2:][0], widths[-1]
        for name, value in taus.items():
            step = step_of(value, self.tau_max, self.kappa)
            self.thresholds[name] = Threshold(step, patiences[name], before[name] - now[name], before[name])


class BudgetRule(Rule):
    """One threshold for all blocks climbs at an even pace, and the filters below it go. Pruning stops for good once the
    network fits, and at the latest after the last epoch of `bounds.between`, whether it fits or not. An epoch deletes
    those of the smallest delta_prune, and no more than needed to fit. The last one may take a larger share of a block
    than the bounds say: the smallest in steps of SHARE_STEP with which the network fits, or all if it never does.

    max_flops: of one patch; max_ms: milliseconds for one patch on the model's device; None: no such limit.
    unpruned_flops: of the network before any filter went, for the log.
    """

    measures = True

    def __init__(
        self,
        max_flops: float | None,
        max_ms: float | None,
        bounds: Bounds,
        patch_size: tuple[int, ...],
        unpruned_flops: int,
    ):
        self.max_flops, self.max_ms, self.bounds = max_flops, max_ms, bounds
        self.patch_size, self.unpruned_flops = patch_size, unpruned_flops
        self.taus: dict[str, float | None] = {}
        self.ms: float | None = None
        self.met = False

    def choose(self, epoch: int, model: nnUNet, rows: list[dict], measured: Measured) -> dict[str, Tensor]:
        self.notes, self.ms = (), None
        fewest = fewest_filters(model, self.bounds.min_filters)
        climbs = self.bounds.allow(epoch) and not self.done
        if climbs or len(rows) == 1:
            self.taus = dict.fromkeys(fewest, budget_tau(epoch, self.bounds.between))
        if not climbs:
            if not self.done and self._is_late(epoch):
                self.notes = (f"budget not met: --prune_between ended before epoch {epoch}; nothing more is pruned",)
            self._end(epoch)
            return {}
        widths = {block.name: block.out_filters for block in model.blocks() if not block.head}
        size = self._measuring(model)

        def fits(widths: dict[str, int]) -> bool:
            return self._fits(size(widths))

        candidates, share = self._candidates(epoch, fewest, measured, fits)
        gone = fewest_that_fit(ranking(candidates, measured, self.bounds.multiple), widths, fits, self.bounds.multiple)
        lost = {name: [c for other, c in gone if other == name] for name in {name for name, _ in gone}}
        stays = {name: kept(widths[name], filters) for name, filters in lost.items()}
        left = widths | {name: len(indices) for name, indices in stays.items()}
        at_the_floor = all(n - next_group(n, self.bounds.multiple) < fewest[name] for name, n in left.items())
        self._conclude(epoch, size(left), at_the_floor)
        if self.met and share > self.bounds.max_prune_fraction:
            self.notes += (
                f"epoch {epoch}, the last that prunes, was let take {100 * share:.0f}% of a block, not "
                f"{100 * self.bounds.max_prune_fraction:.0f}% as --max_prune_fraction says; a later end of "
                "--prune_between, or more --epochs, spreads it",
            )
        self._end(epoch)
        return stays

    def _candidates(
        self, epoch: int, fewest: dict[str, int], measured: Measured, fits: Callable[[dict[str, int]], bool]
    ) -> tuple[dict[str, list[int]], float]:
        """The filters of each block that may go, and the share of a block that they may be."""
        share, threshold = self.bounds.max_prune_fraction, budget_tau(epoch, self.bounds.between)
        while True:
            bounds = replace(self.bounds, max_prune_fraction=share)
            gone = {name: bounds.deletable(measured[name], threshold, least) for name, least in fewest.items()}
            if share >= 1 or not self._is_late(epoch):
                return gone, share
            if fits({name: len(measured[name][0]) - len(filters) for name, filters in gone.items()}):
                return gone, share
            share = min(1.0, share + SHARE_STEP)

    def _end(self, epoch: int) -> None:
        """Note that pruning is over, if it is."""
        if not self.done and (self.met or self._is_late(epoch)):
            self.done = epoch

    def _is_late(self, epoch: int) -> bool:
        """Whether no later epoch prunes."""
        return epoch + 1 > self.bounds.between[1]

    def _measuring(self, model: nnUNet) -> Callable[[dict[str, int]], dict[str, float]]:
        """A function from widths to {"flops", "ms"}. It measures each network once: a second look at the clock might
        decide otherwise."""
        device = device_of(model)

        @cache
        def measured(widths: tuple[tuple[str, int], ...]) -> dict[str, float]:
            flops, ms = summary(resized(model, dict(widths)), self.patch_size)["flops"], None
            if self.max_ms and distributed.is_main():
                ms = milliseconds(resized(model, dict(widths), device), self.patch_size)
            return {"flops": flops, "ms": distributed.broadcast_from_main(ms) if self.max_ms else None}

        return lambda widths: measured(tuple(widths.items()))

    def _fits(self, size: dict[str, float]) -> bool:
        return not (self.max_flops and size["flops"] > self.max_flops) and not (
            self.max_ms and size["ms"] > self.max_ms
        )

    def _conclude(self, epoch: int, size: dict[str, float], at_the_floor: bool) -> None:
        """Note whether the network of this size fits, and what the log is to say."""
        self.ms = size["ms"]
        text = f"{size['flops']:,} FLOPs ({100 * size['flops'] / self.unpruned_flops:.1f}%)"
        text += f", {size['ms']:.2f} ms per patch" if self.max_ms else ""
        if self._fits(size):
            self.met = True
            self.notes = (f"budget met after epoch {epoch}: {text}; nothing more is pruned",)
        elif self._is_late(epoch):
            least, multiple = self.bounds.min_filters, self.bounds.multiple
            reason = (
                f"every block has as few filters as --min_filters {least} allows"
                + f" with --width_multiple {multiple}" * (multiple > 1)
                + " (those that feed a head: at least the number of classes)" * (least > 1)
                if at_the_floor
                else "--prune_between ended before the thresholds let enough go"
            )
            self.notes = (
                f"budget not met: {text} after epoch {epoch}, the last that prunes; {reason}",
                "the training goes on with this network as if the budget were met",
            )

    def row(self) -> dict:
        return {"budget_met": self.met, "pruning_over": self.done > 0, "ms": self.ms, "tau": self.taus}

    def load_state_dict(self, saved: dict, rows: list[dict]) -> None:
        self.met = any(row.get("budget_met") for row in rows)
        over = (row["epoch"] for row in rows if row.get("pruning_over", row.get("budget_met")))
        self.done = next(over, 0)
        self.taus = rows[-1].get("tau", {}) if rows else {}

    def take_over(self, taus: dict[str, float], patiences: dict[str, int], widths: list[dict[str, int]]) -> None:
        self.taus = taus


class RandomRule(Rule):
    """Another rule, whose values of delta_prune are dealt to the filters of their block at random: as many lie below a
    threshold, but which ones is chance. The order comes from torch's CPU generator."""

    measures = True

    def __init__(self, rule: Rule):
        self.rule = rule

    @property
    def done(self) -> int:
        return self.rule.done

    @property
    def notes(self) -> tuple[str, ...]:
        return self.rule.notes

    def choose(self, epoch: int, model: nnUNet, rows: list[dict], measured: Measured) -> dict[str, Tensor]:
        return self.rule.choose(epoch, model, rows, {name: dealt(*values) for name, values in measured.items()})

    def row(self) -> dict:
        return self.rule.row()

    def state_dict(self) -> dict:
        return self.rule.state_dict()

    def load_state_dict(self, saved: dict, rows: list[dict]) -> None:
        self.rule.load_state_dict(saved, rows)

    def take_over(self, taus: dict[str, float], patiences: dict[str, int], widths: list[dict[str, int]]) -> None:
        self.rule.take_over(taus, patiences, widths)


def dealt(delta: Tensor, r: int) -> tuple[Tensor, int]:
    """The values of delta_prune in a random order, and the filter that got the reference's."""
    order = torch.randperm(len(delta))
    return delta[order.to(delta.device)], order.tolist().index(r)
