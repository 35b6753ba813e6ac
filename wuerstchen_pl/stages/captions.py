"""Text embeddings of a batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wuerstchen_pl.batch import Batch
from wuerstchen_pl.transfer import to_device


def encode_captions(
    batch: Batch,
    encode: Callable[[Sequence[str]], Tensor | None],
    dropped: Tensor | None = None,
) -> Tensor | None:
    """The text embeddings of a batch's captions, from the cache or encoded now.

    Args:
        batch: with ``caption``, and with ``text`` and ``empty_text`` if they were cached.
        encode: captions -> (B, L, D) embeddings, or None for a stage without text.
        dropped: (B,) bool, True replaces the caption with the empty one; None keeps all.
    """
    if dropped is None:
        dropped = torch.zeros(len(batch["caption"]), dtype=torch.bool)
    if "text" not in batch:
        return encode(["" if d else c for c, d in zip(batch["caption"], dropped, strict=True)])
    text = batch["text"]
    is_empty = to_device(dropped, text.device)[:, None, None]
    return torch.where(is_empty, batch["empty_text"], text)
