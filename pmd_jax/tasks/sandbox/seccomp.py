"""The system calls that a program in the sandbox may not make, as a seccomp filter.

A denylist: what reaches other processes, the network, other mounts, kernel settings, memory that no
limit counts, and, where a program sees our files, their metadata, which Landlock leaves alone.
Threads are allowed, processes are not; a program may signal itself alone. Denied calls fail with
EPERM, so that Python raises PermissionError.

Standard library only: the server inside the sandbox imports this file by itself. Numbers are those
of the kernel's headers for x86_64 and for aarch64 (asm-generic).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import struct

# name, number on x86_64, number on aarch64; "-" where there is none
DENIED = """
socket 41 198; bind 49 200; connect 42 203; listen 50 201; accept 43 202; accept4 288 242
fork 57 -; vfork 58 -; execve 59 221; execveat 322 281
ptrace 101 117; process_vm_readv 310 270; process_vm_writev 311 271; process_madvise 440 440
pidfd_open 434 434; pidfd_getfd 438 438; pidfd_send_signal 424 424; kcmp 312 272
rt_sigqueueinfo 129 138; rt_tgsigqueueinfo 297 240; tkill 200 130
mount 165 40; umount2 166 39; pivot_root 155 41; chroot 161 51; unshare 272 97; setns 308 268
mount_setattr 442 442; move_mount 429 429; open_tree 428 428; open_tree_attr 467 467
fsopen 430 430; fsconfig 431 431; fsmount 432 432; fspick 433 433
bpf 321 280; perf_event_open 298 241; userfaultfd 323 282; memfd_secret 447 447
io_uring_setup 425 425; io_uring_enter 426 426; io_uring_register 427 427
keyctl 250 219; add_key 248 217; request_key 249 218; capset 126 91
kexec_load 246 104; kexec_file_load 320 294; init_module 175 105; finit_module 313 273
delete_module 176 106; reboot 169 142; swapon 167 224; swapoff 168 225; acct 163 89
quotactl 179 60; quotactl_fd 443 443; syslog 103 116; personality 135 92; vhangup 153 58
settimeofday 164 170; clock_settime 227 112; clock_adjtime 305 266; adjtimex 159 171
sethostname 170 161; setdomainname 171 162; modify_ldt 154 -; ioperm 173 -; iopl 172 -
open_by_handle_at 304 265; name_to_handle_at 303 264; fanotify_init 300 262
shmget 29 194; shmat 30 196; shmctl 31 195; semget 64 190; semop 65 193; semctl 66 191
semtimedop 220 192; msgget 68 186; msgsnd 69 189; msgrcv 70 188; msgctl 71 187
mq_open 240 180; mq_unlink 241 181; memfd_create 319 279; io_setup 206 0
inotify_init 253 -; inotify_init1 294 26; inotify_add_watch 254 27
mknod 133 -; mknodat 259 33
setpriority 141 140; ioprio_set 251 30; sched_setaffinity 203 122; sched_setscheduler 144 119
sched_setparam 142 118; sched_setattr 314 274; move_pages 279 239; migrate_pages 256 238
mbind 237 235; set_mempolicy 238 237
"""
METADATA = """
chmod 90 -; fchmod 91 52; fchmodat 268 53; fchmodat2 452 452; chown 92 -; fchown 93 55
lchown 94 -; fchownat 260 54; setxattr 188 5; lsetxattr 189 6; fsetxattr 190 7
setxattrat 463 463; removexattr 197 14; lremovexattr 198 15; fremovexattr 199 16
removexattrat 466 466; utime 132 -; utimes 235 -; utimensat 280 88; futimesat 261 -
file_setattr 469 469; truncate 76 45
"""
# Judged by an argument, given as (x86_64, aarch64): see build_filter.
CLONE, KILL_, TGKILL, PRLIMIT = (56, 220), (62, 129), (234, 131), (302, 261)
PRCTL, FCNTL, IOCTL, SOCKETPAIR = (157, 167), (72, 25), (16, 29), (53, 199)
CLONE3 = 435
PDEATHSIG = 1  # prctl
# fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY, by which signals are sent
SIGNALLING = (8, 10, 15, 1024, 1026)
# ioctl: FIOSETOWN, SIOCSPGRP, FIOASYNC, TIOCSTI
SIGNALLING_IOCTLS = (0x8901, 0x8902, 0x5452, 0x5412)
SOCK_STREAM, SOCK_KIND = 1, 0xF

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000  # system calls of the x32 ABI have this bit

LOAD, EQUAL, AT_LEAST, ANY_BIT, AND, RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER, ARCH, FIRST, SECOND = 0, 4, 16, 24  # offsets in struct seccomp_data, low half of arguments
CLONE_THREAD = 0x00010000
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2

Instruction = tuple[int, int, int, int]
"""(code, instructions skipped if true, if false, operand)"""


@functools.cache  # a filter is built for each test, since it names the test's process
def numbers(table: str, machine: str) -> tuple[int, ...]:
    column = 1 if machine == "x86_64" else 2
    rows = [row.split() for line in table.strip().splitlines() for row in line.split(";")]
    return tuple(int(row[column]) for row in rows if row[column] != "-")


def build_filter(machine: str, own_pid: int, metadata: bool) -> list[Instruction]:
    """The filter's instructions. metadata: whether files' metadata may be changed.

    Raises KeyError for a machine that the tables do not know.
    """
    denied, missing = FAIL | errno.EPERM, FAIL | errno.ENOSYS
    made: list[Instruction] = [
        (LOAD, 0, 0, ARCH),
        (EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":
        made += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, denied)]
    refused = numbers(DENIED, machine) + (() if metadata else numbers(METADATA, machine))
    for number in refused:
        made += [(EQUAL, 0, 1, number), (RETURN, 0, 0, denied)]
    # glibc asks for clone3 first and takes clone where there is none.
    made += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, missing)]
    allow, deny = (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, denied)
    first, second = (LOAD, 0, 0, FIRST), (LOAD, 0, 0, SECOND)
    itself = [first, (EQUAL, 0, 1, own_pid), allow]
    tests: list[tuple[tuple[int, int], list[Instruction]]] = [
        (CLONE, [first, (ANY_BIT, 0, 1, CLONE_THREAD), allow, deny]),
        (KILL_, [*itself, deny]),
        (TGKILL, [*itself, deny]),
        (PRLIMIT, [*itself, (EQUAL, 0, 1, 0), allow, deny]),
        (PRCTL, [first, (EQUAL, 0, 1, PDEATHSIG), deny, allow]),
        (FCNTL, [second, *(i for c in SIGNALLING for i in ((EQUAL, 0, 1, c), deny)), allow]),
        (IOCTL, [second, *(i for c in SIGNALLING_IOCTLS for i in ((EQUAL, 0, 1, c), deny)), allow]),
        (SOCKETPAIR, [second, (AND, 0, 0, SOCK_KIND), (EQUAL, 0, 1, SOCK_STREAM), allow, deny]),
    ]
    for pair, block in tests:
        number = pair[0 if machine == "x86_64" else 1]
        made += [(EQUAL, 0, len(block), number), *block]
    return [*made, allow]


_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install(metadata: bool) -> None:
    """Puts the calling process, which must have set no_new_privs, under the filter for good.

    metadata: whether it may change files' metadata. Raises OSError where the kernel has no seccomp,
    or the tables do not know the machine.
    """
    machine = platform.machine()
    if machine not in AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"no table of system calls for {machine}")
    instructions = build_filter(machine, os.getpid(), metadata)
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    program = _Program(len(instructions), code)
    if _libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")
