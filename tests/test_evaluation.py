"""Evaluation from files: pairing, reading, averages, the table, and evaluate.py itself."""

import json
import sys

import nibabel as nib
import numpy as np
import pytest

import evaluate as script
from lib.error import InputError
from lib.evaluation import Rules, evaluate, evaluate_pair, find_pairs, format_table, read_model_summary
from lib.metric import METRICS, label_metrics

SPACING_MM = (1.5, 1.25, 8.0)
NAMES = ("background", "RV", "myocardium", "LV")


def write(path, labels, spacing_mm=SPACING_MM, dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.asarray(labels, dtype), np.diag([*spacing_mm, 1.0]))
    nib.save(image, path)
    return path


def heart(moved=0, classes=(1, 2, 3)):
    """A label map (24, 20, 5) with three neighbouring blocks, `moved` along the first axis."""
    labels = np.zeros((24, 20, 5), np.uint8)
    for label, first in zip((1, 2, 3), (2, 8, 14), strict=True):
        if label in classes:
            labels[first + moved : first + 5 + moved, 4:15, 1:4] = label
    return labels


@pytest.mark.parametrize(
    ("subject", "truth"),
    [
        ("patient002_frame01", "training/patient002/patient002_frame01_gt.nii.gz"),
        ("patient002_frame01", "patient002/patient002_frame01_gt.nii.gz"),
        ("patient002_frame01", "patient002_frame01_gt.nii.gz"),
        ("patient002_frame01", "patient002_frame01.nii.gz"),
        ("patient002_frame01", "training/patient002/patient002_frame01_gt.nii"),
        ("case_00010", "case_00010/segmentation.nii.gz"),
        ("case_00010", "data/case_00010/aggregated_MAJ_seg.nii.gz"),
        ("case_00010", "case_00010/segmentation.nii"),
        ("prediction_00010", "dataset/case_00010/segmentation.nii.gz"),
        ("prediction_00010", "case_00010.nii.gz"),
    ],
)
def test_ground_truth_is_found_in_every_layout(tmp_path, subject, truth):
    prediction = write(tmp_path / "pred" / f"{subject}.nii.gz", heart())
    write(tmp_path / "pred" / f"{subject}_probabilities.nii.gz", heart())
    write(tmp_path / "gt" / "patient003" / "patient003_frame01_gt.nii.gz", heart())  # without a prediction
    expected = write(tmp_path / "gt" / truth, heart())
    found = find_pairs(tmp_path / "pred", tmp_path / "gt")
    assert found.pairs == {subject: (prediction, expected)} and found.alone == ["patient003_frame01"]


def test_ground_truth_is_not_the_image_beside_it_nor_the_prediction(tmp_path):
    prediction = write(tmp_path / "pred" / "patient002_frame01.nii.gz", heart())
    for name in ("patient002_frame01.nii.gz", "patient002_frame01_gt.nii.gz"):
        write(tmp_path / "gt" / name, heart())
    assert find_pairs(tmp_path / "pred", tmp_path / "gt").pairs["patient002_frame01"][1].name.endswith("_gt.nii.gz")
    with pytest.raises(InputError, match="no ground truth"):
        find_pairs(prediction.parent, prediction.parent)


def test_pairs_that_cannot_be_made(tmp_path):
    (tmp_path / "gt").mkdir()
    with pytest.raises(InputError, match="--pred .*predict first"):
        find_pairs(tmp_path / "pred", tmp_path / "gt")
    write(tmp_path / "pred" / "patient002_frame01.nii.gz", heart())
    with pytest.raises(InputError, match="patient002_frame01.nii.gz: no ground truth"):
        find_pairs(tmp_path / "pred", tmp_path / "gt")
    with pytest.raises(InputError, match="--gt .*no such folder"):
        find_pairs(tmp_path / "pred", tmp_path / "nowhere")
    write(tmp_path / "other" / "average.nii.gz", heart())
    with pytest.raises(InputError, match="rename the file"):
        find_pairs(tmp_path / "other", tmp_path / "gt")


def test_a_pair_must_share_its_grid(tmp_path):
    truth = write(tmp_path / "gt.nii.gz", heart())
    with pytest.raises(InputError, match=r"short.nii.gz: its shape \(24, 20, 4\) is not"):
        evaluate_pair(write(tmp_path / "short.nii.gz", heart()[..., :4]), truth, Rules(4))
    with pytest.raises(InputError, match="turned.nii.gz: lies elsewhere in the world"):
        evaluate_pair(write(tmp_path / "turned.nii.gz", heart(), (1.5, 1.26, 8.0)), truth, Rules(4))
    assert evaluate_pair(truth, truth, Rules(4))["HD"] == [None, 0.0, 0.0, 0.0]


@pytest.fixture
def folders(tmp_path):
    """Three predictions, one without the RV, one of a truth without the LV, and ground truth in ACDC's layout."""
    cases = {"patient001_frame01": (1, (1, 2, 3), (1, 2, 3)), "patient001_frame12": (0, (2, 3), (1, 2, 3))}
    cases["patient002_frame01"] = (2, (1, 2), (1, 2))
    for subject, (moved, predicted, true) in cases.items():
        write(tmp_path / "pred" / f"{subject}.nii.gz", heart(moved, predicted))
        write(tmp_path / "gt" / "training" / subject[:10] / f"{subject}_gt.nii.gz", heart(0, true))
    return tmp_path


