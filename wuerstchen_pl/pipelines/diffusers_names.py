"""Methods of diffusers' pipelines: components, saving, text embeddings, progress bars."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from wuerstchen_pl.formats import FormatName
from wuerstchen_pl.formats.hub import upload
from wuerstchen_pl.formats.lazy_tensors import in_memory
from wuerstchen_pl.formats.model import Model, Part
from wuerstchen_pl.formats.registry import write_model
from wuerstchen_pl.models.controlnet import ControlNet
from wuerstchen_pl.models.tokenizer import Tokenizer
from wuerstchen_pl.pipelines.words import WithWords
from wuerstchen_pl.sampling.prompts import Prompts, encode_prompts


class DiffusersNames(WithWords):
    """The cascade with the attributes and methods that diffusers' users know."""

    _model: Model | None = None
    """Configs and settings, without tensors; None for a pipeline of a stage in training."""

    # What is loaded

    @property
    def components(self) -> dict[str, nn.Module]:
        """The networks by the names of a model's parts."""
        networks = {
            "prior_text_encoder": self.prior.text_encoder,
            "prior": self.prior.prior,
            "controlnet": self.prior.controlnet,
            "text_encoder": self.decoder.text_encoder,
            "decoder": self.decoder.decoder,
            "vqgan": self.vqgan,
            "compressor": self.compressor,
        }
        return {name: network for name, network in networks.items() if network is not None}

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the pipeline, and the config of each network."""
        model = self._described()
        return {**model.settings, **{name: part.config for name, part in model.parts.items()}}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of Stage C."""
        return self.prior.text_encoder.tokenizer

    @property
    def device(self) -> torch.device:
        """The device that the pipeline runs on."""
        return self.placement.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights of Stage C."""
        return next(self.prior.prior.parameters()).dtype

    def __repr__(self) -> str:
        lines = [
            f"  {name}: {type(network).__name__}, "
            f"{sum(p.numel() for p in network.parameters()):,d} parameters"
            for name, network in self.components.items()
        ]
        source = "" if self.source is None else f"\n  source: {self.source['path']}"
        head = f"{type(self).__name__} on {self.device} in {str(self.dtype).split('.')[1]}"
        return "\n".join([head, *lines]) + source

    # Text and progress

    @torch.no_grad()
    def encode_prompt(
        self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Prompts -> ``prompt_embeds`` and ``negative_prompt_embeds`` for Stage C, (N, L, D) each.

        Raises:
            ValueError: if a prompt is not text, or their numbers differ.
        """
        encoder = self.prior.text_encoder
        prompts = Prompts(prompt, negative_prompt)
        with self.placement.on_device(encoder):
            positive, negative = encode_prompts(encoder, prompts, repeats=1, guided=True).chunk(2)
        return positive, negative

    def set_progress_bar_config(self, *, disable: bool = False) -> None:
        """Hide or show the progress bars of all further calls."""
        self.show_progress = not disable

    # Saving

    def save_pretrained(self, path: str | Path, *, format: FormatName = "native") -> None:
        """Write the current weights as a model, into a new or empty folder.

        Args:
            path: the folder.
            format: ``native``; or ``diffusers``, whose pipelines can read it.

        Raises:
            OSError: if it cannot be written, or is not empty.
            ValueError: if the format does not support the model, or the pipeline is of a stage in
                training.
        """
        model = self._described()
        parts = {name: _part(network, model, name) for name, network in self.components.items()}
        write_model(replace(model, parts=parts), Path(path), format)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        format: FormatName = "native",
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the model to a repository of the hub, which is created if needed; returns its URL.

        Args:
            repo_id: ``user/name``.
            format: see ``save_pretrained``.
            private: whether a new repository is private; None is the account's default.
            token: a token with write access; None is that of ``hf auth login``.
        """
        with TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            self.save_pretrained(model, format=format)
            return upload(model, repo_id, private=private, token=token)

    def _described(self) -> Model:
        if self._model is None:
            raise ValueError(
                "this pipeline shares the networks of a stage in training, whose config it does "
                "not have; use the run's checkpoint with from_pretrained"
            )
        return self._model

    def _describe(self, model: Model) -> None:
        """Keep the configs and settings of a model, not its tensors."""
        parts = {name: Part(part.config, {}, part.tokenizer) for name, part in model.parts.items()}
        self._model = replace(model, parts=parts)


def _part(network: nn.Module, described: Model, name: str) -> Part:
    tensors = {key: in_memory(tensor) for key, tensor in network.state_dict().items()}
    if isinstance(network, ControlNet):  # which may have been loaded from a file
        return Part(network.arguments or {}, tensors)
    return Part(described.parts[name].config, tensors, described.parts[name].tokenizer)
