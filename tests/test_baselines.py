"""The paper's two other mechanisms against references that are slow, plain, and written from the papers."""

import copy
from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mocohub import distributed
from mocohub.backbones import create_backbone
from mocohub.pretrain.augment import Crops
from mocohub.pretrain.baselines import EndToEnd, MemoryBankContrast
from mocohub.pretrain.batchnorm import group_batch_norms
from mocohub.pretrain.data import Batch
from mocohub.pretrain.dictionary import MemoryBank
from mocohub.pretrain.encoder import Encoder, projection_head
from mocohub.pretrain.moco import MoCo
from mocohub.pretrain.randomness import Draws, permutation

BATCH, GROUP, IMAGES, DIM, STEPS, TAU, LR = 16, 4, 40, 8, 3, 0.2, 0.1
NEGATIVES = 24


def encoder() -> Encoder:
    torch.manual_seed(0)
    net = create_backbone("r18tiny", layers=[1, 1, 1, 1], stem_chs=4, channels=[4, 4, 4, 4])
    return Encoder(net, projection_head("linear", 4, DIM)).double()


def images(step: int, view: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + view)
    return torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)


def ids(step: int) -> Tensor:
    return permutation(1, "ids", step, IMAGES)[:BATCH]


def shuffle(step: int) -> Tensor:
    return permutation(2, "shuffle", step, BATCH)


def negatives(step: int) -> Tensor:
    return torch.randint(IMAGES, (NEGATIVES,), generator=torch.Generator().manual_seed(step))


def bank() -> MemoryBank:
    drawn = MemoryBank.random(IMAGES, DIM, 0.5, torch.Generator().manual_seed(3))
    drawn.entries = drawn.entries.double()
    return drawn


def sgd(*encoders: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for e in encoders for p in e.parameters()], lr=LR, momentum=0.9)


def local_batch(step: int, x_q: Tensor, x_k: Tensor) -> Batch:
    q, k, i = (rows.chunk(distributed.world_size())[distributed.rank()] for rows in (x_q, x_k, ids(step)))
    return Batch(i, Crops(q, None), Crops(k, None), [])


def train(mechanism: str, micro_batch_size: int | None = None, **settings: bool | str) -> dict[str, Tensor]:
    """Three steps of ours, on however many ranks call this: losses, accuracies and the whole state."""
    query = group_batch_norms(encoder(), GROUP)
    settings |= {"temperature": TAU, "micro_batch_size": micro_batch_size}
    if mechanism == "end_to_end":
        key = copy.deepcopy(query)
        moco: MoCo = EndToEnd(query, key, sgd(query, key), **settings)
    else:
        moco = MemoryBankContrast(query, bank(), sgd(query), **settings)
    out = {}
    for step in range(STEPS):
        draws = Draws(shuffle(step), shuffle(step + 100), negatives(step))
        result = moco.step(local_batch(step, images(step, 0), images(step, 1)), draws)
        out |= {f"loss{step}": result.loss, f"accuracy{step}": result.accuracy}
    moco.settle()
    return {name: value.clone() for name, value in (out | moco.state_tensors()).items()}


def in_groups(net: Encoder, x: Tensor) -> Tensor:
    """Plain batch norm, one group after the other, as separate GPUs would."""
    return torch.cat([net(group) for group in x.split(GROUP)])


def shuffled(net: Encoder, x: Tensor, order: Tensor) -> Tensor:
    embedded = in_groups(net, x[order])
    return torch.stack([embedded[(order == i).nonzero().item()] for i in range(BATCH)])


def reference_end_to_end(symmetric: bool = False) -> dict[str, Tensor]:
    query, key = encoder().train(), encoder().train()
    optimizer = sgd(query, key)
    out = {}
    for step in range(STEPS):
        views = images(step, 0), images(step, 1)
        directions = [(*views, shuffle(step))]
        if symmetric:
            directions.append((*views[::-1], shuffle(step + 100)))
        losses = []
        for x_q, x_k, order in directions:
            q, k = in_groups(query, x_q), shuffled(key, x_k, order)
            each = []
            for i in range(BATCH):
                similarities = torch.stack([q[i] @ k[j] for j in range(BATCH)]) / TAU
                each.append(similarities.logsumexp(0) - similarities[i])
            losses.append(sum(each) / BATCH)
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        out[f"loss{step}"] = (sum(losses) / len(losses)).detach()
    parameters = {f"query.{n}": p.detach() for n, p in query.named_parameters()}
    return out | parameters | {f"key.{n}": p.detach() for n, p in key.named_parameters()}


