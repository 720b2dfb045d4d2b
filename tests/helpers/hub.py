"""Tiny runs and official checkpoints, and a read-only Hub on the loopback that serves model folders."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from mocohub.backbones import BACKBONES
from mocohub.files import sha256, write_json

# The shapes of r50 and r50w2x at a depth and width for tests: as (backbone, model_args of a recipe).
TINY_R50 = ("r50", {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]})
TINY_WIDE = ("r50w2x", {"layers": [1, 1, 1, 1], "stem_chs": 4, "channels": [16, 32, 64, 128]})


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Give a model weights and batch-norm statistics under which every tensor matters; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(seed + 100)
        elif name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim == 1:
            tensor.normal_(0, 0.1, generator=generator)
        else:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    return model.eval()


def images(px: int = 32, num_images: int = 2) -> Tensor:
    return torch.randn(num_images, 3, px, px, generator=torch.Generator().manual_seed(0))


def write_run(
    run: Path,
    backbone: str = "r18tiny",
    model_args: dict[str, Any] | None = None,
    steps: tuple[int, ...] = (20,),
) -> dict[tuple[int, str], nn.Module]:
    """Write a training run; returns the backbone of each (step, encoder) as the reference."""
    spec = BACKBONES[backbone]
    recipe = {
        "backbone": backbone,
        "model_args": model_args or {},
        "head": "mlp",
        "embed_dim": 16,
        "queue_size": 64,
        "augmentation": {"crop_scale_min": 0.2, "blur_probability": 0.5},
        "crop_px": 32,
        "eval_crop_pct": 1.0,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
        "epochs": 4,
    }
    models = {}
    for step in steps:
        tensors = {"queue": torch.zeros(64, 16)}
        for seed, encoder in enumerate(("query", "key")):
            model = timm.create_model(
                spec.architecture, num_classes=0, **{**spec.model_args, **(model_args or {})}
            )
            models[step, encoder] = randomise(model, 10 * step + seed)
            tensors |= {f"{encoder}.backbone.{name}": t for name, t in model.state_dict().items()}
            tensors[f"{encoder}.head.0.weight"] = torch.zeros(16, 16)
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "state.safetensors")
        state = {
            "format": "mocohub-checkpoint/1",
            "step": step,
            "epoch": 1,
            "recipe_name": "moco_tiny",
            "recipe": recipe,
            "num_images_seen": step * 8,
            "sha256": {"state.safetensors": sha256(folder / "state.safetensors")},
        }
        write_json(folder / "state.json", state)
    meta = {
        "format": "mocohub-run/1",
        "recipe_name": "moco_tiny",
        "recipe": recipe,
        "data": {
            "source": "/home/somebody/private/flowers",
            "num_images": 64,
            "classes": ["a", "b"],
            "paths_sha256": "0" * 64,
        },
        "versions": {"mocohub": "0.1", "torch": "2.15", "timm": "1.0.31", "python": "3.11"},
        "commit": "c0ffee",
        "started": "2026-01-02T03:04:05+00:00",
    }
    write_json(run / "run.json", meta)
    return models


class TorchvisionResNet(ResNet):
    """torchvision's ResNet-50 at any width, stem included, one block a stage: an independent reference."""

    def __init__(self, stem_chs: int, planes: tuple[int, int, int, int], dim: int = 16) -> None:
        nn.Module.__init__(self)
        self._norm_layer, self.inplanes, self.dilation, self.groups, self.base_width = (
            nn.BatchNorm2d,
            stem_chs,
            1,
            1,
            64,
        )
        self.conv1 = nn.Conv2d(3, stem_chs, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_chs)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for stage, width in enumerate(planes, start=1):
            layer = self._make_layer(Bottleneck, width, 1, stride=1 if stage == 1 else 2)
            setattr(self, f"layer{stage}", layer)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(4 * planes[-1], dim)


