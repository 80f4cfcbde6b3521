"""From a folder in nnU-Net's raw format to a data set that can be trained on: checks, folds, and nnU-Net's plan."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lib.data import planning, raw, splits
from lib.data.BaseDataset import PUBLISHED, BaseDataset, Preprocessing
from lib.data.examination import examine

STEPS, FOREGROUND = 250, 0.33  # of an epoch; share of the patches that hold foreground: nnU-Net's
MEMORY_GB = 8.0  # nnU-Net's
BUDGET = "20%"  # of the unpruned network's FLOPs
GIVEN = ("dim", "axes", "spacing", "patch_size", "levels", "fms_init", "fms_max", "batch_size", "normalization")


@dataclass(frozen=True)
class OwnData:
    """dataset: with its plan; plan: what it was made from; notes: lines for the log."""

    dataset: BaseDataset
    plan: planning.Plan
    notes: list[str]


def plan_folder(folder: Path, flags: Mapping[str, object], cache_path: Path) -> OwnData:
    """Check all files of a folder, and plan. `flags`: of train.py, None where not given.

    Raises InputError with all that is wrong with the files, or for flags that contradict one another.
    """
    dataset = raw.read_dataset(folder)
    found = examine(dataset, folder, cache_path, allow_mismatch=bool(flags.get("allow_mismatch")))
    ids = [file.id for file in dataset.find(folder)]
    fold = flags.get("fold") or "0"
    folds, notes = splits.folds_of(folder, ids), list(found.notes)
    if fold != splits.ALL:
        notes += splits.shared_patients(*splits.fold_of(folds, fold, ids))
    given = {key: flags[key] for key in GIVEN if flags.get(key) is not None}
    given |= {key: [tuple(map(int, row)) for row in flags[key]] for key in ("strides", "kernels") if flags.get(key)}
    given |= {"crop": False} if flags.get("no_crop") else {}
    sizes, memory_gb = (raw.n_labels(dataset), found.n_training), flags.get("gpu_memory") or MEMORY_GB
    plan = planning.plan(found.fingerprint, dataset.channels, *sizes, given=given, memory_gb=memory_gb)
    dataset = replace(planned(dataset, plan, found.orientation), folds=folds)
    if flags.get("allow_mismatch"):
        dataset = replace(dataset, preprocessing=replace(dataset.preprocessing, by_index=True))
    return OwnData(dataset, plan, notes)


def planned(dataset: BaseDataset, plan: planning.Plan, stored: str) -> BaseDataset:
    """The data set as planned. stored: where the stored axes lead to, such as "LPS"; a plan speaks of them in reverse
    and transposed, and slices (2D) here are those along the last axis."""
    reverse = stored[::-1]
    codes, spacing_mm = [reverse[axis] for axis in plan.transpose], plan.spacing
    if plan.dim == "2D":
        codes, spacing_mm = [*codes[1:], codes[0]], (*plan.spacing[1:], None)
    defaults = {key: getattr(plan, key) for key in ("levels", "fms_init", "fms_max", "batch_size")}
    defaults |= {key: tuple("".join(map(str, row)) for row in getattr(plan, key)) for key in ("strides", "kernels")}
    return replace(
        dataset,
        preprocessing=Preprocessing(
            tuple(spacing_mm),
            orientation="".join(codes),
            zscore=False,
            normalizations=plan.normalizations,
            crop=plan.crop,
        ),
        patch_size=tuple(plan.patch_size),
        patches_per_volume=plan.patches_per_volume,
        defaults=PUBLISHED | defaults | {"steps": STEPS, "foreground": FOREGROUND, "max_flops": BUDGET},
    )
