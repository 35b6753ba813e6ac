"""Time this package: ``make bench``, or ``python scripts/bench.py inference --threads 1``.

inference: the denoisers, Stage A's decoder and whole text-to-image runs, alternating with diffusers
on the same weights; the outputs are compared too.
prior: a training step of Stage C's prior and its activation memory, compared with diffusers' prior.
training: forward, backward and AdamW of each stage's network, on random latents.
data: loading batches from JPEG shards on one core, compared with WebDataset and torchvision.
order: the order of batches in the main process, with and without the indexes of the shards.
cache: a training step of Stage C from a cache, compared with diffusers' online encoding.

Each benchmark writes a table to ``benchmarks/``. Run them on an otherwise idle machine.
"""

import argparse

import torch

from scripts import bench_data, bench_order, bench_training

BENCHMARKS = ["inference", "training", "prior", "cache", "data", "order"]


def main() -> None:
    """Run the benchmarks named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("benchmarks", nargs="*", default=BENCHMARKS, metavar="BENCHMARK")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all")
    parser.add_argument("--rounds", type=int, default=7, help="rounds; medians are reported")
    parser.add_argument(
        "--size", choices=["small", "published"], default="published" if cuda else "small",
        help="network size for inference",
    )  # fmt: skip
    parser.add_argument("--preset", default="v2" if cuda else "tiny", help="preset for training")
    parser.add_argument("--batch", type=int, default=16, help="batch size for training")
    options = parser.parse_args()
    if unknown := set(options.benchmarks) - set(BENCHMARKS):
        parser.error(f"unknown benchmark {unknown.pop()!r}; choose from {', '.join(BENCHMARKS)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} is out of range; use 1 or more")
    if "inference" in options.benchmarks:
        from scripts import bench_inference  # needs diffusers

        print(bench_inference.run(options.size, options.rounds))
    if "training" in options.benchmarks:
        print(bench_training.run(options.preset, options.batch))
    if "prior" in options.benchmarks:
        from scripts import bench_prior  # needs diffusers

        print(bench_prior.run(options.rounds))
    if "cache" in options.benchmarks:
        from scripts import bench_cache  # needs diffusers

        print(bench_cache.run(options.rounds))
    if "data" in options.benchmarks:  # late, because these set torch to one thread
        print(bench_data.run(options.rounds))
    if "order" in options.benchmarks:
        print(bench_order.run(options.rounds))


if __name__ == "__main__":
    main()
