"""Programs for the judge's tests: valid ones in every style, and hostile ones of every kind."""

from __future__ import annotations

import dataclasses
import textwrap


@dataclasses.dataclass(frozen=True)
class Valid:
    """A program that must pass: what it reads, what it prints or returns."""

    code: str
    given: str
    wanted: str
    function: str = ""


@dataclasses.dataclass(frozen=True)
class Hostile:
    """A program that must fail. ends: how it may; said: words that its feedback must hold.

    It reads 3 and should print SECRET, or return it from `function`. {file}, {pid} and {port} are
    a file, the process and an open port of the judge's.
    """

    code: str
    ends: tuple[str, ...]
    said: str = ""
    function: str = ""
    own_root: bool = False  # makes sense only there


SECRET = "needle-81473"


def valid(code: str, given: str, wanted: str, function: str = "") -> Valid:
    return Valid(textwrap.dedent(code), given, wanted, function)


def hostile(code: str, *ends: str, said: str = "", function: str = "", own_root: bool = False):
    return Hostile(textwrap.dedent(code), ends, said, function, own_root)


VALID = {
    "input": valid("print(2 * int(input()))", "3\n", "6"),
    "ends with sys.exit": valid("import sys\nprint(6)\nsys.exit()", "", "6"),
    "sys.exit with a code": valid("import sys\nprint(6)\nsys.exit(1)", "", "6"),
    "exit": valid("print(6)\nexit()", "", "6"),
    "exit within a function": valid(
        "def main():\n    print(6)\n    exit(0)\nmain()\nprint(7)", "", "6"
    ),
    "raises SystemExit": valid("print(6)\nraise SystemExit", "", "6"),
    "sys.stdin.buffer": valid(
        "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))", "1 2\n3\n", "6"
    ),
    "sys.stdin.buffer.readline": valid(
        "import sys\nf = sys.stdin.buffer.readline\nprint(int(f()) + int(f()))", "1\n2\n", "3"
    ),
    "sys.stdin.readline": valid("import sys\nprint(sys.stdin.readline().strip())", "ab\nc", "ab"),
    "sys.stdin.readlines": valid("import sys\nprint(len(sys.stdin.readlines()))", "a\nb\nc\n", "3"),
    "for line in sys.stdin": valid(
        "import sys\nprint(*(int(x) + 1 for x in sys.stdin))", "1\n2\n", "2 3"
    ),
    "open(0)": valid("print(sum(map(int, open(0).read().split())))", "1 2 3", "6"),
    "open('/dev/stdin')": valid("print(*map(str.strip, open('/dev/stdin')))", "a\nb\n", "a b"),
    "sys.stdout replaced": valid(
        "import io, sys\nsys.stdout = io.StringIO()\nprint(6)\n"
        "sys.__stdout__.write(sys.stdout.getvalue())",
        "",
        "6",
    ),
    "sys.stdout detached": valid(
        "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.detach())\nprint(6)", "", "6"
    ),
    "Path('/dev/stdin')": valid(
        "from pathlib import Path\nprint(Path('/dev/stdin').read_text().strip())", "6\n", "6"
    ),
    "sys.stdout closed": valid("import sys\nprint(6)\nsys.stdout.close()", "", "6"),
    "a stream of its own, not flushed": valid("f = open(1, 'w')\nf.write('6')", "", "6"),
    "printed by __del__": valid("class A:\n    def __del__(self): print(6)\na = A()", "", "6"),
    "a byte-order mark": valid("\ufeffprint(6)", "", "6"),
    "input until EOFError": valid(
        """
        total = 0
        try:
            while True:
                total += int(input())
        except EOFError:
            print(total)
        """,
        "1\n2\n",
        "3",
    ),
    "bin": valid("print(bin(int(input())))", "5", "0b101"),
    "divmod": valid("print(*divmod(7, 2))", "", "3 1"),
    "super": valid(
        """
        class A:
            def f(self): return 5
        class B(A):
            def f(self): return super().f() + 1
        print(B().f())
        """,
        "",
        "6",
    ),
    "except ValueError": valid("try:\n    int('x')\nexcept ValueError:\n    print('no')", "", "no"),
    "eval": valid("print(eval(input()))", "2 + 4", "6"),
    "exec": valid("exec('x = 6')\nprint(x)", "", "6"),
    "import os": valid("import os\nprint(os.path.join('a', 'b'))", "", "a/b"),
    "os.write and os.read": valid(
        "import os\nos.write(1, b'%d' % (2 * int(os.read(0, 99))))", "3", "6"
    ),
    "threading with a deep stack": valid(
        """
        import sys, threading
        sys.setrecursionlimit(10**7)
        threading.stack_size(64 << 20)
        def f(n):
            return 0 if n == 0 else 1 + f(n - 1)
        def main():
            print(f(40_000))
        t = threading.Thread(target=main)
        t.start()
        t.join()
        """,
        "",
        "40000",
    ),
    "forty threads": valid(
        "from concurrent.futures import ThreadPoolExecutor as P\n"
        "import time\nwith P(40) as p:\n"
        "    list(p.map(time.sleep, [0.1] * 40))\nprint(6)",
        "",
        "6",
    ),
    "a thread that nobody joins": valid(
        "import threading\nthreading.Thread(target=lambda: print(6)).start()", "", "6"
    ),
    "from __future__": valid("from __future__ import annotations\nprint(6)", "", "6"),
    "6.0 for 6": valid("print(12 / 2)", "", "6"),
    "type, getattr, setattr, hasattr": valid(
        """
        class A: pass
        setattr(A, "x", 5)
        print(getattr(A(), "x"), hasattr(A, "y"), type(5).__name__)
        """,
        "",
        "5 False int",
    ),
    "complex, bytearray, oct": valid(
        "print(abs(complex(3, 4)), len(bytearray(3)), oct(8))", "", "5.0 3 0o10"
    ),
    "staticmethod, classmethod, property": valid(
        """
        class A:
            @staticmethod
            def f(): return 1
            @classmethod
            def g(cls): return 2
            @property
            def h(self): return 3
        print(A.f(), A.g(), A().h)
        """,
        "",
        "1 2 3",
    ),
    "main guard": valid(
        "def main():\n    print(6)\nif __name__ == '__main__':\n    main()", "", "6"
    ),
    "names that nobody imported": valid(
        "print(gcd(12, 18), Counter('aab')['a'], inf > 1, ceil(1.5))", "", "6 2 True 2"
    ),
    "recursion limit": valid(
        """
        import sys
        sys.setrecursionlimit(30_000)
        def f(n):
            return 0 if n == 0 else 1 + f(n - 1)
        print(f(20_000))
        """,
        "",
        "20000",
    ),
    "lru_cache": valid(
        """
        from functools import lru_cache
        @lru_cache(None)
        def f(n):
            return n if n < 2 else f(n - 1) + f(n - 2)
        print(f(90))
        """,
        "",
        "2880067194370816120",
    ),
    "long integers": valid("print(len(str(7**50_000)))", "", "42255"),
    "dataclass": valid(
        """
        from dataclasses import dataclass
        @dataclass(order=True)
        class P:
            x: int
            y: "int" = 0
        print(max(P(1), P(2)).x)
        """,
        "",
        "2",
    ),
    "many standard modules": valid(
        """
        import array, asyncio, bisect, cmath, collections, contextlib, copy, csv, ctypes, datetime
        import decimal, enum, fractions, hashlib, heapq, io, itertools, json, multiprocessing
        import numbers, operator, pickle, queue, re, secrets, signal, socket, sqlite3, statistics
        import string, struct, subprocess, tempfile, textwrap, time, traceback, typing, unittest
        import uuid, zlib
        async def f(): return 6
        print(asyncio.run(f()))
        """,
        "",
        "6",
    ),
    "numpy": valid("import numpy as np\nprint(np.arange(4).sum())", "", "6"),
    "output through atexit": valid(
        "import atexit, io, sys\nout = io.StringIO()\n"
        "atexit.register(lambda: sys.__stdout__.write(out.getvalue()))\nprint(6, file=out)",
        "",
        "6",
    ),
    "a file in its own folder": valid(
        "open('x', 'w').write('6')\nprint(open('x').read())", "", "6"
    ),
    "tempfile": valid(
        "import tempfile\nwith tempfile.TemporaryFile() as f:\n    f.write(b'6')\n    f.seek(0)\n"
        "    print(f.read().decode())",
        "",
        "6",
    ),
    "print without a line's end": valid("print('a', end='')\nprint('b', end='')", "", "ab"),
    "a million characters": valid("print('x' * 10**6)", "", "x" * 10**6),
    "letters of other scripts": valid("print(input()[::-1])", "añ東\n", "東ña"),
    "a print of its own": valid(
        "import sys\nprint = lambda *a: sys.stdout.write(' '.join(map(str, a)))\nprint(1, 2)",
        "",
        "1 2",
    ),
    "debugging on stderr": valid("import sys\nprint('?', file=sys.stderr)\nprint(6)", "", "6"),
    "os._exit after a flush": valid(
        "import os, sys\nprint(6)\nsys.stdout.flush()\nos._exit(0)", "", "6"
    ),
    "class Solution": valid(
        "class Solution:\n    def f(self, a: List[int], k):\n        return [x * k for x in a]",
        "[1, 2]\n3",
        "[3, 6]",
        "f",
    ),
    "a plain function": valid("def f(s):\n    return s[::-1]", '"a b"', '"b a"', "f"),
    "a function that returns a tuple": valid("def f(x):\n    return x, x + 1", "1", "[1, 2]", "f"),
    "a function that returns a float": valid("def f(x):\n    return x / 2", "4", "2", "f"),
    "a function with a guarded call": valid(
        "def f(x):\n    return x\nif __name__ == '__main__':\n    print(f(int(input())))",
        "4",
        "4",
        "f",
    ),
    "a function that prints too": valid("def f(x):\n    print('?')\n    return x", "4", "4", "f"),
    "numpy's integer": valid(
        "import numpy as np\ndef f(x):\n    return np.int64(x)", "4", "4", "f"
    ),
}

