"""Procedural Memory Distillation (arXiv 2607.01480) in JAX.

One training step, and where each verb lives:
    attempt    rollout.py             the policy samples; its prompt never contains memory
    verify     tasks/verifiers.py     a verifier turns each response into a Verdict
    remember   memory/bank.py         attempts and verdicts become experience
    reflect    memory/reflection.py   the policy writes insights per problem
    abstract   memory/behaviors.py    insights of related problems become behaviors
    teach      memory/teacher.py      each rollout gets a teacher prompt that shows memory
    distill    distill/update.py      one fused student/teacher forward, divergence, update
`trainer.py` runs them in this order; nothing else sees memory and the policy together.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load_policy"]


def __getattr__(name: str) -> Any:
    """`pmd_jax.load_policy`, imported when asked for, so that memory and tasks stay free of JAX."""
    if name == "load_policy":
        from pmd_jax.policy.policy import load_policy

        return load_policy
    raise AttributeError(f"module 'pmd_jax' has no attribute {name!r}")
