"""Refuses weights that are not finite, which would otherwise give black images or nothing."""

from collections.abc import Mapping

from torch import Tensor

from wuerstchen_pl.plural import plural


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Check that all values are finite.

    Raises:
        ValueError: naming the first tensor with NaN or infinite values.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            number = int((~tensor.isfinite()).sum())
            raise ValueError(
                f"{where} has {plural(number, 'value')} in {name} (of {tensor.numel()}) "
                "that are not finite; use another checkpoint"
            )
