"""The evaluation plan: metrics, prompts, reference and the networks that score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from wuerstchen_pl.evaluation.metrics.clip import Clip, PickScore
from wuerstchen_pl.evaluation.metrics.feature_networks import FeatureNetwork, Inception
from wuerstchen_pl.models.perceptual import LPIPS
from wuerstchen_pl.sampling.config import SamplingConfig

SET_METRICS = ("fid", "kid", "is")
TEXT_METRICS = ("clip", "pickscore")
IMAGE_METRICS = (*SET_METRICS, *TEXT_METRICS, "retrieval")
"""Metrics of images, whether generated or read from a folder."""
NETWORK_METRICS = ("reconstruction", "rfid", "validation_loss")
"""Metrics of the model's networks on its own data."""
NETWORKS: Mapping[str, Sequence[str]] = {
    "fid_features": (*SET_METRICS, "rfid"),
    "clip": ("clip",),
    "pickscore": ("pickscore",),
    "lpips": ("reconstruction",),
}
"""Network of a plan -> the metrics that use it; that of lpips is optional."""
YAML = (".yaml", ".yml")
TRAINING_DATA = "data"
"""Value of ``prompts`` and ``reference`` that selects the model's training data."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """Metrics, prompts, and the networks that score images.

    Raises:
        ValueError: if a metric is unknown, or lacks what it needs.
    """

    metric: Sequence[str]
    prompts: str = TRAINING_DATA
    """``data``: training captions, each at its image's size; or a prompt file; or a data YAML."""
    num_prompts: int | None = 128
    """Maximum number of prompts; None uses all."""
    images: str | None = None
    """A folder of images to evaluate instead of generating them."""
    reference: str = TRAINING_DATA
    """``data``: the training images; or a folder of images; or a data YAML."""
    baselines: Sequence[str] = ()
    """Folders of images for the same prompts, for PickScore win rates."""
    height: int | None = None
    """In pixels, for prompts from a file."""
    width: int | None = None
    seed: int = 0
    """Seed of the first image; each further image adds one."""
    settings: SamplingConfig = field(default_factory=SamplingConfig)
    fid_features: FeatureNetwork | None = None
    """For fid, kid, is and rfid."""
    clip: Clip | None = None
    pickscore: PickScore | None = None
    lpips: LPIPS | None = None
    """Adds LPIPS to reconstruction."""
    cache_dir: str | None = None
    """Where features of a reference folder are cached; None disables the cache."""

    def __post_init__(self) -> None:
        choices = (*IMAGE_METRICS, *NETWORK_METRICS)
        if not self.metric or not set(self.metric) <= set(choices):
            raise ValueError(
                f"metric={list(self.metric)} is unknown; choose from {', '.join(choices)}"
            )
        if self.num_prompts is not None and self.num_prompts < 1:
            raise ValueError(f"num_prompts={self.num_prompts} is out of range; use 1 or more")
        if self.baselines and "pickscore" not in self.metric:
            raise ValueError("baselines= are compared by PickScore; add pickscore to metric=")
        if "retrieval" in self.metric and (not self.prompts_are_data or self.images is not None):
            raise ValueError(
                "metric=retrieval needs images generated for captions of images; use prompts=data "
                "or the config.yaml of a run, and images=null"
            )

    def check_networks(self) -> None:
        """Check that the networks of all metrics are there.

        Raises:
            ValueError: naming the metric and the missing network.
        """
        for name in ("fid_features", "clip", "pickscore"):
            if getattr(self, name) is None and self.uses(name):
                metric = next(metric for metric in self.metric if metric in NETWORKS[name])
                raise ValueError(f"metric={metric} needs {name}; set {name}=")
        if "is" in self.metric and not isinstance(self.fid_features, Inception):
            raise ValueError("metric=is needs Inception's classes; set fid_features=inception")

    def uses(self, network: str) -> bool:
        """Whether a metric uses a network of ``NETWORKS``."""
        return any(metric in NETWORKS[network] for metric in self.metric)

    @property
    def prompts_are_data(self) -> bool:
        """Whether the prompts are captions of a dataset, each with its image's size."""
        return self.prompts == TRAINING_DATA or self.prompts.endswith(YAML)

    @property
    def needs_images(self) -> bool:
        """Whether any metric scores images."""
        return any(name in IMAGE_METRICS for name in self.metric)

    @property
    def needs_generation(self) -> bool:
        """Whether images have to be generated."""
        return self.needs_images and self.images is None

    @property
    def needs_networks(self) -> bool:
        """Whether any metric runs the model's networks, even if no image is generated."""
        return any(name in NETWORK_METRICS for name in self.metric)

    @property
    def needs_data(self) -> bool:
        """Whether the data that the model was trained on is needed."""
        by_reference = self.reference == TRAINING_DATA and any(
            m in ("fid", "kid") for m in self.metric
        )
        return (
            self.needs_networks
            or by_reference
            or (self.needs_generation and self.prompts == TRAINING_DATA)
        )
