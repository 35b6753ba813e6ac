"""How long it will take to generate images, from a few steps at a small size."""

import warnings
from dataclasses import replace
from time import perf_counter

from wuerstchen_pl.diffusion.sampler import generators_from_seeds
from wuerstchen_pl.pipelines.text_to_image import TextToImage
from wuerstchen_pl.sampling.config import SamplingConfig
from wuerstchen_pl.sampling.control import Control

PROBE_MULTIPLES = 2
"""Side of the timed images in multiples of ``size_multiple``: 256 px as published."""


def estimate_seconds(
    pipeline: TextToImage, num_images: int, height: int, width: int, config: SamplingConfig,
    control: Control | None = None,
) -> float:  # fmt: skip
    """Estimate the time of ``num_images`` images of a size, in seconds.

    The time is assumed to be proportional to the number of pixels. Attention grows faster, so the
    estimate of a large size is low.

    Args:
        pipeline: on the device to run on.
        num_images: number of images.
        height: in pixels.
        width: in pixels.
        config: sampling settings.
        control: what a ControlNet reads.
    """
    side = PROBE_MULTIPLES * pipeline.size_multiple

    def seconds(prior_steps: int = 1, decoder_steps: int = 1) -> float:
        steps = replace(
            config, prior_steps=prior_steps, prior_timesteps=None, decoder_steps=decoder_steps
        )
        start = perf_counter()
        with warnings.catch_warnings(action="ignore"):  # the run itself will repeat them
            images = pipeline.generate(
                [""], side, side,
                config=steps, generator=generators_from_seeds([0]), control=control,
            )  # fmt: skip
        images.cpu()  # waits for the device
        return perf_counter() - start

    seconds()  # the first run on a device includes its setup
    one_step = seconds()
    per_image = one_step
    per_image += (len(config.prior.times) - 2) * max(0.0, seconds(prior_steps=2) - one_step)
    per_image += (len(config.decoder.times) - 2) * max(0.0, seconds(decoder_steps=2) - one_step)
    return num_images * per_image * height * width / side**2
