"""How clustered the feature maps of each layer are, epoch by epoch (paper section 4.2).

`python -m lib.experiments.clusterability RUN [RUN2]` reads what `train.py --save_fms` saved and writes
clusterability.json, clusterability.md, curves.png and heatmaps.png of RUN, and with RUN2 comparison.png of both.
"""

import sys
from functools import partial
from itertools import starmap
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diptest import diptest
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist, squareform
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from torch.nn import functional as F
from tqdm import tqdm

from lib.distance import SMALLEST_RANGE, euc_norm
from lib.experiments.figures import COLOURS, STYLE, make_output, new_figure, save_figure
from lib.models import nnUNet
from lib.settings import Settings
from lib.system.cli import Parser, run_script
from lib.system.error import InputError
from lib.system.files import write_json, write_text
from lib.system.process import check_stopped

# by key: the title of its panels, what its axis shows, the limits of it, and whether small values mean clustered
MEASURES = {
    "dip": ("Hartigan's dip of the distances", "dip (no unit)", (0, None), False),
    "dip_p": ("p-value of the dip", "p (0 to 1)", (0, 1), True),
    "hopkins": ("Hopkins statistic", "H (0 to 1)", (0, 1), False),
    "silhouette": ("Mean silhouette of the best k", "silhouette (up to 1)", (0, 1), False),
    "clusters": ("Number of clusters", "k", (1, None), False),
    "distance": ("Mean distance to map 1", "distance of maps in [0, 1]", (0, None), True),
}
WHOLE = partial(MaxNLocator, integer=True, min_n_ticks=1)  # ticks at whole numbers only
MOST_CLUSTERS = 8
NO_STRUCTURE = 0.25  # Kaufman and Rousseeuw (1990): a mean silhouette up to this shows no substantial structure
REFERENCES = 5  # draws of points without clusters
LINES = {"dip_p": 0.05, "hopkins": 0.5, "silhouette": NO_STRUCTURE}  # on the other side of these: clusters
LINES_TEXT = f"dotted: p = 0.05; H of evenly spread points; largest silhouette without structure ({NO_STRUCTURE})"
MOST_DISTANCES = 72_000  # the table of the dip's p-values ends here
TEXT = """\
Each map is scaled to [0, 1] and average-pooled by 2, as in `delta_opt`; its distance to another one is the root mean
square of their difference. Layers of fewer than 4 maps have no value but the last.

- **dip**, **dip_p**: Hartigan's dip test on all pairwise distances. A small p-value means several modes: clusters.
- **hopkins**: Hopkins statistic in the plane of the first two principal components: 0.5 for maps spread evenly,
  towards 1 the more clustered, below 0.5 where single maps lie far from all others. One Gaussian cloud has 0.5 with 16
  maps and 0.8 with 128: compare epochs and runs, not layers of different width.
- **silhouette**: mean silhouette of the best k-means clustering of 2 to {most} clusters.
- **clusters**: the k of that clustering; 1 where its silhouette is at most {least}, or where one of {draws} draws of
  evenly spread points of the same extent reaches it, too.
- **distance**: mean distance of the maps to the layer's first map: what the loss term makes small.
"""


def as_points(maps: torch.Tensor, sf: int = 2) -> np.ndarray:
    """(C, *spatial) -> (C, at most C): points whose Euclidean distances are those of `lib.distance.euc_norm`.

    They are the maps' principal components, largest first, rounded to 1e-6 so that equal maps are equal points.
    """
    flat = maps.flatten(1)
    low, spread = flat.amin(1), flat.amax(1) - flat.amin(1)
    column = (..., *[None] * (maps.ndim - 1))
    scale = torch.where(spread > SMALLEST_RANGE, 1 / spread.clamp_min(SMALLEST_RANGE), 0.0)
    pool = F.avg_pool2d if maps.ndim == 3 else F.avg_pool3d
    pooled = pool((maps - low[column]) * scale[column], [min(sf, size) for size in maps.shape[1:]])
    x = pooled.flatten(1).double().numpy()
    u, s, _ = np.linalg.svd((x - x.mean(0)) / np.sqrt(x.shape[1]), full_matrices=False)
    return np.round(u * s, 6)


