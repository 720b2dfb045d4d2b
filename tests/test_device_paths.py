"""What runs on a card, on one that is not there: nothing mixes devices or is read before it has arrived."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.images import write_images
from helpers.pretend_card import CardTensor, pretend_card
from helpers.recipes import smallest
from safetensors.torch import load_file
from torch import nn

from mocohub import distributed
from mocohub.backbones import create_backbone, pretrained_cfg
from mocohub.evaluation.guard import Guard
from mocohub.evaluation.linear import linear_protocol
from mocohub.evaluation.protocols import protocol_by_name
from mocohub.features import job
from mocohub.features.extract import extract
from mocohub.features.inputs import Inputs
from mocohub.features.network import FrozenNetwork
from mocohub.features.precision import without_tf32
from mocohub.features.projection import Projection
from mocohub.pretrain import checkpoint, loop
from mocohub.pretrain.augment import Crops
from mocohub.pretrain.build import autocast_dtype, build
from mocohub.pretrain.data import Batch
from mocohub.pretrain.moco import _Unread
from mocohub.probes.heads import train_heads
from mocohub.probes.health import health
from mocohub.probes.knn import KNNProbe, knn_grid
from mocohub.probes.linear import LinearProbe
from mocohub.probes.logistic import logistic_path
from mocohub.probes.lowshot import low_shot
from mocohub.probes.neighbors import exact_products, nearest
from mocohub.probes.retrieval import retrieval

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a real card: see test_on_a_card.py"
)

RANDOM = np.random.default_rng(0)
Y = RANDOM.integers(0, 5, 300)
X = np.float32(RANDOM.normal(size=(300, 24)) + 2 * np.eye(5, 24)[Y])
PROTOCOL = protocol_by_name("moco", epochs=2, global_batch_size=4)


@pytest.fixture
def card():
    with pretend_card():
        yield torch.device("cuda")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_images(tmp_path_factory.mktemp("photos"), {"ape": 6, "bee": 5}, size_px=24)
    (folder / "bee" / "broken.png").write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = create_backbone("r18tiny", layers=[1, 1, 1, 1], stem_chs=4, channels=[4, 8, 8, 8])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    model.pretrained_cfg |= pretrained_cfg(
        "r18tiny", crop_px=16, crop_pct=0.8, mean=(0.5,) * 3, std=(0.2,) * 3
    )
    return model.eval()


def test_the_card_that_is_not_there_refuses_what_a_card_refuses(card):
    x = torch.arange(3.0, device=card)
    assert x.is_cuda and x.device == torch.device("cuda:0") and (x + 1).tolist() == [1, 2, 3]
    with pytest.raises(RuntimeError, match="on the same device"):
        x + torch.ones(3)
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        np.asarray(x)
    with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
        x.normal_(generator=torch.Generator())
    host = x.to("cpu", non_blocking=True)
    assert host.isnan().all()
    torch.cuda.synchronize()
    assert host.tolist() == [0, 1, 2]


# --- probes -----------------------------------------------------------------------------------------------


def products(bank: np.ndarray, queries: np.ndarray | None, rows: np.ndarray, metric: str) -> np.ndarray:
    """The products of queries (n, D) and the rows (n, k) of the bank that were found for them, in float64."""
    bank = np.float64(bank)
    queries = bank if queries is None else np.float64(queries)
    if metric == "cosine":
        bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    return np.einsum("nd,nkd->nk", queries, bank[rows])


@pytest.mark.parametrize("k", [1, 20, 299])
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nearest_on_a_card_finds_the_rows_that_it_finds_on_a_cpu(card, k, metric, dtype):
    bank = X.astype(dtype)
    for queries in (X[:50] + 0.1, None):
        expected = nearest(bank, queries, k, metric=metric, device="cpu")
        for given in (bank, torch.from_numpy(bank).to(card)):
            found = nearest(given, queries, k, metric=metric, device=card)
            np.testing.assert_allclose(found.similarities, expected.similarities, rtol=1e-5, atol=1e-5)
            same = found.indices == expected.indices  # but for products that differ by their rounding
            assert same.mean() > 0.999
            np.testing.assert_allclose(
                products(bank, queries, found.indices, metric), found.similarities, rtol=1e-5, atol=1e-5
            )


def test_probes_take_tensors_that_are_on_a_card(card):
    features, labels = torch.from_numpy(X).to(card), torch.from_numpy(Y).to(card)
    assert nearest(X, features, 2).indices[:, 0].tolist() == list(range(300))
    assert KNNProbe(5).fit(features, labels).score(features, labels) == KNNProbe(5).fit(X, Y).score(X, Y)
    assert health(features, labels).effective_rank == health(X, Y).effective_rank
    found, expected = retrieval(features, labels), retrieval(X, Y, device="cpu")
    assert found.mean_average_precision == pytest.approx(expected.mean_average_precision, abs=1e-6)
    for device in ("cpu", "cuda"):
        heads = train_heads(features, labels, base_lr=0.1, epochs=2, device=device)
        assert heads.accuracy(features, labels) > 0.5
        (fit,) = logistic_path(features, labels, [1.0], device=device)
        assert fit.coef.device.type == "cpu" and fit.converged


def test_a_grid_of_neighbours_and_a_ranking_are_those_of_a_cpu(card):
    found, expected = (knn_grid(X, Y, leave_one_out=True, ks=[3], device=d) for d in ("cuda", "cpu"))
    assert [cell.top1 for cell in found] == [cell.top1 for cell in expected]
    ignored = [[i] for i in range(50)]
    found, expected = (
        retrieval(X[:50], Y[:50], X, Y, ignored=ignored, device=d).average_precisions for d in ("cuda", "cpu")
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("free_bytes", [8 << 30, 1000], ids=["kept on the card", "sent batch by batch"])
@pytest.mark.parametrize("memory_bytes", [8 << 30, 1000], ids=["shuffled", "in windows"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_heads_on_a_card_are_trained_as_on_a_cpu(free_bytes, memory_bytes, precision):
    settings = {
        "precision": precision,
        "base_lr": [0.1, 1.0],
        "weight_decay": [0, 1e-4],
        "epochs": 3,
        "window_rows": 64,
    }
    with pretend_card(free_bytes):
        on_card = train_heads(X, Y, device="cuda", memory_bytes=memory_bytes, **settings)
        assert isinstance(on_card.weight, CardTensor)
        # What fits on the card is shuffled as a whole, whatever the host has room for.
        in_memory = 8 << 30 if free_bytes > 1000 else memory_bytes
        on_cpu = train_heads(X, Y, device="cpu", memory_bytes=in_memory, **settings)
        torch.testing.assert_close(on_card.weight.cpu(), on_cpu.weight, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(on_card.accuracy(X, Y), on_cpu.accuracy(X, Y))


@pytest.mark.parametrize("num_classes", [2, 5])
def test_logistic_regression_on_a_card_is_that_of_a_cpu(card, num_classes):
    on_card, on_cpu = (logistic_path(X, Y % num_classes, [0.1, 10.0], device=d) for d in ("cuda", "cpu"))
    for a, b in zip(on_card, on_cpu, strict=True):
        assert a.objective == pytest.approx(b.objective, rel=1e-6) and a.num_iter == b.num_iter
        torch.testing.assert_close(a.coef, b.coef, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ["sgd", "lbfgs"])
def test_a_grid_of_linear_probes_on_a_card_classifies(card, solver):
    probe = LinearProbe(solver, base_lr=[0.1, 1.0], epochs=2, C=[0.1, 1.0], device="cuda").fit(X, Y)
    assert len(probe.validation_scores_) == 2 and probe.score(X, Y) > 0.5


def test_few_labels_on_a_card_are_those_of_a_cpu(card):
    on_card, on_cpu = (low_shot(X, Y, X, Y, shots=(1, 2), draws=3, device=d) for d in ("cuda", "cpu"))
    for a, b in zip(on_card, on_cpu, strict=True):
        np.testing.assert_allclose(
            a.accuracies, b.accuracies, atol=0.01
        )  # 300 images, several near a boundary


# --- extraction -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flip": True, "crops": 5},
        {"layers": ["stage2", "stage4:gem"]},
        {"layers": ["stage3"], "pool": "none"},
        {"normalize": True, "output_dtype": "float16"},
    ],
    ids=lambda options: ", ".join(options) or "embedding",
)
def test_features_from_a_card_are_those_of_a_cpu(card, photos, model, options):
    run = {"batch_size": 3, "num_workers": 1, "progress": False, "dtype": "float32", **options}
    on_card, on_cpu = (extract(model, photos, device=d, **run) for d in ("cuda", "cpu"))
    assert on_card.meta["computation"]["device"] == "cuda"
    assert on_card.errors == on_cpu.errors and len(on_card) == 11
    for column in on_cpu.columns:
        np.testing.assert_allclose(on_card[column], on_cpu[column], rtol=1e-5, atol=1e-6)
    assert next(model.parameters()).device.type == "cpu"  # where it was


def test_a_folder_of_projected_features_is_written_from_a_card(card, photos, model, tmp_path):
    run = {"batch_size": 3, "num_workers": 0, "progress": False, "dtype": "float32"}
    plain = extract(model, photos, device="cpu", **run)
    projection = Projection.fit(plain, 4)
    found = extract(model, photos, out=tmp_path / "features", device="cuda", projection=projection, **run)
    np.testing.assert_allclose(found.values, projection(plain.values), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_chosen_on_a_card_that_has_it(card, photos, model):
    run = {"num_workers": 0, "progress": False}
    on_card, exact = extract(model, photos, device="cuda", **run), extract(model, photos, device="cpu", **run)
    assert on_card.meta["computation"]["dtype"] == "bfloat16"
    cosines = (on_card.values * exact.values).sum(1)
    cosines /= np.linalg.norm(on_card.values, axis=1) * np.linalg.norm(exact.values, axis=1)
    assert 0.999 < cosines.min() and on_card.values.dtype == np.float32


def test_rows_are_garbage_until_they_are_waited_for_and_two_batches_do_not_mix(card, model):
    batches = torch.randn(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with FrozenNetwork(model, device="cpu", dtype="float32") as network:
        expected = [network(pixels)["embedding"] for pixels in batches]
    with FrozenNetwork(model, device=card, dtype="float32") as network:
        waits = [network.begin(pixels) for pixels in batches]
        for wait, rows in zip(waits, expected, strict=True):
            torch.testing.assert_close(wait()["embedding"], rows, rtol=1e-5, atol=1e-6)


def test_images_and_models_may_be_on_a_card_already(card):
    images = torch.rand(4, 3, 8, 8, device=card)
    assert Inputs(images)[0].pixels.device.type == "cpu"  # or a loader could neither join nor pin them
    network = timm.create_model("test_resnet", num_classes=0).to(card)
    found = extract(network, images, num_workers=0, progress=False)
    assert len(found) == 4 and found.meta["computation"]["device"] == "cuda"
    assert next(network.parameters()).is_cuda


def test_under_torchrun_cuda_is_the_card_of_the_process(monkeypatch, model):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(job, "choose_device", lambda device, model: device)
    monkeypatch.setenv("LOCAL_RANK", "5")
    for given, alone, expected in (
        (None, False, "cuda:1"),
        ("cuda", False, "cuda:1"),
        (torch.device("cuda"), False, "cuda:1"),
        ("cuda:0", False, "cuda:0"),
        ("cpu", False, "cpu"),
        ("cuda", True, "cuda"),
    ):
        assert job._device(given, model, alone=alone) == expected


class Huge(nn.Module):
    """Takes more memory than there is."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB. GPU 0 has 80 GiB.")


