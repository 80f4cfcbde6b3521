"""What settings stand for: the data set, the network, the loss, the optimizer and the rule that prunes."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lib.data.loading import Loader
from lib.loss import LOSSES
from lib.models import MODELS, architecture, check_filters
from lib.models.filters import read_filters
from lib.models.flat import flops_of_width, of_width, widest
from lib.models.nnUNet import nnUNet
from lib.models.size import count_filters, summary
from lib.pruning.rules import Bounds, BudgetRule, PaperRule, RandomRule, Rule
from lib.settings import Settings
from lib.system.cli import flops_of, share_of
from lib.system.error import InputError


def build_dataset(settings: Settings) -> Loader:
    """The data of a run. Raises InputError if they are not there, or cannot be split so."""
    keys = ("data_path", "cache_path", "split", "seed_data", "patch_size", "batch_size", "num_workers", "seed_train")
    keys += ("fold", "steps", "foreground")
    return Loader(settings.dataset, **{key: getattr(settings, key) for key in keys})


def build_model(settings: Settings, weights: dict[str, Tensor] | None = None, source: str | Path = "") -> nnUNet:
    """The network of a run, with the widths of a saved model, or else of the filter files, where given. A flat network
    has the width of its settings, whatever is given.

    Raises InputError where they do not fit one another; `source` names the file of `weights`.
    """
    paths = {"in": settings.in_filters, "out": settings.out_filters}
    files = {key: read_filters(path) for key, path in paths.items() if path}
    filters = None
    if settings.model == "flat":
        filters = count_filters(_flat(settings))
    elif weights is not None:
        filters = architecture(weights, source)["filters"]
    elif files:
        if "out" not in files:
            raise InputError("--in_filters needs --out_filters: it is the filters that make the network")
        filters = {"out": files["out"]}
    imp_fun = "euc_rand" if settings.imp_fun == "random" else settings.imp_fun  # whose values the rule deals
    distances = {"dist_fun": settings.dist_fun, "imp_fun": imp_fun} if settings.model == "sauron" else {}
    model = MODELS[settings.model](**_shape(settings), filters=filters, **distances)
    for key, given in files.items():
        check_filters(given, count_filters(model)[key], paths[key], source or "the network")
    return model


def build_unpruned(settings: Settings) -> nnUNet:
    """nnUNet as its settings say, which sizes are compared with: no filter files, and no flat width."""
    return nnUNet(**_shape(settings))


def _shape(settings: Settings) -> dict:
    """The arguments of nnUNet."""
    keys = ("modalities", "n_classes", "fms_init", "fms_max", "levels", "dim")
    shape = {key: getattr(settings, key) for key in keys}
    for key in ("strides", "kernels"):
        shape[key] = [[*map(int, row)] for row in getattr(settings, key) or ()] or None
    return shape


def _flat(settings: Settings) -> nnUNet:
    """The widest flat network that --max_flops allows, or without it --fms_init, and --width_multiple divides; it has
    no weights. Raises InputError if none is small enough."""
    with torch.device("meta"):
        unpruned = build_unpruned(settings)
    limit = flops_of(settings.max_flops, summary(unpruned, settings.patch_size)["flops"])
    most = settings.fms_max if limit else min(settings.fms_init, settings.fms_max)
    multiple = settings.width_multiple
    if multiple > most:
        flag = "--fms_max" if limit or settings.fms_max < settings.fms_init else "--fms_init"
        raise InputError(f"--width_multiple {multiple}: is more than {flag} {most}; give a smaller one")
    width = widest(unpruned, range(multiple, most + 1, multiple), limit or math.inf, settings.patch_size)
    if width is None:
        least = f"{flops_of_width(unpruned, multiple, settings.patch_size):,} FLOPs at least"
        least += f" with --width_multiple {multiple}" * (multiple > 1)
        raise InputError(f"--max_flops {settings.max_flops}: a flat network has {least}; give more")
    return of_width(unpruned, width)


def build_loss(settings: Settings) -> nn.Module:
    loss, ignore = LOSSES[settings.loss], settings.dataset.ignore is not None
    return loss(settings.lambda_, ignore=ignore) if loss.uses_distances else loss(ignore=ignore)


def build_optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    if settings.optim == "adam":
        return torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.wd)
    return torch.optim.SGD(
        model.parameters(),
        lr=settings.lr,
        weight_decay=settings.wd,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
    )


def build_rule(settings: Settings, unpruned_flops: int, validates: bool) -> Rule:
    """The rule that a run is pruned by. validates: whether there is a validation set."""
    if not settings.prunes:
        return Rule()
    first, last = (share_of(moment) * settings.epochs for moment in settings.prune_between)
    bounds = Bounds((first, last), settings.min_filters, settings.max_prune_fraction or 1.0, settings.width_multiple)
    if settings.has_budget:
        whole = math.floor(round(first, 6)), math.ceil(round(last, 6))  # the last one is to see the largest threshold
        limits = flops_of(settings.max_flops, unpruned_flops), settings.max_ms
        rule = BudgetRule(*limits, replace(bounds, between=whole), settings.patch_size, unpruned_flops)
    else:
        rule = PaperRule(settings.tau_max, settings.kappa, settings.rho, settings.mu, bounds, validates)
    return RandomRule(rule) if settings.imp_fun == "random" else rule


def check_amp(settings: Settings, device: torch.device) -> None:
    """Raise InputError where --amp would spoil a training: on the CPU, torch's bfloat16 gradients of 3D convolutions
    are not to be relied on where maps are a few voxels thin."""
    if settings.amp and settings.dim == "3D" and device.type == "cpu":
        raise InputError(
            "--amp: gradients of 3D networks in bfloat16 are unsafe on the CPU; leave it out, or use a GPU"
        )
