import threading

import numpy as np
import pytest
import timm
import torch
from helpers.hub import TINY_R50, TINY_WIDE, images, randomise
from timm.layers import BatchNormAct2d, StdConv2d
from torch import nn

from mocohub.backbones import create_backbone
from mocohub.features.extract import extract
from mocohub.features.folding import fold, foldable
from mocohub.features.model import model_facts
from mocohub.features.network import FrozenNetwork
from mocohub.features.precision import fast_bfloat16

SWIN = {"img_size": 32, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2}


@pytest.fixture
def resnet():
    return tiny_resnet()


def tiny_resnet(**arguments):
    name, shape = TINY_R50
    return randomise(timm.create_model("resnet50", num_classes=0, **shape, **arguments), 1)


def features(model, pixels, **arguments):
    with FrozenNetwork(model, device="cpu", **{"dtype": "float32", **arguments}) as network:
        return network(pixels)


@torch.no_grad()
def plain(model, pixels):
    return model.eval()(pixels)


def assert_within(found, expected, tolerance=1e-5):
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert found.dtype == torch.float32 and error.max() <= tolerance


class Ordered(nn.Module):
    """Registers a convolution and a batch norm one after the other, and calls the batch norm first."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.conv(self.norm(x)).mean((2, 3))


class Twice(nn.Module):
    """Reads the convolution's output beside its batch norm, as folding must not be blind to."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return torch.cat([x, self.norm(x)], 1).mean((2, 3))


class ReadsStatistics(nn.Module):
    """Fails if its batch norm is another module."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)).mean((2, 3)) + self.norm.running_mean


class ThirtyThousand(nn.Module):
    """Sums up the small differences between large pixels, which bfloat16 cannot tell apart."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 64, 8)
        weight = torch.randn(8, 3 * 64, generator=torch.Generator().manual_seed(0))
        self.fc.weight.data = weight - weight.mean(1, keepdim=True)

    def forward(self, x):
        return self.fc(x.flatten(1) + 30_000)


class Counting(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.calls, self.lock = model, 0, threading.Lock()  # which cannot be copied

    def forward(self, x):
        self.calls += 1
        return self.model(x)


@pytest.mark.parametrize(
    ("architecture", "arguments", "is_folded"),
    [
        ("resnet50", TINY_R50[1], True),
        ("resnetv2_50", {**TINY_WIDE[1], "preact": False}, True),
        ("resnetv2_50", {"layers": [1, 1, 1, 1], "stem_chs": 4, "channels": [16, 32, 64, 128]}, True),
        ("resnetv2_50", {**TINY_WIDE[1], "conv_layer": StdConv2d}, False),  # standardises its weights
        ("test_efficientnet", {}, True),
        ("test_byobnet", {}, True),
        ("densenet121", {"growth_rate": 4, "block_config": (1, 2)}, True),
        ("test_convnext", {}, False),
        ("test_vit", {"img_size": 32}, False),
        ("swin_tiny_patch4_window7_224", SWIN, False),
    ],
)
def test_float32_features_of_timm_models_are_the_plain_ones(architecture, arguments, is_folded):
    model = randomise(timm.create_model(architecture, num_classes=0, **arguments), 3)
    pixels = images(32, 3)
    with FrozenNetwork(model, device="cpu", dtype="float32") as network:
        found = network(pixels)
        assert bool(network.facts["folded"]) == is_folded
        assert network.columns == {"embedding": found["embedding"].shape[1]}
    assert_within(found["embedding"], plain(model, pixels))


def test_folding_draws_statistics_weights_and_activation_into_the_convolution():
    model = randomise(nn.Sequential(nn.Conv2d(3, 5, 3, bias=True), BatchNormAct2d(5)), 2).double()
    pixels = images(8).double()
    conv, norm = model
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    shifted = (conv(pixels) - norm.running_mean[:, None, None]) * scale[:, None, None]
    expected = (shifted + norm.bias[:, None, None]).clamp(min=0)
    fold(model, [("0", "1")])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(pixels), expected)


def test_batch_norms_without_statistics_or_of_another_width_are_not_foldable():
    pairs = [
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)),
    ]
    assert [len(foldable(pair)) for pair in pairs] == [0, 0, 0, 1]
    pixels = images(8)
    expected = pairs[3].eval()(pixels)
    fold(pairs[3], foldable(pairs[3]))
    torch.testing.assert_close(pairs[3](pixels), expected)