def hopkins(points: np.ndarray, seed: int = 0, draws: int = 20) -> float:
    """Hopkins statistic H = sum u^d / (sum u^d + sum w^d) of (n, d) points, n > 1.

    u are the distances of random points, uniform in the bounding box, to the nearest of `points`; w are those of each
    of `points` to its nearest neighbour; the sum over u is the mean of `draws` draws of n. 0.5 for uniform points,
    towards 1 for clustered ones; 0.5 where all points are one. Definition with the exponent d: Cross and Jain (1982);
    Wright, "Will the real Hopkins statistic please stand up?", The R Journal 14(3), 2022. They take few of the points,
    to have independent terms for a test; for a description all of them give less noise.
    """
    n, d = points.shape
    tree = cKDTree(points)
    uniform = np.random.default_rng(seed).uniform(points.min(0), points.max(0), (draws * n, d))
    u = (tree.query(uniform)[0] ** d).sum() / draws
    w = (tree.query(points, k=2)[0][:, 1] ** d).sum()
    return float(u / (u + w)) if u + w > 0 else 0.5


def largest_silhouette(points: np.ndarray, n_init: int) -> tuple[float, int]:
    """(mean silhouette, k) of the k-means clustering of the largest one, k from 2 to `MOST_CLUSTERS`; the best of
    `n_init` starts. points (n, d), n > 2; (0, 1) for equal points, and where no clustering is better than 0."""
    found, distances = [(0.0, 1)], squareform(pdist(points))
    for k in range(2, min(MOST_CLUSTERS, len(np.unique(points, axis=0)), len(points) - 1) + 1):
        labels = KMeans(k, n_init=n_init, random_state=0).fit_predict(points)
        found.append((float(silhouette_score(distances, labels, metric="precomputed")), k))
    return max(found, key=lambda pair: pair[0])


def best_clustering(points: np.ndarray) -> tuple[float, int]:
    """`largest_silhouette` of principal components (n, d), n > 2; k is 1 where that silhouette shows no clusters.

    k-means cuts even one cloud into parts, the more so the fewer dimensions it has: 0.45 and four parts for a square.
    So there are clusters only where the silhouette is above that of `REFERENCES` draws of as many points, uniform in
    the bounding box of the principal components (the reference of the gap statistic: Tibshirani, Walther and Hastie,
    2001).
    """
    silhouette, k = largest_silhouette(points, 3)
    if silhouette <= NO_STRUCTURE:
        return silhouette, 1
    rng = np.random.default_rng(0)
    for _ in range(REFERENCES):
        uniform = rng.uniform(points.min(0), points.max(0), points.shape)
        if largest_silhouette(uniform, 1)[0] >= silhouette:
            return silhouette, 1
    return silhouette, k


def measure(maps: np.ndarray) -> dict[str, float | int | None]:
    """All `MEASURES` of one layer's maps (C, *spatial); None where there are too few maps. Deterministic."""
    maps = torch.from_numpy(maps).float()
    found = dict.fromkeys(MEASURES)
    if len(maps) > 1:
        found["distance"] = euc_norm(maps[None]).mean().item()
    if len(maps) > 3:
        points = as_points(maps)
        distances = pdist(points)
        found["hopkins"] = hopkins(points[:, :2])
        found["silhouette"], found["clusters"] = best_clustering(points)
        if len(distances) > MOST_DISTANCES:
            distances = np.random.default_rng(0).choice(distances, MOST_DISTANCES, replace=False)
        found["dip"], found["dip_p"] = diptest(distances)
    return found


def measure_run(run: Path) -> dict:
    """{"run", "label", "layers", "epochs", and by measure a list (layers) of lists (epochs)} of the saved maps.

    Raises InputError if there are none, or a file is broken.
    """
    settings, _ = Settings.read(run)
    epochs = sorted((run / "fms").glob("epoch-*"))
    network = nnUNet(1, 2, 1, settings.levels, dim=settings.dim)  # for the names only
    layers = [block.name for block in network.blocks() if not block.head]
    files = [[epoch / f"{layer}.npy" for epoch in epochs] for layer in layers]
    existing = [path for row in files for path in row if path.exists()]
    if not existing:
        raise InputError(f"{run}: has no feature maps (fms/epoch-E/BLOCK.npy); train with --save_fms")
    found = {}
    for path in tqdm(existing, f"measuring {run}", unit="layer", leave=False):
        found[path] = measure(_read(path))
        check_stopped()
    weight = settings.lambda_ if settings.loss.endswith("_Distance") else 0
    return {
        "run": str(run),
        "label": f"{settings.exp_name}/{run.resolve().name} ($\\lambda$ = {weight:g})",
        "layers": layers,
        "epochs": [int(epoch.name.removeprefix("epoch-")) for epoch in epochs],
        **{key: [[found[path][key] if path in found else None for path in row] for row in files] for key in MEASURES},
    }


