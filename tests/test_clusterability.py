import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.spatial.distance import pdist, squareform

from lib.distance import euc_norm
from lib.experiments.clusterability import MEASURES, as_points, hopkins, main, measure
from lib.models import nnUNet

SOME_MAPS = arrays(np.float16, array_shapes(min_dims=3, max_dims=4, min_side=1, max_side=6), elements=st.floats(-9, 9))


def two_clusters(rng, n=12):
    """2n maps (2n, 16, 16): noisy copies of two."""
    centres = rng.standard_normal((2, 16, 16))
    return (np.repeat(centres, n, 0) + 0.01 * rng.standard_normal((2 * n, 16, 16))).astype("f4")


def test_two_tight_clusters_are_seen_by_every_measure():
    found = measure(two_clusters(np.random.default_rng(0)))
    assert found["dip_p"] < 0.001
    assert found["dip"] > 0.1
    assert found["hopkins"] > 0.99
    assert found["silhouette"] > 0.95
    assert found["clusters"] == 2


def test_random_maps_are_not_clustered():
    found = measure(np.random.default_rng(0).standard_normal((24, 16, 16)).astype("f4"))
    assert found["dip_p"] > 0.5
    assert found["silhouette"] < 0.25
    assert found["clusters"] == 1
    assert 0.2 < found["hopkins"] < 0.8


def maps_of(points):
    """Maps (n, 2, 6) that `measure` sees as these points (n, 2) of the unit square, their distances over sqrt(3): two
    areas of the values given, and one that holds the minimum and the maximum."""
    maps = np.zeros((len(points), 2, 6), "f4")
    maps[..., 0:2], maps[..., 2:4], maps[..., 4] = points[:, :1, None], points[:, 1:, None], 1
    return maps


def test_maps_of_points():
    points = np.array([[0.1, 0.2], [0.4, 0.6], [0.4, 0.2]])
    found = pdist(as_points(torch.from_numpy(maps_of(points))))
    assert found == pytest.approx(np.array([0.5, 0.3, 0.4]) / 3**0.5, abs=1e-5)


