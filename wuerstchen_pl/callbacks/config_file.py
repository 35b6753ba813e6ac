"""``config.yaml``: the config of a run."""

from pathlib import Path

import lightning as L
from omegaconf import DictConfig, OmegaConf

from wuerstchen_pl.io.atomic import write_text


class ConfigFile(L.Callback):
    """Write the resolved config to the run's folder before the first step.

    It must come after all callbacks that can refuse a run. A run that is refused, such as a resumed
    one with other networks, thus does not overwrite the config of the run that it found.

    Args:
        cfg: the config of ``train``, with ``paths.output_dir``.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.path = Path(cfg.paths.output_dir) / "config.yaml"
        self.text = OmegaConf.to_yaml(cfg, resolve=True)
        self._written = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Write the config once, on one process."""
        if trainer.is_global_zero and not self._written:
            write_text(self.path, self.text)
        self._written = True
