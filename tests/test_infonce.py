import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mocohub.pretrain.infonce import infonce


def unit_rows(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(n, 16, dtype=dtype), dim=1)


def by_logits(q: Tensor, k: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Equation 1 as it is written."""
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], dim=1) / temperature
    labels = torch.zeros(len(q), dtype=torch.long)
    return F.cross_entropy(logits, labels), (logits.argmax(1) == 0).to(q.dtype).mean()


@pytest.mark.parametrize("num_negatives", [1, 100, 4096, 10_000])
@pytest.mark.parametrize("temperature", [0.005, 0.07, 1.0])
def test_loss_accuracy_and_gradient_are_those_of_the_logits(num_negatives: int, temperature: float) -> None:
    torch.manual_seed(0)
    negatives, k = unit_rows(num_negatives), unit_rows(6)
    q = F.normalize(k + 0.3 * torch.randn_like(k), dim=1).requires_grad_()
    outcomes = []
    for function in (infonce, by_logits):
        loss, accuracy = function(q, k, negatives, temperature)
        outcomes.append((loss.detach(), accuracy, *torch.autograd.grad(3 * loss, q)))
    torch.testing.assert_close(*outcomes, rtol=1e-12, atol=1e-12)


def test_float32_is_as_exact_as_the_logits() -> None:
    torch.manual_seed(0)
    q, k, negatives = unit_rows(8), unit_rows(8), unit_rows(9000)
    exact = by_logits(q, k, negatives, 0.07)[0]
    ours = infonce(q.float(), k.float(), negatives.float(), 0.07)[0]
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("where", ["q", "k", "negatives"])
def test_numbers_that_are_not_finite_show_in_the_loss(where: str) -> None:
    torch.manual_seed(0)
    rows = {name: unit_rows(5) for name in ("q", "k", "negatives")}
    rows[where][2, 3] = float("nan")
    assert not infonce(**rows, temperature=0.2)[0].isfinite()
