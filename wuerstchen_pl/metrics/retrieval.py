"""Does the text matter? How often a drawn picture is nearest to the picture of its own caption."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 8


def pooled_pixels(pictures: Iterable[Tensor]) -> Tensor:
    """Pictures (3, H, W) of any size -> (N, 3 * 8 * 8) average-pooled colours."""
    rows = [F.adaptive_avg_pool2d(picture.float(), GRID).flatten() for picture in pictures]
    return torch.stack(rows)


def ranks(drawn: Tensor, reference: Tensor, own: Sequence[int]) -> list[int]:
    """How many other references are as near to each drawn picture as the one of its own caption.

    Args:
        drawn: (N, D) features of drawn pictures.
        reference: (M, D) features of all candidates.
        own: N indices into ``reference``: the picture of the caption that was drawn.

    Returns:
        N ranks from 0 on, by Euclidean distance; a tie counts against the drawn picture.
    """
    distance = torch.cdist(drawn.double(), reference.double())
    right = torch.as_tensor(own, device=drawn.device)
    own_distance = distance.gather(1, right[:, None])
    return ((distance <= own_distance).sum(dim=1) - 1).tolist()  # itself is not another


def shifted(own: Sequence[int]) -> list[int]:
    """The same indices, each given to another drawn picture: a control that text cannot pass."""
    half = max(1, len(own) // 2)
    return [*own[half:], *own[:half]]
