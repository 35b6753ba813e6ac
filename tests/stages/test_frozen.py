"""Precision and device of frozen networks, in every stage and in every part of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.stages.conftest import STAGES, stage_b, stage_c, stage_ldm
from tests.stages.test_b import text_options
from wuerstchen_pl.callbacks import sample_grids
from wuerstchen_pl.callbacks.memory_estimate import MemoryEstimate, estimate_bytes
from wuerstchen_pl.callbacks.sample_grids import SampleGrids
from wuerstchen_pl.callbacks.step_profile import first_rows
from wuerstchen_pl.distributed.strategy import FSDP2Strategy
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.stages import frozen
from wuerstchen_pl.stages.stage import Batch, Stage

pytestmark = pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")


def text_encoder() -> TextEncoder:
    encoder = TextEncoder(width=16, depth=1, num_heads=2, context_length=8)
    encoder.weights = "clip.pt"
    return encoder


def frozen_text_stage(name: str) -> Stage:
    """A stage of which all networks are frozen that can be."""
    if name == "a":
        return STAGES["a"]()
    if name == "b":
        return stage_b(**text_options())
    build = stage_c if name == "c" else stage_ldm
    return build(text_encoder=text_encoder(), train_text_encoder=False)


def leaves(network: nn.Module) -> list[nn.Module]:
    """The layers with weights, including those of nested frozen networks."""
    layers = []
    for part in network.modules():
        if list(part.parameters(recurse=False)):
            layers.append(part)
        if isinstance(part, Stage):
            layers += frozen_leaves(part)
    return layers


def frozen_leaves(stage: Stage) -> list[nn.Module]:
    return [leaf for network in stage.frozen.present().values() for leaf in leaves(network)]


class OneBatch(L.LightningDataModule):
    """The same batch for each of three steps, for validation and for grids."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> DataLoader:
        return DataLoader([self.batch] * 3, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        return DataLoader([self.batch], batch_size=None)  # type: ignore[arg-type]


def run(stage: Stage, batch: Batch, folder: Path, *callbacks: L.Callback, **options: Any) -> None:
    """Three steps, with a validation after the second, and grids before and after all of them."""
    grids = SampleGrids(folder=str(folder), every_steps=2, num_images=1)
    trainer = L.Trainer(
        max_steps=3, val_check_interval=2, num_sanity_val_steps=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*callbacks, MemoryEstimate(), grids],
        **{"accelerator": "cpu", **options},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_grids, "example_batch", lambda data, n: first_rows(data.batch, n))
        trainer.fit(stage, OneBatch(batch))


