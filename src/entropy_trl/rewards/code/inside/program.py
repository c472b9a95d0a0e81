"""The program's sandbox: runs the program, and calls what the parent or the tests ask for.

Nothing here is trusted once the program runs: it may change all of this. Its answers are data, which others judge.
"""

import _sitebuiltins
import atexit
import builtins
import operator
import os
import resource
import sys
import types
from typing import Any

from entropy_trl.rewards.code.inside.peer import Line, Opaque, Peer, Remote, open_streams


MOST_OUTPUT = 8 * 2**20
_BLOCK = 1 << 16


class Function(Remote):
    """A function or an iterator of the tests that was passed to the program. It can be called, and no more."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._peer.ask("call", self, arguments, named)

    def __iter__(self) -> "Function":
        return self._peer.ask("iterate", self)

    def __next__(self) -> Any:
        return self._peer.ask("next", self)


def main() -> None:
    """Run what the first message holds, then answer the others."""
    line = Line()
    start = line.read()
    if start["limits"]:  # the sandbox of a server has its own
        _limit(*start["limits"])
    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D"))  # site would, which is not imported
    sys.path.extend(start["paths"])
    sys.argv = ["solution.py"]
    open_streams()
    line.write(["hello"])
    try:
        prefix, program = _compile(start["prefix"], start["program"])
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line.write(["compile", f"{type(error).__name__}: {error}"])
        return
    if start["script"]:
        line.write(["ready", []])
        while True:
            line.write(_script(line.read()[1], (prefix, program), bytes.fromhex(start["filter"])))
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    served = Served(module)
    peer = Peer(
        line, lambda _, name, values: getattr(served, name)(*values), lambda peer, number, _: Function(peer, number)
    )
    try:
        exec(prefix, module.__dict__)
        exec(program, module.__dict__)
    except BaseException as error:  # also `SystemExit`: a program that leaves has not passed
        line.write(peer.raised(error))
        return
    found = {name: vars(module)[name] for name in start["classes"] if isinstance(vars(module).get(name), type)}
    served.classes = peer.classes = found
    line.write(["ready", [name for name in vars(module) if not name.startswith("__")]])
    while True:
        peer.answer(line.read())


def _limit(memory: int, seconds: int) -> None:
    megabyte = 2**20
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_NPROC: 64,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_FSIZE: 32 * megabyte,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: megabyte,
        resource.RLIMIT_STACK: 64 * megabyte,
    }
    for limit, value in limits.items():
        _, most = resource.getrlimit(limit)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (value, value))


def _compile(prefix: str, program: str) -> tuple[types.CodeType, types.CodeType]:
    """A program that is no text of its own is the rest of the prefix's, as HumanEval's completions are."""
    try:
        return compile(prefix, "<prefix>", "exec", dont_inherit=True), compile(
            program, "<solution>", "exec", dont_inherit=True
        )
    except SyntaxError as error:
        try:
            whole = compile(prefix + program, "<solution>", "exec", dont_inherit=True)
        except SyntaxError:
            raise error from None
        return compile("", "<prefix>", "exec"), whole


def _entry(module: types.ModuleType, entry_point: str) -> Any:
    """The function of an entry point; where there is none, the method of that name of a class `Solution`."""
    namespace = vars(module)
    if entry_point.isidentifier() and entry_point not in namespace and hasattr(namespace.get("Solution"), entry_point):
        entry_point = f"Solution().{entry_point}"
    return eval(entry_point, namespace)


class Served:
    """What the parent and the tests may ask of the program. Each method is an operation."""

    def __init__(self, module: types.ModuleType):
        self._module = module
        self.classes: dict[str, type] = {}

    def apply(self, entry_point: str, arguments: Any, named: dict[str, Any]) -> Any:
        return _entry(self._module, entry_point)(*arguments, **named)

    def entry(self, entry_point: str) -> Opaque:
        return Opaque(_entry(self._module, entry_point))

    def name(self, name: str) -> Any:
        value = getattr(self._module, name)
        return Opaque(value) if callable(value) else value

    def call(self, function: Any, arguments: Any, named: dict[str, Any]) -> Any:
        """The result, and the arguments as the call left them: tests look at a list that was sorted in place."""
        result = function(*arguments, **named)
        made = isinstance(function, type) and function.__module__ == "solution"
        return Opaque(result) if made and function.__name__ not in self.classes else result, arguments

    def get(self, item: Any, name: str) -> Any:
        return getattr(item, name)

    def set(self, item: Any, name: str, value: Any) -> None:
        setattr(item, name, value)

    def delete(self, item: Any, name: str) -> None:
        delattr(item, name)

    def item(self, item: Any, key: Any) -> Any:
        return item[key]

    def set_item(self, item: Any, key: Any, value: Any) -> None:
        item[key] = value

    def delete_item(self, item: Any, key: Any) -> None:
        del item[key]

    def iterate(self, item: Any) -> Opaque:
        return Opaque(iter(item))

    def unary(self, name: str, item: Any) -> Any:
        function: Any = _UNARY.get(name) or getattr(operator, name)
        return function(item)

    def binary(self, name: str, first: Any, second: Any) -> Any:
        return getattr(operator, name)(first, second)

    def instance(self, item: Any, kind: Any) -> bool:
        return isinstance(item, kind)

    def enter(self, item: Any) -> Any:
        return item.__enter__()

    def leave(self, item: Any) -> None:
        item.__exit__(None, None, None)


_UNARY = {"len": len, "next": next, "bool": bool, "str": str, "repr": repr, "int": int, "float": float, "round": round}


def _script(text: str, codes: tuple[types.CodeType, types.CodeType], forbidden: bytes) -> list[Any]:
    """Run the program as a script in a process of its own. Returns what it wrote, and its exit code."""
    source = os.memfd_create("input")
    with open(source, "wb", closefd=False) as file:
        file.write(text.encode("utf-8", "surrogatepass"))
    os.lseek(source, 0, os.SEEK_SET)
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        os.dup2(source, 0)
        os.dup2(writing, 1)
        os.closerange(3, 64)
        _forbid(forbidden)
        os._exit(_run(codes))
    os.close(source)
    os.close(writing)
    output = bytearray()
    while block := os.read(reading, _BLOCK):
        output += block
        if len(output) > MOST_OUTPUT:
            os.kill(process, 9)
            break
    os.close(reading)
    _, status = os.waitpid(process, 0)
    return ["output", output.decode("latin-1"), os.waitstatus_to_exitcode(status)]


def _forbid(calls: bytes) -> None:
    """Apply a filter of system calls: from here on, there is no other process."""
    if not calls:  # the sandbox of a server has rules of its own
        return
    import ctypes

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]

    process = ctypes.CDLL(None, use_errno=True)
    if process.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(Filter(len(calls) // 8, calls)), 0, 0):
        os._exit(70)


_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2


def _run(codes: tuple[types.CodeType, types.CodeType]) -> int:
    """Run a program as the interpreter would, up to its exit code."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    open_streams()
    code = 0
    try:
        for part in codes:
            exec(part, module.__dict__)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        code = 1
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        return 1
    return code & 0xFF