def test_a_batch_for_which_a_card_has_no_room_is_named():
    expected = (
        "^2 images of 3 x 8 x 8 at a time are too many for cpu: CUDA out of memory. Lower the batch size.$"
    )
    with FrozenNetwork(Huge(), device="cpu") as network, pytest.raises(RuntimeError, match=expected):
        network(torch.zeros(2, 3, 8, 8))


# --- the linear protocol ----------------------------------------------------------------------------------


def test_the_linear_protocol_on_a_card_is_that_of_a_cpu_and_resumes(card, photos, model, tmp_path):
    run = {"protocol": PROTOCOL, "precision": "float32", "num_workers": 0}
    found = {
        device: linear_protocol(model, photos, photos, out=tmp_path / device, device=device, **run)
        for device in ("cuda", "cpu")
    }
    assert found["cuda"].num_train_unreadable == found["cuda"].num_val_unreadable == 1
    assert found["cuda"].heads == found["cpu"].heads and found["cuda"].best == found["cpu"].best
    files = [tmp_path / device / "classifier" / "classifier.safetensors" for device in found]
    for name, weights in load_file(files[1]).items():
        torch.testing.assert_close(load_file(files[0])[name], weights, rtol=1e-5, atol=1e-6)
    (tmp_path / "cuda" / "results.json").unlink()
    (tmp_path / "cuda" / "checkpoints" / "step-00000006" / "state.json").unlink()
    again = linear_protocol(model, photos, photos, out=tmp_path / "cuda", device="cuda", resume="auto", **run)
    assert again == found["cuda"]


