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
from wuerstchen_pl.formats.model import (
    SCALE,
    Part,
    build_on_meta,
    compare_shapes,
    with_defaults,
)
from wuerstchen_pl.models.meta import is_building_on_meta
from wuerstchen_pl.models.text import TextEncoder

ADAPTERS = {
    "prior": "adapter", "diffnext": "adapter", "paella": "adapter", "text_encoder": "text_adapter",
}  # fmt: skip
"""Attribute of a network -> argument of the adapter that may have been trained instead of it."""
TRAINED_INSTEAD = ("adapter", "text_adapter", "words", "controlnet")
"""Arguments of a stage, of which any one leaves the networks as they are in a base model."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's path and contents, and its raw or EMA weights."""

    path: Path
    content: dict[str, Any]
    weights: dict[str, Tensor]

    def config(self, name: str) -> dict[str, Any] | None:
        """The config of an object that is an argument of the stage, or None.

        Raises:
            ValueError: if it is something else.
        """
        node = self.content["stage"].get(name)
        if node is None:
            return None
        if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
            raise ValueError(
                f"stage.{name} is {str(node)[:80]!r}, and must be an object; use another checkpoint"
            )
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
        FileNotFoundError: if the model with its weights is missing.
        ValueError: if the checkpoint's tensors are not the network's, or frozen weights changed.
    """
    if name in ADAPTERS and checkpoint.config(ADAPTERS[name]) is not None:
        return _adapted_part(checkpoint, name, ADAPTERS[name])
    if bool(tensors := checkpoint.tensors(name)) != _is_trained(checkpoint.content["stage"], name):
        raise ValueError(
            f"{checkpoint.path} {'has' if tensors else 'does not contain'} the weights of "
            f"stage.{name}{', which is frozen' if tensors else ''}; use another checkpoint"
        )
    if tensors:
        return _trained_part(checkpoint, name)
    config, network = _frozen_network(checkpoint, name)
    if name == "text_encoder":
        _add_words(network, checkpoint)
    return part_of(network, config, network.state_dict())


def _is_trained(stage: Mapping[str, Any], name: str) -> bool:
    if name == "text_encoder":
        return bool(stage.get("train_text_encoder", False))
    return name == "controlnet" or all(stage.get(key) is None for key in TRAINED_INSTEAD)


def _trained_part(checkpoint: Checkpoint, name: str) -> Part:
    config: Any = checkpoint.config(name)
    network = build_on_meta(config, str(checkpoint.path), key=f"stage.{name}")
    tensors, expected = checkpoint.tensors(name), network.state_dict()
    compare_shapes(
        {key: tuple(tensor.shape) for key, tensor in expected.items()},
        {key: tuple(tensor.shape) for key, tensor in tensors.items()},
        f"stage.{name} of {checkpoint.path}",
    )
    if is_building_on_meta():
        return part_of(network.eval(), config, expected)
    _load(network, tensors, checkpoint)
    return part_of(network.eval(), config, tensors)


def _adapted_part(checkpoint: Checkpoint, name: str, argument: str) -> Part:
    """A frozen network, with the adapter that was trained merged into its weights."""
    key = f"stage.{argument}"
    adapter = instantiate_allowed(checkpoint.config(argument), key)
    config, network = _frozen_network(checkpoint, name)
    if network.source is None:
        raise ValueError(f"{key} has no base model; use another checkpoint")
    weights = adapter.weights(checkpoint.tensors(name))
    adapter.check(weights, network, key)
    merged = merged_tensors(network.state_dict(), [(weights, 1.0)])
    part = part_of(network, config, merged)
    part.network = None  # it has other weights
    return part


def _frozen_network(checkpoint: Checkpoint, name: str) -> tuple[dict[str, Any], Any]:
    """The config of a network that the checkpoint has no weights of, and the network."""
    config: Any = checkpoint.config(name)
    network = instantiate_allowed(config, f"stage.{name}")
    if getattr(network, "source", None) is None and getattr(network, "weights", None) is None:
        raise ValueError(
            f"{checkpoint.path} does not contain the weights of stage.{name}; use another "
            "checkpoint"
        )
    if not is_building_on_meta():
        check_weight_files({name: network}, checkpoint.content.get("files", {}))
    return config, network


def _add_words(encoder: TextEncoder, checkpoint: Checkpoint) -> None:
    if (config := checkpoint.config("words")) is not None:
        words = instantiate_allowed(config, "stage.words")
        words.add_to(encoder)
        if not is_building_on_meta():
            _load(words, checkpoint.tensors("words"), checkpoint)


def _load(network: nn.Module, tensors: dict[str, Tensor], checkpoint: Checkpoint) -> None:
    try:  # assigned, so that tensors stay memory-mapped
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{checkpoint.path} does not contain the weights of its networks; use another "
            "checkpoint"
        ) from error


def part_of(network: Any, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Part:
    """The part of a network, which may be on the meta device.

    Args:
        network: with its names and arguments.
        config: of the network, or of what loads it from a model.
        state: its tensors.
    """
    arguments = getattr(network, "arguments", None)  # of a network from a model
    config = with_defaults(drop_weight_paths(arguments or dict(config)))
    tokenizer = config.get("tokenizer")
    if isinstance(network, TextEncoder):
        config |= {"tokenizer": None, "vocab_size": network.tower.vocab_size}
    if SCALE in state and not state[SCALE].is_meta:
        config[SCALE] = float(state[SCALE])
    tensors = {key: in_memory(tensor) for key, tensor in state.items()}
    return Part(config, tensors, Path(tokenizer) if tokenizer else None, network)
