"""The sizes at which the sections run: published networks on a GPU, or tiny ones anywhere."""

import json
from pathlib import Path
from typing import NamedTuple


class Size(NamedTuple):
    """How large the networks, batches and timings of a check are."""

    full: bool
    """Whether speed and memory are judged."""
    preset: str
    image_size: int
    """Of Stage B and of sampling, in pixels."""
    stage_c_batches: tuple[int, int]
    stage_b_batches: tuple[int, int, int]
    sampling_batches: tuple[int, ...]
    timed_steps: int
    """Training steps per timing, and rounds of the other timings."""
    program_steps: int
    program_batch: int
    matrix: int
    """Side of the multiplied matrices."""
    copied_bytes: int

    @property
    def grid(self) -> int:
        """Semantic positions along a side of an image."""
        return 4 if self.preset == "tiny" else -(-self.image_size * 3 // 128)


FULL = Size(
    full=True, preset="v2", image_size=1024, stage_c_batches=(24, 64), stage_b_batches=(2, 8, 16),
    sampling_batches=(1, 16), timed_steps=6, program_steps=200, program_batch=64, matrix=8192,
    copied_bytes=2**31,
)  # fmt: skip
TINY = Size(
    full=False, preset="tiny", image_size=64, stage_c_batches=(2, 4), stage_b_batches=(2, 3, 4),
    sampling_batches=(1,), timed_steps=1, program_steps=8, program_batch=8, matrix=128,
    copied_bytes=2**16,
)  # fmt: skip


class Check(NamedTuple):
    """What a section needs to know."""

    size: Size
    out: Path
    """Folder of the results."""
    work: Path
    """Folder of training runs, shared by the sections."""
    shards: str
    """OpenMoji's shards, as ``data.urls``."""
    seconds: float
    """Time limit of the section."""

    def to_json(self) -> str:
        """The check for another process; its size must be ``FULL`` or ``TINY``."""
        return json.dumps({**self._asdict(), "size": self.size.full}, default=str)

    @staticmethod
    def from_json(encoded: str) -> "Check":
        """The check that ``to_json`` encoded."""
        fields = json.loads(encoded)
        paths = {name: Path(fields[name]) for name in ("out", "work")}
        return Check(**{**fields, **paths, "size": FULL if fields["size"] else TINY})
