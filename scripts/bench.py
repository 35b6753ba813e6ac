"""Time this package: ``make bench``, or ``python scripts/bench.py inference --threads 1``.

inference: the denoisers, Stage A's decoder and a whole text-to-image run, beside diffusers' own on
the same weights, in turns, with outputs compared in the same run.
prior: a training step of Stage C's prior and the memory it keeps, beside diffusers' prior.
training: a step of each stage's network, forward, backward and AdamW, on random latents.
data: from JPEG shards to batches, beside plain WebDataset with torchvision, on one core.
cache: a training step of Stage C from a cache, beside diffusers' recipe, which encodes online.

Each writes a table into ``benchmarks/``. Do not time beside other work.
"""

import argparse

import torch

from scripts import bench_data, bench_training

THEMES = ["inference", "training", "prior", "cache", "data"]


def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("themes", nargs="*", default=THEMES, metavar="THEME")
    parser.add_argument("--threads", type=int, help="of the CPU; all if not given")
    parser.add_argument("--rounds", type=int, default=7, help="of which the median is taken")
    parser.add_argument(
        "--size", choices=["small", "published"], default="published" if cuda else "small",
        help="of the networks that inference times",
    )  # fmt: skip
    parser.add_argument(
        "--preset", default="v2" if cuda else "tiny", help="of the networks that training times"
    )
    parser.add_argument("--batch", type=int, default=16, help="of a training step")
    options = parser.parse_args()
    if unknown := set(options.themes) - set(THEMES):
        parser.error(f"no theme {unknown.pop()!r}; choose from {', '.join(THEMES)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} measures nothing; use 1 or more")
    if "inference" in options.themes:
        from scripts import bench_inference  # which needs diffusers

        print(bench_inference.run(options.size, options.rounds))
    if "training" in options.themes:
        print(bench_training.run(options.preset, options.batch))
    if "prior" in options.themes:
        from scripts import bench_prior  # which needs diffusers

        print(bench_prior.run(options.rounds))
    if "cache" in options.themes:
        from scripts import bench_cache  # which needs diffusers

        print(bench_cache.run(options.rounds))
    if "data" in options.themes:  # last, as it takes one thread
        print(bench_data.run(options.rounds))


if __name__ == "__main__":
    main()
