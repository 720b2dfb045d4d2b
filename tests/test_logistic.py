import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from mocohub.probes.linear import LinearProbe
from mocohub.probes.logistic import logistic_path

CS = [1e-3, 0.1, 1.0, 10.0, 1000.0]


def features(num=600, width=20, num_classes=4, dtype=np.float64):
    """Positive, shifted, and of scales that differ a thousandfold, as pooled activations are."""
    rng = np.random.default_rng(0)
    scales = np.logspace(0, -3, width)
    y = np.arange(num) % num_classes
    X = (rng.standard_normal((num, width)) + 0.7 * rng.standard_normal((num_classes, width))[y]) * scales
    return np.maximum(X @ np.linalg.qr(rng.standard_normal((width, width)))[0] + 0.5, 0).astype(dtype), y


def objective(X, y, C, coef, intercept):
    """scikit-learn's, divided by C N, in float64."""
    logits = X.astype(np.float64) @ coef.T.astype(np.float64) + intercept
    if logits.shape[1] == 1:
        logits = np.hstack([np.zeros_like(logits), logits])
    losses = logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]
    return losses.mean() + (coef.astype(np.float64) ** 2).sum() / (2 * C * len(y))


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_c_reaches_the_optimum_of_scikit_learn(num_classes, dtype):
    X, y = features(num_classes=num_classes, dtype=dtype)
    for fit in logistic_path(X, y, CS):
        other = LogisticRegression(C=fit.C, solver="newton-cg", tol=1e-9, max_iter=5000).fit(
            X.astype(float), y
        )
        best = objective(X, y, fit.C, other.coef_, other.intercept_)
        coef, intercept = fit.coef.numpy(), fit.intercept.numpy()
        assert fit.converged and coef.dtype == dtype
        assert objective(X, y, fit.C, coef, intercept) == pytest.approx(best, rel=1e-5)
        assert fit.objective == pytest.approx(best, rel=1e-4)
        np.testing.assert_allclose(coef, other.coef_, atol=0.01 * np.abs(other.coef_).max())
        assert intercept.shape == other.intercept_.shape


def test_a_tighter_tolerance_gives_the_coefficients_of_scikit_learn():
    X, y = features()
    (fit,) = logistic_path(X, y, [1.0], tol=1e-13)
    other = LogisticRegression(C=1.0, solver="newton-cg", tol=1e-11, max_iter=5000).fit(X, y)
    np.testing.assert_allclose(fit.coef, other.coef_, atol=1e-5)
    np.testing.assert_allclose(fit.intercept, other.intercept_, atol=1e-5)


def test_a_path_gives_what_each_c_alone_gives_in_the_order_asked_for():
    X, y = features()
    path = logistic_path(X, y, [10.0, 0.1, 10.0])
    assert [fit.C for fit in path] == [10.0, 0.1, 10.0]
    for fit in path:
        (alone,) = logistic_path(X, y, [fit.C])
        assert fit.objective == pytest.approx(alone.objective, rel=1e-5)


def test_starting_from_the_optimum_before_takes_fewer_iterations():
    X, y = features()
    together = sum(fit.num_iter for fit in logistic_path(X, y, np.logspace(-3, 3, 10)))
    alone = sum(logistic_path(X, y, [C])[0].num_iter for C in np.logspace(-3, 3, 10))
    assert together < alone


def test_the_intercept_is_not_penalised():
    X, y = features(num_classes=2)
    y[:200] = 0
    (fit,) = logistic_path(np.zeros_like(X), y, [1e-6])  # constant features: all that is left is the prior
    assert fit.coef.abs().max() == 0
    odds = np.mean(y == 1) / np.mean(y == 0)
    assert fit.intercept.item() == pytest.approx(np.log(odds), abs=5e-3)


def test_wide_features_are_preconditioned_by_their_variances(monkeypatch):
    monkeypatch.setattr("mocohub.probes.logistic._MAX_DENSE", 10)
    X, y = features()
    for fit in logistic_path(X, y, [0.1, 10.0]):
        other = LogisticRegression(C=fit.C, solver="newton-cg", tol=1e-9, max_iter=5000).fit(X, y)
        best = objective(X, y, fit.C, other.coef_, other.intercept_)
        assert fit.objective == pytest.approx(best, rel=1e-4)


