"""The command line that the experiments share: read, check, run, and one clear line on errors."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from pmd_jax import settings


def main(description: str, argv: Sequence[str] | None = None) -> int:
    """Runs `--config FILE[:ARG]`; the exit code is 0 done, 1 failed, 2 bad input, 130 Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    spec, overrides, arguments = settings.parse_arguments(argv, description)
    try:
        # Imported here: a typo in the configuration file need not wait for JAX.
        config_dict = settings.load_config(spec, overrides)
        from pmd_jax.config import RunConfig
        from pmd_jax.run import train

        config = settings.build(RunConfig, config_dict)
        if arguments.name:
            config = dataclasses.replace(config, name=arguments.name)
        outcome = train(config, arguments.resume)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what was saved can be continued with --resume", file=sys.stderr)
        return 130
    return 130 if outcome.interrupted else 0
