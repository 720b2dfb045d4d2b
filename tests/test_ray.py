"""The launcher for Ray, on a cluster of this machine that the tests start and stop."""

import os
import signal
import sys
import time

import pytest
import torch
from torch import nn
from torchvision import transforms

from mocohub.cli.features import extract as verb
from mocohub.features.extract import extract
from mocohub.features.ray import _absolute, _room, extract_on_ray
from mocohub.files import read_json
from tests.helpers.images import write_images


class Colours(nn.Module):
    """Mean and variance of each channel; the first process that computes kills itself, if there is a file."""

    def __init__(self, deadly=None, seconds=0.0, error=None):
        super().__init__()
        self.deadly, self.seconds, self.error = deadly, seconds, error

    def forward(self, x):
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        if self.deadly and len(x) == 3:  # a batch, not the sample
            try:
                os.unlink(self.deadly)
            except FileNotFoundError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return torch.cat([x.mean((2, 3)), x.var((2, 3))], 1)


OPTIONS = {
    "batch_size": 3,
    "rows_per_shard": 6,
    "num_workers": 0,
    "transform": transforms.ToTensor(),
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two workers, whose servers listen on 127.0.0.1 only; stopped by its fixture."""
    # Both are read when Ray is imported: the first one has it stay on the loopback device, as on macOS.
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    assert ray.get_runtime_context().gcs_address.startswith("127.0.0.1:")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    yield ray
    ray.shutdown()


@pytest.fixture
def photos(tmp_path):
    folder = write_images(tmp_path / "photos", {"cat": 13, "dog": 10}, size_px=8)
    (folder / "cat/0007.png").write_bytes(b"no image")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_workers_on_ray_leave_the_bytes_of_one_process_though_one_of_them_is_killed(
    cluster, photos, tmp_path
):
    extract(Colours(), photos, out=tmp_path / "alone", progress=False, **OPTIONS)
    deadly = tmp_path / "deadly"
    deadly.touch()
    out = tmp_path / "on_ray"
    model = Colours(str(deadly), seconds=0.05)
    features = extract_on_ray(model, photos, out=out, ray_workers=2, ray_cpus=1, progress=False, **OPTIONS)
    assert not deadly.exists()  # a worker has died of it
    assert len(features) == 22 and [error["path"] for error in features.errors] == ["cat/0007.png"]
    assert contents(out) == contents(tmp_path / "alone")
    again = extract_on_ray(Colours(), photos, out=out, progress=False, format="npy", **OPTIONS)
    assert len(again) == 22 and (out / "img_emb").is_dir()


def test_what_a_worker_raises_comes_back_and_what_is_wrong_before_starts_none(cluster, photos, tmp_path):
    class Broken(Colours):
        pass

    with pytest.raises(RuntimeError, match="^out of colours$"):
        extract_on_ray(
            Broken(error=RuntimeError("out of colours")), photos, out=tmp_path / "x", ray_cpus=1, **OPTIONS
        )
    extract(Colours(), photos, out=tmp_path / "y", shard="0/2", progress=False, **OPTIONS)
    with pytest.raises(ValueError, match="batch_size: 3 there, 4 here"):
        extract_on_ray(Colours(), photos, out=tmp_path / "y", **{**OPTIONS, "batch_size": 4})
    with pytest.raises(ValueError, match="ray_cpus is 99 for a worker, but no machine .* has more than 2"):
        extract_on_ray(Colours(), photos, out=tmp_path / "y", ray_cpus=99, **OPTIONS)


def machine(cpus, gpus=0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}}


@pytest.mark.parametrize(
    ("nodes", "given", "expected"),
    [
        ([machine(16)] * 4, (None, None, None), (4, 0, 16)),
        ([machine(96, 8), machine(96, 8)], (None, None, None), (16, 1, 12)),
        ([machine(96, 8), machine(96, 8, alive=False)], (None, 0.5, None), (16, 0.5, 6)),
        ([machine(16)] * 4, (1, None, None), (1, 0, 16)),
        ([machine(2)], (8, 0, None), (8, 0, 1)),
        ([machine(8, 1), machine(32)], (3, None, 2), (3, 1, 2)),
    ],
)
def test_workers_share_the_cards_and_cores_of_the_cluster(nodes, given, expected):
    num_workers, gpus, cpus = expected
    assert _room(nodes, *given) == (num_workers, {"num_gpus": gpus, "num_cpus": cpus})


def test_more_cards_than_a_machine_has_are_refused():
    with pytest.raises(
        ValueError, match="ray_gpus is 2 for a worker, but no machine .* has more than 1. Give"
    ):
        _room([machine(8, 1)] * 2, None, 2, None)


def test_paths_are_those_of_every_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert _absolute("model", must_exist=True) == str(tmp_path / "model")
    assert _absolute("moco_tiny_cifar10", must_exist=True) == "moco_tiny_cifar10"
    assert _absolute(["a.tar", "s3://b/c.tar"]) == [str(tmp_path / "a.tar"), "s3://b/c.tar"]
    assert _absolute("{0..3}.tar") == str(tmp_path / "{0..3}.tar")


def test_without_ray_the_extra_is_named(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"The launcher 'ray' needs ray: pip install 'mocohub\[ray\]'"):
        extract_on_ray(Colours(), photos, out=tmp_path / "x", **OPTIONS)
    assert not (tmp_path / "x").exists()


def test_flags_that_do_not_go_together_are_refused():
    arguments = {"data": "photos", "out": "features"}
    with pytest.raises(ValueError, match="--launcher ray hands out shards by lease: omit --plan and --shard"):
        verb("model", launcher="ray", shard="0/2", **arguments)
    with pytest.raises(ValueError, match="--ray-gpus and --ray-cpus need --launcher ray"):
        verb("model", ray_workers=2, **arguments)


def test_a_cluster_that_is_not_there_is_an_error(photos, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def init(**options):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RuntimeError, match="no Ray cluster at 'auto', .*: Could not .*`ray start --head`"):
        extract_on_ray(Colours(), photos, out=tmp_path / "x", **OPTIONS)
    assert read_json(tmp_path / "x/plan.json")["num_shards"] == 4
