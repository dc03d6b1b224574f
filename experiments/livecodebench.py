"""Procedural Memory Distillation on programming problems: LiveCodeBench, or the embedded minicode.

    python -m experiments.livecodebench --config configs/minicode.py
    python -m experiments.livecodebench --config configs/livecodebench.py \\
        --config.task.path=data/livecodebench --config.task.judge.sandbox.require=isolated

What the model writes is run in a sandbox; its protections are the first line that a run prints.
"""

import sys

from experiments.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__ or ""))
