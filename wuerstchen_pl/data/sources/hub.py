"""A dataset of the Hugging Face Hub, or one saved on disk by the ``datasets`` library."""

from pathlib import Path
from typing import Any

from wuerstchen_pl.data.sources.folder import parse_range, row_ranges
from wuerstchen_pl.data.sources.metadata import NUMBER_COLUMNS, parse_captions, parse_numbers
from wuerstchen_pl.data.sources.source import (
    Sample,
    SampleError,
    ShardGroup,
    ShardIndex,
    Split,
    UnusableSampleError,
)
from wuerstchen_pl.io.images import upright_size


class HubDataset:
    """A ``Source`` over a table with a column of images and one of captions.

    Needs the package ``datasets``: pip install 'wuerstchen_pl[hf]'. Code that comes with a dataset
    is never run.

    Args:
        name: dataset name on the Hub, or the path of a folder that ``datasets`` can load.
        config: name of the dataset configuration, if there are several.
        split: split for training.
        val_split: split for validation; None holds validation samples out of ``split``.
        image_column: column of the images, or of their encoded bytes.
        caption_column: column of the captions, or of lists of captions to draw one from.
        revision: git revision on the Hub.
    """

    def __init__(
        self,
        *,
        name: str,
        config: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        image_column: str = "image",
        caption_column: str = "text",
        revision: str | None = None,
    ) -> None:
        if not name:
            raise ValueError("name='' is empty; use the name of a dataset, or its folder")
        if split == val_split:
            raise ValueError(
                f"val_split={val_split!r} is also the training split; use another split, or "
                "val_fraction"
            )
        self.name, self.config, self.revision = name, config, revision
        self.splits: dict[Split, str | None] = {"train": split, "val": val_split}
        self.image_column, self.caption_column = image_column, caption_column
        self._tables: dict[str, Any] = {}

    def prepare(self) -> None:
        """Download what is missing, and check the columns.

        Raises:
            FileNotFoundError: the dataset or split does not exist.
            ModuleNotFoundError: the package ``datasets`` is not installed.
            ValueError: a column is missing or has the wrong type.
        """
        for split in self.splits.values():
            if split is not None:
                self._table(split)

    def groups(self, split: Split) -> list[ShardGroup]:
        """The shards, which are row ranges of the table."""
        name = self.splits[split]
        if name is None:
            return []
        return [ShardGroup(1.0, [f"{name}:{r}" for r in row_ranges(len(self._table(name)))])]

    def open(self, shard: str) -> ShardIndex:
        """Index the samples of a row range; reads all bytes of its images."""
        split, _, row_range = shard.rpartition(":")
        table = self._table(split)
        samples, bad = [], []
        for number in range(*parse_range(row_range)):
            try:
                samples.append(self._sample(shard, number, table))
            except UnusableSampleError as error:
                bad.append(SampleError(str(error), f"{self.name}, row {number} of {split}"))
        return ShardIndex(samples, bad)

    def read(self, sample: Sample) -> bytes:
        """The encoded image of a sample."""
        split = sample.shard.rpartition(":")[0]
        data = self._bytes(self._table(split)[sample.offset][self.image_column])
        if data is None:
            raise FileNotFoundError(f"{sample.name} has no image")
        return data

    def _sample(self, shard: str, number: int, table: Any) -> Sample:
        """The sample of a row.

        Raises:
            UnusableSampleError: it cannot be used.
        """
        row = table[number]
        data = self._bytes(row[self.image_column])
        if data is None:
            raise UnusableSampleError("no image")
        captions = parse_captions(row[self.caption_column])
        size = upright_size(data)
        if size is None:
            raise UnusableSampleError("unreadable image")
        key = f"{number:09d}"
        row_and_size = number, len(data)
        return Sample(
            key, captions, *size, shard, *row_and_size, group_key=key, metadata=parse_numbers(row)
        )

    def _bytes(self, image: Any) -> bytes | None:
        """An image's bytes, from the table or from a file of the dataset."""
        if image is None or image["bytes"] is not None:
            return None if image is None else image["bytes"]
        try:
            path = Path(image["path"] or "").resolve()
            allowed = any(path.is_relative_to(folder) for folder in self._allowed_folders())
            return path.read_bytes() if allowed and path.is_file() else None
        except (OSError, ValueError, RuntimeError):  # an invalid path, as one with a NUL character
            return None

    def _allowed_folders(self) -> list[Path]:
        """Folders that images are read from: an untrusted table could name any local file."""
        import datasets
        import huggingface_hub.constants as hub

        caches = (datasets.config.HF_DATASETS_CACHE, hub.HF_HUB_CACHE, hub.HF_ASSETS_CACHE)
        return [Path(folder).expanduser().resolve() for folder in (self.name, *caches)]

    def _table(self, split: str) -> Any:
        if split not in self._tables:
            self._tables[split] = self._load(split)
        return self._tables[split]

    def _load(self, split: str) -> Any:
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "data=hf needs the package datasets; run pip install 'wuerstchen_pl[hf]'"
            ) from error
        saved = Path(self.name).expanduser()
        is_saved = (saved / "dataset_dict.json").is_file() or (saved / "state.json").is_file()
        try:
            if is_saved:
                loaded = datasets.load_from_disk(str(saved))
            else:
                loaded = datasets.load_dataset(
                    self.name, self.config, split=split, revision=self.revision
                )
        except (OSError, ValueError, KeyError, ConnectionError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FileNotFoundError(
                f"data.name={self.name!r} with data.split={split!r} cannot be loaded ({first}); "
                "check the name, or use the path of a folder"
            ) from error
        table = self._saved_table(loaded, split) if is_saved else loaded
        self._check_columns(table, datasets)
        # Other columns would be decoded too, and may refer to files and URLs.
        metadata = [name for name in NUMBER_COLUMNS if name in table.column_names]
        table = table.select_columns([self.image_column, self.caption_column, *metadata])
        return table.cast_column(self.image_column, datasets.Image(decode=False))

    def _saved_table(self, loaded: Any, split: str) -> Any:
        """One split of what ``save_to_disk`` wrote: several splits by name, or a single one.

        Raises:
            ValueError: if a key would have no effect, such as a split that does not exist.
        """
        for key in ("config", "revision"):
            if getattr(self, key) is not None:
                raise ValueError(
                    f"data.{key}={getattr(self, key)!r} has no effect on a saved dataset; remove it"
                )
        splits = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
        if split not in splits:
            key = "val_split" if split == self.splits["val"] else "split"
            raise ValueError(
                f"data.{key}={split!r} is not a split of {self.name!r}, which has only "
                f"{', '.join(splits)}; use one of these"
            )
        return splits[split]

    def _check_columns(self, table: Any, datasets: Any) -> None:
        for key, column in (
            ("image_column", self.image_column),
            ("caption_column", self.caption_column),
        ):
            if column not in table.column_names:
                raise ValueError(
                    f"data.{key}={column!r} is not a column of {self.name!r}; choose from "
                    f"{', '.join(table.column_names)}"
                )
        if not _is_image(table.features[self.image_column], datasets):
            raise ValueError(
                f"data.image_column={self.image_column!r} of {self.name!r} contains no images but "
                f"{table.features[self.image_column]}; use the column of the images"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # Each worker memory-maps the table from disk itself.
        return _hub, (self.__dict__ | {"_tables": {}},)


def _hub(state: dict[str, Any]) -> HubDataset:
    source = HubDataset.__new__(HubDataset)
    source.__dict__.update(state)
    return source


def _is_image(feature: Any, datasets: Any) -> bool:
    """Whether a column contains images, or what can be cast to images."""
    if isinstance(feature, dict):
        return feature.keys() == {"bytes", "path"}
    is_bytes = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    return is_bytes or isinstance(feature, datasets.Image)
