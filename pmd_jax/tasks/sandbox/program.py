"""One test of one program, in the process that was forked for it: run, and report.

Standard library only: the server inside the sandbox imports this file by itself. The program sees
real descriptors: 0 is the test's input, 1 what it prints. What it returns or raises goes back on
descriptor 3; it may close or fill that, and only ever speaks about itself.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import gc
import io
import json
import linecache
import os
import random
import sys
import threading
import traceback
import types
from typing import Any

_open = open  # builtins.open is another one while a program runs
REPORT = 3
FILE = "solution.py"
STREAMS: dict[str, Any] = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
RECURSION, INT_DIGITS = 50_000, 50_000
MAX_FRAMES, MAX_TEXT = 4, 400  # of what is told of an exception, and what the host takes

# What the official harness imports before a program (LiveCodeBench, testing_util.py).
PRELUDE = "".join(
    f"from {name} import *\n"
    for name in (
        *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
        *("statistics", "itertools", "functools", "operator", "io", "sys", "json", "builtins"),
        "typing",
    )
) + (
    "import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics\n"
    "import itertools, functools, operator, io, sys, json\n"
)

# SDPO's executor (lasgroup/SDPO at 0e6d510) knows these modules and lacks these builtins, and with
# them every exception's name.
SDPO_MODULES = (
    "math cmath itertools functools operator statistics random collections heapq bisect array "
    "string re typing json io fractions decimal dataclasses datetime time sys sortedcontainers "
    "numpy"
)
SDPO_LACKS = (
    "exit quit open bin divmod super eval exec compile type getattr hasattr setattr delattr "
    "complex bytearray memoryview oct staticmethod classmethod property globals locals vars "
    "breakpoint help"
)


def prelude() -> dict[str, Any]:
    """The names that the official harness gives to every program."""
    names: dict[str, Any] = {}
    exec(PRELUDE, names)
    del names["__builtins__"]
    return names


def run(job: dict[str, Any], text: str, names: dict[str, Any]) -> None:
    """Runs the program on one input, reports and ends the process. Descriptors are in place."""
    report: dict[str, Any] = {"error": {"type": "Error", "message": "", "frames": []}}
    try:
        report = _report(job, text, names)
    finally:
        try:
            with _open(REPORT, "wb", closefd=False) as out:
                out.write(json.dumps(report).encode())
        finally:
            os._exit(0)


def _report(job: dict[str, Any], text: str, names: dict[str, Any]) -> dict[str, Any]:
    """What came of the program, once it has ended as Python ends: threads, atexit, last prints."""
    report: dict[str, Any] = {}
    try:
        module = _prepare(job, text, names)
        report = _outcome(job, text, module)
        if job["rules"] != "sdpo":
            threading._shutdown()  # type: ignore[attr-defined]  # waits as Python would
            atexit._run_exitfuncs()
        module.__dict__.clear()
        gc.collect()  # what is left open is written
        for stream in {sys.stdout, sys.__stdout__}:
            with contextlib.suppress(ValueError):  # closed or detached
                if stream is not None:
                    stream.flush()
    except BaseException as error:
        report = report if "error" in report else {"error": describe(error)}
    return report


def _prepare(job: dict[str, Any], text: str, names: dict[str, Any]) -> types.ModuleType:
    """The interpreter as a program expects to find it; the module that it becomes."""
    sys.setrecursionlimit(RECURSION)
    sys.set_int_max_str_digits(INT_DIGITS)
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = _open(fd, mode, encoding="utf-8", closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = [FILE]
    random.seed(0)
    # exit and quit as the official harness has them; the streams' names are no files here.
    vars(builtins).update(exit=sys.exit, quit=None, open=_open_or_stream)
    vars(io).update(open=_open_or_stream)  # pathlib's
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    if job["rules"] == "sdpo":
        _as_sdpo(module, text)
    else:
        module.__dict__.update(names, open=_open_or_stream)
    linecache.cache[FILE] = (len(job["code"]), None, job["code"].splitlines(True), FILE)
    return module


def _open_or_stream(file: Any, *rest: Any, **named: Any) -> Any:
    if isinstance(file, str | os.PathLike):
        file = STREAMS.get(str(file), file)
    return _open(file, *rest, **named)


def _outcome(job: dict[str, Any], text: str, module: types.ModuleType) -> dict[str, Any]:
    """{"value": ...} of a function, {} of a program, or {"error": ...}."""
    try:
        code = compile(job["code"].removeprefix("\ufeff"), FILE, "exec", dont_inherit=True)
        if not job["function"]:
            exec(code, module.__dict__)
            return {}
        # Not __main__, or a guarded call of the function would run.
        module.__dict__["__name__"] = "solution"
        sys.modules["solution"] = module
        exec(code, module.__dict__)
        return {"value": plain(_call(job, text, module), top=True)}
    except SystemExit as error:
        if job["function"] or job["rules"] == "sdpo":
            return {"error": describe(error)}
        return {}
    except BaseException as error:
        return {"error": describe(error)}


def _call(job: dict[str, Any], text: str, module: types.ModuleType) -> Any:
    """The function's value for one test, whose input holds a JSON value a line."""
    name = job["function"]
    if job["rules"] == "sdpo":  # splits at blanks, and looks at the top level alone
        arguments = [json.loads(piece) for piece in text.split()]
        return module.__dict__[name](*arguments)
    arguments = [json.loads(line) for line in text.split("\n") if line.strip()]
    if "class Solution" in job["code"]:
        return getattr(module.__dict__["Solution"](), name)(*arguments)
    if name not in module.__dict__:
        raise NameError(f"the solution defines no {name!r}, nor a class Solution with it")
    return module.__dict__[name](*arguments)


