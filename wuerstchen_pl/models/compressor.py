"""The Semantic Compressor: images -> the semantic latents that Stage C models.

Wuerstchen (arXiv 2306.00637), section 3.2: features of an image resized by 0.75, mapped to 16
channels by a 1x1 convolution and normalized. It is trained jointly with Stage B.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wuerstchen_pl.distributed.sync_batchnorm import SyncBatchNorm2d, convert_sync_batchnorm
from wuerstchen_pl.io.contents import contents_of
from wuerstchen_pl.models.meta import is_building_on_meta
from wuerstchen_pl.models.pretrained import Pretrained

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageFeatures(nn.Module):
    """Resize, normalize, backbone.

    Args:
        backbone: feature extractor with attributes ``channels`` and ``stride``.
        resize: factor by which images are resized first (1024 px become 768 px).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, backbone: "EfficientNet | ConvBackbone", resize: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.resize = resize
        # on the CPU even under a meta-device context: no checkpoint restores these buffers
        mean, std = (torch.tensor(v, device="cpu") for v in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("std", std[:, None, None], persistent=False)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Size in pixels of an image of (height, width) pixels after resizing."""
        return round(height * self.resize), round(width * self.resize)

    def features(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, channels, h, w), computed in ``dtype``."""
        size = self.resized(*images.shape[-2:])
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        images = (images - self.mean.to(images)) / self.std.to(images)
        return self.backbone(images.to(dtype).contiguous(memory_format=torch.channels_last))


class SemanticCompressor(ImageFeatures, Pretrained):
    """Image features, 1x1 convolution, batch norm.

    Args:
        backbone: see ``ImageFeatures``.
        latent_channels: channels of the semantic latents, 16 as published.
        resize: see ``ImageFeatures``.
    """

    def __init__(
        self, *, backbone: "EfficientNet | ConvBackbone", latent_channels: int = 16,
        resize: float = 0.75,
    ) -> None:  # fmt: skip
        super().__init__(backbone=backbone, resize=resize)
        self.latent_channels = latent_channels
        self.mapper = nn.Conv2d(backbone.channels, latent_channels, 1, bias=False)
        self.norm = SyncBatchNorm2d(latent_channels)

    @property
    def resolution_multiple(self) -> float:
        """Pixels per semantic position: 42.67 as published."""
        return self.backbone.stride / self.resize

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Size (h, w) of an image's semantic latents: 24 x 24 for 1024 px as published."""
        h, w = self.resized(height, width)
        return math.ceil(h / self.backbone.stride), math.ceil(w / self.backbone.stride)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, latent_channels, *latent_size(H, W)) float32."""
        features = self.features(images, self.mapper.weight.dtype)
        return self.norm(self.mapper(features).float())


class EfficientNet(nn.Module):
    """torchvision's EfficientNetV2 features: 1280 channels at stride 32.

    Args:
        size: ``s`` (v2) or ``l`` (v1).
        weights: ``imagenet`` for torchvision's weights (downloaded once), a path of a state dict of
            torchvision's whole classifier, or None for random weights.
    """

    channels, stride = 1280, 32

    def __init__(self, *, size: Literal["s", "l"] = "s", weights: str | None = None) -> None:
        import torchvision  # slow, and the tiny preset does not use it

        super().__init__()
        if is_building_on_meta():
            weights = None
        build = getattr(torchvision.models, f"efficientnet_v2_{size}")
        net = build(weights="DEFAULT" if weights == "imagenet" else None)
        if weights is not None and weights != "imagenet":
            with contents_of(weights):
                net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.features = convert_sync_batchnorm(net.features)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalized -> (B, 1280, ceil(H/32), ceil(W/32))."""
        return self.features(images)


class ConvBackbone(nn.Module):
    """A small stack of stride-2 convolutions, for 64 px images and laptops.

    Args:
        width: channels after the first convolution; doubled by each subsequent one.
        depth: number of convolutions; the stride is 2 ** depth.
    """

    def __init__(self, *, width: int, depth: int) -> None:
        super().__init__()
        self.stride = 2**depth
        widths = [width * 2**i for i in range(depth)]
        self.channels = widths[-1]
        self.layers = nn.Sequential()
        for c_in, c_out in zip([3, *widths], widths, strict=False):
            self.layers.extend(
                [
                    nn.Conv2d(c_in, c_out, 3, stride=2, padding=1),
                    nn.GroupNorm(1, c_out),
                    nn.GELU(),
                ]
            )
        self.layers.append(nn.Conv2d(self.channels, self.channels, 3, padding=1))
        self.layers.append(nn.GELU())

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, channels, ceil(H / stride), ceil(W / stride))."""
        return self.layers(images)
