"""Reference weights, inputs and outputs of the authors' code at small sizes, and their loading."""

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from wuerstchen_pl.formats.key_map import from_external, key_mappings
from wuerstchen_pl.formats.lazy_tensors import in_memory

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """Read a reference file: constructor arguments, weights, and inputs with outputs."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {
        k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")
    }
    return config, weights, {k: v for k, v in tensors.items() if not k.startswith("weights.")}


def load(net: nn.Module, config: dict, weights: dict[str, Tensor]) -> nn.Module:
    """Load the authors' weights into our network."""
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items() if k != "scale_factor"}
    target = f"{type(net).__module__}.{type(net).__qualname__}"
    table = key_mappings({"_target_": target, **config}, shapes, "upstream")
    external = {name: in_memory(tensor) for name, tensor in weights.items()}
    native = from_external(external, table, shapes, "the golden file")
    state = {name: lazy.load() for name, lazy in native.items()}
    result = net.load_state_dict(state, strict=False)
    assert set(result.missing_keys) <= {"scale_factor"}, result
    return net.eval()
