"""Evaluation from files: pairing, reading, averages, the table, and evaluate.py itself."""

import json
import math
import sys
import types
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import evaluate as script
import lib.data
import lib.evaluation
from lib.data import DATASETS
from lib.data.BaseDataset import BaseDataset, Preprocessing, SubjectFiles
from lib.evaluation import (
    Rules,
    empty_truths,
    evaluate,
    evaluate_pair,
    find_dataset,
    find_own_pairs,
    find_pairs,
    format_table,
    nnunet_summary,
    read_model_summary,
)
from lib.metric import METRICS, label_metrics
from lib.settings import Settings
from lib.system.error import InputError
from lib.utils import parseArguments

SPACING_MM = (1.5, 1.25, 8.0)
NAMES = ("background", "RV", "myocardium", "LV")


ACDC, KITS = (lib.data.DATASETS[name].truths_in for name in ("acdc", "kits"))


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
    for name in ("patient003/patient003_frame01_gt", "case_00003/segmentation"):
        write(tmp_path / "gt" / f"{name}.nii.gz", heart())  # without a prediction
    expected = write(tmp_path / "gt" / truth, heart())
    found = find_pairs(tmp_path / "pred", tmp_path / "gt", ACDC if "patient" in truth else KITS)
    assert found.pairs == {subject: (prediction, expected)}
    assert found.alone == ["patient003_frame01" if "patient" in truth else "case_00003"]


def test_ground_truth_is_not_the_image_beside_it_nor_the_prediction(tmp_path):
    prediction = write(tmp_path / "pred" / "patient002_frame01.nii.gz", heart())
    for name in ("patient002_frame01.nii.gz", "patient002_frame01_gt.nii.gz"):
        write(tmp_path / "gt" / name, heart())
    found = find_pairs(tmp_path / "pred", tmp_path / "gt", ACDC)
    assert found.pairs["patient002_frame01"][1].name.endswith("_gt.nii.gz")
    with pytest.raises(InputError, match="no ground truth"):
        find_pairs(prediction.parent, prediction.parent, ACDC)


def test_truths_among_the_predictions_are_left_out(tmp_path):
    for name in ("a", "a_gt", "b_GT"):
        write(tmp_path / "pred" / f"{name}.nii.gz", heart())
    write(tmp_path / "gt" / "a_gt.nii.gz", heart())
    found = find_pairs(tmp_path / "pred", tmp_path / "gt", ACDC)
    assert list(found.pairs) == ["a"] and len(found.left_out) == 2 and found.alone == []
    assert found.notes() == ["left out: 2 files *_gt, which are ground truths by their names"]
    (tmp_path / "pred" / "a.nii.gz").unlink()
    with pytest.raises(InputError, match="no predictions"):
        find_pairs(tmp_path / "pred", tmp_path / "gt", ACDC)


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
        find_pairs(tmp_path / "pred", tmp_path / "gt", KITS if "case" in named else ACDC)


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
    layout = KITS if "segmentation" in truths[0] else ACDC
    assert find_pairs(tmp_path / "pred", tmp_path / "gt", layout).notes() == [
        "2 of 3 ground truths have no prediction and do not count: b, c"
    ]


def keep_hearts(root):
    """heart_N/mri and heart_N/expert: a layout of a user's own. Beside them lies what a program once drew."""
    places = [place for place in sorted(root.glob("heart_*")) if (place / "mri.nii.gz").is_file()]
    truths = {place: place / "expert.nii.gz" for place in places}
    return [
        SubjectFiles(place.name, (place / "mri.nii.gz",), truth if truth.is_file() else None)
        for place, truth in truths.items()
    ]


HEARTS = BaseDataset(
    name="hearts", class_names=NAMES, find=keep_hearts, preprocessing=Preprocessing((None, None, None))
)


