"""Control images from files, for a ControlNet: cropped and resized like their images."""

from collections.abc import Sequence

import numpy as np

from wuerstchen_pl.data.loading.transforms import Box, resize
from wuerstchen_pl.data.ordering.buckets import Size
from wuerstchen_pl.data.sources.source import Sample, Source
from wuerstchen_pl.io.images import decode_image
from wuerstchen_pl.plural import plural


def check_control_files(samples: Sequence[Sample]) -> None:
    """Refuse images without a control image.

    Raises:
        ValueError: naming the first one.
    """
    if missing := [sample.name for sample in samples if not sample.control_size]:
        raise ValueError(
            f"data.control=true, but the control image of {len(missing)} of "
            f"{plural(len(samples), 'image')} is missing, such as that of {missing[0]}; save that "
            "of a.jpg as a.control.png, or remove these images"
        )


def decode_control(source: Source, sample: Sample, cover: Size | None = None) -> np.ndarray:
    """The control image of a sample, (h, w, 3) uint8 of any size.

    Args:
        source: where its file is read from.
        sample: the sample.
        cover: see ``decode_image``.

    Raises:
        OSError: if there is none, or it cannot be read or decoded.
    """
    if not sample.control_size:
        raise OSError("it has no control image")
    return decode_image(source.read(sample.control), cover)


def crop_control(control: np.ndarray, image_size: Size, box: Box, size: Size) -> np.ndarray:
    """The part of a control image in a box of its image.

    Args:
        control: (h, w, 3) uint8, of any size.
        image_size: (height, width) of the image.
        box: (left, top, right, bottom) in pixels of the image.
        size: target (height, width).

    Returns:
        (height, width, 3) uint8.
    """
    whole = resize(control, (0, 0, control.shape[1], control.shape[0]), image_size)
    return resize(whole, box, size)
