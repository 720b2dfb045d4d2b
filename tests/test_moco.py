"""The step against trajectories that the authors' published module computed in float64.

`golden/*.safetensors` hold numbers only: losses, logits and final weights of four SGD steps of a ResNet-18
with one process of 8 images and with two processes of 8 images. The starting point is rebuilt here.
"""

import copy
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mocohub import distributed
from mocohub.backbones import create_backbone
from mocohub.pretrain.augment import Crops
from mocohub.pretrain.batchnorm import average_statistics, group_batch_norms
from mocohub.pretrain.data import Batch
from mocohub.pretrain.dictionary import Queue
from mocohub.pretrain.encoder import Encoder, projection_head
from mocohub.pretrain.moco import MoCo
from mocohub.pretrain.randomness import Draws

GOLDEN = Path(__file__).parent / "golden"
STEPS, LOCAL_BATCH, SIZE_PX, EMBED_DIM, QUEUE_SIZE = 4, 8, 64, 128, 64


class RecordingMoCo(MoCo):
    """Keeps the logits of every forward pass, which the step itself never holds."""

    def contrast(self, q: Tensor, k: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], dim=1) / self.temperature
        self.seen = [*getattr(self, "seen", []), logits.detach()]
        return super().contrast(q, k, negatives)


def golden_encoder() -> Encoder:
    """Weights drawn per parameter from a stream seeded by the SHA-256 of its torchvision name."""
    net = Encoder(create_backbone("r18"), projection_head("linear", 512, EMBED_DIM)).double()
    for name, parameter in net.named_parameters():
        name = name.removeprefix("backbone.").replace("head.", "fc.")
        if parameter.ndim == 1:
            batch_norm_weight = name.endswith("weight")
            nn.init.constant_(parameter, float(batch_norm_weight))
            continue
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        fan_in = parameter[0].numel()
        values = np.random.RandomState(seed).standard_normal(parameter.shape) * np.sqrt(2 / fan_in)
        parameter.data = torch.from_numpy(values)
    return net


def golden_images(step: int, view: int, rank: int) -> Tensor:
    stream = np.random.RandomState(1000 * step + 10 * rank + view)
    return torch.from_numpy(stream.standard_normal((LOCAL_BATCH, 3, SIZE_PX, SIZE_PX)))


def golden_order(step: int, num_images: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(77 + step).permutation(num_images))


def golden_queue() -> Queue:
    columns = torch.from_numpy(np.random.RandomState(5).standard_normal((EMBED_DIM, QUEUE_SIZE)))
    return Queue(nn.functional.normalize(columns, dim=0).T.contiguous())


def batch_of(x_q: Tensor, x_k: Tensor) -> Batch:
    return Batch(torch.arange(len(x_q)), Crops(x_q, None), Crops(x_k, None), [])


