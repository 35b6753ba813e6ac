"""The type of a pipeline's weights: what is asked for, else what suits the device."""

import logging

import pytest
import torch

from wuerstchen_pl.sampling.device import dtype_name, log_dtype, sampling_dtype


@pytest.mark.parametrize(
    ("requested", "device", "native", "expected"),
    [
        (None, "cuda", True, "bfloat16"),
        (None, "cuda:3", True, "bfloat16"),
        (None, "cuda", False, "float32"),  # before Ampere, bfloat16 is emulated
        (None, "cpu", True, "float32"),
        (None, "mps", True, "float32"),
        ("float32", "cuda", True, "float32"),
        ("bfloat16", "cuda", False, "bfloat16"),
        ("bfloat16", "cpu", False, "bfloat16"),
    ],
)
def test_pipelines_are_in_bfloat16_by_default_only_on_gpus_that_compute_in_it(
    requested: str | None, device: str, native: bool, expected: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: native)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    dtype = sampling_dtype(requested, torch.device(device))
    assert dtype_name(dtype) == expected
    with caplog.at_level(logging.INFO):
        log_dtype(dtype, torch.device(device))
    (line,) = caplog.messages
    assert line == f"sampling on {device} in {expected}; dtype= chooses another type"


@pytest.mark.parametrize("capability", ["amx_bf16", "avx512_bf16", "avx512_f"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_that_computes_in_bfloat16_is_announced(
    capability: str, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    with caplog.at_level(logging.INFO):
        log_dtype(dtype, torch.device("cpu"))
    announced = dtype == torch.float32 and capability != "avx512_f"
    assert ("dtype=bfloat16 is faster" in caplog.text) == announced
