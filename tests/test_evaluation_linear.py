import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.images import write_images
from helpers.ranks import run_ranks
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

import mocohub
from mocohub.backbones import create_backbone, pretrained_cfg
from mocohub.cli import main
from mocohub.evaluation.guard import Guard
from mocohub.evaluation.heads import Heads
from mocohub.evaluation.labelled import Batches, Crops, loader, normalised
from mocohub.evaluation.linear import LinearResult, linear_protocol
from mocohub.evaluation.linear_loop import Training
from mocohub.evaluation.protocols import DINOV2, MOCO, LinearProtocol, protocol_by_name
from mocohub.pretrain.augment import View
from mocohub.pretrain.loop import Stopped
from mocohub.pretrain.randomness import permutation
from mocohub.probes.knn import wilson
from mocohub.sources import list_images

ARGS = {"layers": [1, 1, 1, 1], "stem_chs": 4, "channels": [4, 8, 8, 8]}
# Three epochs of 13 images, in steps of 4, 4, 4 and 1.
SHORT = dataclasses.replace(protocol_by_name("moco", epochs=3, global_batch_size=4), lr_drop_epochs=(1, 2))
EXACT = {"precision": "float32", "num_workers": 0, "device": "cpu"}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def backbone(**kwargs: object) -> nn.Module:
    """A tiny network of 16 px images, the same each time, whose features spread over classes."""
    torch.manual_seed(0)
    model = create_backbone("r18tiny", **ARGS, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    model.pretrained_cfg |= pretrained_cfg("r18tiny", crop_px=16, crop_pct=0.8, mean=MEAN, std=STD)
    return model.eval()


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("train"), {"ape": 5, "bee": 4, "cat": 4}, size_px=24)


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("val"), {"ape": 3, "cat": 4}, size_px=24, seed=1)


@pytest.fixture(scope="module")
def straight(train: Path, val: Path, tmp_path_factory: pytest.TempPathFactory) -> LinearResult:
    out = tmp_path_factory.mktemp("runs") / "straight"
    return linear_protocol(backbone(), train, val, out=out, protocol=SHORT, **EXACT)


