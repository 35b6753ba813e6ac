"""Which batch norm runs on which device; ``test_parallel`` compares its values."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wuerstchen_pl.distributed.sync_batchnorm import SyncBatchNorm2d


def test_torch_synchronizes_on_a_gpu_and_this_package_on_the_cpu(
    fake_processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's takes one collective forward and one backward; it refuses the CPU."""
    devices: list[str] = []

    def forward(self: nn.SyncBatchNorm, x: Tensor) -> Tensor:
        devices.append(x.device.type)
        return x

    monkeypatch.setattr(nn.SyncBatchNorm, "forward", forward)
    norm = SyncBatchNorm2d(3)
    norm(torch.randn(2, 3, 4, 4))
    assert not devices
    with FakeTensorMode(allow_non_fake_inputs=True):
        norm(torch.empty(2, 3, 4, 4, device="cuda"))
    assert devices == ["cuda"]


def test_torchs_forward_pass_accepts_it(fake_processes: int) -> None:
    with FakeTensorMode(), torch.device("cuda"):
        norm = SyncBatchNorm2d(3)
        for layer in (norm, norm.eval()):
            assert layer(torch.empty(2, 3, 4, 4)).device.type == "cuda"


def test_ddp_accepts_it_on_the_cpu() -> None:
    """DDP refuses a module with ``nn.SyncBatchNorm`` or a subclass in it."""
    assert not isinstance(SyncBatchNorm2d(3), nn.SyncBatchNorm)
