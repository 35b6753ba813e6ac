"""Images in the loggers that show them."""

from collections.abc import Iterable

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from PIL import Image


def log_image(loggers: Iterable[Logger], name: str, image: Image.Image, step: int) -> None:
    """Send an image to TensorBoard, Weights & Biases and others with Lightning's ``log_image``."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, np.asarray(image), step, dataformats="HWC")
        elif hasattr(logger, "log_image"):
            logger.log_image(name, [image], step=step)
