"""The format of ``warp-ai/wuerstchen`` and ``warp-ai/wuerstchen-prior``, for diffusers.

Two folders, one of Stage C and one of Stages A and B, or one with all parts, where Stage C's are
prefixed ``prior_``. The published ones hold no compressor; ours is written beside the decoder,
under the authors' names, where diffusers does not look.
"""

from pathlib import Path
from typing import Any

import torch

from wuerstchen_pl.formats.config_map import from_diffusers, to_diffusers
from wuerstchen_pl.formats.key_map import ExternalFormat, from_upstream, key_mappings, to_upstream
from wuerstchen_pl.formats.lazy_tensors import (
    LazyTensor,
    in_memory,
    read_safetensors,
    write_safetensors,
)
from wuerstchen_pl.formats.model import (
    SCALE,
    Model,
    Part,
    build_on_meta,
    move_scale_to_config,
    validate_config,
    validate_settings,
    with_defaults,
)
from wuerstchen_pl.formats.native import copy_tokenizer, dump_json, find_weights, load_json

INDEX = "model_index.json"
PAIR = ("wuerstchen", "wuerstchen-prior")
"""Folders of what we write, named as the published ones."""
SCHEDULE = {"scaler": 1.0, "s": 0.008}
KINDS = {
    "prior": "prior.Prior", "decoder": "diffnext.DiffNeXt", "vqgan": "vqgan.VQGAN",
}  # fmt: skip
CLASSES = {
    "prior": ["wuerstchen", "WuerstchenPrior"],
    "decoder": ["wuerstchen", "WuerstchenDiffNeXt"],
    "vqgan": ["wuerstchen", "PaellaVQModel"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
}
SETTINGS = {
    "semantic_scale": "latent_mean", "semantic_shift": "latent_std",
    "resolution_multiple": "resolution_multiple", "latent_dim_scale": "latent_dim_scale",
}  # fmt: skip


def matches(path: Path) -> bool:
    """Whether a folder is of this format, or holds some of the two that we write."""
    return bool(_folders(path))


def _folders(path: Path) -> list[Path]:
    return [folder for folder in (path, *(path / n for n in PAIR)) if (folder / INDEX).is_file()]


def read(path: Path, *, variant: str | None = None) -> Model:
    """The parts of a pipeline's folder, or of the two that we write.

    Args:
        path: the folder.
        variant: ``fp16`` reads ``*.fp16.safetensors``.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one does not fit.
    """
    model = Model()
    for folder in _folders(path):
        index = load_json(folder / INDEX)
        # Stage C's own folder does not prefix its parts
        alone = index.get("_class_name") == "WuerstchenPriorPipeline" or "prior" in index
        for name in ("text_encoder", "prior", "decoder", "vqgan"):
            for prefix in ("", "prior_"):
                if f"{prefix}{name}" not in index:
                    continue
                own = name if name == "prior" else f"{'prior_' if alone else prefix}{name}"
                model.parts[own] = _read_part(folder, f"{prefix}{name}", own, variant)
        _check_schedules(folder)
        settings = {ours: index[theirs] for ours, theirs in SETTINGS.items() if theirs in index}
        model.settings |= validate_settings(settings, str(folder / INDEX))
        if (folder / "compressor").is_dir():
            model.parts["compressor"] = _read_compressor(folder / "compressor")
    return model


def _check_schedules(folder: Path) -> None:
    for path in folder.glob("*scheduler/scheduler_config.json"):
        config = load_json(path)
        for key, value in SCHEDULE.items():
            if config.get(key, value) != value:
                raise ValueError(f"{path} has {key}={config[key]}; only {value} can be sampled")


def _read_part(folder: Path, name: str, own: str, variant: str | None) -> Part:
    if name.endswith("text_encoder"):
        tokenizer = folder / name.replace("text_encoder", "tokenizer")
        if not tokenizer.is_dir():
            raise FileNotFoundError(f"{tokenizer} is missing, without which no prompt can be read")
        return read_text_encoder(folder / name, tokenizer, variant)
    config = folder / name / "config.json"
    weights = find_weights(folder / name, "diffusion_pytorch_model", variant)
    ours = with_defaults(from_diffusers(KINDS[own], load_json(config), str(config)))
    return Part(ours, _import_tensors(read_safetensors(weights), ours, "diffusers", str(weights)))


def read_text_encoder(folder: Path, tokenizer: Path, variant: str | None = None) -> Part:
    """transformers' CLIPTextModel; the folder ``tokenizer``, if it is there, holds its files."""
    config, weights = folder / "config.json", find_weights(folder, "model", variant)
    ours = with_defaults(from_diffusers("text.TextEncoder", load_json(config), str(config)))
    tensors = _with_prefix(read_safetensors(weights))
    part = Part(ours, _import_tensors(tensors, ours, "diffusers", str(weights)))
    part.tokenizer = tokenizer if tokenizer.is_dir() else None
    return part


def _with_prefix(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The names of transformers 4, which have a prefix; those of transformers 5 have none."""
    prefix = "text_model."
    found = {f"{prefix}{name.removeprefix(prefix)}": lazy for name, lazy in tensors.items()}
    found.pop("text_model.embeddings.position_ids", None)  # 0, 1, 2, ..., of older releases
    found.pop("text_model.text_projection.weight", None)  # of CLIPTextModelWithProjection
    return found


def _read_compressor(folder: Path) -> Part:
    config_file, weights = folder / "config.json", find_weights(folder, "model")
    tensors = read_safetensors(weights)
    config = validate_config(load_json(config_file), "compressor", len(tensors), str(config_file))
    return Part(config, _import_tensors(tensors, config, "upstream", str(weights)))


def _import_tensors(
    tensors: dict[str, LazyTensor], config: dict[str, Any], format: ExternalFormat, where: str
) -> dict[str, LazyTensor]:
    """Their tensors under our names, and the scale of Stage A, which they hold in the config."""
    state = build_on_meta(config).state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items() if name != SCALE}
    found = from_upstream(tensors, key_mappings(config, shapes, format), shapes, where)
    if SCALE in state:
        found[SCALE] = in_memory(torch.tensor(config[SCALE]))
    return found


def write(model: Model, path: Path) -> None:
    """Write the two folders, with those parts that there are.

    Raises:
        OSError: if they cannot be written.
        ValueError: for a part that diffusers has not.
    """
    written = {name: move_scale_to_config(part) for name, part in model.parts.items()}
    configs = {
        name: to_diffusers(part.config) for name, part in written.items() if name != "compressor"
    }
    for folder, prefix, pipeline in (
        (PAIR[0], "", "WuerstchenDecoderPipeline"),
        (PAIR[1], "prior_", "WuerstchenPriorPipeline"),
    ):
        own = {"prior"} if prefix else {"decoder", "vqgan", "compressor"}
        if not ({f"{prefix}text_encoder"} | own) & written.keys():
            continue
        index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.21.0"}
        for name, config in configs.items():
            if name not in own and name != f"{prefix}text_encoder":
                continue
            theirs = name.removeprefix(prefix) if name.endswith("text_encoder") else name
            _write_part(written[name], config, path / folder / theirs)
            index[theirs] = CLASSES[theirs]
            if theirs == "text_encoder":
                copy_tokenizer(written[name], path / folder / "tokenizer")
                index["tokenizer"] = CLASSES["tokenizer"]
        index["scheduler"] = CLASSES["scheduler"]
        for ours, theirs in SETTINGS.items():
            if ours in model.settings and (theirs == "latent_dim_scale") == (not prefix):
                index[theirs] = model.settings[ours]
        dump_json(path / folder / INDEX, index)
        scheduler = {"_class_name": "DDPMWuerstchenScheduler", **SCHEDULE}
        dump_json(path / folder / "scheduler" / "scheduler_config.json", scheduler)
    if "compressor" in written:
        part, folder_path = written["compressor"], path / PAIR[0] / "compressor"
        dump_json(folder_path / "config.json", part.config)
        table = key_mappings(part.config, part.tensors, "upstream")
        write_safetensors(folder_path / "model.safetensors", to_upstream(part.tensors, table))


def _write_part(part: Part, config: dict[str, Any], folder: Path) -> None:
    stem = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"
    dump_json(folder / "config.json", config)
    table = key_mappings(part.config, part.tensors, "diffusers")
    write_safetensors(folder / f"{stem}.safetensors", to_upstream(part.tensors, table))
