"""Feature networks for distances between image sets, and their preprocessing.

FID depends on the resampling filter and the file format (Parmar et al., arXiv 2104.11222), so both
are fixed: 8-bit pixels as in a PNG, resized once by torch's antialiased bicubic filter.
"""

import tempfile
from collections.abc import Iterable, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Protocol
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from wuerstchen_pl.io import atomic
from wuerstchen_pl.models.fingerprint import weights_fingerprint

RESIZE_METHOD = "torch, antialiased bicubic, shorter side, then the middle"


class FeatureNetwork(Protocol):
    """A network that computes image features: (B, 3, S, S) uint8 -> (B, D)."""

    name: str
    """``inception``, or the suffix of ``fd_`` and ``kd_``."""
    weights_sha256: str
    width: int
    """Number of features D."""

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, D) float32."""
        ...


class Inception(nn.Module):
    """Inception-v3 (2015) in torch-fidelity's port: the network of FID, KID and IS.

    Args:
        weights: a local file; None downloads torch-fidelity's release once.

    Raises:
        FileNotFoundError: if the file does not exist, or the release cannot be downloaded.
        ValueError: if the file does not contain Inception-v3.
    """

    name = "inception"
    width = 2048

    def __init__(self, *, weights: str | None = None) -> None:
        from torch_fidelity import feature_extractor_inceptionv3 as port

        super().__init__()
        path = Path(weights) if weights is not None else _downloaded(port.URL_INCEPTION_V3)
        if not path.is_file():
            raise FileNotFoundError(
                f"weights={weights} is not a file; use Inception's weights file"
            )
        self.weights_sha256 = atomic.sha256(path)
        outputs = ["2048", "logits_unbiased"]
        with tempfile.TemporaryDirectory() as folder:
            # The port unpickles without restrictions, so it gets a copy that has only tensors.
            tensors_only = Path(folder, "tensors.pt")
            torch.save(_tensors(path), tensors_only)
            try:
                self.net = port.FeatureExtractorInceptionV3(
                    "inception-v3-compat", outputs, feature_extractor_weights_path=str(tensors_only)
                )
            except RuntimeError as error:
                raise ValueError(f"weights={path} is not an Inception-v3") from error

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, 2048) pooled features."""
        return self.net(images)[0]

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, 1008) class logits."""
        return self.net(images)[1]


def _downloaded(url: str) -> Path:
    try:
        torch.hub.load_state_dict_from_url(url, weights_only=True, check_hash=True)
    except (URLError, OSError) as error:
        raise FileNotFoundError(
            f"Inception's weights cannot be downloaded ({error}); use a local copy of "
            f"{url.rpartition('/')[2]} with weights=, or use fid_features=random"
        ) from error
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own message suggests weights_only=False
        raise ValueError(
            f"weights={path} was not loaded: it is damaged or contains more than "
            "tensors; use another file"
        ) from error


class RandomConvFeatures(nn.Module):
    """Convolutions with fixed random weights: nothing to download, but blind to semantics.

    The features respond to colors, edges and textures. Their distances are not comparable to FID.

    Args:
        widths: channels of each layer; each layer halves the resolution.
        seed: seed of the weights.
    """

    name = "random"

    def __init__(self, *, widths: Sequence[int] = (16, 24, 32), seed: int = 0) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        sizes = pairwise([3, *widths])
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in sizes)
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight, gain=2**0.5, generator=rng)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.width = sum(widths)
        self.weights_sha256 = weights_fingerprint([self])

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, sum of widths) spatial means of each layer's channels."""
        x, means = images.float() / 127.5 - 1, []
        for layer in self.layers:
            x = F.relu(layer(x))
            means.append(x.mean(dim=(2, 3)))
        return torch.cat(means, dim=1)


def square(image: Tensor, side: int) -> Tensor:
    """(3, H, W) uint8 -> (3, side, side): resized by the shorter side, then center-cropped."""
    resized = TF.resize(image, [side], InterpolationMode.BICUBIC, antialias=True)
    return TF.center_crop(resized, [side, side])


def batched(images: Iterable[Tensor], side: int, batch_size: int = 32) -> Iterable[Tensor]:
    """Images (3, H, W) uint8 of any size -> batches (B, 3, side, side)."""
    squares = (square(image, side) for image in images)
    while batch := list(islice(squares, batch_size)):
        yield torch.stack(batch)
