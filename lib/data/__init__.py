"""The data sets by name: the only registry.

It is made when it is first asked for: whoever reads images alone (`lib.data.nifti`) does not load torch for that.
"""

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lib.data.BaseDataset import BaseDataset

    DATASETS: dict[str, type[BaseDataset]]  # by name and alias


def __getattr__(name: str) -> object:
    if name == "DATASETS":
        return _datasets()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _datasets() -> "dict[str, type[BaseDataset]]":
    from lib.data.ACDCDataset import ACDCDataset
    from lib.data.KiTSDataset import KiTSDataset
    from lib.data.PhantomDataset import Phantom3DDataset, PhantomDataset

    datasets = (ACDCDataset, KiTSDataset, PhantomDataset, Phantom3DDataset)
    return {name: dataset for dataset in datasets for name in (dataset.name, *dataset.aliases)}
