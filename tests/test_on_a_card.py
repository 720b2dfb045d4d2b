"""What only a CUDA card can show; all of it takes less than a minute: `pytest -m cuda`.

That the same code runs at all is shown on every machine, by test_device_paths.py.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.images import write_images
from helpers.recipes import smallest
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from mocohub.evaluation.guard import Guard
from mocohub.evaluation.linear import linear_protocol
from mocohub.evaluation.protocols import protocol_by_name
from mocohub.features.extract import extract
from mocohub.features.network import FrozenNetwork
from mocohub.pretrain.loop import train
from mocohub.probes.heads import train_heads
from mocohub.probes.linear import LinearProbe
from mocohub.probes.logistic import logistic_path
from mocohub.probes.neighbors import nearest
from mocohub.probes.retrieval import retrieval

pytestmark = pytest.mark.cuda

RANDOM = np.random.default_rng(0)
Y = RANDOM.integers(0, 10, 3000)
X = np.float32(RANDOM.normal(size=(3000, 64)) + 2 * np.eye(10, 64)[Y])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("photos"), {"ape": 12, "bee": 11}, size_px=80)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=0).eval()
    network.pretrained_cfg["input_size"] = (3, 64, 64)
    return network


@pytest.fixture(scope="module")
def exact(model: nn.Module, photos: Path) -> np.ndarray:
    """Features in float32 on the CPU."""
    return extract(model, photos, device="cpu", dtype="float32", num_workers=0, progress=False).values


def errors(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Length of the difference of each row / its length."""
    return np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)


# --- extraction -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("tf32", [False, True])
def test_float32_features_are_those_of_a_cpu_though_tf32_is_allowed(model, photos, exact, num_workers, tf32):
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        run = {"num_workers": num_workers, "batch_size": 4, "progress": False}
        found = extract(model, photos, device="cuda", dtype="float32", **run)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert errors(found.values, exact).max() <= 1e-5


def test_bfloat16_features_point_where_those_of_float32_do(model, photos, exact):
    run = {"num_workers": 0, "batch_size": 4, "progress": False}
    found = extract(model, photos, device="cuda", dtype="bfloat16", **run).values
    cosines = F.cosine_similarity(torch.from_numpy(found), torch.from_numpy(exact))
    assert cosines.min() >= 0.999


def test_a_compiled_network_gives_the_same_features_batch_after_batch():
    model = timm.create_model("test_resnet", num_classes=0)
    batches = torch.randn(3, 4, 3, 64, 64)
    with FrozenNetwork(model, device="cuda", dtype="float32") as eager:
        expected = [eager(pixels)["embedding"].numpy() for pixels in batches]
    with FrozenNetwork(model, device="cuda", dtype="float32", compile=True) as compiled:
        waits = [compiled.begin(pixels) for pixels in batches]  # no output is written over by the next
        for wait, rows in zip(waits, expected, strict=True):
            assert errors(wait()["embedding"].numpy(), rows).max() <= 1e-5


def test_batches_that_are_begun_do_not_mix_and_begin_without_waiting(model):
    layout = torch.channels_last  # that of the loader
    batches = [torch.randn(16, 3, 64, 64).contiguous(memory_format=layout).pin_memory() for _ in range(6)]
    with FrozenNetwork(model, device="cuda", dtype="float32") as network:
        expected = [network(pixels)["embedding"] for pixels in batches]
        torch.cuda.set_sync_debug_mode("error")
        try:
            waits = [network.begin(pixels) for pixels in batches]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for wait, rows in zip(waits, expected, strict=True):
            assert errors(wait()["embedding"].numpy(), rows.numpy()).max() <= 1e-5


def test_memory_of_a_card_does_not_grow_with_the_number_of_images(model):
    peaks = []
    for num_images in (64, 512):
        images = list(torch.randn(num_images, 3, 64, 64))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        extract(model, images, device="cuda", dtype="float32", batch_size=16, progress=False)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.05 * peaks[0]


