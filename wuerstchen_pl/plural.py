"""Numbers of things in messages."""


def plural(number: int, noun: str) -> str:
    """``1 image``, ``2 images``; of several words, the last is the noun: ``1 broken shard``."""
    suffix = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{suffix}"
