"""Train the three stages, sample, evaluate, and write one page: ``make demo``, ``make demo-full``.

Each step is one of the package's commands, printed before it runs; what is finished is not done
again, and what was interrupted goes on.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from scripts.demo_page import write_page

ROOT = Path("outputs")


def bfloat16_is_faster() -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32 ones."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()

    def seconds(dtype: torch.dtype) -> float:
        x, w = torch.randn(2048, 256, dtype=dtype), torch.randn(256, 1024, dtype=dtype)
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            x @ w
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)


def run(module: str, *overrides: str) -> None:
    """Run one command of the package, and stop with it if it fails."""
    command = [sys.executable, "-m", f"wuerstchen_pl.{module}", *overrides]
    print("\n$ python -m", " ".join(command[2:]), flush=True)
    if code := subprocess.run(command).returncode:
        sys.exit(code)


def main() -> None:
    """Run the steps of one experiment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", default="demo", choices=["demo", "openmoji"])
    experiment = parser.parse_args().experiment
    folder = ROOT / experiment
    bf16 = bfloat16_is_faster()
    precision = "bf16-mixed" if bf16 else "32-true"

    start = time.monotonic()
    for stage in "abc":
        run(
            "train",
            f"stage={stage}",
            f"experiment={experiment}",
            "ckpt=auto",
            f"trainer.precision={precision}",
        )
    measured = folder / "evaluation"
    newest = max((folder / "c/checkpoints").glob("step*.ckpt")).stat().st_mtime
    if measured.is_dir() and measured.stat().st_mtime < newest:  # of weights before these
        shutil.rmtree(measured)
    if not (measured / "metrics.json").is_file():
        run("evaluate", f"model={folder}/c", f"output_dir={measured}", f"bf16={bf16}")
    page = write_page(folder, bf16=bf16)
    minutes = (time.monotonic() - start) / 60
    print(f"\n{minutes:.1f} minutes on {torch.get_num_threads()} threads. Look at {page}")


if __name__ == "__main__":
    main()
