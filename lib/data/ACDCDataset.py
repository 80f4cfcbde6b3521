"""ACDC: short-axis cine MRI of the heart (Bernard et al., IEEE TMI 2018)."""

import re
from pathlib import Path

from lib.data.BaseDataset import BaseDataset
from lib.data.cache import SubjectFiles, all_found, subject_files
from lib.data.nifti import stem
from lib.data.preprocessing import Preprocessing


class ACDCDataset(BaseDataset):
    """100 patients, two frames each: 2D slices of 1.25 x 1.25 mm. `data_path` holds training/ or the patients."""

    name = "acdc"
    aliases = ("acdc17",)
    folder = "acdc"
    layout = "[training/]patientNNN/patientNNN_frameFF.nii.gz (ground truth: patientNNN_frameFF_gt.nii.gz)"
    how_to_get = (
        "Register at https://www.creatis.insa-lyon.fr/Challenge/acdc/, download the training set and unpack it as "
        "FOLDER/training/patient001, FOLDER/training/patient002, ..."
    )
    class_names = ("background", "RV cavity", "myocardium", "LV cavity")
    dim = "2D"
    preprocessing = Preprocessing(spacing_mm=(1.25, 1.25, None), orientation="LPS")
    patch_size = (320, 320)
    cases = range(1, 101)
    test_share = 0.2
    defaults = {
        "fms_init": 48,
        "levels": 7,
        "epochs": 500,
        "batch_size": 10,
        "lr": 1e-3,
        "wd": 1e-5,
        "optim": "adam",
        "momentum": 0.99,
        "nesterov": True,
        "val_interval": 2,
        "split": "0.9:0.1",
        "seed_train": 42,
        "seed_data": 42,
        "lambda_": 0.5,
        "tau_max": 0.3,
        "kappa": 15,
        "rho": 5,
        "mu": 0.02,
        "max_flops": "none",
        "min_filters": 2,
        "prune_between": ("0%", "100%"),
    }

    @classmethod
    def find(cls, root: Path) -> list[SubjectFiles]:
        """Both frames of every patient; the whole cine (`_4d`) is left aside."""
        return all_found(cls._in_folder(folder) for folder in (root / "training", root))

    @staticmethod
    def _in_folder(folder: Path) -> list[SubjectFiles]:
        paths = sorted(folder.glob("patient*/patient*_frame*.nii*"))
        own = re.compile(r"(patient\d{3})/\1_frame\d{2}")  # a copy in another folder is not the patient's
        subjects = {stem(path): path.parent for path in paths if own.fullmatch(f"{path.parent.name}/{stem(path)}")}
        return [subject_files(name, place, (name,), (f"{name}_gt",)) for name, place in subjects.items()]