def _as_sdpo(module: types.ModuleType, text: str) -> None:
    """The reduced world of SDPO's executor: few builtins, few modules, no real input stream."""
    modules, lacks = SDPO_MODULES.split(), SDPO_LACKS.split()

    def import_one(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] not in modules:
            raise ImportError(f"import of {name} is not allowed")
        return __import__(name, *rest)

    def is_there(name: str, value: Any) -> bool:
        is_error = isinstance(value, type) and issubclass(value, BaseException)
        return name not in lacks and not is_error

    allowed = {name: value for name, value in vars(builtins).items() if is_there(name, value)}
    module.__dict__["__builtins__"] = {**allowed, "__import__": import_one}
    sys.stdin = io.StringIO(text)  # without a buffer


def plain(value: Any, top: bool = False) -> Any:
    """A value as JSON, with what JSON cannot say named by a tag. No code of the value's decides.

    {"t": items} a tuple (at the top a list, as the official harness has it), {"d": pairs} a dict,
    {"r": text} anything else, which equals nothing.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str, float):
        return value
    if kind is list or (top and kind is tuple):
        return [plain(item) for item in value]
    if kind is tuple:
        return {"t": [plain(item) for item in value]}
    if issubclass(kind, dict):
        return {"d": [[plain(key), plain(item)] for key, item in dict.items(value)]}
    for base in (bool, int, float, str, list):
        if issubclass(kind, base):
            return plain(base(value))
    if kind.__module__ == "numpy" and hasattr(value, "tolist"):
        return plain(value.item()) if getattr(value, "ndim", 1) == 0 else {"r": "numpy array"}
    return {"r": kind.__name__}


def describe(error: BaseException) -> dict[str, Any]:
    """An exception as feedback shows it: type, message, and its lines in the program."""
    said: dict[str, Any] = {"type": type(error).__name__[:MAX_TEXT], "frames": []}
    if isinstance(error, SyntaxError) and error.filename == FILE:
        source = (error.text or "").strip()[:MAX_TEXT]
        return said | {"message": error.msg, "frames": [[error.lineno or 0, "<module>", source]]}
    said["message"] = _text_of(error)[:MAX_TEXT]
    with contextlib.suppress(Exception):  # lines are looked up, which may need what is used up
        seen = traceback.extract_tb(error.__traceback__, limit=-200)
        own = [frame for frame in seen if frame.filename == FILE][-MAX_FRAMES:]
        said["frames"] = [[f.lineno, f.name, (f.line or "")[:MAX_TEXT]] for f in reversed(own)]
    return said


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return ""