def write_official(
    path: Path,
    query: nn.Module,
    key: nn.Module,
    *,
    prefix: str = "module.",
    mlp: bool = False,
    zip_format: bool = True,
) -> None:
    """Save what facebookresearch/moco's main_moco.py saves at the end of an epoch."""
    dim, features = query.fc.weight.shape
    state_dict = {f"{prefix}queue": torch.zeros(dim, 64), f"{prefix}queue_ptr": torch.zeros(1).long()}
    for letter, model in (("q", query), ("k", key)):
        tensors = dict(model.state_dict())
        if mlp:
            tensors |= {f"fc.2.{name}": tensors.pop(f"fc.{name}") for name in ("weight", "bias")}
            tensors |= {"fc.0.weight": torch.zeros(features, features), "fc.0.bias": torch.zeros(features)}
        state_dict |= {f"{prefix}encoder_{letter}.{name}": t for name, t in tensors.items()}
    optimizer = {
        "state": {0: {"momentum_buffer": torch.zeros(3)}},
        "param_groups": [{"lr": 0.03, "params": [0]}],
    }
    checkpoint = {"epoch": 200, "arch": "resnet50", "state_dict": state_dict, "optimizer": optimizer}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zip_format)


class HubServer:
    """The read half of the Hub's HTTP interface, for huggingface_hub 2 without Xet.

    Use as a context manager; `endpoint` goes into HF_ENDPOINT of a fresh process, since the client reads it
    when it is imported. `requests` lists (method, path) in order of arrival.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Path]] = {}  # repository -> commit -> folder
        self.refs: dict[str, dict[str, str]] = {}  # repository -> branch or tag -> commit
        self.requests: list[tuple[str, str]] = []
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, repository: str, folder: Path, *refs: str) -> str:
        """Commit a folder to a repository, move `main` and `refs` to it, and return the commit."""
        digests = [f"{file.name} {sha256(file)}" for file in sorted(folder.iterdir())]
        commit = hashlib.sha1("\n".join(digests).encode()).hexdigest()
        self.commits.setdefault(repository, {})[commit] = folder
        self.refs.setdefault(repository, {}).update(dict.fromkeys(("main", *refs), commit))
        return commit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server_hub.requests.append((self.command, path))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not (match := api or file):
            return self._send(404, {}, b"", with_body)
        repository = match[1]
        if repository not in self.server_hub.commits:
            return self._fail("RepoNotFound", "Repository not found", with_body)
        revision = (match[3] if api else match[2]) or "main"
        commit = self.server_hub.refs[repository].get(revision, revision)
        if commit not in self.server_hub.commits[repository]:
            return self._fail("RevisionNotFound", f"Invalid rev id: {revision}", with_body)
        folder = self.server_hub.commits[repository][commit]
        if api:
            answer = self._tree(folder) if api[2] == "tree" else self._info(repository, commit, folder)
            return self._send(
                200, {"Content-Type": "application/json"}, json.dumps(answer).encode(), with_body
            )
        if not (folder / file[3]).is_file():
            return self._fail("EntryNotFound", "Entry not found", with_body, {"X-Repo-Commit": commit})
        body = (folder / file[3]).read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(file[3], body)}"'}
        if _is_lfs(file[3]):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(body))}
        self._send(200, headers, body, with_body)

    def _info(self, repository: str, commit: str, folder: Path) -> dict[str, Any]:
        time = "2026-01-01T00:00:00.000Z"
        return {
            "id": repository,
            "sha": commit,
            "lastModified": time,
            "createdAt": time,
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": file.name} for file in folder.iterdir()],
        }

    def _tree(self, folder: Path) -> list[dict[str, Any]]:
        entries = []
        for file in sorted(folder.iterdir()):
            body = file.read_bytes()
            entry = {"type": "file", "path": file.name, "oid": _git_sha1(body), "size": len(body)}
            if _is_lfs(file.name):
                oid = hashlib.sha256(body).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(body), "pointerSize": 134}
            entries.append(entry)
        return entries

    def _fail(self, code: str, message: str, with_body: bool, headers: dict[str, str] | None = None) -> None:
        body = json.dumps({"error": message}).encode()
        self._send(
            404, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}, body, with_body
        )

    def _send(self, status: int, headers: dict[str, str], body: bytes, with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _is_lfs(name: str) -> bool:
    return name.endswith(".safetensors")


def _git_sha1(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _etag(name: str, body: bytes) -> str:
    return hashlib.sha256(body).hexdigest() if _is_lfs(name) else _git_sha1(body)
