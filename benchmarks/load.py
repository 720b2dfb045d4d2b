"""How long `mocohub.load` takes when everything is on the disk, what it asks, and what it holds in memory.

    python benchmarks/load.py [--shapes r50 r50w4x] [--rounds 9] [--no-conversion]

For each shape it exports a network with random weights, puts the folder into a cache as the Hub's client
does, and loads it in turns:

- bare: timm's network on the meta device, the file mapped by safetensors, the tensors assigned; no check
- mocohub.load of the folder, and of the same commit in the cache of the Hub's client; both verified
- timm.create_model("local-dir:...", pretrained=True)

Requests are counted by a server that stands where the Hub's address points. Memory is the most that a fresh
process held after its imports, once every weight was read, divided by the size of the file.
Goals: load at most 1.10 of bare and 0.6 of timm; no requests; at most 1.1 of the file in memory. The export
of a file of the official layout (v2, 369 MB) at most 3 s longer than torch needs to read it.
"""

import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Annotated, Any

import safetensors
import timm
import torch
import tyro
from machine import machine
from safetensors.torch import load_file

import mocohub
from mocohub.backbones import BACKBONES
from mocohub.files import read_json
from mocohub.hub.export import export
from mocohub.hub.resnets import torchvision_name

COMMIT, REPOSITORY = "0" * 40, "lab/model"


def write_official(path: Path, shape: str, *, whole: bool) -> None:
    """Write a checkpoint of the official layout; `whole` with key encoder, queue, head and momentum."""
    spec = BACKBONES[shape]
    model = timm.create_model(spec.architecture, num_classes=0, **spec.model_args)
    names = {name: torchvision_name(name) for name in model.state_dict()}
    tensors = {f"module.encoder_q.{names[name]}": t for name, t in model.state_dict().items()}
    tensors |= {"module.encoder_q.fc.weight": torch.zeros(128, model.num_features)}
    optimizer: dict[int, Any] = {}
    if whole:
        head = {"fc.0.weight": torch.zeros(2048, 2048), "fc.2.weight": torch.zeros(128, 2048)}
        tensors.pop("module.encoder_q.fc.weight")
        tensors |= {f"module.encoder_q.{name}": t for name, t in head.items()}
        tensors |= {name.replace("_q", "_k"): t.clone() for name, t in tensors.items()}
        tensors["module.queue"] = torch.zeros(128, 65536)
        trained = [*model.parameters(), *head.values()]
        optimizer = {i: {"momentum_buffer": torch.zeros_like(t)} for i, t in enumerate(trained)}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": tensors, "optimizer": optimizer}, path)


def put_into_cache(folder: Path, hub_cache: Path) -> None:
    """Lay an exported folder out as the Hub's client does after a download."""
    home = hub_cache / f"models--{REPOSITORY.replace('/', '--')}"
    (home / "blobs").mkdir(parents=True)
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            blob = read_json(folder / "mocohub.json")["sha256"][file.name]
        else:
            content = file.read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        shutil.copy(file, home / "blobs" / blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob}")


def bare(folder: Path) -> torch.nn.Module:
    """The least that gives the model: nothing is checked."""
    config = read_json(folder / "config.json")
    model = timm.create_model(config["architecture"], num_classes=0, device="meta", **config["model_args"])
    model.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    return model.eval()


def loaders(folder: Path) -> dict[str, Callable[[], torch.nn.Module]]:
    """The ways to load, by name."""
    return {
        "bare": lambda: bare(folder),
        "mocohub.load, folder": lambda: mocohub.load(folder),
        "mocohub.load, commit in the cache": lambda: mocohub.load(REPOSITORY, revision=COMMIT),
        "timm.create_model": lambda: timm.create_model(f"local-dir:{folder}", pretrained=True).eval(),
    }


def measure_seconds(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, after two to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in loaders(folder)}
    for round_ in range(rounds + 2):
        for name, run in loaders(folder).items():
            start = time.perf_counter()
            model = run()
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - start)
            del model
    return seconds


def measure_bytes(folder: Path, name: str) -> int:
    """The most bytes held while loading one way and reading every weight, less what was held before."""
    warm = timm.create_model("resnet18", num_classes=0, device="meta")  # what the first model imports
    mocohub.load("moco_tiny_cifar10"), warm.eval()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    model = loaders(folder)[name]()
    sum(parameter.detach().view(-1)[::512].sum() for parameter in model.parameters())
    return _status("VmHWM") - before


