"""One thread per process, as threads of tiny networks only wait; no test writes to the user's cache.

Those that need a CUDA card are skipped where there is none.
"""

import os
import tempfile

import pytest
import torch

torch.set_num_threads(1)

_CACHE = tempfile.TemporaryDirectory(prefix="mocohub-tests-")
os.environ["MOCOHUB_CACHE"] = _CACHE.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `cuda` where torch sees no card."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA card"))
