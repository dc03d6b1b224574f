"""The command line that the experiments share: read, check, run, and one clear line on errors."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from pmd_jax import settings


def main(description: str, argv: Sequence[str] | None = None) -> int:
    """Runs `--config FILE[:ARG]`; the exit code is 0 done, 1 failed, 2 bad input, 130 Ctrl-C.

    An error that is neither bad input nor one of `run.FAILURES` is a bug, and keeps its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    spec, overrides, arguments = settings.parse_arguments(argv, description)
    try:
        config_dict = settings.load_config(spec, overrides)
    except (ValueError, OSError) as error:
        return _told(error, 2)
    # Imported here: a typo in the configuration file need not wait for JAX.
    from pmd_jax.config import RunConfig
    from pmd_jax.policy.hub import FetchError
    from pmd_jax.run import FAILURES, prepare

    try:
        config = settings.build(RunConfig, config_dict)
        if arguments.name:
            config = dataclasses.replace(config, name=arguments.name)
        run = prepare(config, arguments.resume)
    except (ValueError, OSError, FetchError) as error:
        return _told(error, 2)
    except KeyboardInterrupt:
        return 130
    try:
        outcome = run.to_the_end()
    except FAILURES as error:
        return _told(error, 1)
    except KeyboardInterrupt:
        saved = run.checkpointer.latest
        left = "nothing was saved yet" if saved is None else f"--resume continues at step {saved}"
        print(f"stopped; {left}", file=sys.stderr)
        return 130
    return 130 if outcome.interrupted else 0


def _told(error: Exception, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(__doc__ or ""))
