import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.utils import check_random_state
from sklearn.utils.estimator_checks import parametrize_with_checks
from threadpoolctl import threadpool_limits
from torch import nn

from mocohub.probes.linear import LinearProbe, _held_out

SOLVERS = ["sgd", "lbfgs"]


@pytest.fixture(autouse=True)
def one_thread():
    with threadpool_limits(1):  # more only wait for each other in problems as small as these
        yield


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


@parametrize_with_checks(
    [
        LinearProbe(),
        LinearProbe("lbfgs"),
        LinearProbe(base_lr=[1.0, 10.0]),
        LinearProbe("lbfgs", C=[0.1, 1.0]),
    ]
)
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


def test_the_protocol_always_says_that_features_are_cached():
    X, y = overlapping_classes()
    known = "cached features are not the paper's protocol"
    assert known in " ".join(LinearProbe.__doc__.split()).lower()
    for probe in (LinearProbe(epochs=1), LinearProbe("lbfgs"), LinearProbe("lbfgs", C=[1, 2])):
        assert probe.protocol.endswith(known)
        assert probe.fit(X, y).protocol.endswith(known)
    assert LinearProbe().protocol.startswith(
        "linear, SGD lr 30 x batch / 256, weight decay 0, step schedule, 100 epochs, batch 256, "
    )
    probe = LinearProbe("lbfgs", C=[1e-9, 5.0])
    assert probe.protocol.startswith("logistic regression, C = a grid (best of 2 on held-out images)")
    chosen = probe.fit(X, y).best_params_["C"]
    assert probe.protocol.startswith(f"logistic regression, C = {chosen:g} (best of 2 on held-out images)")


def test_bfloat16_products_are_asked_for_and_named_in_the_protocol():
    X, y = overlapping_classes(num=180, dtype=np.float32)
    probe = LinearProbe(base_lr=[0.1, 1.0], epochs=5, precision="bfloat16").fit(X, y)
    assert "batch 256, products in bfloat16, cached features" in probe.protocol
    assert "bfloat16" not in LinearProbe().protocol
    assert "bfloat16" not in LinearProbe("lbfgs", precision="bfloat16").protocol
    plain = LinearProbe(base_lr=probe.best_params_["base_lr"], epochs=5).fit(X, y)
    assert probe.coef_.dtype == np.float32 and not np.array_equal(probe.coef_, plain.coef_)
    np.testing.assert_allclose(probe.coef_, plain.coef_, atol=0.01)
    with pytest.raises(ValueError, match="Unknown precision 'half'. Choose one of: float32, bfloat16"):
        LinearProbe(precision="half").fit(X, y)


def test_a_grid_of_learning_rates_is_decided_by_the_validation_set():
    X, y = overlapping_classes(num=180)
    X_val, y_val = X[90:], y[90:]
    grid = LinearProbe(base_lr=[1e-6, 1.0], weight_decay=[0.0, 1.0], epochs=5).fit(
        X[:90], y[:90], X_val, y_val
    )
    assert [list(score) for score in grid.validation_scores_] == [["base_lr", "weight_decay", "accuracy"]] * 4
    for score in grid.validation_scores_:
        accuracy, setting = score["accuracy"], {k: score[k] for k in ("base_lr", "weight_decay")}
        alone = LinearProbe(**setting, epochs=5).fit(X[:90], y[:90])
        assert alone.score(X_val, y_val) == accuracy
        if setting == grid.best_params_:  # trained on all of X already, and kept
            np.testing.assert_allclose(grid.coef_, alone.coef_, atol=1e-12)
            assert accuracy == max(s["accuracy"] for s in grid.validation_scores_)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_grid_of_c_is_decided_by_the_validation_set(num_classes):
    X, y = overlapping_classes(num_classes, num=180)
    probe = LinearProbe("lbfgs", C=[1e-3, 0.3, 100.0]).fit(X[:90], y[:90], X[90:], y[90:])
    for score in probe.validation_scores_:
        alone = LogisticRegression(C=score["C"], tol=1e-10, max_iter=1000).fit(X[:90], y[:90])
        assert score["accuracy"] == pytest.approx(alone.score(X[90:], y[90:]), abs=1 / 90)
    best = LogisticRegression(C=probe.best_params_["C"], tol=1e-8, max_iter=1000).fit(X[:90], y[:90])
    np.testing.assert_allclose(probe.predict_proba(X), best.predict_proba(X), atol=2e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_a_validation_set_a_share_is_held_out_and_the_winner_refit_on_all(solver):
    X, y = overlapping_classes(num=120)
    grid = {"sgd": {"base_lr": [0.01, 1.0], "epochs": 5}, "lbfgs": {"C": [1e-6, 1.0]}}[solver]
    probe = LinearProbe(solver, validation_fraction=0.25, **grid).fit(X, y)
    assert all(
        score["accuracy"] * 30 == pytest.approx(round(score["accuracy"] * 30))
        for score in probe.validation_scores_
    )
    alone = LinearProbe(solver, **{**grid, **{k: v for k, v in probe.best_params_.items()}}).fit(X, y)
    np.testing.assert_allclose(probe.coef_, alone.coef_, atol=1e-9)
    assert probe.n_iter_ == alone.n_iter_


def test_images_held_out_are_a_share_of_every_class_and_never_all_of_it():
    labels = np.repeat([0, 1, 2, 3], [40, 20, 2, 1])
    held_out = _held_out(labels, 0.3, seed=0)
    assert np.bincount(labels[held_out], minlength=4).tolist() == [12, 6, 1, 0]
    assert np.bincount(labels[_held_out(labels, 0.01, 0)], minlength=4).tolist() == [1, 1, 1, 0]
    assert np.array_equal(held_out, _held_out(labels, 0.3, seed=0))
    assert not np.array_equal(held_out, _held_out(labels, 0.3, seed=1))
    assert np.bincount(labels[_held_out(labels, 0.99, 0)], minlength=4).tolist() == [39, 19, 1, 0]
    with pytest.raises(ValueError, match="Every class has a single image, so that none can be held out"):
        LinearProbe("lbfgs", C=[1, 2]).fit(*overlapping_classes(num=3))


def test_a_setting_that_diverges_loses():
    X, y = overlapping_classes(dtype=np.float32)
    probe = LinearProbe(base_lr=[1e30, 1e-20], epochs=3).fit(X * 1e15, y)
    assert probe.validation_scores_[0]["accuracy"] == 0 and probe.best_params_["base_lr"] == 1e-20


def excess(probe, X, y):
    """How far the objective of scikit-learn is above its minimum, relative to it."""
    best = LogisticRegression(C=probe.C, solver="newton-cg", tol=1e-10, max_iter=5000).fit(X.astype(float), y)
    values = []
    for fitted in (probe, best):
        weights, biases = fitted.coef_.astype(float), fitted.intercept_.astype(float)
        logits = X.astype(float) @ weights.T + biases
        losses = logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]
        values.append(losses.sum() + (weights**2).sum() / (2 * probe.C))
    return values[0] / values[1] - 1


