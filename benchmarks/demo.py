"""What a newcomer waits for: wall time, peak memory and accuracy of `mocohub demo`, over several seeds.

    python benchmarks/demo.py [--runs 5]

Goals on two CPU cores: under 2 minutes, under 2 GB, and with one label per class at least 8 points over both
raw pixels and the untrained network.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import tyro


def main(runs: Annotated[int, tyro.conf.arg(help="Runs, each with a seed of its own.")] = 5) -> None:
    """Print one line for each run, then the medians."""
    seconds, margins, peak_kb = [], [], 0
    for seed in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "demo"
            command = [sys.executable, "-m", "mocohub", "demo", "--out", str(out), "--set", f"seed={seed}"]
            start = time.perf_counter()
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            with subprocess.Popen(command, start_new_session=True, **quiet) as process:
                while process.poll() is None:
                    peak_kb = max(peak_kb, _memory_kb(process.pid))
                    time.sleep(0.2)
            assert process.returncode == 0, "the demo failed"
            seconds.append(time.perf_counter() - start)
            results = json.loads((out / "results.json").read_text())["low_shot"]
        one_label = {name: 100 * rows[0]["mean"] for name, rows in results.items()}
        five_labels = {name: 100 * rows[1]["mean"] for name, rows in results.items()}
        margins.append(one_label["MoCo"] - max(v for name, v in one_label.items() if name != "MoCo"))
        print(f"seed {seed}: {seconds[-1]:.0f} s; 1 label {_line(one_label)}; 5 labels {_line(five_labels)}")
    print(f"wall time: median {statistics.median(seconds):.0f} s, largest {max(seconds):.0f} s (goal 120)")
    print(f"peak memory of all its processes, shared pages counted once: {peak_kb / 1e6:.2f} GB (goal 2)")
    print(f"margin at 1 label: median {statistics.median(margins):.1f}, smallest {min(margins):.1f} (goal 8)")


def _memory_kb(session: int) -> int:
    """Proportional set size of all processes of a session, from /proc (0 where there is none)."""
    total = 0
    for rollup in Path("/proc").glob("[0-9]*/smaps_rollup"):
        try:
            if os.getsid(int(rollup.parent.name)) == session:
                total += next(
                    int(line.split()[1]) for line in rollup.read_text().splitlines() if "Pss:" in line
                )
        except (OSError, StopIteration):
            continue
    return total


def _line(accuracies: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in accuracies.items())


if __name__ == "__main__":
    tyro.cli(main)
