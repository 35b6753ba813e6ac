"""Versions in records."""

import torch

from wuerstchen_pl.io.versions import installed_versions


def test_the_version_of_a_package_that_is_not_installed_is_null() -> None:
    versions = installed_versions(["torch", "no-such-package-of-ours"])
    assert torch.__version__.startswith(versions["torch"] or "none")
    assert versions["no-such-package-of-ours"] is None
