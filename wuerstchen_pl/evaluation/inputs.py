"""What the user gives an evaluation: read and checked before any network is built."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from wuerstchen_pl.evaluation.datasets import DatasetImages, data_from_yaml
from wuerstchen_pl.evaluation.generation import GenerationRequest
from wuerstchen_pl.evaluation.image_folder import ImageFolder, check_same_prompts
from wuerstchen_pl.evaluation.plan import TEXT_METRICS, TRAINING_DATA, YAML, EvaluationPlan
from wuerstchen_pl.evaluation.prompt_sets import read_prompts, subsample

if TYPE_CHECKING:
    from wuerstchen_pl.data.datamodule import ImageTextDataModule

SIDE = 64
"""Default height and width of an image in pixels."""


class Targets(NamedTuple):
    """For images generated for the captions of a dataset, the images of these captions."""

    images: DatasetImages
    indices: Sequence[int]
    """For each generated image, the dataset index of its target."""


@dataclass(frozen=True, kw_only=True)
class EvaluationInputs:
    """Images and data, as far as a plan needs them."""

    data: "ImageTextDataModule | None" = None
    """The data that the model was trained on."""
    images: ImageFolder | None = None
    """Images to evaluate instead of generating them."""
    requests: Sequence[GenerationRequest] = ()
    """Images to generate."""
    targets: Targets | None = None
    """For retrieval; None if the prompts are not captions of a dataset."""
    reference: ImageFolder | DatasetImages | None = None
    """Images for FID and KID."""
    baselines: Sequence[ImageFolder] = ()
    """Images to compare with by PickScore."""

    @property
    def prompts(self) -> Sequence[str] | None:
        """The prompts of the images to evaluate; None if they are unknown."""
        if self.images is not None:
            return self.images.prompts
        return [request.prompt for request in self.requests]

    @property
    def num_images(self) -> int:
        """Number of images to evaluate."""
        return len(self.requests if self.images is None else self.images)


def read_inputs(plan: EvaluationPlan, data: "ImageTextDataModule | None") -> EvaluationInputs:
    """Read what a plan names, and check that it fits together.

    Args:
        plan: what to measure; its networks are not needed.
        data: the data that the model was trained on; None if the plan does not need it.

    Raises:
        FileNotFoundError: if a folder has no images, or a file is missing.
        ValueError: if prompts are missing, or baselines were generated for others.
    """
    images: ImageFolder | None = None
    requests: list[GenerationRequest] = []
    targets: Targets | None = None
    if plan.needs_generation:
        requests, targets = _requests(plan, data)
    elif plan.needs_images:
        images = _existing_images(plan)
    inputs = EvaluationInputs(
        data=data,
        images=images,
        requests=requests,
        targets=targets,
        reference=_reference(plan, data),
        baselines=[ImageFolder(Path(path), key="baselines") for path in plan.baselines],
    )
    if images is not None and images.prompts is None:
        for metric in set(TEXT_METRICS) & set(plan.metric):
            raise ValueError(
                f"metric={metric} needs prompts, but {images.path} has no images.json with them; "
                "set prompts= to a file of prompts"
            )
    for baseline in inputs.baselines:
        check_same_prompts(inputs.prompts or (), baseline)
    return inputs


def _requests(
    plan: EvaluationPlan, data: "ImageTextDataModule | None"
) -> tuple[list[GenerationRequest], Targets | None]:
    """The images to generate, and for captions of a dataset the images of these captions."""
    if plan.prompts_are_data:
        source = data if plan.prompts == TRAINING_DATA else data_from_yaml(Path(plan.prompts))
        assert source is not None
        images = DatasetImages(source)
        samples = images.captioned(plan.num_prompts)
        requests = [
            GenerationRequest(s.caption, plan.seed + s.dataset_index, s.height, s.width)
            for s in samples
        ]
        return requests, Targets(images, [s.dataset_index for s in samples])
    height, width = plan.height or SIDE, plan.width or SIDE
    prompts = subsample(read_prompts(plan.prompts), plan.num_prompts, plan.seed)
    requests = [GenerationRequest(p, plan.seed + i, height, width) for i, p in enumerate(prompts)]
    return requests, None


def _existing_images(plan: EvaluationPlan) -> ImageFolder:
    """The folder of images that the plan names; warns if they differ in size."""
    assert plan.images is not None
    prompts = None
    if plan.prompts != TRAINING_DATA:
        prompts = [request.prompt for request in _requests(plan, None)[0]]
    images = ImageFolder(Path(plan.images), prompts=prompts)
    if len(sizes := images.sizes()) > 1:
        examples = " and ".join(f"{height} x {width}" for height, width in (sizes[0], sizes[-1]))
        warnings.warn(
            f"{images.key}={images.path} contains images of {len(sizes)} sizes, such as {examples} "
            "px; each is resized by its shorter side and center-cropped",
            stacklevel=2,
        )
    return images


def _reference(
    plan: EvaluationPlan, data: "ImageTextDataModule | None"
) -> ImageFolder | DatasetImages | None:
    """The reference images of ``fid`` and ``kid``; None if neither is measured."""
    if not {"fid", "kid"} & set(plan.metric):
        return None
    if plan.reference == TRAINING_DATA:
        assert data is not None
        return DatasetImages(data)
    if plan.reference.endswith(YAML):
        return DatasetImages(data_from_yaml(Path(plan.reference)))
    return ImageFolder(Path(plan.reference), key="reference")
