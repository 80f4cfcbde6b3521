"""What the feature maps of a trained network show (paper section 4.3).

`python -m lib.experiments.feature_maps --run RUN` draws, for every block, the image, the truth, the prediction and all
feature maps that pruning left, ordered by how well a threshold turns them into one of the classes; the same numbers
are in feature_maps.json, and agreement.png shows the best map of every block and class.
"""

import argparse
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torchio as tio
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from lib.data import patches
from lib.data.loading import Loader
from lib.experiments.figures import STYLE, class_colours, make_output, new_figure, save_figure
from lib.experiments.run import Run
from lib.models import Sauron, architecture
from lib.models.BaseModel import read_state
from lib.system.cli import Parser, number, run_script
from lib.system.error import InputError
from lib.system.files import write_json
from lib.system.process import check_stopped


def load_sauron(path: Path) -> Sauron:
    """A saved model in eval mode on the CPU, by the published interface. Raises InputError if the file is none."""
    model = Sauron(**architecture(read_state(path), path))
    model.initialize(device="cpu", model_state=path, isSauron=True)
    return model.eval()


def find_subject(data: Loader, wanted: str | None) -> tio.Subject:
    """The subject of this id, or else the first test subject with a ground truth, or the first validation subject.

    Raises InputError if there is none, or it has no ground truth.
    """
    partitions = ("test", "validation", "train") if wanted else ("test", "validation")
    for partition in partitions:
        for index, file in enumerate(data.files(partition)):
            if file.id == wanted or (wanted is None and file.label):
                if file.label is None:
                    raise InputError(f"--subject {wanted}: has no ground truth beside {file.image}; name another one")
                return data.get(partition)[index]
    if wanted is None:
        raise InputError(
            f"--data {data.dataset.name}: no test or validation subject has a ground truth; name a --subject"
        )
    example = next((file.id for p in partitions for file in data.files(p) if file.label), "none")
    raise InputError(f"--subject {wanted}: is not in {data.dataset.name}; ids are such as {example}")


def cut_patch(subject: tio.Subject, patch_size: tuple[int, ...], wanted: int | None) -> tuple[Tensor, Tensor, int, int]:
    """(image (1, C, *patch), labels (*patch) int64, slice of the volume, its place in a 3D patch, else 0).

    2D: this slice along the last axis. 3D: slices are along the first axis, and the patch is the one that has it as
    near its middle as possible and holds most of its foreground; of several, the most central one. By default it is
    the slice with most foreground.
    Raises InputError if there is no slice `wanted`.
    """
    flat = len(patch_size) == 2
    image, label = (patches.fit(subject[key].data, patch_size) for key in ("image", "label"))
    axis = 2 if flat else 0
    foreground = (label[0] > 0).movedim(axis, 0).flatten(1).sum(1)
    k = int(foreground.argmax()) if wanted is None else wanted
    if k >= len(foreground):
        raise InputError(f"--slice {k}: {subject['id']} has the slices 0 to {len(foreground) - 1}")
    if flat:
        start = (0, 0, k)
    else:
        size = torch.tensor(patch_size[1:])
        share = F.avg_pool2d((label[:, k] > 0).double(), patch_size[1:], stride=1)[0]  # by start of the patch
        best = (share > share.max() - 0.5 / size.prod()).nonzero()
        off_centre = (2 * best + size - torch.tensor(label.shape[2:])).square().sum(1)
        depth = min(max(k - patch_size[0] // 2, 0), len(foreground) - patch_size[0])
        start = (depth, *best[off_centre.argmin()].tolist())
    image, label = (patches.cut(volume, patch_size, [start]) for volume in (image, label[0]))
    return image, label[0].long(), k, k - start[axis]


def agreement(maps: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """(C, *spatial), labels (*size) -> (C, n_classes): the best Dice of each map, thresholded, with each class.

    The mask is what lies above, or what lies below, a threshold; of all thresholds the best one counts. A mask of
    fewer voxels than `labels` is compared at their size: each of its voxels stands for the labels that it covers. A
    class that is not there has Dice 0.
    """
    truth = F.one_hot(labels, n_classes).movedim(-1, 0).float()[None]  # (1, K, *size)
    pool = F.adaptive_avg_pool2d if labels.ndim == 2 else F.adaptive_avg_pool3d
    truth = pool(truth, maps.shape[1:])[0].flatten(1).double()  # (K, N): the share of each class
    size = torch.arange(1, truth.shape[1] + 1)
    best = torch.zeros(len(maps), n_classes)
    for c, values in enumerate(maps.flatten(1)):
        for descending in (True, False):
            ordered, index = values.sort(descending=descending)
            separable = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool)])
            both = truth[:, index].cumsum(1)[:, separable]  # (K, thresholds)
            dice = 2 * both / (size[separable] + truth.sum(1, keepdim=True))
            best[c] = torch.maximum(best[c], dice.amax(1).float())
    return best


