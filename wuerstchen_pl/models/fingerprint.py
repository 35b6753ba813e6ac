"""What frozen networks compute, as short names: a cache is good for networks that have the same."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# split otherwise by other tokenizers
_PROBE = "A photo of 2 cats, na\u00efve & \u304b\u308f\u3044\u3044"


def encoder_fingerprints(stage: str, *, encoder: Any, text_encoder: Any | None) -> dict[str, str]:
    """Name what a cache for a stage is made with.

    Args:
        stage: ``b`` or ``c``.
        encoder: the trained stage that encodes images; only its encoding network matters.
        text_encoder: None where captions' states are not cached.
    """
    found = {"stage": stage, "encoder": network_fingerprint(encoder.encoding)}
    if text_encoder is not None:
        tokens = text_encoder.tokenizer([_PROBE])[0].tolist()
        found["text_encoder"] = network_fingerprint(text_encoder, said=str(tokens))
    return found


def network_fingerprint(network: nn.Module, *, said: str = "") -> str:
    """Hash a network's layers, numbers and weights, whatever file these came from.

    Args:
        network: frozen.
        said: what else it depends on.
    """
    hasher = hashlib.sha256(said.encode())
    for name, layer in network.named_modules():
        kind = getattr(layer, "FINGERPRINT_AS", type(layer))
        hasher.update(f"{name} {kind.__name__}".encode())
        if kind.__module__.startswith("wuerstchen_pl."):  # others' may gain some
            hasher.update(str(_numeric_attributes(layer)).encode())
    for name, tensor in sorted(network.state_dict().items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hasher.hexdigest()


def weights_fingerprint(networks: Iterable[nn.Module]) -> str:
    """Hash networks' weights and buffers alone, wherever they lie.

    Not by ``state_dict``: FSDP would take gathered weights apart for it.
    """
    hasher = hashlib.sha256()
    for number, network in enumerate(networks):
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            hasher.update(f"{number} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            # a copy, as numpy would keep FSDP from freeing the gathered one
            flat = tensor.detach().to("cpu", copy=True).contiguous().flatten()
            hasher.update(flat.view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _numeric_attributes(layer: nn.Module) -> list[tuple[str, int | float]]:
    """What a layer was built with and no weight shows, such as the factor of a resize."""
    return sorted(
        (name, value)
        for name, value in vars(layer).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    )
