"""The idea of the paper in one picture: `python -m lib.experiments.idea [--output .readme/idea.png]`.

All that is drawn is computed here by the project's own code: the feature maps of one slice of the phantom, their
delta_prune, and the widths after some epochs of pruning. Only the redundancy is made, not trained: the network is an
untrained one whose filters are noisy copies of a few, as training with delta_opt in the loss would let them become.
"""

import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lib.data.images import read_image
from lib.data.phantom import write_phantom
from lib.experiments.figures import STYLE, make_output, new_figure, save_figure
from lib.models import Sauron
from lib.models.size import summary
from lib.pruning.selection import deletable, kept
from lib.pruning.surgery import prune
from lib.system.cli import Parser, run_script

TAU, EPOCHS, COPIES, SIZE = 0.3, 20, 4, 64
GONE, CHOSEN, STAYS, BEFORE = "#D55E00", "#0072B2", "#009E73", "#CCCCCC"  # Okabe and Ito's colours; grey


def main(argv: list[str] | None = None) -> int:
    """Draw the picture. Returns 0; 2 where it cannot be written."""
    parser = Parser("python -m lib.experiments.idea", description="The idea of the paper in one picture.")
    default = Path(".readme/idea.png")
    parser.add_argument("--output", type=Path, default=default, help="the picture (default: %(default)s)")
    return run_script(lambda: draw(parser.parse_args(argv).output))


def draw(output: Path) -> None:
    """Write the picture to `output` (PNG). Raises InputError if it cannot be written."""
    with torch.random.fork_rng(devices=[]), matplotlib.rc_context(STYLE):
        torch.manual_seed(0)
        make_output(output.parent)
        save_figure(_figure(_redundant_network(), _slice()), output, dpi=150)


def _slice() -> Tensor:
    """The middle slice of a phantom, (1, 1, SIZE, SIZE), z-scored."""
    with tempfile.TemporaryDirectory() as folder:
        write_phantom(Path(folder) / "phantom", n_patients=1)
        image = read_image(next(Path(folder).rglob("*_frame01.nii.gz"))).array
    x, y, z = ((n - size) // 2 for n, size in zip(image.shape, (SIZE, SIZE, 1), strict=True))
    image = torch.tensor(image[x : x + SIZE, y : y + SIZE, z], dtype=torch.float32)
    return ((image - image.mean()) / image.std(correction=0))[None, None]


def _redundant_network() -> Sauron:
    """An untrained network; each block's filters are noisy copies of a quarter of them, some noisier than others."""
    network = Sauron(modalities=1, n_classes=4, fms_init=16, levels=4).eval()
    network.initialize()
    for block in network.blocks():
        if not block.head:
            weight = block.conv.weight.data.movedim(1 if block.transposed else 0, 0)
            n = len(weight)
            noise = torch.rand(n).view(n, *[1] * (weight.ndim - 1)) * torch.randn_like(weight) * weight.std()
            weight.copy_(weight[torch.arange(n) % (n // COPIES)] + 0.5 * noise)
    return network


@torch.no_grad()
def _figure(network: Sauron, image: Tensor) -> Figure:
    """image (1, 1, H, W). The network is pruned on the way."""
    h = network.forward_saveFMs(image)["enc_ConvBlock_1"][0]
    table = [block for block in network.blocks() if not block.head]
    before, costs = [block.out_filters for block in table], [summary(network, (SIZE, SIZE))["flops"]]
    for epoch in range(EPOCHS):
        delta_prune = network(image, delta_prune=True).delta_prune
        if epoch == 0:
            delta, r = delta_prune["enc_ConvBlock_1"]
        keep = {name: kept(len(d), deletable(d, r_, TAU, at_least=1)) for name, (d, r_) in delta_prune.items()}
        prune(network, None, keep)
    table = [block for block in network.blocks() if not block.head]
    after = [block.out_filters for block in table]
    costs.append(summary(network, (SIZE, SIZE))["flops"])

    order = delta.argsort().tolist()
    colours = [CHOSEN if c == r else GONE if delta[c] < TAU else STAYS for c in order]
    n_gone = colours.count(GONE)
    figure = new_figure(9, 3.1)
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1, 1.2, 1.2), wspace=0.04)
    left.suptitle("1  Feature maps of a layer", fontsize=10, fontweight="bold")
    for axis, c, colour in zip(left.subplots(4, 4).flat, order, colours, strict=True):
        axis.imshow(h[c].T, cmap="gray", origin="lower", interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(color=colour, linewidth=2.5)
        if colour == GONE:
            axis.plot([0, 1], [0, 1], [0, 1], [1, 0], color=GONE, linewidth=2.5, transform=axis.transAxes)

    axis = middle.subplots()
    axis.set_title("2  Distance to a random one, r")
    axis.bar(range(len(order)), delta[order].tolist(), width=1, color=colours, edgecolor="white")
    axis.axhline(TAU, color="black", linestyle="--", linewidth=1)
    axis.text(1.01, TAU, rf"$\tau$ = {TAU}", va="center", transform=axis.get_yaxis_transform())
    for x, y, text, colour in (
        (-0.3, 0.02, "r", CHOSEN),
        (-1.3, delta[order[n_gone]] + 0.02, "delete", GONE),
        (0.5 * len(order), TAU / 2, "keep", "white"),
    ):
        axis.text(x, y, text, color=colour, fontsize=8, fontweight="bold")
    axis.set(
        xlabel="the same maps, nearest first", ylabel=r"$\delta_{prune}$", xticks=[], xlim=(-1.4, len(order) - 0.5)
    )
    axis.spines[["top", "right"]].set_visible(False)

    axis = right.subplots()
    axis.set_title(f"3  Slimmer: after {EPOCHS} such epochs")
    for widths, colour, label in ((before, BEFORE, "filters deleted"), (after, STAYS, "filters left")):
        axis.bar(range(len(widths)), widths, bottom=-np.array(widths) / 2, color=colour, label=label)
    axis.legend(frameon=False)
    left_over = f"{len(before)} layers of a toy U-Net: {costs[1] / costs[0]:.0%} of its FLOPs left"
    axis.set(xlabel=left_over, xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
