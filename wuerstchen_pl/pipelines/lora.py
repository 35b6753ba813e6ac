"""Adapters of a pipeline's networks, merged into their weights."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from wuerstchen_pl.adapters.merged import MergedAdapters
from wuerstchen_pl.formats.adapter_files import read_adapter
from wuerstchen_pl.pipelines.controlnet import WithControlNet


class WithAdapters(WithControlNet):
    """The cascade with LoRAs and their relatives.

    They are merged into the weights, so that sampling takes no longer. ``save_pretrained`` saves
    the weights as they are.
    """

    @cached_property
    def _adapters(self) -> MergedAdapters:
        return MergedAdapters(self._adaptable)

    @cached_property
    def _adaptable(self) -> nn.ModuleDict:
        return nn.ModuleDict(
            {
                "prior": self.prior.prior,
                "prior_text_encoder": self.prior.text_encoder,
                "decoder": self.decoder.decoder,
            }
        )

    @property
    def lora_weights(self) -> dict[str, float]:
        """The weights of the loaded adapters by name."""
        return dict(self._adapters.weights)

    def load_lora(
        self,
        path: str | Path,
        weight: float = 1.0,
        *,
        name: str | None = None,
        alpha: float | None = None,
    ) -> None:
        """Add an adapter of Stage C, its text encoder or Stage B.

        Read are files of this package, diffusers, kohya's scripts and OneTrainer.

        Args:
            path: the file, or a folder or hub id with ``pytorch_lora_weights.safetensors``.
            weight: 1 is as trained, 0 changes nothing.
            name: for ``set_lora_weights``; None is that of the file or folder.
            alpha: of a file that does not state it, such as diffusers' before 2024; None is its
                rank.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, of another model or not supported, or the name is taken.
        """
        adapter = read_adapter(path, self._adaptable, alpha=alpha)
        self._adapters.add(name or Path(path).stem, adapter, weight)

    def set_lora_weights(self, weights: Mapping[str, float]) -> None:
        """Change the weights of loaded adapters by name; the others keep theirs.

        Raises:
            ValueError: for a name that is not loaded.
        """
        self._adapters.set_weights(weights)

    def unload_lora(self) -> None:
        """Remove all adapters: the networks are bit for bit as before."""
        self._adapters.clear()

    def fuse_lora(self) -> None:
        """Make the loaded adapters a part of the networks for good, and free the memory of the
        networks' own weights.
        """
        self._adapters.clear(keep_merged=True)

    # As in diffusers

    def load_lora_weights(self, path: str | Path, adapter_name: str | None = None) -> None:
        """``load_lora`` under diffusers' name."""
        self.load_lora(path, name=adapter_name)

    def set_adapters(self, adapter_names: str | list[str], adapter_weights: Any = 1.0) -> None:
        """Use these adapters with these weights, and all others with 0.

        Args:
            adapter_names: one or several names.
            adapter_weights: one for all, or a list.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        is_list = isinstance(adapter_weights, list | tuple)
        weights = list(adapter_weights) if is_list else [adapter_weights] * len(names)
        unused = dict.fromkeys(self.lora_weights, 0.0)
        self.set_lora_weights({**unused, **dict(zip(names, weights, strict=True))})

    def unload_lora_weights(self) -> None:
        """``unload_lora`` under diffusers' name."""
        self.unload_lora()
