"""A few OpenMoji drawings, written once for all data tests."""

from pathlib import Path

import pytest

from wuerstchen_pl.data.sources.openmoji import OpenMoji


@pytest.fixture(scope="session")
def openmoji_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("openmoji")
    OpenMoji(root=str(root), image_size=64, limit=24).prepare()
    return root


@pytest.fixture
def openmoji(openmoji_root: Path) -> OpenMoji:
    return OpenMoji(root=str(openmoji_root), image_size=64, limit=24)
