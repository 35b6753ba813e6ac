"""A folder with a LoRA that approximates a change of weights, and how near it is."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from wuerstchen_pl.adapters.weights import AdapterWeights
from wuerstchen_pl.formats.adapter_files import FILE, write_adapter
from wuerstchen_pl.io.atomic import atomic_folder
from wuerstchen_pl.plural import plural

REPORT = "report.csv"


class Row(NamedTuple):
    """The change of a tensor, and of the weight of a layer with an adapter.

    Attributes:
        tensor: name of the layer, or of a tensor that cannot have an adapter.
        rank: of the LoRA; 0 without an adapter.
        change: Frobenius norm of the change.
        error: Frobenius norm of what the LoRA lacks of it.
    """

    tensor: str
    rank: int
    change: float
    error: float


def write_lora(
    folder: Path, adapter: AdapterWeights, networks: nn.ModuleDict, rows: Sequence[Row]
) -> None:
    """Write the file of a LoRA and ``report.csv`` with a row per tensor; print a summary.

    Raises:
        OSError: if the folder cannot be written, or is not empty.
    """
    with atomic_folder(folder) as temporary:
        write_adapter(temporary / FILE, adapter, networks)
        with (temporary / REPORT).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(Row._fields)
            table.writerows(rows)
    print(summary(rows))
    print(folder / FILE)


def summary(rows: Sequence[Row]) -> str:
    """Which shares of the squared norm of the change are in the LoRA, beyond its rank, and in
    tensors without an adapter; they add up to 100 %.
    """
    total = sum(row.change**2 for row in rows) or 1.0
    layers = [row for row in rows if row.rank]
    lacking = [row for row in rows if not row.rank]
    beyond = sum(row.error**2 for row in layers) / total
    without = sum(row.error**2 for row in lacking) / total
    ranks = sorted({row.rank for row in layers})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    lines = [
        "of the squared Frobenius norm of the change",
        f"{1 - beyond - without:8.2%} is in the LoRA: {plural(len(layers), 'layer')}, rank {rank}",
        f"{beyond:8.2%} is beyond the rank",
    ]
    if lacking:
        largest = max(lacking, key=lambda row: row.change)
        lines.append(
            f"{without:8.2%} is in {plural(len(lacking), 'tensor')} that cannot have an adapter, "
            f"such as {largest.tensor}"
        )
    return "\n".join(lines)