def final(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").iterdir())[-1] / "state.safetensors")


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def outputs(run: Path) -> dict[str, str]:
    """SHA-256 of everything a run has written for people and other programs."""
    names = ("log.jsonl", "results.json", "classifier/classifier.safetensors", "classifier/classifier.json")
    return {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in names}


# The protocol, against a slow loop


def slow_reference(
    model: nn.Module, train: Path, protocol: LinearProtocol, seed: int, broken: str = ""
) -> tuple[torch.Tensor, list[float]]:
    """The protocol once more, image by image, by torchvision, nn.Linear and torch.optim.SGD."""
    images = list_images(train)
    crops = Crops(images, dataclasses.replace(protocol, crop_px=16), seed)  # only for what it draws
    fc = nn.Linear(8, len(images.classes))
    heads = Heads(protocol, 8, len(images.classes), seed, torch.device("cpu"))
    with torch.no_grad():
        fc.weight.copy_(heads.parameters[0, :, :-1])
        fc.bias.zero_()
    optimizer = torch.optim.SGD(fc.parameters(), lr=0.1, momentum=0.9, weight_decay=0)
    losses = []
    for epoch in range(protocol.epochs):
        order = permutation(seed, "order", epoch, len(images)).tolist()
        lr = protocol.base_lrs[0] * 4 / 256
        optimizer.param_groups[0]["lr"] = lr * (0.1 if epoch == 1 else 0.01 if epoch == 2 else 1)
        epoch_losses = []
        for start in range(0, len(order), 4):
            pixels, labels = [], []
            for i in order[start : start + 4]:
                if images.paths[i] == broken:
                    continue
                image = Image.open(train / images.paths[i]).convert("RGB")
                view = crops.view(epoch, i, *image.size)
                crop = V.crop(V.pil_to_tensor(image), view.top, view.left, view.height, view.width)
                # Not V.resize, which rounds otherwise on processors without AVX2.
                crop = F.interpolate(crop[None], (16, 16), mode="bilinear", antialias=True)[0]
                crop = V.hflip(crop) if view.flip else crop
                pixels.append(V.normalize(V.to_dtype(crop, torch.float32, scale=True), MEAN, STD))
                labels.append(images.labels[i])
            with torch.no_grad():
                features = model(torch.stack(pixels))
            loss = F.cross_entropy(fc(features), torch.tensor(labels), reduction="none")
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            epoch_losses += loss.tolist()
        losses.append(float(np.mean(epoch_losses)))
    return torch.cat([fc.weight, fc.bias[:, None]], dim=1).detach(), losses


@pytest.mark.parametrize(("base_lr", "tolerance"), [(30.0, 1e-5), (1.0, 1e-6)])  # lr 30 enlarges rounding
def test_it_trains_the_classifier_of_a_plain_torch_loop(
    base_lr: float, tolerance: float, train: Path, val: Path, tmp_path: Path
) -> None:
    protocol = dataclasses.replace(SHORT, base_lrs=(base_lr,))
    expected, losses = slow_reference(backbone(), train, protocol, seed=7)
    linear_protocol(backbone(), train, val, out=tmp_path / "run", protocol=protocol, seed=7, **EXACT)
    found = final(tmp_path / "run")["parameters"][0]
    assert found.shape == (3, 9)
    assert (found - expected).abs().max() < tolerance * max(1, expected.abs().max())
    assert [row["train_loss"] for row in log(tmp_path / "run")] == pytest.approx(losses, rel=1e-5)


def test_thirteen_heads_at_once_are_thirteen_classifiers_under_torch_sgd() -> None:
    torch.manual_seed(0)
    protocol = dataclasses.replace(DINOV2, weight_decay=1e-3)
    heads = Heads(protocol, 6, 5, seed=3, device=torch.device("cpu"))
    initial = heads.parameters.clone()
    layers, losses = [nn.Linear(6, 5) for _ in range(13)], []
    for layer, parameters in zip(layers, initial, strict=True):
        with torch.no_grad():
            layer.weight.copy_(parameters[:, :-1])
            layer.bias.copy_(parameters[:, -1])
    groups = [{"params": layer.parameters(), "lr": 1.0} for layer in layers]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-3)
    for step in range(4):
        features, labels = torch.randn(7, 6), torch.randint(5, (7,))
        lrs = protocol.lrs(step, steps_per_epoch=1)
        counts = heads.step(features, labels, lrs)
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        optimizer.zero_grad()
        logits = [layer(features) for layer in layers]
        losses = [F.cross_entropy(some, labels) for some in logits]
        sum(losses).backward()
        optimizer.step()
        assert (counts.loss / counts.num_images).tolist() == pytest.approx(
            [loss.item() for loss in losses], rel=1e-5
        )
        assert counts.correct.tolist() == [(some.argmax(1) == labels).sum().item() for some in logits]
    for layer, parameters, before in zip(layers, heads.parameters, initial, strict=True):
        expected = torch.cat([layer.weight, layer.bias[:, None]], 1)
        assert (parameters - expected).abs().max() < 1e-6
        assert not parameters.equal(before)


def test_initial_weights_are_normal_with_the_protocols_deviation_and_biases_zero() -> None:
    parameters = Heads(DINOV2, 500, 40, seed=0, device=torch.device("cpu")).parameters
    assert parameters[..., :-1].std().item() == pytest.approx(0.01, rel=0.01)
    assert parameters[..., :-1].mean().abs() < 1e-4 and not parameters[..., -1].any()
    assert not parameters[0].equal(parameters[1])  # each head has its own


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_crops_are_pillows_to_a_level(interpolation: str, train: Path) -> None:
    images = list_images(train)
    protocol = dataclasses.replace(MOCO, crop_px=20, resize_px=20, interpolation=interpolation)
    crops = Crops(images, protocol, seed=0)
    for i in range(len(images)):
        image = images.decode(i)
        view = crops.view(2, i, *image.size)
        box = (view.left, view.top, view.left + view.width, view.top + view.height)
        expected = image.crop(box).resize((20, 20), Image.Resampling[interpolation.upper()])
        expected = np.asarray(expected, np.int16)[:, :: -1 if view.flip else 1]
        found = crops[2, i][1].permute(1, 2, 0).numpy()
        difference = np.abs(found - expected)
        assert difference.max() <= 2 and (difference > 1).mean() < 0.01  # two passes, each rounded


