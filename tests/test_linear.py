import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.utils import check_random_state
from sklearn.utils.estimator_checks import parametrize_with_checks
from threadpoolctl import threadpool_limits
from torch import nn

from mocohub.probes.linear import LinearProbe

SOLVERS = ["sgd", "lbfgs"]


@pytest.fixture(autouse=True)
def one_thread():
    num = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other in problems as small as these
    with threadpool_limits(1):
        yield
    torch.set_num_threads(num)


def overlapping_classes(num_classes=3, num=90, width=6, dtype=np.float64):
    rng = np.random.default_rng(0)
    y = np.arange(num) % num_classes
    return (rng.standard_normal((num, width)) + rng.standard_normal((num_classes, width))[y]).astype(dtype), y


def slow_sgd(X, y, *, lr, epochs, milestones, batch, seed=0):
    """nn.Linear, torch.optim.SGD and autograd, visiting the rows in the order of the probe."""
    generator = torch.Generator().manual_seed(int(check_random_state(seed).randint(2**31)))
    X, y = torch.tensor(X), torch.tensor(y)
    linear = nn.Linear(X.shape[1], int(y.max()) + 1, dtype=X.dtype)
    nn.init.normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.SGD(linear.parameters(), lr=lr, momentum=0.9, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    for _ in range(epochs):
        for rows in torch.randperm(len(X), generator=generator).split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(linear(X[rows]), y[rows]).backward()
            optimizer.step()
        scheduler.step()
    return linear


@parametrize_with_checks([LinearProbe(), LinearProbe("lbfgs")])
def test_is_a_scikit_learn_classifier(estimator, check):
    check(estimator)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_paper_s_settings_equal_a_plain_torch_loop(num_classes):
    X, y = overlapping_classes(num_classes, num=300)
    probe = LinearProbe().fit(X, y)
    linear = slow_sgd(X, y, lr=30.0, epochs=100, milestones=[60, 80], batch=256)
    expected = linear(torch.tensor(X)).softmax(dim=1).detach().numpy()
    np.testing.assert_allclose(probe.predict_proba(X), expected, atol=1e-6)
    assert probe.n_iter_ == 100


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-9), (np.float32, 1e-5)])
def test_other_settings_equal_a_plain_torch_loop(dtype, tolerance):
    X, y = overlapping_classes(dtype=dtype)
    probe = LinearProbe(base_lr=3.2, epochs=10, global_batch_size=16, random_state=5).fit(X, y)
    linear = slow_sgd(X, y, lr=3.2 * 16 / 256, epochs=10, milestones=[6, 8], batch=16, seed=5)
    np.testing.assert_allclose(probe.coef_, linear.weight.detach().numpy(), atol=tolerance)
    np.testing.assert_allclose(probe.intercept_, linear.bias.detach().numpy(), atol=tolerance)
    assert probe.coef_.dtype == dtype


@pytest.mark.parametrize("num_classes", [2, 4])
def test_lbfgs_finds_the_optimum_of_another_solver(num_classes):
    X, y = overlapping_classes(num_classes)
    probe = LinearProbe("lbfgs", C=0.5).fit(X, y)
    other = LogisticRegression(C=0.5, solver="newton-cg", tol=1e-10, max_iter=1000).fit(X, y)
    np.testing.assert_allclose(probe.coef_, other.coef_, atol=2e-3)
    np.testing.assert_allclose(probe.predict_proba(X), other.predict_proba(X), atol=1e-3)
    np.testing.assert_allclose(probe.decision_function(X), other.decision_function(X), atol=2e-2)


def test_lbfgs_says_when_it_has_not_converged():
    X, y = overlapping_classes()
    with pytest.warns(ConvergenceWarning):
        LinearProbe("lbfgs", max_iter=2).fit(X, y)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_classes", [2, 3])