@pytest.mark.parametrize("kind", [Ordered, Twice, ReadsStatistics])
def test_a_network_that_folding_would_change_is_not_folded(kind):
    model = randomise(kind(), 4)
    with FrozenNetwork(model, device="cpu", dtype="float32") as network:
        torch.testing.assert_close(
            network(images())["embedding"], plain(model, images()), rtol=1e-6, atol=1e-7
        )
        assert network.facts["folded"] == 0 and len(foldable(model)) == 1


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_afterwards_as_it_was(resnet, copied, fails):
    model = resnet if copied else Counting(resnet)
    model.train()
    resnet.layer2.eval()
    before = model_facts(model)["weights_sha256"]
    modes = [module.training for module in model.modules()]
    tensors = [(tensor.data_ptr(), tensor.stride(), tensor.requires_grad) for tensor in model.parameters()]
    kinds = [type(module) for module in model.modules()]
    try:
        with FrozenNetwork(model, device="cpu", layers=["embedding"]) as network:
            network(images(16 if not fails else 32))
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert model_facts(model)["weights_sha256"] == before
    assert [module.training for module in model.modules()] == modes
    assert [(t.data_ptr(), t.stride(), t.requires_grad) for t in model.parameters()] == tensors
    assert [type(module) for module in model.modules()] == kinds
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_of_the_user_see_every_pass_and_stay(resnet):
    seen = []
    hook = resnet.layer2.register_forward_hook(lambda module, args, output: seen.append(module))
    with FrozenNetwork(resnet, device="cpu", dtype="float32", layers=["layer2"]) as network:
        network(images())
        assert network.facts["folded"] == 0
    assert seen and all(module is resnet.layer2 for module in seen)
    assert list(resnet.layer2._forward_hooks) == [hook.id]


def test_batch_statistics_are_not_used_nor_moved(resnet):
    resnet.train()
    alone, together = (features(resnet, images(32, 4)[:n])["embedding"][:1] for n in (1, 4))
    assert_within(alone, together)
    assert int(resnet.bn1.num_batches_tracked) == 101


@pytest.mark.skipif(not fast_bfloat16(torch.device("cpu")), reason="this processor has no bfloat16")
def test_bfloat16_is_chosen_where_the_features_agree():
    model = tiny_resnet()
    with FrozenNetwork(model, device="cpu") as network:
        found = network(images(32, 4))["embedding"]
        assert network.facts["dtype"] == "bfloat16" and network.facts["cosine"] >= 0.999
        assert "bfloat16 (cosine with float32 0.99" in str(network)
    expected = plain(model, images(32, 4))
    assert torch.cosine_similarity(found, expected).min() >= 0.999
    assert (found - expected).norm() > 1e-4 * expected.norm()  # it was bfloat16 indeed


def test_bfloat16_is_not_chosen_where_the_features_differ_but_is_met_when_asked_for():
    model, pixels = ThirtyThousand(), images(8, 4)
    with FrozenNetwork(model, device="cpu", dtype="auto") as network:
        assert_within(network(pixels)["embedding"], plain(model, pixels), 1e-6)
        assert network.facts == {"dtype": "float32", "folded": 0, "cosine": None, "compiled": None}
    with FrozenNetwork(model, device="cpu", dtype="bfloat16") as network:
        network(pixels)
        assert network.facts["dtype"] == "bfloat16" and network.facts["cosine"] < 0.999


def test_a_model_stored_in_another_type_computes_in_it():
    model = tiny_resnet().double()
    with FrozenNetwork(model, device="cpu") as network:
        found = network(images())["embedding"]
        assert network.facts["dtype"] == "float64"
    torch.testing.assert_close(found, plain(model, images().double()).float(), rtol=0, atol=0)


def test_features_that_are_not_finite_do_not_break_the_choice(resnet):
    pixels = images(32, 3)
    pixels[1, 0, 0, 0] = torch.inf
    found = features(resnet, pixels, dtype="auto")["embedding"]
    assert found.isfinite().all(1).tolist() == [True, False, True]
    assert not features(resnet, pixels[1:2], dtype="auto")["embedding"].isfinite().all()


