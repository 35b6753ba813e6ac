"""Settings that an optimizer cannot be combined with, refused before anything is built."""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from wuerstchen_pl.cli.jobs import typed_keys

GROUP = "optimizer@stage.optimizer"
NOT_SHARDED = ("bitsandbytes.", "prodigyopt.", "torch.optim.Adafactor")
"""Optimizers whose state or step needs whole weights."""


def check_optimizer(cfg: DictConfig, *, is_sharded: bool) -> None:
    """Refuse a learning rate of 0, and what the optimizer does not support.

    Args:
        cfg: the config of ``train``.
        is_sharded: whether the weights are sharded over the processes.

    Raises:
        ValueError: naming the key, its value and the fix.
    """
    optimizer = cfg.stage.optimizer
    _refuse_unread(optimizer)
    if optimizer.lr <= 0:
        raise ValueError(f"stage.optimizer.lr={optimizer.lr} is out of range; use more than 0")
    choice = f"{GROUP}={HydraConfig.get().runtime.choices[GROUP]}"
    if is_sharded and optimizer._target_.startswith(NOT_SHARDED):
        raise ValueError(
            f"{choice} does not support sharded weights; use trainer=ddp, or {GROUP}=adamw, whose "
            "state is sharded"
        )
    if optimizer._target_.startswith("schedulefree."):
        _check_schedule_free(choice, cfg.stage)
    if optimizer._target_.startswith("prodigyopt."):
        _check_prodigy(choice, cfg.stage)


def _refuse_unread(optimizer: DictConfig) -> None:
    """Refuse typed values of AdamW that the chosen optimizer does not refer to."""
    references = str(OmegaConf.to_container(optimizer, resolve=False))
    for key in typed_keys():
        if key.startswith("adamw.") and f"${{{key}}}" not in references:
            raise ValueError(f"{key} is not used; set stage.optimizer.{key.partition('.')[2]}")


def _check_schedule_free(choice: str, stage: DictConfig) -> None:
    has_ema = OmegaConf.select(stage, "ema.decay", default=0) > 0
    decays = OmegaConf.select(stage, "lr_schedule.decay", default="none") != "none"
    if has_ema or decays:
        raise ValueError(
            f"{choice} keeps a mean of the weights itself, at a constant learning rate; set "
            "stage.ema.decay=0 stage.lr_schedule.decay=none"
        )
    if "vqgan" in stage:
        raise ValueError(
            f"{choice} keeps a mean of the weights, also of codes that Stage A restarts; use "
            f"{GROUP}=adamw"
        )


def _check_prodigy(choice: str, stage: DictConfig) -> None:
    if "vqgan" in stage:
        raise ValueError(
            f"{choice} estimates one learning rate, and Stage A trains two networks against each "
            f"other; use {GROUP}=adamw"
        )
    if stage.get("text_encoder_lr") is not None:
        raise ValueError(
            f"stage.text_encoder_lr={stage.text_encoder_lr} needs another optimizer than {choice}, "
            "which estimates one learning rate; set stage.text_encoder_lr=null"
        )