def test_truths_of_a_users_data_set_are_found_its_own_way(tmp_path, monkeypatch, capsys):
    """And not in the layout of another data set, nor where an image has the subject's name."""
    monkeypatch.setitem(lib.data.DATASETS, "hearts", HEARTS)
    for n in (1, 2, 3):
        write(tmp_path / "gt" / f"heart_{n}" / "mri.nii.gz", heart())
        write(tmp_path / "gt" / f"heart_{n}" / "segmentation.nii.gz", heart(moved=2))
        write(tmp_path / "gt" / f"heart_{n}.nii.gz", heart(moved=3))
    prediction = write(tmp_path / "pred" / "heart_1.nii.gz", heart())
    truths = [write(tmp_path / "gt" / f"heart_{n}" / "expert.nii.gz", heart()) for n in (1, 2)]
    found = find_pairs(tmp_path / "pred", tmp_path / "gt", HEARTS.truths_in)
    assert found.pairs == {"heart_1": (prediction, truths[0])} and found.alone == ["heart_2"]
    argv = ["--data", "hearts", "--pred", tmp_path / "pred", "--gt", tmp_path / "gt", "--output", tmp_path / "r.json"]
    assert script.main([*map(str, argv), "--num_workers", "1"]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["heart_1"]["dice"] == [1.0] * 4
    assert "1 of 2 ground truths have no prediction and do not count: heart_2" in capsys.readouterr().out


def test_another_data_sets_layout_is_none_of_a_users_data_set(tmp_path):
    write(tmp_path / "pred" / "heart_1.nii.gz", heart())
    write(tmp_path / "gt" / "heart_1" / "segmentation.nii.gz", heart())
    with pytest.raises(InputError, match=r"heart_1\.nii\.gz: no ground truth .*looked for heart_1_gt\.nii\.gz"):
        find_pairs(tmp_path / "pred", tmp_path / "gt", HEARTS.truths_in)
    flat = write(tmp_path / "gt" / "heart_1.nii.gz", heart())  # a flat folder is everybody's
    assert find_pairs(tmp_path / "pred", tmp_path / "gt", HEARTS.truths_in).pairs["heart_1"][1] == flat


def test_a_built_in_data_set_looks_in_its_own_layout_alone(tmp_path):
    write(tmp_path / "pred" / "case_00010.nii.gz", heart())
    truth = write(tmp_path / "gt" / "data" / "case_00010" / "segmentation.nii.gz", heart())  # without its image
    assert find_pairs(tmp_path / "pred", tmp_path / "gt", KITS).pairs["case_00010"][1] == truth
    with pytest.raises(InputError, match="no ground truth"):
        find_pairs(tmp_path / "pred", tmp_path / "gt", ACDC)


def test_a_table_says_where_truths_of_own_data_are(tmp_path):
    """Also where a file of the subject's name lies in a folder of labels, or beside them."""
    folder = tmp_path / "gt"
    entry = {"images": ["scans/a.nii.gz"], "label": "truths/a.nii.gz"}
    told = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "RV": 1, "myocardium": 2, "LV": 3}}
    told |= {"numTraining": 1, "file_ending": ".nii.gz", "dataset": {"a": entry}}
    for name in ("scans/a.nii.gz", "labelsTr/a.nii.gz", "a.nii.gz"):
        write(folder / name, heart(moved=2))
    truth = write(folder / "truths" / "a.nii.gz", heart())
    write(tmp_path / "pred" / "a.nii.gz", heart())
    (folder / "dataset.json").write_text(json.dumps(told))
    argv = ["--data", folder, "--pred", tmp_path / "pred", "--gt", folder, "--output", tmp_path / "r.json"]
    assert script.main([*map(str, argv), "--num_workers", "1"]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["a"]["dice"] == [1.0] * 4
    assert find_own_pairs(tmp_path / "pred", folder, script.find_dataset(str(folder))[0]).pairs["a"][1] == truth


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
        find_pairs(tmp_path / "nowhere", tmp_path / "gt", ACDC)
    (tmp_path / "pred").mkdir()
    with pytest.raises(InputError, match="--pred .*predict first"):
        find_pairs(tmp_path / "pred", tmp_path / "gt", ACDC)
    write(tmp_path / "pred" / "patient002_frame01.nii.gz", heart())
    with pytest.raises(InputError, match="patient002_frame01.nii.gz: no ground truth"):
        find_pairs(tmp_path / "pred", tmp_path / "gt", ACDC)
    with pytest.raises(InputError, match="--gt .*no such folder"):
        find_pairs(tmp_path / "pred", tmp_path / "nowhere", ACDC)
    write(tmp_path / "other" / "average.nii.gz", heart())
    with pytest.raises(InputError, match="rename the file"):
        find_pairs(tmp_path / "other", tmp_path / "gt", ACDC)


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
    results = evaluate(find_pairs(folders / "pred", folders / "gt", ACDC).pairs, Rules(4))
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
    pairs = find_pairs(folders / "pred", folders / "gt", ACDC).pairs
    assert evaluate(pairs, Rules(4), num_workers=2) == evaluate(pairs, Rules(4))
    with pytest.raises(InputError, match="whole numbers 0 to 2"):
        evaluate(pairs, Rules(3), num_workers=2)


def test_table(folders):
    results = evaluate(find_pairs(folders / "pred", folders / "gt", ACDC).pairs, Rules(4))
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
    assert results == evaluate(find_pairs(folders / "pred", folders / "gt", ACDC).pairs, Rules(4))
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


# ---- own data


def find_labels(folder):
    """The training cases of a folder in nnU-Net's raw format, with one label under a name of its own."""
    labels = sorted((folder / "labelsTr").glob("*.nii.gz"))
    files = [SubjectFiles(path.name.removesuffix(".nii.gz"), (path,), path) for path in labels]
    odd = folder / "elsewhere" / "label.nii.gz"
    return files + [SubjectFiles("odd", (odd,), odd)] * odd.exists()


OWN = BaseDataset(
    name="mine",
    class_names=("background", "organ", "vessel"),
    find=find_labels,
    preprocessing=Preprocessing((None, None, None)),
    values=(0, 4, 2),
    ignore=9,
)


@pytest.mark.parametrize("place", ["labelsTr/a.nii.gz", "labelsTs/a.nii.gz", "a.nii.gz"])
def test_truths_of_own_data_are_found_in_their_folders(tmp_path, place):
    prediction = write(tmp_path / "pred" / "a.nii.gz", heart())
    for name in ("a_probabilities.nii.gz", "b.mha", ".c.nii.gz"):
        (tmp_path / "pred" / name).touch()
    truth = write(tmp_path / "data" / place, heart())
    write(truth.with_name("b.nii.gz"), heart())
    found = find_own_pairs(tmp_path / "pred", tmp_path / "data", OWN)
    assert found.pairs == {"a": (prediction, truth)} and found.alone == ["b"] and found.left_out == []


def test_a_truth_of_own_data_may_be_where_the_definition_says(tmp_path):
    prediction = write(tmp_path / "pred" / "odd.nii.gz", heart())
    truth = write(tmp_path / "data" / "elsewhere" / "label.nii.gz", heart())
    found = find_own_pairs(tmp_path / "pred", tmp_path / "data", OWN)
    assert found.pairs == {"odd": (prediction, truth)} and found.alone == []


def test_pairs_of_own_data_that_cannot_be_made(tmp_path):
    prediction = write(tmp_path / "pred" / "a_gt.nii.gz", heart())
    with pytest.raises(InputError, match=r"--gt .*no such folder"):
        find_own_pairs(tmp_path / "pred", tmp_path / "data", OWN)
    write(tmp_path / "data" / "labelsTr" / "a.nii.gz", heart())
    with pytest.raises(
        InputError, match=r"a_gt\.nii\.gz: no ground truth .*looked for labelsTr/a_gt\.nii\.gz and a_gt"
    ):
        find_own_pairs(tmp_path / "pred", tmp_path / "data", OWN)
    with pytest.raises(InputError, match="no ground truth"):  # not the prediction itself
        find_own_pairs(tmp_path / "pred", tmp_path / "pred", OWN)
    with pytest.raises(InputError, match=r"--pred .*no predictions <id>\.mha there"):
        find_own_pairs(tmp_path / "pred", tmp_path / "data", replace(OWN, file_ending=".mha"))
    for place in ("labelsTr", "labelsTs"):
        write(tmp_path / "data" / place / prediction.name, heart())
    with pytest.raises(InputError, match="--gt: a_gt: both"):
        find_own_pairs(tmp_path / "pred", tmp_path / "data", OWN)
    prediction.rename(prediction.with_name("n.nii.gz"))
    with pytest.raises(InputError, match="rename the file"):
        find_own_pairs(tmp_path / "pred", tmp_path / "data", OWN)


def test_voxels_to_ignore_count_nowhere(tmp_path):
    """The metrics are those of a volume without these voxels."""
    values = np.array(OWN.values)
    true, predicted = np.zeros((2, 12, 10, 6), int)
    true[2:6, 2:8, 1:4], predicted[2:7, 2:8, 1:4] = 1, 1
    true[7:9, 2:8, 1:4], predicted[7:9, 3:8, 1:4] = 2, 2
    stored = values[true]
    stored[:, :5] = 9
    truth = write(tmp_path / "truth.nii.gz", stored)
    prediction = write(tmp_path / "prediction.nii.gz", values[predicted])
    rules = Rules(3, values=OWN.values, ignore=OWN.ignore)
    found = evaluate_pair(prediction, truth, rules)
    assert found == label_metrics(predicted[:, 5:], true[:, 5:], SPACING_MM, 3)
    regions = evaluate_pair(prediction, truth, replace(rules, regions={"both": (1, 2)}))["challenge"]["both"]
    assert regions == {
        key: value[1] for key, value in label_metrics(predicted[:, 5:] > 0, true[:, 5:] > 0, SPACING_MM, 2).items()
    }
    with pytest.raises(InputError, match=r"prediction\.nii\.gz: has the label 9 in "):
        evaluate_pair(write(prediction, stored), truth, rules)


def cubes(extra, first=1, second=2):
    """Two cubes side by side, and one voxel of each far away."""
    labels = np.zeros((6, 12, 12), np.uint8)
    labels[1:5, 1:5, 1:5], labels[1:5, 1:5, 5:9] = first, second
    if extra:
        labels[5, 11, 11], labels[0, 11, 0] = first, second
    return labels


def test_the_summary_is_nnunets(tmp_path):
    for i, name in enumerate(("case_0", "case_1")):
        write(tmp_path / "pred" / f"{name}.nii.gz", cubes(extra=i == 0))
        write(tmp_path / "gt" / f"{name}.nii.gz", cubes(extra=False))
    found = find_own_pairs(tmp_path / "pred", tmp_path / "gt", OWN)
    results = evaluate(found.pairs, Rules(3))
    summary = nnunet_summary(results, found.pairs)
    case = {
        "Dice": 0.9922480620155039,
        "IoU": 0.9846153846153847,
        "TP": 64,
        "FP": 1,
        "FN": 0,
        "TN": 799,
        "n_pred": 65,
        "n_ref": 64,
    }
    files = {
        f"{key}_file": str(path) for key, path in zip(("prediction", "reference"), found.pairs["case_0"], strict=True)
    }
    assert summary["metric_per_case"][0] == {"metrics": {"1": case, "2": case}, **files}
    assert summary["metric_per_case"][1]["metrics"]["2"]["Dice"] == 1
    assert summary["mean"]["1"] == summary["foreground_mean"] == summary["mean"]["2"]
    assert summary["foreground_mean"]["Dice"] == pytest.approx(0.9961240310077519, abs=1e-15)
    assert summary["foreground_mean"]["TN"] == 799.5 and summary["foreground_mean"]["FP"] == 0.5


def test_the_summary_of_classes_that_are_absent(tmp_path):
    """Class 2 is in neither file of case 0, is predicted in vain in case 1; class 3 is nowhere."""
    for name, predicted in (("case_0", cubes(False, 1, 0)), ("case_1", cubes(False, 1, 2))):
        write(tmp_path / "pred" / f"{name}.nii.gz", predicted)
        write(tmp_path / "gt" / f"{name}.nii.gz", cubes(False, 1, 0))
    found = find_own_pairs(tmp_path / "pred", tmp_path / "gt", OWN)
    results = evaluate(found.pairs, Rules(4))
    summary = nnunet_summary(results, found.pairs, (0, 1, 10, 3))
    cases = [case["metrics"] for case in summary["metric_per_case"]]
    assert math.isnan(cases[0]["10"]["Dice"]) and math.isnan(cases[0]["10"]["IoU"])
    assert cases[1]["10"]["Dice"] == cases[1]["10"]["IoU"] == summary["mean"]["10"]["Dice"] == 0
    assert math.isnan(summary["mean"]["3"]["Dice"]) and math.isnan(summary["foreground_mean"]["Dice"])
    assert summary["mean"]["3"]["n_ref"] == 0 and summary["mean"]["1"]["Dice"] == 1
    table = format_table(results, ("background", "one", "two", "three")).splitlines()
    assert table[4].split() == ["three", *"-----"]
    assert table[5].split()[:3] == ["mean", "foreground", "0.5000"]
    assert empty_truths(results, found.pairs, ("background", "one", "two", "three")) == [
        "1 of the 2 ground truths without two: some was predicted, so their Dice is 0: case_1 (0.96 ml)"
    ]


def test_flat_images_have_no_volume(tmp_path):
    for folder, labels in (("pred", cubes(False)[2]), ("gt", cubes(False, 1, 0)[2])):
        (tmp_path / folder).mkdir()
        Image.fromarray(labels).save(tmp_path / folder / "a.png")
    found = find_own_pairs(tmp_path / "pred", tmp_path / "gt", replace(OWN, file_ending=".png"))
    lines = empty_truths(evaluate(found.pairs, Rules(3)), found.pairs, OWN.class_names)
    assert lines == ["1 of the 1 ground truths without vessel: some was predicted, so their Dice is 0: a (16 pixels)"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder in nnU-Net's raw format with one case, a prediction of it, and the arguments of evaluate.py."""
    values = np.array(OWN.values)
    write(tmp_path / "mine" / "labelsTr" / "a.nii.gz", values[cubes(False)])
    write(tmp_path / "pred" / "a.nii.gz", values[cubes(True)])
    (tmp_path / "mine" / "dataset.json").write_text("{}")
    raw = types.SimpleNamespace(read_dataset=lambda folder: OWN)
    monkeypatch.setattr(lib.data, "raw", raw, raising=False)
    arguments = ["--data", tmp_path / "mine", "--pred", tmp_path / "pred", "--output", tmp_path / "results.json"]
    return [*map(str, arguments), "--num_workers", "1"]


def test_script_with_own_data(own, tmp_path, capsys):
    summary = tmp_path / "new" / "summary.json"
    assert script.main([*own, "--summary", str(summary)]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:4]] == [
        ["background", "0.9986"],
        ["organ", "0.9922"],
        ["vessel", "0.9922"],
    ]
    text = summary.read_text()
    assert list(json.loads(text)) == ["foreground_mean", "mean", "metric_per_case"]
    assert list(json.loads(text)["mean"]) == ["2", "4"] and text.startswith('{\n    "foreground_mean"')
    assert script.main([*own, "--overwrite", "--gt", str(tmp_path / "mine" / "labelsTr")]) == 0
    results = (tmp_path / "results.json").read_bytes()
    (tmp_path / "results.json").unlink()
    capsys.readouterr()
    assert script.main([*own, "--summary", str(summary)]) == 2
    assert f"--summary {summary}: exists already" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()
    assert script.main([*own, "--summary", str(tmp_path / "results.json")]) == 2
    assert "is --output, too" in capsys.readouterr().err
    assert script.main([*own, "--summary", str(summary), "--overwrite"]) == 0
    assert (tmp_path / "results.json").read_bytes() == results


def test_a_class_that_is_nowhere_is_nan_in_the_summary(own, tmp_path):
    write(tmp_path / "pred" / "a.nii.gz", np.zeros((6, 12, 12)))
    write(tmp_path / "mine" / "labelsTr" / "a.nii.gz", np.zeros((6, 12, 12)))
    assert script.main([*own, "--summary", str(tmp_path / "summary.json")]) == 0
    assert '"Dice": NaN' in (tmp_path / "summary.json").read_text()


def test_script_with_a_run_folder(tmp_path, folders, capsys):
    run = tmp_path / "run"
    run.mkdir()
    settings = Settings.of({"data": "acdc"})
    (run / "config.json").write_text(json.dumps(settings.as_dict()))
    assert script.find_dataset(str(run)) == (settings.dataset, None)
    arguments = ["--data", str(run), "--pred", str(folders / "pred"), "--gt", str(folders / "gt"), "--num_workers", "1"]
    assert script.main([*arguments, "--output", str(tmp_path / "results.json")]) == 0
    assert "0.4667" in capsys.readouterr().out


@pytest.mark.parametrize("data", ["nowhere", "{}", "acd"])
def test_what_is_no_data_set_is_refused(tmp_path, folders, data, capsys):
    data = data.format(tmp_path)
    assert script.main(["--data", data, "--pred", str(folders / "pred"), "--output", str(tmp_path / "r.json")]) == 2
    error = capsys.readouterr().err
    assert f"--data {data}: is no data set" in error and "no folder with dataset.json, and no run folder" in error
    assert ("did you mean acdc?" in error) == (data == "acd")


@pytest.mark.parametrize("data", ["kits", "acdc"])
def test_a_run_of_a_known_data_set_is_no_own_data(tmp_path, data):
    """Also one of the time when padding counted in the z-score, which its data set remembers."""
    config = Settings.of(vars(parseArguments(["--data", data]))).as_dict()
    del config["padding_counts"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Settings.read(tmp_path)[0].padding_counts == (data == "kits")
    assert find_dataset(str(tmp_path)) == (DATASETS[data], None)
