"""What a run is measured by, one line of log.jsonl every n steps, and the alarm for batch-norm cheating."""

import math
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, TypeVar

import torch

from mocohub.pretrain.moco import StepResult
from mocohub.pretrain.recipe import Recipe

_Batch = TypeVar("_Batch")

# Batch-norm cheating, arXiv 1911.05722, A.9: without shuffling, the accuracy of the pretext task soon passes
# 99.9 % and the kNN monitor falls. Ordinary runs stay far away: 77 % after 34 epochs of MoCo v2 on ImageNet
# (facebookresearch/moco, issue 38) and after 40 of `moco_tiny_cifar10`, whose kNN accuracy rose to the end.
_SOLVED = 0.99  # contrast accuracy that is suspicious by itself ...
_MANY_CANDIDATES = 1000  # ... if the positive is one of at least so many
_HIGH = 0.9  # contrast accuracy that is suspicious once kNN accuracy falls
_FALL = 0.03  # of the kNN accuracy below its best: more than chance moves it on a thousand images,
_FALL_SHARE = 0.1  # and more than this share of what the best was above chance
_LEARNED = 0.9  # loss / chance loss below this: a network that collapsed may tie all candidates at chance


def chance_loss(recipe: Recipe) -> float:
    """Return the loss, in nats, of a network for which all candidates are equally likely.

    For NCE (arXiv 1805.01978, equation 7) these are K + 1 binary decisions at odds of 1 to K, and Z is right.
    """
    if recipe.mechanism == "end_to_end":
        return math.log(recipe.global_batch_size)
    num_negatives = recipe.queue_size
    chance = math.log(num_negatives + 1)
    return chance + num_negatives * math.log1p(1 / num_negatives) if recipe.loss == "nce" else chance


def queue_ages(recipe: Recipe, done_steps: int) -> tuple[int, float]:
    """Return how many steps ago the oldest key in the queue was made, and the mean over keys.

    As the next step sees it: keys of the last step taken are 1 step old. The random vectors that the queue
    started with are no keys. All keys of a step enter at once, those of both views if the loss is symmetric.
    """
    keys_per_step = recipe.global_batch_size * (1 + recipe.symmetric)
    num_keys = min(recipe.queue_size, done_steps * keys_per_step)
    whole, rest = divmod(num_keys, keys_per_step)  # steps whose keys are all there; keys of the one before
    return whole + bool(rest), (keys_per_step * whole * (whole + 1) / 2 + rest * (whole + 1)) / num_keys


