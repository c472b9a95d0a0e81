"""The verdict on a program, which this process gives: sandboxes only send data."""

import ast
import builtins
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from entropy_trl.rewards.code.cases import Tests
from entropy_trl.rewards.code.equality import equals, same_output
from entropy_trl.rewards.code.inside.wire import Encoded, encode
from entropy_trl.rewards.code.lift import Call, calls
from entropy_trl.rewards.code.sandbox import package_folders
from entropy_trl.rewards.code.seccomp import call_filter
from entropy_trl.rewards.code.session import EndedError, Sandbox, StartError, TimeLimitError


PASSED, WRONG, TIMEOUT, CRASH = "passed", "wrong answer", "timeout", "crash"
COMPILE, SANDBOX, NO_PROGRAM = "compile error", "sandbox failure", "no program"
_ATTEMPTS = 3


@dataclass(frozen=True)
class Outcome:
    """How a program did.

    Args:
        kind (`str`): `PASSED`, or what the first failure was.
        passed (`int`): How many tests it passed.
        total (`int`): How many there are.
        reason (`str`): Why there was no sandbox.
    """

    kind: str
    passed: int = 0
    total: int = 1
    reason: str = ""


@dataclass(frozen=True)
class Limits:
    """What a program may take.

    Args:
        seconds (`float`): Of wall time, with all tests.
        memory (`int`): Bytes of address space.
        partial (`bool`): Whether the tests after the first failure count too.
        url (`str`): A server that speaks `/run_code`, or empty for sandboxes of this machine.
    """

    seconds: float
    memory: int
    partial: bool = False
    url: str = ""


def judge(program: str, tests: Tests, limits: Limits) -> Outcome:
    """Run a program's tests, in sandboxes."""
    reason = ""
    for attempt in range(_ATTEMPTS):
        try:
            return _judge(program, tests, limits)
        except StartError as error:
            reason = str(error)
            time.sleep(0.1 * attempt)
    return Outcome(SANDBOX, reason=reason)


def _judge(program: str, tests: Tests, limits: Limits) -> Outcome:
    start = {
        "prefix": tests.prefix,
        "program": program,
        "classes": tests.classes,
        "script": tests.kind == "stdin",
        "paths": package_folders(),
        "limits": [limits.memory, int(limits.seconds) + 2],
    }
    run = _Run(limits, tests, start)
    if tests.kind == "stdin":
        return run.scripts()
    found = calls(tests)
    return run.calls(found) if found is not None else run.talk()


