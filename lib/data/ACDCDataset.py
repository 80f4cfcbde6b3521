"""ACDC: short-axis cine MRI of the heart (Bernard et al., IEEE TMI 2018).

100 patients, two frames each: 2D slices of 1.25 x 1.25 mm. The folder holds training/ or the patients.
"""

import re
from pathlib import Path

from lib.data.BaseDataset import BaseDataset, Preprocessing, SubjectFiles, all_found, subject_files
from lib.data.images import NIFTI, TRUTH, stem


def find_frames(root: Path) -> list[SubjectFiles]:
    """Both frames of every patient; the whole cine (`_4d`) is left aside."""
    return all_found(_in_folder(folder) for folder in (root / "training", root))


def _in_folder(folder: Path) -> list[SubjectFiles]:
    paths = sorted(folder.glob("patient*/patient*_frame*.nii*"))
    own = re.compile(r"(patient\d{3})/\1_frame\d{2}")  # a copy in another folder is not the patient's
    subjects = {stem(path): path.parent for path in paths if own.fullmatch(f"{path.parent.name}/{stem(path)}")}
    return [subject_files(name, place, (name,), (f"{name}_gt",)) for name, place in subjects.items()]


def find_truths(root: Path) -> list[tuple[str, Path]]:
    """Every PATIENT/PATIENT_..._gt, also in training/ and testing/."""
    paths = (path for folder in ("training", "testing", ".") for path in sorted((root / folder).glob("*/*.nii*")))
    names = ((path, stem(path, NIFTI) or "") for path in paths)
    return [
        (name.removesuffix(TRUTH), path)
        for path, name in names
        if name.endswith(TRUTH) and path.parent.name == name.split("_")[0]
    ]


ACDCDataset = BaseDataset(
    name="acdc",
    licence="CC BY-NC-SA 4.0",
    aliases=("acdc17",),
    class_names=("background", "RV cavity", "myocardium", "LV cavity"),
    find=find_frames,
    find_truths=find_truths,
    layout="[training/]patientNNN/patientNNN_frameFF.nii.gz (ground truth: patientNNN_frameFF_gt.nii.gz)",
    how_to_get="Register at https://www.creatis.insa-lyon.fr/Challenge/acdc/, download the training set and unpack it "
    "as FOLDER/training/patient001, FOLDER/training/patient002, ...",
    preprocessing=Preprocessing(spacing_mm=(1.25, 1.25, None), orientation="LPS"),
    patch_size=(320, 320),
    cases=range(1, 101),
    test_share=0.2,
)