# Valid programs of VALID that SDPO's rules fail (method: their executor, read and run).
FAILED_BY_SDPO = (
    *("ends with sys.exit", "exit", "sys.stdin.buffer", "open(0)", "bin", "divmod", "super"),
    *("except ValueError", "eval", "import os", "threading with a deep stack", "from __future__"),
    *("6.0 for 6", "type, getattr, setattr, hasattr", "complex, bytearray, oct"),
    *("staticmethod, classmethod, property", "class Solution", "a plain function"),
)

HOSTILE = {
    # --- processes
    "fork bomb": hostile("import os\nwhile True:\n    os.fork()", "error", said="PermissionError"),
    "children that outlive it": hostile(
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)",
        *("error",),
        said="PermissionError",
    ),
    "zombies": hostile(
        "import os\nfor _ in range(99):\n    if os.fork() == 0:\n        os._exit(0)", "error"
    ),
    "a shell": hostile("import os\nos.system('echo needle-81473')", "wrong"),
    "subprocess": hostile(
        "import subprocess\nsubprocess.run(['/bin/echo', 'x'])", "error", said="PermissionError"
    ),
    "multiprocessing": hostile(
        "import multiprocessing as m\nm.Process(target=print).start()", "error"
    ),
    "another program in its place": hostile(
        "import os\nos.execv('/bin/echo', ['echo', 'x'])", "error", said="PermissionError"
    ),
    "kills its parent": hostile("import os\nos.kill(os.getppid(), 9)", "error", said="Error"),
    "kills the judge": hostile("import os\nos.kill({pid}, 9)", "error", said="Error"),
    "kills everything": hostile("import os\nos.kill(-1, 9)", "error", said="PermissionError"),
    "kills its group": hostile("import os\nos.killpg(0, 9)", "error", said="PermissionError"),
    "traces its parent": hostile(
        "import ctypes, os\nr = ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)\nprint('no', r)",
        "wrong",
    ),
    "reads its parent's memory": hostile(
        "import os\nopen(f'/proc/{{os.getppid()}}/mem', 'rb').read(1)", "error", said="Error"
    ),
    "threads without end": hostile(
        "import threading, time\nwhile True:\n"
        "    threading.Thread(target=time.sleep, args=(9,)).start()",
        *("error", "time", "crash"),
    ),
    "signals its parent by a pipe": hostile(
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())",
        "error",
        said="PermissionError",
    ),
    "chooses the signal of a pipe": hostile(
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 10, 9)", "error", said="Permission"
    ),
    "outlives its parent": hostile(
        "import ctypes\nprint('no', ctypes.CDLL(None).prctl(1, 0, 0, 0, 0))", "wrong"
    ),
    # --- time and size
    "sleeps with all closed": hostile(
        "import os, time\nos.close(1)\nos.close(3)\ntime.sleep(600)", "time", said="Time Limit"
    ),
    "memory in files that are nowhere": hostile(
        "import os\nos.memfd_create('x')", "error", said="PermissionError"
    ),
    "all of the machine's asynchronous input": hostile(
        "import ctypes\nx = ctypes.c_ulong()\n"
        "print('no', ctypes.CDLL(None).syscall(206, 65000, ctypes.byref(x)))",
        "wrong",
    ),
    "endless loop": hostile("while True:\n    pass", "time", said="Time Limit Exceeded"),
    "endless loop in C": hostile("sum(iter(int, 1))", "time", said="Time Limit Exceeded"),
    "sleep": hostile("import time\ntime.sleep(600)", "time", said="Time Limit Exceeded"),
    "sleep after its output": hostile(
        "import time\nprint('no', flush=True)\ntime.sleep(600)", "time"
    ),
    "sleep at its end": hostile(
        "import atexit, time\natexit.register(time.sleep, 600)", "time", said="Time Limit"
    ),
    "a thread that does not end": hostile(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()", "time"
    ),
    "signals ignored": hostile(
        "import signal\nfor s in set(signal.Signals) - {{signal.SIGKILL, signal.SIGSTOP}}:\n"
        "    signal.signal(s, signal.SIG_IGN)\nwhile True:\n    pass",
        "time",
    ),
    "memory bomb": hostile("x = bytearray(1 << 40)", "error", said="MemoryError"),
    "memory by and by": hostile(
        "x = []\nwhile True:\n    x.append(bytes(1 << 20))", "error", said="MemoryError"
    ),
    "limits raised": hostile(
        "import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))", "error", said="Error"
    ),
    "endless output": hostile(
        "while True:\n    print('x' * 999)", "output", said="Output Limit Exceeded"
    ),
    "endless errors": hostile("import sys\nwhile True:\n    sys.stderr.write('x' * 9999)", "time"),
    "huge integers printed": hostile("print(10 ** 60_000)", "error", said="ValueError"),
    "a power without end": hostile("print(9 ** 9 ** 9)", "time", "error"),
    "deep recursion": hostile(
        "def f(n):\n    return f(n + 1)\nf(0)", "error", said="RecursionError"
    ),
    "recursion in C": hostile(
        "import sys\nsys.setrecursionlimit(10 ** 9)\nx = []\nfor _ in range(10 ** 6):\n"
        "    x = [x]\nrepr(x)",
        *("error", "crash", "time"),
    ),
    "a program of parentheses": hostile("(" * 50_000 + ")" * 50_000, "error"),
    "a huge file": hostile(
        "with open('x', 'wb') as f:\n    while True:\n        f.write(bytes(1 << 20))",
        "error",
        said="OSError",
    ),
    "many files": hostile(
        "for i in range(10 ** 6):\n    open(str(i), 'wb').write(bytes(1 << 20))",
        "error",
        said="OSError",
        own_root=True,
    ),
    "folders in folders": hostile(
        "import os\nfor _ in range(1500):\n    os.mkdir('d')\n    os.chdir('d')",
        *("wrong", "error"),
    ),
    "many open files": hostile("x = [open(0) for _ in range(9999)]", "error", "wrong"),
    "many descriptors": hostile(
        "import os\nwhile True:\n    os.dup(0)", "error", said="Too many open files"
    ),
    # --- files
    "writes into the system": hostile("open('/usr/lib/x', 'w')", "error", said="Error"),
    "writes beside it": hostile("open('../x', 'w')", "error", said="Error"),
    "writes the judge's file": hostile("open('{file}', 'a')", "error", said="Error"),
    "reads the judge's file": hostile("print(open('{file}').read())", "error", said="Error"),
    "lists the judge's folder": hostile(
        "import os\nprint(os.listdir(os.path.dirname('{file}')))", "error", said="Error"
    ),
    "reads through a link": hostile(
        "import os\nos.symlink('{file}', 'x')\nprint(open('x').read())", "error", said="Error"
    ),
    "removes the judge's file": hostile("import os\nos.remove('{file}')", "error", said="Error"),
    "truncates the judge's file": hostile(
        "import os\nos.truncate('{file}', 0)", "error", said="Error"
    ),
    "changes the mode of the judge's file": hostile(
        "import os\nos.chmod('{file}', 0)", "error", said="Error"
    ),
    "reads the passwords": hostile("print(open('/etc/passwd').read())", "error", said="Error"),
    "reads the environment": hostile(
        "import os\nprint(os.environ['PMD_SECRET'])", "error", said="KeyError"
    ),
    "reads the judge's environment": hostile(
        "print(open('/proc/{pid}/environ').read())", "error", said="Error"
    ),
    "imports the judge": hostile("import pmd_jax", "error", said="ModuleNotFoundError"),
    "mounts": hostile(
        "import ctypes\nprint('no', ctypes.CDLL(None).mount(b'', b'/tmp', b'tmpfs', 0, None))",
        "wrong",
    ),
    "leaves its namespaces": hostile(
        "import ctypes\nprint('no', ctypes.CDLL(None).unshare(0x10000000))", "wrong"
    ),
    "watches files": hostile(
        "import ctypes\nprint('no', ctypes.CDLL(None).inotify_init1(0))", "wrong"
    ),
    # --- network
    "datagrams to the machine": hostile(
        "import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)", "error"
    ),
    "opens a socket": hostile("import socket\nsocket.socket()", "error", said="PermissionError"),
    "connects to the judge": hostile(
        "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)", "error"
    ),
    "listens": hostile("import socket\nsocket.create_server(('', 0))", "error"),
    "a socket of its machine": hostile(
        "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0x')", "error"
    ),
    "fetches": hostile("import urllib.request as u\nu.urlopen('http://127.0.0.1:{port}')", "error"),
    # --- the verdict
    "os._exit before output": hostile("import os\nos._exit(0)", "wrong", said="Wrong Answer"),
    "exit before output": hostile("exit()", "wrong", said="Wrong Answer"),
    "binary output": hostile(
        "import sys\nsys.stdout.buffer.write(bytes(range(256)) * 99)", "wrong"
    ),
    "no output": hostile("pass", "wrong", said="Wrong Answer"),
    "crash": hostile("import ctypes\nctypes.string_at(0)", "crash", said="SIGSEGV"),
    "abort": hostile("import os\nos.abort()", "crash", said="SIGABRT"),
    "kills itself": hostile("import os\nos.kill(os.getpid(), 9)", "crash", said="SIGKILL"),
    "patched sys.exit and builtins": hostile(
        "import builtins, sys\nsys.exit = print\nbuiltins.all = lambda *_: True\n"
        "builtins.len = lambda *_: 0\nprint('no')",
        "wrong",
    ),
    "patched judge": hostile(
        """
        import sys
        for module in list(sys.modules.values()):
            for name in dir(module):
                if "same" in name or "compare" in name or "judge" in name:
                    setattr(module, name, lambda *a, **k: True)
        print("no")
        """,
        "wrong",
    ),
    "equal to everything": hostile(
        "class E:\n    def __eq__(self, other): return True\ndef f(x):\n    return E()",
        "wrong",
        function="f",
    ),
    "a text equal to everything": hostile(
        "class E(str):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
        "def f(x):\n    return E('no')",
        "wrong",
        function="f",
    ),
    "a report of its own": hostile(
        'import os\nos.write(3, b\'{{"value": "no"}}\')\nos._exit(0)', "wrong", function="f"
    ),
    "a report of an endless line": hostile(
        """
        import os
        os.write(3, b'{{"error":{{"type":"E","message":5,"frames":[[1e999,"a","b"],[1],5]}}}}')
        os._exit(0)
        """,
        "error",
    ),
    "an error that no tokenizer takes": hostile(
        "raise ValueError('\\ud800')", "error", said="ValueError"
    ),
    "an error without a name": hostile(
        """
        class M(type):
            __name__ = property(lambda self: 1 / 0)
        class E(Exception, metaclass=M):
            pass
        raise E
        """,
        "error",
    ),
    "keys that collide": hostile(
        "def f(x):\n    return {{(i + 1) * (2 ** 61 - 1): 0 for i in range(3000)}}",
        "wrong",
        "time",
        function="f",
    ),
    "a report of nothing": hostile(
        "import os\nos.write(3, b'[' * 99999)\nos._exit(0)", "wrong", function="f"
    ),
    "a report without end": hostile(
        "import os\nwhile True:\n    os.write(3, b'x' * 9999)", "output", function="f"
    ),
    "its report closed": hostile("import os\nos.close(3)\nprint('no')", "wrong", "error"),
    "its output closed": hostile("import os\nos.close(1)\nprint('no')", "error", "wrong"),
    "the expected output, by introspection": hostile(
        """
        import gc, sys
        found = ["no"]
        for thing in gc.get_objects():
            try:
                values = [thing, *vars(thing).values()] if hasattr(thing, "__dict__") else [thing]
                for value in values:
                    items = value.values() if isinstance(value, dict) else value
                    if isinstance(items, (list, tuple)) or hasattr(items, "__iter__"):
                        found += [x for x in items if isinstance(x, str) and x[:7] == "needle-"]
            except BaseException:
                pass
        print(found[-1])
        """,
        "wrong",
    ),
    "the expected output, by frames": hostile(
        """
        import sys
        frame, found = sys._getframe(), "no"
        while frame:
            for scope in (frame.f_locals, frame.f_globals):
                for value in list(scope.values()):
                    if isinstance(value, dict):
                        found = value.get("outputs", value.get("expected", found))
            frame = frame.f_back
        print(found)
        """,
        "wrong",
    ),
    # --- mere mistakes
    "wrong answer": hostile("print(4)", "wrong", said="Test Case 1: Wrong Answer"),
    "syntax error": hostile("print((", "error", said="SyntaxError"),
    "a null character": hostile("print(1)\0", "error", said="Error"),
    "unknown name": hostile("print(answer)", "error", said="Line 1 in <module>"),
    "more input than there is": hostile("input()\ninput()", "error", said="EOFError"),
    "no such function": hostile("def g(x):\n    return x", "error", said="'f'", function="f"),
    "wrong arguments": hostile("def f():\n    return 1", "error", said="TypeError", function="f"),
    "an endless value": hostile(
        "def f(x):\n    a = []\n    a.append(a)\n    return a", "error", "time", function="f"
    ),
    "quit is not there": hostile("quit()", "error", said="TypeError"),
}
