"""Adapters in training: small trainable layers beside the frozen ones of a base model."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wuerstchen_pl.adapters.targets import choose_layers, split_projections
from wuerstchen_pl.adapters.weights import AdapterWeights, Method, from_tensors, method_of

BaseDtype = Literal["float32", "bfloat16"]
DEFAULT_TARGETS = ("*.attention.*", "*.cond_mapper")
NAME = "default"
"""The name of the adapter in peft."""
_TENSOR = re.compile(rf"(.+)\.((?:lora|hada|lokr)_\w+)\.{NAME}(\.weight)?")


class Adapter:
    """Adds an adapter to a network; peft computes it.

    Args:
        method: ``lora``, ``dora``, ``loha`` or ``lokr``; see ``weights``.
        rank: r; the number of parameters is proportional to it.
        alpha: the change of a weight is multiplied by alpha / r; None is r.
        dropout: probability; of the inputs for LoRA and DoRA, of ranks for the others.
        targets: patterns of layers; see ``choose_layers``. By default attention, and the maps from
            text to its keys and values.
        base_dtype: of the frozen weights while the adapter is trained; in bfloat16 they take half
            the memory. A trained model has the weights of the base model, which are not rounded.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        *,
        method: Method = "lora",
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        targets: Sequence[str] = DEFAULT_TARGETS,
        base_dtype: BaseDtype = "float32",
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank={rank} is out of range; use 1 or more")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} is out of range; use 0 <= dropout < 1")
        if method not in ("lora", "dora", "loha", "lokr"):
            raise ValueError(f"method={method!r} is unknown; use lora, dora, loha or lokr")
        if base_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"base_dtype={base_dtype!r} is unknown; use float32 or bfloat16")
        self.method, self.rank, self.dropout = method, rank, dropout
        self.alpha = rank if alpha is None else alpha
        self.targets = list(targets)
        self.base_dtype: torch.dtype = getattr(torch, base_dtype)

    @property
    def scale(self) -> float:
        """Factor on the change of a weight."""
        return self.alpha / self.rank

    def add_to_base(self, network: nn.Module, key: str = "stage.adapter") -> None:
        """``add_to`` for a network with the weights of a base model, which a checkpoint can name.

        Raises:
            ValueError: if its weights are of no model.
        """
        if getattr(network, "source", None) is None:
            raise ValueError(
                f"{key} needs the weights of a base model; set preset=base and init_from"
            )
        self.add_to(network, key)

    def add_to(self, network: nn.Module, key: str = "stage.adapter") -> None:
        """Freeze a network and add the adapter, in place; its output does not change yet.

        From now on, the network's state dict has the tensors of the adapter only.

        Args:
            network: without an adapter.
            key: of this adapter, for messages.

        Raises:
            ImportError: if peft is not installed.
            ValueError: if the targets match no layer; see ``choose_layers``.
        """
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, if installed
        try:
            from peft import inject_adapter_in_model
        except ImportError:
            raise ImportError(
                f"{key} needs peft, which is not installed; run pip install "
                "'wuerstchen_pl[adapters]'"
            ) from None

        network.train().requires_grad_(False)  # with the dropout of the base model
        split_projections(network)
        layers = choose_layers(network, self.targets, key)
        inject_adapter_in_model(self._config(layers), network, NAME)
        network.register_state_dict_post_hook(_keep_adapter)
        network.register_load_state_dict_post_hook(_ignore_base)

    def cast_base(self, network: nn.Module) -> None:
        """Cast the frozen weights of a network that has the adapter to ``base_dtype``, in place."""
        for parameter in network.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(self.base_dtype)

    @contextmanager
    def disabled(self, network: nn.Module) -> Iterator[None]:
        """Within the block the network computes what the base model does, without dropout."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
        is_training = network.training
        network.eval()
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            network.train(is_training)
            for layer in layers:
                layer.enable_adapters(True)

    def _config(self, layers: Sequence[str]) -> Any:
        from peft import LoHaConfig, LoKrConfig, LoraConfig

        targets = "|".join(map(re.escape, layers))
        if self.method in ("lora", "dora"):
            return LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,  # type: ignore[arg-type]
                lora_dropout=self.dropout,
                target_modules=targets,
                use_dora=self.method == "dora",
            )
        config = LoHaConfig if self.method == "loha" else LoKrConfig
        return config(
            r=self.rank,
            alpha=self.alpha,  # type: ignore[arg-type]
            rank_dropout=self.dropout,
            target_modules=targets,
        )

    def weights(self, state: Mapping[str, Tensor]) -> AdapterWeights:
        """The adapter's weights in the state dict of a network that has it.

        Raises:
            ValueError: if there are others, or integers.
        """
        for name, tensor in state.items():
            if not _TENSOR.fullmatch(name) or not tensor.is_floating_point():
                raise ValueError(f"{name} is not a weight of an adapter; use another file")
        layers: dict[str, dict[str, Tensor]] = {}
        for layer, name, tensor in _tensors(state):
            layers.setdefault(layer, {})[name] = tensor
        return {layer: from_tensors(ts, scale=self.scale) for layer, ts in layers.items()}

    def check(self, weights: AdapterWeights, network: nn.Module, key: str) -> None:
        """Refuse weights that are not those of this adapter.

        Args:
            weights: of an adapter.
            network: that they are for, without an adapter.
            key: of this adapter, for messages.

        Raises:
            ValueError: naming the first layer that is missing, unknown, or of another method or
                rank.
        """
        expected = set(choose_layers(network, self.targets, key))
        if differing := sorted(weights.keys() ^ expected):
            what = "lacks {}, which is one" if differing[0] in expected else "has {}, which is none"
            raise ValueError(
                f"{key}: the adapter {what.format(differing[0])} of its targets; use another file"
            )
        for layer, adapter in weights.items():
            method, rank = method_of(adapter), adapter.rank
            # LoKr has no rank where the factors are small
            if method != self.method or (method != "lokr" and rank != self.rank):
                raise ValueError(
                    f"{key} has method={self.method} and rank={self.rank}, but {layer} is of "
                    f"{method} with rank {rank}; use another file"
                )


def _tensors(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """(layer, tensor's name without that of the adapter, tensor)."""
    for key, tensor in state.items():
        if match := _TENSOR.fullmatch(key):
            is_magnitude = match[2] == "lora_magnitude_vector"
            yield match[1], match[2] if is_magnitude else match[2] + (match[3] or ""), tensor


def _keep_adapter(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any]
) -> None:
    """Drop the tensors of the base model; a checkpoint names it by path and hash."""
    for key in [key for key in state if key.startswith(prefix) and not _TENSOR.fullmatch(key)]:
        del state[key]


def _ignore_base(module: nn.Module, incompatible_keys: Any) -> None:
    """Accept a state dict that lacks the tensors of the base model."""
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if _TENSOR.fullmatch(key)]
