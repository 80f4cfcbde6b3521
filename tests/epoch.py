"""A made-up training at the end of its first epoch."""

import torch

from lib.checkpoint import TrainingState
from lib.models import Sauron
from lib.models.size import summary
from lib.pruning.rules import Rule


def row(train_loss, val_loss, dice=(0.9, 0.5, None)):
    return {"train_loss": train_loss, "val_loss": val_loss, "val_dice": list(dice), "seconds": 2.0, "lr": 0.1}


def made_up_state(folder, rule=None):
    """Of a small network, each filter of which lies as far as can be from the first one of its block; `lines` is what
    was logged."""
    (folder / "models").mkdir()
    torch.manual_seed(0)
    model = Sauron(1, 3, 4, 3)
    model.initialize()
    lines = []
    optimizer = torch.optim.Adam(model.parameters())
    state = TrainingState(model, optimizer, folder, lines.append, epoch=1, rule=rule or Rule())
    state.lines = lines
    state.unpruned = summary(model, (8, 8))
    state.rows = [row(1.0, 1.0) | {"epoch": 1}]
    state.delta_prune = {
        block.name: (torch.ones(block.out_filters).index_fill(0, torch.tensor(0), 0), 0)
        for block in model.blocks()
        if not block.head
    }
    return state