def test_a_batch_without_room_on_the_card_is_named():
    class Greedy(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.empty(1 << 42, device=images.device)

    with FrozenNetwork(Greedy(), device="cuda") as network:
        with pytest.raises(RuntimeError, match="2 images of 3 x 8 x 8.*out of memory.*Lower the batch size"):
            network(torch.zeros(2, 3, 8, 8))


def test_images_on_a_card_are_taken_from_there(model):
    images = torch.randn(5, 3, 64, 64)
    run = {"dtype": "float32", "progress": False}
    on_card, on_cpu = (extract(model, given, device="cuda", **run) for given in (images.cuda(), images))
    np.testing.assert_array_equal(on_card.values, on_cpu.values)


# --- probes -----------------------------------------------------------------------------------------------


def best_cosines(bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and cosines in float64, by sorting all of them."""
    bank, queries = (
        np.float64(x) / np.linalg.norm(np.float64(x), axis=1, keepdims=True) for x in (bank, queries)
    )
    cosines = queries @ bank.T
    rows = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return rows, cosines


@pytest.mark.parametrize("width", [37, 512, 4096])
@pytest.mark.parametrize("spread", [1.0, 1e-3], ids=["everywhere", "around one direction"])
@pytest.mark.parametrize("k", [1, 200])
def test_neighbours_are_those_of_float64_but_for_equals(width, spread, k):
    random = np.random.default_rng(1)
    values = np.float32((spread < 1) + spread * random.standard_normal((6000, width)))
    bank, queries = values[:5000], values[5000:]
    rows, cosines = best_cosines(bank, queries, k)
    found = nearest(bank, queries, k, device="cuda")
    exact = np.take_along_axis(cosines, rows, 1)
    np.testing.assert_allclose(np.take_along_axis(cosines, found.indices, 1), exact, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.similarities, exact, rtol=0, atol=1e-6)
    if spread == 1:
        assert (found.indices == rows).mean() > 0.99


def test_neighbours_that_are_far_apart_are_the_same_rows_in_the_same_order():
    """Whole numbers, of which no two products come out nearly equal: ties are equal, and go by the row."""
    random = np.random.default_rng(2)
    bank, queries = (random.integers(-2, 3, (n, 16)).astype(np.float32) for n in (70_000, 300))
    for metric in ("dot", "cosine"):
        on_card, on_cpu = (nearest(bank, queries, 50, metric=metric, device=d) for d in ("cuda", "cpu"))
        if metric == "dot":
            np.testing.assert_array_equal(on_card.indices, on_cpu.indices)
        np.testing.assert_allclose(on_card.similarities, on_cpu.similarities, rtol=0, atol=1e-6)


def test_memory_of_a_card_does_not_grow_with_the_bank():
    class Bank:
        def __init__(self, num_rows: int) -> None:
            self.num_rows = num_rows

        def __len__(self) -> int:
            return self.num_rows

        def blocks(self):
            block = np.random.default_rng(0).standard_normal((65536, 64)).astype(np.float16)
            for start in range(0, self.num_rows, 65536):
                yield block[: self.num_rows - start]

    queries, peaks = np.random.default_rng(1).standard_normal((2000, 64)).astype(np.float32), []
    for num_rows in (4 * 65536, 16 * 65536):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        nearest(Bank(num_rows), queries, 20, device="cuda")
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.1 * peaks[0]


def test_features_that_are_all_alike_take_bounded_memory_though_all_pass_the_first_look():
    bank = np.float32(1 + 1e-6 * np.random.default_rng(0).standard_normal((65536, 64)))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    found = nearest(bank, bank[:1024], 20, device="cuda")
    assert torch.cuda.max_memory_allocated() <= 3 << 30
    np.testing.assert_allclose(found.similarities, 1, rtol=0, atol=1e-6)


def test_heads_are_trained_as_on_a_cpu():
    settings = {"base_lr": [0.01, 0.1, 1.0], "weight_decay": [0, 1e-4, 0], "epochs": 5}
    on_card, on_cpu = (train_heads(X, Y, device=d, **settings) for d in ("cuda", "cpu"))
    torch.testing.assert_close(on_card.weight.cpu(), on_cpu.weight, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(on_card.accuracy(X, Y), on_cpu.accuracy(X, Y), atol=2e-3)


@pytest.mark.parametrize("num_classes", [2, 10])
def test_logistic_regression_has_the_optimum_that_it_has_on_a_cpu(num_classes):
    Cs = [0.01, 1.0, 100.0]
    on_card, on_cpu = (logistic_path(X, Y % num_classes, Cs, device=d) for d in ("cuda", "cpu"))
    for a, b in zip(on_card, on_cpu, strict=True):
        assert a.converged and a.objective == pytest.approx(b.objective, rel=1e-4)


def test_tensors_on_a_card_are_taken_with_their_labels():
    features, labels = torch.from_numpy(X).cuda(), torch.from_numpy(Y).cuda()
    assert (
        train_heads(features, labels, base_lr=0.1, epochs=2, device="cuda").accuracy(features, labels) > 0.5
    )
    assert logistic_path(features, labels, [1.0], device="cuda")[0].converged
    assert (
        LinearProbe(base_lr=0.1, epochs=2, device="cuda").fit(features, labels).score(features, labels) > 0.5
    )


def test_a_ranking_is_that_of_a_cpu():
    on_card, on_cpu = (retrieval(X[:500], Y[:500], X, Y, device=d) for d in ("cuda", "cpu"))
    np.testing.assert_allclose(on_card.average_precisions, on_cpu.average_precisions, atol=1e-4)


# --- the linear protocol, training ------------------------------------------------------------------------


def test_the_linear_protocol_gives_what_it_gives_on_a_cpu(model, photos, tmp_path):
    protocol = protocol_by_name("moco", epochs=2, global_batch_size=8, base_lrs=(0.1,))
    run = {"protocol": protocol, "precision": "float32", "num_workers": 2}
    losses = []
    for device in ("cuda", "cpu"):
        found = linear_protocol(model, photos, photos, out=tmp_path / device, device=device, **run)
        losses.append(load_file(tmp_path / device / "classifier" / "classifier.safetensors")["fc.weight"])
        assert found.num_train == 23
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
    assert next(model.parameters()).device.type == "cpu"


def test_the_guard_sees_one_bit_on_a_card():
    norm = nn.BatchNorm2d(3).cuda().eval()
    guard = Guard({"": norm})
    norm(torch.randn(2, 3, 4, 4, device="cuda"))
    guard.check()
    norm.running_mean.view(torch.int32)[1] ^= 1
    with pytest.raises(RuntimeError, match="running_mean has changed"):
        guard.check()


@pytest.mark.parametrize("mechanism", ["queue", "end_to_end", "memory_bank"])
def test_training_ends_near_where_it_ends_on_a_cpu(tmp_path, mechanism):
    data = write_images(tmp_path / "images", {"a": 9, "b": 9})
    recipe = dataclasses.replace(smallest(epochs=1), mechanism=mechanism)
    states = []
    for device in ("cuda", "cpu"):
        options = {"precision": "float32", "num_workers": 2, "augment_on": "device", "device": device}
        run = train(recipe, data, tmp_path / device, val=data, **options)
        states.append(load_file(sorted((run / "checkpoints").iterdir())[-1] / "state.safetensors"))
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=5e-2, atol=2e-2, msg=name)  # TF32
