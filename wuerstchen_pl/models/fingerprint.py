"""Fingerprints of frozen networks: a cache is valid for networks with the same fingerprint."""

import hashlib
from collections.abc import Iterable
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from wuerstchen_pl.models.text import TextEncoder

# other tokenizers split it differently
_PROBE = "A photo of 2 cats, na\u00efve & \u304b\u308f\u3044\u3044"


class ImageEncoder(Protocol):
    """A trained stage, as far as the stage above it and its cache use it."""

    @property
    def encoding(self) -> nn.Module:
        """The network that ``encode`` runs."""

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> latents."""

    def to(self, device: torch.device) -> Self:
        """Move the stage."""


def encoder_fingerprints(
    stage: str, *, encoder: ImageEncoder, text_encoder: TextEncoder | None
) -> dict[str, str]:
    """Fingerprint the networks that a stage's cache is computed with.

    Args:
        stage: ``b`` or ``c``.
        encoder: the trained stage that encodes images; only its encoding network matters.
        text_encoder: None if text embeddings are not cached.
    """
    fingerprints = {"stage": stage, "encoder": network_fingerprint(encoder.encoding)}
    if text_encoder is not None:
        tokens = text_encoder.tokenizer([_PROBE])[0].tolist()
        words = {word.text: weights_fingerprint([word]) for word in text_encoder.words}
        extra = f"{tokens}{words or ''}"
        fingerprints["text_encoder"] = network_fingerprint(text_encoder, extra=extra)
    return fingerprints


def network_fingerprint(network: nn.Module, *, extra: str = "") -> str:
    """Hash a network's layer types, numeric attributes and weights, whatever their file format.

    Args:
        network: frozen network.
        extra: anything else that its output depends on.
    """
    hasher = hashlib.sha256(extra.encode())
    for name, layer in network.named_modules():
        kind = getattr(layer, "FINGERPRINT_AS", type(layer))
        hasher.update(f"{name} {kind.__name__}".encode())
        if kind.__module__.startswith("wuerstchen_pl."):  # third-party layers may gain attributes
            hasher.update(str(_numeric_attributes(layer)).encode())
    for name, tensor in sorted(network.state_dict().items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hasher.hexdigest()


def weights_fingerprint(networks: Iterable[nn.Module], dtype: torch.dtype | None = None) -> str:
    """Hash only the parameters and buffers of networks, on any device.

    It avoids ``state_dict``, for which FSDP would reshard gathered weights.

    Args:
        networks: the networks.
        dtype: that the tensors are rounded to first; None is their own.
    """
    hasher = hashlib.sha256()
    for number, network in enumerate(networks):
        for name, stored in [*network.named_parameters(), *network.named_buffers()]:
            tensor = stored if dtype is None else stored.detach().to(dtype)
            hasher.update(f"{number} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            # copied: a numpy view would keep FSDP from freeing the gathered tensor
            flat = tensor.detach().to("cpu", copy=True).contiguous().flatten()
            hasher.update(flat.view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _numeric_attributes(layer: nn.Module) -> list[tuple[str, int | float]]:
    """Constructor arguments that the weights do not show, such as a resize factor."""
    return sorted(
        (name, value)
        for name, value in vars(layer).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    )