def test_another_process_can_be_handed_the_choice(resnet):
    with FrozenNetwork(resnet, device="cpu") as network:
        expected = network(images(32, 4))
        choice = network.facts
    other = torch.full((1, 3, 32, 32), torch.nan)  # a sample on which nothing could be compared
    with FrozenNetwork(resnet, device="cpu", choice=choice) as network:
        assert network.prepare(other) == choice
        assert torch.equal(network(images(32, 4))["embedding"], expected["embedding"])
    with FrozenNetwork(resnet, device="cpu", choice={**choice, "dtype": "float32", "folded": 0}) as network:
        assert torch.equal(
            network(images())["embedding"],
            plain(
                resnet.to(memory_format=torch.channels_last), images().to(memory_format=torch.channels_last)
            ),
        )


def test_several_layers_in_one_pass_equal_timms_intermediates(resnet):
    model = Counting(resnet)
    pixels = images(64)
    layers = ["model.layer2", "model.layer4", "embedding"]
    with FrozenNetwork(model, device="cpu", dtype="float32", layers=layers) as network:
        network.prepare(pixels)
        model.calls = 0
        found = network(pixels)
    assert model.calls == 1
    with torch.no_grad():
        maps = resnet.forward_intermediates(pixels, intermediates_only=True)
    assert list(found) == layers
    assert network.columns == {"model.layer2": 64, "model.layer4": 256, "embedding": 256}
    assert_within(found["model.layer2"], maps[2].mean((2, 3)))
    assert_within(found["model.layer4"], maps[4].mean((2, 3)))
    assert_within(found["embedding"], plain(resnet, pixels))


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("resnet50", TINY_R50[1]),
        ("resnetv2_50", {**TINY_WIDE[1], "preact": False}),
        ("test_convnext", {}),
        ("test_efficientnet", {}),
        ("swin_tiny_patch4_window7_224", SWIN),  # whose maps are (n, H, W, C)
    ],
)
def test_stages_are_the_last_four_of_timms_feature_info(architecture, arguments):
    model = randomise(timm.create_model(architecture, num_classes=0, **arguments), 5)
    pixels = images(32)
    found = features(model, pixels, layers=["stage4", "stage1"])
    with torch.no_grad():
        maps = model.forward_intermediates(pixels, intermediates_only=True, output_fmt="NCHW")
    assert_within(found["stage4"], maps[-1].mean((2, 3)))
    assert_within(found["stage1"], maps[-4].mean((2, 3)))


def test_small_image_networks_have_stages_too():
    found = features(create_backbone("r18tiny"), images(32), layers=["stage1", "layer1", "stage4", "layer4"])
    assert torch.equal(found["stage1"], found["layer1"]) and torch.equal(found["stage4"], found["layer4"])


def test_maps_and_tokens_are_pooled_as_defined(resnet):
    pixels = images(64)
    with torch.no_grad():
        maps = resnet.forward_intermediates(pixels, intermediates_only=True)[3].double().numpy()
    expected = {
        "avg": maps.mean((2, 3)),
        "max": maps.max((2, 3)),
        "gem": (np.maximum(maps, 1e-6) ** 3).mean((2, 3)) ** (1 / 3),
    }
    for pool, values in expected.items():
        found = features(resnet, pixels, layers=["layer3"], pool=pool)["layer3"]
        assert_within(found, torch.from_numpy(values))  # not entry by entry: small ones are differences
    whole = features(resnet, pixels, pool="max")["embedding"]
    assert_within(whole, resnet.forward_features(pixels).amax((2, 3)).detach())
    vit = randomise(timm.create_model("test_vit", num_classes=0, img_size=32), 6)
    tokens = features(vit, images(32), layers=["blocks.1"])["blocks.1"]
    block = vit.blocks[1].register_forward_hook(lambda module, args, output: kept.append(output))
    kept = []
    plain(vit, images(32))
    block.remove()
    assert kept[0].shape[1] == 5  # four patches and a class token
    assert_within(tokens, kept[0].mean(1).detach())


