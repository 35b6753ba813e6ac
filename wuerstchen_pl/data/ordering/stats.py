"""Counts of seen, dropped and bad samples and shards."""

import warnings
from collections import Counter

from wuerstchen_pl.data.sources.source import SampleError
from wuerstchen_pl.plural import plural

_EXAMPLES = 3  # warnings per kind of bad data
_ENOUGH_SAMPLES, _ENOUGH_SHARDS = 1000, 20  # minimum counts for a meaningful share of bad ones


class DataStats:
    """Counts seen, dropped and bad samples, and warns with the first examples of bad ones.

    Args:
        show: whether to warn with examples.
        limit: share of bad samples, or of broken shards, above which ``check`` raises.

    Attributes:
        counts: "seen", "dropped/<filter>", "bad/<reason>", "ignored/<reason>", "shards",
            "shards/broken" and those of the workers.
    """

    def __init__(self, *, show: bool = True, limit: float = 1.0) -> None:
        self.counts: Counter[str] = Counter()
        self.limit = limit
        self.show = show
        self._shown: Counter[str] = Counter()

    def restore(self, counts: Counter[str]) -> None:
        """Continue from a copy of earlier counts."""
        self.counts = counts.copy()

    def note_bad(self, bad: SampleError) -> None:
        """Count what is not used, and warn if it is among the first of its kind."""
        self.counts[f"{'bad' if bad.is_bad else 'ignored'}/{bad.reason}"] += bad.count
        self._shown[bad.reason] += 1
        if self.show and self._shown[bad.reason] <= _EXAMPLES:
            suffix = " (further ones are only counted)" * (self._shown[bad.reason] == _EXAMPLES)
            warnings.warn(f"skipped, {bad.reason}: {bad.where}{suffix}", stacklevel=2)

    def check(self, *, more_bad: int = 0, of_shards: int = 0) -> None:
        """Raise if the share of bad data exceeds the limit.

        Args:
            more_bad: bad samples counted elsewhere, which are counted as seen here.
            of_shards: total number of shards; broken ones are ignored if there are only a few.

        Raises:
            ValueError: the limit is exceeded; the message includes a summary.
        """
        bad = sum(n for name, n in self.counts.items() if name.startswith("bad/"))
        shares = {
            "samples": (bad + more_bad, self.counts["seen"] + bad, _ENOUGH_SAMPLES),
            "shards": (self.counts["shards/broken"], self.counts["shards"], _ENOUGH_SHARDS),
        }
        if of_shards < _ENOUGH_SHARDS:
            del shares["shards"]
        for kind, (number, total, enough) in shares.items():
            if total >= enough and number > self.limit * total:
                unreadable = f"; {plural(more_bad, 'unreadable image')}" if more_bad else ""
                raise ValueError(
                    f"{number} of {total} {kind} are bad, more than data.max_bad_fraction="
                    f"{self.limit} ({self.summary()}{unreadable}); fix the data, or raise "
                    "data.max_bad_fraction"
                )

    def summary(self) -> str:
        """The counts as text."""
        return format_counts(self.counts)


def format_counts(counts: Counter[str]) -> str:
    """The counts of a ``DataStats`` as text."""
    parts = [f"{plural(counts['seen'], 'sample')} read from {plural(counts['shards'], 'shard')}"]
    for kind in ("dropped", "bad", "ignored"):
        items = [
            f"{n} {name.partition('/')[2]}"
            for name, n in sorted(counts.items())
            if name.startswith(f"{kind}/")
        ]
        if items:
            parts.append(f"{kind}: {', '.join(items)}")
    return "; ".join(parts)