@dataclass
class _Run:
    limits: Limits
    tests: Tests
    start: dict[str, Any]
    begun: float = field(default_factory=time.monotonic)
    end: float = 0.0  # of the time of the whole program
    case_end: float = 0.0
    kind: str = PASSED
    passed: int = 0

    def calls(self, found: list[Call]) -> Outcome:
        """Tests that are calls: their results are compared here."""
        with self._sandbox("program") as program:
            program.wait_started()
            self._begin()
            try:
                self._ready(program)
                for call in found:
                    if self.kind != PASSED and not self.limits.partial:
                        break
                    self._next_case()
                    self._note(self._call(program, call))
            except _StopError as stop:
                self._note(stop.kind)
        return Outcome(self.kind, self.passed, len(found))

    def _call(self, program: Any, call: Call) -> str:
        program.send(_line(["ask", "apply", *_plain((call.entry_point, call.arguments, call.named))]))
        answer = self._message(program)
        if answer[0] != "value":
            return CRASH
        right = any(equals(answer[1:], expected, call.lenient, call.tolerance) for expected in call.expected)
        return PASSED if right else WRONG

    def scripts(self) -> Outcome:
        """Tests of input and output: the program runs as a script for each, and its output is compared here."""
        program = None
        try:
            for case in self.tests.cases:
                if self.kind != PASSED and (not self.limits.partial or self.kind == COMPILE or self._is_over()):
                    break
                try:
                    if program is None and not self.limits.url:
                        program = self._script_sandbox()
                    self._next_case()
                    self._note(self._script(program, case))
                except _StopError as stop:
                    self._note(stop.kind)
                    if program is not None:
                        program.close()
                    program = None
        finally:
            if program is not None:
                program.close()
        return Outcome(self.kind, self.passed, len(self.tests.cases))

    def _script_sandbox(self) -> Sandbox:
        self.start["filter"] = call_filter().hex()
        program = Sandbox("program", self.start)
        try:
            program.wait_started()
            if not self.end:
                self._begin()
            self._next_case()
            self._ready(program)
        except BaseException:
            program.close()
            raise
        return program

    def _script(self, program: Sandbox | None, case: dict[str, str]) -> str:
        if program is None:
            output, code = self._remote_script(case["input"])
        else:
            program.send(_line(["script", case["input"]]))
            answer = self._message(program)
            if answer[0] != "output" or not isinstance(answer[1], str):
                return CRASH
            output, code = answer[1].encode("latin-1", "replace").decode(errors="replace"), answer[2]
        if code != 0:
            return CRASH
        return PASSED if same_output(output, case["output"], self.tests.tolerance) else WRONG

    def _remote_script(self, text: str) -> tuple[str, Any]:
        from entropy_trl.rewards.code.remote import run_code

        if not self.end:
            self._begin()
            self._next_case()
        code = f"{self.tests.prefix}\n{self.start['program']}"
        try:
            result = run_code(self.limits.url, code, text, self._deadline() - time.monotonic(), self.limits.memory)
        except TimeLimitError:
            raise _StopError(TIMEOUT) from None
        if "SyntaxError" in str(result.get("stderr")):
            raise _StopError(COMPILE)
        return str(result.get("stdout") or ""), result.get("return_code")

    def talk(self) -> Outcome:
        """Tests that need the program's objects: they have a sandbox of their own, and this carries the messages."""
        start = {
            "kind": self.tests.kind,
            "prefix": self.tests.prefix,
            "setup": self.tests.setup,
            "cases": self.tests.cases,
            "entry_point": self.tests.entry_point,
            **wanted_names(self.tests),
            "classes": self.start["classes"],
            "paths": self.start["paths"],
            "limits": self.start["limits"],
        }
        total, skipped = 1, 0
        with self._sandbox("program") as program, self._sandbox("tests", start) as tests:
            program.wait_started()
            tests.wait_started()
            self._begin()
            try:
                names = self._ready(program)
                tests.send(_line(["ready", names]))
                message = self._exchange(tests, program)
                if message[0] == "count":
                    total = message[1]
                    for _ in range(total):
                        self._next_case()
                        message = self._exchange(tests, program)
                        if message[1] == "skipped":
                            skipped += 1
                            continue
                        self._note(_STATUSES[message[1]])
                        if self.kind != PASSED and not self.limits.partial:
                            break
                else:
                    self._note(_STATUSES[message[1]])
            except _StopError as stop:
                self._note(stop.kind)
        if self.kind == PASSED and not self.passed:
            self.kind = WRONG  # no test has looked at it
        return Outcome(self.kind, self.passed, max(1, total - skipped))

    def _exchange(self, tests: Any, program: Any) -> list[Any]:
        """Carry messages between the tests and the program, until the tests have something for this process."""
        while True:
            line = self._receive(tests)
            if not line.startswith((b'["ask"', b'["value"', b'["raised"')):
                return _parsed(line)
            program.send(line)
            tests.send(self._receive(program))

    def _sandbox(self, role: str, start: dict[str, Any] | None = None) -> Any:
        if self.limits.url:
            from entropy_trl.rewards.code.remote import RemoteSandbox

            return RemoteSandbox(self.limits.url, role, start or self.start, self.limits.memory)
        return Sandbox(role, start or self.start)

    def _begin(self) -> None:
        """The time counts from the start of the sandbox; where that was slow, half of it is left for the program."""
        self.end = max(self.begun + self.limits.seconds, time.monotonic() + self.limits.seconds / 2)
        self._next_case()

    def _next_case(self) -> None:
        self.case_end = time.monotonic() + (self.tests.time_limit or self.limits.seconds)

    def _deadline(self) -> float:
        return min(self.end, self.case_end)

    def _is_over(self) -> bool:
        return time.monotonic() >= self.end

    def _note(self, kind: str) -> None:
        self.passed += kind == PASSED
        if self.kind == PASSED:
            self.kind = kind

    def _ready(self, program: Any) -> list[str]:
        answer = self._message(program)
        if answer[0] != "ready":
            raise _StopError(COMPILE if answer[0] == "compile" else CRASH)
        return [name for name in answer[1] if isinstance(name, str) and name.isidentifier()]

    def _message(self, sandbox: Any) -> list[Any]:
        return _parsed(self._receive(sandbox))

    def _receive(self, sandbox: Any) -> bytes:
        try:
            return sandbox.receive(self._deadline())
        except TimeLimitError:
            raise _StopError(TIMEOUT) from None
        except EndedError:
            raise _StopError(CRASH) from None


class _StopError(Exception):
    """The run cannot go on."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


_STATUSES = {"passed": PASSED, "failed": WRONG, "raised": CRASH, "crashed": CRASH}


def _parsed(line: bytes) -> list[Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise _StopError(CRASH) from None
    if not isinstance(message, list) or len(message) < 2:
        raise _StopError(CRASH)
    return message


def _line(message: list[Any]) -> bytes:
    return json.dumps(message).encode()


def _plain(value: Any) -> Encoded:
    def refuse(item: Any) -> list[Any]:
        raise TypeError(f"{item!r} is no plain data")

    return encode(value, refuse)


def wanted_names(tests: Tests) -> dict[str, list[str]]:
    """Return the names that tests take from the program: those that they load, and that are nobody else's.

    Built-in names and modules of the standard library are never the program's: one that has an `abs` or a `math` of
    its own would decide its tests. Tests may use modules that only the program imports, and find the real ones.
    """
    loaded, called = set(), set()
    for code in (tests.setup, *tests.cases):
        tree = ast.parse(code)
        owners = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                loaded.add(node.id)
                if id(node) not in owners:
                    called.add(node.id)
    own = {name for node in ast.parse(tests.prefix).body for name in _defined(node)}
    entry = {node.id for node in ast.walk(ast.parse(tests.entry_point or "0")) if isinstance(node, ast.Name)}
    modules = (loaded & set(sys.stdlib_module_names)) - called - own - entry
    wanted = (loaded - own - set(vars(builtins)) - modules) | (entry & loaded)
    return {"wanted": sorted(wanted), "modules": sorted(modules)}


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []
