"""The sample program: what it writes, and its errors for bad input."""

import errno
import os
import random
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image

from wuerstchen_pl.checkpointing.load import find_checkpoint
from wuerstchen_pl.pipelines.loading import load_pipeline
from wuerstchen_pl.sample import quote_prompt

FAST = ("sample.prior_steps=2", "sample.decoder_steps=1", "device=cpu")
Sample = Callable[..., int]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "images"


@pytest.fixture
def sample(program: Any, cascade: Path, out: Path) -> Sample:
    """Run ``sample`` with a small cascade; returns the exit code."""
    usual = (f"model={cascade / 'c'}", f"output_dir={out}", *FAST)

    def run(*arguments: str) -> int:
        flags = [argument for argument in arguments if argument.startswith("-")]
        return program("sample", *flags, *usual, *(a for a in arguments if a not in flags))

    return run


def images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.png") if p.name != "grid.png")


def png_text(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        return dict(image.text)  # type: ignore[attr-defined]


# Good input


def test_an_image_can_be_reproduced_from_its_metadata(
    sample: Sample, out: Path, tmp_path: Path
) -> None:
    assert (
        sample(
            'prompt="a red heart"',
            "num_images_per_prompt=2",
            "seed=7",
            "width=48",
            "sample.prior_sampler=ddim",
        )
        == 0
    )
    first, second = images(out)
    metadata = png_text(second)
    assert metadata["seed"] == "8"
    overrides = [
        f"{key}={metadata[key]}" for key in ("prompt", "seed", "model", "height", "width", "dtype")
    ]
    overrides += [
        f"sample.{key}={value}"
        for key, value in metadata.items()
        if key not in ("prompt", "seed", "model", "model_sha256", "height", "width", "dtype")
    ]
    assert sample(*overrides, f"output_dir={tmp_path / 'again'}") == 0
    (repeated,) = images(tmp_path / "again")
    old, new = (np.asarray(Image.open(path), dtype=int) for path in (second, repeated))
    assert old.shape == (64, 48, 3)
    # batch sizes 1 and 2 may round the last bit of a float differently
    assert np.abs(old - new).max() <= 1
    assert png_text(repeated) == metadata
    assert np.abs(old - np.asarray(Image.open(first), dtype=int)).max() > 1


def test_a_single_image_is_reproduced_exactly(sample: Sample, out: Path, tmp_path: Path) -> None:
    assert sample("prompt=frog") == 0
    assert sample("prompt=frog", f"output_dir={tmp_path / 'again'}") == 0
    (old,), (new,) = images(out), images(tmp_path / "again")
    assert old.read_bytes() == new.read_bytes()
    assert not (out / "grid.png").exists(), "one image needs no grid"


def test_prompts_of_the_command_line_and_of_a_file(
    sample: Sample, out: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffgreen frog\r\n\n  \n  Bär, 熊 = {x}\n", encoding="utf-8")
    assert (
        sample("prompt=[red heart,'blue, fish']", f"prompts={file}", "num_images_per_prompt=2") == 0
    )
    prompts = [png_text(path)["prompt"] for path in images(out)]
    expected = ["red heart", "blue, fish", "green frog", "Bär, 熊 = {x}"]
    assert prompts == [prompt for prompt in expected for _ in range(2)]
    with Image.open(out / "grid.png") as grid:
        assert grid.size == (2 * 66, 4 * 66), "a row for each prompt"


AWKWARD = [
    "a, b, and c",
    "x=1, y={2}: (three) [four]",
    "[not a list",
    'it\'s a "quoted" dog',
    '"hello" she said',
    "'twas a cat",
    "${oc.env:HOME} sweet ${oc.env:HOME}",
    "\\${oc.env:HOME} back\\slash \\",
    "ein Käse für 熊 🐻",
    "null",
    "3.5",
    "a\nb",
    "*?~!#%&;|<>`$HOME",
]


@pytest.mark.parametrize("prompt", AWKWARD)
def test_a_prompt_is_taken_literally(prompt: str) -> None:
    assert read_back(prompt) == prompt


def test_any_text_is_taken_literally() -> None:
    parts = ["\\", "'", '"', "$", "{", "}", "[", "(", ",", "=", "a", " ", "\n", "é", "${a}", "%"]
    rng = random.Random(0)
    for _ in range(300):
        # starts with w: a leading bracket or quote would be a list or a quoted string
        prompt = "w" + "".join(rng.choice(parts) for _ in range(rng.randint(0, 8)))
        assert read_back(prompt) == prompt


def read_back(prompt: str) -> str:
    argument = quote_prompt(f"prompt={prompt}")
    value: Any = OverridesParser.create().parse_override(argument).value()
    return str(OmegaConf.create({"prompt": value}).prompt)


def test_lists_and_quotes_follow_hydra_without_interpolation() -> None:
    def read(text: str) -> Any:
        value: Any = OverridesParser.create().parse_override(quote_prompt(text)).value()
        return OmegaConf.to_container(OmegaConf.create({"p": value}), resolve=True)["p"]  # type: ignore[index, call-overload]

    assert read("prompt=[a red heart,'b, c',3]") == ["a red heart", "b, c", "3"]
    assert read("prompt=[${oc.env:HOME}]") == ["${oc.env:HOME}"]
    assert read("prompt='a, b'") == "a, b"
    assert read('prompt="it is ${x}"') == "it is ${x}"
    assert quote_prompt("seed=3") == "seed=3"


def test_an_awkward_prompt_reaches_the_metadata(sample: Sample, out: Path) -> None:
    prompt = "${HOME}, it's \\"
    assert sample(f"prompt={prompt}") == 0
    assert [png_text(path)["prompt"] for path in images(out)] == [prompt]


def test_a_sweeps_images_do_not_overwrite_each_other(sample: Sample, out: Path) -> None:
    assert sample("-m", "prompt=frog", "sample.prior_sampler=ddpm,ddim") == 0
    samplers = [png_text(path)["prior_sampler"] for path in sorted(out.glob("*/*.png"))]
    assert samplers == ["ddpm", "ddim"]


def test_the_end_of_a_long_prompt_is_cut_off_with_a_warning(sample: Sample, out: Path) -> None:
    with pytest.warns(UserWarning, match="reads 16 tokens; truncated: 'frog frog"):
        assert sample("prompt=" + "frog " * 20) == 0
    assert len(images(out)) == 1


def test_a_size_between_multiples_is_cropped(sample: Sample, out: Path) -> None:
    with pytest.warns(UserWarning, match="generating 64 x 80 px and cropping"):
        assert sample("prompt=frog", "height=60", "width=70") == 0
    with Image.open(images(out)[0]) as image:
        assert image.size == (70, 60)


# Bad input


BAD = {
    "no prompt": ([], "no prompt; set prompt="),
    "emoji": (["prompt=🐸🐸"], "contains no word"),
    "not UTF-8": (["prompt=fr\udcffog"], "is not valid UTF-8"),
    "no height": (["prompt=a", "height=0"], "height=0 is not supported; use 16 to 4096"),
    "height": (["prompt=a", "height=1000003"], "height=1000003 is not supported"),
    "fraction": (["prompt=a", "height=64.5"], "height is 64.5, and must be int"),
    "word": (["prompt=a", "width=wide"], "width is 'wide', and must be int"),
    "count": (["prompt=a", "num_images_per_prompt=0"], "per_prompt=0 is out of range; use 1 to"),
    "many": (["prompt=a", "num_images_per_prompt=1000003"], "per_prompt=1000003 is out of range"),
    "seed": (["prompt=a", "seed=-1"], "seed=-1 is out of range"),
    "large seed": (["prompt=a", "seed=99999999999999999999"], "is out of range"),
    "steps": (["prompt=a", "sample.prior_steps=0"], "prior_steps=0 is out of range"),
    "nan": (["prompt=a", "sample.prior_guidance_scale=nan"], "prior_guidance_scale=nan is out"),
    "negative": (["prompt=a", "sample.decoder_guidance_scale=-1"], "decoder_guidance_scale=-1"),
    "sampler": (["prompt=a", "sample.prior_sampler=euler"], "prior_sampler is 'euler'"),
    "key": (["prompt=a", "sample.steps=3"], "sample.steps is not a key"),
    "no model": (["model=/no/such", "prompt=a"], "/no/such does not exist; train Stage C first"),
    "no words": (["words=[/no/such]", "prompt=a"], "words=/no/such does not exist"),
    "no prompts": (["prompts=/no/such.txt"], "prompts=/no/such.txt is not a file"),
}  # fmt: skip


def one_line(capsys: pytest.CaptureFixture) -> str:
    """The error line in stderr, after any progress bar; there must be no traceback."""
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    line = stderr.rstrip("\n").rpartition("\n")[2]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line_and_writes_nothing(
    case: str, sample: Sample, out: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments, message = BAD[case]
    assert sample(*arguments) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert message in stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "contains no prompts; write one per line"),
        (b"\n \r\n", "contains no prompts; write one per line"),
        (b"frog\nre\x07d heart\n", "contains a control character"),
        (b"frog\nre\x00d heart\n", "contains NUL characters"),
        (b"gr\xfcner Frosch\n", "is not UTF-8 text"),
        ("🐸\n".encode(), "contains no word"),
    ],
)
def test_a_bad_prompt_file_is_refused_before_sampling(
    content: bytes, message: str, sample: Sample, out: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    assert sample(f"prompts={tmp_path / 'prompts.txt'}") == 1
    assert message in one_line(capsys)
    assert not out.exists()


def test_a_model_of_another_stage_is_refused_by_name(
    sample: Sample, out: Path, cascade: Path, capsys: pytest.CaptureFixture
) -> None:
    assert sample("prompt=a", f"model={cascade / 'a'}") == 1
    assert "lacks decoder, prior, prior_text_encoder; use a complete cascade" in one_line(capsys)
    assert not out.exists()


def test_a_truncated_model_is_refused_by_name(
    sample: Sample, out: Path, cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    half = tmp_path / "half.ckpt"
    half.write_bytes(find_checkpoint(cascade / "c").read_bytes()[:5000])
    assert sample("prompt=a", f"model={half}") == 1
    assert "half.ckpt is damaged" in one_line(capsys)
    assert not out.exists()


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(self: Image.Image, path: Path, **kwargs: object) -> None:
    Path(path).write_bytes(b"half an image")
    full_disk()


@pytest.mark.parametrize(
    ("call", "replacement"), [("PIL.Image.Image.save", half_written), ("os.replace", full_disk)]
)
@pytest.mark.parametrize("existed", [False, True])
def test_a_full_disk_leaves_nothing_half_written(
    call: str, replacement: Any, existed: bool, sample: Sample, out: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    if existed:
        out.mkdir()
    monkeypatch.setattr(call, replacement)
    assert sample("prompt=frog") == 1
    assert "0000-frog-0.png could not be written: No space left on device" in one_line(capsys)
    assert out.exists() is existed
    assert not existed or list(out.iterdir()) == []


def test_an_output_that_is_a_file_is_refused_before_the_model_loads(
    sample: Sample, out: Path, capsys: pytest.CaptureFixture
) -> None:
    out.write_text("mine")
    for folder in (out, out / "deeper"):
        assert sample("prompt=frog", f"output_dir={folder}", "model=/no/such") == 1
        assert f"{out} is a file" in one_line(capsys)
    assert out.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_may_not_be_written_is_refused(
    sample: Sample, out: Path, capsys: pytest.CaptureFixture
) -> None:
    out.mkdir(mode=0o500)
    assert sample("prompt=frog", f"output_dir={out / 'deeper'}") == 1
    assert "no right to write" in one_line(capsys)


@pytest.mark.parametrize(("grid", "most"), [(True, 7), (False, 2)])
def test_images_stay_in_memory_only_for_the_grid(
    sample: Sample, out: Path, monkeypatch: pytest.MonkeyPatch, grid: bool, most: int
) -> None:
    created: list[weakref.ref] = []
    alive: list[int] = []

    def generate(pipeline: Any, prompts: list[str], **options: Any) -> Iterator[torch.Tensor]:
        for _ in prompts:
            image = torch.rand(3, 64, 64)
            created.append(weakref.ref(image))
            alive.append(sum(each() is not None for each in created))
            yield image

    monkeypatch.setattr("wuerstchen_pl.programs.sample.generate_images", generate)
    assert sample("prompt=frog", "num_images_per_prompt=7", f"grid={str(grid).lower()}") == 0
    assert max(alive) == most
    assert len(images(out)) == 7


@pytest.mark.parametrize("side", [None, 48])
def test_images_have_the_size_of_the_training_images(
    side: int | None, cascade: Path, program: Callable[..., int], tmp_path: Path
) -> None:
    run = shutil.copytree(cascade, tmp_path / "runs") / "c"
    if side is not None:
        config = OmegaConf.load(run / "config.yaml")
        config.image_size = side
        OmegaConf.save(config, run / "config.yaml")
    expected = side or 64
    few = ["sample.prior_steps=1", "sample.decoder_steps=1", "prompt=red"]
    assert program("export", f"ckpt={run}", f"to={tmp_path / 'model'}", "license=mit") == 0
    for number, model in enumerate((run, tmp_path / "model")):
        to = tmp_path / f"images{number}"
        assert program("sample", f"model={model}", f"output_dir={to}", *few) == 0
        with Image.open(next(to.glob("0000-*.png"))) as image:
            assert image.size == (expected, expected)


def test_a_model_of_unknown_size_draws_eight_multiples(cascade: Path) -> None:
    pipe = load_pipeline(str(cascade / "c"), device="cpu")
    assert (pipe.image_size, pipe.default_side) == (64, 64)
    pipe.image_size = None
    assert pipe.default_side == 8 * pipe.size_multiple


def test_the_empty_prompt_and_a_size_in_digits_are_as_in_the_pipeline(
    cascade: Path, sample: Callable[..., int], out: Path
) -> None:
    few = ["sample.prior_steps=1", "sample.decoder_steps=1"]
    assert sample("prompt=", "height=32", "width=48", "seed=5", *few) == 0
    with Image.open(images(out)[0]) as written:
        actual = np.asarray(written)
    pipe = load_pipeline(str(cascade / "c"), device="cpu")
    expected = pipe(
        "", "32", 48.0, seed=5, prior_num_inference_steps=1, num_inference_steps=1, output_type="np"
    )
    np.testing.assert_allclose(actual / 255, expected.images[0], atol=0.51 / 255)


def test_the_pipeline_refuses_sizes_and_prompts_as_the_program_does(cascade: Path) -> None:
    pipe = load_pipeline(str(cascade / "c"), device="cpu")
    for size in ("wide", 20.5, float("nan"), float("inf"), "", [32]):
        with pytest.raises(ValueError, match=r"^height=.* is not a whole number of pixels"):
            pipe("frog", size, 64)
    with pytest.raises(ValueError, match="contains no word"):
        pipe("...", 32, 32)


@pytest.mark.slow
def test_compiled_networks_draw_the_same_images(sample: Sample, out: Path, tmp_path: Path) -> None:
    keys = ["prompt=frog", "num_images_per_prompt=2", "grid=false"]
    assert sample(*keys) == 0
    assert sample(*keys, "compile=true", f"output_dir={tmp_path / 'compiled'}") == 0
    for path in images(out):
        eager, compiled = (
            np.asarray(Image.open(file), dtype=int)
            for file in (path, tmp_path / "compiled" / path.name)
        )
        assert np.abs(eager - compiled).max() <= 1  # of 255


@pytest.mark.parametrize("keys", [[], ["compile=true"]])
def test_all_networks_that_draw_are_compiled_if_asked_for(
    keys: list[str], sample: Sample, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only for the size of the images, not for that by which their time is estimated.

    Nor for a last batch that is smaller.
    """
    shapes: dict[str, set[torch.Size]] = {}

    def recorded(function: Any) -> Callable:
        shapes[function.__qualname__] = set()

        def compiled(x: torch.Tensor, *arguments: Any) -> Any:
            shapes[function.__qualname__].add(x.shape)
            return function(x, *arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", recorded)
    assert sample("prompt=frog", "num_images_per_prompt=3", "sample.batch_size=2", *keys) == 0
    assert len(images(out)) == 3
    assert [len(of_network) for of_network in shapes.values()] == ([1, 1, 1] if keys else [])