def test_more_features_than_rows_are_no_harm():
    X, y = features(num=40, width=200)
    (fit,) = logistic_path(X, y, [1.0])
    other = LogisticRegression(C=1.0, solver="newton-cg", tol=1e-9, max_iter=5000).fit(X, y)
    assert fit.objective == pytest.approx(objective(X, y, 1.0, other.coef_, other.intercept_), rel=1e-5)


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("solve", ["path", "probe"])
def test_few_rows_are_solved_in_the_space_they_span_and_give_the_weights_of_all_features(num_classes, solve):
    X, y = features(num=40, width=200, num_classes=num_classes)
    X[20:] = X[:20]  # so that they span even less
    y[20:] = y[:20]
    X += 3
    if solve == "path":
        (fit,) = logistic_path(X, y, [10.0], tol=1e-11)
        coef, intercept = fit.coef, fit.intercept
    else:
        probe = LinearProbe("lbfgs", C=10.0).fit(X, y)
        coef, intercept = probe.coef_, probe.intercept_
    other = LogisticRegression(C=10.0, solver="newton-cg", tol=1e-12, max_iter=5000).fit(X, y)
    np.testing.assert_allclose(coef, other.coef_, atol=1e-5)
    np.testing.assert_allclose(intercept, other.intercept_, atol=1e-4)


def test_few_rows_of_many_features_take_the_time_of_few_features(monkeypatch):
    X, y = features(num=40, width=200)
    widths = []
    fit = LogisticRegression.fit
    monkeypatch.setattr(
        LogisticRegression, "fit", lambda self, X, y: widths.append(X.shape) or fit(self, X, y)
    )
    LinearProbe("lbfgs").fit(X, y)
    LinearProbe("lbfgs").fit(X[:, :60], y)
    assert widths == [(40, 40), (40, 60)]


@pytest.mark.parametrize("offset, scale", [(100.0, 1.0), (0.0, 1e6), (0.0, 1e-6), (0.0, 1e15)])
def test_features_far_from_zero_or_of_another_scale_reach_the_optimum(offset, scale):
    X, y = features()
    X = ((X + offset) * scale).astype(np.float32)
    for fit in logistic_path(X, y, np.array([1e-2, 1.0, 100.0]) / scale**2):
        centred = X.astype(np.float64) - X.mean(axis=0, dtype=np.float64)  # the intercept takes up the rest
        C = fit.C * scale**2
        other = LogisticRegression(C=C, solver="newton-cg", tol=1e-9, max_iter=5000).fit(centred / scale, y)
        best = objective(centred / scale, y, C, other.coef_, other.intercept_)
        assert fit.converged and fit.objective == pytest.approx(best, rel=1e-4)


def test_features_that_are_not_finite_are_refused():
    X, y = features()
    X[3, 3] = np.nan
    with pytest.raises(ValueError, match="X holds NaN or inf. Drop these images"):
        logistic_path(X, y, [1.0])


def test_half_precision_and_tensors_are_computed_in_float32():
    X, y = features(dtype=np.float16)
    (of_tensor,) = logistic_path(torch.tensor(X), torch.tensor(y), [1.0])
    (of_array,) = logistic_path(X.astype(np.float32), y, [1.0])
    assert torch.equal(of_tensor.coef, of_array.coef)


def test_a_fit_that_stops_early_says_so():
    message = r"before the optimum for C = 100. Increase max_iter \(2\)"
    with pytest.warns(ConvergenceWarning, match=message) as warned:
        (fit,) = logistic_path(*features(), [100.0], max_iter=2)
    assert warned[0].filename == __file__
    assert not fit.converged and fit.num_iter == 2


@pytest.mark.parametrize("Cs", [[0.0], [1.0, -1.0], [float("nan")], []])
def test_c_must_be_positive(Cs):
    with pytest.raises(ValueError, match="must be positive numbers"):
        logistic_path(*features(), Cs)


def test_labels_that_do_not_fit_are_refused():
    X, y = features()
    with pytest.raises(ValueError, match=r"X of shape \(600, 20\) must be \(N, D\) with N = 599 labels"):
        logistic_path(X, y[1:], [1.0])
    with pytest.raises(ValueError, match=r"Classes have \[150, 0, 300, 150\] rows"):
        logistic_path(X, np.where(y == 1, 2, y), [1.0])
    with pytest.raises(ValueError, match=r"Classes have \[600\] rows: two or more are needed"):
        logistic_path(X, y * 0, [1.0])
    for labels in (y - 1, y + 0.5, y.astype(str)):
        with pytest.raises(ValueError, match="must be .N,. integers from 0. np.unique"):
            logistic_path(X, labels, [1.0])
