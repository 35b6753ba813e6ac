"""WebDataset shards, local or remote, in img2dataset's layout."""

from pathlib import Path

from wuerstchen_pl.data.sources import manifest
from wuerstchen_pl.data.sources.download_cache import DownloadCache
from wuerstchen_pl.data.sources.file_io import OpenFiles
from wuerstchen_pl.data.sources.source import Sample, SampleError, ShardGroup, ShardIndex, Split
from wuerstchen_pl.data.sources.tar_index import index_tar
from wuerstchen_pl.data.sources.urls import (
    Urls,
    check_any_exists,
    expand_urls,
    is_remote,
    reject_url,
)


class ShardSource:
    """A ``Source`` over tar files.

    A remote shard is downloaded whole, in the background, when it is opened; once per machine.

    Args:
        urls: the training shards: a tar file, a folder, a list file, a brace pattern, an http(s)
            URL, or a list of these.
        val_urls: validation shards; None holds validation samples out of ``urls``.
        caption_lines: whether each line of a caption file is a caption, of which training draws
            one, instead of the whole file.
        allow_pipe: allow "pipe:COMMAND", which runs the command in a shell.
        download_dir: folder for downloaded shards, and for the indexes of read-only ones.
        download_gb: size limit of that folder in gigabytes.

    Raises:
        ValueError: a URL is not supported, or would run a command without ``allow_pipe``.
    """

    def __init__(
        self,
        *,
        urls: Urls,
        val_urls: Urls | None = None,
        caption_lines: bool = False,
        allow_pipe: bool = False,
        download_dir: str = "downloads",
        download_gb: float = 100.0,
    ) -> None:
        self.urls: dict[Split, Urls | None] = {"train": urls, "val": val_urls}
        self.caption_lines = caption_lines
        self.allow_pipe = allow_pipe
        self.download_cache = DownloadCache(
            folder=download_dir, keep_bytes=round(download_gb * 1e9)
        )
        for key, patterns in (("urls", urls), ("val_urls", val_urls)):
            for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
                reject_url(pattern, key=key, allow_pipe=allow_pipe)
        self._names: dict[Split, list[str]] = {}
        self._files = OpenFiles()

    def prepare(self) -> None:
        """Check that there are local shards; remote ones are checked when they are opened."""
        check_any_exists(self._shards("train"), key="data.urls")
        if self.urls["val"] is not None:
            check_any_exists(self._shards("val"), key="data.val_urls")

    def groups(self, split: Split) -> list[ShardGroup]:
        """The shards of a split."""
        return [] if self.urls[split] is None else [ShardGroup(1.0, self._shards(split))]

    def open(self, shard: str) -> ShardIndex:
        """Index a shard; a remote one is downloaded first."""
        try:
            path = self._path(shard)
        except OSError as error:
            return ShardIndex(
                [], [SampleError("unreachable shard", f"{shard}: {error}")], broken=True
            )
        expected = None if is_remote(shard) else manifest.expected_samples(shard)
        return index_tar(
            path,
            shard,
            expected,
            index_dir=self.download_cache.folder / "indexes",
            caption_lines=self.caption_lines,
        )

    def read(self, sample: Sample) -> bytes:
        """The encoded image of a sample."""
        return self._files.read(self._path(sample.shard), sample.offset, sample.size)

    def _path(self, shard: str) -> str:
        if not self.allow_pipe and shard.startswith("pipe:"):
            raise PermissionError(f"{shard!r} would run a command, but data.allow_pipe is false")
        return self.download_cache.path(shard) if is_remote(shard) else shard

    def _shards(self, split: Split) -> list[str]:
        if split not in self._names:
            key = "data.urls" if split == "train" else "data.val_urls"
            self._names[split] = expand_urls(
                self.urls[split] or (), key=key, allow_pipe=self.allow_pipe
            )
        return self._names[split]


def folder_shards(folder: Path) -> list[str]:
    """The shards of a folder, from its manifest."""
    entries = (manifest.read(folder) or {}).get("shards", ())
    return [str(folder / entry["name"]) for entry in entries]
