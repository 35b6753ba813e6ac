"""The ControlNet of a pipeline, which steers its Stage C by control images."""

from pathlib import Path

from wuerstchen_pl.formats.controlnet_files import read_controlnet
from wuerstchen_pl.pipelines.cascade import CascadePipeline
from wuerstchen_pl.sampling.device import cast_weights


class WithControlNet(CascadePipeline):
    """The cascade with a ControlNet, if one is loaded."""

    def load_controlnet(self, path: str | Path, *, allow_mismatch: bool = False) -> None:
        """Use a ControlNet from now on; each image then needs a control image.

        Args:
            path: a file that was exported with ``format=controlnet``, or a folder or hub id with
                ``controlnet.safetensors``.
            allow_mismatch: accept one that was trained beside a prior with other weights, such as
                those before an adapter was merged.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, or for another prior.
        """
        prior = self.prior.prior
        controlnet = read_controlnet(path, prior, allow_mismatch=allow_mismatch)
        cast_weights(controlnet, next(prior.parameters()).dtype)
        controlnet.to("cpu" if self.placement.offload else self.placement.device)
        self.prior.controlnet = controlnet.eval().requires_grad_(False)

    def unload_controlnet(self) -> None:
        """Generate without a ControlNet from now on."""
        self.prior.controlnet = None
