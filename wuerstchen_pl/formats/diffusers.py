"""The diffusers format of ``warp-ai/wuerstchen`` and ``warp-ai/wuerstchen-prior``.

Either two folders, one with Stage C and one with Stages A and B, or a single folder with all parts,
in which Stage C's have the prefix ``prior_``. The published folders have no compressor; it
is added beside the decoder under upstream names, which diffusers ignores.
"""

from pathlib import Path
from typing import Any

import torch

from wuerstchen_pl.formats.config_map import from_diffusers, to_diffusers
from wuerstchen_pl.formats.key_map import ExternalFormat, from_external, key_mappings, to_external
from wuerstchen_pl.formats.lazy_tensors import (
    LazyTensor,
    in_memory,
    read_safetensors,
    write_safetensors,
)
from wuerstchen_pl.formats.model import (
    DECODER_SETTING,
    PART_TARGETS,
    SCALE,
    TEXT_ENCODER,
    Model,
    Part,
    build_on_meta,
    move_scale_to_config,
    validate_config,
    validate_settings,
    with_defaults,
)
from wuerstchen_pl.formats.native import copy_tokenizer, dump_json, find_weights, load_json
from wuerstchen_pl.io.contents import contents_of
from wuerstchen_pl.signatures import check_objects

INDEX = "model_index.json"
PAIR = ("wuerstchen", "wuerstchen-prior")
"""The two folders that are written, named like the published repositories."""
SCHEDULE = {"scaler": 1.0, "s": 0.008}
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
    "image_size": "_image_size", "student_steps": "_student_steps",
}  # fmt: skip
"""Native name -> name in the index, of which diffusers ignores those with an underscore."""


def matches(path: Path) -> bool:
    """Whether a folder has this format, or contains one of the two folders that are written."""
    return bool(_folders(path))


def _folders(path: Path) -> list[Path]:
    return [folder for folder in (path, *(path / n for n in PAIR)) if (folder / INDEX).is_file()]


def read(path: Path, *, variant: str | None = None) -> Model:
    """Read a pipeline's folder, or the two folders that are written.

    Args:
        path: the folder.
        variant: see ``find_weights``.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged or not supported.
    """
    model = Model()
    for folder in _folders(path):
        index = load_json(folder / INDEX)
        # in a folder of Stage C only, the parts have no prefix
        only_prior = index.get("_class_name") == "WuerstchenPriorPipeline" or "prior" in index
        for name in ("text_encoder", "prior", "decoder", "vqgan"):
            for prefix in ("", "prior_"):
                if f"{prefix}{name}" not in index:
                    continue
                part = name if name == "prior" else f"{'prior_' if only_prior else prefix}{name}"
                model.parts[part] = _read_part(folder, f"{prefix}{name}", part, variant)
        _check_schedules(folder)
        settings = {native: index[name] for native, name in SETTINGS.items() if name in index}
        model.settings |= validate_settings(settings, str(folder / INDEX))
        if (folder / "compressor").is_dir():
            model.parts["compressor"] = _read_compressor(folder / "compressor")
    return model


def _check_schedules(folder: Path) -> None:
    for path in folder.glob("*scheduler/scheduler_config.json"):
        config = load_json(path)
        for key, value in SCHEDULE.items():
            if config.get(key, value) != value:
                raise ValueError(f"{path} has {key}={config[key]}; only {value} is supported")


def _read_part(folder: Path, name: str, part: str, variant: str | None) -> Part:
    if name.endswith("text_encoder"):
        tokenizer = folder / name.replace("text_encoder", "tokenizer")
        if not tokenizer.is_dir():
            raise FileNotFoundError(f"{tokenizer} is missing; add the tokenizer of {name}")
        return read_text_encoder(folder / name, tokenizer, variant)
    config = folder / name / "config.json"
    weights = find_weights(folder / name, "diffusion_pytorch_model", variant)
    arguments = _arguments(config, PART_TARGETS[part][0])
    return Part(
        arguments, _import_tensors(read_safetensors(weights), arguments, "diffusers", str(weights))
    )


def _arguments(path: Path, target: str) -> dict[str, Any]:
    """The native arguments of a network's ``config.json``."""
    content = load_json(path)
    with contents_of(path):
        arguments = from_diffusers(target, content, str(path))
        check_objects(arguments)
    return with_defaults(arguments)


