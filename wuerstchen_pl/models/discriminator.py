"""Stage A's discriminator: a PatchGAN with spectral norm.

Published as ``Discriminator`` in dome272/Wuerstchen (MIT). ``logits`` are taken before the sigmoid,
so that the loss can compute the logarithm safely.
"""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class Discriminator(nn.Module):
    """Classifies each patch of an image as real or reconstructed.

    Args:
        width: channels of the last layers; halved at each earlier one.
        depth: number of stride-2 convolutions; patches are 2 ** depth pixels apart.
    """

    def __init__(self, *, width: int = 512, depth: int = 6) -> None:
        super().__init__()
        halvings = max(depth - 3, 3)
        widths = [width // 2 ** max(halvings - i, 0) for i in range(depth)]
        self.encoder = nn.Sequential(_strided(3, widths[0]), nn.LeakyReLU(0.2))
        for c_in, c_out in pairwise(widths):
            self.encoder.extend(
                [_strided(c_in, c_out), nn.InstanceNorm2d(c_out), nn.LeakyReLU(0.2)]
            )
        self.head = nn.Conv2d(widths[-1], 1, 1)

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 1, H / 2^depth, W / 2^depth), rounded up."""
        return self.head(self.encoder(images))

    def forward(self, images: Tensor) -> Tensor:
        """Probability in [0, 1] that each patch is real, of the shape of ``logits``."""
        return self.logits(images).sigmoid()


def _strided(c_in: int, c_out: int) -> nn.Module:
    return spectral_norm(nn.Conv2d(c_in, c_out, 3, stride=2, padding=1))
