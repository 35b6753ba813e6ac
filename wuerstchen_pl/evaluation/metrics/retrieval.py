"""Retrieval: whether a generated image is nearest to the training image of its caption."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 8


def pooled_pixels(images: Iterable[Tensor]) -> Tensor:
    """Images (3, H, W) of any size -> (N, 3 * 8 * 8) average-pooled colors."""
    rows = [F.adaptive_avg_pool2d(image.float(), GRID).flatten() for image in images]
    return torch.stack(rows)


def ranks(generated: Tensor, reference: Tensor, targets: Sequence[int]) -> list[int]:
    """Rank of each generated image's target among all candidates.

    Args:
        generated: (N, D) features of generated images.
        reference: (M, D) features of all candidates.
        targets: N indices into ``reference``: the image whose caption was the prompt.

    Returns:
        N zero-based ranks by Euclidean distance; ties count against the target.
    """
    distance = torch.cdist(generated.double(), reference.double())
    columns = torch.as_tensor(targets, device=generated.device)
    target_distance = distance.gather(1, columns[:, None])
    return ((distance <= target_distance).sum(dim=1) - 1).tolist()  # the target counts itself


def shuffle_control(targets: Sequence[int]) -> list[int]:
    """The targets, rotated by half their number: a control in which no caption matches."""
    half = max(1, len(targets) // 2)
    return [*targets[half:], *targets[:half]]
