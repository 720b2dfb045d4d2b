import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from mocohub.probes.heads import Heads, train_heads
from mocohub.probes.minibatches import minibatches

LRS, DECAYS = [0.3, 3.0, 1.0, 0.1], [0.0, 1e-3, 0.01, 0.0]


class Blocks:
    """Features that come in pieces, once through and in order, as those of a folder do."""

    def __init__(self, X, sizes=(7, 1, 40)):
        self.X, self.sizes = X, sizes

    def blocks(self):
        row, turn = 0, 0
        while row < len(self.X):
            size = self.sizes[turn % len(self.sizes)]
            yield self.X[row : row + size]
            row, turn = row + size, turn + 1


def classes(num=150, width=6, num_classes=3, dtype=np.float64):
    rng = np.random.default_rng(0)
    y = np.arange(num) % num_classes
    return (rng.standard_normal((num, width)) + rng.standard_normal((num_classes, width))[y]).astype(dtype), y


def one_head_in_plain_torch(X, y, lr, decay, *, epochs, batch, schedule, seed):
    """nn.Linear, torch.optim.SGD, a torch scheduler and autograd."""
    generator = torch.Generator().manual_seed(seed)
    X, y = torch.tensor(X), torch.tensor(y)
    linear = nn.Linear(X.shape[1], int(y.max()) + 1, dtype=X.dtype)
    nn.init.normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.SGD(linear.parameters(), lr=lr * batch / 256, momentum=0.9, weight_decay=decay)
    if schedule == "step":
        milestones = [int(0.6 * epochs), int(0.8 * epochs)]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    else:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(X), generator=generator).split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(linear(X[rows]), y[rows]).backward()
            optimizer.step()
        scheduler.step()
    return linear


@pytest.mark.parametrize("schedule", ["step", "cosine"])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_each_of_many_heads_equals_that_head_alone_in_plain_torch(schedule, num_classes):
    X, y = classes(num_classes=num_classes)
    settings = {"epochs": 10, "schedule": schedule, "seed": 3}
    heads = train_heads(X, y, base_lr=LRS, weight_decay=DECAYS, global_batch_size=32, **settings)
    assert heads.weight.shape == (4, num_classes, 6) and heads.bias.shape == (4, num_classes)
    for head, (lr, decay) in enumerate(zip(LRS, DECAYS, strict=True)):
        alone = one_head_in_plain_torch(X, y, lr, decay, batch=32, **settings)
        torch.testing.assert_close(heads.weight[head], alone.weight.data, atol=1e-9, rtol=0)
        torch.testing.assert_close(heads.bias[head], alone.bias.data, atol=1e-9, rtol=0)
        torch.testing.assert_close(
            heads.logits(torch.tensor(X))[:, head], alone(torch.tensor(X)).detach(), atol=1e-8, rtol=0
        )


def test_one_learning_rate_or_weight_decay_serves_all_heads():
    X, y = classes()
    several = train_heads(X, y, base_lr=[1.0, 1.0], weight_decay=[0.0, 0.1], epochs=2)
    same = train_heads(X, y, base_lr=1.0, weight_decay=[0.0, 0.1], epochs=2)
    assert torch.equal(several.weight, same.weight) and len(same) == 2


def test_accuracy_is_that_of_the_largest_logit_of_each_head():
    X, y = classes()
    heads = train_heads(X, y, base_lr=LRS, epochs=3)
    expected = [
        np.mean((X @ w.numpy().T + b.numpy()).argmax(1) == y)
        for w, b in zip(heads.weight, heads.bias, strict=True)
    ]
    np.testing.assert_allclose(heads.accuracy(X, y), expected)
    np.testing.assert_allclose(heads.accuracy(Blocks(X), y), expected)
    assert len(set(expected)) > 1
    with pytest.raises(ValueError, match="150 rows of features, but 100 labels"):
        heads.accuracy(X, y[:100])
    with pytest.raises(ValueError, match="3000 rows of features, but 100 labels"):
        heads.accuracy(np.tile(X, (20, 1)), y[:100])


@pytest.mark.filterwarnings("error::UserWarning")  # torch's, when it shares memory that may not be written
def test_blocks_memory_maps_tensors_and_arrays_train_the_same_heads(tmp_path):
    X, y = classes(dtype=np.float32)
    np.save(tmp_path / "x.npy", X)
    backwards = X[::-1].copy()[::-1]
    sources = [Blocks(X), np.load(tmp_path / "x.npy", mmap_mode="r"), torch.tensor(X), backwards]
    expected = train_heads(X, y, base_lr=LRS, epochs=3, global_batch_size=32)
    for source in sources:
        heads = train_heads(source, y, base_lr=LRS, epochs=3, global_batch_size=32)
        assert torch.equal(heads.weight, expected.weight)
        np.testing.assert_array_equal(heads.accuracy(source, y), expected.accuracy(X, y))


