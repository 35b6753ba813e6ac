"""Selects the samples to train on, configured in YAML; dropped samples are counted per filter."""

import dataclasses
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

from wuerstchen_pl.data.sources.source import Sample

SCRIPTS = (
    *("arabic", "armenian", "bengali", "bopomofo", "cjk", "cyrillic", "devanagari", "ethiopic"),
    *("georgian", "greek", "gujarati", "hangul", "hebrew", "hiragana", "katakana", "khmer"),
    *("latin", "myanmar", "tamil", "telugu", "thai", "tibetan"),
)
"""The first word of the Unicode names of letters, in lower case."""


class Filters:
    """Drops samples by their metadata; a filter that is None drops nothing.

    A sample without a score fails the filter of that score, and is counted separately, such as
    "no punsafe". Caption filters apply to each caption; a sample is dropped if none passes.

    Args:
        min_size: minimum shorter side in pixels.
        max_size: maximum longer side in pixels.
        max_ratio: maximum ratio of longer to shorter side.
        max_pwatermark: maximum probability of a watermark (LAION: 0.5).
        max_punsafe: maximum probability of being unsafe (LAION: 0.99).
        min_aesthetic: minimum aesthetic score (LAION: 5.0).
        min_words: minimum number of words in a caption.
        max_words: maximum number of words in a caption.
        scripts: names from SCRIPTS; more than half of a caption's letters must be in these.
        require_caption: drop samples without a caption; otherwise their caption is empty, and
            caption filters do not apply to them.
        forbidden_words: a caption that contains one of these is dropped; case-insensitive.
        deduplicate: drop an image with the same bytes as an earlier one of the run; takes about
            120 bytes of memory and 25 bytes of each checkpoint per image.

    Raises:
        ValueError: a script is unknown, or a minimum exceeds its maximum.
    """

    def __init__(
        self,
        *,
        min_size: int | None = None,
        max_size: int | None = None,
        max_ratio: float | None = None,
        max_pwatermark: float | None = None,
        max_punsafe: float | None = None,
        min_aesthetic: float | None = None,
        min_words: int | None = None,
        max_words: int | None = None,
        scripts: Sequence[str] | None = None,
        require_caption: bool = True,
        forbidden_words: Sequence[str] = (),
        deduplicate: bool = False,
    ) -> None:
        if unknown := sorted(set(scripts or ()) - set(SCRIPTS)):
            raise ValueError(
                f"scripts={list(scripts or ())} contains {unknown[0]!r}; choose from "
                f"{', '.join(SCRIPTS)}"
            )
        for minimum, maximum in (("min_size", "max_size"), ("min_words", "max_words")):
            low, high = locals()[minimum], locals()[maximum]
            if low is not None and high is not None and low > high:
                raise ValueError(
                    f"{minimum}={low} exceeds {maximum}={high}; raise "
                    "the maximum or lower the minimum"
                )
        if max_ratio is not None and max_ratio < 1:
            raise ValueError(
                f"max_ratio={max_ratio} (longer / shorter side) is out of range; use 1 or more"
            )
        self.min_size, self.max_size, self.max_ratio = min_size, max_size, max_ratio
        self.max_pwatermark, self.max_punsafe = max_pwatermark, max_punsafe
        self.min_aesthetic = min_aesthetic
        self.min_words, self.max_words = min_words, max_words
        self.scripts = None if scripts is None else frozenset(scripts)
        self.forbidden_words = frozenset(word.casefold() for word in forbidden_words)
        self.require_caption = require_caption
        self.deduplicate = deduplicate

    def apply(self, sample: Sample) -> Sample | str:
        """The sample with only its passing captions, at least one, or why it is dropped."""
        failed = self._by_shape(sample) or self._by_scores(sample)
        if failed:
            return failed
        if not sample.captions:
            without = dataclasses.replace(sample, captions=("",))
            return "no caption" if self.require_caption else without
        reasons = [self._by_caption(caption) for caption in sample.captions]
        if not any(reasons):
            return sample
        passing = [c for c, reason in zip(sample.captions, reasons, strict=True) if not reason]
        if not passing:
            return next(filter(None, reasons))
        return dataclasses.replace(sample, captions=tuple(passing))

    def _by_shape(self, sample: Sample) -> str | None:
        shorter, longer = sorted((sample.width, sample.height))
        if self.min_size is not None and shorter < self.min_size:
            return "min_size"
        if self.max_size is not None and longer > self.max_size:
            return "max_size"
        if self.max_ratio is not None and longer > self.max_ratio * shorter:
            return "max_ratio"
        return None

    def _by_scores(self, sample: Sample) -> str | None:
        metadata = sample.metadata
        aesthetic = metadata.get("aesthetic", metadata.get("AESTHETIC_SCORE"))
        if self.max_pwatermark is not None:
            if "pwatermark" not in metadata:
                return "no pwatermark"
            if metadata["pwatermark"] > self.max_pwatermark:
                return "max_pwatermark"
        if self.max_punsafe is not None:
            if "punsafe" not in metadata:
                return "no punsafe"
            if metadata["punsafe"] > self.max_punsafe:
                return "max_punsafe"
        if self.min_aesthetic is not None:
            if aesthetic is None:
                return "no aesthetic"
            if aesthetic < self.min_aesthetic:
                return "min_aesthetic"
        return None

    def _by_caption(self, caption: str) -> str | None:
        words = caption.split()
        if self.min_words is not None and len(words) < self.min_words:
            return "min_words"
        if self.max_words is not None and len(words) > self.max_words:
            return "max_words"
        if self.scripts is not None and not _mostly(caption, self.scripts):
            return "scripts"
        if self.forbidden_words and self.forbidden_words & set(_normalized(words)):
            return "forbidden_words"
        return None


def _normalized(words: Iterable[str]) -> Iterable[str]:
    """Each word in lower case, with and without surrounding punctuation."""
    for word in map(str.casefold, words):
        yield word
        yield word.strip(".,;:!?\"'()[]{}")


def _mostly(caption: str, scripts: frozenset[str]) -> bool:
    """Whether more than half of the letters are in ``scripts``; true without any letter."""
    letters = [_script(char) for char in caption if char.isalpha()]
    return not letters or 2 * sum(script in scripts for script in letters) > len(letters)


@lru_cache(maxsize=4096)
def _script(char: str) -> str:
    return unicodedata.name(char, "").partition(" ")[0].lower()
