"""Whether the networks of a checkpoint are those of a stage."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from wuerstchen_pl.checkpointing.allowed import stage_name
from wuerstchen_pl.plural import plural


def check_networks(
    checkpoint: Mapping[str, Any],
    *,
    stage: str,
    config: Mapping[str, Any] | None,
    weights: Mapping[str, Tensor],
    origin: str,
) -> None:
    """Refuse a checkpoint of another stage, or with networks of other sizes.

    Args:
        checkpoint: the contents of a checkpoint.
        stage: name of the stage that is to use it.
        config: the ``stage`` node of that stage's config; None if it was built without one.
        weights: the stage's state dict.
        origin: the key that named the checkpoint, with its value; errors start with it.

    Raises:
        ValueError: naming the first key that differs, with both values.
    """
    saved = stage_name(checkpoint["stage"])
    if saved != stage:
        raise ValueError(
            f"{origin} is a checkpoint of stage={saved}, but this is stage={stage}; use a run of "
            f"stage={stage}"
        )
    expected = {name: tensor.shape for name, tensor in weights.items()}
    actual = {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()}
    names = sorted(expected.keys() | actual.keys())
    differing = [name for name in names if expected.get(name) != actual.get(name)]
    if not differing:
        return
    networks = {name.partition(".")[0] for name in differing} | {"adapter", "text_adapter"}
    new = dict(_values({k: v for k, v in (config or {}).items() if k in networks}, "stage"))
    old = dict(_values({k: v for k, v in checkpoint["stage"].items() if k in networks}, "stage"))
    if keys := sorted(key for key in new.keys() | old.keys() if new.get(key) != old.get(key)):
        raise ValueError(
            f"{origin} has other networks: {keys[0]} was {old.get(keys[0])}, and is now "
            f"{new.get(keys[0])}; use the old value, or start a new run"
        )
    raise ValueError(
        f"{origin} has other networks: {plural(len(differing), 'tensor')} of another name or "
        f"shape, such as {differing[0]}; use a checkpoint of the same networks"
    )


def _values(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """The values of nested dicts by dotted key."""
    if isinstance(node, Mapping):
        for name, child in node.items():
            yield from _values(child, f"{key}.{name}")
    else:
        yield key, node