def test_the_guard_sees_a_bit_on_a_card(card):
    norm = nn.BatchNorm2d(3).to(card)
    guard = Guard({"": norm})
    guard.check()
    with torch.no_grad():
        norm.running_var[1] += 1e-6
    with pytest.raises(RuntimeError, match="running_var has changed"):
        guard.check()


# --- training ---------------------------------------------------------------------------------------------


def some_batches(count: int) -> list[Batch]:
    fields = {field: None for field in Batch._fields}
    return [
        Batch(**fields | {"ids": torch.tensor([i]), "x_q": Crops(torch.full((1, 3, 2, 2), i), None)})
        for i in range(count)
    ]


def test_batches_arrive_on_the_card_in_their_order(card):
    moved = list(loop._on(card, some_batches(3)))
    assert [batch.ids.tolist() for batch in moved] == [[0], [1], [2]]
    assert all(batch.x_q.pixels.is_cuda and batch.x_k is None for batch in moved)


@pytest.mark.parametrize("mechanism", ["queue", "end_to_end", "memory_bank"])
def test_what_is_trained_lives_on_the_card_and_is_saved_from_there(card, mechanism):
    recipe = dataclasses.replace(smallest(), mechanism=mechanism)
    on_cpu, on_card = (build(recipe, torch.device(d), num_images=9) for d in ("cpu", "cuda"))
    assert all(value.is_cuda for value in on_card.state_tensors().values())
    saved = checkpoint._host_copy(on_card.state_tensors())
    assert saved.keys() == on_cpu.state_tensors().keys()
    assert all(saved[name].equal(value) for name, value in on_cpu.state_tensors().items())
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=generator)
    crops = Crops(pixels, torch.zeros(8, 11))
    with torch.no_grad():
        found = on_card._embed(on_card.query, Crops(*(part.to(card) for part in crops)))
        torch.testing.assert_close(found.cpu(), on_cpu._embed(on_cpu.query, crops), rtol=1e-4, atol=1e-5)


