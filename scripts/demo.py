"""Train the three stages, sample, evaluate, and write one page: ``make demo``, ``make demo-full``.

Each step is one of the package's commands, printed before it runs. Finished steps are skipped, and
interrupted ones resume.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from scripts.demo_estimate import training_minutes
from scripts.demo_page import write_page
from wuerstchen_pl.plural import plural

ROOT = Path("outputs")


def bfloat16_is_faster() -> bool:
    """Whether matrix multiplication is faster in bfloat16 than in float32 on this machine."""
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
    """Run one command of the package; if it fails, exit with its exit code."""
    command = [sys.executable, "-m", f"wuerstchen_pl.{module}", *overrides]
    print("\n$ python -m", " ".join(command[2:]), flush=True)
    if code := subprocess.run(command).returncode:
        sys.exit(code)


def main() -> None:
    """Train, evaluate and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", default="demo", choices=["demo", "openmoji"])
    experiment = parser.parse_args().experiment
    folder = ROOT / experiment
    bf16 = bfloat16_is_faster()
    precision, dtype = ("bf16-mixed", "bfloat16") if bf16 else ("32-true", "float32")

    start = time.monotonic()
    arguments = [f"experiment={experiment}", "ckpt=auto", f"trainer.precision={precision}"]
    if not folder.exists():
        print("Measuring a few steps of each stage ...", flush=True)
        minutes = training_minutes(arguments, ROOT / "data")
        about = plural(max(1, round(minutes)), "minute")
        print(f"Training takes about {about} on this machine.", flush=True)
    for stage in "abc":
        run("train", f"stage={stage}", *arguments)
    evaluation = folder / "evaluation"
    newest = max((folder / "c/checkpoints").glob("step*.ckpt")).stat().st_mtime
    if evaluation.is_dir() and evaluation.stat().st_mtime < newest:  # of older weights
        shutil.rmtree(evaluation)
    if not (evaluation / "metrics.json").is_file():
        run("evaluate", f"model={folder}/c", f"output_dir={evaluation}", f"dtype={dtype}")
    page = write_page(folder, bf16=bf16)
    minutes = (time.monotonic() - start) / 60
    print(f"\n{minutes:.1f} minutes on {plural(torch.get_num_threads(), 'thread')}. Open {page}")


if __name__ == "__main__":
    main()
