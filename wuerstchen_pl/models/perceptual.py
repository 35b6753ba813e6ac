"""Perceptual distances for Stage A: differences of two images in a network's features.

The networks are frozen and used in training only. Both classes map two batches of images to (B,)
distances.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LPIPS(nn.Module):
    """Learned Perceptual Image Patch Similarity (Zhang et al. 2018, arXiv 1801.03924).

    torchmetrics ships the linear heads; torchvision downloads the backbone once.
    """

    def __init__(self, *, backbone: Literal["vgg", "alex", "squeeze"] = "vgg") -> None:
        super().__init__()
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.net = LearnedPerceptualImagePatchSimilarity(net_type=backbone).net

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Two (B, 3, H, W) in [0, 1] -> (B,)."""
        return self.net(images, targets, normalize=True).flatten()


class RandomFeatures(nn.Module):
    """LPIPS' formula on a small convolutional network with fixed random weights; no download.

    Random convolutions keep local structure (edges, textures) and are a usable perceptual metric
    (Ulyanov et al. 2018, arXiv 1711.10925, discuss this prior). The distances are not LPIPS.

    Args:
        widths: channels per layer; every layer after the first halves the resolution.
        seed: seed of the weights.
    """

    def __init__(self, *, widths: Sequence[int] = (16, 32, 64), seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        layers = [
            nn.Conv2d(c_in, c_out, 3, stride=1 if i == 0 else 2, padding=1)
            for i, (c_in, c_out) in enumerate(pairwise([3, *widths]))
        ]
        for layer in layers:
            assert layer.bias is not None
            nn.init.orthogonal_(layer.weight, gain=2**0.5, generator=generator)
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)

    def _features(self, images: Tensor) -> list[Tensor]:
        x, features = images * 2 - 1, []
        for layer in self.layers:
            x = F.relu(layer(x))
            features.append(F.normalize(x, dim=1, eps=1e-4))
        return features

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Two (B, 3, H, W) in [0, 1] -> (B,)."""
        pairs = zip(self._features(images), self._features(targets), strict=True)
        distances = [(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs]
        return torch.stack(distances).sum(dim=0)