def test_features_larger_than_memory_are_read_in_windows_that_mix_all_of_them(monkeypatch):
    # Sorted by class, as folders are: a shuffle within consecutive rows would show one class at a time.
    X, y = classes(num=20 * 64, num_classes=20, dtype=np.float32)
    order = np.argsort(y, kind="stable")
    X, y = X[order], y[order]
    seen = []
    step = Heads.step

    def noting(self, features, targets, lr_scale=1.0):
        seen.append((features.numpy().copy(), targets.numpy().copy()))
        step(self, features, targets, lr_scale)

    monkeypatch.setattr(Heads, "step", noting)
    train_heads(Blocks(X), y, base_lr=0.1, epochs=2, global_batch_size=96, memory_bytes=1000, window_rows=512)
    assert [len(targets) for _, targets in seen[:14]] == [96] * 13 + [32]
    first, second = seen[:14], seen[14:]
    for epoch in (first, second):  # every row once, with its own label
        rows = np.concatenate([features for features, _ in epoch])
        labels = np.concatenate([targets for _, targets in epoch])
        back = np.lexsort(rows.T)
        np.testing.assert_array_equal(rows[back], X[np.lexsort(X.T)])
        np.testing.assert_array_equal(labels[back], y[np.lexsort(X.T)])
    assert not np.array_equal(first[0][0], second[0][0])
    assert min(len(set(targets)) for _, targets in first[:13]) >= 8


