"""A LoRA with another rank."""

from pathlib import Path

import torch
from omegaconf import DictConfig

from wuerstchen_pl.adapters.low_rank import RankLimit, resize
from wuerstchen_pl.adapters.weights import AdapterWeights, LowRank
from wuerstchen_pl.formats import registry
from wuerstchen_pl.formats.adapter_files import read_adapter
from wuerstchen_pl.formats.lora_report import Row, write_lora
from wuerstchen_pl.formats.merged_model import adaptable_networks
from wuerstchen_pl.io.output_folder import claimed


def run(cfg: DictConfig) -> None:
    """Read the LoRA, and write it with another rank and a report."""
    limit = RankLimit(cfg.rank, cfg.share)
    limit.check()
    with claimed(Path(cfg.to), key="to", must_be_empty=True):
        networks = adaptable_networks(registry.read_model(cfg.base))
        resized: AdapterWeights = {}
        rows: list[Row] = []
        for layer, weights in read_adapter(cfg.lora, networks).items():
            if not isinstance(weights, LowRank) or weights.magnitude is not None:
                raise ValueError(
                    f"lora={cfg.lora} has another adapter than LoRA, such as DoRA, which cannot be "
                    "resized; merge it with python -m wuerstchen_pl.convert, and extract a LoRA"
                )
            resized[layer] = smaller = resize(weights, limit)
            change = weights.up @ weights.down
            norms = [torch.linalg.matrix_norm(m) for m in (change, change - smaller.delta(change))]
            rows.append(Row(layer, smaller.rank, *map(float, norms)))
        write_lora(Path(cfg.to), resized, networks, rows)
