"""Models that are written, stored or used in unusual ways give the features that a plain loop gives."""

import logging

import numpy as np
import pytest
import timm
import torch
from helpers.hub import images, randomise
from torch import nn

from mocohub.features.extract import extract
from mocohub.features.model import model_facts
from mocohub.features.network import FrozenNetwork


def features(model, pixels, **arguments):
    with FrozenNetwork(model, device="cpu", **{"dtype": "float32", **arguments}) as network:
        return network(pixels)


def convolution_and_norm(**norm):
    return nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4, **norm))


class Views(nn.Module):
    """Asks of its maps what only contiguous ones allow, as many an older network does."""

    def __init__(self, maps):
        super().__init__()
        self.maps, self.fc = maps, nn.Linear(4 * 4 * 4, 5)

    def forward(self, x):
        return self.fc(self.maps(x).view(len(x), -1))


@pytest.mark.parametrize("maps", [nn.Conv2d(3, 4, 8, 8), convolution_and_norm()])
@torch.no_grad()
def test_a_model_that_does_not_bear_channels_last_gets_contiguous_images(maps):
    model, pixels = randomise(Views(maps), 1), images(32)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        model.eval()(pixels.to(memory_format=torch.channels_last))
    torch.testing.assert_close(features(model, pixels)["embedding"], model(pixels))
    with FrozenNetwork(model, device="cpu", dtype="float32") as network:
        facts = network.prepare(pixels)
    with FrozenNetwork(model, device="cpu", dtype="float32", choice=facts) as other:
        torch.testing.assert_close(other(pixels)["embedding"], model(pixels))


@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_byobnet"])
@torch.no_grad()
def test_parts_of_a_norm_with_activation_are_layers_beside_folded_ones(architecture):
    model, pixels, found = randomise(timm.create_model(architecture), 1), images(32), {}
    ends = ("bn.act", "bn.drop", "bn1.act", "bn2.act", "bn3.drop")
    names = [name for name, _ in model.named_modules() if name.endswith(ends)]
    assert len(names) > 5
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: found.update({name: output.mean((2, 3))})
        )
        for name in names
    ]
    model.eval()(pixels)
    for hook in hooks:
        hook.remove()
    with FrozenNetwork(model, device="cpu", dtype="float32", layers=names) as network:
        rows = network(pixels)
        assert network.facts["folded"] > 5
    for name in names:
        torch.testing.assert_close(rows[name], found[name], rtol=1e-4, atol=1e-5)


class MergesInEval(nn.Linear):
    """Adds to its weights for inference and takes it away for training, as LoRA layers do."""

    is_merged = False

    def train(self, mode=True):
        if self.is_merged == mode:
            self.weight.data += -1.0 if mode else 1.0
            self.is_merged = not mode
        return super().train(mode)


@pytest.mark.parametrize("is_training", [True, False])
def test_a_module_that_changes_with_its_mode_is_afterwards_as_it_was(is_training):
    model = nn.Sequential(nn.Flatten(), MergesInEval(3 * 8 * 8, 4), nn.Dropout())
    model[1].weight.data = torch.randint(-9, 9, (4, 3 * 8 * 8)).float()
    model.train(is_training)
    model[2].train(not is_training)
    weight = model[1].weight.detach().clone()
    features(model, images(8))
    assert [module.training for module in model] == [is_training, is_training, not is_training]
    assert model[1].is_merged != is_training and torch.equal(model[1].weight, weight)


class KeepsPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.positions = nn.Parameter(torch.ones(3)), None

    def forward(self, x):
        if self.positions is None:
            self.positions = torch.arange(3.0)
        return x.mean((2, 3)) * self.weight * self.positions


def test_a_model_that_keeps_what_it_made_can_be_trained_afterwards():
    model, pixels = KeepsPositions(), images()
    features(model, pixels)
    model(pixels).sum().backward()
    torch.testing.assert_close(model.weight.grad, pixels.mean((2, 3)).sum(0) * model.positions)


class CountsFirst(nn.Module):
    """Its first parameter is no weight."""

    def __init__(self):
        super().__init__()
        self.count = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)
        self.conv = nn.Conv2d(3, 4, 8, 8)

    def forward(self, x):
        return self.conv(x.float()).mean((2, 3))


@torch.no_grad()
def test_images_are_not_cut_to_the_type_of_integers():
    model, pixels = CountsFirst(), images()
    with FrozenNetwork(model, device="cpu", dtype="float32") as network:
        torch.testing.assert_close(network(pixels)["embedding"], model(pixels))
        assert network.facts["dtype"] == "float32"


@pytest.mark.parametrize(
    ("stored", "asked"),
    [(torch.float16, "float32"), (torch.bfloat16, "float32"), (torch.float16, "bfloat16")],
)
def test_a_type_that_the_weights_cannot_give_is_refused(stored, asked):
    model = convolution_and_norm().to(stored)
    with pytest.raises(ValueError, match=f"dtype is '{asked}', but the weights are {stored}.*model.float"):
        FrozenNetwork(model, device="cpu", dtype=asked)


def test_weights_in_bfloat16_are_not_said_to_agree_with_float32():
    model = nn.Sequential(convolution_and_norm(), nn.Flatten()).bfloat16()
    with FrozenNetwork(model, device="cpu", dtype="bfloat16") as network:
        network(images())
        assert network.facts == {"dtype": "bfloat16", "folded": 0, "cosine": None, "compiled": None}


@pytest.mark.filterwarnings("ignore")  # torch would have one use torchao
def test_the_fingerprint_tells_quantised_weights_apart():
    def dynamic(value):
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        model[1].weight.data.fill_(value)
        model[1].bias.data.fill_(0)
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})

    assert model_facts(dynamic(1.0)) == model_facts(dynamic(1.0)) != model_facts(dynamic(2.0))


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten())
    with pytest.raises(ValueError, match="'0.bias' of the model is on the meta device.*Load its weights"):
        extract(model, images())


def test_a_model_in_wrappers_is_the_model():
    model, pixels = randomise(timm.create_model("test_resnet"), 1), images(32)
    expected = extract(model, pixels, dtype="float32")
    for wrapped in (nn.DataParallel(model), nn.DataParallel(torch.compile(model))):
        found = extract(wrapped, pixels, dtype="float32")
        np.testing.assert_array_equal(found.values, expected.values)
        assert found.meta["model"] == expected.meta["model"]


def test_a_batch_norm_without_statistics_is_told_of(caplog):
    model = nn.Sequential(convolution_and_norm(track_running_stats=False), nn.Flatten())
    with caplog.at_level(logging.WARNING):
        features(model, images())
    assert "Batch norm '0.1' has no statistics: rows depend on their batch." in caplog.text


def test_a_module_called_embedding_is_not_taken_for_what_the_model_gives():
    model = nn.Sequential()
    model.embedding, model.flatten = nn.Conv2d(3, 4, 8, 8), nn.Flatten()
    assert features(model, images(8))["embedding"].shape == (2, 4)
    with pytest.raises(ValueError, match="'embedding' is both what the model gives and a module"):
        FrozenNetwork(model, device="cpu", layers=["flatten", "embedding:max"])
