"""How long one waits before anything happens: `import mocohub` and `mocohub --help`.

    python benchmarks/startup.py [--runs 7]

Each command is a fresh process; commands take turns, so that a slow moment of the machine hits all alike.
Goals: `import mocohub` with all public names at most 1.1 times `import torch, timm`; `mocohub --help` at most
0.5 s over a bare interpreter.
"""

import statistics
import subprocess
import sys
import time
from typing import Annotated

import tyro

EVERYTHING = "import mocohub; [getattr(mocohub, name) for name in mocohub.__all__]"
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "mocohub --help": [sys.executable, "-m", "mocohub", "--help"],
    "import mocohub": [sys.executable, "-c", "import mocohub"],
    "import torch, timm": [sys.executable, "-c", "import torch, timm"],
    "import mocohub, torch, timm": [sys.executable, "-c", "import mocohub, torch, timm"],
    "all public names of mocohub": [sys.executable, "-c", EVERYTHING],
}


def main(
    runs: Annotated[int, tyro.conf.arg(help="Measured runs of each command, after one to warm up.")] = 7,
) -> None:
    """Print the median, minimum and maximum wall time of each command, and the two ratios with goals."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for run in range(runs + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if run:
                seconds[name].append(time.perf_counter() - start)
    for name, of_name in seconds.items():
        print(f"{name:<30}{statistics.median(of_name):7.3f} s   ({min(of_name):.3f} to {max(of_name):.3f})")

    def report(what: str, over: str, under: str, goal: float | None, difference: bool = False) -> None:
        pairs = zip(seconds[over], seconds[under], strict=True)
        value = statistics.median(a - b if difference else a / b for a, b in pairs)
        print(f"{what:<44}{value:.2f}" + (f"   (goal: at most {goal})" if goal else ""))

    report(
        "import mocohub, torch, timm / torch, timm", "import mocohub, torch, timm", "import torch, timm", 1.1
    )
    report("all public names / torch, timm", "all public names of mocohub", "import torch, timm", None)
    report("mocohub --help - python -c pass (s)", "mocohub --help", "python -c pass", 0.5, difference=True)


if __name__ == "__main__":
    tyro.cli(main)
