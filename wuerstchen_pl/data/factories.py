"""Targets of ``data=...``: for each kind of source, a function that builds its data module.

Other keyword arguments are passed to ``ImageTextDataModule``; see ``signatures.KWARGS_TARGETS``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.sources.folder import FolderSource
from wuerstchen_pl.data.sources.hub import HubDataset
from wuerstchen_pl.data.sources.mix import Mix
from wuerstchen_pl.data.sources.shards import ShardSource
from wuerstchen_pl.data.sources.source import Source
from wuerstchen_pl.data.sources.urls import Urls


def shards(
    *,
    urls: Urls,
    val_urls: Urls | None = None,
    caption_lines: bool = False,
    allow_pipe: bool = False,
    download_dir: str = "downloads",
    download_gb: float = 100.0,
    val_fraction: float | None = None,
    **loading: Any,
) -> ImageTextDataModule:
    """Data module of WebDataset shards; see ``ShardSource`` for the first six arguments.

    Raises:
        ValueError: both val_urls and val_fraction are set.
    """
    source = ShardSource(
        urls=urls,
        val_urls=val_urls,
        caption_lines=caption_lines,
        allow_pipe=allow_pipe,
        download_dir=download_dir,
        download_gb=download_gb,
    )
    held_out = _held_out("val_urls", val_urls, val_fraction, default=0.001)
    return ImageTextDataModule(source=source, val_fraction=held_out, **loading)


def folder(*, root: str, caption_lines: bool = False, **loading: Any) -> ImageTextDataModule:
    """Data module of a folder of images; see ``FolderSource`` for the first two arguments."""
    source = FolderSource(root=root, caption_lines=caption_lines)
    return ImageTextDataModule(source=source, **loading)


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
    """Data module of a Hub dataset; see ``HubDataset`` for the first seven arguments.

    Raises:
        ValueError: both val_split and val_fraction are set.
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
    """Data module of OpenMoji drawings; see ``OpenMoji`` for the first four arguments."""
    # its packages are not needed for other data
    from wuerstchen_pl.data.sources.openmoji import OpenMoji

    source = OpenMoji(root=root, image_size=image_size, groups=groups, limit=limit)
    return ImageTextDataModule(source=source, image_size=image_size, **loading)


def mix(
    *,
    sources: Mapping[str, Source],
    weights: Mapping[str, float] | None = None,
    **loading: Any,
) -> ImageTextDataModule:
    """Data module of several sources; see ``Mix`` for the first two arguments."""
    return ImageTextDataModule(source=Mix(sources=sources, weights=weights), **loading)


def _held_out(key: str, val_data: Any, val_fraction: float | None, *, default: float) -> float:
    """The share of the training samples to hold out for validation."""
    if val_data is None:
        return default if val_fraction is None else val_fraction
    if val_fraction:
        raise ValueError(
            f"{key}={val_data!r} and val_fraction={val_fraction} both set the validation "
            "data; set only one of them"
        )
    return 0.0