class Meters:
    """Collects what steps report and gives a log line every n steps, without making anybody wait in between.

    On a card a step's loss is read only when a line is due, so the host may run ahead until then.
    """

    def __init__(
        self,
        recipe: Recipe,
        steps_per_epoch: int | None,
        device: torch.device,
        *,
        log_every_steps: int,
        start_step: int,
    ) -> None:
        """Start measuring.

        Args:
            recipe: Of the run.
            steps_per_epoch: None where the number of images is not known; lines then say no epoch.
            device: That of the encoders.
            log_every_steps: Steps between two lines.
            start_step: Number of steps taken before, 0 unless the run was resumed.
        """
        self.recipe, self.steps_per_epoch, self.device = recipe, steps_per_epoch, device
        self.log_every_steps, self.done_steps = log_every_steps, start_step
        self.total_steps = recipe.total_steps(steps_per_epoch)
        self.chance_loss = chance_loss(recipe)
        self._results: list[StepResult] = []
        self._since, self._waited_s = perf_counter(), 0.0

    def watch(self, batches: Iterable[_Batch]) -> Iterator[_Batch]:
        """Yield the loader's batches and measure how long each one was waited for."""
        self._since = perf_counter()
        iterator = iter(batches)
        while True:
            asked = perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited_s += perf_counter() - asked
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block, for instance an evaluation, out of images/s and the waiting share.

        On a card, steps that are still queued must have been waited for before (`MoCo.settle`).
        """
        began = perf_counter()
        yield
        self._since += perf_counter() - began

    def add(self, result: StepResult, lr: float, num_broken: int = 0) -> dict[str, Any] | None:
        """Take in one step, and return the fields of a log line if one is due.

        Args:
            result: Loss and accuracy of the step, kept as they are until a line is due.
            lr: The step's learning rate.
            num_broken: Images of this process that did not decode so far.

        Returns:
            Every `log_every_steps` steps and after the last one a row, otherwise None. Loss and accuracy are
            means over the steps since the row before. `images_per_s` counts all processes. `data_wait_share`
            is the share 0..1 of the time since then that this process waited for its loader: on a card an
            upper bound of what it costs, since queued work goes on. `peak_memory_bytes` is that of this
            process so far: allocated on the card; on a CPU resident, without the decoding processes.
        """
        self._results.append(result)
        self.done_steps += 1
        if self.done_steps % self.log_every_steps and self.done_steps != self.total_steps:
            return None
        num_steps = len(self._results)
        means = torch.stack([value for step in self._results for value in step]).view(num_steps, 2)
        loss, accuracy = means.double().mean(0).tolist()  # here the host waits for the card
        now = perf_counter()
        elapsed_s = max(now - self._since, 1e-9)
        row = {
            "step": self.done_steps,
            "epoch": self.done_steps / self.steps_per_epoch if self.steps_per_epoch else None,
            "loss": loss,
            "chance_loss": self.chance_loss,
            "pretext_accuracy": accuracy,
            "lr": lr,
            "images_per_s": round(num_steps * self.recipe.global_batch_size / elapsed_s, 1),
            "data_wait_share": round(min(1.0, self._waited_s / elapsed_s), 4),
            "peak_memory_bytes": _peak_memory_bytes(self.device),
            "num_broken": num_broken,
        }
        if self.recipe.mechanism == "queue":
            oldest, mean = queue_ages(self.recipe, self.done_steps)
            row |= {"queue_age_steps": oldest, "queue_mean_age_steps": round(mean, 2)}
        self._results, self._since, self._waited_s = [], now, 0.0
        return row


class CheatingAlarm:
    """Watches log lines for batch norm giving the answer away (arXiv 1911.05722, section 3.3 and A.9).

    It sounds when the contrast accuracy is close to 100 % with many candidates, or high and rising while the
    kNN monitor falls. Steps before the queue is full do not count, since random vectors are easily told from
    keys; nor does a memory bank, whose keys were never in the query's batch.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Watch a run of this recipe. After a resume, show it the log lines there are before new ones."""
        self.recipe = recipe
        queue = recipe.mechanism == "queue"
        self._num_candidates = recipe.queue_size + 1 if queue else recipe.global_batch_size
        self._full_after_steps = queue_ages(recipe, sys.maxsize)[0] if queue else 0
        self._last_step, self._accuracy = 0, 0.0
        self._best_knn, self._accuracy_at_best = -1.0, 0.0
        self._fell: str | None = None
        self._sounds = False

    def see(self, row: dict[str, Any]) -> str | None:
        """Take in the next line of log.jsonl and return a warning if it sets the alarm off.

        Args:
            row: With "step", and either "pretext_accuracy", "loss" and "chance_loss" (means over the steps
                since the last such line) or "knn_accuracy" and "knn_chance".
        """
        if self.recipe.mechanism == "memory_bank":
            return None
        if "pretext_accuracy" in row:
            of_full_queue, self._last_step = self._last_step >= self._full_after_steps, row["step"]
            learned = row["loss"] < _LEARNED * row["chance_loss"]
            self._accuracy = row["pretext_accuracy"] if of_full_queue and learned else 0.0
        if "knn_accuracy" in row:
            self._fell = self._fall(row["knn_accuracy"], row["knn_chance"])
        solved = self._accuracy >= (_HIGH if self._sounds else _SOLVED)  # goes off lower than it goes on
        sounds = (solved and self._num_candidates >= _MANY_CANDIDATES) or self._fell is not None
        goes_on, self._sounds = sounds and not self._sounds, sounds
        if not goes_on:
            return None
        r = self.recipe
        return (
            f"Contrast accuracy is {100 * self._accuracy:.1f} % among {self._num_candidates} candidates at "
            f"step {row['step']}{self._fell or ''}. Batch norm may be telling queries which key is theirs "
            f"(arXiv 1911.05722, A.9). Check that keys are shuffled (shuffle_bn is {r.shuffle_bn}) and that "
            f"the global batch of {r.global_batch_size} has several groups (bn_group_size is "
            f"{r.bn_group_size}). If so, the views are too easy to match: equal images, or too weak an "
            "augmentation."
        )

    def _fall(self, knn: float, chance: float) -> str | None:
        """Say how far kNN accuracy fell, if it fell and contrast accuracy is high and has risen meanwhile."""
        if knn >= self._best_knn:
            self._best_knn, self._accuracy_at_best = knn, self._accuracy
        fall = max(_FALL, _FALL_SHARE * (self._best_knn - chance))
        if (
            self._accuracy >= _HIGH
            and self._accuracy > self._accuracy_at_best
            and knn < self._best_knn - fall
        ):
            return f", and kNN accuracy fell from {100 * self._best_knn:.1f} to {100 * knn:.1f} %"
        return None


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
