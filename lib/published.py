"""Runs of the published code: their config.json and pickled histories (*.pkl), and how a training goes on from them."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lib.models import architecture
from lib.models.BaseModel import read_state
from lib.models.nnUNet import nnUNet
from lib.system.error import InputError
from lib.system.files import read_text
from lib.system.pickles import Foreign, unpickle

LARGEST = 2**22  # bytes of a file; 500 epochs of the largest network need a tenth
WIDEST = 2**16  # filters of a block
DISTANCE_LOSS = "DS_CrossEntropyDiceLoss_Distance"
PRUNES = "_end_epoch_prune"  # is among the callbacks of a run that prunes


def read_config(folder: Path) -> dict | None:
    """config.json of a published run; {} where its folder lacks the file, None where the folder is of no such run."""
    path = folder / "config.json"
    if not path.exists():
        return {} if (folder / "tr_loss_history.pkl").exists() else None
    try:
        config = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return None
    data = config.get("data") if isinstance(config, dict) else None  # a name in a config.json of ours
    return config if isinstance(data, dict) and isinstance(data.get("name"), str) else None


def settings(folder: Path, model: Path) -> dict:
    """What the config.json of a published run says, by our names, unchecked. The levels are those of `model`, and so is
    the number of filters where the file does not say it.

    Raises InputError if the file has not the published form, or `model` is none.
    """
    config = read_config(folder)
    try:
        optimizer, network = config.get("optim_params", {}), config.get("architecture", {})
        keys = ("optim", "epochs", "batch_size", "val_interval", "seed_train", "seed_data", "loss")
        said = {key: config.get(key) for key in keys}
        said["wd"] = optimizer.get("weight_decay")
        said |= {key: optimizer.get(key) for key in ("lr", "momentum", "nesterov")}
        said |= {key: network.get(key) or None for key in ("fms_init", "dist_fun", "imp_fun")}
        said["split"] = ":".join(map(str, config["split"])) if "split" in config else None
        if said["loss"] == DISTANCE_LOSS:
            said["loss"] = None  # our default, which --lambda 0 and --model nnunet change
        if network.get("dist_fun") == network.get("imp_fun") == "":
            said["model"] = "nnunet"
        elif PRUNES not in config.get("callbacks", [PRUNES]):
            said["no_prune"] = True
    except (AttributeError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'}: is damaged ({error}); mend it, or take it away") from error
    shape = architecture(read_state(model), model)
    said["levels"] = shape["levels"]
    said["fms_init"] = said["fms_init"] or _unpruned_width(folder, shape["filters"]["out"])
    return {key: value for key, value in said.items() if value not in (None, "None")}


def _unpruned_width(folder: Path, now: dict[str, int]) -> int:
    """The filters of the first level without pruning, as far as they can be told from the blocks of the encoder: what
    they have now, and had after the first epoch that is known. The level below has twice as many."""
    first = {name: counts[0] for name, counts in _read_widths(folder).items() if counts}
    found = []
    for name in (name for name in now if name.startswith("enc_")):
        level = (int(name.rpartition("_")[2]) - 1) // 2
        found.append(math.ceil(max(now[name], first.get(name, 0)) / 2**level))
    return max(found)


@dataclass(frozen=True)
class History:
    """What is known of the newest epochs, oldest first, up to `epoch`; the blocks' values are those after it."""

    epoch: int
    train_losses: list[float]
    val_losses: dict[int, float]  # by epoch
    widths: list[dict[str, int]]  # filters by block, heads included, after each epoch
    taus: dict[str, float]  # by prunable block; empty where nothing was to be pruned
    patiences: dict[str, int]
    notes: list[str]  # for the log


