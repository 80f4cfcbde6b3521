"""Fingerprint, plan and folds against nnU-Net's own, wherever nnunetv2 (2.5.2) is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from lib.data import raw
from lib.data.examination import Examination, examine
from lib.data.planning import plan
from lib.data.splits import five_folds

pytestmark = pytest.mark.skipif(importlib.util.find_spec("nnunetv2") is None, reason="nnunetv2 is not installed")
HIPPOCAMPI = Path(__file__).resolve().parents[2] / "shared" / "Task04_Hippocampus"
NNUNET = """
import json, sys
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.crossval_split import generate_crossval_split
DatasetFingerprintExtractor(1, 2).run()
ExperimentPlanner(1).plan_experiment()
json.dump(generate_crossval_split(json.loads(sys.argv[1])), open(sys.argv[2], "w"))
"""


class Both(NamedTuple):
    """What both say of one data set: `examined` is ours, the others are nnU-Net's."""

    examined: Examination
    dataset: raw.BaseDataset
    ids: list[str]
    fingerprint: dict
    plans: dict
    folds: list[dict]


def write_json(folder, channels, n, ending=".nii.gz"):
    fields = {"channel_names": dict(enumerate(channels)), "labels": {"background": 0, "one": 1, "two": 2}}
    (folder / "dataset.json").write_text(json.dumps(fields | {"numTraining": n, "file_ending": ending}))


def write_slabs(folder):
    """Six volumes of thick slices and two channels, one of them CT, most of whose voxels are 0."""
    random = np.random.default_rng(1)
    for case in range(6):
        shape = random.integers((60, 50, 14), (80, 64, 20))
        affine = np.diag([-0.8, -0.9 - 0.1 * (case == 2), 3.0 + case % 2, 1.0])
        label = np.zeros(shape, np.uint8)
        label[20:40, 15:30, 5:9], label[30:36, 15:30, 5:9] = 1, 2
        for channel, kind in enumerate((np.int16, np.float32)):
            image = np.zeros(shape, kind)
            image[12:-11, 9:-4, 2:-1] = random.normal(-50, 300, shape)[12:-11, 9:-4, 2:-1]
            nib.save(nib.Nifti1Image(image, affine), folder / "imagesTr" / f"s_{case}_{channel:04d}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / "labelsTr" / f"s_{case}.nii.gz")
    write_json(folder, ("CT", "T2"), 6)


def write_pictures(folder):
    random = np.random.default_rng(2)
    for case in range(7):
        shape = random.integers((90, 120), (130, 180))
        label = np.zeros(shape, np.uint8)
        label[10:40, 30:60], label[50:70, 30:60] = 1, 2
        colours = random.integers(0, 255, (*shape, 3), dtype=np.uint8)
        Image.fromarray(colours).save(folder / "imagesTr" / f"p{case}_0000.png")
        Image.fromarray(label).save(folder / "labelsTr" / f"p{case}.png")
    write_json(folder, ("R", "G", "B"), 7, ".png")


def write_hippocampi(folder):
    """Links to the 200 hippocampi, by the names that nnU-Net wants."""
    if not HIPPOCAMPI.is_dir():
        pytest.skip("the hippocampi (../shared) are not here")
    paths = sorted((HIPPOCAMPI / "imagesTr").glob("[!.]*.nii.gz"))
    for path in paths:
        (folder / "imagesTr" / path.name.replace(".nii.gz", "_0000.nii.gz")).symlink_to(path)
        (folder / "labelsTr" / path.name).symlink_to(HIPPOCAMPI / "labelsTr" / path.name)
    write_json(folder, ("MRI",), len(paths))


@pytest.fixture(scope="module", params=[write_slabs, write_pictures, write_hippocampi])
def both(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("nnunet")
    folder = root / "raw" / "Dataset001_Set"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    request.param(folder)
    dataset = raw.read_dataset(folder)
    ids = [case.id for case in dataset.find(folder)]
    places = {"nnUNet_raw": root / "raw", "nnUNet_preprocessed": root, "nnUNet_results": root}
    environment = os.environ | {name: str(place) for name, place in places.items()}
    command = [sys.executable, "-c", NNUNET, json.dumps(ids), str(root / "folds.json")]
    subprocess.run(command, env=environment, cwd=root, check=True, capture_output=True)
    names = [root / "Dataset001_Set" / f"{name}.json" for name in ("dataset_fingerprint", "nnUNetPlans")]
    theirs = [json.loads(path.read_text()) for path in (*names, root / "folds.json")]
    return Both(examine(dataset, folder, root / "cache"), dataset, ids, *theirs)


def test_fingerprint(both):
    ours, theirs = both.examined.fingerprint, both.fingerprint
    assert ours.shapes == tuple(map(tuple, theirs["shapes_after_crop"]))
    np.testing.assert_allclose(ours.spacings, theirs["spacings"], rtol=1e-6)
    assert ours.relative_size == pytest.approx(theirs["median_relative_size_after_cropping"], rel=1e-12)
    for channel, found in enumerate(ours.intensities):
        expected = theirs["foreground_intensity_properties_per_channel"][str(channel)]
        assert found == pytest.approx(expected, rel=1e-5)  # its sums are in single precision


@pytest.mark.parametrize("dim", ["2D", "3D"])
def test_plan(both, dim):
    theirs = both.plans["configurations"].get({"2D": "2d", "3D": "3d_fullres"}[dim])
    if theirs is None:
        pytest.skip("nnU-Net has no network in 3D for flat images")
    sizes = raw.n_labels(both.dataset), both.examined.n_training
    ours = plan(both.examined.fingerprint, both.dataset.channels, *sizes, given={"dim": dim})
    network = theirs["architecture"]["arch_kwargs"]
    assert ours.transpose == tuple(both.plans["transpose_forward"])
    np.testing.assert_allclose([mm for mm in ours.spacing if mm is not None], theirs["spacing"], rtol=1e-6)
    assert (list(ours.patch_size), ours.batch_size) == (theirs["patch_size"], theirs["batch_size"])
    assert [list(row) for row in ours.strides] == network["strides"]
    assert [list(row) for row in ours.kernels] == network["kernel_sizes"]
    assert list(ours.widths) == network["features_per_stage"]
    assert ours.batch_dice == theirs["batch_dice"]
    assert [one.masked for one in ours.normalizations] == theirs["use_mask_for_norm"]
    kinds = {"ct": "CTNormalization", "zscore": "ZScoreNormalization"}
    assert [kinds[one.scheme] for one in ours.normalizations] == theirs["normalization_schemes"]


def test_folds(both):
    assert [{part: list(ids) for part, ids in fold.items()} for fold in five_folds(both.ids)] == both.folds