def test_averages_are_over_the_values_that_exist(folders):
    results = evaluate(find_pairs(folders / "pred", folders / "gt").pairs, Rules(4))
    assert list(results) == ["patient001_frame01", "patient001_frame12", "patient002_frame01", "average", "n"]
    assert all(tuple(entry) == METRICS and all(len(v) == 4 for v in entry.values()) for entry in results.values())
    assert results["patient001_frame01"] == label_metrics(heart(1), heart(), SPACING_MM, 4)
    assert results["n"]["dice"] == [3, 3, 3, 2]
    assert results["n"]["HD"] == [0, 2, 3, 2]
    assert results["n"]["TP"] == [3, 3, 3, 3]
    # blocks are 5 wide: moved by 0, 1 and 2 voxels they keep 5, 4 and 3 of them; the RV is missing once
    assert results["average"]["dice"] == pytest.approx([results["average"]["dice"][0], 1.4 / 3, 2.4 / 3, 1.8 / 2])
    assert results["average"]["HD"] == [None, (1.5 + 3.0) / 2, (1.5 + 0.0 + 3.0) / 3, 1.5 / 2]


def test_processes_give_the_same_as_one_and_hand_on_errors(folders):
    pairs = find_pairs(folders / "pred", folders / "gt").pairs
    assert evaluate(pairs, Rules(4), num_workers=2) == evaluate(pairs, Rules(4))
    with pytest.raises(InputError, match="whole numbers 0 to 2"):
        evaluate(pairs, Rules(3), num_workers=2)


def test_table(folders):
    results = evaluate(find_pairs(folders / "pred", folders / "gt").pairs, Rules(4))
    plain = format_table(results, NAMES).splitlines()
    assert plain[2].split()[:4] == ["RV", "0.4667", "(", "3)"]
    assert plain[5].split()[:3] == ["mean", "foreground", f"{(1.4 / 3 + 2.4 / 3 + 0.9) / 3:.4f}"]
    sizes = {"parameters": {"unpruned": 2000000, "now": 500000}, "flops": {"unpruned": None, "now": 10}}
    sizes["filters"] = {"unpruned": 64, "now": 48}
    lines = format_table(results, NAMES, sizes).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["parameters", "2,000,000", "500,000", "25.0%"],
        ["FLOPs", "-", "10", "-"],
        ["filters", "64", "48", "75.0%"],
    ]
    assert lines[5:] == plain


def test_model_summary(tmp_path):
    assert read_model_summary(tmp_path) is None
    for text in ("{", "[]", '{"parameters": 3}', '{"parameters": {"unpruned": "a", "now": 1}}'):
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(InputError, match="model.json"):
            read_model_summary(tmp_path)
    content = {size: {"unpruned": None, "now": 3} for size in ("parameters", "flops", "filters")}
    (tmp_path / "model.json").write_text(json.dumps(content), encoding="utf-8-sig")
    assert read_model_summary(tmp_path) == content


def test_script(folders, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    output = folders / "new" / "results.json"
    arguments = ["--data", "acdc", "--pred", str(folders / "pred"), "--gt", str(folders / "gt")]
    arguments += ["--output", str(output), "--num_workers", "1"]
    assert script.main(arguments) == 0
    results = json.loads(output.read_text(), parse_constant=pytest.fail)
    assert results == evaluate(find_pairs(folders / "pred", folders / "gt").pairs, Rules(4))
    assert "0.4667" in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["results.json"]

    assert script.main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"evaluate.py: error: --output {output}: exists already")
    monkeypatch.setenv("SAURON_DATA", str(folders))
    (folders / "gt").rename(folders / "acdc")
    default = [word for word in arguments if word not in ("--gt", str(folders / "gt"))]
    assert script.main([*default, "--overwrite", "--tolerance", "0"]) == 0
    assert json.loads(output.read_text())["patient001_frame01"]["surface_dice"][1] < 1


@pytest.mark.parametrize(
    "flag", [["--tolerance", "-1"], ["--tolerance", "nan"], ["--num_workers", "0"], ["--data", "x"]]
)
def test_script_refuses_bad_flags(flag, capsys):
    assert script.main(["--data", "acdc", "--pred", "pred", *flag]) == 2
    assert flag[0] in capsys.readouterr().err


def test_nothing_is_written_after_bad_input(folders, capsys):
    write(folders / "pred" / "patient009_frame01.nii.gz", heart())
    output = folders / "results.json"
    arguments = [
        "--data",
        "acdc",
        "--pred",
        str(folders / "pred"),
        "--gt",
        str(folders / "gt"),
        "--output",
        str(output),
    ]
    assert script.main(arguments) == 2
    assert not output.exists()
    assert len(capsys.readouterr().err.splitlines()) == 1
