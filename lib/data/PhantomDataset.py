"""The built-in synthetic data set, which writes itself."""

from pathlib import Path

from lib.data.ACDCDataset import ACDCDataset
from lib.data.cache import SubjectFiles
from lib.data.phantom import write_phantom
from lib.data.preprocessing import Preprocessing


class PhantomDataset(ACDCDataset):
    """30 patients in ACDC's layout, drawn by `lib.data.phantom`, with a network and a schedule for two CPU cores.

    They are written to `data_path` (by default data/phantom) if they are not there yet.
    """

    name = "phantom"
    aliases = ()
    folder = "phantom"
    preprocessing = Preprocessing(spacing_mm=(2.5, 2.5, None))
    patch_size = (64, 64)
    cases = range(1, 31)
    defaults = ACDCDataset.defaults | {
        "fms_init": 16,
        "levels": 4,
        "epochs": 60,
        "val_interval": 1,
        "tau_max": 0.46,
        "kappa": 4,
        "rho": 2,
        "mu": 0.1,
        "prune_between": ("0%", "80%"),  # then train what is left
    }

    def _find(self, data_path: str | Path | None) -> list[SubjectFiles]:
        root = Path(data_path or Path("data") / self.folder)
        write_phantom(root, n_patients=len(self.cases))
        return self.find(root)
