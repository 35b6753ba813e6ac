"""The data that a model was trained on, as prompts and as the images to compare with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from torch import Tensor

from wuerstchen_pl.checkpointing import load


class CaptionedImage(NamedTuple):
    """A training image's caption, size, and place among them all."""

    caption: str
    height: int
    width: int
    place: int


class DatasetImages:
    """The training images, cropped to their buckets, in their order.

    Args:
        data: the data module.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Tensor]:
        """(3, H, W) uint8 each."""
        for batch in self.data.in_order("train", alone=True):
            yield from (batch["image"] * 255).round().byte()

    def captioned(self, number: int | None) -> list[CaptionedImage]:
        """So many of them, spread over the set, so that no bucket is left out."""
        found: list[CaptionedImage] = []
        for batch in self.data.in_order("train", alone=True):
            height, width = batch["image"].shape[-2:]
            for caption in batch["caption"]:
                found.append(CaptionedImage(caption, height, width, len(found)))
        count = min(number or len(found), len(found))
        return [found[i * len(found) // count] for i in range(count)]


def data_from_yaml(path: Path) -> Any:
    """The data module of a YAML file: a run's ``config.yaml``, or its ``data`` alone.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it names what is not a data module, or a cache, which holds no images.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file; name a run's config.yaml, or its data alone"
        )
    config: Any = OmegaConf.to_container(OmegaConf.load(path))
    data = load.instantiate_allowed(
        config.get("data", config) if isinstance(config, dict) else config
    )
    if not hasattr(data, "in_order"):
        raise ValueError(f"{path} names no data; give a run's config.yaml, or its data alone")
    if hasattr(data, "made_with"):
        raise ValueError(
            f"{path} names a cache, which holds no images to measure on; name the data that it "
            "was made of"
        )
    data.prepare_data()
    data.setup()
    return data


def run_data(model: Path) -> Any:
    """The data module that the run at ``model`` was trained on, from its config.yaml.

    Raises:
        FileNotFoundError: if the run's folder lacks it.
        ValueError: see ``configured``.
    """
    folder = load.find_checkpoint(model).parent.parent
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; evaluate reads there what data to measure on")
    return data_from_yaml(path)
