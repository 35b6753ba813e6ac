"""The memory of several settings of a training as a table, and what makes a batch fit on a GPU."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from wuerstchen_pl.callbacks.memory_estimate import smaller_batch

CARDS = (8, 12, 16, 24, 80)
"""Memory of common GPUs in GB."""
USABLE = 0.9
"""The share of a GPU's memory that a step may take; temporary buffers need the rest."""
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting of a training, and the bytes that it needs on a GPU.

    Attributes:
        label: what differs from the row above.
        overrides: what changes the run to this setting.
        state: bytes by purpose, whatever the batch.
        activations: bytes for no sample: what a step saves that does not grow with the batch.
        per_sample: bytes of activations for each sample.
        advised: whether it is a way to make the run fit.
    """

    label: str
    overrides: str
    state: Mapping[str, int]
    activations: float
    per_sample: float
    advised: bool

    def largest_batch(self, card: float) -> int:
        """The number of samples that fit on a GPU of ``card`` GB; 0 if none does."""
        left = USABLE * card * GB - sum(self.state.values()) - self.activations
        return max(0, int(left / max(1.0, self.per_sample)))


def memory_table(settings: Sequence[Setting]) -> str:
    """A row per setting: GB by purpose, and the largest batch on each of ``CARDS``."""
    header = ["", *settings[0].state, "activations", *(f"{card} GB" for card in CARDS)]
    rows = [header]
    for setting in settings:
        activations = f"{_gb(setting.activations)} + {_gb(setting.per_sample)} n"
        batches = (str(setting.largest_batch(card) or "-") for card in CARDS)
        state = map(_gb, setting.state.values())
        rows.append([setting.label, *state, activations, *batches])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        row[0].ljust(widths[0])
        + "".join(f"  {cell:>{n}}" for cell, n in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def _gb(size: float) -> str:
    return f"{size / GB:.2f}"


def advice(settings: Sequence[Setting], *, rows: int, rows_per_step: int) -> str:
    """A sentence: with which overrides the run fits on each of ``CARDS``.

    Args:
        settings: those that are ``advised`` are tried in their order, with the run's batch, and
            then with smaller ones.
        rows: samples of a batch.
        rows_per_step: samples of an optimizer step, which do not change.
    """
    advised = [setting for setting in settings if setting.advised]
    ways = [(_way_to_fit(advised, card, rows, rows_per_step), card) for card in CARDS]
    parts = []
    for way, group in groupby(ways, key=lambda pair: pair[0]):
        *first, last = (str(card) for _, card in group)
        cards = f"{', '.join(first)} and {last}" if first else last
        parts.append(f"on {cards} GB, {way}")
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _way_to_fit(settings: Sequence[Setting], card: float, rows: int, rows_per_step: int) -> str:
    for setting in settings:
        if setting.largest_batch(card) >= rows:
            return f"set {setting.overrides}" if setting.overrides else "this run fits as it is"
    for setting in settings:
        if smaller := smaller_batch(rows, rows_per_step, setting.largest_batch(card)):
            return f"set {setting.overrides} {smaller}".replace("  ", " ")
    return "no setting fits"
