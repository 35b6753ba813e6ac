"""The networks of a checkpoint's stage as parts of a model, with the weights that were trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wuerstchen_pl.adapters.weights import merged_tensors
from wuerstchen_pl.checkpointing.allowed import instantiate_allowed
from wuerstchen_pl.checkpointing.load import argument_config, drop_weight_paths
from wuerstchen_pl.checkpointing.weight_files import check_weight_files
from wuerstchen_pl.formats.lazy_tensors import in_memory
from wuerstchen_pl.formats.model import Part, build_on_meta, compare_shapes, with_defaults
from wuerstchen_pl.models.meta import is_building_on_meta
from wuerstchen_pl.models.text import TextEncoder

ADAPTERS = {
    "prior": "adapter", "diffnext": "adapter", "paella": "adapter", "text_encoder": "text_adapter",
}  # fmt: skip
"""Attribute of a network -> argument of the adapter that may have been trained instead of it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's path and contents, and its raw or EMA weights."""

    path: Path
    content: dict[str, Any]
    weights: dict[str, Tensor]

    def config(self, name: str) -> dict[str, Any] | None:
        """The config of an argument of the stage, or None."""
        if self.content["stage"].get(name) is None:
            return None
        return argument_config(self.path, self.content, name)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The weights of a network."""
        prefix = f"{name}."
        return {
            key.removeprefix(prefix): tensor
            for key, tensor in self.weights.items()
            if key.startswith(prefix)
        }


def read_part(checkpoint: Checkpoint, name: str) -> Part:
    """A network: the one that was trained, or a frozen one with its adapter and new words.

    Args:
        checkpoint: of a stage with this network.
        name: its attribute.

    Raises:
        FileNotFoundError: if the base model of an adapter is missing.
        ValueError: if the checkpoint's tensors are not the network's, or frozen weights changed.
    """
    adapter = checkpoint.config(ADAPTERS.get(name, ""))
    tensors = checkpoint.tensors(name)
    if adapter is None and tensors:
        return _trained_part(checkpoint, name, tensors)
    config: Any = checkpoint.config(name)
    network = instantiate_allowed(config, f"stage.{name}")
    if not is_building_on_meta():
        check_weight_files({name: network}, checkpoint.content.get("files", {}))
    if name == "text_encoder" and (words := checkpoint.config("words")) is not None:
        _add_words(network, instantiate_allowed(words, "stage.words"), checkpoint.tensors("words"))
    if adapter is None:
        return _part(config, network, network.state_dict(), network)
    weights = instantiate_allowed(adapter, "stage.adapter").weights(tensors)
    return _part(config, network, merged_tensors(network.state_dict(), [(weights, 1.0)]))


def _trained_part(checkpoint: Checkpoint, name: str, tensors: dict[str, Tensor]) -> Part:
    config: Any = checkpoint.config(name)
    network = build_on_meta(config, str(checkpoint.path))
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    compare_shapes(expected, shapes, f"stage.{name} of {checkpoint.path}")
    if not is_building_on_meta():
        network.load_state_dict(tensors, assign=True)
    return _part(config, network, tensors, network)


def _add_words(encoder: TextEncoder, words: Any, tensors: Mapping[str, Tensor]) -> None:
    words.add_to(encoder)
    if not is_building_on_meta():
        words.load_state_dict(tensors)


def _part(
    config: dict[str, Any],
    network: Any,
    state: Mapping[str, Tensor],
    built: nn.Module | None = None,
) -> Part:
    """The part of a network, which may be on the meta device.

    Args:
        config: of the network, or of what loads it from a model.
        network: with its names and arguments.
        state: its tensors.
        built: the network with these tensors, if there is one.
    """
    arguments = getattr(network, "arguments", None)  # of a network from a model
    config = with_defaults(drop_weight_paths(arguments or config))
    tokenizer = config.get("tokenizer")
    if isinstance(network, TextEncoder):
        config |= {"tokenizer": None, "vocab_size": network.tower.vocab_size}
    if (scale := state.get("scale_factor")) is not None and not scale.is_meta:
        config["scale_factor"] = float(scale)  # of Stage A
    tensors = {key: in_memory(tensor) for key, tensor in state.items()}
    return Part(config, tensors, Path(tokenizer) if tokenizer else None, built)