@pytest.mark.parametrize(
    ("num", "size", "window"), [(100, 7, 32), (33, 40, 16), (1000, 64, 320), (5, 2, 500)]
)
def test_an_epoch_in_windows_yields_every_row_once_in_whole_batches(num, size, window):
    X = np.random.default_rng(0).standard_normal((num, 3))
    batches = list(minibatches(X, size, torch.Generator().manual_seed(0), window))
    numbers = np.concatenate([chosen for _, chosen in batches])
    np.testing.assert_array_equal(np.sort(numbers), np.arange(num))
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in batches]), X[numbers])
    assert [len(rows) for rows, _ in batches] == [size] * (num // size) + [num % size] * (num % size > 0)


def test_an_epoch_in_windows_holds_one_window_in_memory():
    X = np.zeros((8192, 128), np.float32)
    tracemalloc.start()
    for _ in minibatches(X, 32, torch.Generator(), 2048):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.25 * X[:2048].nbytes


def test_windows_reach_the_accuracy_of_a_full_shuffle():
    X, y = classes(num=600, num_classes=5, dtype=np.float32)
    settings = {"base_lr": [1.0, 3.0], "epochs": 10, "global_batch_size": 32}
    whole = train_heads(X, y, **settings).accuracy(X, y)
    windows = train_heads(X, y, memory_bytes=1000, window_rows=128, **settings).accuracy(X, y)
    np.testing.assert_allclose(windows, whole, atol=0.03)


def test_float16_features_are_computed_in_float32():
    X, y = classes(dtype=np.float16)
    half = train_heads(X, y, base_lr=1.0, epochs=2)
    assert half.weight.dtype == torch.float32
    assert torch.equal(half.weight, train_heads(X.astype(np.float32), y, base_lr=1.0, epochs=2).weight)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bfloat16_rounds_what_is_multiplied_and_nothing_else(dtype):
    X, y = classes(num=256, width=64, dtype=dtype)
    plain = train_heads(X, y, base_lr=LRS, weight_decay=DECAYS, epochs=1, precision="float32", seed=1)
    heads = train_heads(X, y, base_lr=LRS, weight_decay=DECAYS, epochs=1, precision="bfloat16", seed=1)
    # One step from weights W, biases 0: every number below is made as autocast and a plain SGD make it.
    generator = torch.Generator().manual_seed(1)
    weight = torch.empty(3, 64, dtype=heads.weight.dtype).normal_(std=0.01, generator=generator)
    order = torch.randperm(256, generator=generator)
    x, targets = torch.tensor(X)[order].bfloat16(), torch.tensor(y)[order]
    logits = (x.float() @ weight.bfloat16().float().T).bfloat16()  # (256, 3)
    error = logits.to(weight.dtype).softmax(1) - nn.functional.one_hot(targets, 3)
    for head, (lr, decay) in enumerate(zip(LRS, DECAYS, strict=True)):
        gradient = error.mul(lr / 256).bfloat16().double().T @ x.double()
        expected = weight - gradient.to(weight.dtype) - lr * decay * weight
        spread = (heads.weight[head] - weight).abs().max()
        torch.testing.assert_close(heads.weight[head], expected, atol=float(spread) / 100, rtol=0)
    assert heads.weight.dtype == plain.weight.dtype == torch.tensor(X).dtype
    assert not torch.equal(heads.weight, heads.weight.bfloat16().to(heads.weight.dtype))
    assert 0 < (heads.weight - plain.weight).abs().max() < 0.01 * plain.weight.abs().max()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_bfloat16_trains_the_same_heads_whether_features_are_rounded_once_or_in_every_step(dtype, tmp_path):
    X, y = classes(num=200, width=64, dtype=dtype)
    settings = {"base_lr": LRS, "weight_decay": DECAYS, "epochs": 2, "global_batch_size": 32}
    settings["precision"] = "bfloat16"
    once = train_heads(X, y, **settings)
    no_room = X.nbytes + 2 * X.size - 1
    assert torch.equal(once.weight, train_heads(X, y, memory_bytes=no_room, **settings).weight)
    assert torch.equal(once.weight, train_heads(Blocks(X), y, **settings).weight)
    np.save(tmp_path / "x.npy", X)
    on_disk = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert torch.equal(once.weight, train_heads(on_disk, y, memory_bytes=no_room, **settings).weight)


def test_bfloat16_reaches_the_accuracy_of_float32():
    X, y = classes(num=3000, width=32, num_classes=5, dtype=np.float32)
    settings = {"base_lr": [0.3, 3.0], "weight_decay": [0.0, 1e-3], "epochs": 10}
    plain = train_heads(X[:2000], y[:2000], **settings).accuracy(X[2000:], y[2000:])
    heads = train_heads(X[:2000], y[:2000], precision="bfloat16", **settings)
    np.testing.assert_allclose(heads.accuracy(X[2000:], y[2000:]), plain, atol=0.005)
    logits = torch.einsum("nd,hcd->nhc", torch.tensor(X), heads.weight) + heads.bias  # in float32
    largest = float(logits.abs().max())
    torch.testing.assert_close(heads.logits(torch.tensor(X)), logits, atol=1e-5 * largest, rtol=0)


def test_a_head_that_diverges_harms_no_other(caplog):
    X, y = classes(dtype=np.float32)
    X *= 1e15
    heads = train_heads(X, y, base_lr=[1e-20, 1e30], epochs=3)
    assert heads.finite().tolist() == [True, False]
    assert torch.equal(heads.weight[0], train_heads(X, y, base_lr=1e-20, epochs=3).weight[0])
    assert heads.accuracy(X, y)[1] == 0
    assert "1 of 2 heads diverged" in caplog.text


def test_training_stops_when_all_heads_have_diverged():
    X, y = classes(dtype=np.float32)
    with pytest.raises(RuntimeError, match=r"base_lr=10, 30 and features up to .*Lower base_lr"):
        train_heads(X * 1e30, y, base_lr=[30.0, 10.0])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"base_lr": [1.0, 0.0]}, r"base_lr=\[1.0, 0.0\] must be positive"),
        ({"base_lr": []}, r"base_lr=\[\] must be positive"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be 0 or more"),
        ({"base_lr": [1.0, 2.0], "weight_decay": [0.0] * 3}, "base_lr has 2 values and weight_decay 3"),
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": 2.5}, "epochs=2.5 must be a whole number, 1 or more"),
        ({"global_batch_size": "9"}, "global_batch_size='9' must be a whole number"),
        ({"global_batch_size": 0}, "global_batch_size=0"),
        ({"schedule": "linear"}, "Unknown schedule 'linear'. Choose one of: "),
        ({"precision": "float16"}, "Unknown precision 'float16'. Choose one of: bfloat16"),
        ({"device": "tpu"}, "device 'tpu' is not supported. Choose cpu or cuda"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        train_heads(*classes(), **{"base_lr": 1.0, **setting})


def test_heads_made_by_hand_refuse_an_unknown_precision_too():
    with pytest.raises(ValueError, match="Unknown precision 'bf16'. Choose one of: bfloat16"):
        Heads(1.0, 0.0, num_classes=2, num_features=3, precision="bf16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="torch sees no CUDA card. Use device 'cpu'"):
        train_heads(*classes(), base_lr=1.0, device="cuda")


def test_features_and_labels_that_do_not_fit_are_refused():
    X, y = classes()
    with pytest.raises(ValueError, match="150 rows of features, but 149 labels"):
        train_heads(X, y[1:], base_lr=1.0)
    with pytest.raises(ValueError, match="150 rows of features, but 149 labels"):
        train_heads(Blocks(X), y[1:], base_lr=1.0)
    with pytest.raises(ValueError, match=r"features of shape \(150,\) and type float64 must be a matrix"):
        train_heads(X[:, 0], y, base_lr=1.0)
    with pytest.raises(ValueError, match=r"type int64 must be a matrix"):
        train_heads(X.astype(int), y, base_lr=1.0)
    for labels in (y - 1, y + 0.5, y.astype(str), y[:, None], y[:0]):
        with pytest.raises(ValueError, match="must be .N,. integers from 0. np.unique"):
            train_heads(X, labels, base_lr=1.0)
    X[77, 3] = np.nan
    with pytest.raises(ValueError, match="Row 77 of the features holds NaN or inf"):
        train_heads(X, y, base_lr=1.0)
