"""Adapters that are merged into a network for sampling, each with a weight that can change."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wuerstchen_pl.adapters.weights import AdapterWeights, merged_tensors, weight_rows


class MergedAdapters:
    """W + the sum of each adapter's weight times its change of W, in place of a network's W.

    So sampling is as fast as without adapters. The network's own weights are kept, and restored
    exactly.

    Args:
        network: without an adapter in training.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.adapters: dict[str, AdapterWeights] = {}
        self.weights: dict[str, float] = {}
        self._own: dict[str, Tensor] = {}

    def add(self, name: str, adapter: AdapterWeights, weight: float) -> None:
        """Merge one more adapter.

        Raises:
            ValueError: if the name is taken, or the adapter is of another network.
        """
        if name in self.adapters:
            raise ValueError(f"an adapter {name!r} is loaded already; use another name")
        self.adapters[name], self.weights[name] = adapter, weight
        try:
            self._merge()
        except ValueError:
            del self.adapters[name], self.weights[name]
            raise

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change weights; adapters that are not named keep theirs.

        Raises:
            ValueError: for a name that is not loaded.
        """
        if unknown := sorted(weights.keys() - self.adapters.keys()):
            loaded = ", ".join(self.adapters) or "none"
            raise ValueError(f"no adapter {unknown[0]!r} is loaded; choose from {loaded}")
        self.weights |= weights
        self._merge()

    def clear(self, *, keep_merged: bool = False) -> None:
        """Forget all adapters, and restore the network's own weights unless ``keep_merged``."""
        self.adapters, self.weights = {}, {}
        if not keep_merged:
            self._merge()
        self._own = {}

    @torch.no_grad()
    def _merge(self) -> None:
        current = dict(self.network.named_parameters())
        keys = {weight_rows(layer)[0] for adapter in self.adapters.values() for layer in adapter}
        for key in keys & current.keys() - self._own.keys():
            self._own[key] = current[key].detach().cpu().clone()
        weighted = [(adapter, self.weights[name]) for name, adapter in self.adapters.items()]
        for key, tensor in merged_tensors(self._own, weighted).items():
            current[key].copy_(tensor)
