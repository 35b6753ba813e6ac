"""``experiment=controlnet``: trained, resumed, exported and sampled; and what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from tests.conftest import NO_GRIDS, NO_PLOT, SMALL_DATA, run_program
from tests.data.loading.test_control import members
from tests.formats.conftest import assert_bit_equal
from wuerstchen_pl.checkpointing.load import find_checkpoint, read_checkpoint
from wuerstchen_pl.formats import registry
from wuerstchen_pl.formats.controlnet_files import BASE, CONFIG, FILE
from wuerstchen_pl.formats.lazy_tensors import in_memory
from wuerstchen_pl.formats.model import Model
from wuerstchen_pl.formats.run import read_run
from wuerstchen_pl.pipelines.wuerstchen import WuerstchenPipeline

FEW: dict[str, Any] = {
    "seed": 3, "prior_num_inference_steps": 2, "num_inference_steps": 2, "output_type": "pt",
    "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(random_base: Path) -> Path:
    return random_base


def train(base: Path, root: Path, *keys: str, steps: int = 4) -> int:
    small_data = [key for key in SMALL_DATA if "limit" not in key or "data=folder" not in keys]
    return run_program(
        "train",
        [
            "stage=c", "experiment=controlnet", f"init_from={base}", f"paths.root={root}",
            "data=openmoji", *small_data, "data.num_workers=0", "trainer.accelerator=cpu",
            f"trainer.max_steps={steps}", f"validate_every_steps={steps}", "logger=csv",
            f"checkpoint_every_steps={steps}", NO_GRIDS, NO_PLOT, "stage.optimizer.lr=0.1",
            "stage.lr_schedule.warmup_steps=0", "stage.lr_schedule.total_steps=4", *keys,
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("controlnet")
    assert train(base, root) == 0
    return root / "controlnet/c"


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "edges"
    keys = [f"ckpt={run}", f"to={folder}", "format=controlnet", "license=mit"]
    assert run_program("export", keys) == 0
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of another size than those that are generated."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.zeros((100, 90, 3), np.uint8)
    pixels[30:70, 20:60] = 200
    Image.fromarray(pixels).save(path)
    return path


def tensors_of(model: Model, part: str) -> dict[str, Tensor]:
    return {name: lazy.load() for name, lazy in model.parts[part].tensors.items()}


def test_the_controlnet_is_all_that_a_checkpoint_has(run: Path, base: Path) -> None:
    content, model = read_checkpoint(find_checkpoint(run)), read_run(run)
    names = set(content["state_dict"])
    assert all(name.startswith("controlnet.") for name in names)
    assert content["ema"]["shadow"].keys() == names
    assert len(content["optimizer_states"][0]["state"]) == len(names)
    prior = content["frozen"]["prior"]
    assert (Path(prior["absolute_path"]), len(prior["sha256"])) == (base, 64)
    original = registry.read_model(str(base))
    for part in original.parts:
        assert_bit_equal(tensors_of(model, part), tensors_of(original, part))
    assert tensors_of(model, "controlnet")["projections.0.2.weight"].abs().max() > 0


def test_a_run_resumes_bit_for_bit(run: Path, base: Path, tmp_path: Path) -> None:
    assert train(base, tmp_path / "half", steps=2) == 0
    checkpoint = tmp_path / "half/controlnet/c/checkpoints/step0000002.ckpt"
    assert train(base, tmp_path / "resumed", f"ckpt={checkpoint}") == 0
    whole, resumed = (
        read_checkpoint(find_checkpoint(r)) for r in (run, tmp_path / "resumed/controlnet/c")
    )
    assert_bit_equal(whole["state_dict"], resumed["state_dict"])
    assert_bit_equal(whole["ema"]["shadow"], resumed["ema"]["shadow"])
    half = read_checkpoint(checkpoint)["state_dict"]
    assert any(not torch.equal(half[name], whole["state_dict"][name]) for name in half)


def test_a_run_with_other_control_images_is_refused(
    run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    keys = [f"ckpt={find_checkpoint(run)}", "stage.controlnet.control_images.threshold=0.2"]
    assert train(base, tmp_path, *keys, steps=6) == 1
    assert "was trained with control_images {" in capsys.readouterr().err


def test_a_base_that_changed_is_refused(base: Path, tmp_path: Path) -> None:
    model = registry.read_model(str(base))
    registry.write_model(model, tmp_path / "base", "native")
    assert train(tmp_path / "base", tmp_path, steps=2) == 0
    stem = model.parts["prior"].tensors["stem.bias"].load()
    model.parts["prior"].tensors["stem.bias"] = in_memory(stem + 1)
    for file in sorted((tmp_path / "base").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    registry.write_model(model, tmp_path / "base", "native")
    with pytest.raises(ValueError, match="in training, which has changed to"):
        read_run(tmp_path / "controlnet/c")


def test_the_exported_file_gives_the_images_of_its_run(
    run: Path, base: Path, exported: Path, photo: Path
) -> None:
    trained = WuerstchenPipeline.from_pretrained(run)
    pipe = WuerstchenPipeline.from_pretrained(base)
    plain = pipe("red", **FEW).images
    expected = trained("red", control_image=photo, **FEW).images
    assert (expected - plain).abs().max() > 0.01
    pipe.load_controlnet(exported)
    assert torch.equal(pipe("red", control_image=photo, **FEW).images, expected)
    assert torch.equal(pipe("red", control_image=Image.open(photo), **FEW).images, expected)
    assert torch.equal(pipe("red", control_scale=0, **FEW).images, plain)
    half = pipe("red", control_image=photo, control_scale=0.5, **FEW).images
    assert (half - expected).abs().max() > 1e-3
    pipe.unload_controlnet()
    assert torch.equal(pipe("red", **FEW).images, plain)


def test_an_image_does_not_depend_on_the_other_control_images(run: Path, photo: Path) -> None:
    pipe = WuerstchenPipeline.from_pretrained(run)
    photos = [Image.open(photo), Image.new("RGB", (90, 100))]

    def latents(prompts: list[str], photos: list[Any], seed: list[int]) -> Tensor:
        control = pipe.control(photos, 1.0, 64, 64)
        few: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "progress": False}
        return pipe.prior(prompts, 64, 64, control=control, seed=seed, **few)[0]

    both = latents(["red", "blue"], photos, [3, 4])
    one, other = (latents(["blue"], [image], [4]) for image in reversed(photos))
    torch.testing.assert_close(both[1:], one, rtol=0, atol=1e-4)
    assert (other - one).abs().max() > 0.01


def test_images_of_every_size_are_controlled(run: Path, photo: Path) -> None:
    """A size that is generated larger and cropped has the same crop of its control image."""
    pipe = WuerstchenPipeline.from_pretrained(run)
    with pytest.warns(UserWarning, match="is not a multiple of 16; generating 64 x 80"):
        images = pipe("red", 60, 72, control_image=photo, **FEW).images
    assert images.shape == (1, 3, 60, 72)
    control = pipe.control(photo, 1.0, 60, 72)
    assert control is not None
    assert control.images is not None
    edges = control.images[0, 0]
    assert edges.shape == (64, 80)
    rows, columns = edges.nonzero().unbind(1)
    # rows 30 to 70 of 100 and columns 20 to 60 of 90, resized to 60 x 72 and padded by 2 and 4
    bounds = (rows.min(), rows.max(), columns.min(), columns.max())
    expected = (30 * 0.6 + 2, 70 * 0.6 + 2, 20 * 0.8 + 4, 60 * 0.8 + 4)
    assert all(abs(int(a) - b) <= 2 for a, b in zip(bounds, expected, strict=True))
    assert edges[32, 36] == 0  # in the middle of the light square


def test_a_model_keeps_its_controlnet_in_the_native_format(
    run: Path, base: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    export = [f"ckpt={run}", f"to={tmp_path / 'model'}", "license=mit"]
    assert run_program("export", [*export, "format=native"]) == 0
    expected = WuerstchenPipeline.from_pretrained(run)("red", control_image=photo, **FEW).images
    pipe = WuerstchenPipeline.from_pretrained(tmp_path / "model")
    assert torch.equal(pipe("red", control_image=photo, **FEW).images, expected)
    pipe.save_pretrained(tmp_path / "saved")
    saved = WuerstchenPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(saved("red", control_image=photo, **FEW).images, expected)
    mixed = WuerstchenPipeline.from_pretrained(tmp_path / "saved", prior=run)
    assert torch.equal(mixed("red", control_image=photo, **FEW).images, expected)
    of_base = WuerstchenPipeline.from_pretrained(tmp_path / "saved", prior=base)
    assert of_base.prior.controlnet is None  # it was for the prior that was replaced
    export[1] = f"to={tmp_path / 'other'}"
    assert run_program("export", [*export, "format=diffusers"]) == 1
    assert "format=diffusers has no ControlNet; use format=native" in capsys.readouterr().err


def test_the_header_says_what_the_control_images_and_the_base_are(
    exported: Path, base: Path
) -> None:
    with safe_open(exported / FILE, "pt") as file:
        header = file.metadata()
    config = json.loads(header[CONFIG])
    assert config["control_images"]["_target_"].endswith(".Edges")
    assert (config["prior_width"], config["prior_depth"], config["resize"]) == (16, 1, 1.0)
    assert len(header[BASE]) == 64
    assert "load_controlnet" in (exported / "README.md").read_text()


def test_a_file_for_another_prior_is_refused(
    cascade: Path, base: Path, exported: Path, photo: Path, tmp_path: Path
) -> None:
    pipe = WuerstchenPipeline.from_pretrained(cascade / "c")
    with pytest.raises(ValueError, match=r"was trained beside a prior of sha256 .*; use its own"):
        pipe.load_controlnet(exported)
    pipe.load_controlnet(exported, allow_mismatch=True)
    pipe("red", control_image=photo, **FEW)
    # the hash of the base does not depend on the type of the weights
    in_bfloat16 = WuerstchenPipeline.from_pretrained(base, torch_dtype=torch.bfloat16)
    in_bfloat16.load_controlnet(exported / FILE)
    in_bfloat16("red", control_image=photo, **FEW)
    with pytest.raises(FileNotFoundError, match=r"controlnet=\S+ does not exist"):
        pipe.load_controlnet(tmp_path / "missing.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((exported / FILE).read_bytes()[:200])
    with pytest.raises(ValueError, match=r"damaged\.safetensors is damaged"):
        pipe.load_controlnet(damaged)


def sample(output: Path, *keys: str) -> int:
    few = ["sample.prior_steps=2", "sample.decoder_steps=2", "grid=false", "seed=3"]
    return run_program("sample", [f"output_dir={output}", "prompt=red", *few, *keys])


def test_the_command_samples_a_run_and_a_file(
    run: Path, base: Path, exported: Path, photo: Path, tmp_path: Path
) -> None:
    control = f"control_image={photo}"
    cases = {
        "run": [f"model={run}", control],
        "file": [f"model={base}", f"controlnet={exported}", control],
        "weak": [f"model={run}", control, "control_scale=0.2"],
        "off": [f"model={run}", "control_scale=0"],
        "base": [f"model={base}"],
    }
    images, text = {}, {}
    for name, keys in cases.items():
        assert sample(tmp_path / name, *keys) == 0
        (png,) = (tmp_path / name).glob("*.png")
        with Image.open(png) as image:
            images[name], text[name] = np.asarray(image).astype(int), dict(image.info)
    assert np.array_equal(images["run"], images["file"])
    assert np.array_equal(images["off"], images["base"])
    assert len({image.tobytes() for image in images.values()}) == 3
    assert text["file"]["control_image"] == str(photo)
    assert (text["weak"]["control_scale"], text["off"]["control_scale"]) == ("0.2", "0")


SAMPLE_ERRORS = {
    "no image": (["model=RUN"], "the ControlNet needs a control image; set control_image"),
    "no controlnet": (["model=BASE", "control_image=PHOTO"], "control_image needs a ControlNet"),
    "no file": (["model=BASE", "controlnet=nothing.safetensors"], "does not exist; use a file"),
    "no photo": (["model=RUN", "control_image=nothing.png"], "nothing.png"),
}


@pytest.mark.parametrize("case", SAMPLE_ERRORS)
def test_wrong_arguments_of_sample_are_one_sentence(
    case: str, run: Path, base: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    keys, message = SAMPLE_ERRORS[case]
    paths = {"RUN": run, "BASE": base, "PHOTO": photo}
    keys = [re.sub("RUN|BASE|PHOTO", lambda m: str(paths[m[0]]), key) for key in keys]
    assert sample(tmp_path / "out", *keys) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


TRAIN_ERRORS = {
    "cache": (["cache=true"], "a ControlNet reads the images, which a cache of Stage C does not"),
    "stage b": (["stage=b"], "experiment=controlnet is not for stage=b; use stage=c"),
    "blocks": (["stage.controlnet.blocks=[3]"], "use different numbers from 0 to 0"),
    "prompts": (["sample_prompts=[red]"], "has no control images for the ControlNet"),
    "no files": (["control_images=file"], "such as that of"),
    "not read": (
        ["control_images=file", "data.control=false"], "are read with data.control=true; set it",
    ),
    "for nothing": (["data.control=true"], "data.control=true has no effect without a ControlNet"),
    "no base": (
        ["preset=tiny", "init_from=null", "paths.stage_b=BASE"],
        "a ControlNet needs the weights of a base model; set preset=base and init_from",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TRAIN_ERRORS)
def test_wrong_arguments_of_train_are_one_sentence(
    case: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    keys, message = TRAIN_ERRORS[case]
    keys = [key.replace("BASE", str(base)) for key in keys]
    assert train(base, tmp_path, *keys) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    "kind", [*(pytest.param(k, marks=pytest.mark.slow) for k in ("low_resolution", "mask")), "file"]
)
def test_every_kind_of_control_images_is_trained(kind: str, base: Path, tmp_path: Path) -> None:
    keys = [f"control_images={kind}"]
    if kind == "file":
        (tmp_path / "data").mkdir()
        for name, content in members().items():
            (tmp_path / "data" / name).write_bytes(content)
        keys += ["data=folder", f"data.root={tmp_path / 'data'}", "data.max_upscale=null"]
    assert train(base, tmp_path, *keys, steps=2) == 0
    config = read_run(tmp_path / "controlnet/c").parts["controlnet"].config["control_images"]
    name = {"low_resolution": "LowResolution", "mask": "Masked", "file": "Files"}[kind]
    assert config["_target_"].endswith(f".{name}")


def test_other_runs_have_no_controlnet_to_export(
    cascade: Path, program: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    keys = [f"ckpt={cascade / 'c'}", f"to={tmp_path / 'to'}", "format=controlnet"]
    assert program("export", *keys) == 1
    assert "has no ControlNet, which experiment=controlnet trains" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()
