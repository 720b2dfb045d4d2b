"""One thread per process, as threads of tiny networks only wait; and no test writes to the user's cache."""

import os
import tempfile

import torch

torch.set_num_threads(1)

_CACHE = tempfile.TemporaryDirectory(prefix="mocohub-tests-")
os.environ["MOCOHUB_CACHE"] = _CACHE.name
