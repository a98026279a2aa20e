"""The walls of `sandbox.py`, put up from inside: a fresh process runs this file, limits itself, becomes the program.

    python -I -S sandbox_walls.py PLAN      in the folder that holds main.py; PLAN is a `Plan` as JSON

Everything here is the standard library and `prctl`-like calls that need no privilege, so it works in containers too.
Landlock (Linux 5.13) keeps files shut, seccomp refuses system calls; both hold across `exec` and cannot be taken back.
Linux: landlock(7), seccomp(2), capset(2); numbers of system calls from asm/unistd_64.h and asm-generic/unistd.h.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TypedDict


class Plan(TypedDict):
    """How narrow it gets."""

    memory_bytes: int
    cpu_s: int
    file_bytes: int
    """Longest file that the program can write, its output included."""
    readable: list[str]
    """What Python needs in order to run, beside SYSTEM."""
    strict: bool
    """Run nothing where a wall cannot be built."""
    refused: str
    """The file to write the reason to, then. The program cannot reach it."""
    owner: int
    """The process that runs the program, which never outlives it."""
    alarm_s: float
    """When the program ends by itself, where nobody does it."""


OPEN_FILES = 64
SYSTEM = (
    *("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime"),
    *("/dev/urandom", "/dev/zero", "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu"),
)
"""What the program may read. Not in it: other people's files, and the environment of other processes."""

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the tables below, and AUDIT_ARCH_*."""
FORBIDDEN = {
    "network": ((41, 198), (425, 425)),  # socket, io_uring_setup (it opens sockets too); socketpair stays
    "processes": ((57, None), (58, None)),  # fork, vfork
    "other processes": (
        *((62, 129), (200, 130), (129, 138), (297, 240), (424, 424)),  # kill, tkill, *sigqueueinfo, pidfd_send_signal
        *((101, 117), (141, 140), (203, 122), (144, 119), (142, 118), (314, 274), (251, 30)),  # ptrace, priorities
    ),
    "memory that outlives them": ((29, 194), (68, 186), (64, 190), (319, 279)),  # shm-, msg-, semget, memfd_create
    "files by name": ((76, 45),),  # truncate: Landlock knows it from Linux 6.2 on
}
PRETENDED = ((90, None), (91, 52), (268, 53), (452, 452), (92, None), (93, 55), (94, None), (260, 54))
"""chmod, chown and their kin, which Landlock does not know, say yes and do nothing: to copy a file takes them."""
CLONE, CLONE3, TGKILL, PRLIMIT = (56, 220), (435, 435), (234, 131), (302, 261)
CLONE_THREAD = 0x10000

LANDLOCK_READ = 0b1101  # execute, read a file, list a folder
LANDLOCK_FOLDERS = 0b1000  # of these, what makes sense for folders only
LANDLOCK_ALL = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # by version of Landlock

_libc = ctypes.CDLL(None, use_errno=True)


class WallError(Exception):
    """This system cannot build a wall."""


def main() -> NoReturn:
    """Limit this process, then become the program."""
    plan: Plan = json.loads(sys.argv[1])
    _set_limits(plan)
    missing = _build_walls(plan["readable"])
    if missing and plan["strict"]:
        Path(plan["refused"]).write_text("; ".join(missing), encoding="utf-8")
        sys.exit(1)
    if os.getppid() != plan["owner"]:  # it ended before a signal was ordered for that
        sys.exit(1)
    os.execv(sys.executable, [sys.executable, "-I", "-B", "-u", "-X", "utf8", "main.py"])


def _set_limits(plan: Plan) -> None:
    limits = {
        resource.RLIMIT_CPU: plan["cpu_s"],
        resource.RLIMIT_FSIZE: plan["file_bytes"],
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    if sys.platform == "linux":
        limits[resource.RLIMIT_AS] = plan["memory_bytes"]
    else:  # which has no use for RLIMIT_AS; on Linux this one would forbid threads, and let root fork
        limits[resource.RLIMIT_NPROC] = 0
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    signal.setitimer(signal.ITIMER_REAL, plan["alarm_s"])  # for systems without PR_SET_PDEATHSIG; it lasts across exec


def _build_walls(readable: Sequence[str]) -> list[str]:
    """Build what can be built. Returns what cannot, and why."""
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in MACHINES or sys.maxsize < 2**32:
        return [f"there are walls for 64-bit Linux on {' and '.join(MACHINES)}, not for {os.uname().sysname} {machine}"]
    walls: tuple[Callable[[], object], ...] = (
        lambda: _call("prctl(PR_SET_PDEATHSIG)", _libc.prctl(1, signal.SIGKILL)),  # no program outlives the run
        lambda: _call("prctl(PR_SET_NO_NEW_PRIVS)", _libc.prctl(38, 1, 0, 0, 0)),
        lambda: _shut_files([*SYSTEM, *readable]),
        _give_up_rights,
        lambda: install_filter(_rules(machine), machine),
    )
    missing = []
    for build in walls:
        try:
            build()
        except WallError as error:
            missing.append(str(error))
    return missing


def _give_up_rights() -> None:
    """Empty capability sets (version 3 of the call): root is nobody in particular in here."""
    _call("capset", _libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()))


def _shut_files(readable: Sequence[str]) -> None:
    """Landlock: write in this folder alone, read what Python needs."""
    version = _libc.syscall(444, None, 0, 1)
    if version < 1:
        raise WallError("this kernel has no Landlock (Linux 5.13 or later, not switched off), so files stay open")
    every = LANDLOCK_ALL[max(known for known in LANDLOCK_ALL if known <= version)]
    ruleset = _call("landlock_create_ruleset", _libc.syscall(444, ctypes.byref(ctypes.c_uint64(every)), 8, 0))
    for path, access in (*((path, LANDLOCK_READ) for path in readable), ("/dev/null", 0b110), (".", every)):
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # not every system has every path; what is left out stays shut
        allowed = access if Path(path).is_dir() else access & ~LANDLOCK_FOLDERS
        rule = struct.pack("=Qi", allowed, opened)
        _call(f"landlock_add_rule({path})", _libc.syscall(445, ruleset, 1, rule, 0))
        os.close(opened)
    _call("landlock_restrict_self", _libc.syscall(446, ruleset, 0))
    os.close(ruleset)


def _rules(machine: str) -> list[tuple[int, int, int, int]]:
    """What is refused, as instructions of seccomp's little machine; the number of the system call is loaded."""
    column, _ = MACHINES[machine]
    refused = {numbers[column]: errno.EPERM for group in FORBIDDEN.values() for numbers in group}
    refused |= {numbers[column]: 0 for numbers in PRETENDED}
    refused[CLONE3[column]] = errno.ENOSYS  # its flags are out of sight; libc then falls back on clone
    own_pid = os.getpid()
    return [
        *refuse({number: error for number, error in refused.items() if number is not None}),
        *_only_if(CLONE[column], (0x45, 0, 1, CLONE_THREAD)),  # threads, not processes
        *_only_if(TGKILL[column], (0x15, 0, 1, own_pid)),  # raise() and abort() use it
        *_only_if(PRLIMIT[column], (0x15, 0, 1, 0)),  # getrlimit and setrlimit of this process
    ]