@pytest.mark.parametrize(("seed", "n"), [(0, 16), (1, 48)])
def test_known_points_in_a_plane(seed, n):
    rng = np.random.default_rng(seed)
    corners = np.array([[0.1, 0.1], [0.9, 0.1], [0.5, 0.8]])
    three = measure(maps_of(np.repeat(corners, n // 3, 0) + rng.normal(0, 0.01, (n // 3 * 3, 2))))
    blob = measure(maps_of(rng.normal(0.5, 0.1, (n, 2)).clip(0, 1)))
    even = measure(maps_of(rng.random((n, 2))))
    assert [found["clusters"] for found in (three, blob, even)] == [3, 1, 1]
    assert three["silhouette"] > 0.95 > 0.6 > max(blob["silhouette"], even["silhouette"])
    assert three["dip_p"] < 0.001 < 0.3 < min(blob["dip_p"], even["dip_p"])
    assert three["hopkins"] > 0.9 > 0.8 > max(blob["hopkins"], even["hopkins"]) > 0.3


def test_values_counted_by_hand():
    # after scaling and pooling of these four maps: 0, 1/4, 3/4, 3/4
    found = measure(np.array([[[2, 2], [2, 2]], [[0, 0], [0, 5]], [[7, 7], [7, 1]], [[7, 1], [7, 7]]], "f4"))
    assert found["distance"] == pytest.approx((1 / 4 + 3 / 4 + 3 / 4) / 3)
    # the clusters {0, 1/4} and {3/4, 3/4}: 1 - a/b = 2/3, 1/2, 1, 1
    assert found["silhouette"] == pytest.approx((2 / 3 + 1 / 2 + 1 + 1) / 4)
    # n maps each of two kinds: distances of two values, of which the dip is half the smaller share
    n = 12
    pairs = np.array([n * (n - 1), n * n]) / (n * (2 * n - 1))
    two = measure(two_clusters(np.random.default_rng(0), n))
    assert two["dip"] == pytest.approx(pairs.min() / 2, abs=0.01)


@pytest.mark.parametrize("maps", [np.ones((6, 4, 4), "f2"), np.tile(np.eye(4, dtype="f2"), (6, 1, 1))])
def test_identical_maps_have_finite_values(maps):
    expected = {"dip": 0, "dip_p": 1, "hopkins": 0.5, "silhouette": 0, "clusters": 1, "distance": 0}
    assert measure(maps) == expected


def test_few_maps_have_no_value():
    maps = np.random.default_rng(0).random((3, 4, 4), dtype="f4")
    assert set(measure(maps)) == set(MEASURES)
    assert {key for key, value in measure(maps).items() if value is not None} == {"distance"}
    assert all(value is None for value in measure(maps[:1]).values())


@settings(deadline=None, max_examples=50)
@given(SOME_MAPS)
def test_points_are_as_far_apart_as_euc_norm_says(maps):
    maps = torch.from_numpy(maps).float()
    distances = squareform(pdist(as_points(maps)))
    for i in range(len(maps)):
        pair = torch.cat([maps[i : i + 1], maps])[None]
        assert distances[i] == pytest.approx(euc_norm(pair)[0].numpy(), abs=1e-4)


@settings(deadline=None, max_examples=30)
@given(SOME_MAPS)
def test_any_maps_can_be_measured(maps):
    found = measure(maps)
    assert found == measure(maps)
    assert all(value is None or np.isfinite(value) for value in found.values())
    if found["hopkins"] is not None:
        assert 0 <= found["hopkins"] <= 1
        assert -1 <= found["silhouette"] <= 1
        assert 1 <= found["clusters"] < len(maps)


def test_hopkins_of_known_points():
    rng = np.random.default_rng(1)
    assert hopkins(rng.random((400, 2))) == pytest.approx(0.5, abs=0.06)
    grid = np.stack(np.meshgrid(range(20), range(20)), -1).reshape(-1, 2)
    # the neighbour is 1 away; a uniform point's squared distance to the nearest grid point is 1/6 on average
    assert hopkins(grid.astype(float)) == pytest.approx((1 / 6) / (1 / 6 + 1), abs=0.01)


@pytest.fixture
def run(tmp_path):
    """A run whose maps are random in epoch 2 and clustered in epoch 4; the first layer has kept one map."""
    folder = tmp_path / "exp" / "phantom" / "1"
    rng = np.random.default_rng(0)
    for epoch, maps in ((2, rng.standard_normal((24, 16, 16))), (4, two_clusters(rng))):
        (folder / "fms" / f"epoch-{epoch:04}").mkdir(parents=True)
        for block in nnUNet(1, 2, 1, 3).blocks():
            n = 1 if block.name == "enc_ConvBlock_1" else 24
            np.save(folder / "fms" / f"epoch-{epoch:04}" / f"{block.name}.npy", maps[:n].astype("f2"))
    config = {"data": "phantom", "exp_name": "exp", "levels": 3, "dim": "2D", "lambda_": 0.5}
    (folder / "config.json").write_text(json.dumps(config | {"loss": "DS_CrossEntropyDiceLoss_Distance"}))
    return folder


def test_two_runs_are_measured_and_compared(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "config.json").write_text((run / "config.json").read_text().replace("_Distance", ""))
    (other / "fms" / "epoch-0004" / "dec_ConvBlock_4.npy").unlink()  # interrupted while they were saved
    assert main([str(run), str(other)]) == 0
    output = run / "clusterability"
    names = ["clusterability.json", "clusterability.md", "comparison.png", "curves.png", "heatmaps.png"]
    assert sorted(path.name for path in output.iterdir()) == names
    first, second = json.loads((output / "clusterability.json").read_text())
    assert first["epochs"] == [2, 4]
    assert first["layers"][0] == "enc_ConvBlock_1"
    assert len(first["layers"]) == 6 + 2 * 3  # no heads
    assert first["clusters"] == [[None, None]] + [[1, 2]] * 11
    assert second["clusters"][-1] == [1, None]
    assert [result["label"] for result in (first, second)] == [r"exp/1 ($\lambda$ = 0.5)", r"exp/other ($\lambda$ = 0)"]
    table = (output / "clusterability.md").read_text()
    assert "| exp/1 (lambda = 0.5), epoch 4 | " in table
    assert "| enc_ConvBlock_1 | - | - | - | - | - | - |" in table
    assert table in capsys.readouterr().out


def test_bad_input_is_named_in_one_line(run, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    next((broken / "fms").rglob("*.npy")).write_bytes(b"\x93NUMPY")
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(run / "config.json", empty)
    (tmp_path / "file").touch()
    for argv, message in [
        ([tmp_path / "nothing"], "is no run folder"),
        ([empty], "has no feature maps"),
        ([broken], "cannot be read as feature maps"),
        ([run, "--output", tmp_path / "file"], "cannot be made a folder"),
        ([run, run, run], "is a third run"),
        ([], "the following arguments are required: RUN"),
    ]:
        assert main([str(part) for part in argv]) == 2
        error = capsys.readouterr().err.split("\r")[-1]  # behind the progress bar
        assert message in error
        assert error.count("\n") == 1
    assert not (run / "clusterability").exists()
