"""What the kernel puts between a program and the machine: namespaces with a root of their own,
Landlock, resource limits, and the loss of every privilege. System-call filters: seccomp.py.

Standard library only: the server inside the sandbox imports this file by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import secrets
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence

NEW_MOUNTS, NEW_UTS, NEW_IPC, NEW_USER = 0x00020000, 0x04000000, 0x08000000, 0x10000000
NEW_PIDS, NEW_NETWORK = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
MOUNT_READ_ONLY, MOUNT_NO_SETUID = 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38

LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
SYSTEM_FILES = (*LIBRARIES, "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime")
NOT_PYTHON_ITSELF = "site-packages", "dist-packages"
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
BOX = "/box"  # where programs write, in a root of its own; /tmp may hold packages of ours
MAX_FILES = 4096

_libc = ctypes.CDLL(None, use_errno=True)


def _call(what: str, result: int) -> int:
    """A system call's result. Raises OSError that names the call."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def prctl(option: int, value: int) -> None:
    _call(f"prctl({option})", _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def stdlib() -> list[str]:
    """Where Python's own modules and libraries lie. `sys.path` must hold nothing else."""
    return [p for p in (*sys.path, os.path.join(sys.base_prefix, "lib")) if os.path.isdir(p)]


def others_packages(folders: Iterable[str]) -> list[str]:
    """Where installed packages lie among `folders`, which hold Python's own modules."""
    found = [os.path.join(path, name) for path in folders for name in NOT_PYTHON_ITSELF]
    return [path for path in (*found, "/usr/lib/python3/dist-packages") if os.path.isdir(path)]


# --- namespaces ---------------------------------------------------------------------------------


def enter_namespaces() -> None:
    """Leaves the network, mounts, IPC and host name of the machine; the next child is process 1.

    With no privileges it takes a user namespace, in which it has them. Raises OSError.
    """
    flags = NEW_MOUNTS | NEW_UTS | NEW_IPC | NEW_PIDS | NEW_NETWORK
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        with contextlib.suppress(OSError):
            _call("unshare", _libc.unshare(flags))
            return
    _call("unshare", _libc.unshare(flags | NEW_USER))
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {uid} 1"),
        ("gid_map", f"0 {gid} 1"),
    ):
        with open(f"/proc/self/{file}", "w") as out:
            out.write(text)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    names = (os.fsencode(source), os.fsencode(target), kind.encode())
    _call(f"mount {target}", _libc.mount(*names, ctypes.c_ulong(flags), data.encode()))


def _show(path: str, root: str) -> None:
    """`path` at its own place under `root`; a link as the link that it is."""
    target = root + path
    if os.path.lexists(target):
        return
    if os.path.islink(path):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w"):
            pass
    _mount(path, target, "", MS_BIND | MS_REC)