def _status(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


class Counter(BaseHTTPRequestHandler):
    """Answers nothing, and counts."""

    requests: list[str] = []

    def do_GET(self) -> None:
        """Count one request."""
        self.requests.append(self.path)
        self.send_error(503)

    do_HEAD = do_GET


def main(
    shapes: Annotated[tuple[str, ...], tyro.conf.arg(help="Backbones.")] = ("r50", "r50w4x"),
    rounds: Annotated[int, tyro.conf.arg(help="Measured rounds, after two to warm up.")] = 9,
    conversion: Annotated[bool, tyro.conf.arg(help="Measure the conversion as well.")] = True,
    worker: Annotated[str | None, tyro.conf.arg(help="Used by the script itself.")] = None,
) -> None:
    """Print seconds, ratios, requests and memory, and what the conversion of the authors' file costs."""
    torch.set_num_threads(1)
    if worker:
        folder, way = json.loads(worker)
        found = measure_bytes(Path(folder), way) if way else measure_seconds(Path(folder), rounds)
        print(json.dumps(found))
        return
    print(f"{machine()}, safetensors {safetensors.__version__}; {rounds} rounds")
    server = HTTPServer(("127.0.0.1", 0), Counter)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["MOCOHUB_CACHE"] = str(root / "mocohub")
        for shape in shapes:
            write_official(root / "small.pth.tar", shape, whole=False)
            folder = export(root / "small.pth.tar", root / shape, license="other")
            put_into_cache(folder, root / f"{shape}-hub")
            environment = {
                **os.environ,
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
                "HF_HUB_CACHE": str(root / f"{shape}-hub"),
            }
            environment.pop("HF_HUB_OFFLINE", None)

            def run(way: str, folder: Path = folder, environment: dict[str, str] = environment) -> Any:
                worker = json.dumps([str(folder), way])
                command = [sys.executable, __file__, "--rounds", str(rounds), "--worker", worker]
                return json.loads(
                    subprocess.run(command, env=environment, check=True, capture_output=True).stdout
                )

            report(shape, (folder / "model.safetensors").stat().st_size, run)
            shutil.rmtree(folder)
            shutil.rmtree(root / f"{shape}-hub")
        if conversion:
            report_conversion(root, rounds)
    server.shutdown()


def report(shape: str, size: int, run: Callable[[str], Any]) -> None:
    """Print the table of one shape; `run` measures one way's memory, or with "" all ways' seconds."""
    Counter.requests.clear()
    seconds = run("")
    print(f"\n{shape}, {size / 1e6:.0f} MB; {len(Counter.requests)} requests")
    print(f"{'':<36}{'seconds, median (min to max)':<32}{'of bare':>8}{'of timm':>9}{'memory':>8}")
    for name, found in seconds.items():
        spread = f"{statistics.median(found):.4f} ({min(found):.4f} to {max(found):.4f})"
        ratios = [
            statistics.median(a / b for a, b in zip(found, seconds[other], strict=True))
            for other in ("bare", "timm.create_model")
        ]
        print(f"{name:<36}{spread:<32}{ratios[0]:>8.2f}{ratios[1]:>9.2f}{run(name) / size:>8.2f}")


def report_conversion(root: Path, rounds: int) -> None:
    """Print seconds of torch's reading of an official file, and of its export."""
    file = root / "moco_v2_800ep_pretrain.pth.tar"
    write_official(file, "r50", whole=True)
    reads, exports = [], []
    for _ in range(min(rounds, 5)):
        start = time.perf_counter()
        torch.load(file, weights_only=True)
        reads.append(time.perf_counter() - start)
        export(file, root / "converted", license="other")
        exports.append(time.perf_counter() - start - reads[-1])
        shutil.rmtree(root / "converted")
    read, converted = statistics.median(reads), statistics.median(exports)
    print(f"\nofficial file, {file.stat().st_size / 1e6:.0f} MB: torch reads it in {read:.2f} s, ", end="")
    print(f"its export takes {converted:.2f} s, {converted - read:.2f} s more")


if __name__ == "__main__":
    tyro.cli(main)
