"""The change from one model to another as a LoRA."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from wuerstchen_pl.adapters.low_rank import RankLimit, truncate
from wuerstchen_pl.adapters.targets import layer_names
from wuerstchen_pl.adapters.weights import AdapterWeights, weight_part, weight_rows
from wuerstchen_pl.formats import registry
from wuerstchen_pl.formats.lora_report import Row, write_lora
from wuerstchen_pl.formats.merged_model import adaptable_networks
from wuerstchen_pl.formats.model import Model, Part, compare_shapes
from wuerstchen_pl.io.output_folder import claimed


def run(cfg: DictConfig) -> None:
    """Read both models, and write the LoRA with a report."""
    limit = RankLimit(cfg.rank, cfg.share)
    limit.check()
    with claimed(Path(cfg.to), key="to", must_be_empty=True):
        base, tuned = registry.read_model(cfg.base), registry.read_model(cfg.tuned)
        networks = adaptable_networks(base)
        adapter, rows = extract(base, tuned, networks, limit)
        if not adapter:
            raise ValueError(
                f"tuned={cfg.tuned} has no layer with another weight than base={cfg.base} that "
                "can have an adapter; use a model that was trained further"
            )
        write_lora(Path(cfg.to), adapter, networks, rows)


def extract(
    base: Model, tuned: Model, networks: nn.ModuleDict, limit: RankLimit
) -> tuple[AdapterWeights, list[Row]]:
    """The LoRA that is nearest to the change from a model to another, and the change per tensor.

    Args:
        base: the model that the LoRA is for.
        tuned: with the same networks; those that one of the models lacks are ignored.
        networks: those of ``base`` that can have adapters, by part.
        limit: of the rank of each layer.

    Raises:
        ValueError: if the networks have other sizes.
    """
    layers = defaultdict(list)
    for layer in layer_names(networks):
        layers[weight_rows(layer)[0]].append(layer)
    adapter: AdapterWeights = {}
    rows: list[Row] = []
    for key, change in _changes(base, tuned):
        if key not in layers:
            rows.append(Row(key, 0, norm := _norm(change), norm))
        for layer in layers[key]:
            part = weight_part(change, weight_rows(layer)[1])
            if part.any():
                adapter[layer] = lora = truncate(part, limit)
                rows.append(Row(layer, lora.rank, _norm(part), _norm(part - lora.delta(part))))
    return adapter, rows


def _changes(base: Model, tuned: Model) -> Iterator[tuple[str, Tensor]]:
    """The names of the tensors that differ, such as ``prior.stem.weight``, and their changes."""
    parts = [name for name in base.parts if name in tuned.parts]
    for name in parts:
        compare_shapes(_shapes(base.parts[name]), _shapes(tuned.parts[name]), f"{name} of tuned")
    pairs = [
        (f"{name}.{key}", lazy, tuned.parts[name].tensors[key])
        for name in parts
        for key, lazy in base.parts[name].tensors.items()
        if lazy.dtype.is_floating_point
    ]
    for key, before, after in tqdm(pairs, unit="tensor"):
        change = after.load().float() - before.load().float()
        if change.any():
            yield key, change


def _shapes(part: Part) -> dict[str, tuple[int, ...]]:
    return {name: lazy.shape for name, lazy in part.tensors.items()}


def _norm(change: Tensor) -> float:
    return float(torch.linalg.vector_norm(change, dtype=torch.float64))
