import dataclasses
import math

import pytest
import torch

from mocohub.pretrain import meters
from mocohub.pretrain.meters import CheatingAlarm, Meters, chance_loss, queue_ages
from mocohub.pretrain.moco import StepResult
from mocohub.pretrain.recipe import Recipe
from mocohub.pretrain.recipes import moco_r50_in1m, moco_tiny_cifar10, moco_tiny_digits

CPU = torch.device("cpu")


def result(loss: float, accuracy: float) -> StepResult:
    return StepResult(torch.tensor(loss), torch.tensor(accuracy))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds; the test moves it."""
    now = [100.0]
    monkeypatch.setattr(meters, "perf_counter", lambda: now[0])
    return now


def test_a_line_holds_the_means_of_its_steps_and_comes_every_n_steps_and_at_the_end() -> None:
    recipe = Recipe(steps=7, queue_size=1000, global_batch_size=300)
    meter = Meters(recipe, 4, CPU, log_every_steps=3, start_step=0)
    lines = [meter.add(result(step, step / 10), 0.5 / step, num_broken=step) for step in range(1, 8)]
    assert [bool(line) for line in lines] == [False, False, True, False, False, True, True]
    kept = [
        {name: line[name] for name in ("step", "epoch", "loss", "lr", "num_broken")} for line in lines if line
    ]
    assert kept == [
        {"step": 3, "epoch": 0.75, "loss": 2.0, "lr": 0.5 / 3, "num_broken": 3},
        {"step": 6, "epoch": 1.5, "loss": 5.0, "lr": 0.5 / 6, "num_broken": 6},
        {"step": 7, "epoch": 1.75, "loss": 7.0, "lr": 0.5 / 7, "num_broken": 7},
    ]
    assert [line["pretext_accuracy"] for line in lines if line] == pytest.approx([0.2, 0.5, 0.7])
    assert lines[2]["chance_loss"] == math.log(1001)


def test_a_resumed_run_goes_on_counting() -> None:
    meter = Meters(Recipe(steps=20), 10, CPU, log_every_steps=5, start_step=13)
    assert meter.add(result(1, 1), 0.1) is None
    assert meter.add(result(1, 1), 0.1)["step"] == 15


def test_a_stream_of_unknown_length_has_steps_but_no_epochs() -> None:
    line = Meters(Recipe(steps=1), None, CPU, log_every_steps=5, start_step=0).add(result(1, 1), 0.1)
    assert line["step"] == 1 and line["epoch"] is None


def test_speed_and_waiting_count_the_time_between_lines_without_pauses(clock: list[float]) -> None:
    def slow_loader() -> iter:
        for batch in range(4):
            clock[0] += 0.5  # the loader is waited for
            yield batch

    meter = Meters(Recipe(steps=4, global_batch_size=64), 4, CPU, log_every_steps=2, start_step=0)
    lines, seen = [], []
    for batch in meter.watch(slow_loader()):
        seen.append(batch)
        clock[0] += 1.5  # the step
        if batch == 0:
            with meter.paused():
                clock[0] += 1000  # an evaluation
        lines.append(meter.add(result(1, 1), 0.1))
    assert seen == [0, 1, 2, 3]
    assert [line["images_per_s"] for line in lines if line] == [32.0, 32.0]  # 2 x 64 images in 2 x 2 s
    assert [line["data_wait_share"] for line in lines if line] == [0.25, 0.25]


class Unread(torch.Tensor):
    """A value that raises when the host reads it, as if that would wait for a card."""

    reading = False

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN206
        if function in (
            torch.Tensor.item,
            torch.Tensor.tolist,
            torch.Tensor.__float__,
            torch.Tensor.__bool__,
        ):
            assert cls.reading, "read before a line is due"
        return super().__torch_function__(function, types, args, kwargs or {})


def test_what_a_step_reports_is_not_read_before_a_line_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meters(Recipe(steps=9), 9, CPU, log_every_steps=3, start_step=0)
    value = torch.tensor(2.0).as_subclass(Unread)
    with pytest.raises(AssertionError, match="read before"):
        float(value)
    for _ in range(2):
        assert meter.add(StepResult(value, value), 0.1) is None
    monkeypatch.setattr(Unread, "reading", True)
    assert meter.add(StepResult(value, value), 0.1)["loss"] == 2.0


def test_memory_is_this_processs_peak_and_never_falls() -> None:
    meter = Meters(Recipe(steps=3), 3, CPU, log_every_steps=1, start_step=0)
    before = meter.add(result(1, 1), 0.1)["peak_memory_bytes"]
    block = bytearray(b"x") * 200_000_000
    during = meter.add(result(1, 1), 0.1)["peak_memory_bytes"]
    del block
    assert during >= before > 50_000_000  # torch alone takes more than that
    assert during > 200_000_000
    assert meter.add(result(1, 1), 0.1)["peak_memory_bytes"] >= during


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("queue_size", "batch"), [(16, 4), (10, 4), (4, 4), (3, 4), (65, 8)])
def test_the_ages_of_keys_are_those_of_a_queue_that_is_filled_step_by_step(
    queue_size: int, batch: int, symmetric: bool
) -> None:
    recipe = Recipe(queue_size=queue_size, global_batch_size=batch, symmetric=symmetric)
    made_at: list[int] = []
    for step in range(1, 30):
        made_at = (made_at + [step] * batch * (2 if symmetric else 1))[-queue_size:]
        ages = [step + 1 - made for made in made_at]
        oldest, mean = queue_ages(recipe, step)
        assert oldest == max(ages)
        assert mean == pytest.approx(sum(ages) / len(ages))


def test_only_a_queue_has_an_age() -> None:
    for mechanism, has_age in (("queue", True), ("end_to_end", False), ("memory_bank", False)):
        meter = Meters(Recipe(mechanism=mechanism, steps=1), 1, CPU, log_every_steps=1, start_step=0)
        line = meter.add(result(1, 1), 0.1)
        assert ("queue_age_steps" in line) == ("queue_mean_age_steps" in line) == has_age


@pytest.mark.parametrize(
    "changes",
    [
        {"mechanism": "queue", "queue_size": 50},
        {"mechanism": "memory_bank", "queue_size": 50},
        {"mechanism": "memory_bank", "queue_size": 50, "loss": "nce"},
        {"mechanism": "end_to_end", "global_batch_size": 32},
    ],
)
def test_chance_is_the_loss_when_all_candidates_look_alike(changes: dict) -> None:
    recipe = Recipe(**changes)
    candidates = 32 if recipe.mechanism == "end_to_end" else 51
    if recipe.loss == "nce":  # P(i|v) = 1 / M against K draws of noise, 1 / M each
        share = 1 / (1 + 50)
        expected = -math.log(share) - 50 * math.log(1 - share)
    else:
        expected = torch.nn.functional.cross_entropy(torch.zeros(1, candidates), torch.tensor([0])).item()
    assert chance_loss(recipe) == pytest.approx(expected, rel=1e-6)


# Logged by moco_tiny_cifar10 and moco_tiny_digits on two CPU cores: (step, loss, contrast accuracy), or
# (step, kNN accuracy). The first accuracies are those against the random vectors a queue starts with.
CIFAR10 = [(10, 6.2, 0.107), (20, 7.75, 0.004), (30, 7.32, 0.021), (40, 6.77, 0.044), (100, 6.03, 0.119)]
CIFAR10 += [(190, 5.94, 0.16), (280, 5.93, 0.174), (460, 5.71, 0.166), (550, 5.61, 0.188), (585, 0.481)]
CIFAR10 += [(630, 5.56, 0.174), (810, 5.23, 0.205), (990, 4.97, 0.241), (1170, 4.68, 0.296)]
DIGITS = [(10, 5.05, 0.111), (20, 6.52, 0.013), (30, 6.22, 0.031), (66, 0.794), (120, 4.89, 0.239)]
DIGITS += [(132, 0.817), (170, 4.93, 0.22), (198, 0.873), (264, 0.896), (330, 4.86, 0.23), (330, 0.904)]
DIGITS += [(396, 0.924), (430, 4.77, 0.177), (462, 0.941), (480, 4.75, 0.172), (528, 0.938)]
DIGITS += [(590, 4.73, 0.127), (594, 0.946), (640, 4.68, 0.105), (660, 0.941)]


def warnings(alarm: CheatingAlarm, rows: list[tuple]) -> dict[int, str]:
    """Step -> warning."""
    found = {}
    for step, *values in rows:
        if len(values) == 1:
            row = {"step": step, "knn_accuracy": values[0], "knn_chance": 0.1}
        else:
            row = {"step": step, "loss": values[0], "chance_loss": chance_loss(alarm.recipe)}
            row["pretext_accuracy"] = values[1]
        if warning := alarm.see(row):
            found[step] = warning
    return found


def test_ordinary_runs_raise_no_alarm() -> None:
    assert warnings(CheatingAlarm(moco_tiny_cifar10()), CIFAR10) == {}
    assert warnings(CheatingAlarm(moco_tiny_digits()), DIGITS) == {}
    # facebookresearch/moco, issue 38: MoCo v2 on ImageNet after 34 epochs; its kNN accuracy may well waver.
    imagenet = [(5000, 8.0, 0.4), (5000, 0.30), (170_000, 6.91, 0.768), (170_000, 0.25)]
    assert warnings(CheatingAlarm(moco_r50_in1m()), imagenet) == {}


def test_nearly_all_matched_raises_the_alarm_once_and_says_what_to_check() -> None:
    recipe = dataclasses.replace(moco_r50_in1m(), shuffle_bn=False)
    steps = [(step, 7.0, min(0.9995, step / 2000)) for step in range(100, 4000, 100)]
    found = warnings(CheatingAlarm(recipe), steps)
    assert list(found) == [2000]
    text = found[2000]
    assert "Contrast accuracy is 100.0 % among 65537 candidates at step 2000." in text
    assert "shuffle_bn is False" in text and "global batch of 256" in text and "bn_group_size is 32" in text


def test_knn_that_falls_while_contrast_accuracy_rises_raises_the_alarm() -> None:
    curve = [(500, 8.0, 0.5), (500, 0.2), (1000, 7.5, 0.8), (1000, 0.3), (1500, 7.2, 0.93), (1500, 0.29)]
    curve += [(2000, 7.1, 0.95), (2000, 0.24), (2500, 7.0, 0.96), (2500, 0.2)]
    found = warnings(CheatingAlarm(moco_r50_in1m()), curve)
    assert list(found) == [2000]
    assert "95.0 %" in found[2000] and "kNN accuracy fell from 30.0 to 24.0 %" in found[2000]


def test_knn_that_rises_or_wavers_beside_high_contrast_accuracy_raises_none() -> None:
    rising = [(500, 7.0, 0.95), (500, 0.2), (1000, 7.0, 0.97), (1000, 0.3), (1500, 7.0, 0.98), (1500, 0.28)]
    assert warnings(CheatingAlarm(moco_r50_in1m()), rising) == {}
    falling_together = [(300, 7.0, 0.5), (500, 7.0, 0.95), (500, 0.3), (1000, 7.0, 0.92), (1000, 0.2)]
    assert warnings(CheatingAlarm(moco_r50_in1m()), falling_together) == {}


def test_the_alarm_goes_off_well_below_where_it_went_on_and_can_go_on_again() -> None:
    accuracies = [0.5, 0.992, 0.985, 0.993, 0.98, 0.5, 0.6, 0.995]
    rows = [(1000 * i, 7.0, accuracy) for i, accuracy in enumerate(accuracies, 1)]
    assert list(warnings(CheatingAlarm(moco_r50_in1m()), rows)) == [2000, 8000]


def test_random_vectors_in_a_new_queue_raise_no_alarm() -> None:
    recipe = Recipe(queue_size=65536, global_batch_size=256)  # full after 256 steps
    alarm = CheatingAlarm(recipe)
    assert warnings(alarm, [(step, 3.0, 1.0) for step in range(10, 261, 10)]) == {}
    assert list(warnings(alarm, [(270, 3.0, 1.0)])) == [270]


def test_few_candidates_a_bank_and_a_collapsed_network_raise_none() -> None:
    easy = [(1000, 2.0, 1.0), (2000, 2.0, 1.0)]
    assert warnings(CheatingAlarm(Recipe(queue_size=16, global_batch_size=8)), easy) == {}
    assert warnings(CheatingAlarm(Recipe(mechanism="end_to_end", global_batch_size=256)), easy) == {}
    assert warnings(CheatingAlarm(Recipe(mechanism="memory_bank")), easy) == {}
    tied = [(1000, math.log(65537), 1.0), (2000, math.log(65537), 1.0)]
    assert warnings(CheatingAlarm(Recipe()), tied) == {}


def test_end_to_end_with_a_large_batch_is_watched_from_the_first_step() -> None:
    alarm = CheatingAlarm(Recipe(mechanism="end_to_end", global_batch_size=4096))
    assert "among 4096 candidates" in warnings(alarm, [(10, 1.0, 0.995)])[10]


def test_shown_the_old_lines_a_resumed_run_knows_its_best_knn() -> None:
    before, after = [(1000, 7.5, 0.8), (1000, 0.4)], [(2000, 7.0, 0.95), (2000, 0.3)]
    assert warnings(CheatingAlarm(moco_r50_in1m()), after) == {}
    resumed = CheatingAlarm(moco_r50_in1m())
    warnings(resumed, before)
    assert list(warnings(resumed, after)) == [2000]
