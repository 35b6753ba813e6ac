"""The programs as functions, for notebooks and scripts: ``train(["stage=c", "experiment=demo"])``.

Each takes the ``key=value`` arguments of its command in a list, runs in this process, and raises
exceptions instead of ending it. They are not attributes of the package, where the modules of the
commands have these names. Sweeps and several processes need the commands.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wuerstchen_pl import cache as _cache
from wuerstchen_pl import convert as _convert
from wuerstchen_pl import evaluate as _evaluate
from wuerstchen_pl import export as _export
from wuerstchen_pl import interpolate as _interpolate
from wuerstchen_pl import lora as _lora
from wuerstchen_pl import sample as _sample
from wuerstchen_pl import train as _train
from wuerstchen_pl.data import __main__ as _data

__all__ = [
    "build_data", "cache", "check_data", "convert", "evaluate", "export", "extract_lora",
    "interpolate", "resize_lora", "sample", "train",
]  # fmt: skip


def train(arguments: Sequence[str]) -> Path:
    """Train a stage, or several with ``stage=abc``; returns the folder of the last run.

    Raises:
        ValueError: if a key or value is invalid, in the sentence that the command prints.
        OSError: if a file is missing or cannot be written.
        KeyboardInterrupt: if it was interrupted; ``ckpt=auto`` resumes from the checkpoint that
            was saved.
    """
    folders = [
        _train.command.run(one, output_key="paths.output_dir")
        for one in _train.for_each_stage(arguments)
    ]
    return folders[-1]


def sample(arguments: Sequence[str]) -> Path:
    """Generate images; returns their folder. For errors, see ``train``, as for all functions."""
    return _sample.main.run(arguments, output_key="output_dir")


def evaluate(arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Evaluate a model or images; returns for each metric what ``metrics.json`` contains."""
    folder = _evaluate.main.run(arguments, output_key="output_dir")
    return json.loads((folder / "metrics.json").read_text("utf-8"))["metrics"]


def cache(arguments: Sequence[str]) -> Path:
    """Encode images with the frozen networks; returns the folder of the cache."""
    return _cache.main.run(arguments, output_key="out")


def convert(arguments: Sequence[str]) -> Path:
    """Convert a model to another format; returns its folder."""
    return _convert.main.run(arguments, output_key="to")


def export(arguments: Sequence[str]) -> Path:
    """Export the model that a run trained; returns its folder."""
    return _export.main.run(arguments, output_key="to")


def interpolate(arguments: Sequence[str]) -> Path:
    """Interpolate two models; returns the folder of the result."""
    return _interpolate.main.run(arguments, output_key="to")


def extract_lora(arguments: Sequence[str]) -> Path:
    """Make a LoRA of the change from a model to another; returns its folder."""
    return _lora.COMMANDS["extract"].run(arguments, output_key="to")


def resize_lora(arguments: Sequence[str]) -> Path:
    """Give a LoRA another rank; returns its folder."""
    return _lora.COMMANDS["resize"].run(arguments, output_key="to")


def check_data(arguments: Sequence[str]) -> Path:
    """Inspect data and print a report; returns the folder with the plot of the image sizes."""
    return _data.COMMANDS["check"].run(arguments, output_key="output_dir")


def build_data(arguments: Sequence[str]) -> Path:
    """Write images to shards; returns their folder."""
    return _data.COMMANDS["build"].run(arguments, output_key="to")
