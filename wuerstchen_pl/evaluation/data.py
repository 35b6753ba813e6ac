"""The data that a model was trained on, as prompts and as the pictures to compare with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from torch import Tensor

from wuerstchen_pl import checkpoint


class Captioned(NamedTuple):
    """A training picture's caption, size, and place among them all."""

    caption: str
    height: int
    width: int
    place: int


class DataPictures:
    """The training pictures, cropped to their buckets, in their order.

    Args:
        data: the data module.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Tensor]:
        """(3, H, W) uint8 each."""
        for batch in self.data.in_order("train", alone=True):
            yield from (batch["image"] * 255).round().byte()

    def captioned(self, number: int | None) -> list[Captioned]:
        """So many of them, spread over the set, so that no bucket is left out."""
        found: list[Captioned] = []
        for batch in self.data.in_order("train", alone=True):
            height, width = batch["image"].shape[-2:]
            for caption in batch["caption"]:
                found.append(Captioned(caption, height, width, len(found)))
        count = min(number or len(found), len(found))
        return [found[i * len(found) // count] for i in range(count)]


def configured(path: Path) -> Any:
    """The data module of a YAML file: a run's ``config.yaml``, or its ``data`` alone.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it names what is no data module, or a cache, which holds no pictures.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; name a run's config.yaml, or its data alone")
    config: Any = OmegaConf.to_container(OmegaConf.load(path))
    data = checkpoint.build(config.get("data", config) if isinstance(config, dict) else config)
    if not hasattr(data, "in_order"):
        raise ValueError(f"{path} names no data; give a run's config.yaml, or its data alone")
    if hasattr(data, "made_with"):
        raise ValueError(
            f"{path} names a cache, which holds no pictures to measure on; name the data that it "
            "was made of"
        )
    data.prepare_data()
    data.setup()
    return data


def run_data(model: Path) -> Any:
    """The data module that the run at ``model`` was trained on, from its config.yaml.

    Raises:
        FileNotFoundError: if the run's folder lacks it.
        ValueError: as of ``configured``.
    """
    folder = checkpoint.find(model).parent.parent
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; evaluate reads there what data to measure on")
    return configured(path)
