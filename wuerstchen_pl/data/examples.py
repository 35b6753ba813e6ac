"""A few samples to look at while a run trains."""

from typing import Any

from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.sources.source import Split


def example_batch(data: ImageTextDataModule, num_images: int) -> dict[str, Any]:
    """The first samples of the fullest bucket, the same in every call and on every process.

    They are validation samples, or training samples if there are none for validation. They are read
    in this process, with center crops and the first of their captions.

    Args:
        data: the data, after ``setup``.
        num_images: maximum number of samples.

    Returns:
        A loader's batch; see ``loading/batch_dataset.py``.

    Raises:
        ValueError: none of them can be read.
    """
    split: Split = "val" if data.splits.first_window["val"] else "train"
    spec = data.specs_in_order(split, alone=True)[0]
    return data.dataset()[spec._replace(rows=spec.rows[:num_images])][0]