def test_two_classes_have_one_row_of_weights_and_three_have_three(solver, num_classes):
    X, y = overlapping_classes(num_classes)
    probe = LinearProbe(solver, epochs=2).fit(X, np.array(["ant", "bee", "cow"])[y])
    rows = 1 if num_classes == 2 else num_classes
    assert (probe.coef_.shape, probe.intercept_.shape) == ((rows, 6), (rows,))
    assert probe.decision_function(X).shape == ((90,) if num_classes == 2 else (90, 3))
    assert probe.predict_proba(X).shape == (90, num_classes)
    np.testing.assert_array_equal(probe.predict(X), probe.classes_[probe.predict_proba(X).argmax(axis=1)])


def test_the_seed_decides_the_weights_and_nothing_else_does():
    X, y = overlapping_classes()
    torch.manual_seed(1)
    first = LinearProbe(epochs=2, random_state=3).fit(X, y).coef_
    state = torch.get_rng_state()
    torch.manual_seed(2)
    np.testing.assert_array_equal(LinearProbe(epochs=2, random_state=3).fit(X, y).coef_, first)
    assert not np.array_equal(LinearProbe(epochs=2, random_state=4).fit(X, y).coef_, first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # fitting drew nothing from torch's own generator


def test_no_seed_gives_a_new_draw_each_time():
    X, y = overlapping_classes()
    probe = LinearProbe(epochs=1, random_state=None)
    assert not np.array_equal(probe.fit(X, y).coef_, probe.fit(X, y).coef_)


def test_probabilities_of_huge_logits_are_finite():
    X, y = overlapping_classes()
    shares = LinearProbe(epochs=2).fit(X, y).predict_proba(X * 1e6)
    assert np.isfinite(shares).all()
    np.testing.assert_allclose(shares.sum(axis=1), 1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_tensors_of_half_precision_give_what_float32_arrays_give(solver):
    X, y = overlapping_classes(dtype=np.float16)
    of_tensors = LinearProbe(solver, epochs=3).fit(torch.tensor(X), torch.tensor(y))
    of_arrays = LinearProbe(solver, epochs=3).fit(X.astype(np.float32), y)
    np.testing.assert_array_equal(of_tensors.coef_, of_arrays.coef_)
    assert of_tensors.score(torch.tensor(X), torch.tensor(y)) == of_arrays.score(X.astype(np.float32), y)


@pytest.mark.parametrize("solver", SOLVERS)
def test_bad_features_and_labels_are_refused(solver):
    X, y = overlapping_classes()
    probe = LinearProbe(solver, epochs=1).fit(X, y)
    with pytest.raises(ValueError, match="X has 5 features, but LinearProbe is expecting 6"):
        probe.predict(X[:, :5])
    with pytest.raises(ValueError, match=r"inconsistent numbers of samples: \[90, 80\]"):
        probe.fit(X, y[:80])
    with pytest.raises(ValueError, match="90 of 90 rows hold NaN or inf, the first is row 0"):
        probe.fit(X * np.nan, y)
    with pytest.raises(ValueError, match="90 of 90 labels are None"):
        probe.fit(X, [None] * 90)
    with pytest.raises(ValueError, match=r"Only one class in y \(7\): LinearProbe needs two or more"):
        probe.fit(X, np.full(90, 7))


def test_an_unknown_solver_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="Unknown solver 'sdg'. Choose one of: sgd, lbfgs"):
        LinearProbe("sdg").fit(*overlapping_classes())


@pytest.mark.parametrize(
    "setting", [{"epochs": 0}, {"global_batch_size": 0}, {"base_lr": 0.0}, {"base_lr": float("nan")}]
)
def test_settings_out_of_range_are_refused_by_name(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        LinearProbe(**setting).fit(*overlapping_classes())


def test_divergence_stops_with_the_learning_rate_and_the_scale_of_the_features():
    X, y = overlapping_classes(dtype=np.float32)
    with pytest.raises(RuntimeError, match=r"after epoch 2 with base_lr=30 .* Lower base_lr or scale"):
        LinearProbe().fit(X * 1e30, y)
