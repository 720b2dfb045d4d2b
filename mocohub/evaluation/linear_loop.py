"""The loop of a linear classification: steps, validations, checkpoints, and what came of it."""

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mocohub import distributed
from mocohub.evaluation.guard import Guard
from mocohub.evaluation.heads import Heads
from mocohub.evaluation.labelled import Batch, Batches, Crops, loader, normalised
from mocohub.evaluation.linear_run import LinearRun
from mocohub.evaluation.protocols import LinearProtocol
from mocohub.features.network import FrozenNetwork
from mocohub.features.writer import EMBEDDING
from mocohub.pretrain.loop import Stopped
from mocohub.pretrain.signals import StopRequest
from mocohub.probes.knn import wilson
from mocohub.sources import ImageList

_LOOK_EVERY_STEPS = 10  # how often a card is asked for the loss, and processes on cards whether to stop
_BROKEN_PCT = 10.0  # more unreadable training images than this end the run
_TOP = 5


class Backbone:
    """A frozen network as a function from batches of crops to rows of features."""

    def __init__(self, network: FrozenNetwork, data_config: dict[str, Any], device: torch.device) -> None:
        """Keep the arguments; `network` is prepared."""
        self.network, self.width, self.device = network, network.columns[EMBEDDING], device
        self._data_config = data_config

    def __call__(self, batch: Batch) -> Tensor:
        """Return (n, D) float32 on the CPU; n may be 0."""
        if batch.pixels is None:
            return torch.empty(0, self.width)
        pixels = normalised(batch.pixels.to(self.device, non_blocking=True), self._data_config)
        return self.network(pixels)[EMBEDDING]


