"""Captions as a batch has them: with a trigger word, and with tags shuffled or dropped."""

from dataclasses import dataclass, fields
from typing import Any

from wuerstchen_pl.data.sources.source import permutation, unit_hash


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Adds a trigger word to captions; in training also shuffles and drops their tags.

    A caption is a list of tags with a separator between them. Whether captions are replaced with
    the empty one, for classifier-free guidance, is up to the stage.

    Args:
        separator: what is between two tags; a space is added after it. The trigger word is
            separated in the same way.
        shuffle_tags: shuffle the tags in every epoch.
        keep_first: number of tags at the start that keep their place, and are never dropped.
        drop_tag_prob: probability that a tag is dropped in an epoch, in [0, 1].
        trigger: text in front of every caption, also in validation.
        default: caption of images without one. With ``default`` or ``trigger``, filters keep these
            images.

    Raises:
        ValueError: a value is out of range.
    """

    separator: str = ","
    shuffle_tags: bool = False
    keep_first: int = 0
    drop_tag_prob: float = 0.0
    trigger: str | None = None
    default: str | None = None

    def __post_init__(self) -> None:
        if not self.separator:
            raise ValueError("separator='' is empty; use what is between two tags")
        if self.keep_first < 0:
            raise ValueError(f"keep_first={self.keep_first} is below 0; use 0 or more")
        if not 0 <= self.drop_tag_prob <= 1:
            raise ValueError(
                f"drop_tag_prob={self.drop_tag_prob} is not a probability; use a number from 0 to 1"
            )

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that differ from the defaults, by name."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}

    @property
    def of_uncaptioned(self) -> str:
        """The caption of an image without one; may be empty."""
        return self.plain("")

    def plain(self, caption: str) -> str:
        """The caption for validation, with the trigger word; ``default`` if it is empty."""
        return self._join(self.trigger, caption or self.default)

    def augmented(self, caption: str, name: str) -> str:
        """The caption for training; its random changes are a function of ``name``."""
        if not self.shuffle_tags and not self.drop_tag_prob:
            return self.plain(caption)
        tags = [tag.strip() for tag in (caption or self.default or "").split(self.separator)]
        tags = [tag for tag in tags if tag]
        first, rest = tags[: self.keep_first], tags[self.keep_first :]
        rest = [
            tag
            for number, tag in enumerate(rest)
            if unit_hash(f"{name}/drop/{number}") >= self.drop_tag_prob
        ]
        if self.shuffle_tags:
            rest = [rest[number] for number in permutation(len(rest), f"{name}/tags")]
        return self._join(self.trigger, *first, *rest)

    def _join(self, *parts: str | None) -> str:
        return f"{self.separator.rstrip()} ".join(part for part in parts if part)
