"""The rank of a process, from what launched it."""

import os

import pytest
import torch

from wuerstchen_pl.distributed.launch import DistInfo, use_tf32


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, (1, 4)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8"}, (3, 8)),
        # a batch script, which runs a command without srun
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),
        # torchrun within srun
        (
            {"RANK": "5", "WORLD_SIZE": "16", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            (5, 16),
        ),
    ],
)
def test_the_rank_is_that_of_the_launcher(
    variables: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert DistInfo.from_env() == expected


@pytest.mark.parametrize(("device", "precision"), [("cuda:1", "high"), ("cpu", "highest")])
def test_only_gpus_multiply_in_tf32(device: str, precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        use_tf32(torch.device(device))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
