"""Runs untrusted Python programs under limits, in processes apart from ours.

What is covered, where the kernel gives it (`Protections` says by what, at start):
    * files: a program reads Python's own modules, numpy and sortedcontainers, nothing else of ours:
      no repository, checkpoint, environment variable or expected output. It writes into an empty
      folder that is gone after each test (a root of its own, read-only, or Landlock);
    * network: none (a namespace without devices, seccomp, Landlock);
    * processes: a program starts none, signals and traces none but itself, and nothing of it is
      left when its test ends (PID namespace, seccomp, process group, sub-reaper, death of parents);
    * kernel: calls that mount, trace, load, share memory, send signals by the way or open sockets
      fail (seccomp, a denylist), and no privilege is left (capabilities, no_new_privs, a user of
      its own where the pool runs as root);
    * CPU time, wall time, address space, output, file size, open files, threads: limits;
    * other programs: a test's memory never held another job's code, inputs or outputs (server.py);
    * the verdict: expected outputs stay with the pool's caller. A program can speak about itself
      alone: what it prints, returns or reports is compared outside.

What is not:
    * a bug of the kernel or the processor, side channels, and load: tests share CPUs and caches;
    * where only Landlock stands (`files by landlock`): names, sizes and times of files can be seen,
      the sum of small files is not limited, nor is the number of threads, which under bubblewrap as
      root is not limited either; there programs make no folders;
    * advisory locks on Python's own files, which nothing of ours takes;
    * a program sees all of its problem's inputs, not the one of its test alone;
    * the clock and the machine's kernel version, number of CPUs and uptime: a program sees them;
    * Linux without namespaces, Landlock and seccomp (old kernels): only the limits hold there, and
      `require = "isolated"` refuses to run. On other systems the sandbox does not start.

A sandbox that cannot start or run raises SandboxError, and is never taken for a wrong answer.

    execution.py what goes in and comes out            pool.py      servers that threads share
    worker.py    one server as the host sees it        server.py    inside: server, runner, tests
    program.py   a test's process                      walls.py     namespaces, Landlock, limits
    seccomp.py   the filter of system calls

server.py, program.py, walls.py and seccomp.py import nothing of the package: they run where nothing
else of it can be read.
"""

from pmd_jax.tasks.sandbox.execution import (
    Execution,
    Program,
    Protections,
    Raised,
    Rules,
    SandboxConfig,
    SandboxError,
)
from pmd_jax.tasks.sandbox.pool import Sandbox

__all__ = [
    "Execution",
    "Program",
    "Protections",
    "Raised",
    "Rules",
    "Sandbox",
    "SandboxConfig",
    "SandboxError",
]
