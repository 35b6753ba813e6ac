"""Train, fine-tune, sample and evaluate the Wuerstchen text-to-image cascade."""

from typing import Any

__all__ = ["DEFAULT_STAGE_C_TIMESTEPS", "WuerstchenPipeline"]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import the pipeline lazily, as the commands' help does not need it."""
    if name == "WuerstchenPipeline":
        from wuerstchen_pl.pipelines.wuerstchen import WuerstchenPipeline

        return WuerstchenPipeline
    if name == "DEFAULT_STAGE_C_TIMESTEPS":
        from wuerstchen_pl.sampling.prior import DEFAULT_STAGE_C_TIMESTEPS

        return DEFAULT_STAGE_C_TIMESTEPS
    raise AttributeError(f"module 'wuerstchen_pl' has no attribute {name!r}")
