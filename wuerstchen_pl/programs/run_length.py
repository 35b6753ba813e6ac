"""Chooses the keys of a training run that are ``auto``: its number of steps, and its intervals."""

import logging
import math
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from wuerstchen_pl.distributed.launch import DistInfo
from wuerstchen_pl.plural import plural

if TYPE_CHECKING:
    from wuerstchen_pl.data.datamodule import ImageTextDataModule

logger = logging.getLogger(__name__)

AUTO = "auto"
INTERVALS = ("validate_every_steps", "checkpoint_every_steps")


def choose_run_length(cfg: DictConfig, data: "ImageTextDataModule") -> None:
    """Replace ``auto`` in the config of ``train`` by numbers.

    Args:
        cfg: the config, which is changed.
        data: its data module; opened if the number of images is needed.

    Raises:
        ValueError: if torchrun or Slurm started this process, as the data may not be prepared yet.
    """
    if cfg.trainer.max_steps == AUTO:
        if DistInfo.from_env().world_size > 1:
            raise ValueError(
                "trainer.max_steps=auto is not supported by torchrun and Slurm; set "
                "trainer.max_steps to a number"
            )
        data.prepare_data()
        data.setup()
        num_images = data.splits.epoch_samples
        cfg.trainer.max_steps = steps_for(num_images)
        images, steps = plural(num_images, "image"), plural(cfg.trainer.max_steps, "step")
        logger.info("%s: %s (trainer.max_steps)", images, steps)
    for key in INTERVALS:
        if cfg[key] == AUTO:
            cfg[key] = interval_for(cfg.trainer.max_steps)


def steps_for(num_images: int) -> int:
    """Training steps for a number of images: 100 times its square root, 1,000 to 100,000."""
    return min(100_000, max(1000, round(math.sqrt(num_images)) * 100))


def interval_for(max_steps: int) -> int:
    """Steps between validations and between checkpoints: a tenth of the run, at most 1,000."""
    return min(1000, max(1, max_steps // 10)) if max_steps >= 0 else 1000
