import multiprocessing
import os
import signal
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
from torch.utils.data import DataLoader

from mocohub.pretrain import signals
from mocohub.pretrain.signals import SIGNALS, StopRequest, shield_worker


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_asks_to_stop_and_handlers_are_put_back(
    number: signal.Signals, capfd: pytest.CaptureFixture
) -> None:
    before = [signal.getsignal(other) for other in SIGNALS]
    with StopRequest() as stop:
        assert not stop.requested and stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.requested and stop.signal is number
    assert [signal.getsignal(other) for other in SIGNALS] == before
    assert f"{number.name}: saving at the next step" in capfd.readouterr().err


def test_a_second_interrupt_stops_at_once_and_the_handlers_are_put_back() -> None:
    before = [signal.getsignal(other) for other in SIGNALS]
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on after the second")
    assert [signal.getsignal(other) for other in SIGNALS] == before


def test_other_signals_after_the_first_ask_for_no_more(capfd: pytest.CaptureFixture) -> None:
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.signal is signal.SIGTERM
    assert capfd.readouterr().err.count("saving at the next step") == 1


def test_an_interrupt_that_torchrun_passes_on_as_well_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    now = [100.0]  # seconds; on a clock of its own, as two signals may be a second apart on a busy machine
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.9
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        now[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_nothing_is_installed() -> None:
    seen = []

    def use() -> None:
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.requested))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


class PidOfWorker:
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        if index == 0:
            for number in SIGNALS:  # as from a scheduler that signals all processes of a job
                os.kill(os.getpid(), number)
        return os.getpid()


def test_shielded_workers_outlive_a_signal_to_all_and_end_with_their_loader() -> None:
    rows = DataLoader(PidOfWorker(), batch_size=1, num_workers=1, worker_init_fn=shield_worker)
    pids = {int(pid) for pid in rows}
    assert len(pids) == 1 and os.getpid() not in pids
    deadline = time.monotonic() + 120  # the loader waits for 5 s only, and its SIGTERM is not heard
    while pids & {child.pid for child in multiprocessing.active_children()}:
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.05)


class PriorityOfWorker:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return os.nice(0)


@pytest.mark.parametrize(("yields", "niceness"), [(True, 19), (False, os.nice(0))])
def test_workers_beside_a_step_on_the_cpu_yield_to_it(yields: bool, niceness: int) -> None:
    init = partial(shield_worker, yields=yields)
    assert [int(n) for n in DataLoader(PriorityOfWorker(), num_workers=1, worker_init_fn=init)] == [niceness]
