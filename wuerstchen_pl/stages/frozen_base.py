"""A submodule of a stage that is not trained: a checkpoint names it, and lacks its tensors."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def freeze_base(stage: nn.Module, name: str) -> None:
    """Freeze a submodule with the weights of a base model, in eval mode.

    It stays a submodule, as gradients pass through it: so it is computed in the trainer's
    precision, sharded, and recomputed like one that is trained.

    Args:
        stage: with the submodule.
        name: its attribute.

    Raises:
        ValueError: if its weights are of no model.
    """
    network = getattr(stage, name)
    if getattr(network, "source", None) is None:
        raise ValueError(
            f"stage.{name} needs the weights of a base model; set preset=base and init_from"
        )
    network.eval().requires_grad_(False)
    prefix = f"{name}."

    def drop(module: nn.Module, state: dict[str, Any], _: str, metadata: Mapping[str, Any]) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]

    def ignore(module: nn.Module, incompatible_keys: Any) -> None:
        missing = incompatible_keys.missing_keys
        missing[:] = [key for key in missing if not key.startswith(prefix)]

    stage.register_state_dict_post_hook(drop)
    stage.register_load_state_dict_post_hook(ignore)
