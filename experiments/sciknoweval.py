"""Procedural Memory Distillation on science questions: SciKnowEval, or the embedded scicalc.

    python -m experiments.sciknoweval --config configs/quickstart.py
    python -m experiments.sciknoweval --config configs/sciknoweval.py:chemistry \\
        --config.model.path=Qwen/Qwen3-8B
"""

import sys

from experiments.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__ or ""))