def _read(path: Path) -> np.ndarray:
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as feature maps ({error}); delete it, or train anew") from error


def clusterability(runs: list[Path], output: Path | None) -> None:
    """Measure one run, or two to compare, and write tables and figures. Raises InputError where a run has no maps."""
    results = [measure_run(run) for run in runs]
    output = make_output(output or runs[0] / "clusterability")
    write_json(output / "clusterability.json", results)
    write_text(output / "clusterability.md", as_text(results))
    with matplotlib.rc_context(STYLE):
        save_figure(draw_curves(results[0]), output / "curves.png")
        save_figure(draw_heatmaps(results[0]), output / "heatmaps.png")
        if len(results) > 1:
            save_figure(draw_comparison(results), output / "comparison.png")
    print(as_text(results))
    print(f"written to {output}")


def _array(result: dict, key: str) -> np.ndarray:
    """(layers, epochs), NaN where there is no value."""
    return np.array(result[key], float)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of the values that are there; NaN where none is."""
    return np.ma.masked_invalid(values).mean(0).filled(np.nan)


def as_text(results: list[dict]) -> str:
    """The Markdown table: means over the layers at the first and last epoch, then every layer at the last one."""

    def row(first: str, values) -> str:
        texts = (
            "-" if np.isnan(v) else f"{v:.1f}" if key == "clusters" else f"{v:.3f}"
            for key, v in zip(MEASURES, values, strict=True)
        )
        return f"| {first} | {' | '.join(texts)} |"

    def table(first: str, rows: list[str]) -> list[str]:
        return [f"| {first} | {' | '.join(MEASURES)} |", "|---" * (len(MEASURES) + 1) + "|", *rows, ""]

    means = [
        row(f"{_plain(result)}, epoch {result['epochs'][i]}", [_mean(_array(result, key))[i] for key in MEASURES])
        for result in results
        for i in sorted({0, len(result["epochs"]) - 1})
    ]
    text = TEXT.format(most=MOST_CLUSTERS, least=NO_STRUCTURE, draws=REFERENCES)
    lines = ["# Clusterability of the feature maps", "", text]
    lines += ["## Mean over the layers", "", *table("run", means)]
    for result in results:
        last = [_array(result, key)[:, -1] for key in MEASURES]
        rows = list(starmap(row, zip(result["layers"], zip(*last, strict=True), strict=True)))
        lines += [f"## {_plain(result)}, epoch {result['epochs'][-1]}", "", *table("layer", rows)]
    return "\n".join(lines)


def _plain(result: dict) -> str:
    return result["label"].replace("$\\lambda$", "lambda")


def _panels(figure: Figure, results: list[dict]):
    """One axis per measure, labelled: yields (axis, key)."""
    axes = figure.subplots(2, 3, sharex=True)
    epochs = [epoch for result in results for epoch in result["epochs"]]
    for axis, (key, (title, label, limits, _)) in zip(axes.flat, MEASURES.items(), strict=True):
        axis.set(title=title, ylabel=label, xlim=(min(epochs) - 0.5, max(epochs) + 0.5))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
        if key in LINES:
            axis.axhline(LINES[key], color="black", linestyle=":", linewidth=1)
        yield axis, key
        axis.set_ylim(*limits)
        if key == "clusters":
            axis.set_ylim(1, max(2.1, axis.get_ylim()[1]))
            axis.yaxis.set_major_locator(WHOLE())
        axis.xaxis.set_major_locator(WHOLE())
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    figure.supxlabel(LINES_TEXT, fontsize=8)


def draw_curves(result: dict) -> Figure:
    """Every measure over the epochs: a thin line per layer, coloured by its place in the network, and their mean."""
    figure = new_figure(10, 5.5)
    n = len(result["layers"])
    colours = matplotlib.colormaps["viridis"]
    for axis, key in _panels(figure, [result]):
        values = _array(result, key)
        for i, line in enumerate(values):
            axis.plot(result["epochs"], line, color=colours(i / (n - 1)), linewidth=0.8, marker=".", markersize=3)
        axis.plot(result["epochs"], _mean(values), color="black", linewidth=2.5, marker="o", markersize=3, label="mean")
    axis.legend(frameon=False)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, n - 1), colours)
    bar = figure.colorbar(scale, ax=figure.axes, shrink=0.8, pad=0.02)
    ticks = sorted({0, _deepest(result), n - 1})
    bar.set_ticks(ticks, labels=[result["layers"][i].replace("_", "\n", 1) for i in ticks])
    figure.suptitle(f"Feature maps of {result['label']}: one line per layer", fontweight="bold")
    return figure


def _deepest(result: dict) -> int:
    return sum(layer.startswith("enc") for layer in result["layers"]) - 1


def draw_heatmaps(result: dict) -> Figure:
    """Layers x epochs, one heat map per measure; grey where there is no value."""
    n, epochs = len(result["layers"]), np.array(result["epochs"])
    half = (epochs[1] - epochs[0]) / 2 if len(epochs) > 1 else 0.5
    edges = np.concatenate([[epochs[0] - half], (epochs[1:] + epochs[:-1]) / 2, [epochs[-1] + half]])
    figure = new_figure(11, 2.2 + 0.32 * n)
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for axis, (key, (title, label, (low, high), small)) in zip(axes.flat, MEASURES.items(), strict=True):
        colours = matplotlib.colormaps["viridis_r" if small else "viridis"].with_extremes(bad="#DDDDDD")
        values = np.ma.masked_invalid(_array(result, key))
        image = axis.pcolormesh(edges, np.arange(n + 1) - 0.5, values, cmap=colours, vmin=low, vmax=high)
        figure.colorbar(image, ax=axis, pad=0.02, label=label, ticks=WHOLE() if key == "clusters" else None)
        axis.axhline(_deepest(result) + 0.5, color="white", linewidth=1.5)
        axis.set_title(title)
        axis.xaxis.set_major_locator(WHOLE())
    axes[0, 0].set_yticks(range(n), labels=result["layers"])
    axes[0, 0].invert_yaxis()
    for axis in axes[:, 0]:
        axis.tick_params("y", labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    figure.suptitle(
        f"Feature maps of {result['label']}: the brighter, the more clustered (the more clusters)", fontweight="bold"
    )
    return figure


def draw_comparison(results: list[dict]) -> Figure:
    """Every measure over the epochs: the mean over the layers of each run, in a band of their middle half (but k)."""
    figure = new_figure(10, 5.5)
    for axis, key in _panels(figure, results):
        for result, colour in zip(results, COLOURS, strict=False):
            values = _array(result, key)
            some = np.isfinite(values).any(0)
            low, high = np.nanquantile(values[:, some], (0.25, 0.75), axis=0)
            epochs = np.array(result["epochs"])
            if key != "clusters":  # whole numbers: a band would say nothing
                axis.fill_between(epochs[some], low, high, color=colour, alpha=0.2, linewidth=0)
            axis.plot(epochs, _mean(values), color=colour, linewidth=2, marker="o", markersize=3, label=result["label"])
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.supxlabel(f"lines: mean over the layers; bands: their middle half; {LINES_TEXT}", fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> int:
    """Measure as `argv` says; returns the exit code: 0, or 2 after one line about bad input."""
    parser = Parser(
        "python -m lib.experiments.clusterability",
        description="How clustered the feature maps of each layer are, epoch by epoch.",
    )
    parser.add_argument("run", type=Path, nargs="+", metavar="RUN", help="one or two folders of runs with --save_fms")
    parser.add_argument("--output", type=Path, help="folder of tables and figures (default: RUN/clusterability)")

    def run() -> None:
        args = parser.parse_args(argv)
        if len(args.run) > 2:
            parser.error(f"{args.run[2]}: is a third run; give one run, or two to compare")
        clusterability(args.run, args.output)

    return run_script(run)


if __name__ == "__main__":
    sys.exit(main())
