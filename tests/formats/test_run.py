"""Reading runs as models: the same weights as their stages have, and damaged ones are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import run_program, small
from wuerstchen_pl.checkpointing import sharded
from wuerstchen_pl.checkpointing.load import find_checkpoint
from wuerstchen_pl.formats import registry
from wuerstchen_pl.formats.model import STUDENT, build_network
from wuerstchen_pl.formats.run import read_run
from wuerstchen_pl.formats.stage_parts import STAGE_PARTS
from wuerstchen_pl.formats.trained_stage import load_stage
from wuerstchen_pl.models.meta import on_meta
from wuerstchen_pl.pipelines.components import build_components

Content = dict[str, Any]


@pytest.fixture(scope="module")
def runs(cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of the stages, and one of an adapter of Stage C."""
    root = tmp_path_factory.mktemp("runs")
    registry.write_model(read_run(cascade / "c"), root / "base", "native")
    keys = [a for a in small("c", root) if not a.startswith(("stage.prior", "stage.text_encoder"))]
    lora = [
        "experiment=lora", "name=default", "data=openmoji", "image_size=64", "bucket_multiple=16",
        "cache=false", f"init_from={root / 'base'}", "stage.adapter.rank=2",
    ]  # fmt: skip
    assert run_program("train", [*keys, *lora]) == 0
    return {**{stage: cascade / stage for stage in "abc"}, "lora": root / "default/c"}


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_run_has_the_networks_of_its_stage(name: str, ema: bool, runs: dict[str, Path]) -> None:
    """Those of an adapter are compared with its own formula, in ``adapters.test_base_dtype``."""
    model = read_run(runs[name], ema=ema)
    stage: Any = load_stage(source=runs[name], stage=name, ema=ema)
    while stage is not None:
        for attribute, part in STAGE_PARTS[stage.name].items():
            if (expected := getattr(stage, attribute, None)) is not None:
                actual = build_network(model.parts[part])
                assert not any(module.training for module in actual.modules())
                assert actual.state_dict().keys() == expected.state_dict().keys()
                for key, tensor in expected.state_dict().items():
                    assert torch.equal(actual.state_dict()[key], tensor)
        stage = stage.frozen.get("stage_b") or stage.frozen.get("stage_a")


@pytest.mark.parametrize("name", ["a", "b", "c", "lora"])
def test_on_the_meta_device_a_run_has_the_same_tensors_without_memory(
    name: str, runs: dict[str, Path]
) -> None:
    expected = read_run(runs[name])
    with on_meta():
        model = read_run(runs[name])
    assert (model.parts.keys(), model.settings) == (expected.parts.keys(), expected.settings)
    for name, part in model.parts.items():
        lazies = expected.parts[name].tensors
        assert {k: (t.shape, t.dtype) for k, t in part.tensors.items()} == {
            k: (t.shape, t.dtype) for k, t in lazies.items()
        }
        if part.network is not None:
            assert all(parameter.is_meta for parameter in part.network.parameters())