def test_a_layer_is_read_before_what_follows_writes_over_it(resnet):
    bare = {}
    for name in ("conv1", "bn1", "layer1.0.bn3"):
        resnet.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: bare.update({name: output.clone()})
        )
    plain(resnet, images(32))
    for module in resnet.modules():
        module._forward_hooks.clear()
    with FrozenNetwork(resnet, device="cpu", dtype="float32", layers=list(bare)) as network:
        found = network(images(32))
        assert network.facts["folded"] == len(foldable(resnet)) - 1  # conv1's own output is asked for
    for name, maps in bare.items():
        assert (maps < 0).any()
        assert_within(found[name], maps.mean((2, 3)))


def test_a_classifier_gives_embedding_and_logits_in_one_pass():
    model = randomise(timm.create_model("resnet50", num_classes=7, **TINY_R50[1]), 1)
    found = features(model, images(32), layers=["embedding", "fc"])
    assert_within(found["fc"], plain(model, images(32)))
    assert_within(found["embedding"], plain(tiny_resnet(), images(32)))
    assert_within(features(model, images(32))["embedding"], found["embedding"])


def test_flip_gives_the_mean_over_the_image_and_its_mirror_image(resnet):
    pixels = images(32)
    found = features(resnet, pixels, flip=True)["embedding"]
    mirrored = plain(resnet, torch.from_numpy(pixels.numpy()[..., ::-1].copy()))
    assert (mirrored - plain(resnet, pixels)).norm() > 1e-3
    assert_within(found, (plain(resnet, pixels) + mirrored) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["layr3"]}, r"Unknown layer 'layr3'. Choose one of: layer3, "),
        ({"layers": ["layer3.0.conv9"]}, r"Unknown layer 'layer3.0.conv9'. .*layer3.0.conv3.*stage4"),
        ({"layers": ["layer3", "layer3"]}, "names 'layer3' twice"),
        ({"layers": "layer3"}, r"must be a list of names: layers=\['layer3'\]"),
        ({"layers": ["layer3:max", "layer3:max"]}, "names 'layer3:max' twice.*another pooling"),
        ({"layers": ["layer3", "layer3:avg"]}, "names 'layer3:avg' twice"),
        ({"layers": ["layer3:mean"]}, "Unknown pool 'mean'"),
        ({"layers": ["layr3:max"]}, "Unknown layer 'layr3'. Choose one of: layer3"),
        ({"layers": ["contrastive"]}, r"no projection head.*mocohub.load\(RUN, head=True\)"),
        (
            {"pool": "none", "flip": True},
            "Maps are not averaged.*none' of embedding does not go with flip=True",
        ),
        ({"pool": "mean"}, "Unknown pool 'mean'"),
        ({"dtype": "float16"}, "Unknown dtype 'float16'"),
        ({"compile": "always"}, "compile is 'always', but must be True, False or 'auto'"),
    ],
)
def test_arguments_that_cannot_be_met_are_refused_before_anything_is_computed(resnet, arguments, message):
    with pytest.raises(ValueError, match=message):
        FrozenNetwork(resnet, device="cpu", **arguments)


class Odd(nn.Module):
    """Layers whose outputs cannot become rows."""

    def __init__(self):
        super().__init__()
        self.pair, self.idle = nn.LSTM(3, 4, batch_first=True), nn.Linear(3, 4)
        self.batch, self.fc = nn.Flatten(0, 1), nn.Linear(3, 4)

    def forward(self, x):
        self.batch(x)
        self.pair(x.mean(3).mT)
        return self.fc(x.mean((2, 3)))


def test_layers_without_a_row_for_each_image_are_refused():
    for layer, message in (
        ("pair", "A layer gives tuple, but must give maps"),
        ("idle", "Layer 'idle' takes no part in the forward pass"),
        ("batch", r"Layer 'batch' gives \(6, 8\) for 2 images"),
    ):
        with pytest.raises(ValueError, match=message):
            features(Odd(), images(8), layers=["fc", layer])
    with pytest.raises(ValueError, match=r"pool='gem' needs the maps .*Name the layer to pool"):
        FrozenNetwork(Odd(), device="cpu", pool="gem")
    with pytest.raises(ValueError, match=r"gives \(2, 3, 8, 8\) for 2 images.*Give a model that pools"):
        features(nn.ReLU(), images(8))


