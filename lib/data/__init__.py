"""The data sets by name: the only registry."""

from lib.data.ACDCDataset import ACDCDataset
from lib.data.BaseDataset import BaseDataset
from lib.data.KiTSDataset import KiTSDataset
from lib.data.PhantomDataset import Phantom3DDataset, PhantomDataset

DATASETS: dict[str, type[BaseDataset]] = {
    name: dataset
    for dataset in (ACDCDataset, KiTSDataset, PhantomDataset, Phantom3DDataset)
    for name in (dataset.name, *dataset.aliases)
}


def build_dataset(config: dict) -> BaseDataset:
    """The data set of a run's settings. Raises InputError if it is not there, or cannot be split so."""
    keys = ("data_path", "cache_path", "split", "seed_data", "patch_size", "batch_size", "num_workers", "seed_train")
    return DATASETS[config["data"]](**{key: config[key] for key in keys})
