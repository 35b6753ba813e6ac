"""A base model in bfloat16 under a float32 adapter: gradients, casts, exports, and resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.adapters.test_adapter import METHODS, build, outputs, randomize
from tests.conftest import NO_GRIDS, run_program, small
from tests.test_resume import differing
from wuerstchen_pl.adapters.adapter import Adapter, BaseDtype, Method
from wuerstchen_pl.adapters.weights import merged_tensors
from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.formats import registry
from wuerstchen_pl.formats.run import read_run
from wuerstchen_pl.formats.trained_stage import load_stage

BFLOAT16 = ["stage.adapter.base_dtype=bfloat16", "trainer.precision=bf16-mixed"]


def with_adapter(kind: str, method: Method, base_dtype: BaseDtype) -> nn.Module:
    network = build(kind)
    adapter = Adapter(method=method, rank=2, base_dtype=base_dtype, targets=["*"])
    adapter.add_to(network)
    randomize(network)
    adapter.cast_base(network)
    return network.eval()


class Casts(TorchDispatchMode):
    """Records the matrices that are cast to another type."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        frozen = {n: p for n, p in network.named_parameters() if not p.requires_grad and p.ndim > 1}
        self.name_of = {p.data_ptr(): name for name, p in frozen.items()}
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.name_of:
            self.names.append(self.name_of[args[0].data_ptr()])
        return func(*args, **(kwargs or {}))


def gradients(network: nn.Module, kind: str) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        output = outputs(network, kind)[0]
    output.float().square().mean().backward()
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    return {name: p.grad for name, p in trained.items() if p.grad is not None}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["prior", "diffnext"])
def test_gradients_are_those_of_a_float32_base_up_to_bfloat16(kind: str, method: Method) -> None:
    expected, actual = (
        gradients(with_adapter(kind, method, base_dtype), kind)
        for base_dtype in ("float32", "bfloat16")
    )
    assert actual.keys() == expected.keys() != set()
    assert {gradient.dtype for gradient in actual.values()} == {torch.float32}
    one, other = (torch.cat([g.flatten() for g in gs.values()]) for gs in (expected, actual))
    assert (one - other).norm() < 0.02 * one.norm()


@pytest.mark.parametrize("kind", ["prior", "diffnext"])
def test_the_forward_pass_casts_no_matrix(kind: str) -> None:
    casts = {}
    for base_dtype in ("float32", "bfloat16"):
        network = with_adapter(kind, "lora", base_dtype)
        with Casts(network) as casts[base_dtype], torch.autocast("cpu", torch.bfloat16):
            outputs(network, kind)
    assert len(set(casts["float32"].names)) > 10
    assert casts["bfloat16"].names == []


@pytest.fixture(scope="module")
def model(cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    registry.write_model(read_run(cascade / "c"), folder, "native")
    return folder


def command(root: Path, model: Path, *keys: str, experiment: str = "lora") -> list[str]:
    left_out = ("stage.prior", "stage.text_encoder", "stage.optimizer")
    kept = [a for a in small("c", root) if not a.startswith(left_out)]
    return [
        *kept, f"experiment={experiment}", "name=default", "data=openmoji", "image_size=64",
        "bucket_multiple=16", f"init_from={model}", "cache=false", "stage.optimizer.lr=1e-2",
        "stage.adapter.rank=2", *keys,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that also draws images."""
    root = tmp_path_factory.mktemp("run")
    drawing = ["sample_prompts=[a]", "+callbacks.prompt_samples.num_steps=2"]
    keys = [*BFLOAT16, *drawing, "callbacks.sample_grids.num_images=1"]
    assert run_program("train", [a for a in command(root, model, *keys) if a != NO_GRIDS]) == 0
    return root / "default/c"


def test_a_run_resumes_bit_for_bit(run: Path, model: Path, tmp_path: Path) -> None:
    """And images that are drawn during it change nothing."""
    half = [*BFLOAT16, "trainer.max_steps=2"]
    assert run_program("train", command(tmp_path, model, *half)) == 0
    assert run_program("train", command(tmp_path, model, *BFLOAT16, "ckpt=auto")) == 0
    whole, parts = (
        load.read_checkpoint(load.find_checkpoint(path)) for path in (run, tmp_path / "default/c")
    )
    assert whole["global_step"] == parts["global_step"] == 4
    assert not differing(whole, parts)
    assert len(list(run.glob("grids/*.png"))) == len(list(run.glob("samples/*/*.png"))) == 2


def test_what_was_trained_is_merged_into_the_float32_base(run: Path, model: Path) -> None:
    content = load.read_checkpoint(load.find_checkpoint(run))
    trained = {n.removeprefix("prior."): t for n, t in content["ema"]["shadow"].items()}
    assert {t.dtype for t in trained.values()} == {torch.float32}
    stage: Any = load_stage(source=run, stage="c")
    base = {k: t.load() for k, t in registry.read_model(str(model)).parts["prior"].tensors.items()}
    weights = stage.adapters["prior"].weights(trained)
    expected = merged_tensors(base, [(weights, 1.0)])
    merged = {name: t.load() for name, t in read_run(run).parts["prior"].tensors.items()}
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert any(not torch.equal(merged[name], base[name]) for name in base)
    assert any(not torch.equal(base[name], base[name].bfloat16().float()) for name in base)


@pytest.mark.slow
def test_the_recorded_hash_is_of_the_base_in_its_own_precision(
    run: Path, model: Path, tmp_path: Path
) -> None:
    assert run_program("train", command(tmp_path, model, "trainer.max_steps=1")) == 0
    recorded = [
        load.read_checkpoint(load.find_checkpoint(path))["frozen"]["prior"]["sha256"]
        for path in (run, tmp_path / "default/c")
    ]
    assert recorded[0] == recorded[1]


@pytest.mark.slow
def test_class_images_are_drawn_with_a_bfloat16_base(model: Path, tmp_path: Path) -> None:
    keys = ["stage.preservation.captions=[a]", "stage.preservation.num_class_images=2"]
    keys = [*keys, *BFLOAT16, "trainer.max_steps=1"]
    assert run_program("train", command(tmp_path, model, *keys, experiment="dreambooth")) == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["stage.adapter.base_dtype=float16"],
            "stage.adapter.base_dtype is 'float16', and must be",
        ),
        (BFLOAT16[:1], "stage.adapter.base_dtype=bfloat16 needs trainer.precision=bf16-mixed"),
    ],
)
def test_what_is_not_supported_is_refused(
    keys: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run_program("train", command(tmp_path, model, *keys)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not list(tmp_path.iterdir())
