"""Evaluation from files: pairing, reading, averages, the table, and evaluate.py itself."""

import json
import sys

import nibabel as nib
import numpy as np
import pytest

import evaluate as script
import lib.evaluation
from lib.evaluation import Rules, evaluate, evaluate_pair, find_pairs, format_table, read_model_summary
from lib.metric import METRICS, label_metrics
from lib.system.error import InputError

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


def test_truths_among_the_predictions_are_left_out(tmp_path):
    for name in ("a", "a_gt", "b_GT"):
        write(tmp_path / "pred" / f"{name}.nii.gz", heart())
    write(tmp_path / "gt" / "a_gt.nii.gz", heart())
    found = find_pairs(tmp_path / "pred", tmp_path / "gt")
    assert list(found.pairs) == ["a"] and len(found.left_out) == 2 and found.alone == []
    assert found.notes() == ["left out: 2 files *_gt, which are ground truths by their names"]
    (tmp_path / "pred" / "a.nii.gz").unlink()
    with pytest.raises(InputError, match="no predictions"):
        find_pairs(tmp_path / "pred", tmp_path / "gt")


@pytest.mark.parametrize(
    ("pred", "gt", "named"),
    [
        (("x.nii", "x.nii.gz"), ("x_gt.nii.gz",), "--pred: x"),
        (("case_00010.nii.gz", "prediction_00010.nii"), ("case_00010.nii.gz",), "--pred: case_00010"),
        (("x.nii.gz",), ("x_gt.nii.gz", "x_gt.nii"), "--gt: x"),
        (("x.nii.gz",), ("x.nii.gz", "x.nii"), "--gt: x"),
        (("case_00010.nii.gz",), ("case_00010/segmentation.nii", "data/case_00010/segmentation.nii.gz"), "--gt: case"),
        (("case_00010.nii.gz",), ("case_00010/segmentation.nii", "case_00010/aggregated_MAJ_seg.nii"), "--gt: case"),
        (("p_f.nii.gz",), ("p/p_f_gt.nii.gz", "p_f_gt.nii.gz"), "--gt: p_f"),
    ],
)
def test_two_files_that_claim_to_be_one_thing_are_refused(tmp_path, pred, gt, named):
    for folder, names in (("pred", pred), ("gt", gt)):
        for name in names:
            write(tmp_path / folder / name, heart())
    with pytest.raises(InputError, match=f"^{named}.*: both .* and .* are there"):
        find_pairs(tmp_path / "pred", tmp_path / "gt")


@pytest.mark.parametrize(
    "truths",
    [
        ("a_gt.nii.gz", "b_gt.nii", "b.nii.gz", "c_gt.nii.gz"),
        ("a.nii.gz", "b.nii", "c.nii.gz"),
        ("a/a_gt.nii.gz", "training/b/b_gt.nii", "testing/c/c_gt.nii.gz"),
        ("a/segmentation.nii.gz", "data/b/aggregated_MAJ_seg.nii.gz", "dataset/c/segmentation.nii"),
    ],
)
def test_truths_without_a_prediction_are_counted_and_named(tmp_path, truths):
    write(tmp_path / "pred" / "a.nii.gz", heart())
    for name in truths:
        write(tmp_path / "gt" / name, heart())
    assert find_pairs(tmp_path / "pred", tmp_path / "gt").notes() == [
        "2 of 3 ground truths have no prediction and do not count: b, c"
    ]


def test_the_order_of_the_axes_does_not_matter(tmp_path):
    """A prediction that is turned, and a truth whose axes are permuted: the same numbers as of files in one order."""
    prediction, truth = write(tmp_path / "p.nii.gz", heart(moved=2)), write(tmp_path / "t.nii.gz", heart())
    expected = evaluate_pair(prediction, truth, Rules(4))
    assert expected["HD"][1:] == [3.0] * 3
    for codes in ("LPS", "SAR", "PIL"):
        for path in (prediction, truth):
            image = nib.load(path)
            turn = nib.orientations.ornt_transform(
                nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes)
            )
            nib.save(image.as_reoriented(turn), tmp_path / f"{codes}-{path.name}")
        assert evaluate_pair(tmp_path / f"{codes}-p.nii.gz", truth, Rules(4)) == expected
        assert evaluate_pair(prediction, tmp_path / f"{codes}-t.nii.gz", Rules(4)) == expected


def test_pairs_that_cannot_be_made(tmp_path):
    (tmp_path / "gt").mkdir()
    with pytest.raises(InputError, match="--pred .*no such folder"):
        find_pairs(tmp_path / "nowhere", tmp_path / "gt")
    (tmp_path / "pred").mkdir()
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


def test_a_prediction_that_changes_while_it_is_evaluated_is_refused(tmp_path, monkeypatch):
    pairs = {}
    for name in ("a", "b"):
        path = write(tmp_path / f"{name}.nii.gz", heart())
        pairs[name] = path, write(tmp_path / f"{name}_gt.nii.gz", heart())
    monkeypatch.setattr(lib.evaluation, "evaluate_pair", lambda *_: write(path, heart(moved=1)) and {"dice": [1.0]})
    with pytest.raises(InputError, match=r"b\.nii\.gz: changed while it was evaluated"):
        evaluate(pairs, Rules(4))


@pytest.mark.parametrize("kind", ["folder", "beneath a file"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, kind, capsys, monkeypatch):
    for folder in ("pred", "gt"):
        write(tmp_path / folder / "a.nii.gz", heart())
    (tmp_path / "file").touch()
    output = {"folder": tmp_path / "pred", "beneath a file": tmp_path / "file" / "results.json"}[kind]
    monkeypatch.setattr(script, "evaluate", lambda *_: pytest.fail("evaluated"))
    argv = ["--data", "acdc", "--pred", tmp_path / "pred", "--gt", tmp_path / "gt", "--output", output, "--overwrite"]
    assert script.main(list(map(str, argv))) == 2
    assert f"--output {output}: " in capsys.readouterr().err
