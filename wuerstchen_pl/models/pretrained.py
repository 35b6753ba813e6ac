"""Networks that remember where their weights were read from."""

from typing import Any

from torch import nn

from wuerstchen_pl.io.atomic import Source


class Pretrained(nn.Module):
    """A network that may be frozen with the weights of a model.

    Attributes:
        source: path of the model, and hash of the network's weights; None if they were not read
            from a model.
        arguments: the constructor's arguments and its ``_target_``; None likewise.
    """

    source: Source | None = None
    arguments: dict[str, Any] | None = None
