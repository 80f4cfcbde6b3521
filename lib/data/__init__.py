"""The data sets by name: the only registry. It does not load torch, which whoever reads images alone does without."""

from lib.data.ACDCDataset import ACDCDataset
from lib.data.BaseDataset import BaseDataset
from lib.data.KiTSDataset import KiTS23Dataset, KiTSDataset
from lib.data.PhantomDataset import Phantom3DDataset, PhantomDataset

DATASETS: dict[str, BaseDataset] = {
    name: dataset
    for dataset in (ACDCDataset, KiTSDataset, KiTS23Dataset, PhantomDataset, Phantom3DDataset)
    for name in (dataset.name, *dataset.aliases)
}