class Training:
    """The objects of one training, and where it stands. All ranks must call its methods."""

    def __init__(
        self,
        *,
        run: LinearRun,
        protocol: LinearProtocol,
        heads: Heads,
        backbone: Backbone,
        guard: Guard,
        train: ImageList,
        val: ImageList,
        loading: dict[str, Any],
    ) -> None:
        """Begin at step 0.

        Args:
            run: Where everything is written.
            protocol: What is done.
            heads: What is trained.
            backbone: Makes the features it is trained on.
            guard: Watches over the network of `backbone`.
            train: Labelled images.
            val: Labelled images.
            loading: `num_workers` and `pin_memory` of `labelled.loader`.
        """
        self.run, self.protocol, self.heads, self.backbone, self.guard = run, protocol, heads, backbone, guard
        self.train, self.val, self.loading = train, val, loading
        self.steps_per_epoch = -(-len(train) // protocol.global_batch_size)
        self.sums = self._no_sums()
        self.rows: list[dict[str, Any]] = []  # of log.jsonl, one for each epoch
        self.best: dict[str, Any] | None = None
        self.best_classifier: dict[str, Tensor] = {}
        self.broken: dict[int, str] = {}  # training images that this process could not read
        self.broken_val: dict[int, str] = {}  # validation images that any process could not read
        self.val_features, self.val_labels = torch.empty(0), torch.empty(0)

    def restore(self) -> int:
        """Go to the newest checkpoint of the run; return its step, 0 if there is none."""
        found = self.run.restore()
        if found is None:
            return 0
        state, tensors = found
        self.heads.parameters.copy_(tensors["parameters"])
        self.heads.velocity.copy_(tensors["velocity"])
        self.best_classifier = {name: t for name, t in tensors.items() if name.startswith("fc.")}
        self.sums = self.sums.new_tensor(state["sums"])
        self.rows, self.best = state["rows"], state["best"]
        self.broken = {error["id"]: error["reason"] for error in state["broken"]}
        return state["step"]

    def validate_on(self, crops: Crops, labels: list[int], stop: StopRequest) -> None:
        """Compute the features of the validation images, each once: those of this process's share.

        Raises:
            RuntimeError: If none of them can be read.
            Stopped: If some rank was asked to stop; what was saved stays as it is.
        """
        batches = loader(crops, Batches(len(crops), self.protocol.global_batch_size), **self.loading)
        rows, ids, broken = [], [], {}
        for batch in self._bar(batches, "validation images", len(batches)):
            rows.append(self.backbone(batch))
            ids += batch.ids
            broken |= dict(batch.errors)
            if distributed.any_rank(stop.requested):
                raise Stopped("Stopped before the first step that was to come. Go on with --resume auto.")
        self.val_features = torch.cat(rows)  # (n, D)
        self.val_labels = torch.tensor([labels[i] for i in ids], dtype=torch.int64)
        self.broken_val = _merged(broken)
        if len(self.broken_val) == len(self.val):
            path, reason = self.val.paths[0], self.broken_val[0]
            raise RuntimeError(
                f"None of {len(self.val)} validation images can be read, such as '{path}': {reason}."
            )

    def go(
        self, crops: Crops, batches: Batches, stop: StopRequest, save_every_steps: int | None = None
    ) -> None:
        """Take all steps that remain.

        Raises:
            RuntimeError: If the loss is not finite, the backbone changes, or too many images are unreadable.
            Stopped: After a save, if some rank was asked to stop.
        """
        total, checked = batches.total_steps, False
        for step, batch in enumerate(
            self._bar(loader(crops, batches, **self.loading), "linear", total, batches.start_step),
            batches.start_step,
        ):
            self._step(step, batch)
            done = step + 1
            at_end = done % self.steps_per_epoch == 0
            if at_end:
                if not checked:
                    self.guard.check()
                    checked = True
                self._end_epoch(done)
            stopping = done < total and self._stopping(done, stop)
            if at_end or stopping or (save_every_steps and done % save_every_steps == 0):
                self._save(done)
            if stopping:
                distributed.barrier()
                raise Stopped(f"Stopped after step {done} of {total}, saved. Go on with --resume auto.")

    def _step(self, step: int, batch: Batch) -> None:
        device = self.backbone.device
        labels = torch.tensor([self.train.labels[i] for i in batch.ids], dtype=torch.int64)
        features = self.backbone(batch).to(device)
        lrs = self.protocol.lrs(step, self.steps_per_epoch)
        counts = self.heads.step(features, labels.to(device), lrs)
        self.sums += torch.cat([counts.loss, counts.correct, counts.num_images[None]])
        self.broken |= dict(batch.errors)

    def _stopping(self, done: int, stop: StopRequest) -> bool:
        """Whether some rank was asked to stop; also whether the loss is finite, while we wait for it."""
        if self.backbone.device.type == "cuda" and done % _LOOK_EVERY_STEPS:
            return False
        self._refuse_non_finite(self.sums, done)
        return distributed.any_rank(stop.requested)

    def _refuse_non_finite(self, tensor: Tensor, done: int) -> None:
        if not tensor.isfinite().all():  # the same on all ranks
            lrs = self.protocol.lrs(done - 1, self.steps_per_epoch)
            raise RuntimeError(
                f"The loss is not finite at step {done} (lr {max(lrs):g}). Either the backbone's features "
                "are not, or the learning rate is too high for them: lower it (--lr), or use "
                "--precision float32."
            )

    def _end_epoch(self, done: int) -> None:
        """Validate, and write the line of this epoch."""
        self._refuse_non_finite(self.sums, done)
        loss, correct = self.sums[:-1].view(2, -1) / self.sums[-1]
        k = min(_TOP, self.heads.num_classes)
        top1, top5 = 100 * self.heads.num_correct(self.val_features, self.val_labels, k) / len(self.val)
        lrs = self.protocol.lrs(done - 1, self.steps_per_epoch)
        heads = [
            {
                "base_lr": base_lr,
                "lr": lrs[head],
                "train_loss": float(loss[head]),
                "train_top1_pct": 100 * float(correct[head]),
                "val_top1_pct": float(top1[head]),
                "val_top5_pct": float(top5[head]) if self.heads.num_classes > _TOP else None,
            }
            for head, base_lr in enumerate(self.protocol.base_lrs)
        ]
        head = int(top1.argmax())
        epoch = done // self.steps_per_epoch
        row = {"epoch": epoch, "step": done, "head": head, **heads[head]}
        self.rows.append({**row, "heads": heads} if len(heads) > 1 else row)
        if self.best is None or row["val_top1_pct"] > self.best["val_top1_pct"]:
            self.best, self.best_classifier = row, self.heads.classifier(head)
        num_broken = len(self.train) - int(self.sums[-1])
        self.sums = self._no_sums()
        self.broken = _merged(self.broken)
        if distributed.rank() == 0:
            errors = [
                {"split": split, "id": i, "path": images.paths[i], "reason": reason}
                for split, images, broken in (
                    ("train", self.train, self.broken),
                    ("val", self.val, self.broken_val),
                )
                for i, reason in broken.items()
            ]
            self.run.log(self.rows, errors)
        if num_broken > _BROKEN_PCT / 100 * len(self.train):
            raise RuntimeError(
                f"{num_broken} of {len(self.train)} training images cannot be read, more than "
                f"{_BROKEN_PCT:g} %. They are listed with reasons in {self.run.out / 'errors.jsonl'}."
            )

    def _save(self, done: int) -> None:
        self._refuse_non_finite(self.heads.parameters, done)
        broken = _merged(self.broken)
        if distributed.rank() == 0:
            state = {
                "epoch": done // self.steps_per_epoch,
                "sums": self.sums.tolist(),
                "rows": self.rows,
                "best": self.best,
                "broken": [{"id": i, "reason": reason} for i, reason in broken.items()],
            }
            tensors = {"parameters": self.heads.parameters, "velocity": self.heads.velocity}
            self.run.save(done, state, tensors | self.best_classifier)

    def finish(self) -> dict[str, Any]:
        """Prove that the backbone is what it was, write classifier and results; return the latter.

        Raises:
            RuntimeError: If a tensor of the backbone has changed.
        """
        self.guard.check()
        last = self.rows[-1]
        computed = self.backbone.network.facts["dtype"]
        text = self.protocol.text() + (f", features in {computed}" if computed != "float32" else "")
        found = {"best": self._validation(self.best), "last": self._validation(last)}
        which = self.protocol.reported.removesuffix("_epoch")
        results = {
            "protocol": text,
            "reported": found[which],
            **found,
            "heads": [self._validation({**last, **head}) for head in last.get("heads", [last])],
            "num_train": len(self.train),
            "num_val": len(self.val),
            "num_train_unreadable": len(self.broken),
            "num_val_unreadable": len(self.broken_val),
            "results": self._records(text, found, which),
        }
        if distributed.rank() == 0:
            classifier = self.best_classifier if which == "best" else self.heads.classifier(last["head"])
            about = {"classes": self.train.classes, "protocol": text, **found[which]}
            self.run.finish(results, classifier, about)
        distributed.barrier()
        return results

    def _validation(self, row: dict[str, Any]) -> dict[str, Any]:
        """What `LinearResult` tells of one validation."""
        return {
            "epoch": row["epoch"],
            "base_lr": row["base_lr"],
            "lr": row["base_lr"] * self.protocol.global_batch_size / 256,
            "top1_pct": row["val_top1_pct"],
            "top5_pct": row["val_top5_pct"],
        }

    def _records(self, text: str, found: dict[str, dict[str, Any]], which: str) -> list[dict[str, Any]]:
        """The numbers for cards: what the authors report, and the last epoch if that is another one."""
        records = []
        for name in dict.fromkeys((which, "last")):
            how = ["last epoch"] if name == "last" else ["best epoch, chosen on these validation images"]
            if len(self.protocol.base_lrs) > 1:
                lrs = f"best of {len(self.protocol.base_lrs)} learning rates"
                how.append(f"{lrs}, chosen on these validation images as that protocol does")
            if self.broken_val:
                how.append(f"{len(self.broken_val)} unreadable images count as wrong")
            for metric in ("top1", "top5"):
                if (value := found[name][f"{metric}_pct"]) is not None:
                    record = {
                        "dataset": self.run.facts["train"]["source"],
                        "split": self.run.facts["val"]["source"],
                        "num_images": len(self.val),
                        "metric": f"top-{metric[-1]} (%)",
                        "protocol": "; ".join([text, *how]),
                        "value": round(value, 2),
                        "interval": [round(100 * end, 2) for end in wilson(value / 100, len(self.val))],
                    }
                    records.append(record)
        return records

    def _no_sums(self) -> Tensor:
        """(2 H + 1,): loss and correct answers of each head, and images, in this epoch so far."""
        device = self.heads.parameters.device
        return torch.zeros(2 * len(self.heads.parameters) + 1, dtype=torch.float64, device=device)

    def _bar(self, batches: Any, what: str, total: int, done: int = 0) -> tqdm:
        quiet = True if distributed.rank() else None
        images = {"unit": "img", "unit_scale": self.protocol.global_batch_size}
        return tqdm(batches, desc=what, total=total, initial=done, disable=quiet, **images)


def _merged(broken: dict[int, str]) -> dict[int, str]:
    """What all ranks have found, in the order of the ids."""
    found: dict[int, str] = {}
    for part in distributed.gather_objects(broken):
        found |= part
    return dict(sorted(found.items()))
