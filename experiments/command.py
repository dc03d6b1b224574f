"""The command line that the experiments share: read, check, run, and one clear line on errors."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pmd_jax import settings

if TYPE_CHECKING:
    from pmd_jax.distributed import Cluster


def main(description: str, argv: Sequence[str] | None = None) -> int:
    """Runs `--config FILE[:ARG]`. The exit code says what a launcher should do.

    0: done, or saved on SIGTERM. 1: failed, and the same command may go on (`--resume-if-saved`).
    2: something must be changed first: bad input, or a run that came to nothing. 130: Ctrl-C.
    An error that is neither bad input nor one of `run.FAILURES` is a bug, and keeps its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    spec, overrides, arguments = settings.parse_arguments(argv, description)
    try:
        config_dict = settings.load_config(spec, overrides)
    except (ValueError, OSError) as error:
        return _told(error, 2)
    # Imported here: a typo in the configuration file need not wait for JAX.
    from pmd_jax import distributed
    from pmd_jax.config import RunConfig
    from pmd_jax.policy.hub import FetchError
    from pmd_jax.run import FAILURES, FINAL, Resume, prepare

    starting = distributed.peers_are_there("starting")
    try:
        distributed.start(_cluster(arguments))
        config = settings.build(RunConfig, config_dict)
        if arguments.name:
            config = dataclasses.replace(config, name=arguments.name)
        resume: Resume = "if saved" if arguments.resume_if_saved else arguments.resume
        with starting:
            run = prepare(config, resume)
    except (ValueError, FileNotFoundError) as error:
        return _told(error, 2)
    except (OSError, FetchError, distributed.PeerLost, distributed.PeerFailed) as error:
        return _told(error, 1)
    except KeyboardInterrupt:
        distributed.leave(130)
        return 130
    except Exception:
        _leave_the_others()
        raise
    try:
        outcome = run.to_the_end()
    except FAILURES as error:
        return _told(error, 2 if isinstance(error, FINAL) else 1)
    except KeyboardInterrupt:
        saved = run.checkpointer.latest
        left = "nothing was saved yet" if saved is None else f"--resume continues at step {saved}"
        print(f"stopped; {left}", file=sys.stderr)
        distributed.leave(130)
        return 130
    except Exception:
        _leave_the_others()
        raise
    return 130 if outcome.interrupted == "Ctrl-C" else 0


def _cluster(arguments: argparse.Namespace) -> Cluster:
    from pmd_jax.distributed import Cluster

    names = (field.name for field in dataclasses.fields(Cluster))
    return Cluster(**{name: getattr(arguments, name) for name in names})


def _leave_the_others() -> None:
    """A bug in one process of several: it shows its traceback, and ends at once."""
    from pmd_jax import distributed

    if distributed.is_joined():
        traceback.print_exc()
        distributed.leave(1)


def _told(error: Exception, code: int) -> int:
    """Says what went wrong. Where other processes wait for this one, it ends at once."""
    print(f"error: {error}", file=sys.stderr)
    if "pmd_jax.distributed" in sys.modules:
        sys.modules["pmd_jax.distributed"].leave(code)
    return code


if __name__ == "__main__":
    sys.exit(main(__doc__ or ""))
