"""Shared by the benchmarks: paired timing, and writing the result table."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wuerstchen_pl.plural import plural

Work = Callable[[], Any]
OUTPUT_DIR = Path(__file__).parents[1] / "benchmarks"


class SideBySide(NamedTuple):
    """Median times in milliseconds, and the median of the per-round ratios reference / package."""

    reference_ms: float
    package_ms: float
    ratio: float


def wait_for_gpu() -> None:
    """Wait until the GPU has finished its work, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Work) -> float:
    """Wall-clock seconds of one call, including the GPU work that it launches."""
    start = time.perf_counter()
    work()
    wait_for_gpu()
    return time.perf_counter() - start


def median_seconds(work: Work, rounds: int, warm_up: int = 2) -> float:
    """Median of ``seconds`` over ``rounds`` calls, after ``warm_up`` calls."""
    return statistics.median([seconds(work) for _ in range(warm_up + rounds)][warm_up:])


def side_by_side(reference: Work, package: Work, rounds: int) -> SideBySide:
    """Time two callables in alternating order, after one warm-up round."""
    pairs = []
    for i in range(rounds + 1):
        if i % 2:
            pairs.append((seconds(reference), seconds(package)))
        else:
            pairs.append((seconds(package), seconds(reference))[::-1])
    measured = pairs[1:]
    return SideBySide(
        statistics.median(a for a, _ in measured) * 1000,
        statistics.median(b for _, b in measured) * 1000,
        statistics.median(a / b for a, b in measured),
    )


def hardware() -> str:
    """Name of the GPU, or of the CPU with the number of threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ] if Path("/proc/cpuinfo").exists() else []  # fmt: skip
    threads = torch.get_num_threads()
    return f"{(names or [platform.machine()])[0]} CPU {plural(threads, 'thread')}"


INSTRUCTION_SETS = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
"""Those that matter to matrix products."""


def instruction_sets() -> str:
    """Those of the CPU, in brackets; empty with a GPU."""
    if torch.cuda.is_available():
        return ""
    capabilities = torch.cpu.get_capabilities()
    return f" ({', '.join(each for each in INSTRUCTION_SETS if capabilities.get(each))})"


def write_table(
    benchmark: str,
    command: str,
    notes: str,
    header: str,
    rows: Sequence[str],
    folder: Path = OUTPUT_DIR,
) -> Path:
    """Write ``<folder>/<benchmark>_<hardware>_<date>.md``, with the command that produced it."""
    lines = [
        f"# {benchmark.replace('_', ' ').capitalize()}", "",
        f"{hardware()}{instruction_sets()}, torch {torch.__version__}, {date.today()}.",
        f"`{command}`", "", notes, "", header, "|" + "---|" * (header.count("|") - 1), *rows, "",
    ]  # fmt: skip
    slug = "-".join(hardware().lower().replace("(r)", "").replace("(tm)", "").split())
    path = folder / f"{benchmark}_{slug}_{date.today()}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines))
    return path