def read_history(folder: Path, epoch: int, model: nnUNet) -> History:
    """The histories of a published run after `epoch`, at whose end `model` was saved.

    Raises InputError if they are damaged, or not those of this epoch and kind of network.
    """
    config = read_config(folder)
    train_losses = _read(folder, "tr_loss_history", list, _is_number)
    val_losses = _read(folder, "val_loss_history", list, _is_number)
    taus = _read(folder, "mod_thr", dict, lambda value: _is_number(value) and 0 <= value <= 1)
    patiences = _read(folder, "mod_patience", dict, lambda value: type(value) is int and 0 <= value < 10**6)
    widths = _read_widths(folder)

    n = len(train_losses)
    # A run that was itself continued trained one epoch twice, or knows nothing of those before.
    was_continued = type(config.get("epoch_start")) is int and config["epoch_start"] > 1
    if n == 0 or n != epoch and not was_continued:
        raise InputError(
            f"--epoch_start {epoch}: {folder / 'tr_loss_history.pkl'} has the losses of {n} epochs; give the number of "
            "the newest finished epoch, and its model"
        )
    for name, values in (("mod_thr", taus), ("mod_patience", patiences)):
        for block in model.blocks():
            if (taus or patiences) and not block.head and block.name not in values:
                raise InputError(
                    f"{folder / name}.pkl: has no {block.name}, a block of the model; give that of its run"
                )

    now = {block.name: block.out_filters for block in model.blocks()}
    notes = [f"goes on after epoch {epoch} of {folder}, a run of the published code; the optimizer is new"]
    if widths or taus:
        # The published code writes the file before it adds the newest epoch, which a run that goes on then lacks.
        file, counts = folder / "channels_history.pkl", {len(widths.get(name, [])) for name in now}
        if len(counts) > 1 or not (counts <= {n - 1, n} or was_continued and max(counts) < n):
            raise InputError(f"{file}: has not the blocks of the model, each in {n} epochs; give that of its run")
        rows = [{name: widths[name][i] for name in now} for i in range(max(counts))]
        newest = rows.pop() if len(rows) == n else now
        for name in [name for name in now if newest[name] != now[name]][:1]:
            notes.append(
                f"{file}: {name} has {newest[name]} filters after epoch {epoch}, but {now[name]} in the model, whose "
                "widths count"
            )
        rows.append(now)
    else:  # no block was ever to be pruned
        rows = [now] * n

    n = min(n, epoch, len(rows))
    return History(
        epoch,
        train_losses[-n:],
        _by_epoch(folder, val_losses, epoch, config.get("val_interval"), was_continued),
        rows[-n:],
        taus,
        patiences,
        notes,
    )


def _by_epoch(folder: Path, losses: list[float], epoch: int, interval: object, was_continued: bool) -> dict[int, float]:
    """The validation losses by their epochs, the multiples of `interval` (if that is known)."""
    if not losses:
        return {}
    if type(interval) is not int or interval < 1:
        interval = max(1, epoch // len(losses))
    epochs = list(range(interval, epoch + 1, interval))
    if len(losses) > len(epochs) and not was_continued:
        raise InputError(
            f"{folder / 'val_loss_history.pkl'}: has {len(losses)} losses, but of {epoch} epochs {len(epochs)} were "
            f"validated (every {interval})"
        )
    n = min(len(losses), len(epochs))
    return dict(zip(epochs[-n:], losses[-n:], strict=True)) if n else {}


def _read_widths(folder: Path) -> dict[str, list[int]]:
    def are_widths(counts: object) -> bool:
        return isinstance(counts, list) and all(type(count) is int and 0 < count <= WIDEST for count in counts)

    return _read(folder, "channels_history", dict, are_widths)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e15


def _read(folder: Path, name: str, kind: type, valid: Callable[[object], bool]) -> list | dict:
    """The list, or the dictionary with names as keys, of a pickle; each value is `valid`. Raises InputError if not."""
    path = folder / f"{name}.pkl"
    try:
        if path.stat().st_size > LARGEST:
            raise Foreign(f"has more than {LARGEST} bytes")
        content = unpickle(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); --history needs all of a run's histories"
        ) from error
    except Foreign as error:
        raise InputError(f"{path}: {error}; a history holds lists, dictionaries and numbers alone") from error
    except Exception as error:  # whatever a damaged file leads to
        raise InputError(f"{path}: is damaged ({type(error).__name__}); give another copy of it") from error
    values = content.values() if isinstance(content, dict) else content
    if not isinstance(content, kind) or not all(map(valid, values)):
        raise InputError(f"{path}: does not hold a {kind.__name__} of what belongs there; give another copy of it")
    return content
