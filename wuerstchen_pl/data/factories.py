"""The choices of `data=...`: for each kind of source, what makes a data module of it.

What a function does not take itself goes to `ImageTextDataModule`, as `config.KEYWORDS_GO_TO` says.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.sources.folder import FolderSource
from wuerstchen_pl.data.sources.hub import HubDataset
from wuerstchen_pl.data.sources.mix import Mix
from wuerstchen_pl.data.sources.openmoji import OpenMoji
from wuerstchen_pl.data.sources.shards import ShardSource
from wuerstchen_pl.data.sources.source import Source
from wuerstchen_pl.data.sources.urls import Urls


def shards(
    *,
    urls: Urls,
    val_urls: Urls | None = None,
    allow_pipe: bool = False,
    download_dir: str = "downloads",
    download_gb: float = 100.0,
    val_fraction: float | None = None,
    **loading: Any,
) -> ImageTextDataModule:
    """Batches of WebDataset shards; the first five see `ShardSource`, the sixth of the module.

    Raises:
        ValueError: both val_urls and val_fraction say what validation uses.
    """
    source = ShardSource(
        urls=urls,
        val_urls=val_urls,
        allow_pipe=allow_pipe,
        download_dir=download_dir,
        download_gb=download_gb,
    )
    held_out = _held_out("val_urls", val_urls, val_fraction, default=0.001)
    return ImageTextDataModule(source=source, val_fraction=held_out, **loading)


def folder(*, root: str, **loading: Any) -> ImageTextDataModule:
    """Batches of a folder of images; `root` see `Folder`."""
    return ImageTextDataModule(source=FolderSource(root=root), **loading)


def hf(
    *,
    name: str,
    config: str | None = None,
    split: str = "train",
    val_split: str | None = None,
    image_column: str = "image",
    caption_column: str = "text",
    revision: str | None = None,
    val_fraction: float | None = None,
    **loading: Any,
) -> ImageTextDataModule:
    """Batches of a data set of the hub; the first seven see `HubDataset`, then of the module.

    Raises:
        ValueError: both val_split and val_fraction say what validation uses.
    """
    source = HubDataset(
        name=name,
        config=config,
        split=split,
        val_split=val_split,
        image_column=image_column,
        caption_column=caption_column,
        revision=revision,
    )
    held_out = _held_out("val_split", val_split, val_fraction, default=0.01)
    return ImageTextDataModule(source=source, val_fraction=held_out, **loading)


def openmoji(
    *,
    root: str,
    image_size: int,
    groups: Sequence[str] | None = None,
    limit: int | None = None,
    **loading: Any,
) -> ImageTextDataModule:
    """Batches of OpenMoji's drawings; the first four see `OpenMoji`."""
    source = OpenMoji(root=root, image_size=image_size, groups=groups, limit=limit)
    return ImageTextDataModule(source=source, image_size=image_size, **loading)


def mix(
    *,
    sources: Mapping[str, Source],
    weights: Mapping[str, float] | None = None,
    **loading: Any,
) -> ImageTextDataModule:
    """Batches of several sources; the first two see `Mix`."""
    return ImageTextDataModule(source=Mix(sources=sources, weights=weights), **loading)


def _held_out(key: str, own: Any, val_fraction: float | None, *, default: float) -> float:
    """Return the share that validation keeps of the training samples."""
    if own is None:
        return default if val_fraction is None else val_fraction
    if val_fraction:
        raise ValueError(
            f"data.{key}={own!r} and data.val_fraction={val_fraction} both say what validation "
            "uses: set one of them."
        )
    return 0.0
