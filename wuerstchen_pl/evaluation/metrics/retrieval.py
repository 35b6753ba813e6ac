"""Does the text matter? How often a drawn image is nearest to the image of its own caption."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 8


def pooled_pixels(images: Iterable[Tensor]) -> Tensor:
    """Images (3, H, W) of any size -> (N, 3 * 8 * 8) average-pooled colors."""
    rows = [F.adaptive_avg_pool2d(image.float(), GRID).flatten() for image in images]
    return torch.stack(rows)


def ranks(drawn: Tensor, reference: Tensor, own: Sequence[int]) -> list[int]:
    """How many other references are as near to each drawn image as the one of its own caption.

    Args:
        drawn: (N, D) features of drawn images.
        reference: (M, D) features of all candidates.
        own: N indices into ``reference``: the image of the caption that was drawn.

    Returns:
        N ranks from 0 on, by Euclidean distance; a tie counts against the drawn image.
    """
    distance = torch.cdist(drawn.double(), reference.double())
    right = torch.as_tensor(own, device=drawn.device)
    own_distance = distance.gather(1, right[:, None])
    return ((distance <= own_distance).sum(dim=1) - 1).tolist()  # itself is not another


def shuffle_control(own: Sequence[int]) -> list[int]:
    """The same indices, each given to another drawn image: a control that text cannot pass."""
    half = max(1, len(own) // 2)
    return [*own[half:], *own[:half]]
