"""Hyperparameters of a resumed run: those of its config, not those of its checkpoint."""

import inspect

import torch


def apply_configured(
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    configured: torch.optim.Optimizer,
) -> None:
    """Replace restored hyperparameters with configured ones; the optimizer's state is kept.

    Only constructor arguments are replaced, because some optimizers keep state in the same place,
    such as the step size that Prodigy estimates.

    Args:
        optimizer: the optimizer, after its state was restored.
        scheduler: its scheduler, after its state was restored.
        configured: a new optimizer of the same class and parameter groups, with a new scheduler.
    """
    arguments = inspect.signature(type(configured)).parameters.keys() - {"params"}
    for i, new in enumerate(configured.param_groups):
        group = optimizer.param_groups[i]
        group.update({name: new[name] for name in arguments & new.keys()})
        group["initial_lr"] = scheduler.base_lrs[i] = new["initial_lr"]
        group["lr"] = new["initial_lr"] * scheduler.lr_lambdas[i](scheduler.last_epoch)
