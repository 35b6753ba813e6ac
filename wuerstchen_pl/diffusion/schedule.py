"""The noise process of Stages B and C: a cosine schedule in continuous time.

t in [0, 1] is (B,) float32 in any precision of the networks; 0 is data, 1 is noise.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CosineSchedule:
    """alpha_bar(t) = f(t) / f(0), f(t) = cos^2(pi/2 (t + s) / (1 + s)), clamped.

    Nichol & Dhariwal 2021 (arXiv 2102.09672), Eq. 17; the clamp keeps the signal-to-noise ratio
    finite at both ends.
    """

    s: float = 0.008
    """Offset that keeps the first steps from being too small."""
    min_alpha_bar: float = 1e-4
    max_alpha_bar: float = 0.9999

    def alpha_bar(self, t: Tensor) -> Tensor:
        """(B,) time in [0, 1] -> (B,) share of signal power, float32."""
        start = math.cos(math.pi / 2 * self.s / (1 + self.s)) ** 2
        f = torch.cos((t.float() + self.s) / (1 + self.s) * (math.pi / 2)).square()
        return (f / start).clamp(self.min_alpha_bar, self.max_alpha_bar)

    def half_log_snr(self, t: Tensor) -> Tensor:
        """(B,) time in [0, 1] -> (B,) log of signal over noise, in amplitude."""
        alpha_bar = self.alpha_bar(t)
        return 0.5 * (alpha_bar / (1 - alpha_bar)).log()

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Sample x_t ~ q(x_t | x_0) (Ho et al. 2020, arXiv 2006.11239, Eq. 4).

        Args:
            x0: (B, ...) clean latents of about unit variance.
            t: (B,) time in [0, 1].
            noise: standard normal, of the shape of ``x0``; an argument, so that it can be fixed.
        """
        alpha_bar = expand_like(self.alpha_bar(t), x0)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise

    def predict_x0(self, xt: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The x_0 that ``noise`` turns into ``xt``; the inverse of ``add_noise``."""
        alpha_bar = expand_like(self.alpha_bar(t), xt)
        return (xt - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()


def sample_timesteps(uniform: Tensor) -> Tensor:
    """(B,) in [0, 1) -> (B,) training times, clamp(1.08 (1 - u) + 0.001, 0.001, 1).

    As in the published code; 7.3 % of the times are exactly 1.
    """
    return (1.08 * (1 - uniform.float()) + 0.001).clamp(0.001, 1.0)


def expand_like(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...), to broadcast to ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))
