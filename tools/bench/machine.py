"""The machine that a measurement ran on: what it is, what it can do, what the process held.

FLOP/s and bytes/s are measured in the same run as the workload, since machines are shared and data
sheets promise more than any program gets.
"""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


def seconds_of(run: Callable[[], Any], repeats: int = 5) -> float:
    """The median of `repeats` timed runs after one that is not, in seconds."""
    jax.block_until_ready(run())
    return statistics.median(timed(run) for _ in range(repeats))


def timed(run: Callable[[], Any]) -> float:
    """Seconds until the result of one run is there."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def roofline(dtype: Any) -> dict[str, float]:
    """FLOP/s of a large matrix product in `dtype`, and bytes/s of a copy (read and written)."""
    on_cpu = jax.default_backend() == "cpu"
    side, elements = (2048, 2**26) if on_cpu else (8192, 2**29)
    a = jax.random.normal(jax.random.key(0), (side, side), dtype)
    multiply = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
    x = jnp.zeros(elements, jnp.float32 if on_cpu else jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    return {
        "flops_per_second": 2 * side**3 / seconds_of(lambda: multiply(a)),
        "bytes_per_second": 2 * x.nbytes / seconds_of(lambda: copy(x)),
    }


def describe() -> dict[str, Any]:
    """Hardware and versions."""
    device = jax.devices()[0]
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    found = {name: _version(name) for name in names}
    hardware = device.device_kind if device.platform != "cpu" else _cpu_name()
    return {
        "hardware": f"{jax.device_count()} x {hardware}",
        "platform": device.platform,
        "python": platform.python_version(),
        "versions": {name: v for name, v in found.items() if v},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or "CPU"


def memory_lacked(error: Exception) -> str:
    """What was too large for the device's memory; "" for an error of another kind.

    XLA tells it under several names: where its tuning of kernels found no room, as NOT_FOUND.
    """
    text = str(error)
    if not re.search("RESOURCE_EXHAUSTED|out of memory", text, re.IGNORECASE):
        return ""
    told = re.search(r"allocat(?:e|ing) (\d[\d.]* ?(?:[KMGT]?i?B|bytes))", text)
    return f"an allocation of {told[1]} failed" if told else "the device's memory is too small"


def peak_bytes() -> int:
    """The most that this process held so far: of the device's memory, else of the host's.

    It never falls, so where a process measures several things it belongs to the first.
    """
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
