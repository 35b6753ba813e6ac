"""A sweep of several jobs: its set-up, its table of results, and its exit code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from wuerstchen_pl.plural import plural

_JOBS: list[tuple[list[str], str]] = []
"""Overrides and results of the jobs that ran in this process; Hydra owns the callback."""


@contextmanager
def results_table() -> Iterator[None]:
    """Print the results of a sweep's jobs after the block, also if a job failed.

    A launcher that runs the jobs in other processes, such as submitit's, leaves none here.
    """
    _JOBS.clear()
    try:
        yield
    finally:
        if len(_JOBS) > 1:
            print(table(_JOBS))


class SweepCallback(Callback):
    """Sets up a sweep, records its results, and ends it with exit code 1 if a job failed.

    Some sweepers, such as Optuna's, can ignore failed jobs.
    """

    def __init__(self) -> None:
        self.num_jobs = self.num_failed = 0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Let ``hydra.sweep.dir`` use ``${hydra:...}``, which Hydra sets only later."""
        HydraConfig.instance().set_config(config)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Record the overrides and the result of a job of a sweep."""
        failed = job_return.status == JobStatus.FAILED
        self.num_jobs += 1
        self.num_failed += failed
        result = "failed" if failed else _formatted(job_return.return_value)
        _JOBS.append((list(job_return.overrides or ()), result))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Report the failed jobs of a sweep whose sweeper ignored them."""
        if self.num_failed:
            failed = f"{self.num_failed} of {plural(self.num_jobs, 'job')}"
            print(f"error: {failed} of the sweep failed", file=sys.stderr)
            sys.exit(1)


def _formatted(result: object) -> str:
    return f"{result:.4g}" if isinstance(result, float) else "done"


def table(jobs: list[tuple[list[str], str]]) -> str:
    """One line per job with its number, its result, and the overrides that not all jobs share."""
    shared = set.intersection(*(set(overrides) for overrides, _ in jobs))
    width = max(len("result"), *(len(result) for _, result in jobs))
    rows = [
        (str(number), result, " ".join(text for text in overrides if text not in shared))
        for number, (overrides, result) in enumerate(jobs)
    ]
    return "\n".join(
        f"{number:>4} {result:>{width}}  {overrides}".rstrip()
        for number, result, overrides in [("job", "result", "overrides"), *rows]
    )
