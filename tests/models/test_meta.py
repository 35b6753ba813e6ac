"""Networks that are built on the meta device: as others, but without computing their values."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wuerstchen_pl.models.compressor import EfficientNet
from wuerstchen_pl.models.meta import on_meta
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.models.vqgan import VQGAN


class Operations(TorchDispatchMode):
    """Records the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.names.add(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def test_a_network_on_meta_has_the_names_and_shapes_of_others_and_no_initial_values() -> None:
    def vqgan() -> VQGAN:
        return VQGAN(width=16, bottleneck_blocks=1, codebook_size=16)

    with Operations() as usual:
        expected = vqgan().state_dict()
    with on_meta(), Operations() as on_meta_device:
        actual = vqgan().state_dict()
    assert {k: v.shape for k, v in actual.items()} == {k: v.shape for k, v in expected.items()}
    assert {tensor.device.type for tensor in actual.values()} == {"meta"}
    assert {"normal_", "uniform_"} & usual.names
    assert not {"normal_", "uniform_"} & on_meta_device.names


def test_initializers_work_again_after_the_block() -> None:
    with on_meta():
        pass
    assert torch.equal(torch.nn.init.ones_(torch.zeros(2)), torch.ones(2))


def test_weight_files_are_not_read_on_meta() -> None:
    with on_meta():
        encoder = TextEncoder(width=16, depth=1, num_heads=2, weights="missing.pt")
        EfficientNet(weights="missing.pt")
    assert not encoder.is_random  # a dry run is not refused
