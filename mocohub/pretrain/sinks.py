"""Where log lines go besides log.jsonl: TensorBoard and Weights & Biases. To be used by rank 0 alone."""

import importlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from mocohub.errors import missing_extra, unknown

SinkName = Literal["tensorboard", "wandb"]  # also the name of the package and of the extra

_LOG = logging.getLogger(__name__)


def check_sinks(names: Iterable[str]) -> None:
    """Refuse, before any work is done, sinks that do not exist, are not installed, or let nobody in.

    Raises:
        ValueError: If a name is not that of a sink.
        ImportError: If its package is missing; the message names the extra.
        RuntimeError: If Weights & Biases is to be online and refuses the login.
    """
    for name in names:
        if name not in _WRITERS:
            raise unknown("log sink", name, _WRITERS)
        try:
            package = importlib.import_module(name)
        except ImportError as error:
            raise missing_extra(name, name, f"Logging to {name}") from error
        if name == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
            try:
                package.login()
            except Exception as error:  # of whatever kind the package raises
                raise _cannot_start(name, error) from error


def open_sinks(
    names: Sequence[SinkName], out: Path, run_facts: Mapping[str, Any], start_step: int
) -> list["Sink"]:
    """Open the sinks of a run that starts, or goes on, in the folder `out`.

    Args:
        names: Checked by `check_sinks`. Any of "tensorboard" (files in `out`/tensorboard) and "wandb" (in
            `out`/wandb; the environment decides the rest: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, ...).
        out: The run folder, which must be there.
        run_facts: Recipe, data and versions, to be shown beside the curves.
        start_step: Steps taken before; what was logged of later ones is taken again.

    Raises:
        RuntimeError: If a sink cannot be opened.
    """
    return [Sink(name, out, run_facts, start_step) for name in names]


class Sink:
    """One place for log lines. Once opened it never ends a run: it fails with one warning, then is silent."""

    def __init__(self, name: SinkName, out: Path, run_facts: Mapping[str, Any], start_step: int) -> None:
        """Open it; see `open_sinks`."""
        self.name = name
        try:
            self._writer: _Writer | None = _WRITERS[name](out, run_facts, start_step)
        except Exception as error:
            raise _cannot_start(name, error) from error

    def log(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of a log line; "step" says which step they belong to."""
        if self._writer is not None:
            numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
            self._attempt(lambda: self._writer.log(numbers))

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._attempt(self._writer.close)
            self._writer = None

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a curve on a screen is not worth a run
            self._writer = None
            _LOG.warning(
                "Logging to %s failed and is off from here (%s: %s). The run goes on; see log.jsonl.",
                self.name,
                type(error).__name__,
                error,
            )


def _cannot_start(name: str, error: Exception) -> RuntimeError:
    remedy = "Run `wandb login`, set WANDB_MODE=offline, or train" if name == "wandb" else "Train"
    reason = str(error).strip().rstrip(".")
    return RuntimeError(
        f"Logging to {name} cannot start: {reason}. {remedy} without it: log.jsonl has all lines."
    )


class _Writer(Protocol):
    def log(self, numbers: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, out: Path, run_facts: Mapping[str, Any], start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what a run that died had written of steps which are now taken again.
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=start_step + 1)
        facts = "\n".join(f"    {line}" for line in json.dumps(run_facts, indent=2).splitlines())
        self._writer.add_text("run", facts, start_step)  # indented: Markdown shows it as it is

    def log(self, numbers: dict[str, float]) -> None:
        step = int(numbers["step"])
        for name, value in numbers.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a failure of its thread is seen here, and a killed run keeps its curve

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, out: Path, run_facts: Mapping[str, Any], start_step: int) -> None:
        import wandb

        id_file = out / "wandb-id.txt"  # a resumed run goes on with its curves
        if not id_file.is_file():
            id_file.write_text(uuid.uuid4().hex[:8] + "\n", encoding="ascii")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mocohub"),
            id=id_file.read_text(encoding="ascii").strip(),
            resume="allow",
            name=os.environ.get("WANDB_NAME", out.resolve().name),
            dir=str(out),
            config=dict(run_facts),
            settings=wandb.Settings(console="off"),
        )
        # Its own counter only goes up; steps that are taken again after a resume would be refused.
        self._run.define_metric("*", step_metric="step")

    def log(self, numbers: dict[str, float]) -> None:
        self._run.log(numbers)

    def close(self) -> None:
        self._run.finish()


_WRITERS: dict[str, type[_Writer]] = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}
