"""Interpolate two models: out = (1 - w) a + w b, tensor by tensor."""

from pathlib import Path

import torch
from omegaconf import DictConfig

from wuerstchen_pl.formats import registry
from wuerstchen_pl.formats.lazy_tensors import LazyTensor
from wuerstchen_pl.formats.model import Model, Part, compare_shapes
from wuerstchen_pl.io.output_folder import claimed
from wuerstchen_pl.programs.convert import write


def interpolate(a: Model, b: Model, weight: float) -> Model:
    """The weighted mean of two models.

    Args:
        a: the result at weight 0; its config, tokenizer and integer tensors are kept.
        b: the result at weight 1.
        weight: w, in [0, 1].

    Raises:
        ValueError: if the models' parts, tensor names or shapes differ, or the weight is out of
            range.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight={weight} is out of range; use 0 to 1")
    if a.parts.keys() != b.parts.keys():
        parts_a, parts_b = (", ".join(sorted(model.parts)) for model in (a, b))
        raise ValueError(f"a has {parts_a}, b has {parts_b}; use models with the same parts")
    if a.settings != b.settings:
        raise ValueError(
            f"a has settings {a.settings}, b has {b.settings}; use models with equal settings"
        )
    parts = {}
    for name, part in a.parts.items():
        if part.config != b.parts[name].config:
            raise ValueError(f"the configs of {name} in a and b differ; use the same networks")
        tensors_b = b.parts[name].tensors
        compare_shapes(_shapes(part.tensors), _shapes(tensors_b), f"{name} in b")
        tensors = {k: _lerp(lazy, tensors_b[k], weight) for k, lazy in part.tensors.items()}
        parts[name] = Part(part.config, tensors, part.tokenizer)
    return Model(parts, a.settings)


def _shapes(tensors: dict[str, LazyTensor]) -> dict[str, tuple[int, ...]]:
    return {name: lazy.shape for name, lazy in tensors.items()}


def _lerp(a: LazyTensor, b: LazyTensor, weight: float) -> LazyTensor:
    if not a.dtype.is_floating_point:
        return a

    def load() -> torch.Tensor:
        return torch.lerp(a.load().float(), b.load().float(), weight).to(a.dtype)

    return LazyTensor(a.shape, a.dtype, load)


def run(cfg: DictConfig) -> None:
    """Read both models, and write the interpolated one."""
    with claimed(Path(cfg.to), key="to", must_be_empty=True):
        a, b = (registry.read_model(source, variant=cfg.variant) for source in (cfg.a, cfg.b))
        model = interpolate(a, b, cfg.weight)
        write(model, Path(cfg.to), cfg.format)
