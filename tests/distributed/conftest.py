"""Process groups within the test's process."""

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore


@pytest.fixture
def mesh_of_one() -> DeviceMesh:
    """A group of one process, which gathers and scatters for real."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh("cpu", (1,))


@pytest.fixture
def fake_processes() -> int:
    """The first of four processes, of which the others do not exist: collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    return 4
