"""A model with adapters merged into its weights."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from wuerstchen_pl.adapters.weights import AdapterWeights, merged_tensors, weight_rows
from wuerstchen_pl.formats.adapter_files import read_adapter, split_weight
from wuerstchen_pl.formats.adapter_names import PREFIXES
from wuerstchen_pl.formats.lazy_tensors import LazyTensor
from wuerstchen_pl.formats.model import PAELLA, Model, build_on_meta


def adaptable_networks(model: Model) -> nn.ModuleDict:
    """The networks of a model that can have adapters, by part, on the meta device."""
    return nn.ModuleDict(
        {
            name: build_on_meta(part.config)
            for name, part in model.parts.items()
            if name in PREFIXES and part.config["_target_"] != PAELLA
        }
    )


def merge_adapters(model: Model, adapters: Sequence[str]) -> Model:
    """A model with adapters merged into its weights, each tensor when it is read.

    Args:
        model: with the networks that the adapters are for.
        adapters: files, folders or hub ids, each as its path or as ``path:weight``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, of another model or not supported.
    """
    if not adapters:
        return model
    networks = adaptable_networks(model)
    by_tensor: dict[str, list[tuple[AdapterWeights, float]]] = defaultdict(list)
    for text in adapters:
        path, factor = split_weight(text)
        for layer, weights in read_adapter(path, networks).items():
            by_tensor[weight_rows(layer)[0]].append(({layer: weights}, factor))
    parts = {
        name: replace(part, tensors=dict(part.tensors), network=None)
        for name, part in model.parts.items()
    }
    for key, changes in by_tensor.items():
        name, _, tensor = key.partition(".")
        parts[name].tensors[tensor] = _merged(key, parts[name].tensors[tensor], changes)
    card = model.card and f"{model.card}\nAdapters were merged into it: {', '.join(adapters)}.\n"
    return replace(model, parts=parts, card=card)


def _merged(
    key: str, lazy: LazyTensor, changes: Sequence[tuple[AdapterWeights, float]]
) -> LazyTensor:
    return lazy._replace(load=lambda: merged_tensors({key: lazy.load()}, changes)[key])