def train(golden_ranks: int, micro_batch_size: int | None = None) -> dict[str, Tensor]:
    """Four steps on the images of `golden_ranks` ranks, split over the processes that run this."""
    query = golden_encoder()
    key = copy.deepcopy(query)
    for encoder in (query, key):
        group_batch_norms(encoder, LOCAL_BATCH)
    optimizer = torch.optim.SGD(query.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    moco = RecordingMoCo(
        query, key, golden_queue(), optimizer, key_momentum=0.9, micro_batch_size=micro_batch_size
    )
    mine = torch.arange(golden_ranks).chunk(distributed.world_size())[distributed.rank()].tolist()
    out = {}
    for step in range(STEPS):
        x_q, x_k = (torch.cat([golden_images(step, view, r) for r in mine]) for view in (0, 1))
        moco.seen = []
        result = moco.step(batch_of(x_q, x_k), Draws(golden_order(step, golden_ranks * LOCAL_BATCH)))
        out[f"step{step}.loss"] = result.loss
        out[f"step{step}.logits"] = distributed.gather_rows(torch.cat(moco.seen))
    for name, encoder in (("encoder_q", query), ("encoder_k", key)):
        average_statistics(encoder)
        for entry, value in encoder.state_dict().items():
            out[f"{name}.{entry.removeprefix('backbone.').replace('head.', 'fc.')}"] = value
    return out | {"queue": moco.queue.embeddings, "queue_ptr": torch.tensor([moco.queue.pointer])}


def train_and_save(golden_ranks: int, micro_batch_size: int | None, path: Path) -> None:
    out = train(golden_ranks, micro_batch_size)
    save_file({name: value.contiguous() for name, value in out.items()}, f"{path}.{distributed.rank()}")


def assert_golden(out: dict[str, Tensor], ranks: int) -> None:
    golden = load_file(GOLDEN / f"r18_{ranks}rank{'s' if ranks > 1 else ''}.safetensors")

    def close(ours: Tensor, name: str) -> None:
        torch.testing.assert_close(ours, golden[name], rtol=1e-9, atol=1e-11, msg=lambda m: f"{name}: {m}")

    for step in range(STEPS):
        for r in range(ranks):
            rows = slice(r * LOCAL_BATCH, (r + 1) * LOCAL_BATCH)
            close(out[f"step{step}.logits"][rows], f"rank{r}.step{step}.logits")
            assert golden[f"rank{r}.step{step}.perm"].equal(golden_order(step, ranks * LOCAL_BATCH))
        mean_loss = torch.stack([golden[f"rank{r}.step{step}.loss"] for r in range(ranks)]).mean()
        torch.testing.assert_close(out[f"step{step}.loss"], mean_loss, rtol=1e-9, atol=0)
    close(out["queue"].T, "rank0.queue")
    assert out["queue_ptr"].equal(golden["rank0.queue_ptr"])
    for encoder in ("encoder_q", "encoder_k"):
        for entry in ("conv1.weight", "layer4.0.conv1.weight", "fc.weight"):
            close(out[f"{encoder}.{entry}"].flatten()[:256], f"rank0.{encoder}.{entry}")
        if (
            ranks == 1
        ):  # of several ranks the published code keeps the first one's statistics, we keep the mean
            for entry in ("bn1.running_mean", "bn1.running_var", "layer4.0.bn1.running_mean"):
                close(out[f"{encoder}.{entry}"].flatten()[:256], f"rank0.{encoder}.{entry}")
            floating = [v for k, v in out.items() if k.startswith(encoder) and v.is_floating_point()]
            close(torch.stack([v.norm() for v in floating]), f"rank0.{encoder}.norms")


def assert_same_step(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    assert ours.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def two_groups_on_one_process() -> dict[str, Tensor]:
    return train(2)


def test_one_process_reproduces_the_published_module_on_one_gpu() -> None:
    assert_golden(train(1), 1)


def test_one_process_with_two_groups_reproduces_the_published_module_on_two_gpus(
    two_groups_on_one_process: dict[str, Tensor],
) -> None:
    assert_golden(two_groups_on_one_process, 2)


def test_micro_batches_of_whole_groups_compute_the_same_step(
    two_groups_on_one_process: dict[str, Tensor],
) -> None:
    assert_same_step(train(2, micro_batch_size=LOCAL_BATCH), two_groups_on_one_process)


def test_two_processes_compute_the_same_step_and_the_published_one(
    tmp_path: Path, two_groups_on_one_process: dict[str, Tensor]
) -> None:
    run_ranks(train_and_save, 2, 2, None, tmp_path / "out")
    first, second = load_file(tmp_path / "out.0"), load_file(tmp_path / "out.1")
    assert_golden(first, 2)
    assert_same_step(first, two_groups_on_one_process)
    assert_same_step(second, first)


def test_the_first_key_update_changes_nothing_and_later_ones_move_towards_the_query() -> None:
    query = golden_encoder()
    key = copy.deepcopy(query)
    start = [p.clone() for p in key.parameters()]
    optimizer = torch.optim.SGD(query.parameters(), lr=0.1)
    moco = MoCo(query, key, golden_queue(), optimizer, key_momentum=0.75)
    images = golden_images(0, 0, 0)
    moco.step(batch_of(images, images), Draws(torch.arange(LOCAL_BATCH)))
    assert all(torch.equal(a, b) for a, b in zip(start, key.parameters(), strict=True))
    trained = [p.clone() for p in query.parameters()]
    moco.step(batch_of(images, images), Draws(torch.arange(LOCAL_BATCH)))
    for old, target, new in zip(start, trained, key.parameters(), strict=True):
        torch.testing.assert_close(new.data, 0.75 * old + 0.25 * target)


def test_a_loss_that_is_not_finite_stops_before_weights_and_queue_change() -> None:
    query = golden_encoder()
    moco = MoCo(query, copy.deepcopy(query), golden_queue(), torch.optim.SGD(query.parameters(), lr=0.1))
    before, weights = moco.queue.embeddings.clone(), [p.clone() for p in query.parameters()]
    images = golden_images(0, 0, 0)
    images[3, 0, 5, 5] = float("nan")
    with pytest.raises(FloatingPointError, match="nan"):
        moco.step(batch_of(images, images), Draws(torch.arange(LOCAL_BATCH)))
    assert moco.queue.embeddings.equal(before) and moco.queue.pointer == 0
    assert all(torch.equal(a, b) for a, b in zip(weights, query.parameters(), strict=True))


@pytest.mark.parametrize("poisoned", ["loss", "gradient"])
def test_where_steps_are_read_late_the_queue_stays_clean_and_the_next_step_or_settling_stops(
    poisoned: str,
) -> None:
    for stop in ("step", "settle"):
        query = golden_encoder()
        moco = MoCo(query, copy.deepcopy(query), golden_queue(), torch.optim.SGD(query.parameters(), lr=0.1))
        moco.reads_late = True  # as on a card
        images, order = golden_images(0, 0, 0), Draws(torch.arange(LOCAL_BATCH))
        moco.step(batch_of(images, images), order)
        before = moco.queue.embeddings.clone()
        if poisoned == "loss":
            bad = images.clone()
            bad[3, 0, 5, 5] = float("inf")
            moco.step(batch_of(bad, images), order)
        else:
            hook = query.head.weight.register_hook(lambda gradient: gradient * float("nan"))
            moco.step(batch_of(images, images), order)
            hook.remove()
        assert moco.queue.embeddings.equal(before)
        with pytest.raises(FloatingPointError, match="loss is nan|a gradient is not finite"):
            moco.settle() if stop == "settle" else moco.step(batch_of(images, images), order)
        assert moco.queue.embeddings.equal(before)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    query = group_batch_norms(golden_encoder(), LOCAL_BATCH)
    moco = MoCo(query, copy.deepcopy(query), golden_queue(), torch.optim.SGD(query.parameters(), lr=0.1))
    query.head.weight.register_hook(lambda gradient: gradient * float("nan"))
    before = {name: value.clone() for name, value in moco.state_tensors().items()}
    images = golden_images(0, 0, 0)
    with pytest.raises(FloatingPointError, match="a key or a gradient is not finite"):
        moco.step(batch_of(images, images), Draws(torch.arange(LOCAL_BATCH)))
    assert all(value.equal(before[name]) for name, value in moco.state_tensors().items())


def test_an_unknown_head_names_both_heads() -> None:
    with pytest.raises(ValueError, match=r"head 'mpl'.*linear .* mlp"):
        projection_head("mpl", 8)
