"""KiTS: abdominal CT with kidneys and kidney tumors (Heller et al., arXiv 1904.00445): volumes (slices, rows, columns).

The folder holds the case folders, or data/ (KiTS19, KiTS21) or dataset/ (KiTS23) with them.
"""

import re
from dataclasses import replace
from pathlib import Path

from lib.data.BaseDataset import BaseDataset, Preprocessing, SubjectFiles, all_found, subject_files
from lib.data.images import NIFTI, stem

LEFT_OUT = (15, 23, 37, 68, 125, 133)  # cases whose labels the paper did not train on
LABELS = ("segmentation", "aggregated_MAJ_seg")  # the ground truth's name in KiTS19 and KiTS23, and in KiTS21


def find_cases(root: Path) -> list[SubjectFiles]:
    """Every case that has an image."""
    return all_found(_in_folder(folder) for folder in (root, root / "data", root / "dataset"))


def _in_folder(folder: Path) -> list[SubjectFiles]:
    images = [path for path in sorted(folder.glob("case_*/imaging.nii*")) if stem(path) == "imaging"]
    return [
        subject_files(place.name, place, ("imaging",), LABELS)
        for place in dict.fromkeys(image.parent for image in images)
        if re.fullmatch(r"case_\d{5}", place.name)
    ]


def find_truths(root: Path) -> list[tuple[str, Path]]:
    """Every CASE/segmentation and CASE/aggregated_MAJ_seg, also in data/ and dataset/."""
    paths = (path for folder in (".", "data", "dataset") for path in sorted((root / folder).glob("*/*.nii*")))
    return [(path.parent.name, path) for path in paths if stem(path, NIFTI) in LABELS]


# As in the paper: cases 0-209 without `LEFT_OUT` train and validate, 210-299 are the test set. A cyst (label 3 since
# KiTS21) counts as kidney. Cases that KiTS23 adds (from 300 on) belong to no partition.
KiTSDataset = BaseDataset(
    name="kits",
    licence="CC BY-NC-SA 4.0",
    aliases=("kits19",),
    class_names=("background", "kidney", "tumor"),
    find=find_cases,
    find_truths=find_truths,
    layout="[data/]case_NNNNN/imaging.nii.gz (ground truth: case_NNNNN/segmentation.nii.gz)",
    how_to_get="Clone https://github.com/neheller/kits19, run its starter_code/get_imaging.py, and lay the cases out "
    "as FOLDER/data/case_00000, FOLDER/data/case_00001, ...",
    preprocessing=Preprocessing(
        spacing_mm=(3.22, 1.62, 1.62),
        clip=(-79, 304),
        shift=101,
        scale=76.9,
        min_size=(80, 160, 160),
        zscore=False,
        orientation="IPL",  # slices from top to bottom, rows, columns, as the challenge stores them
    ),
    patch_size=(80, 160, 160),
    cases=tuple(case for case in range(210) if case not in LEFT_OUT),
    test_share=0.0,
    test_cases=range(210, 300),
    patches_per_volume=2,
    merged_labels={3: 1},
    regions={"kidney_and_tumor": (1, 2), "tumor": (2,)},
    challenge_name="prediction_{case:05d}",
    defaults={"fms_init": 24, "levels": 5, "batch_size": 2},
)

# The public training set of KiTS23: 489 cases, cysts a class of their own. The challenge's test set is not public, so a
# fifth of the cases is set apart to test.
KiTS23Dataset = replace(
    KiTSDataset,
    name="kits23",
    aliases=(),
    class_names=("background", "kidney", "tumor", "cyst"),
    layout="[dataset/]case_NNNNN/imaging.nii.gz (ground truth: case_NNNNN/segmentation.nii.gz)",
    how_to_get="Clone https://github.com/neheller/kits23 as FOLDER and run its kits23_download_data, which lays the "
    "cases out as FOLDER/dataset/case_00000, FOLDER/dataset/case_00001, ...",
    cases=(*range(300), *range(400, 589)),
    test_share=0.2,
    test_cases=(),
    merged_labels={},
    regions={"kidney_and_masses": (1, 2, 3), "masses": (2, 3), "tumor": (2,)},
    challenge_name=None,
)
