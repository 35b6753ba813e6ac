"""DPM-Solver++: fewer steps by using the prediction of the step before.

The second-order multistep solvers with data prediction, as an ODE (2M) and as an SDE (2M SDE), of
Lu et al. 2022 (arXiv 2211.01095, Algorithm 2 and appendix B), in continuous time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from wuerstchen_pl.diffusion.schedule import CosineSchedule, expand_like


class DPMSolver:
    """Steps from one time to the next; the first one, and one to time 0, are of first order.

    There is too little signal to extrapolate from noise, and at time 0 too little noise.

    Args:
        schedule: the noise process.
        noise: returns standard normal numbers in the shape of x, for the SDE; None solves the ODE.
    """

    def __init__(
        self, schedule: CosineSchedule, noise: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.schedule, self.noise = schedule, noise
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, xt: Tensor, t: Tensor, t_next: Tensor, pred: Tensor) -> Tensor:
        """X at ``t_next``.

        Args:
            xt: (B, ...) at ``t``.
            t: (B,) current time.
            t_next: (B,) time after the step.
            pred: predicted noise, of the shape of ``xt``.
        """
        x0 = self.schedule.predict_x0(xt, t, pred)
        step = self.schedule.half_log_snr(t_next) - self.schedule.half_log_snr(t)
        data = self._extrapolated(x0, step, t_next)
        self._last = x0, step

        h = expand_like(step, xt)
        alpha_bar, alpha_bar_next = (
            expand_like(self.schedule.alpha_bar(s), xt) for s in (t, t_next)
        )
        ratio = ((1 - alpha_bar_next) / (1 - alpha_bar)).sqrt()
        if self.noise is None:
            return ratio * xt - alpha_bar_next.sqrt() * torch.expm1(-h) * data
        variance = -torch.expm1(-2 * h)
        mean = ratio * torch.exp(-h) * xt + alpha_bar_next.sqrt() * variance * data
        std = ((1 - alpha_bar_next) * variance).sqrt() * expand_like(t_next != 0, xt)
        return mean + std * self.noise(xt)

    def _extrapolated(self, x0: Tensor, step: Tensor, t_next: Tensor) -> Tensor:
        """The data prediction at the middle of the step, from this one and the one before."""
        if self._last is None:
            return x0
        last_x0, last_step = self._last
        # steps of length 0 are where the schedule is clamped
        usable = (t_next != 0) & (step > 0) & (last_step > 0)
        share = torch.where(usable, step / (2 * last_step.clamp_min(1e-12)), 0)
        return x0 + expand_like(share, x0) * (x0 - last_x0)
