"""The rows of the benchmark: the networks that it trains, in which order, and what the table says of them.

The key of a row is a name of `ROWS`, or "name@limit" with a budget ("20pct" for 20%).
"""

from dataclasses import dataclass, replace

NNUNET = ("--model", "nnunet")
SAURON = "sauron"
REFERENCE = "nnunet"  # what the p-values and percentages compare with
HALF = "nnunet-half"  # trained for half of the epochs, to be pruned and fine-tuned in the other half
WITHOUT_BUDGET = "sauron-lambda0"  # the row that --budgets leave out


@dataclass(frozen=True)
class Row:
    """A network of the table."""

    title: str  # {budget} and {at} stand for its budget
    label: str  # in the figure
    flags: tuple[str, ...] = ()  # of train.py
    needs: tuple[str, ...] = ()  # the rows that are trained before it: the Sauron that it resembles, and what is pruned


LIKE_SAURON = NNUNET, (SAURON,)
ROWS = {  # in the order of the table, in which each row finds what it needs
    SAURON: Row("Sauron{budget}", "Sauron"),
    WITHOUT_BUDGET: Row("Sauron (lambda = 0)", "Sauron (lambda = 0)", ("--lambda", "0")),
    "sauron-random": Row("random filters{at}, otherwise Sauron", "random filters", ("--imp_fun", "random")),
    REFERENCE: Row("nnUNet", "nnUNet, unpruned", NNUNET),
    "nnunet-widths": Row("nnUNet of Sauron's widths{at}, from scratch", "Sauron's widths, from scratch", *LIKE_SAURON),
    "nnunet-flat": Row("flat U-Net of Sauron's FLOPs{at}, from scratch", "flat U-Net, from scratch", *LIKE_SAURON),
    "nnunet-pruned": Row(
        "nnUNet, torch-pruning to Sauron's FLOPs{at}, fine-tuned", "torch-pruning, fine-tuned", NNUNET, (SAURON, HALF)
    ),
}
KINDS = ROWS | {HALF: Row("nnUNet, half of the epochs", "", NNUNET)}
NOTES = {  # "" is about the whole table, the others about their rows
    "": """
{data}: {subjects} {partition} images of {patients} patients. Every row is trained for {epochs} epochs in all, so for as
many optimizer steps; the learning rate falls from {lr:g} to 0 as (1 - e / epochs)^0.9. Means over the seeds (with
--folds, each on a fold of its own), ± standard deviation where there are several. Percentages refer to {reference}.
HD95 averages over the images that have one. FLOPs are torch's count for one patch of {patch}. p: Wilcoxon signed-rank
test against {reference} over the patients: the mean foreground Dice of each one's images, averaged over the seeds that
both rows have. The difference of the mean foreground Dice is that to {reference}, of the same seeds and paired by
patient too: the mean over the seeds of the mean over their patients, with a {level}% interval of a two-level bootstrap
({resamples:,} resamples, percentiles): seeds are drawn with replacement, and so are the patients, the same for all
seeds of one fold. With one seed the interval is over its patients alone, and does not say what another seed would give.
Over few seeds it is too narrow. Training is the time of the epochs with their validation, without Sauron's deletions in
between.
""",
    SAURON: """
Sauron: pruned while it trains. Where it has a budget, it trains on with the segmentation loss alone once it fits, and
the learning rate falls from {lr:g} to 0 once more.
""",
    "sauron-lambda0": "Sauron (lambda = 0): as Sauron, but without the distance term of the loss.",
    "sauron-random": """
random filters: as Sauron, with the same loss, schedule and budget, but each time the values of delta_prune are dealt
to the filters of their block at random: as many go as by these values, and chance says which.
""",
    "nnunet-widths": """
nnUNet of Sauron's widths: new weights in a network of the widths that Sauron of the same seed ends with. Sauron's
training is not in its time.
""",
    "nnunet-flat": """
flat U-Net: new weights in a network whose blocks, but for the heads, all have one width: the one whose FLOPs are
nearest to those that Sauron of the same seed ends with (compare Lean U-Net, arXiv 2512.03834). Sauron's training is
not in its time.
""",
    "nnunet-pruned": """
torch-pruning: an nnUNet is trained for {half} of the {epochs} epochs, pruned, and fine-tuned for the other {rest} on
other patches, with a new optimizer; the learning rate falls from {lr:g} to 0 in either training. Its time is that of
both and of the pruning; Sauron's training is not in it. The number of filters is the one whose FLOPs are nearest to
those that Sauron of the same seed ends with; magnitude importance (squared L2 norm, averaged over the layers of a
group, divided by its mean), global ranking, at least one filter per block, heads kept.
""",
}


def kind_of(key: str) -> str:
    """The name of ROWS, or HALF, in a row's key."""
    return key.partition("@")[0]


def row_of(key: str) -> Row:
    """The row of a key, with its budget in title, flags and needs."""
    kind, _, budget = key.partition("@")
    row = KINDS[kind]
    if not budget:
        return replace(row, title=row.title.format(budget="", at=""))
    limit = budget.replace("pct", "%")
    return replace(
        row,
        title=row.title.format(budget=f", budget {limit}", at=f" ({limit})"),
        flags=row.flags if row.flags == NNUNET else ("--max_flops", limit, *row.flags),
        needs=tuple(need if need == HALF else f"{need}@{budget}" for need in row.needs),
    )


def rows_to_train(kinds: tuple[str, ...], budgets: list[str]) -> tuple[str, ...]:
    """The keys of the rows of these kinds, of the reference and of all that they need, in an order in which each finds
    what it needs."""
    *others, last = ROWS
    keys = [*others, HALF, last]
    if budgets:
        limits = dict.fromkeys(budget.replace("%", "pct") for budget in budgets)
        limited = [kind for kind in ROWS if kind not in (REFERENCE, WITHOUT_BUDGET)]
        keys = [REFERENCE, HALF, *(f"{kind}@{limit}" for limit in limits for kind in limited)]
    wanted = {REFERENCE, *(key for key in keys if kind_of(key) in kinds)}
    wanted |= {need for key in wanted for need in row_of(key).needs}
    return tuple(key for key in keys if key in wanted)