def refuse(errors: Mapping[int, int]) -> list[tuple[int, int, int, int]]:
    """Instructions that answer these system calls with these error numbers."""
    return [step for number, error in errors.items() for step in ((0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | error))]


def _only_if(number: int | None, test: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
    """Allow a system call if its first argument passes the test, refuse it otherwise."""
    assert number is not None
    allow, deny = (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x50000 | errno.EPERM)
    return [(0x15, 0, 4, number), (0x20, 0, 0, 16), test, allow, deny]


def install_filter(rules: Sequence[tuple[int, int, int, int]], machine: str) -> None:
    """seccomp: answer system calls by `rules`, allow the rest; those of another machine's numbering end the process.

    Needs PR_SET_NO_NEW_PRIVS. An instruction is (code, jump if true, jump if false, operand), as in classic BPF.
    """
    kill, allow = (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7FFF0000)
    steps = [(0x20, 0, 0, 4), (0x15, 1, 0, MACHINES[machine][1]), kill]  # 4: where seccomp_data has the machine
    steps += [(0x20, 0, 0, 0), (0x35, 0, 1, 0x40000000), kill, *rules, allow]  # 0: the number; above: those of x32
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(steps), ctypes.addressof(buffer))
    _call("prctl(PR_SET_SECCOMP)", _libc.prctl(22, 2, program, 0, 0))


def _call(name: str, result: int) -> int:
    if result < 0:
        raise WallError(f"{name} failed: {os.strerror(ctypes.get_errno())}")
    return result


if __name__ == "__main__":
    main()