@pytest.mark.parametrize("num, dtype", [(24, np.float32), (24, np.float64), (200, np.float32)])
@pytest.mark.parametrize("C", [1.0, 100.0])
def test_the_optimum_is_reached_to_1e_4_whoever_solves_it(num, dtype, C, monkeypatch):
    random = np.random.default_rng(0)
    y = np.arange(num) % 3
    X = (random.normal(size=(3, 60))[y] / 2 + random.normal(size=(num, 60))).astype(dtype)
    probe = LinearProbe("lbfgs", C=C).fit(X, y)
    assert probe.coef_.dtype == probe.intercept_.dtype == dtype and abs(excess(probe, X, y)) < 1e-4
    monkeypatch.setattr("mocohub.probes.linear._LARGE", 1)
    ours = LinearProbe("lbfgs", C=C).fit(X, y)
    assert ours.coef_.dtype == ours.intercept_.dtype == dtype and abs(excess(ours, X, y)) < 1e-4
    assert np.array_equal(probe.coef_, ours.coef_) == (num > 60)  # else one is scikit-learn's


def test_validation_sets_that_do_not_fit_are_refused():
    X, y = overlapping_classes()
    probe = LinearProbe("lbfgs", C=[1, 2])
    with pytest.raises(ValueError, match="X_val and y_val belong together"):
        probe.fit(X, y, X)
    with pytest.raises(ValueError, match="X has 5 features, but LinearProbe is expecting 6"):
        probe.fit(X, y, X[:, :5], y)
    with pytest.raises(ValueError, match="X_val has 90 rows, but y_val 80 labels"):
        probe.fit(X, y, X, y[:80])
    with pytest.raises(ValueError, match=r"y_val has classes that y lacks: \[3, 4\]"):
        probe.fit(X, y, X[:3], [4, 3, 0])
    with pytest.raises(ValueError, match="90 of 90 rows hold NaN"):
        probe.fit(X, y, X * np.nan, y)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"base_lr": [1.0, -1.0]}, r"base_lr=\[1.0, -1.0\] must be positive"),
        ({"base_lr": []}, r"base_lr=\[\] must be positive"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be 0 or more"),
        ({"solver": "lbfgs", "C": 0.0}, "C=0.0 must be positive"),
        ({"solver": "lbfgs", "max_iter": 0}, "max_iter=0 must be"),
        ({"epochs": 2.5}, "epochs=2.5 must be a whole number, 1 or more"),
        ({"base_lr": [1.0, 2.0], "validation_fraction": 1.0}, "validation_fraction=1.0 must be between"),
        ({"schedule": "cos"}, "Unknown schedule 'cos'. Choose one of: cosine, step"),
        ({"device": "mps"}, "device 'mps' is not supported. Choose cpu or cuda"),
    ],
)
def test_settings_of_a_grid_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        LinearProbe(**setting).fit(*overlapping_classes())


def test_constant_features_predict_the_most_frequent_class():
    X, y = np.ones((90, 4)), np.repeat([0, 1], [60, 30])
    for probe in (LinearProbe(base_lr=1.0), LinearProbe("lbfgs")):
        assert (probe.fit(X, y).predict(X) == 0).all()
