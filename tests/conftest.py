"""One thread per process, as threads of tiny networks only wait; no test writes to the user's cache.

All but `pytest -m cuda` run as on a machine without a card, so that they give the same everywhere.
"""

import os
import tempfile

import pytest
import torch

torch.set_num_threads(1)

_CACHE = tempfile.TemporaryDirectory(prefix="mocohub-tests-")
os.environ["MOCOHUB_CACHE"] = _CACHE.name


def pytest_configure(config: pytest.Config) -> None:
    """Hide CUDA cards but from their own tests: a process that uses one must not fork, as others do."""
    marks = config.option.markexpr
    if "cuda" not in marks or "not cuda" in marks:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `cuda` where torch sees no card."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA card"))
