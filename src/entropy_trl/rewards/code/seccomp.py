"""The system calls that a sandbox refuses, as a filter of the kernel's.

A program is one process, with threads at most: so it leaves nothing behind, and the limit on its memory is one limit.
Refused too are memory that no limit counts, sockets but those between its own threads (a virtual machine's host is in
no network namespace), and calls by which sandboxes were left in the past.
"""

import errno
import platform
import struct


class UnsupportedMachineError(RuntimeError):
    """There is no list of system calls for this machine."""


#: By machine: the audit architecture of linux/audit.h, then numbers of calls.
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CALLS = {
    # name: (x86_64, aarch64); None where the machine lacks the call
    "fork": (57, None),
    "vfork": (58, None),
    "clone": (56, 220),
    "clone3": (435, 435),
    "socket": (41, 198),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "personality": (135, 92),
    "modify_ldt": (154, None),
    "syslog": (103, 116),
    "quotactl": (179, 60),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
}
#: What the starter of scripts needs, before the filter of the script itself: processes, and a file for the input.
_STARTER = ("fork", "vfork", "memfd_create")

_LOAD, _EQUAL, _ABOVE, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_X32 = 0x40000000
_CLONE_THREAD, _CLONE_NAMESPACES = 0x00010000, 0x7E020080
_AF_UNIX = 1


def call_filter(starter: bool = False) -> bytes:
    """Return the filter of a sandbox, or of the `starter` of scripts in one, which may start processes.

    Raises:
        UnsupportedMachineError: The machine is neither x86_64 nor aarch64.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise UnsupportedMachineError(
            f"the machine is {machine!r}: the list of refused system calls is for {' and '.join(_ARCHITECTURES)}"
        )
    column = list(_ARCHITECTURES).index(machine)
    numbers = {name: number for name, pair in _CALLS.items() if (number := pair[column]) is not None}
    denied = _ERROR | errno.EPERM
    program = [
        _step(_LOAD, value=_ARCHITECTURE),
        _step(_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        _step(_RETURN, value=denied),
        _step(_LOAD, value=_NUMBER),
        _step(_ABOVE, 0, 1, _X32),
        _step(_RETURN, value=denied),
    ]
    special = {"clone", "clone3", "socket"}
    for name, number in numbers.items():
        if name not in special and not (starter and name in _STARTER):
            program += [_step(_EQUAL, 0, 1, number), _step(_RETURN, value=denied)]
    # Its arguments are out of a filter's sight; the C library then calls `clone`.
    program += [_step(_EQUAL, 0, 1, numbers["clone3"]), _step(_RETURN, value=_ERROR | errno.ENOSYS)]
    thread = [_step(_BITS, 1, 0, _CLONE_THREAD), _step(_RETURN, value=_ERROR | errno.EAGAIN)]
    namespaces = [_step(_BITS, 0, 1, _CLONE_NAMESPACES), _step(_RETURN, value=denied)]
    flags = [_step(_LOAD, value=_FIRST_ARGUMENT), *namespaces, *([] if starter else thread)]
    program += [_step(_EQUAL, 0, len(flags) + 1, numbers["clone"]), *flags, _step(_RETURN, value=_ALLOW)]
    family = [_step(_LOAD, value=_FIRST_ARGUMENT), _step(_EQUAL, 1, 0, _AF_UNIX), _step(_RETURN, value=denied)]
    program += [_step(_EQUAL, 0, len(family), numbers["socket"]), *family]
    program.append(_step(_RETURN, value=_ALLOW))
    return b"".join(program)


def _step(code: int, if_true: int = 0, if_false: int = 0, value: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