def test_raw_weights_of_a_frozen_stage_are_used_if_it_was_trained_with_them(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    run = copy_of(runs["c"], tmp_path)

    def use_raw_weights(content: Content) -> None:
        content["stage"]["stage_b"]["ema"] = False

    change(run, use_raw_weights)
    actual = read_run(run).parts["decoder"].tensors
    raw, ema = (read_run(runs["b"], ema=ema).parts["decoder"].tensors for ema in (False, True))
    assert all(torch.equal(actual[name].load(), raw[name].load()) for name in raw)
    assert any(not torch.equal(actual[name].load(), ema[name].load()) for name in ema)


def test_a_frozen_stage_is_found_whatever_the_name_of_its_checkpoint(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    run, renamed = copy_of(runs["c"], tmp_path), tmp_path / "stage_b.bin"
    shutil.copy(find_checkpoint(runs["b"]), renamed)

    def rename(content: Content) -> None:
        content["frozen"]["stage_b"] |= {"path": str(renamed), "absolute_path": str(renamed)}

    change(run, rename)
    assert read_run(run).parts.keys() == read_run(runs["c"]).parts.keys()


def test_a_sharded_run_is_read_on_the_meta_device_too(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    content = torch.load(find_checkpoint(runs["a"]), weights_only=True)
    path = tmp_path / "run/checkpoints/step0000004.ckpt"
    path.parent.mkdir(parents=True)
    sharded.write_sharded(content, path)
    expected = read_run(runs["a"]).parts["vqgan"].tensors
    actual = read_run(path).parts["vqgan"].tensors
    assert all(torch.equal(actual[name].load(), expected[name].load()) for name in expected)
    with on_meta():
        on_no_device = read_run(path).parts["vqgan"].tensors
    assert {k: t.shape for k, t in on_no_device.items()} == {k: t.shape for k, t in actual.items()}


# Damaged checkpoints. Their hashes could be forged, so they have none.


def copy_of(run: Path, folder: Path) -> Path:
    path = find_checkpoint(run)
    (folder / "copy/checkpoints").mkdir(parents=True)
    shutil.copy(path, folder / "copy/checkpoints")
    return folder / "copy"


def change(run: Path, function: Callable[[Content], None]) -> None:
    path = find_checkpoint(run)
    content = torch.load(path, weights_only=True)
    function(content)
    torch.save(content, path)


def without(prefix: str) -> Callable[[Content], None]:
    """Without the tensors that start with a prefix."""

    def remove(content: Content) -> None:
        for tensors in (content["state_dict"], content["ema"]["shadow"]):
            for key in [key for key in tensors if key.startswith(prefix)]:
                del tensors[key]

    return remove


def tensor(name: str, value: Any) -> Callable[[Content], None]:
    """With another tensor."""

    def replace(content: Content) -> None:
        for tensors in (content["state_dict"], content["ema"]["shadow"]):
            tensors[name] = value

    return replace


def stage(*keys: str, value: Any = None, delete: bool = False) -> Callable[[Content], None]:
    """With another value in the stage's config, or without a key."""

    def replace(content: Content) -> None:
        node = content["stage"]
        for key in keys[:-1]:
            node = node[key]
        if delete:
            del node[keys[-1]]
        else:
            node[keys[-1]] = value

    return replace


LORA_LAYER = "prior.blocks.0.attn.attention.qkv.to_q.lora_A.default.weight"
DAMAGES: dict[str, tuple[str, Callable[[Content], None], str]] = {
    "no prior": ("c", without("prior."), "the weights of stage.prior; use another"),
    "no text encoder": ("c", without("text_encoder."), "the weights of stage.text_encoder; use"),
    "no decoder": ("b", without("diffnext."), "the weights of stage.diffnext; use another"),
    "no compressor": ("b", without("compressor."), "the weights of stage.compressor; use another"),
    "no vqgan": ("a", without("vqgan."), "the weights of stage.vqgan; use another"),
    "nothing": ("c", without(""), "the weights of stage.prior; use another"),
    "a tensor less": ("c", without("prior.stem.bias"), "missing: stem.bias"),
    "a tensor more": ("c", tensor("prior.new", torch.ones(1)), "unexpected: new"),
    "another network": ("c", tensor("new.bias", torch.ones(1)), "has new.bias, which belongs to"),
    "another shape": ("c", tensor("prior.stem.bias", torch.ones(3)), r"stem.bias is \(3,\)"),
    "integers": ("c", tensor("prior.stem.bias", torch.ones(16).long()), "does not contain the"),
    "no tensor": ("c", tensor("prior.stem.bias", 3), "prior.stem.bias is not a tensor; use"),
    "nan": ("c", tensor("prior.stem.bias", torch.full((16,), torch.nan)), "not finite; use"),
    "text": ("c", stage("prior", value="x"), "stage.prior is 'x', and must be an object; use"),
    "no target": ("c", stage("prior", "_target_", delete=True), "must be an object; use another"),
    "no prior's config": ("c", stage("prior", delete=True), "stage.prior is missing, and .*StageC"),
    "no vqgan's config": ("a", stage("vqgan", delete=True), "stage.vqgan is missing, and .*StageA"),
    "an argument of none": ("c", stage("foo", value=1), "stage.foo is not an argument of .*StageC"),
    "a network of another stage": ("c", stage("vqgan", value={}), "stage.vqgan is not an argument"),
    "another class": (
        "b", stage("_target_", value="wuerstchen_pl.stages.b_tokens.TokenStageB"),
        "stage.diffnext is not an argument of .*TokenStageB; use another checkpoint",
    ),
    "a partial stage": ("c", stage("_partial_", value=True), "stage._partial_ is not an argument"),
    "a discriminator": ("c", tensor("discriminator.x", torch.ones(1)), "belongs to none"),
    "an argument of stage b": ("c", stage("stage_b", "foo", value=1), "stage.stage_b.foo is not"),
    "a frozen text encoder": (
        "c", stage("train_text_encoder", value=False), "has the weights of stage.text_encoder, wh",
    ),
    "an argument": ("c", stage("prior", "depht", value=1), "stage.prior.depht is not an argument"),
    "another width": ("c", stage("prior", "width", value=32), "wrong shape: .* more"),
    "no stage b": ("c", stage("stage_b", delete=True), "stage.stage_b is missing, and .*StageC"),
    "stage a as b": ("c", stage("stage_b", "stage", value="a"), "is not a frozen Stage B; use"),
    "code": ("c", stage("stage_b", "_target_", value="os.system"), "is not a frozen Stage B; use"),
    "scale": ("c", stage("semantic_scale", value="x"), "use positive numbers for semantic_scale"),
    "no scale": ("c", stage("semantic_scale", value=float("nan")), "use positive numbers for"),
    "a truth": ("c", stage("semantic_scale", value=True), "use positive numbers for semantic_"),
    "some of an adapter": ("lora", without(LORA_LAYER.partition(".lora")[0]), "is one of its"),
    "no adapter": ("lora", without("prior."), "the adapter lacks .*, which is one of its"),
    "an adapter's unknown tensor": (
        "lora", tensor("prior.alpha", torch.ones(1)), "alpha is not a weight of an adapter; use",
    ),
    "an adapter's integers": (
        "lora", tensor(LORA_LAYER, torch.ones(2, 16).long()), "is not a weight of an adapter; use",
    ),
    "half an adapter": ("lora", without(LORA_LAYER), "an adapter has the tensors lora_B.weight"),
    "rank": ("lora", stage("adapter", "rank", value=3), "rank=3, but .* is of lora with rank 2"),
    "method": ("lora", stage("adapter", "method", value="dora"), "method=dora .* is of lora"),
    "targets": ("lora", stage("adapter", "targets", value=["x"]), "stage.adapter.targets has 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["a", "b", "c", "lora"])
def test_a_copied_run_has_the_same_parts(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    run = copy_of(runs[name], tmp_path)
    change(run, lambda content: None)  # rewritten, as damaged ones are below
    assert read_run(run).parts.keys() == read_run(runs[name]).parts.keys()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_refused(damage: str, runs: dict[str, Path], tmp_path: Path) -> None:
    name, function, message = DAMAGES[damage]
    run = copy_of(runs[name], tmp_path)
    change(run, function)
    with pytest.raises(ValueError, match=message):
        read_run(run)


@pytest.mark.parametrize("steps", [0, 9, 2.5, -1])
def test_steps_that_no_student_has_are_refused(steps: float, runs: dict[str, Path]) -> None:
    model = read_run(runs["c"])
    model.settings[STUDENT] = 4
    assert build_components(model, "x")["prior"].student_steps == 4
    model.settings[STUDENT] = steps
    with pytest.raises(ValueError, match=f"student_steps={steps} is out of range; use 1 to 8"):
        build_components(model, "x")


@pytest.mark.parametrize(
    ("part", "argument"),
    [
        ("prior", "latent_channels"),
        ("decoder", "semantic_channels"),
        ("decoder", "latent_channels"),
    ],
)
def test_networks_that_cannot_read_each_other_are_refused(
    part: str, argument: str, runs: dict[str, Path]
) -> None:
    model = read_run(runs["c"])
    build_components(model, "x")
    model.parts[part].config[argument] = 7
    with pytest.raises(ValueError, match=rf"x: {part}\.{argument}=7, but .*; use networks that"):
        build_components(model, "x")
