"""What is to be measured, and with what."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from wuerstchen_pl.evaluation.metrics.clip import Clip, PickScore
from wuerstchen_pl.evaluation.metrics.feature_networks import FeatureNetwork, Inception
from wuerstchen_pl.models.perceptual import LPIPS
from wuerstchen_pl.pipelines.generate import SamplingConfig

SET_METRICS = ("fid", "kid", "is")
TEXT_METRICS = ("clip", "pickscore")
IMAGE_METRICS = (*SET_METRICS, *TEXT_METRICS, "retrieval")
"""Of images, drawn or given."""
NETWORK_METRICS = ("reconstruction", "rfid", "validation_loss")
"""Of the model's networks on its own data."""
TRAINING_DATA = "data"
"""As prompts or as the reference: what the model was trained on."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """Metrics, prompts, and the networks that judge.

    Raises:
        ValueError: if a metric is unknown, or lacks what it needs.
    """

    metric: Sequence[str]
    prompts: str = TRAINING_DATA
    """``data``: training captions, each at its image's size; or a file, or a YAML of data."""
    num_prompts: int | None = 128
    """Of the prompts, at most; None takes all."""
    images: str | None = None
    """A folder of images to judge, instead of drawing."""
    reference: str = TRAINING_DATA
    """A folder of images, or ``data``: the training images; or a YAML of data."""
    baselines: Sequence[str] = ()
    """Folders of images for the same prompts, to win against by PickScore."""
    height: int | None = None
    """In pixels, for prompts of a file."""
    width: int | None = None
    seed: int = 0
    """Of the first image; the next has one more."""
    settings: SamplingConfig = field(default_factory=SamplingConfig)
    fid_features: FeatureNetwork | None = None
    """For fid, kid, is and rfid."""
    clip: Clip | None = None
    pickscore: PickScore | None = None
    lpips: LPIPS | None = None
    """Adds LPIPS to reconstruction."""
    cache_dir: str | None = None
    """Where features of a reference folder are kept; None keeps none."""

    def __post_init__(self) -> None:
        known = (*IMAGE_METRICS, *NETWORK_METRICS)
        if not self.metric or not set(self.metric) <= set(known):
            raise ValueError(
                f"metric={list(self.metric)} is unknown; choose from {', '.join(known)}"
            )
        if self.num_prompts is not None and self.num_prompts < 1:
            raise ValueError(f"num_prompts={self.num_prompts} draws nothing; use at least 1")
        needs = {
            "clip": ("clip",),
            "pickscore": ("pickscore",),
            "fid_features": (*SET_METRICS, "rfid"),
        }
        for name, metrics in needs.items():
            if getattr(self, name) is None and (lacking := set(metrics) & set(self.metric)):
                raise ValueError(f"metric={lacking.pop()} needs {name}; choose one")
        if "is" in self.metric and not isinstance(self.fid_features, Inception):
            raise ValueError("metric=is is of Inception's classes; set fid_features=inception")
        if self.baselines and "pickscore" not in self.metric:
            raise ValueError("baselines= compares by PickScore; add pickscore to metric=")
        if "retrieval" in self.metric and (
            self.prompts != TRAINING_DATA or self.images is not None
        ):
            raise ValueError(
                "metric=retrieval looks for the training images of the captions that it draws; "
                "use prompts=data and images=null"
            )

    @property
    def judges(self) -> bool:
        """Whether there have to be images."""
        return any(name in IMAGE_METRICS for name in self.metric)

    @property
    def draws(self) -> bool:
        """Whether they have to be drawn."""
        return self.judges and self.images is None

    @property
    def of_networks(self) -> bool:
        """Whether the model's networks have to be there, whoever drew."""
        return any(name in NETWORK_METRICS for name in self.metric)

    @property
    def of_data(self) -> bool:
        """Whether the data that the model was trained on are needed."""
        by_reference = self.reference == TRAINING_DATA and any(
            m in ("fid", "kid") for m in self.metric
        )
        return self.of_networks or by_reference or (self.draws and self.prompts == TRAINING_DATA)