def test_keys_enter_the_queue_on_the_card_only_if_the_step_was_accepted(card):
    moco = build(smallest(), card)
    before, keys = moco.queue.embeddings.clone(), torch.ones(8, moco.queue.embeddings.shape[1], device=card)
    moco.queue.enqueue(keys, torch.tensor(False, device=card))
    assert moco.queue.embeddings.equal(before)
    moco.queue.enqueue(keys, torch.tensor(True, device=card))
    assert moco.queue.embeddings[8:].equal(keys)


@pytest.mark.parametrize("rejected", [0.0, 1.0])
def test_the_report_of_a_step_is_read_once_it_has_arrived(card, rejected):
    unread = _Unread(torch.tensor([1.5, 0.5, rejected], device=card))
    if not rejected:
        return unread.raise_if_rejected()
    with pytest.raises(FloatingPointError, match="not finite"):
        unread.raise_if_rejected()


def test_rows_are_reordered_on_the_card_by_an_index_of_the_host(card):
    rows, order = torch.arange(6, device=card).view(3, 2), torch.tensor([2, 0, 1])
    assert distributed.exchange_rows(rows, order).tolist() == [[4, 5], [0, 1], [2, 3]]


def test_a_card_that_only_emulates_bfloat16_trains_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert autocast_dtype("auto", torch.device("cuda")) is None


def test_processes_without_a_card_of_their_own_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="Process 2 of this machine.*sees 2.*--nproc-per-node=2"):
        with distributed.process_group("cuda"):
            pass


# --- digits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("reduced", [(True, True), (False, True), (False, False)])
def test_products_are_exact_whatever_was_set_and_that_is_put_back(precision, reduced):
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv

    def state() -> list:
        cublas = torch._C._get_cublas_allow_fp16_reduced_precision_reduction()
        return [matmul.fp32_precision, conv.fp32_precision, cublas, matmul.allow_fp16_accumulation]

    def put(values: list) -> None:
        matmul.fp32_precision, conv.fp32_precision = values[:2]
        matmul.allow_fp16_reduced_precision_reduction, matmul.allow_fp16_accumulation = values[2:]

    before = state()
    try:
        put([precision, precision, reduced, True])
        with exact_products():
            assert state() == ["ieee", precision, (False, True), False]
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        with without_tf32(torch.device("cuda")):
            assert state() == ["ieee", "ieee", reduced, True]
        assert state() == [precision, precision, reduced, True]
    finally:
        put(before)


def numbers_of_probes() -> list[np.ndarray]:
    """What each probe that multiplies matrices by itself gives."""
    heads = train_heads(X, Y, base_lr=0.1, epochs=2)
    fits = logistic_path(X, Y, [0.1, 10.0])
    return [
        heads.weight.numpy(),
        heads.accuracy(X, Y),
        *itertools.chain.from_iterable((fit.coef.numpy(), fit.intercept.numpy()) for fit in fits),
        retrieval(X, Y, device="cpu").average_precisions,
        nearest(X, None, 5).similarities,
    ]


def test_probes_compute_in_float32_though_fewer_digits_were_allowed_for_products():
    expected = numbers_of_probes()
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # what a card does with "tf32"
        found = numbers_of_probes()
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
