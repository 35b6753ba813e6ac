"""Process groups within the test's process."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore


@pytest.fixture
def no_group() -> Iterator[None]:
    """No process group before and after a test; a Lightning trainer leaves its group behind."""
    if dist.is_initialized():
        dist.destroy_process_group()
    yield
    dist.destroy_process_group()


@pytest.fixture
def mesh_of_one(no_group: None) -> DeviceMesh:
    """A group of one process, which gathers and scatters for real."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh("cpu", (1,))


@pytest.fixture
def fake_processes(no_group: None) -> int:
    """The first of four processes, of which the others do not exist: collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    return 4
