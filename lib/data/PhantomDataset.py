"""The built-in synthetic data sets, which write themselves where they are not there yet."""

from dataclasses import replace

from lib.data.ACDCDataset import ACDCDataset
from lib.data.BaseDataset import Preprocessing
from lib.data.KiTSDataset import KiTSDataset
from lib.data.phantom import write_phantom, write_phantom3d

# 30 patients in ACDC's layout, with a network and a schedule for two CPU cores.
PhantomDataset = replace(
    ACDCDataset,
    name="phantom",
    licence="",
    aliases=(),
    write=write_phantom,
    preprocessing=Preprocessing(spacing_mm=(2.5, 2.5, None), orientation="RAS"),  # as it is written
    patch_size=(64, 64),
    cases=range(1, 31),
    defaults={
        "fms_init": 16,
        "levels": 4,
        "epochs": 60,
        "lr": 3e-3,
        "val_interval": 1,
        "tau_max": 0.46,
        "kappa": 4,
        "rho": 2,
        "mu": 0.1,
        "max_flops": "25%",
        "min_filters": 8,
        "prune_between": ("0%", "80%"),  # without a budget; then train what is left
    },
)

# 15 small abdomens in KiTS's layout, all labelled, with a network that two CPU cores train in minutes.
Phantom3DDataset = replace(
    KiTSDataset,
    name="phantom3d",
    licence="",
    aliases=(),
    write=write_phantom3d,
    preprocessing=replace(KiTSDataset.preprocessing, spacing_mm=(5.2, 6.6, 6.6), min_size=(16, 32, 32)),
    patch_size=(16, 32, 32),
    cases=range(15),
    test_share=0.2,
    test_cases=(),
    defaults=KiTSDataset.defaults
    | {
        "fms_init": 8,
        "levels": 4,
        "epochs": 40,
        "batch_size": 1,
        "lr": 5e-3,
        "val_interval": 1,
        "tau_max": 0.4,
        "kappa": 2,
        "rho": 3,
        "mu": 0.1,
        "prune_between": ("0%", "80%"),
    },
)
