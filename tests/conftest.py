"""The bench every test stands on: eight forced CPU devices, no network, checked types.

Set here, before anything imports JAX, so that subprocesses of tests inherit it.

* Shapes and types of pmd_jax are checked at run time: every annotated function and dataclass goes
  through jaxtyping and beartype. As for mypy, an int may stand where a float is asked for.
* Compiled programs are kept in pytest's cache, so that a second run skips most compilations.
* LLVM's expensive passes are off for the fast tests, most of whose time is compilation: a third of
  the CPU time of a first run. XLA's own passes, fusion among them, are as ever, and tests that are
  asked for by a marker (slow, parity, ...) run what a user runs.
"""

import os
import signal

os.environ["JAX_PLATFORMS"] = os.environ.get("PMD_TEST_PLATFORM", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["HF_HUB_OFFLINE"] = "1"

import jaxtyping
import pytest
from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
jaxtyping.install_import_hook("pmd_jax", f"{__name__}.typechecker")


def pytest_configure(config: pytest.Config) -> None:
    # What starts in the background of a shell ignores Ctrl-C, and so would all that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "not slow" in config.option.markexpr:
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    cache = getattr(config, "cache", None)  # absent under `-p no:cacheprovider`
    if cache is not None:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache.mkdir("jax"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
