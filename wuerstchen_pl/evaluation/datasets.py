"""Training data as a source of prompts and of reference images."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import OmegaConf
from torch import Tensor

from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.checkpointing.allowed import instantiate_allowed
from wuerstchen_pl.io.contents import contents_of

if TYPE_CHECKING:
    from wuerstchen_pl.data.datamodule import ImageTextDataModule


class CaptionedImage(NamedTuple):
    """A training image's caption, size in pixels, and index in the training set."""

    caption: str
    height: int
    width: int
    dataset_index: int


class DatasetImages:
    """The training images in dataset order, cropped to their buckets.

    Args:
        data: the data module.
    """

    def __init__(self, data: "ImageTextDataModule") -> None:
        self.data = data

    def __iter__(self) -> Iterator[Tensor]:
        """The readable images (3, H, W) uint8."""
        return (image for _, image in self.indexed())

    def indexed(self) -> Iterator[tuple[int, Tensor]]:
        """The dataset index and the image (3, H, W) uint8 of each readable sample."""
        loader, start = self.data.in_order("train", alone=True), 0
        for spec, (batch, report) in zip(loader.sampler, loader.with_reports(), strict=True):
            for row, key, image in zip(report.rows, batch["key"], batch["image"], strict=True):
                if key == spec.rows[row].sample.key:  # not a substitute of an unreadable batch
                    yield start + row, image
            start += len(spec.rows)

    def captioned(self, num_samples: int | None) -> list[CaptionedImage]:
        """Up to ``num_samples`` samples, evenly spaced over the set so that all buckets occur.

        No image is decoded, so unreadable ones are among them.
        """
        samples: list[CaptionedImage] = []
        for spec in self.data.specs_in_order("train", alone=True):
            height, width = spec.size
            for row in spec.rows:
                caption = self.data.captions.plain(row.sample.captions[0])
                samples.append(CaptionedImage(caption, height, width, len(samples)))
        count = min(num_samples or len(samples), len(samples))
        return [samples[i * len(samples) // count] for i in range(count)]


def data_from_yaml(path: Path) -> "ImageTextDataModule":
    """The data module of a YAML file: a run's ``config.yaml``, or only its ``data`` section.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it does not define a data module, or defines a cache, which has no images.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file; use a run's config.yaml, or a file of its data section"
        )
    with contents_of(path, "use a run's config.yaml"):
        config: Any = OmegaConf.to_container(OmegaConf.load(path))
        data = instantiate_allowed(
            config.get("data", config) if isinstance(config, dict) else config, "data"
        )
    if not hasattr(data, "in_order"):
        raise ValueError(
            f"{path} does not define a data module; use a run's config.yaml, or a file of its "
            "data section"
        )
    if hasattr(data, "made_with"):
        raise ValueError(
            f"{path} defines a cache, which has no images; use the data that the cache "
            "was built from"
        )
    data.prepare_data()
    data.setup()
    return data


def run_data(model: Path) -> "ImageTextDataModule":
    """The data module that the run at ``model`` was trained on, from its config.yaml.

    Raises:
        FileNotFoundError: if the run's folder has no config.yaml.
        ValueError: see ``data_from_yaml``.
    """
    folder = load.find_checkpoint(model).parent.parent
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; evaluate reads the run's data config from it")
    return data_from_yaml(path)
