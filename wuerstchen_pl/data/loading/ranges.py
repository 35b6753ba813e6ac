"""The ranges of a data module's numbers."""

_MINIMUMS = {
    "batch_size": 1,
    "val_batch_size": 1,
    "num_workers": 0,
    "shuffle_samples": 1,
    "max_bad_fraction": 0,
}


def check_ranges(*, max_upscale: float | None, crop_share: float, **numbers: float | None) -> None:
    """Refuse arguments of ``ImageTextDataModule`` that are out of range; None is in range.

    Raises:
        ValueError: naming the first one.
    """
    for key, value in numbers.items():
        if value is not None and value < _MINIMUMS[key]:
            raise ValueError(f"{key}={value} is out of range; use {_MINIMUMS[key]} or more")
    if max_upscale is not None and max_upscale <= 0:
        raise ValueError(f"max_upscale={max_upscale} is out of range; use more than 0, or null")
    if not 0 < crop_share <= 1:
        raise ValueError(f"crop_share={crop_share} is out of range; use more than 0 and at most 1")