def test_images_reach_the_network_as_torchvisions_transforms_make_them(val: Path) -> None:
    images = list_images(val)
    protocol = dataclasses.replace(MOCO, crop_px=16, resize_px=20)
    (batch,) = loader(Crops(images, protocol), Batches(7, 8), num_workers=0, pin_memory=False)
    expected = torch.stack([mocohub.transform(backbone())(images.decode(i)) for i in range(7)])
    found = normalised(batch.pixels, {"mean": MEAN, "std": STD})
    assert batch.ids == list(range(7)) and not batch.errors
    assert found.equal(expected) and found.is_contiguous(memory_format=torch.channels_last)


def test_views_cover_the_protocols_range_of_areas_and_are_mirrored_half_of_the_time(train: Path) -> None:
    crops = Crops(list_images(train), MOCO, seed=0)
    views: list[View] = [crops.view(epoch, 0, 500, 400) for epoch in range(2000)]
    areas = np.array([view.width * view.height / (500 * 400) for view in views])
    ratios = np.array([view.width / view.height for view in views])
    assert 0.075 < areas.min() < 0.09 and areas.max() > 0.95 and 0.45 < areas.mean() < 0.6
    assert 0.74 < ratios.min() and ratios.max() < 1.35
    assert 0.45 < np.mean([view.flip for view in views]) < 0.55
    assert not any(view.jitter or view.grey or view.blur_sigma or view.angle_deg for view in views)


def test_every_image_comes_once_in_an_epoch_in_another_order_each_time() -> None:
    batches = list(Batches(10, 4, epochs=3, seed=5))
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    epochs = [[i for _, i in sum(batches[k : k + 3], [])] for k in (0, 3, 6)]
    assert all(sorted(ids) == list(range(10)) for ids in epochs)
    assert len({tuple(ids) for ids in epochs}) == 3
    assert list(Batches(10, 4, epochs=3, seed=5, start_step=4)) == batches[4:]
    assert [i for batch in Batches(10, 4) for _, i in batch] == list(range(10))


# What it says


def test_the_reported_accuracy_is_that_of_the_classifier_in_stock_timm(
    straight: LinearResult, val: Path
) -> None:
    model = timm.create_model("resnet18_cifar", num_classes=3, **ARGS).eval()
    classifier = load_file(straight.out / "classifier" / "classifier.safetensors")
    missing, unexpected = model.load_state_dict(backbone().state_dict() | classifier, strict=True)
    assert not missing and not unexpected
    images, classes = list_images(val), ["ape", "bee", "cat"]
    transform = mocohub.transform(backbone())
    pixels = torch.stack([transform(images.decode(i)) for i in range(len(images))])
    with torch.no_grad():
        predicted = [classes[i] for i in model(pixels).argmax(1)]
    correct = [name == images.classes[label] for name, label in zip(predicted, images.labels, strict=True)]
    assert straight.reported["top1_pct"] == pytest.approx(100 * np.mean(correct))
    about = json.loads((straight.out / "classifier" / "classifier.json").read_text())
    assert about["classes"] == classes and about["epoch"] == straight.best["epoch"]
    assert about["protocol"] == straight.protocol


def test_best_is_the_first_of_the_best_epochs_and_last_the_last(straight: LinearResult) -> None:
    values = [row["val_top1_pct"] for row in log(straight.out)]
    assert len(values) == 3 and straight.best["top1_pct"] == max(values)
    assert straight.best["epoch"] == 1 + values.index(max(values))
    assert (straight.last["epoch"], straight.last["top1_pct"]) == (3, values[-1])
    assert straight.reported == straight.best  # as MoCo's authors report


