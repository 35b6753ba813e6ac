"""Selects samples: not held out, passing the filters, not upscaled too much, not a duplicate."""

from collections.abc import Iterable, Iterator, Sequence

from wuerstchen_pl.data.ordering.buckets import Buckets
from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.ordering.prefetch import IMAGE_HASH
from wuerstchen_pl.data.ordering.stats import DataStats
from wuerstchen_pl.data.sources.source import Holdout, Sample, ShardIndex, unit_hash


class SampleSelector:
    """Selects the samples of a group of shards; a duplicate is dropped in every epoch.

    Args:
        filters: filters to apply.
        shards: names of all shards of the group.
        buckets: the possible sizes of batches, for ``max_upscale``.
        max_upscale: images that their bucket would upscale more are dropped; None keeps all.

    Attributes:
        first_by_hash: image hash -> hash of the first sample with that image; empty unless the
            filters deduplicate.
    """

    def __init__(
        self,
        filters: Filters,
        *,
        shards: Sequence[str],
        buckets: Buckets | None = None,
        max_upscale: float | None = None,
    ) -> None:
        self.filters, self.buckets, self.max_upscale = filters, buckets, max_upscale
        self._numbers = {shard: number for number, shard in enumerate(shards)}
        self.first_by_hash: dict[int, int] = {}

    def restore_hashes(self, hashes: Iterable[tuple[int, int]]) -> None:
        """Replace ``first_by_hash``, given as pairs in the order of the samples."""
        self.first_by_hash = dict(hashes)

    def select(self, sample: Sample) -> Sample | str:
        """The sample with only its passing captions, or the reason why it is dropped.

        The reason is the name of a filter, "max_upscale" or "duplicate".
        """
        result = self.apply_filters(sample)
        return "duplicate" if isinstance(result, Sample) and self._is_duplicate(sample) else result

    def apply_filters(self, sample: Sample) -> Sample | str:
        """Like ``select``, without dropping or remembering duplicates."""
        result = self.filters.apply(sample)
        if isinstance(result, str) or self.buckets is None or not self.max_upscale:
            return result
        return result if self.buckets.enlargement(result) <= self.max_upscale else "max_upscale"

    def samples(
        self, opened: ShardIndex, *, holdout: Holdout, stats: DataStats
    ) -> Iterator[Sample]:
        """The selected samples of an opened shard, which are counted in ``stats``.

        Args:
            opened: the shard.
            holdout: samples to exclude for validation.
            stats: counts to update.

        Raises:
            ValueError: there are more bad samples or shards than ``stats`` allows.
        """
        stats.counts["shards"] += 1
        stats.counts["shards/broken"] += opened.broken
        for bad in opened.bad:
            stats.note_bad(bad)
        for sample in opened.samples:
            if sample in holdout:
                continue
            stats.counts["seen"] += 1
            result = self.select(sample)
            if isinstance(result, str):
                stats.counts[f"dropped/{result}"] += 1
            else:
                yield result
        stats.check(of_shards=len(self._numbers))

    def explain_empty(self, stats: DataStats, where: str = "") -> str:
        """The message for shards of which no sample is selected: the counts and the fix."""
        causes = [name.partition("/") for name, _ in stats.counts.most_common()]
        if dropped := [reason for kind, _, reason in causes if kind == "dropped"]:
            fix = f"relax {' and '.join(map(self._setting, dropped))}"
        elif any(kind == "bad" for kind, _, _ in causes):
            fix = "repair the data (python -m wuerstchen_pl.data check lists what cannot be used)"
        else:
            fix = "use data with captioned images"
        return f"there is nothing to train on{where} ({stats.summary()}); {fix}"

    def _setting(self, reason: str) -> str:
        """The key, with its value, that drops samples for a reason of ``select``."""
        if reason == "max_upscale":
            return f"data.max_upscale={self.max_upscale} (or lower data.image_size)"
        if reason == "no caption":
            return "data.filters.require_caption=True (or set data.captions.default=CAPTION)"
        # "no punsafe" is the reason of the filter max_punsafe
        key = next(k for k in vars(self.filters) if k.endswith(reason.removeprefix("no ")))
        value = getattr(self.filters, key)
        return f"data.filters.{key}={sorted(value) if isinstance(value, frozenset) else value}"

    def _is_duplicate(self, sample: Sample) -> bool:
        image_hash = sample.metadata.get(IMAGE_HASH)
        if image_hash is None:
            return False
        # By shard number: names change when data are moved, and may repeat between folders.
        sample_hash = round(unit_hash(f"{self._numbers[sample.shard]}/{sample.key}") * 2**56)
        return self.first_by_hash.setdefault(int(image_hash), sample_hash) != sample_hash
