"""Provenance of a stage: its config, its checkpoint, and the weight files of frozen networks."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from wuerstchen_pl.checkpointing.weight_files import check_weight_files, weight_files
from wuerstchen_pl.io.atomic import Source

if TYPE_CHECKING:
    from wuerstchen_pl.stages.stage import Stage


@dataclass
class Provenance:
    """The origin of a stage, recorded in its checkpoints.

    Attributes:
        config: the ``stage`` node of the run's config.
        source: the checkpoint or model that the stage was loaded from; None for a new stage.
        encoder: fingerprint of the network whose latents the next stage is trained on; None if it
            is not known.
    """

    config: dict[str, Any] | None = None
    source: Source | None = None
    encoder: str | None = None

    def record(self, frozen: Mapping[str, nn.Module], run_dir: str | Path) -> dict[str, Any]:
        """Provenance entries of a checkpoint.

        Args:
            frozen: the stage's frozen networks by name.
            run_dir: the folder above ``checkpoints/``; frozen stages' paths are relative to it.
        """
        return {
            "stage": self.config,
            "versions": {name: version(name) for name in ("torch", "lightning")},
            "files": weight_files(frozen),
            "frozen": {
                name: {
                    "path": os.path.relpath(source["path"], run_dir),
                    "absolute_path": os.path.abspath(source["path"]),
                    "sha256": source["sha256"],
                    "encoder": encoder,
                }
                for name, source, encoder in frozen_sources(frozen)
            },
        }

    def check_resume(self, checkpoint: Mapping[str, Any], frozen: Mapping[str, nn.Module]) -> None:
        """Refuse to resume with another optimizer or other frozen weights.

        Raises:
            ValueError: naming what differs, with both values.
        """
        self._check_optimizer(checkpoint["stage"])
        check_weight_files(frozen, checkpoint["files"])
        recorded = checkpoint["frozen"]
        for name, source, _ in frozen_sources(frozen):
            expected = recorded[name]["sha256"] if name in recorded else source["sha256"]
            if source["sha256"] != expected:
                raise ValueError(
                    f"the run was started with {name} sha256 {expected[:12]}, but "
                    f"{source['path']} has {source['sha256'][:12]}; restore the old weights, or "
                    "start a new run"
                )

    def _check_optimizer(self, recorded: dict[str, Any] | None) -> None:
        current, saved = (
            ((config or {}).get("optimizer") or {}).get("_target_")
            for config in (self.config, recorded)
        )
        if current != saved:
            raise ValueError(
                f"stage.optimizer._target_={current} cannot use the optimizer state of {saved}; "
                "choose that optimizer (optimizer@stage.optimizer), or start a new run with "
                "init_from"
            )


def not_in_checkpoints(stage: "Stage") -> dict[str, nn.Module]:
    """The networks of a stage by name that are frozen, or of which only an adapter is trained."""
    has_source = {name: part for name, part in stage.named_children() if hasattr(part, "source")}
    return {**stage.frozen.present(), **has_source}


def frozen_sources(
    frozen: Mapping[str, nn.Module],
) -> Iterator[tuple[str, Source, str | None]]:
    """The name, the source and the encoder of what was read from a run or a model.

    These are frozen stages (see ``Provenance``), and networks (see ``Pretrained``).
    """
    for name, part in frozen.items():
        of_network = Provenance(source=getattr(part, "source", None))
        provenance: Provenance = getattr(part, "provenance", of_network)
        if provenance.source is not None:
            yield name, provenance.source, provenance.encoder
