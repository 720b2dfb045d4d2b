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

    def paired(over: str, under: str, combine) -> float:  # noqa: ANN001
        return statistics.median(combine(a, b) for a, b in zip(seconds[over], seconds[under], strict=True))

    base = "import torch, timm"
    print(
        f"mocohub, torch, timm / {base}: {paired('import mocohub, torch, timm', base, lambda a, b: a / b):.2f} (goal 1.10)"
    )
    print(f"all public names / {base}: {paired('all public names of mocohub', base, lambda a, b: a / b):.2f}")
    print(
        f"--help over python: {paired('mocohub --help', 'python -c pass', lambda a, b: a - b):.2f} s (goal 0.50)"
    )


if __name__ == "__main__":
    tyro.cli(main)