def ranking(dice: Tensor) -> list[tuple[int, int]]:
    """(C, n_classes) -> (map, class) of all maps: each with the foreground class that it agrees with best, the maps
    of a class together, best first."""
    classes = dice[:, 1:].argmax(1) + 1
    return sorted(enumerate(classes.tolist()), key=lambda pair: (pair[1], -dice[pair].item()))


def picture(volume: Tensor, place: int, depth: int) -> np.ndarray:
    """The 2D array to draw with imshow: (X, Y) transposed, or in 3D the slice that lies where `place` of `depth` is."""
    if volume.ndim == 2:
        return volume.T.numpy()
    return volume[place * len(volume) // depth].numpy()


def draw_block(
    name: str, maps: list[np.ndarray], dice: Tensor, inputs: dict[str, np.ndarray], names: tuple[str, ...], title: str
) -> Figure:
    """One block: `inputs` (image, truth, prediction as 2D arrays) above all its maps in the order of `ranking`."""
    order = ranking(dice)
    groups = {k: [pair for pair in order if pair[1] == k] for k in range(1, len(names))}
    groups = {k: group for k, group in groups.items() if group}
    columns = max(6, math.ceil(math.sqrt(1.8 * len(order))))
    cell = max(0.55, min(1.1, 11 / columns))  # inches
    ratio = maps[0].shape[0] / maps[0].shape[1]
    step = ratio + 0.22 / cell  # a map and the line above it
    heights = [math.ceil(len(group) / columns) * step * cell + 0.35 for group in groups.values()]
    figure = new_figure(max(7, columns * cell + 0.3), 2.6 + sum(heights))
    figure.suptitle(f"{name}: {len(order)} feature maps of {title}", fontweight="bold")
    top, below = figure.subfigures(2, 1, height_ratios=[2.2, sum(heights)])

    colours = matplotlib.colors.ListedColormap(["black", *class_colours(len(names))])
    axes = top.subplots(1, 4)
    for axis, (text, array) in zip(axes, inputs.items(), strict=False):
        labels = {} if text == "image" else {"vmin": 0, "vmax": len(names) - 1}
        axis.imshow(array, cmap=colours if labels else "gray", interpolation="nearest", **labels)
        axis.set_title(text)
    handles = [matplotlib.patches.Patch(color=colours(k), label=names[k]) for k in range(1, len(names))]
    axes[3].legend(handles=handles, loc="center left", frameon=False)

    for axis, (k, group) in zip(
        below.subplots(len(groups), 1, height_ratios=heights, squeeze=False).flat, groups.items(), strict=True
    ):
        axis.set_title(f"nearest to {names[k]}: number of the map, Dice", color=colours(k), fontsize=9, loc="left")
        for i, pair in enumerate(group):
            x, y = i % columns, i // columns * step + 0.2 / cell
            extent = (x + 0.03, x + 0.97, y + 0.94 * ratio, y)
            axis.imshow(maps[pair[0]], cmap="gray", interpolation="nearest", extent=extent)
            axis.text(x + 0.5, y - 0.02, f"{pair[0] + 1}: {dice[pair]:.2f}", ha="center", va="bottom", fontsize=7)
        axis.set(xlim=(0, columns), ylim=(math.ceil(len(group) / columns) * step, 0), anchor="NW")
    for axis in figure.findobj(Axes):
        axis.set_axis_off()
    return figure


def draw_agreement(best: dict[str, Tensor], names: tuple[str, ...], title: str) -> Figure:
    """Blocks x foreground classes: the Dice of the block's best map, from {block: (n_classes,)}."""
    values = torch.stack(list(best.values()))[:, 1:].numpy()
    figure = new_figure(2.6 + 1.1 * values.shape[1], 1.3 + 0.27 * len(best))
    axis = figure.subplots()
    image = axis.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (i, k), value in np.ndenumerate(values):
        axis.text(k, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="black" if value > 0.6 else "white")
    axis.set_xticks(range(len(names) - 1), labels=names[1:])
    axis.set_yticks(range(len(best)), labels=list(best), fontsize=8)
    axis.set_title(f"Best map of each block\n{title}", fontsize=9)
    figure.colorbar(image, ax=axis, label="Dice of the thresholded map")
    return figure


@torch.no_grad()
def feature_maps(args: argparse.Namespace) -> None:
    """Draw what `args` asks for. Raises InputError where run, subject or slice are not there."""
    run = Run(args.run)
    path = run.newest_model
    model = load_sauron(path)
    data = run.data(args.data_path, args.cache_path)
    subject, class_names = find_subject(data, args.subject), data.dataset.class_names
    image, labels, k, place = cut_patch(subject, data.patch_size, args.slice)
    found = {name: maps[0] for name, maps in model.forward_saveFMs(image).items()}
    prediction = list(found.values())[-1].argmax(0)
    shown = {"image": image[0, 0], "truth": labels, "prediction": prediction}
    inputs = {key: picture(value, place, len(labels)) for key, value in shown.items()}
    absent = [name for c, name in enumerate(class_names) if not (labels == c).any()]
    title = f"{subject['id']}, slice {k}" + (f"\n(without {', '.join(absent)})" if absent else "")

    output = make_output(args.output or args.run / "feature_maps")
    best, content = {}, {}
    with matplotlib.rc_context(STYLE):
        for name in run.widths:
            maps = found[name]
            dice = agreement(maps, labels, data.dataset.n_classes)
            best[name] = dice.amax(0)
            content[name] = [
                {
                    "map": c + 1,
                    "class": class_names[label],
                    "dice": dict(zip(class_names, dice[c].tolist(), strict=True)),
                }
                for c, label in ranking(dice)
            ]
            arrays = [picture(h, place, len(labels)) for h in maps]
            save_figure(draw_block(name, arrays, dice, inputs, class_names, title), output / f"{name}.png")
            check_stopped()
        save_figure(draw_agreement(best, class_names, title), output / "agreement.png")
    facts = {"model": str(path), "subject": subject["id"], "slice": k}
    write_json(output / "feature_maps.json", facts | {"blocks": content})
    for name, values in best.items():
        numbers = ", ".join(f"{c} {v:.2f}" for c, v in zip(class_names[1:], values[1:].tolist(), strict=True))
        print(f"{name:<22} {len(content[name]):>3} maps, best Dice: {numbers}")
    print(f"written to {output}")


def main(argv: list[str] | None = None) -> int:
    """Draw as `argv` says; returns the exit code: 0, or 2 after one line about bad input."""
    parser = Parser(
        "python -m lib.experiments.feature_maps",
        description="What the feature maps of a trained network show, as figures.",
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, help="run folder; its newest model is taken (required)")
    add("--subject", help="id of a subject (default: the first of the test set with ground truth, else of validation)")
    add("--slice", type=number(int, 0), help="slice of the preprocessed volume, from 0 (default: most foreground)")
    add("--output", type=Path, help="folder of the figures (default: RUN/feature_maps)")
    add("--data_path", help="folder of the data set (default: that of the training)")
    add("--cache_path", help="folder for preprocessed volumes (default: that of the training)")
    return run_script(lambda: feature_maps(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