def reference_memory_bank(loss: str) -> dict[str, Tensor]:
    net = encoder().train()
    optimizer, entries, constant, out = sgd(net), bank().entries.clone(), None, {}
    for step in range(STEPS):
        q, own = in_groups(net, images(step, 0)), entries[ids(step)]
        drawn = entries[negatives(step)]
        scores = torch.stack([torch.cat([own[i : i + 1], drawn]) @ q[i] / TAU for i in range(BATCH)]).exp()
        if constant is None:
            constant = scores.detach().mean() * IMAGES
        if loss == "nce":
            p, noise = scores / constant, 1 / IMAGES
            is_data = p / (p + NEGATIVES * noise)
            value = -(is_data[:, 0].log() + (1 - is_data[:, 1:]).log().sum(1)).mean()
        else:
            value = -(scores[:, 0] / scores.sum(1)).log().mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        for row, i in enumerate(ids(step).tolist()):
            mixed = 0.5 * entries[i] + 0.5 * q[row].detach()
            entries[i] = mixed / mixed.norm()
        out[f"loss{step}"] = value.detach()
    return out | {"bank": entries} | {f"query.{n}": p.detach() for n, p in net.named_parameters()}


def assert_contains(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    # An image's own entry may be drawn as a negative too: a tie, and rounding says who is first.
    tied = "bank" in ours
    for name, value in reference.items():
        if tied and name.startswith("accuracy"):
            continue
        torch.testing.assert_close(
            ours[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("micro_batch_size", [None, GROUP, 2 * GROUP])
def test_end_to_end_trains_both_encoders_as_a_plain_reference(
    symmetric: bool, micro_batch_size: int | None
) -> None:
    ours = train("end_to_end", micro_batch_size, symmetric=symmetric)
    assert_contains(ours, reference_end_to_end(symmetric))


@pytest.mark.parametrize("loss", ["infonce", "nce"])
@pytest.mark.parametrize("micro_batch_size", [None, GROUP])
def test_the_memory_bank_trains_as_a_plain_reference(loss: str, micro_batch_size: int | None) -> None:
    assert_contains(train("memory_bank", micro_batch_size, loss=loss), reference_memory_bank(loss))


def test_micro_batches_count_batch_norm_statistics_once() -> None:
    for mechanism, settings in (("end_to_end", {}), ("memory_bank", {"loss": "nce"})):
        whole, cut = train(mechanism, **settings), train(mechanism, GROUP, **settings)
        assert whole.keys() == cut.keys() and any("running_var" in name for name in whole)
        assert_contains(cut, whole)


def train_and_save(path: Path) -> None:
    for name, arguments in CASES.items():
        out = {key: value.contiguous() for key, value in train(**arguments).items()}
        save_file(out, f"{path}.{name}.{distributed.rank()}")


CASES = {
    "end_to_end": {"mechanism": "end_to_end"},
    "end_to_end_micro": {"mechanism": "end_to_end", "micro_batch_size": GROUP, "symmetric": True},
    "infonce": {"mechanism": "memory_bank"},
    "nce": {"mechanism": "memory_bank", "loss": "nce"},
}


def test_two_processes_compute_the_steps_of_one(tmp_path: Path) -> None:
    run_ranks(train_and_save, 2, tmp_path / "out")
    for name, arguments in CASES.items():
        one = train(**arguments)
        for rank in range(2):
            two = load_file(f"{tmp_path / 'out'}.{name}.{rank}")
            assert two.keys() == one.keys()
            assert_contains(two, one)


def test_an_image_shown_twice_in_a_batch_moves_its_entry_once_by_its_last_row() -> None:
    memory = MemoryBank(torch.eye(3), momentum=0.5)
    memory.update(torch.tensor([1, 2, 1]), torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 1]]))
    half = 0.5**0.5
    torch.testing.assert_close(memory.entries, torch.tensor([[1.0, 0, 0], [0, half, half], [half, 0, half]]))


@pytest.mark.parametrize("mechanism", ["end_to_end", "memory_bank"])
def test_what_is_not_finite_stops_before_weights_and_bank_change(mechanism: str) -> None:
    query = group_batch_norms(encoder(), GROUP)
    key = copy.deepcopy(query)
    moco = (
        EndToEnd(query, key, sgd(query, key))
        if mechanism == "end_to_end"
        else MemoryBankContrast(query, bank(), sgd(query))
    )
    before = {name: value.clone() for name, value in moco.state_tensors().items()}
    x = images(0, 0)
    x[3, 0, 2, 2] = float("inf")
    with pytest.raises(FloatingPointError, match="loss is nan"):
        moco.step(local_batch(0, x, images(0, 1)), Draws(shuffle(0), None, negatives(0)))
    assert all(value.equal(before[name]) for name, value in moco.state_tensors().items())