def test_records_say_protocol_changes_and_which_epoch(straight: LinearResult, train: Path) -> None:
    best, last = straight.results
    assert best["dataset"] == train.name and best["num_images"] == 7 and best["metric"] == "top-1 (%)"
    assert best["protocol"].startswith("moco linear protocol (arXiv 1911.05722)")
    assert "(changed: epochs 3, global_batch_size 4, lr_drop_epochs 1 and 2, crop_px 16" in best["protocol"]
    assert best["protocol"].endswith("; best epoch, chosen on these validation images")
    assert last["protocol"].endswith("; last epoch")
    assert best["value"] == round(straight.best["top1_pct"], 2)
    assert best["interval"] == [round(100 * end, 2) for end in wilson(straight.best["top1_pct"] / 100, 7)]
    assert straight.best["top5_pct"] is None  # of three classes every answer would be right
    mocohub.hub.records.check_probes(straight.results)


def test_top5_is_reported_where_there_are_more_than_five_classes(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", dict.fromkeys("abcdefg", 2), size_px=16)
    result = linear_protocol(backbone(), images, images, out=tmp_path / "run", protocol=SHORT, **EXACT)
    assert [record["metric"] for record in result.results] == ["top-1 (%)", "top-5 (%)"] * 2
    rows = log(tmp_path / "run")
    assert all(0 <= row["val_top1_pct"] <= row["val_top5_pct"] <= 100 for row in rows)
    features = mocohub.extract(backbone(), images, dtype="float32", progress=False)
    last = final(tmp_path / "run")["parameters"][0]
    logits = torch.from_numpy(features.values) @ last[:, :-1].T + last[:, -1]
    ranks = logits.argsort(dim=1, descending=True, stable=True)
    hits = (ranks[:, :5] == torch.from_numpy(features.labels)[:, None]).any(1)
    assert result.last["top5_pct"] == pytest.approx(100 * hits.double().mean().item())


def test_dinov2_reports_the_best_head_of_the_last_epoch_and_the_whole_table(
    train: Path, val: Path, tmp_path: Path
) -> None:
    protocol = protocol_by_name("dinov2", epochs=2, global_batch_size=8)
    result = linear_protocol(backbone(), train, val, out=tmp_path / "run", protocol=protocol, **EXACT)
    assert [head["base_lr"] for head in result.heads] == list(DINOV2.base_lrs)
    values = [head["top1_pct"] for head in result.heads]
    assert result.reported == result.last and result.last["top1_pct"] == max(values)
    assert result.last["base_lr"] == DINOV2.base_lrs[values.index(max(values))]
    (record,) = result.results
    assert "last epoch; best of 13 learning rates, chosen on these validation images" in record["protocol"]
    head = final(tmp_path / "run")["parameters"][values.index(max(values))]
    saved = load_file(tmp_path / "run" / "classifier" / "classifier.safetensors")
    assert saved["fc.weight"].equal(head[:, :-1]) and saved["fc.bias"].equal(head[:, -1])


def test_another_batch_scales_the_learning_rate_and_says_so(
    straight: LinearResult, train: Path, val: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert straight.best["lr"] == 30 * 4 / 256
    assert [row["lr"] for row in log(straight.out)] == pytest.approx([0.46875, 0.046875, 0.0046875])
    options = {"out": tmp_path / "run", "protocol": protocol_by_name("moco", epochs=1, global_batch_size=512)}
    with caplog.at_level(logging.WARNING, "mocohub"):
        linear_protocol(backbone(), train, val, **options, **EXACT)
    assert "512 instead of 256, so learning rates are scaled: 30 x 512 / 256 = 60." in caplog.text


def test_features_in_bfloat16_are_said_to_be(train: Path, val: Path, tmp_path: Path) -> None:
    options = {**EXACT, "precision": "bfloat16"}
    result = linear_protocol(backbone(), train, val, out=tmp_path / "run", protocol=SHORT, **options)
    assert result.protocol.endswith(", features in bfloat16")


# The guard


class Restless(nn.Module):
    """A backbone whose batch norm learns in its forward pass, whatever mode it is in, from some call on."""

    num_classes = 0

    def __init__(self, *, with_conv: bool, from_call: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3) if with_conv else nn.Conv2d(3, 8, 3, bias=False).requires_grad_(False)
        self.between = nn.Identity() if not with_conv else None
        self.norm = nn.BatchNorm2d(8)
        self.calls, self.from_call = 0, from_call
        self.pretrained_cfg = pretrained_cfg("r18tiny", crop_px=16, crop_pct=1.0)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.norm.train(self.calls >= self.from_call)
        self.calls += 1
        return self.norm(self.conv(pixels)).mean((2, 3))


@pytest.mark.parametrize(
    "with_conv", [False, True]
)  # True: its batch norm could be folded, so a copy computes
def test_a_backbone_that_changes_its_statistics_ends_the_run(
    with_conv: bool, train: Path, val: Path, tmp_path: Path
) -> None:
    model = Restless(with_conv=with_conv)
    with pytest.raises(RuntimeError, match=r"not frozen: (copy\.)?norm\.running_mean has changed"):
        linear_protocol(model, train, val, out=tmp_path / "run", protocol=SHORT, **EXACT)
    assert not (tmp_path / "run" / "results.json").exists()
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_one_that_changes_them_after_the_first_epoch_gives_no_result(
    train: Path, val: Path, tmp_path: Path
) -> None:
    model = Restless(with_conv=False, from_call=14)
    with pytest.raises(
        RuntimeError, match=r"not frozen: norm\.running_mean has changed \(3 tensors in all\)"
    ):
        linear_protocol(model, train, val, out=tmp_path / "run", protocol=SHORT, **EXACT)
    assert len(log(tmp_path / "run")) == 3 and not (tmp_path / "run" / "results.json").exists()


def test_a_buffer_that_is_not_saved_is_watched_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_buffer("centre", torch.zeros(2), persistent=False)
    guard = Guard({"": model})
    guard.check()
    model[0].centre += 1
    with pytest.raises(RuntimeError, match=r"not frozen: 0\.centre has changed \(1 tensors in all\)"):
        guard.check()


def test_every_tensor_of_the_backbone_is_bit_identical_afterwards_and_its_mode_restored(
    train: Path, val: Path, tmp_path: Path
) -> None:
    model = backbone().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    linear_protocol(model, train, val, out=tmp_path / "run", protocol=SHORT, **EXACT)
    after = model.state_dict()
    assert before.keys() == after.keys() and any("num_batches_tracked" in name for name in before)
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


# Processes, interruptions


def on_ranks(train: Path, val: Path, out: Path) -> None:
    linear_protocol(backbone(), train, val, out=out, protocol=SHORT, **EXACT)


def test_two_processes_train_the_classifier_of_one(train: Path, val: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(train, tmp_path / "train")  # so that they differ in how many images they have
    (broken / "bee" / "0001.png").write_bytes(b"")
    on_ranks(broken, val, tmp_path / "one")
    run_ranks(on_ranks, 2, broken, val, tmp_path / "two")
    one, two = final(tmp_path / "one"), final(tmp_path / "two")
    assert one.keys() == two.keys()
    assert (two["parameters"] - one["parameters"]).abs().max() < 1e-6 * one["parameters"].abs().max()
    for row, other in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert row.pop("val_top5_pct") is other.pop("val_top5_pct") is None  # of three classes
        assert row == pytest.approx(other, rel=1e-5)
    errors = [(tmp_path / run / "errors.jsonl").read_text() for run in ("one", "two")]
    assert errors[0] == errors[1] and "bee/0001.png" in errors[0]


class Killed(Training):
    """Dies of SIGKILL in the middle of an epoch."""

    def _step(self, step: int, batch: object) -> None:
        if step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._step(step, batch)


def be_killed(train: Path, val: Path, out: Path) -> None:
    torch.set_num_threads(1)
    mocohub.evaluation.linear.Training = Killed
    linear_protocol(backbone(), train, val, out=out, protocol=SHORT, save_every_steps=2, **EXACT)


def test_a_run_that_was_killed_ends_with_the_same_bytes_as_a_straight_one(
    straight: LinearResult, train: Path, val: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = multiprocessing.get_context("spawn").Process(target=be_killed, args=(train, val, run))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [folder.name for folder in sorted((run / "checkpoints").glob("step-*"))][-1] == "step-00000006"
    result = linear_protocol(backbone(), train, val, out=run, protocol=SHORT, resume="auto", **EXACT)
    assert outputs(run) == outputs(straight.out)
    assert all(tensor.equal(final(straight.out)[name]) for name, tensor in final(run).items())
    assert dataclasses.replace(result, out=straight.out) == straight
    assert len(list((run / "checkpoints").iterdir())) == 2  # the older ones are gone


def test_sigterm_saves_and_the_run_goes_on_to_the_same_bytes(
    straight: LinearResult, train: Path, val: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_of, run = Training._step, tmp_path / "run"

    def asked_to_stop(self: Training, step: int, batch: object) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        step_of(self, step, batch)

    monkeypatch.setattr(Training, "_step", asked_to_stop)
    with pytest.raises(Stopped, match="Stopped after step 6 of 12, saved. Go on with --resume auto."):
        linear_protocol(backbone(), train, val, out=run, protocol=SHORT, **EXACT)
    monkeypatch.undo()
    options = {**EXACT, "num_workers": 2}
    linear_protocol(backbone(), train, val, out=run, protocol=SHORT, resume="auto", **options)
    assert outputs(run) == outputs(straight.out)


def test_a_stop_while_validation_images_are_looked_at_loses_nothing(
    straight: LinearResult, train: Path, val: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, run = Crops.__getitem__, tmp_path / "run"

    def asked_to_stop(self: Crops, key: tuple[int, int]) -> object:
        if self.seed is None:  # a validation image
            os.kill(os.getpid(), signal.SIGTERM)
        return get(self, key)

    monkeypatch.setattr(Crops, "__getitem__", asked_to_stop)
    with pytest.raises(Stopped, match="Stopped before the first step"):
        linear_protocol(backbone(), train, val, out=run, protocol=SHORT, **EXACT)
    monkeypatch.undo()
    linear_protocol(backbone(), train, val, out=run, protocol=SHORT, resume="auto", **EXACT)
    assert outputs(run) == outputs(straight.out)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_its_path_and_size(
    straight: LinearResult, train: Path, val: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight.out, run)
    (run / "results.json").unlink()
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("in the way")
    with pytest.raises(OSError, match="step-00000004' cannot be written: .* It needs 0.0 MB"):
        linear_protocol(backbone(), train, val, out=run, protocol=SHORT, resume="auto", **EXACT)
    (run / "checkpoints").unlink()
    linear_protocol(backbone(), train, val, out=run, protocol=SHORT, resume="auto", **EXACT)
    assert outputs(run) == outputs(straight.out)


def test_a_damaged_checkpoint_is_passed_over(
    straight: LinearResult, train: Path, val: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight.out, run)
    for name in ("results.json", "log.jsonl"):
        (run / name).unlink()
    newest = run / "checkpoints" / "step-00000012" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    linear_protocol(backbone(), train, val, out=run, protocol=SHORT, resume="auto", **EXACT)
    assert outputs(run) == outputs(straight.out)


def test_a_finished_run_is_returned_at_once(
    straight: LinearResult, train: Path, val: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        pytest.fail("computed something")

    monkeypatch.setattr(Crops, "__getitem__", never)
    again = linear_protocol(backbone(), train, val, out=straight.out, protocol=SHORT, resume="auto", **EXACT)
    assert again == straight


def test_a_run_is_not_overwritten(straight: LinearResult, train: Path, val: Path) -> None:
    with pytest.raises(FileExistsError, match="continue that run with --resume auto"):
        linear_protocol(backbone(), train, val, out=straight.out, protocol=SHORT, **EXACT)


def test_another_protocol_model_or_data_is_refused_with_the_fields_named(
    straight: LinearResult, train: Path, val: Path, tmp_path: Path
) -> None:
    options = {"out": straight.out, "resume": "auto", **EXACT}
    longer = protocol_by_name("moco", epochs=4, global_batch_size=4)
    with pytest.raises(ValueError, match=r"protocol\.epochs was 3, now 4; protocol\.lr_drop_epochs was \[1"):
        linear_protocol(backbone(), train, val, protocol=longer, **options)
    other = backbone()
    other.bn1.running_mean[0] += 1
    with pytest.raises(ValueError, match=r"model\.weights_sha256 was '"):
        linear_protocol(other, train, val, protocol=SHORT, **options)
    with pytest.raises(ValueError, match=r"val\.num_images was 7, now 13; val\.sha256 was"):
        linear_protocol(backbone(), train, train, protocol=SHORT, **options)
    with pytest.raises(ValueError, match="seed was 0, now 1; precision was 'float32', now 'auto'"):
        changed = {**options, "precision": "auto"}
        linear_protocol(backbone(), train, val, protocol=SHORT, seed=1, **changed)


# Broken images and bad input


def test_broken_images_are_skipped_in_training_and_wrong_in_validation(
    train: Path, val: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(train, tmp_path / "train"), shutil.copytree(val, tmp_path / "val")
    (broken[0] / "ape" / "0002.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for i in range(4):
        (broken[1] / "cat" / f"000{i}.png").write_text("no image")
    result = linear_protocol(backbone(), *broken, out=tmp_path / "run", protocol=SHORT, **EXACT)
    assert (result.num_train, result.num_train_unreadable) == (13, 1)
    assert (result.num_val, result.num_val_unreadable) == (7, 4)
    assert result.best["top1_pct"] <= 100 * 3 / 7
    assert "; 4 unreadable images count as wrong" in result.results[0]["protocol"]
    lines = (tmp_path / "run" / "errors.jsonl").read_text().splitlines()
    errors = [(row["split"], row["path"]) for row in map(json.loads, lines)]
    assert errors == [("train", "ape/0002.png"), *(("val", f"cat/000{i}.png") for i in range(4))]
    expected, _ = slow_reference(backbone(), broken[0], SHORT, seed=0, broken="ape/0002.png")
    found = final(tmp_path / "run")["parameters"][0]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()  # nothing took its place


def test_more_than_a_tenth_of_broken_training_images_end_the_run(
    train: Path, val: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(train, tmp_path / "train")
    for i in range(2):
        (broken / "ape" / f"000{i}.png").write_bytes(b"")
    with pytest.raises(RuntimeError, match="2 of 13 training images cannot be read, more than 10 %"):
        linear_protocol(backbone(), broken, val, out=tmp_path / "run", protocol=SHORT, **EXACT)
    assert "empty file" in (tmp_path / "run" / "errors.jsonl").read_text()


def test_validation_images_of_which_none_can_be_read_give_no_number(
    train: Path, val: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(val, tmp_path / "val")
    for path in broken.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(
        RuntimeError, match=r"None of 7 validation images can be read, such as 'ape/0000.png'"
    ):
        linear_protocol(backbone(), train, broken, out=tmp_path / "run", protocol=SHORT, **EXACT)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_of_nothing_but_broken_images_fails_before_anything_is_written(
    val: Path, tmp_path: Path
) -> None:
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="None of 2 images tried can be decoded: a/0.png: empty file"):
        linear_protocol(
            backbone(), tmp_path / "train", tmp_path / "train", out=tmp_path / "run", protocol=SHORT, **EXACT
        )
    assert not (tmp_path / "run").exists()


def test_images_that_cannot_be_learnt_from_are_refused(train: Path, val: Path, tmp_path: Path) -> None:
    def run(first: object, second: object) -> None:
        linear_protocol(backbone(), first, second, out=tmp_path / "run", protocol=SHORT, **EXACT)

    images = list_images(train)
    with pytest.raises(ValueError, match="There are no images"):
        run(images.subset([]), val)
    with pytest.raises(ValueError, match=r"Only one class in '.*' \(ape\): a classifier needs two"):
        run(images.subset([0, 1]), val)
    with pytest.raises(ValueError, match=r"have no label \('0000.png' is the first\)"):
        run(train / "ape", val)
    with pytest.raises(ValueError, match=r"1 classes of '.*' are not in '.*': cat"):
        run(images.subset([0, 1, 5, 6]), val)
    lines = ["path,label", *(f"{train / path},x" for path in images.paths[:3])]
    (tmp_path / "some.csv").write_text("\n".join([*lines, f"{train / images.paths[3]},"]) + "\n")
    with pytest.raises(ValueError, match="have no label"):
        run(tmp_path / "some.csv", val)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "moco4"}, "Unknown protocol 'moco4'"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"resume": "yes"}, "Unknown resume 'yes'. Choose one of: "),
        ({"precision": "half"}, "Unknown precision 'half'"),
        ({"num_workers": -1}, r"num_workers \(-1\) must be at least 0"),
        ({"save_every_steps": 0}, r"save_every_steps \(0\) must be at least 1"),
        ({"device": "tpu"}, "device 'tpu' is not supported"),
    ],
)
def test_settings_that_are_not_known_are_refused(
    options: dict, message: str, train: Path, val: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        linear_protocol(backbone(), train, val, **{"out": tmp_path / "run", "protocol": SHORT} | options)


def test_a_module_that_does_not_state_its_preprocessing_is_refused(
    train: Path, val: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="Sequential has no pretrained_cfg"):
        linear_protocol(nn.Sequential(backbone()), train, val, out=tmp_path / "run", **EXACT)


def test_features_that_are_not_finite_end_the_run_before_anything_is_saved(
    train: Path, val: Path, tmp_path: Path
) -> None:
    model = backbone()
    with torch.no_grad():
        model.layer4[0].bn2.weight.fill_(1e38)
    with pytest.raises(RuntimeError, match=r"loss is not finite at step \d+ \(lr 0.46875\)"):
        linear_protocol(model, train, val, out=tmp_path / "run", protocol=SHORT, **EXACT)
    assert not (tmp_path / "run" / "checkpoints").exists()


# The command line


def test_the_command_line_runs_a_protocol_and_collects_its_numbers(
    train: Path, val: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["linear", str(train), str(val), "--protocol", "moco", "--model", "moco_tiny_cifar10"]
    arguments += ["--out", str(tmp_path / "run"), "--epochs", "2", "--batch-size", "8", "--workers", "0"]
    arguments += ["--device", "cpu", "--precision", "float32", "--json", str(tmp_path / "probes.json")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "on 7 images (moco linear protocol" in printed and "(changed: epochs 2, global_batch" in printed
    records = json.loads((tmp_path / "probes.json").read_text())
    assert records == json.loads((tmp_path / "run" / "results.json").read_text())["results"]["results"]
    assert main([*arguments[:-2], "--resume", "auto"]) == 0
    assert capsys.readouterr().out == printed
    assert main(arguments) == 2
    assert "already exists" in capsys.readouterr().err


def test_the_command_line_prints_the_table_of_a_grid(
    train: Path, val: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["linear", str(train), str(val), "--protocol", "dinov2", "--model", "moco_tiny_cifar10"]
    arguments += ["--out", str(tmp_path / "run"), "--epochs", "1", "--workers", "0", "--device", "cpu"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:13]] == [f"lr {lr:g}" for lr in DINOV2.base_lrs]
    assert "best of 13 learning rates, chosen on these validation images" in lines[13]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "moco", "--out", "run"], "--protocol moco needs the backbone"),
        (["--protocol", "moco", "--model", "m", "--out", "run", "--C", "2"], "--solver and --C are for feat"),
        (["--model", "m"], "--model is for images and needs --protocol moco, mocov3 or dinov2"),
        (["--save-every-steps", "9"], "--save-every-steps is for images"),
        (["--workers", "0"], "--workers is for images"),
    ],
)
def test_options_of_the_other_kind_of_input_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["linear", "a", "b", *arguments]) == 2
    assert message in capsys.readouterr().err