def enter_own_root(readable: Sequence[str], hidden: Sequence[str], packages: Sequence[str]) -> None:
    """A root that holds `readable` without `hidden`, `packages`, four devices, and an empty BOX.

    All of it is read-only, mounts within mounts too. Needs a mount namespace of its own and Linux
    5.12. Raises OSError.
    """
    _mount("", "/", "", MS_REC | MS_PRIVATE)
    # Over /proc, which nothing below needs: any other place could hide what is to be shown.
    root = "/proc"
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in sorted({p for p in (*readable, *SYSTEM_FILES) if os.path.exists(p)}, key=len):
        _show(path, root)
    for path in hidden:
        if os.path.isdir(root + path):
            _mount("tmpfs", root + path, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in (*packages, *DEVICES):
        _show(path, root)
    os.makedirs(root + BOX)
    if not os.path.lexists(root + "/tmp"):
        os.symlink(BOX, root + "/tmp")
    os.chdir(root)
    pivot_root = {"x86_64": 155, "aarch64": 41}.get(platform.machine())
    if pivot_root is None:
        raise OSError(errno.ENOSYS, f"pivot_root: its number on {platform.machine()} is not known")
    _call("pivot_root", _libc.syscall(pivot_root, b".", b"."))
    _call("umount2", _libc.umount2(b".", MNT_DETACH))
    os.chdir("/")
    _make_read_only("/")


def _make_read_only(path: str) -> None:
    """A mount and all within it, for good as far as this namespace goes."""
    attributes = struct.pack("QQQQ", MOUNT_READ_ONLY | MOUNT_NO_SETUID, 0, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    done = _libc.syscall(MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE, attributes, size)
    _call("mount_setattr", done)


@contextlib.contextmanager
def fresh_box(size_bytes: int) -> Iterator[str]:
    """An empty file system to write into, gone afterwards with all that was written."""
    flags, limits = MS_NOSUID | MS_NODEV | MS_NOEXEC, f"size={size_bytes},nr_inodes={MAX_FILES}"
    _mount("tmpfs", BOX, "tmpfs", flags, f"{limits},mode=1777")
    try:
        yield BOX
    finally:
        _call("umount2", _libc.umount2(BOX.encode(), MNT_DETACH))


# --- Landlock -----------------------------------------------------------------------------------

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
READ_FILE, READ_DIR = 1 << 2, 1 << 3
WRITE_FILE, REMOVE_FILE, MAKE_REG, TRUNCATE = 1 << 1, 1 << 5, 1 << 8, 1 << 14
TO_OTHERS = 3  # what Landlock's version 6 scopes: abstract sockets and signals


def landlock_version() -> int:
    """The kernel's version of Landlock, 0 where it has none."""
    return max(0, _libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def landlock(readable: Iterable[str], listable: Iterable[str], writable: str) -> int:
    """A ruleset's descriptor: read the files of `readable`, write files in `writable`, no more.

    No folders are made there: on some file systems they are slow to remove.
    listable: folders whose names may be listed, which finding a module needs.
    Also forbids TCP (version 4) and, from 6 on, signals to and sockets of other processes.
    Raises OSError.
    """
    version = landlock_version()
    if version < 1:
        raise OSError(errno.ENOSYS, "the kernel has no Landlock")
    bits = 13 + min(version - 1, 2) + (1 if version >= 5 else 0)
    handled = (1 << bits) - 1
    scoped = TO_OTHERS if version >= 6 else 0
    attributes = struct.pack("QQQ", handled, 3 if version >= 4 else 0, scoped)
    ruleset = _ruleset(attributes[: 24 if version >= 6 else 16 if version >= 4 else 8])

    def allow(path: str, access: int) -> None:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        if not os.path.isdir(path):
            access &= READ_FILE | WRITE_FILE | TRUNCATE
        if access & handled:
            rule = struct.pack("=Qi", access & handled, place)
            _call(f"landlock_add_rule {path}", _libc.syscall(ADD_RULE, ruleset, 1, rule, 0))
        os.close(place)

    for path in readable:
        allow(path, READ_FILE | READ_DIR)
    for path in listable:
        allow(path, READ_DIR)
    for path in DEVICES:
        allow(path, READ_FILE | WRITE_FILE)
    write = WRITE_FILE | REMOVE_FILE | MAKE_REG | TRUNCATE
    allow(writable, READ_FILE | READ_DIR | write)
    return ruleset


def landlock_scope() -> int:
    """A ruleset's descriptor: no signals to, nor abstract sockets of, other processes.

    For a root of its own, which needs no rules for files. Raises OSError.
    """
    if landlock_version() < 6:
        raise OSError(errno.ENOSYS, "the kernel's Landlock knows no scopes")
    return _ruleset(struct.pack("QQQ", 0, 0, TO_OTHERS))


def _ruleset(attributes: bytes) -> int:
    made = _libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    ruleset = _call("landlock_create_ruleset", made)
    os.set_inheritable(ruleset, False)
    return ruleset


def readable_parts(folders: Iterable[str], hidden: Sequence[str]) -> list[str]:
    """`folders`, each that holds something hidden replaced by what else it holds.

    Landlock's rules reach everything below a path, so they cannot leave a part out.
    """
    parts: list[str] = []
    for folder in folders:
        inner = [h for h in hidden if h.startswith(folder.rstrip("/") + "/")]
        if folder in hidden:
            continue
        if not inner:
            parts.append(folder)
            continue
        entries = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
        parts += readable_parts([e for e in entries if not os.path.islink(e)], hidden)
        parts += [e for e in entries if os.path.islink(e) and os.path.isfile(e)]
    return parts


def enter_landlock(ruleset: int) -> None:
    """Puts the calling process, which must have set no_new_privs, under the rules for good."""
    _call("landlock_restrict_self", _libc.syscall(RESTRICT_SELF, ruleset, 0))


# --- the process itself -------------------------------------------------------------------------


def remove_contents(folder: str) -> None:
    """Empties a folder of whatever a program left: deep, locked or named oddly.

    Folders are flattened, so that no path is long and nothing recurses, under names that the
    program, which has ended, could not foresee. Raises OSError.
    """
    token, count = secrets.token_hex(8), 0
    while names := os.listdir(folder):
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.isdir(path) or os.path.islink(path):
                os.unlink(path)
                continue
            os.chmod(path, 0o700)
            for inner in os.listdir(path):
                count += 1
                source = os.path.join(path, inner)
                if os.path.isdir(source) and not os.path.islink(source):
                    os.chmod(source, 0o700)  # a folder moves only where it can be written
                os.rename(source, os.path.join(folder, f"{token}.{count}"))
            os.rmdir(path)


def drop_privileges(uid: int | None) -> None:
    """No capability is left and none can come back; `uid`, where given, is the new user."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _call("capset", _libc.capset(header, nothing))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_DUMPABLE, 0)


def limit_resources(
    memory_bytes: int, cpu_seconds: float, file_bytes: int, open_files: int, processes: int | None
) -> None:
    """Hard limits of the calling process. processes counts those of its user, threads too."""

    def at_most(kind: int, value: int) -> None:
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))

    at_most(resource.RLIMIT_AS, memory_bytes)
    at_most(resource.RLIMIT_CPU, int(cpu_seconds) + 2)
    at_most(resource.RLIMIT_FSIZE, file_bytes)
    at_most(resource.RLIMIT_NOFILE, open_files)
    at_most(resource.RLIMIT_CORE, 0)
    if processes is not None:
        at_most(resource.RLIMIT_NPROC, processes)
