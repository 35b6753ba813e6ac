"""What is to be measured, and with what."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from wuerstchen_pl.metrics.clip import Clip, PickScore
from wuerstchen_pl.metrics.networks import Inception, Network
from wuerstchen_pl.models.perceptual import LPIPS
from wuerstchen_pl.pipeline.draw import Settings

OF_SETS = ("fid", "kid", "is")
OF_TEXTS = ("clip", "pickscore")
OF_DRAWN = (*OF_SETS, *OF_TEXTS, "retrieval")
"""Of pictures, drawn or given."""
OF_NETWORKS = ("reconstruction", "rfid", "validation_loss")
"""Of the model's networks on its own data."""
DATA = "data"
"""As prompts or as the reference: what the model was trained on."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Metrics, prompts, and the networks that judge.

    Raises:
        ValueError: if a metric is unknown, or lacks what it needs.
    """

    metric: Sequence[str]
    prompts: str = DATA
    """``data``: training captions, each at its picture's size; or a file, or a YAML of data."""
    num_prompts: int | None = 128
    """Of the prompts, at most; None takes all."""
    images: str | None = None
    """A folder of pictures to judge, instead of drawing."""
    reference: str = DATA
    """A folder of pictures, or ``data``: the training pictures; or a YAML of data."""
    against: Sequence[str] = ()
    """Folders of pictures for the same prompts, to win against by PickScore."""
    height: int | None = None
    """In pixels, for prompts of a file."""
    width: int | None = None
    seed: int = 0
    """Of the first picture; the next has one more."""
    settings: Settings = field(default_factory=Settings)
    features: Network | None = None
    """For fid, kid, is and rfid."""
    clip: Clip | None = None
    pickscore: PickScore | None = None
    lpips: LPIPS | None = None
    """Adds LPIPS to reconstruction."""
    cache_dir: str | None = None
    """Where features of a reference folder are kept; None keeps none."""

    def __post_init__(self) -> None:
        known = (*OF_DRAWN, *OF_NETWORKS)
        if not self.metric or not set(self.metric) <= set(known):
            raise ValueError(
                f"metric={list(self.metric)} is unknown; choose from {', '.join(known)}"
            )
        if self.num_prompts is not None and self.num_prompts < 1:
            raise ValueError(f"num_prompts={self.num_prompts} draws nothing; use at least 1")
        needs = {"clip": ("clip",), "pickscore": ("pickscore",), "features": (*OF_SETS, "rfid")}
        for name, metrics in needs.items():
            if getattr(self, name) is None and (lacking := set(metrics) & set(self.metric)):
                raise ValueError(f"metric={lacking.pop()} needs {name}; choose one")
        if "is" in self.metric and not isinstance(self.features, Inception):
            raise ValueError("metric=is is of Inception's classes; set features=inception")
        if self.against and "pickscore" not in self.metric:
            raise ValueError("against= compares by PickScore; add pickscore to metric=")
        if "retrieval" in self.metric and (self.prompts != DATA or self.images is not None):
            raise ValueError(
                "metric=retrieval looks for the training pictures of the captions that it draws; "
                "use prompts=data and images=null"
            )

    @property
    def judges(self) -> bool:
        """Whether there have to be pictures."""
        return any(name in OF_DRAWN for name in self.metric)

    @property
    def draws(self) -> bool:
        """Whether they have to be drawn."""
        return self.judges and self.images is None

    @property
    def of_networks(self) -> bool:
        """Whether the model's networks have to be there, whoever drew."""
        return any(name in OF_NETWORKS for name in self.metric)

    @property
    def of_data(self) -> bool:
        """Whether the data that the model was trained on are needed."""
        by_reference = self.reference == DATA and any(m in ("fid", "kid") for m in self.metric)
        return self.of_networks or by_reference or (self.draws and self.prompts == DATA)
