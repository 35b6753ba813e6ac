"""The benchmark of inference compares equal computations, in every mode of a CPU."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore")
def test_every_case_of_inference_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers", reason="needs the extra compare")
    from scripts import bench_inference
    from scripts.reference_models import DECODER, PRIOR, VQGAN
    from scripts.timing import write_table

    tiny = bench_inference.Size(PRIOR, DECODER, VQGAN, side=128, prior_steps=2, batches=(1,))
    monkeypatch.setitem(bench_inference.SIZES, "small", tiny)
    monkeypatch.setattr(
        bench_inference, "write_table", lambda *args: write_table(*args, folder=tmp_path)
    )
    table = bench_inference.run("small", 1).read_text()
    cases = ("Stage C step", "Stage C step (SDPA)", "Stage B step", "Stage A decoding", "whole run")
    modes = ("float32", "float32, compiled", "bfloat16", "bfloat16, compiled")
    for case in cases:
        for mode in modes:
            assert f"| {case} | 1 | {mode} |" in table
