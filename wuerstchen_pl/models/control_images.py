"""Control images: what a ControlNet reads, computed from images or stored beside them."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_UNIFORM = 5
"""Random numbers per image that control images of training may use."""
GRAY = 128 / 255
"""The region to generate."""
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class ControlImages:
    """Images -> control images of the same size, (B, 3, H, W) in [0, 1] each.

    Attributes:
        from_files: whether training reads control images from files instead of computing them.
    """

    from_files: ClassVar[bool] = False

    def __call__(self, images: Tensor) -> Tensor:
        """The control images of images that a user gives."""
        return images

    def of_training(self, images: Tensor, uniform: Tensor) -> Tensor:
        """The control images of training images.

        Args:
            images: (B, 3, H, W) in [0, 1].
            uniform: (B, ``NUM_UNIFORM``) random numbers in [0, 1).
        """
        return self(images)


class Edges(ControlImages):
    """White where the lightness changes, black elsewhere: thresholded Sobel gradients.

    Args:
        threshold: the lowest step of lightness that is an edge, in (0, 1).
    """

    def __init__(self, *, threshold: float = 0.1) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold={threshold} is out of range; use 0 < threshold < 1")
        self.threshold = threshold

    def __call__(self, images: Tensor) -> Tensor:
        """See ``ControlImages``."""
        gray = (images * images.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)
        smooth, step = images.new_tensor([1, 2, 1]) / 4, images.new_tensor([-1, 0, 1])
        kernels = torch.stack([torch.outer(smooth, step), torch.outer(step, smooth)])
        gradient = F.conv2d(F.pad(gray, (1, 1, 1, 1), mode="replicate"), kernels[:, None])
        edges = gradient.norm(dim=1, keepdim=True) >= self.threshold
        return edges.to(images).expand_as(images)


class LowResolution(ControlImages):
    """Images reduced by averaging, and enlarged to their size again.

    Args:
        factor: factor of both sides, more than 1.
    """

    def __init__(self, *, factor: float = 16.0) -> None:
        if factor <= 1:
            raise ValueError(f"factor={factor} is out of range; use more than 1")
        self.factor = factor

    def __call__(self, images: Tensor) -> Tensor:
        """See ``ControlImages``."""
        size = images.shape[-2:]
        reduced = [math.ceil(side / self.factor) for side in size]
        small = F.interpolate(images, reduced, mode="area")
        return F.interpolate(small, size, mode="bilinear", align_corners=False)


class Masked(ControlImages):
    """Images with a gray region to generate: in training, a random rectangle or ellipse.

    Its sides are a quarter to three quarters of those of the image. An image that a user gives has
    its region painted gray already.
    """

    def of_training(self, images: Tensor, uniform: Tensor) -> Tensor:
        """See ``ControlImages``."""
        u = uniform.to(images)[:, :, None, None]
        sides = 0.25 + 0.5 * u[:, :2]
        centers = sides / 2 + (1 - sides) * u[:, 2:4]
        height, width = images.shape[-2:]
        y = ((torch.arange(height, device=images.device) + 0.5) / height)[None, :, None]
        x = ((torch.arange(width, device=images.device) + 0.5) / width)[None, None, :]
        dy = (y - centers[:, 0]).abs() / (sides[:, 0] / 2)
        dx = (x - centers[:, 1]).abs() / (sides[:, 1] / 2)
        inside = torch.where(u[:, 4] < 0.5, torch.maximum(dy, dx), torch.hypot(dy, dx)) < 1
        return images.masked_fill(inside[:, None], GRAY)


class Files(ControlImages):
    """Files beside the images, such as depth maps, segmentations or drawings."""

    from_files = True
