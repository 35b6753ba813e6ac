"""The compressor preprocesses images as torchvision's transforms do."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from wuerstchen_pl.models.compressor import ConvBackbone, SemanticCompressor


@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 160), (85, 127)])
def test_preprocessing_is_torchvisions_antialiased_resize_and_normalization(
    height: int, width: int
) -> None:
    """Uses one-pixel stripes, where a resize without antialiasing differs strongly."""
    seen: list[Tensor] = []
    compressor = SemanticCompressor(backbone=ConvBackbone(width=4, depth=2), resize=0.5)
    compressor.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    images[..., ::3] = 1.0
    with torch.no_grad():
        compressor.eval()(images)
    size = [round(height * 0.5), round(width * 0.5)]
    transform = v2.Compose(
        [
            v2.Resize(size, interpolation=v2.InterpolationMode.BILINEAR, antialias=True),
            v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    torch.testing.assert_close(seen[0], transform(images), atol=1e-5, rtol=1e-5)
