"""Adapters and words that two processes train: like one process, resumed bit for bit, exported."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import NO_GRIDS, run_program, small
from tests.distributed.launch import launch
from tests.distributed.test_parallel import (
    HALF,
    ONE,
    ONE_ACCUMULATED,
    STEPS,
    TOLERANCE,
    TWO,
    check_equal,
    last_checkpoint,
    max_difference,
)
from tests.test_resume import differing
from wuerstchen_pl.checkpointing import load

pytestmark = pytest.mark.slow
BF16, ACCUMULATED = "trainer.precision=bf16-mixed", ["data.batch_size=2", "global_batch=8"]
PRESERVING = [
    "experiment=dreambooth", "stage.preservation.captions=[face]", "stage.preservation.weight=1000",
]  # fmt: skip
TEXT = ["text_adapter@stage.text_adapter=lora", "stage.text_adapter.rank=4"]
STAGE_B = ["stage=b", "stage.adapter.targets=['*.attention.*']"]
WORDS = [
    "experiment=token", "stage.words.text='<rex>'", "data.captions.trigger='<rex>'",
    "stage.words.num_vectors=3",
]  # fmt: skip
FSDP, DDP = [*TWO, "trainer=fsdp"], [*TWO, "trainer=ddp"]


@pytest.fixture(scope="module")
def base(random_base: Path) -> Path:
    return random_base


def arguments(root: Path, base: Path, cascade: Path, *more: str) -> list[str]:
    left_out = ("stage.prior", "stage.text_encoder", "stage.optimizer", "validate", "data.batch")
    adapter = [] if "experiment=token" in more else ["stage.adapter.rank=4"]
    kept = [a for a in small("c", root, STEPS) if not a.startswith((*left_out, NO_GRIDS))]
    return [
        *kept, "experiment=lora", "name=default", "data=openmoji", f"init_from={base}",
        f"paths.data={cascade.parent / 'data'}", "image_size=64", "bucket_multiple=16", NO_GRIDS,
        "cache=false", "stage.optimizer.lr=1e-2", *adapter, *more,
        f"checkpoint_every_steps={HALF}", f"validate_every_steps={STEPS}",
        "trainer.log_every_n_steps=1", "trainer.gradient_clip_val=0.1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(base: Path, cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder per run."""
    root = tmp_path_factory.mktemp("adapters")

    def run(name: str, *keys: str) -> list[str]:
        return arguments(root / name, base, cascade, *keys)

    half = f"checkpoints/step{HALF:07d}.ckpt"
    from_ddp, from_fsdp = (f"ckpt={root / name}/default/c/{half}" for name in ("ddp", "fsdp"))
    launch(
        [
            run("ddp", *DDP),
            run("ddp_resumed", *DDP, from_ddp),
            run("fsdp", *FSDP),
            run("fsdp_resumed", *FSDP, from_fsdp),
            run("fsdp_then_ddp", *DDP, from_fsdp),
            run("fsdp_accumulated", *FSDP, *ACCUMULATED),
            run("fsdp_bf16", *FSDP, BF16),
            run("fsdp_bf16_base", *FSDP, BF16, "stage.adapter.base_dtype=bfloat16"),
            run("ddp_preserving", *DDP, *PRESERVING),
            run("fsdp_preserving", *FSDP, *PRESERVING),
            run("fsdp_b", *FSDP, *STAGE_B),
            run("ddp_words", *DDP, *WORDS),
            run("fsdp_words", *FSDP, *WORDS),
            run("fsdp_text", *FSDP, *TEXT),
        ],
        root,
    )
    alone = {
        "one": ONE, "fsdp_then_one": [*ONE, from_fsdp], "one_accumulated": ONE_ACCUMULATED,
        "one_bf16": [*ONE, BF16], "one_preserving": [*ONE, *PRESERVING],
        "one_b": [*ONE, *STAGE_B], "one_words": [*ONE, *WORDS], "one_text": [*ONE, *TEXT],
    }  # fmt: skip
    for name, keys in alone.items():
        assert run_program("train", run(name, *keys)) == 0
    return root


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("ddp", "one"),
        ("fsdp", "one"),
        ("fsdp_accumulated", "one_accumulated"),
        ("ddp_preserving", "one_preserving"),
        ("fsdp_preserving", "one_preserving"),
        ("fsdp_b", "one_b"),
        ("ddp_words", "one_words"),
        ("fsdp_words", "one_words"),
        ("fsdp_text", "one_text"),
    ],
)
def test_two_processes_train_like_one(runs: Path, name: str, reference: str) -> None:
    check_equal(runs, name, "b" if name == "fsdp_b" else "c", reference)


