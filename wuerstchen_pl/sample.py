"""Draw pictures from text: ``python -m wuerstchen_pl.sample prompt="a red heart"``."""

import json
import os
import re
import sys
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, ListConfig
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from wuerstchen_pl.callbacks.grids import to_pil
from wuerstchen_pl.cli import command
from wuerstchen_pl.config import check_config
from wuerstchen_pl.pipeline import Settings, WuerstchenPipeline

READ = frozenset(
    {"model", "prompt", "prompts", "count", "seed", "height", "width", "output_dir", "bf16"}
    | {"device", "sample", "grid"}
)


def run(cfg: DictConfig) -> None:
    """Check, draw, write."""
    check_config(cfg, READ)
    prompts = read_prompts(cfg.prompt, cfg.prompts)
    settings: Settings = hydra.utils.instantiate(cfg.sample)
    if cfg.count < 1:
        raise ValueError(f"count={cfg.count} draws nothing; use at least 1")
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = WuerstchenPipeline.from_pretrained(cfg.model, device=device, bf16=cfg.bf16)
    wanted = [(prompt, cfg.seed + i) for prompt in prompts for i in range(cfg.count)]
    texts, seeds = [p for p, _ in wanted], [s for _, s in wanted]
    pipeline.check(texts, cfg.height, cfg.width)

    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = pipeline(texts, seeds=seeds, height=cfg.height, width=cfg.width, settings=settings)
    pictures = []
    for number, picture in enumerate(tqdm(drawn, total=len(wanted), unit="picture")):
        prompt, seed = wanted[number]
        facts = {"prompt": prompt, "seed": seed, "model": str(cfg.model), **vars(settings)}
        name = f"{number:04d}-{slug(prompt)}-{seed}.png"
        write_png(folder / name, picture, facts)
        pictures.append(picture)
    if cfg.grid and len(pictures) > 1:
        write_png(folder / "grid.png", tile(pictures, columns=cfg.count), {})
    print(f"{len(pictures)} pictures in {folder}")


def read_prompts(prompt: str | ListConfig | None, prompts: str | None) -> list[str]:
    """The prompts of the command line, and those of a file, one a line.

    Raises:
        ValueError: if there are none.
        FileNotFoundError: if the file is missing.
    """
    given = list(prompt) if isinstance(prompt, ListConfig) else [prompt]
    found = [str(p) for p in given if p is not None]
    if prompts is not None:
        path = Path(prompts)
        if not path.is_file():
            raise FileNotFoundError(f"prompts={prompts} is no file; give one with a prompt a line")
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        found += [line.strip(" \r") for line in lines if line.strip()]
    if not found:
        raise ValueError('no prompt; set prompt="a red heart", or prompts= to a file of them')
    return found


def slug(prompt: str) -> str:
    """A prompt as part of a file's name, in ASCII."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:40].strip("-") or "prompt"


def write_png(path: Path, picture: torch.Tensor, facts: dict) -> None:
    """Write (3, H, W) in [0, 1] as PNG with ``facts`` in its metadata; whole, or not at all.

    Raises:
        OSError: if it cannot be written, naming the path.
    """
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    aside = path.with_suffix(".partial")
    try:
        to_pil(picture).save(aside, format="PNG", pnginfo=info)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error


def tile(pictures: list[torch.Tensor], columns: int) -> torch.Tensor:
    """N pictures (3, H, W) -> one (3, rows (H+2), columns (W+2)), white between them."""
    if columns == 1:
        columns = min(8, len(pictures))
    padded = [torch.nn.functional.pad(p, (0, 2, 0, 2), value=1.0) for p in pictures]
    padded += [torch.ones_like(padded[0])] * (-len(padded) % columns)
    rows = [torch.cat(padded[i : i + columns], dim=2) for i in range(0, len(padded), columns)]
    return torch.cat(rows, dim=1)


def quote_prompt(argument: str) -> str:
    """Let ``prompt=`` take any text: Hydra's grammar would read commas, braces and more in it."""
    key, sign, text = argument.partition("=")
    if key != "prompt" or not sign or text[:1] in ("'", '"', "["):
        return argument
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("${", "\\${")
    return f"prompt='{escaped}'"


_main = command("sample", run)


def main() -> None:
    """The command-line program."""
    sys.argv[1:] = [quote_prompt(argument) for argument in sys.argv[1:]]
    _main()


if __name__ == "__main__":
    main()
