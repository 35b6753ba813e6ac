"""The config of a run, on disk and in its loggers."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf

from wuerstchen_pl.io.atomic import write_text


class ConfigFile(L.Callback):
    """Write the resolved config to ``config.yaml`` and to all loggers before the first step.

    It must come after all callbacks that can refuse a run. A run that is refused, such as a resumed
    one with other networks, thus does not overwrite the config of the run that it found.

    TensorBoard gets the config as text, and at the end as hyperparameters with the last validation
    loss, as it lists hyperparameters only together with a result.

    Args:
        cfg: the config of ``train``, with ``paths.output_dir``.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.path = Path(cfg.paths.output_dir) / "config.yaml"
        self.text = OmegaConf.to_yaml(cfg, resolve=True)
        self.hyperparameters: Any = OmegaConf.to_container(cfg, resolve=True)
        self._written = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Write the config once, on one process."""
        if trainer.is_global_zero and not self._written:
            write_text(self.path, self.text)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    in_markdown = self.text.replace("\n", "\n    ")
                    logger.experiment.add_text("config", f"    {in_markdown}", trainer.global_step)
                else:
                    logger.log_hyperparams(self.hyperparameters)
        self._written = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give TensorBoard the hyperparameters with the result."""
        result = trainer.callback_metrics.get("val/loss")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and result is not None:
                metrics = {"val/loss": float(result)}
                logger.log_hyperparams(self.hyperparameters, metrics, trainer.global_step)
