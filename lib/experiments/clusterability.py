"""How clustered the feature maps of each layer are, epoch by epoch (paper section 4.2).

`python -m lib.experiments.clusterability RUN [RUN2]` reads what `train.py --save_fms` saved and writes
clusterability.json, clusterability.md, curves.png and heatmaps.png of RUN, and with RUN2 comparison.png of both.
"""

import sys
from itertools import starmap
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diptest import diptest
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist, squareform
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from torch.nn import functional as F
from tqdm import tqdm

from lib.distance import SMALLEST_RANGE, euc_norm
from lib.experiments.clusterability_figures import (
    MEASURES,
    NO_STRUCTURE,
    array_of,
    draw_comparison,
    draw_curves,
    draw_heatmaps,
    mean_of,
)
from lib.experiments.figures import STYLE, make_output, save_figure
from lib.experiments.run import Run
from lib.system.cli import Parser, run_script
from lib.system.error import InputError
from lib.system.files import write_json, write_text
from lib.system.process import check_stopped

MOST_CLUSTERS = 8
REFERENCES = 5  # draws of points without clusters
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
    read = Run(run)
    layers, epochs = list(read.widths), read.saved_maps
    files = [[folder / f"{layer}.npy" for folder in epochs.values()] for layer in layers]
    existing = [path for row in files for path in row if path.exists()]
    if not existing:
        raise InputError(f"{run}: has no feature maps (fms/epoch-E/BLOCK.npy); train with --save_fms")
    found = {}
    for path in tqdm(existing, f"measuring {run}", unit="layer", leave=False):
        found[path] = measure(_read(path))
        check_stopped()
    return {
        "run": str(run),
        "label": f"{read.settings.exp_name}/{read.name} ($\\lambda$ = {read.lambda_:g})",
        "layers": layers,
        "epochs": list(epochs),
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
        row(
            f"{_plain(result)}, epoch {result['epochs'][i]}",
            [mean_of(array_of(result, key))[i] for key in MEASURES],
        )
        for result in results
        for i in sorted({0, len(result["epochs"]) - 1})
    ]
    text = TEXT.format(most=MOST_CLUSTERS, least=NO_STRUCTURE, draws=REFERENCES)
    lines = ["# Clusterability of the feature maps", "", text]
    lines += ["## Mean over the layers", "", *table("run", means)]
    for result in results:
        last = [array_of(result, key)[:, -1] for key in MEASURES]
        rows = list(starmap(row, zip(result["layers"], zip(*last, strict=True), strict=True)))
        lines += [f"## {_plain(result)}, epoch {result['epochs'][-1]}", "", *table("layer", rows)]
    return "\n".join(lines)


def _plain(result: dict) -> str:
    return result["label"].replace("$\\lambda$", "lambda")


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
