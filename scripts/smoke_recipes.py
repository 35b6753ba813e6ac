"""Run all of the paper's recipes in miniature on a CPU: ``python -m scripts.smoke_recipes``.

Trains Stage A, both phases of B and all four of C, each from the weights of the previous phase,
with the tiny preset and a few steps on OpenMoji; then interpolates the third and fourth phase of C
and samples an image. So few steps learn nothing: this checks that the phases fit together, with
12 x 12 and 24 x 24 latents and three aspect ratios.
"""

import argparse
import subprocess
import sys
from pathlib import Path

PHASES = {
    "paper_a": 8, "paper_b_512": 4, "paper_b_1024": 2, "paper_c_1": 8, "paper_c_2": 4,
    "paper_c_3": 4, "paper_c_4": 4,
}  # fmt: skip
"""Recipe, in training order -> global batch size."""


def main() -> None:
    """The command-line program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("outputs/smoke_recipes"))
    parser.add_argument("--steps", type=int, default=10, help="training steps per phase")
    parser.add_argument("overrides", nargs="*", help="further keys of the trainings, key=value")
    options = parser.parse_args()
    for experiment, global_batch in PHASES.items():
        run("wuerstchen_pl.train", *train_arguments(experiment, global_batch, options))
    third, fourth = (str(options.root / f"paper_c_{n}/c") for n in (3, 4))
    interpolated = str(options.root / "interpolated")
    run("wuerstchen_pl.interpolate", f"a={third}", f"b={fourth}", f"to={interpolated}")
    run(
        "wuerstchen_pl.sample", f"model={interpolated}", "prompt=a red heart", "height=256",
        "width=512", f"output_dir={options.root / 'samples'}",
    )  # fmt: skip


def train_arguments(experiment: str, global_batch: int, options: argparse.Namespace) -> list[str]:
    """The arguments of ``wuerstchen_pl.train`` for a phase."""
    return [
        f"experiment={experiment}", "preset=tiny", "data=openmoji", "data.limit=48",
        f"paths.root={options.root}", f"trainer.max_steps={options.steps}", "ckpt=auto",
        "trainer=cpu", "trainer.precision=32-true", f"global_batch={global_batch}",
        "data.batch_size=2", f"validate_every_steps={options.steps}", "data.val_fraction=0.1",
        "callbacks.sample_grids.num_images=1", "stage.lr_schedule.warmup_steps=2",
        *options.overrides,
    ]  # fmt: skip


def run(module: str, *arguments: str) -> None:
    """Run a program of this package; if it fails, exit with its exit code."""
    process = subprocess.run([sys.executable, "-m", module, *arguments])
    if process.returncode:
        sys.exit(process.returncode)


if __name__ == "__main__":
    main()