@pytest.mark.parametrize("name", ["fsdp_then_one", "fsdp_then_ddp"])
def test_a_sharded_run_resumes_without_sharding(runs: Path, name: str) -> None:
    one, resumed = (last_checkpoint(runs / run / "default/c") for run in ("one", name))
    assert one["global_step"] == resumed["global_step"] == STEPS
    assert max_difference(one, resumed)[0] < TOLERANCE, max_difference(one, resumed)


def test_the_comparison_detects_ten_missing_steps(runs: Path) -> None:
    run = runs / "one/default/c"
    half = load.read_checkpoint(run / f"checkpoints/step{HALF:07d}.ckpt")
    assert max_difference(half, last_checkpoint(run))[0] > 1000 * TOLERANCE


@pytest.mark.parametrize("sharded", ["fsdp_bf16", "fsdp_bf16_base"])
def test_two_sharded_processes_train_an_adapter_in_bfloat16_like_one(
    sharded: str, runs: Path
) -> None:
    """The factors B are zero at first, so that they are the updates."""
    updates = []
    for name in ("one_bf16", sharded):
        state = last_checkpoint(runs / name / "default/c")["state_dict"]
        factors = [tensor.flatten() for key, tensor in state.items() if "lora_B" in key]
        updates.append(torch.cat(factors))
    one, two = updates
    assert 0 < (two - one).norm() < 0.1 * one.norm()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_resumes_bit_for_bit_on_two_processes(runs: Path, strategy: str) -> None:
    whole, resumed = (
        last_checkpoint(runs / n / "default/c") for n in (strategy, f"{strategy}_resumed")
    )
    assert whole["global_step"] == resumed["global_step"] == STEPS
    assert not differing(whole, resumed)


def test_a_sharded_checkpoint_has_the_adapter_only(runs: Path) -> None:
    path = load.find_checkpoint(runs / "fsdp/default/c")
    shards = [load_file(file) for file in path.glob("*.safetensors")]
    assert len(shards) == 2
    names = {name for shard in shards for name in shard if not name.startswith("optimizer")}
    assert all(".lora_" in name for name in names)
    content = load.read_checkpoint(path)
    assert content["ema"]["shadow"].keys() == content["state_dict"].keys()
    assert len(content["optimizer_states"][0]["state"]) == len(content["state_dict"]) == 10


def test_a_sharded_run_exports_its_adapter_and_draws(runs: Path, tmp_path: Path) -> None:
    few = ["sample.prior_steps=2", "sample.decoder_steps=2", "grid=false"]
    adapters, images = [], []
    for name in ("one", "fsdp"):
        run, folder = runs / name / "default/c", tmp_path / name
        assert run_program("export", [f"ckpt={run}", f"to={folder}/lora", "format=adapter"]) == 0
        adapters.append(load_file(folder / "lora/pytorch_lora_weights.safetensors"))
        keys = [f"model={run}", "prompt=red", f"output_dir={folder}/images", *few]
        assert run_program("sample", keys) == 0
        (png,) = (folder / "images").glob("*.png")
        images.append(np.asarray(Image.open(png)).astype(int))
    torch.testing.assert_close(*adapters, rtol=0, atol=TOLERANCE)
    assert np.abs(images[0] - images[1]).max() <= 2
