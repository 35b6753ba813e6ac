"""Blend two models: ``python -m scripts.interpolate A B --to C --weight 0.5``.

out = (1 - w) a + w b, tensor by tensor: as the published Stage C was made, half and half of what it
was after its third and its fourth phase of training. A and B are runs or models of any format; the
config, and what is no float, is A's.
"""

import argparse
import sys
from pathlib import Path

import torch

from wuerstchen_pl.convert import write
from wuerstchen_pl.formats import registry
from wuerstchen_pl.formats.lazy_tensors import LazyTensor
from wuerstchen_pl.formats.model import Model, Part, compare_shapes


def blend(a: Model, b: Model, weight: float) -> Model:
    """The model between two.

    Args:
        a: it is, at weight 0.
        b: it is, at weight 1.
        weight: w, in [0, 1].

    Raises:
        ValueError: if they differ in parts, names or shapes, or the weight is out of range.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight={weight} is out of range; use 0 to 1")
    if a.parts.keys() != b.parts.keys():
        both = (", ".join(sorted(model.parts)) for model in (a, b))
        raise ValueError(f"one has {next(both)}, the other {next(both)}; give the same parts")
    if a.settings != b.settings:
        raise ValueError(f"one has settings {a.settings}, the other {b.settings}; give equal ones")
    parts = {}
    for name, part in a.parts.items():
        if part.config != b.parts[name].config:
            raise ValueError(f"the configs of the two models' {name} differ; give equal networks")
        other = b.parts[name].tensors
        compare_shapes(_shapes(part.tensors), _shapes(other), f"the second model's {name}")
        tensors = {k: _between(lazy, other[k], weight) for k, lazy in part.tensors.items()}
        parts[name] = Part(part.config, tensors, part.tokenizer)
    return Model(parts, a.settings)


def _shapes(tensors: dict[str, LazyTensor]) -> dict[str, tuple[int, ...]]:
    return {name: lazy.shape for name, lazy in tensors.items()}


def _between(a: LazyTensor, b: LazyTensor, weight: float) -> LazyTensor:
    if not a.dtype.is_floating_point:
        return a

    def load() -> torch.Tensor:
        return torch.lerp(a.load().float(), b.load().float(), weight).to(a.dtype)

    return LazyTensor(a.shape, a.dtype, load)


def main() -> None:
    """The command-line program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", help="a run, a model's folder, or a hub id")
    parser.add_argument("b", help="another")
    parser.add_argument("--to", required=True, type=Path, help="a new folder")
    parser.add_argument("--weight", type=float, default=0.5, help="of the second, 0 to 1")
    parser.add_argument("--format", default="native", choices=list(registry.FORMATS))
    options = parser.parse_args()
    try:
        blended = blend(
            registry.read_model(options.a), registry.read_model(options.b), options.weight
        )
        write(blended, options.to, options.format)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(options.to)


if __name__ == "__main__":
    main()
