"""The weights of an adapter, and the change of a layer's weight that they stand for.

LoRA (Hu et al. 2021, arXiv 2106.09685), DoRA (Liu et al. 2024, arXiv 2402.09353), LoHa and LoKr
(Hyeon-Woo et al. 2021, arXiv 2108.06098; Yeh et al. 2023, arXiv 2309.14859).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor


class LayerAdapter(Protocol):
    """The adapter of one linear layer."""

    def delta(self, weight: Tensor) -> Tensor:
        """(out, in) weight -> its change at full strength, in float32."""

    def tensors(self) -> dict[str, Tensor]:
        """Names in peft, without the name of the layer, and the tensors; the scale is included."""


class LowRank:
    """LoRA: ``scale B A``; with magnitudes m, DoRA: rows of W + ``scale B A`` of length m.

    Args:
        down: A, (r, in).
        up: B, (out, r).
        scale: alpha / r.
        magnitude: (out,), or None for LoRA.
    """

    def __init__(
        self, down: Tensor, up: Tensor, *, scale: float = 1.0, magnitude: Tensor | None = None
    ) -> None:
        self.down, self.up, self.magnitude = down.float(), up.float() * scale, magnitude

    @property
    def rank(self) -> int:
        """The rank r."""
        return len(self.down)

    def delta(self, weight: Tensor) -> Tensor:
        """See ``LayerAdapter``."""
        change = (self.up @ self.down).to(weight.device)
        if self.magnitude is None:
            return change
        directions = weight.float() + change
        lengths = directions.norm(dim=1, keepdim=True)
        magnitude = self.magnitude.float().to(weight.device)[:, None]
        return magnitude / lengths * directions - weight.float()

    def tensors(self) -> dict[str, Tensor]:
        """See ``LayerAdapter``."""
        magnitude = {} if self.magnitude is None else {"lora_magnitude_vector": self.magnitude}
        return {"lora_A.weight": self.down, "lora_B.weight": self.up, **magnitude}


class Hadamard:
    """LoHa: ``scale (A1 B1) * (A2 B2)``, elementwise, with A (out, r) and B (r, in)."""

    def __init__(self, tensors: Mapping[str, Tensor], *, scale: float = 1.0) -> None:
        self.factors = {name: tensor.float() for name, tensor in tensors.items()}
        self.factors["hada_w1_a"] = self.factors["hada_w1_a"] * scale

    @property
    def rank(self) -> int:
        """The rank r of both products."""
        return len(self.factors["hada_w1_b"])

    def delta(self, weight: Tensor) -> Tensor:
        """See ``LayerAdapter``."""
        products = [self.factors[f"hada_w{i}_a"] @ self.factors[f"hada_w{i}_b"] for i in (1, 2)]
        return (products[0] * products[1]).to(weight.device)

    def tensors(self) -> dict[str, Tensor]:
        """See ``LayerAdapter``."""
        return dict(self.factors)


class Kronecker:
    """LoKr: ``scale kron(W1, W2)``, each a matrix or a product of two."""

    def __init__(self, tensors: Mapping[str, Tensor], *, scale: float = 1.0) -> None:
        self.factors = {name: tensor.float() for name, tensor in tensors.items()}
        first = "lokr_w1" if "lokr_w1" in self.factors else "lokr_w1_a"
        self.factors[first] = self.factors[first] * scale

    @property
    def rank(self) -> int:
        """The rank r of the products; 1 if there are none."""
        ranks = [len(t) for name, t in self.factors.items() if name.endswith("_b")]
        return ranks[0] if ranks else 1

    def delta(self, weight: Tensor) -> Tensor:
        """See ``LayerAdapter``."""
        return torch.kron(self._factor("lokr_w1"), self._factor("lokr_w2")).to(weight.device)

    def _factor(self, name: str) -> Tensor:
        if name in self.factors:
            return self.factors[name]
        return self.factors[f"{name}_a"] @ self.factors[f"{name}_b"]

    def tensors(self) -> dict[str, Tensor]:
        """See ``LayerAdapter``."""
        return dict(self.factors)


Method = Literal["lora", "dora", "loha", "lokr"]
AdapterWeights = dict[str, LowRank | Hadamard | Kronecker]
"""Name of a layer, after ``split_projections`` -> its adapter."""


def method_of(adapter: LowRank | Hadamard | Kronecker) -> Method:
    """The method of a layer's adapter."""
    if isinstance(adapter, LowRank):
        return "lora" if adapter.magnitude is None else "dora"
    return "loha" if isinstance(adapter, Hadamard) else "lokr"


def from_tensors(
    tensors: Mapping[str, Tensor], *, scale: float = 1.0
) -> LowRank | Hadamard | Kronecker:
    """The adapter of a layer from tensors with peft's names.

    Raises:
        ValueError: if they are of no known kind, or one is missing.
    """
    names = set(tensors)
    if names in (set(LORA), {*LORA, "lora_magnitude_vector"}):
        return LowRank(
            tensors["lora_A.weight"], tensors["lora_B.weight"],
            scale=scale, magnitude=tensors.get("lora_magnitude_vector"),
        )  # fmt: skip
    if names == {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}:
        return Hadamard(tensors, scale=scale)
    if names in LOKR:
        return Kronecker(tensors, scale=scale)
    raise ValueError(
        f"an adapter has the tensors {', '.join(sorted(names))}, which no known method has"
    )


LORA = ("lora_A.weight", "lora_B.weight")
LOKR = tuple(
    {*first, *second}
    for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
    for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
)


@torch.no_grad()
def merged_tensors(
    state: Mapping[str, Tensor], adapters: Iterable[tuple[AdapterWeights, float]]
) -> dict[str, Tensor]:
    """The tensors of a network with adapters merged into them, in their dtype.

    Args:
        state: a network's state dict, with fused projections.
        adapters: of that network, each with the factor on its changes, which are added up.

    Raises:
        ValueError: if the network lacks a layer, or it has another size.
    """
    totals: dict[str, Tensor] = {}
    for adapter, factor in adapters:
        for name, layer in adapter.items():
            key, rows = weight_rows(name)
            if key not in state:
                raise ValueError(f"the adapter has {name}, which the network lacks")
            total = totals.setdefault(key, state[key].to(torch.float32, copy=True))
            change = layer.delta(weight_part(state[key], rows))
            if change.shape != (part := weight_part(total, rows)).shape:
                raise ValueError(
                    f"the adapter's {name} is for a weight of {tuple(change.shape)}, but the "
                    f"network's has {tuple(part.shape)}; use the model that it was trained for"
                )
            part.add_(change, alpha=factor)
    return {**state, **{key: total.to(state[key].dtype) for key, total in totals.items()}}


def weight_part(weight: Tensor, third: int | None) -> Tensor:
    """The rows of a weight that are a layer's; see ``weight_rows``."""
    return weight if third is None else weight.chunk(3)[third]


def weight_rows(layer: str) -> tuple[str, int | None]:
    """The name of a layer's weight, and for a projection which third of the fused one's rows."""
    if match := _PROJECTION.fullmatch(layer):
        return f"{match[1]}.{_FUSED[match[2]]}weight", "qkv".index(match[3])
    return f"{layer}.weight", None


_PROJECTION = re.compile(r"(.+)\.(qkv|in_proj)\.to_([qkv])")
_FUSED = {"qkv": "qkv.", "in_proj": "in_proj_"}  # the latter in nn.MultiheadAttention