def test_a_short_job_is_not_compiled(resnet):
    with FrozenNetwork(resnet, device="cpu", compile="auto", num_images=1000) as network:
        network.prepare(images(32, 2))
        assert network.facts["compiled"] is None and "compile_s" not in network.measured


@pytest.mark.slow
def test_compiling_gives_the_same_features_for_batches_of_any_size(resnet):
    pixels = images(32, 6)
    with FrozenNetwork(
        resnet, device="cpu", dtype="float32", compile=True, layers=["stage2", "embedding"]
    ) as network:
        network.prepare(pixels[:4])
        assert network.facts["compiled"] == [4, 3, 32, 32] and str(network).endswith("compiled")
        whole, part, choice = network(pixels[:4]), network(pixels[4:]), network.facts
    expected = plain(resnet, pixels)
    assert_within(torch.cat([whole["embedding"], part["embedding"]]), expected)
    with FrozenNetwork(resnet, device="cpu", layers=["stage2", "embedding"], choice=choice) as network:
        network.prepare(pixels[:1])
        assert torch.equal(network(pixels[:4])["stage2"], whole["stage2"])


@pytest.mark.slow
def test_a_long_job_is_compiled_only_if_that_is_faster_and_needs_no_compiler(resnet):
    with FrozenNetwork(resnet, device="cpu", compile="auto", num_images=10**9) as network:
        network.prepare(images(32, 4))
        assert (network.facts["compiled"] is not None) == (network.measured["compiled_speedup"] > 1)
    for compile in ("auto", True):
        torch._dynamo.reset()
        pixels = images(40, 5)  # of a shape that no cache holds
        with (
            torch._inductor.config.patch({"cpp.cxx": ("/nowhere/c++",)}),
            FrozenNetwork(resnet, device="cpu", compile=compile, num_images=10**9) as network,
        ):
            if compile is True:
                with pytest.raises(RuntimeError, match="compile=True cannot be met.*Use compile='auto'"):
                    network.prepare(pixels)
            else:
                assert network.prepare(pixels)["compiled"] is None


def test_a_batch_is_begun_before_the_rows_of_the_former_are_waited_for(monkeypatch):
    """So a card has work while rows are written; their order, and the last batch, are as without."""
    events, begin = [], FrozenNetwork.begin

    def watched(network, pixels):
        number = sum(what == "begin" for what, _ in events)
        events.append(("begin", number))
        wait = begin(network, pixels)

        def watched_wait():
            events.append(("wait", number))
            return wait()

        return watched_wait

    monkeypatch.setattr(FrozenNetwork, "begin", watched)
    pixels = list(torch.arange(7.0).reshape(7, 1, 1, 1).expand(7, 3, 2, 2))
    options = {"dtype": "float32", "num_workers": 0, "progress": False}
    found = extract(nn.Flatten(), pixels, batch_size=3, transform=nn.Identity(), **options)
    assert found.values[:, 0].tolist() == list(range(7))
    assert events == [(what, i) for what, i in zip(
        ["begin", "begin", "wait", "begin", "wait", "wait"], [0, 1, 0, 2, 1, 2], strict=True
    )]  # fmt: skip


def test_what_is_begun_twice_is_not_mixed_up(resnet):
    first, second = images(num_images=2), images(num_images=5)[2:]
    with FrozenNetwork(resnet, device="cpu", dtype="float32", flip=True) as network:
        waits = [network.begin(pixels) for pixels in (first, second)]
        for wait, pixels in zip(waits, (first, second), strict=True):
            assert torch.equal(wait()["embedding"], network(pixels)["embedding"])


class OneBuffer(nn.Module):
    """Gives all features in the same memory, as exported and hand-optimised networks do."""

    def __init__(self):
        super().__init__()
        self.rows = torch.zeros(8, 3)

    def forward(self, x):
        return torch.mean(x, (2, 3), out=self.rows[: len(x)])


@pytest.mark.parametrize("flip", [False, True])
def test_a_network_that_uses_its_memory_again_changes_no_row(flip):
    batches = [torch.rand(4, 3, 2, 2) for _ in range(3)]
    with FrozenNetwork(OneBuffer(), device="cpu", flip=flip) as network:
        begun = [network.begin(batch) for batch in batches]
        for batch, wait in zip(batches, begun, strict=True):
            torch.testing.assert_close(wait()["embedding"], batch.mean((2, 3)))