def read_text_encoder(folder: Path, tokenizer: Path, variant: str | None = None) -> Part:
    """Read a transformers CLIPTextModel, and the files of its tokenizer if that folder exists."""
    config, weights = folder / "config.json", find_weights(folder, "model", variant)
    arguments = _arguments(config, TEXT_ENCODER)
    tensors = _with_prefix(read_safetensors(weights))
    imported = _import_tensors(tensors, arguments, "diffusers", str(weights))
    return Part(arguments, imported, tokenizer if tokenizer.is_dir() else None)


def _with_prefix(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Names with the prefix of transformers 4, which transformers 5 omits."""
    prefix = "text_model."
    prefixed = {f"{prefix}{name.removeprefix(prefix)}": lazy for name, lazy in tensors.items()}
    prefixed.pop("text_model.embeddings.position_ids", None)  # 0, 1, 2, ..., in older releases
    prefixed.pop("text_model.text_projection.weight", None)  # in CLIPTextModelWithProjection
    return prefixed


def _read_compressor(folder: Path) -> Part:
    config_file, weights = folder / "config.json", find_weights(folder, "model")
    tensors = read_safetensors(weights)
    config = validate_config(load_json(config_file), "compressor", len(tensors), str(config_file))
    return Part(config, _import_tensors(tensors, config, "upstream", str(weights)))


def _import_tensors(
    tensors: dict[str, LazyTensor], config: dict[str, Any], format: ExternalFormat, where: str
) -> dict[str, LazyTensor]:
    """External tensors under native names; Stage A's scale becomes a tensor again."""
    state = build_on_meta(config, str(Path(where).with_name("config.json"))).state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items() if name != SCALE}
    imported = from_external(tensors, key_mappings(config, shapes, format), shapes, where)
    if SCALE in state:
        imported[SCALE] = in_memory(torch.tensor(config[SCALE]))
    return imported


def write(model: Model, path: Path) -> None:
    """Write the two folders with the parts of the model.

    Raises:
        OSError: if a file cannot be written.
        ValueError: if diffusers does not support a part.
    """
    written = {name: move_scale_to_config(part) for name, part in model.parts.items()}
    configs = {
        name: to_diffusers(part.config) for name, part in written.items() if name != "compressor"
    }
    for folder, prefix, pipeline in (
        (PAIR[0], "", "WuerstchenDecoderPipeline"),
        (PAIR[1], "prior_", "WuerstchenPriorPipeline"),
    ):
        networks = {"prior"} if prefix else {"decoder", "vqgan", "compressor"}
        if not ({f"{prefix}text_encoder"} | networks) & written.keys():
            continue
        index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.21.0"}
        for name, config in configs.items():
            if name not in networks and name != f"{prefix}text_encoder":
                continue
            component = name.removeprefix(prefix) if name.endswith("text_encoder") else name
            _write_part(written[name], config, path / folder / component)
            index[component] = CLASSES[component]
            if component == "text_encoder":
                copy_tokenizer(written[name], path / folder / "tokenizer")
                index["tokenizer"] = CLASSES["tokenizer"]
        index["scheduler"] = CLASSES["scheduler"]
        for native, external in SETTINGS.items():
            if native in model.settings and (native == DECODER_SETTING) == (not prefix):
                index[external] = model.settings[native]
        dump_json(path / folder / INDEX, index)
        scheduler = {"_class_name": "DDPMWuerstchenScheduler", **SCHEDULE}
        dump_json(path / folder / "scheduler" / "scheduler_config.json", scheduler)
    if "compressor" in written:
        part, folder_path = written["compressor"], path / PAIR[0] / "compressor"
        dump_json(folder_path / "config.json", part.config)
        table = key_mappings(part.config, part.tensors, "upstream")
        write_safetensors(folder_path / "model.safetensors", to_external(part.tensors, table))


def _write_part(part: Part, config: dict[str, Any], folder: Path) -> None:
    stem = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"
    dump_json(folder / "config.json", config)
    table = key_mappings(part.config, part.tensors, "diffusers")
    write_safetensors(folder / f"{stem}.safetensors", to_external(part.tensors, table))
