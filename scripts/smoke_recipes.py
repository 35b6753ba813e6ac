"""The paper's whole way in miniature, on a CPU: ``python -m scripts.smoke_recipes``.

Its recipes as they are, Stage A, both phases of B and all four of C, each from the weights of the
one before, with the tiny preset, few steps and OpenMoji; then the third and fourth phase of C are
blended, and the blend draws an image. What is learned in so few steps is nothing; what is shown is
that the phases fit together: 12 x 12 positions, 24 x 24, and three aspect ratios.
"""

import argparse
import subprocess
import sys
from pathlib import Path

PHASES = {
    "paper_a": 8, "paper_b_512": 4, "paper_b_1024": 2, "paper_c_1": 8, "paper_c_2": 4,
    "paper_c_3": 4, "paper_c_4": 4,
}  # fmt: skip
"""Recipes in their order, and the samples of a step."""


def main() -> None:
    """The command-line program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("outputs/smoke_recipes"))
    parser.add_argument("--steps", type=int, default=10, help="of each phase")
    parser.add_argument("further", nargs="*", help="keys of the trainings, key=value")
    options = parser.parse_args()
    for experiment, samples in PHASES.items():
        run("wuerstchen_pl.train", *told(experiment, samples, options))
    third, fourth = (str(options.root / f"paper_c_{n}/c") for n in (3, 4))
    blend = str(options.root / "blend")
    run("wuerstchen_pl.interpolate", f"a={third}", f"b={fourth}", f"to={blend}")
    run(
        "wuerstchen_pl.sample", f"model={blend}", "prompt=a red heart", "height=256", "width=512",
        f"output_dir={options.root / 'samples'}",
    )  # fmt: skip


def told(experiment: str, samples: int, options: argparse.Namespace) -> list[str]:
    """The command line of a phase."""
    return [
        f"experiment={experiment}", "preset=tiny", "data=openmoji", "data.limit=48",
        f"paths.root={options.root}", f"trainer.max_steps={options.steps}", "ckpt=auto",
        "trainer=cpu", "trainer.precision=32-true", f"global_batch={samples}",
        "data.batch_size=2", f"validate_every_steps={options.steps}", "data.val_fraction=0.1",
        "callbacks.sample_grids.num_images=1", "stage.lr_schedule.warmup_steps=2", *options.further,
    ]  # fmt: skip


def run(module: str, *arguments: str) -> None:
    """Run a program of this package, and end where it does not succeed."""
    done = subprocess.run([sys.executable, "-m", module, *arguments])
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
