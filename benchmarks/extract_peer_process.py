"""One peer of `extract_peers.py`, in its own environment: features of folders as they are named on stdin.

    PYTHON_OF_ITS_ENVIRONMENT extract_peer_process.py thingsvision|img2vec WEIGHTS BATCH_SIZE DEVICE

Imports nothing but the peer and what that depends on. Each line of stdin is the JSON of a folder and of a
file for the features, or null; the answer is a line "RESULT", seconds and versions.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

TORCHVISIONS_FILE = "resnet50-11ad3fa6.pth"  # what torchvision looks for before it downloads anything


def thingsvision(weights, batch_size, device):
    """Its extractor, data set and loader as its documentation puts them together."""
    from thingsvision import get_extractor
    from thingsvision.utils.data import DataLoader, ImageDataset

    extractor = get_extractor(
        model_name="resnet50", source="torchvision", device=device, pretrained=False, model_path=weights
    )

    def run(folder):
        with tempfile.TemporaryDirectory() as out:
            dataset = ImageDataset(
                root=folder,
                out_path=out,
                backend=extractor.get_backend(),
                transforms=extractor.get_transformations(),
            )
            batches = DataLoader(dataset=dataset, batch_size=batch_size, backend=extractor.get_backend())
            return extractor.extract_features(
                batches=batches, module_name="avgpool", flatten_acts=True, output_type="ndarray"
            )

    return run


def img2vec(weights, batch_size, device):
    """Its `get_vec` of lists of images, which is faster than of one after the other."""
    import numpy as np
    from PIL import Image

    cache = tempfile.mkdtemp()
    os.makedirs(os.path.join(cache, "hub", "checkpoints"))
    shutil.copy(weights, os.path.join(cache, "hub", "checkpoints", TORCHVISIONS_FILE))
    os.environ["TORCH_HOME"] = cache
    from img2vec_pytorch import Img2Vec

    model = Img2Vec(cuda=device == "cuda", model="resnet50")
    shutil.rmtree(cache)

    def run(folder):
        files = sorted(Path(folder).iterdir())
        features = []
        for start in range(0, len(files), batch_size):
            images = [Image.open(file).convert("RGB") for file in files[start : start + batch_size]]
            features.append(model.get_vec(images))
        return np.concatenate(features)

    return run


def main():
    """Answer until stdin ends."""
    name, weights, batch_size, device = sys.argv[1:]
    run = {"thingsvision": thingsvision, "img2vec": img2vec}[name](weights, int(batch_size), device)
    import numpy as np
    import torch
    import torchvision

    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    for line in sys.stdin:
        folder, file = json.loads(line)
        start = time.perf_counter()
        features = run(folder)
        seconds = time.perf_counter() - start
        if file:
            np.save(file, features)
        print("RESULT", json.dumps([seconds, versions]), flush=True)


if __name__ == "__main__":
    main()