@contextmanager
def before_forward(modules: list[nn.Module], hook: Any) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("a", "auto"),
        pytest.param("b", "auto", marks=pytest.mark.slow),
        ("c", "auto"),
        pytest.param("ldm", "auto", marks=pytest.mark.slow),
        pytest.param("b", "fsdp", marks=pytest.mark.slow),
        pytest.param("c", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_frozen_networks_compute_in_float32_except_in_grids(
    name: str, strategy: str, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, profiling and validation, with bfloat16 autocast for the others."""
    stage = frozen_text_stage(name)
    autocast: dict[str, set[bool]] = {"grid": set(), "elsewhere": set()}
    dtypes: set[torch.dtype] = set()
    phase = "elsewhere"

    def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        autocast[phase].add(torch.is_autocast_enabled("cpu"))
        if phase == "elsewhere" and isinstance(inputs[0], Tensor):
            dtypes.update(x.dtype for x in inputs if x.is_floating_point())

    example_grid = stage.example_grid

    def grid(rows: Batch) -> dict[str, Tensor]:
        nonlocal phase
        phase = "grid"
        columns = example_grid(rows)
        phase = "elsewhere"
        return columns

    monkeypatch.setattr(stage, "example_grid", grid)
    with before_forward(frozen_leaves(stage), record):
        run(
            stage, batch, tmp_path, precision="bf16-mixed",
            strategy="auto" if strategy == "auto" else FSDP2Strategy(),
        )  # fmt: skip
    assert autocast["elsewhere"] == {False}
    assert dtypes == {torch.float32}
    assert (True in autocast["grid"]) == (name != "a")  # Stage A's grid uses no frozen network
    assert len(list(tmp_path.glob("step*.png"))) == 3


@pytest.mark.parametrize("name", ["b", "c", "ldm"])
def test_targets_and_text_under_bfloat16_autocast_equal_those_in_float32(
    name: str, batch: Batch
) -> None:
    stage: Any = frozen_text_stage(name)
    with torch.no_grad():
        latents = (stage.stage_a if name == "b" else stage).encode(batch["image"])
        states = stage.text_encoder(batch["caption"])
        with torch.autocast("cpu", torch.bfloat16):
            rounded = (stage.stage_a if name == "b" else stage).encode(batch["image"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stage.latents(batch), latents)
        assert torch.equal(stage.text(batch["caption"]), states)
    assert not torch.equal(rounded, latents)  # the networks are such that it matters


def test_the_perceptual_distance_under_bfloat16_autocast_equals_that_in_float32(
    batch: Batch,
) -> None:
    """Of the same images: of bfloat16 features, near ones would mostly be the rounding error."""
    stage: Any = STAGES["a"]()
    with torch.autocast("cpu", torch.bfloat16):
        _, decoded, terms = stage.generator_loss(batch["image"], quantize=True, adversarial=False)
    expected = stage.perceptual(decoded.float(), batch["image"]).mean()
    assert torch.equal(terms["perceptual"], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(stage.perceptual(decoded, batch["image"]).mean(), expected)
    assert torch.autograd.grad(terms["perceptual"], stage.vqgan.parameters(), allow_unused=True)


class Residence(L.Callback):
    """A second device, simulated: records which layers were moved to it, and when.

    Every layer that runs must have been moved there before.
    """

    def __init__(self, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stage = stage
        self.resident: set[int] = set()
        self.after_steps: list[set[int]] = []
        self.in_grids: list[set[int]] = []
        to, example_grid = nn.Module.to, stage.example_grid

        def recording_to(network: nn.Module, *args: Any, **options: Any) -> nn.Module:
            moved = {id(leaf) for leaf in leaves(network)}
            if args == ("cpu",):
                self.resident -= moved
            elif network is not stage or not stage.frozen.on_demand:
                self.resident |= moved
            return to(network, *args, **options)

        def grid(rows: Batch) -> dict[str, Tensor]:
            self.in_grids.append(set(self.resident))
            return example_grid(rows)

        monkeypatch.setattr(nn.Module, "to", recording_to)
        monkeypatch.setattr(stage, "example_grid", grid)
        monkeypatch.setattr(frozen, "is_on", lambda device, network: self.has(network))

    def has(self, network: nn.Module) -> bool:
        return {id(leaf) for leaf in leaves(network)} <= self.resident

    def check(self, module: nn.Module, inputs: object) -> None:
        assert id(module) in self.resident, f"{module} runs, but was not moved"

    def on_train_batch_end(self, *args: object) -> None:
        self.after_steps.append(set(self.resident))


def ids(*networks: nn.Module) -> set[int]:
    return {id(leaf) for network in networks for leaf in leaves(network)}


@pytest.mark.parametrize(
    ("name", "cached", "strategy"),
    [
        ("b", False, "auto"),
        ("c", True, "auto"),
        ("c", False, "fsdp"),
        pytest.param("b", True, "auto", marks=pytest.mark.slow),
        pytest.param("c", False, "auto", marks=pytest.mark.slow),
        pytest.param("ldm", False, "auto", marks=pytest.mark.slow),
        pytest.param("ldm", True, "auto", marks=pytest.mark.slow),
    ],
)
def test_only_the_frozen_networks_of_a_step_are_on_the_device_between_grids(
    name: str, cached: bool, strategy: str, batch: Batch, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stage: Any = frozen_text_stage(name)
    used = ids(stage.text_encoder, stage.stage_a.encoding if name == "b" else stage.encoding)
    if cached:
        latents = {"b": "latents", "c": "semantic", "ldm": "semantic"}[name]
        with torch.no_grad():
            batch = {**batch, "text": stage.text(batch["caption"]), "empty_text": stage.text([""])}
            batch[latents] = stage.latents(batch)  # type: ignore[literal-required]
        if name != "b":
            del batch["image"]
            batch["size"] = (32, 32)
        used = set()
    everything = {id(leaf) for leaf in frozen_leaves(stage)}
    residence = Residence(stage, monkeypatch)
    options = {} if strategy == "auto" else {"strategy": FSDP2Strategy()}
    with before_forward(frozen_leaves(stage), residence.check):
        run(stage, batch, tmp_path, residence, **options)
    assert used < everything
    assert residence.in_grids == [everything] * 3
    assert residence.after_steps == [used] * 3  # the first and the last are after grids
    assert not stage.frozen.on_demand  # the trained stage can be moved as a whole


def test_the_memory_estimate_counts_the_frozen_networks_that_a_step_uses(batch: Batch) -> None:
    stage = stage_c()
    stage.trainer = L.Trainer(accelerator="cpu", logger=False)
    semantic = stage.encode_semantic(batch["image"]).detach()
    cached: Any = {"semantic": semantic, "caption": batch["caption"], "size": (32, 32)}
    optimizer = torch.optim.AdamW(stage.parameters())
    needed = {}
    for device in ("cpu", "meta"):
        stage.stage_b.to(device)
        needed[device] = estimate_bytes(stage, optimizer, cached)["frozen networks"]
    parameters = [p for leaf in frozen_leaves(stage) for p in leaf.parameters(recurse=False)]
    assert needed == {"cpu": sum(p.nbytes for p in parameters), "meta": 0}


@pytest.mark.gpu
def test_only_the_compressor_of_stage_b_is_on_the_gpu_between_grids(
    batch: Batch, tmp_path: Path
) -> None:
    class Devices(L.Callback):
        def __init__(self) -> None:
            self.seen: list[dict[str, set[str]]] = []

        def on_train_batch_end(self, trainer: object, module: Any, *args: object) -> None:
            parts = {
                "compressor": module.stage_b.compressor, "diffnext": module.stage_b.diffnext,
                "stage_a": module.stage_b.stage_a, "text_encoder": module.text_encoder,
                "prior": module.prior,
            }  # fmt: skip
            devices = {n: {p.device.type for p in m.parameters()} for n, m in parts.items()}
            self.seen.append(devices)

    devices = Devices()
    run(frozen_text_stage("c"), batch, tmp_path, devices, accelerator="gpu", devices=1)
    on_gpu = {name: {"cuda"} for name in ("compressor", "text_encoder", "prior")}
    assert devices.seen == [{**on_gpu, "diffnext": {"cpu"}, "stage_a": {"cpu"}}] * 3
    assert len(list(tmp_path.glob("step*.png"))) == 3
