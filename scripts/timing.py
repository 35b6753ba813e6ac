"""What the benchmarks share: timing side by side, and the table that they leave."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

Work = Callable[[], Any]
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


class SideBySide(NamedTuple):
    """Medians in milliseconds, and the median of each round's ratio."""

    theirs_ms: float
    ours_ms: float
    ratio: float


def seconds(work: Work) -> float:
    """How long it takes, what it started on a GPU included."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def side_by_side(theirs: Work, ours: Work, rounds: int) -> SideBySide:
    """Time two works in turns, each first in every other round, after one round to warm up."""
    pairs = []
    for i in range(rounds + 1):
        if i % 2:
            pairs.append((seconds(theirs), seconds(ours)))
        else:
            pairs.append((seconds(ours), seconds(theirs))[::-1])
    kept = pairs[1:]
    return SideBySide(
        statistics.median(a for a, _ in kept) * 1000,
        statistics.median(b for _, b in kept) * 1000,
        statistics.median(a / b for a, b in kept),
    )


def hardware() -> str:
    """The GPU, or the CPU with the threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ] if Path("/proc/cpuinfo").exists() else []  # fmt: skip
    threads = torch.get_num_threads()
    return f"{(names or [platform.machine()])[0]} CPU {threads} thread{'s' * (threads > 1)}"


def write_table(theme: str, command: str, notes: str, header: str, rows: Sequence[str]) -> Path:
    """Write ``benchmarks/<theme>_<hardware>_<date>.md``: what, where, when, how, and the rows."""
    lines = [
        f"# {theme.replace('_', ' ').capitalize()}", "",
        f"{hardware()}, torch {torch.__version__}, {date.today()}.",
        f"`{command}`", "", notes, "", header, "|" + "---|" * (header.count("|") - 1), *rows, "",
    ]  # fmt: skip
    slug = "-".join(hardware().lower().replace("(r)", "").replace("(tm)", "").split())
    path = BENCHMARKS / f"{theme}_{slug}_{date.today()}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines))
    return path
