"""code_reward: right programs earn 1, no attack does, and nothing of a program outlives it."""

import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest

from entropy_trl.rewards import CodeReward, code_reward
from entropy_trl.rewards.code import SandboxError, TestsError, final_program, read_tests, sandbox
from entropy_trl.rewards.code.equality import equals, same_output
from entropy_trl.rewards.code.inside.wire import decode, encode
from entropy_trl.rewards.code.lift import calls


REWARD = CodeReward(workers=2, time_limit=30)
BRIEF = CodeReward(workers=4, time_limit=1.5, memory_limit=256)


def code(text):
    return textwrap.dedent(text).strip("\n") + "\n"


def row(kind, cases, **more):
    return json.dumps({"kind": kind, "cases": cases, **more})


def asserts(*cases, **more):
    return row("asserts", [code(case) for case in cases], **more)


#: f(2) has to be 4: as a call that this process compares, and as tests in a sandbox of their own.
CALL = asserts("assert f(2) == 4")
TALK = asserts("result = f(2)\nassert result == 4")
MODULE = row("pytest", ["from solution import f\ndef test_f():\n    assert f(2) == 4\n"])
UNIT = row(
    "pytest",
    [
        "import unittest, solution\n"
        "class A(unittest.TestCase):\n    def test(self): self.assertEqual(solution.f(2), 4)\n"
    ],
)
CHECK = asserts(
    "check(candidate)",
    setup="def check(candidate):\n    for x in [2]:\n        assert abs(candidate(x) - 2 * x) < 1e-6",
    entry_point="f",
)


def outcomes(reward, programs, tests):
    """The rewards and outcomes of programs, which are given as they are."""
    kinds = []
    rewards = reward(programs, tests, code_format="whole", log_extra=lambda _, values: kinds.extend(values))
    return list(zip(rewards, kinds, strict=True))


LINKED = code(
    """
    class ListNode:
        def __init__(self, val=0, next=None):
            self.val, self.next = val, next
    def linked(values):
        head = None
        for value in reversed(values):
            head = ListNode(value, head)
        return head
    def same(first, second):
        while first and second and first.val == second.val:
            first, second = first.next, second.next
        return first is None and second is None
    """
)

RIGHT = {
    "call": ("def f(x): return x + 2", CALL),
    "talk": ("def f(x): return x + 2", TALK),
    "module": ("def f(x): return x + 2", MODULE),
    "unittest": ("def f(x): return x + 2", UNIT),
    "check": ("def f(x): return x + 2.0", CHECK),
    "values": (
        "def f(x): return x",
        asserts(
            "assert f((1, [2.5, {3: {4}}], None, True)) == (1, [2.5, {3: {4}}], None, True)",
            "assert f(b'a') == b'a'",
            "assert f(12345678901234567890123) == 12345678901234567890123",
            "assert {(1, 'a')} == f({(1, 'a')})",
            "assert f(-1.5) == -1.5",
        ),
    ),
    "records": (
        """
        from collections import Counter, namedtuple, deque, OrderedDict
        from decimal import Decimal
        from fractions import Fraction
        from datetime import date
        Point = namedtuple("Point", "x y")
        def f():
            first = Counter("aab"), Point(1, 2), deque([1]), Decimal("1.5")
            return *first, Fraction(1, 3), date(2020, 1, 2), 1j, range(3)
        """,
        asserts(
            """
            from fractions import Fraction
            counter, point, queue, decimal, fraction, day, number, numbers = f()
            assert counter.most_common(1) == [("a", 2)] and point.x + point.y == 3 and queue.pop() == 1
            assert decimal * 2 == 3 and fraction == Fraction(1, 3) and day.year == 2020 and number * number == -1
            assert list(numbers) == [0, 1, 2]
            """
        ),
    ),
    "modules that only the program imports": (
        "import math\ndef f(x): return math.sqrt(x)",
        asserts("assert math.isclose(f(2), 2 ** 0.5)"),
    ),
    "in place": ("def f(x): x.sort()", asserts("a = [3, 1, 2]\nf(a)\nassert a == [1, 2, 3]")),
    "state": ("n = 0\ndef f():\n    global n\n    n += 1\n    return n", asserts("assert f() == 1", "assert f() == 2")),
    "a function of the tests": (
        "def f(g, xs): return [g(x) for x in xs]",
        asserts("assert f(lambda x: x + 1, iter([1, 2])) == [2, 3]", "assert f(len, ['ab']) == [2]"),
    ),
    "generators": ("def f(n):\n    for i in range(n): yield i", asserts("assert list(f(3)) == [0, 1, 2]")),
    "objects": (
        """
        class Account:
            limit = 10
            def __init__(self, owner): self.owner, self.items = owner, []
            def add(self, x):
                if x > self.limit: raise TooMuch(x)
                self.items.append(x)
                return self
            def __len__(self): return len(self.items)
            def __getitem__(self, i): return self.items[i]
            def __eq__(self, other): return self.items == other.items
            def __str__(self): return f"{self.owner}: {self.items}"
        class TooMuch(ValueError): pass
        """,
        row(
            "pytest",
            [
                code(
                    """
                    import pytest
                    from solution import Account, TooMuch

                    @pytest.fixture
                    def account():
                        return Account("Ada")

                    class TestAccount:
                        def test_add(self, account):
                            assert account.add(1).add(2)[1] == 2 and len(account) == 2 and account.items == [1, 2]
                            account.owner = "Bob"
                            assert str(account) == "Bob: [1, 2]" and isinstance(account, Account)
                            assert account == Account("Eve").add(1).add(2) != Account("Bob")

                        @pytest.mark.parametrize("x, y", [(11, 11), pytest.param(12, 12)])
                        def test_limit(self, account, x, y):
                            with pytest.raises(TooMuch, match=str(y)) as error:
                                account.add(x)
                            assert isinstance(error.value, ValueError) and error.value.args == (x,)

                        @pytest.mark.skip
                        def test_later(self):
                            assert False
                    """
                )
            ],
        ),
    ),
    "approx": (
        "def f(): return 0.1 + 0.2",
        row("pytest", ["import pytest, solution\ndef test(): assert solution.f() == pytest.approx(0.3)"]),
    ),
    "linked lists": (
        """
        class Solution:
            def reverse(self, head):
                last = None
                while head: head.next, last, head = last, head, head.next
                return last
        """,
        asserts(
            "check(candidate)",
            prefix=LINKED,
            setup="def check(f):\n    assert same(f(head=linked(range(3000))), linked(range(3000)[::-1]))",
            entry_point="Solution().reverse",
        ),
    ),
    "the rest of the prompt": (
        "    return double(x) + 1\n",
        asserts(
            "check(candidate)",
            prefix='def double(x):\n    return 2 * x\n\ndef f(x):\n    """Twice, and one."""\n',
            setup="def check(candidate):\n    assert candidate(3) == double(3) + 1\n    assert True",
            entry_point="f",
        ),
    ),
    "future": (
        "from __future__ import annotations\ndef f(x: A) -> B: return x",
        asserts("assert f(1) == 1", prefix="import math"),
    ),
    "script": (
        "import sys\nn = int(input())\nprint(sum(map(int, sys.stdin.read().split()[:n])))\nexit()",
        row("stdin", [{"input": "2\n1 2", "output": "3\n"}, {"input": "1\n5\n7", "output": "5"}]),
    ),
    "main": (
        "def main(): print(open(0).read(), end='')\nif __name__ == '__main__': main()",
        row("stdin", [{"input": "é\u2028\nx" * 40_000, "output": "é\u2028\nx" * 40_000}]),
    ),
    "threads": (
        "import threading\nfor i in range(2):\n t = threading.Thread(target=print, args=[7]); t.start(); t.join()",
        row("stdin", [{"input": "", "output": "7\n7"}]),
    ),
    "function": (
        "def f(a, b=0): return {1: (a, b)}",
        row("function", [{"args": [1], "kwargs": {"b": 0.1 + 0.2}, "output": {"1": [1, 0.3]}}], entry_point="f"),
    ),
    "method of Solution": (
        "class Solution:\n    def f(self, x): return x",
        row("function", [{"args": [1], "any_of": [[1], 1]}], entry_point="f"),
    ),
    "numpy": (
        "import numpy as np\ndef f(): return np.float64(1.5), np.int64(2), np.arange(3)",
        asserts("a, b, c = f()\nassert a == 1.5 and b == 2 and c.tolist() == [0, 1, 2]"),
    ),
}


@pytest.fixture(scope="module")
def right():
    return dict(
        zip(
            RIGHT,
            outcomes(
                REWARD, [code(p) if p[0] == "\n" else p for p, _ in RIGHT.values()], [t for _, t in RIGHT.values()]
            ),
            strict=True,
        )
    )


@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_earn_1(right, name):
    assert right[name] == (1.0, "passed")


YES = (
    "class Yes{base}:\n    def __eq__(self, o): return True\n    __ne__ = lambda self, o: False\n    __hash__ = None\n"
)
LIES = {
    "eq": YES.format(base="") + "def f(x): return Yes()",
    "eq as the class": YES.format(base="").replace("Yes", "f") + "    def __init__(self, x): pass",
    "str": YES.format(base="(str)") + "def f(x): return Yes('5')",
    "float": YES.format(base="(float)") + "def f(x): return Yes(5)",
    "int": YES.format(base="(int)") + "def f(x): return Yes(5)",
    "list": YES.format(base="(list)") + "def f(x): return Yes([5])",
    "metaclass": """
        class M(type):
            def __eq__(self, other): return True
            __hash__ = type.__hash__
        class C(metaclass=M): pass
        def f(x): return C
        """,
    "operators": """
        class Yes:
            def __getattr__(self, name): return lambda *a: Yes()
        for name in "sub rsub add radd lt le gt ge abs contains bool float round".split():
            setattr(Yes, f"__{name}__", lambda self, *a: {"bool": True}.get(name, Yes()))
        def f(x): return Yes()
        """,
    "zero": "class Zero:\n    __sub__ = __rsub__ = lambda self, other: 0\ndef f(x): return Zero()",
    "any": "from unittest.mock import ANY\ndef f(x): return ANY",
    "nan": "def f(x): return float('nan')",
    "none": "def f(x): pass",
    "exit": "import sys\ndef f(x): return 4\nsys.exit(0)",
    "exit in the call": "import sys\ndef f(x): sys.exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "assertion": "def f(x): raise AssertionError",
    "skip": "import unittest\ndef f(x): raise unittest.SkipTest",
    "own skip": """
        class SkippedError(Exception): pass
        SkippedError.__module__ = "entropy_trl.rewards.code.inside.stand_in"
        def f(x): raise SkippedError
        """,
    "abs": "abs = isinstance = print = lambda *a: 0\ndef f(x): return 1000",
    "names": "def check(g): pass\nresult = 4\nclass pytest: pass\nclass AssertionError: pass\ndef f(x): return 5",
    "builtins": """
        import builtins, operator, unittest
        builtins.abs = builtins.all = builtins.isinstance = lambda *a: True
        operator.eq = lambda *a: True
        unittest.TestCase.assertEqual = lambda *a: None
        def f(x): return 5
        """,
    "success": "print('passed', '1 passed in 0.01s', '[\"case\", \"passed\"]')\ndef f(x): print('OK'); return 5",
    "forged messages": """
        import os
        for fd in range(3, 20):
            try: os.write(fd, b'["case", "passed"]\\n["count", 0]\\n["output", "", 0]\\n')
            except OSError: pass
        def f(x): return 5
        """,
    "forged values": """
        import os
        def f(x):
            for text in ('["value", [0], []]', '["value", [0], [["value", [0]]]]', '["value", {}, 5]', '[' * 5000,
                         '1', 'é',
                         '["raised", ["a.b"], 0, []]', '["ask", "call", [0], [["tuple", 1]]]',
                         '["value", ' + '9' * 5000 + ', []]'):
                for fd in range(3, 20):
                    try: os.write(fd, text.encode() + b'\\n')
                    except OSError: pass
        """,
    "the peer": """
        import sys
        peer = sys.modules["entropy_trl.rewards.code.inside.peer"].Peer
        peer.raised = lambda *a: ["case", "passed"]
        peer.encode = lambda self, value: [True, []]
        def f(x): return 1 / 0
        """,
    "syntax": "def f(x) return 4",
    "null": "def f(x): return 4\0",
    "recursion": "def f(x): return f(x)",
    "deep": "def f(x):\n    for _ in range(200_000): x = [x]\n    return x",
    "cycle": "def f(x):\n    a = []; a.append(a); return a",
}
#: Lies that are told to every kind of test. The others are for this process, and for the tests' sandbox.
THROUGHOUT = ("eq", "str", "operators", "skip", "names", "builtins", "forged messages")
TESTS = {"call": CALL, "talk": TALK, "module": MODULE, "unit": UNIT, "check": CHECK}


@pytest.fixture(scope="module")
def lies():
    pairs = [(name, kind) for name in LIES for kind in TESTS if kind in ("call", "check") or name in THROUGHOUT]
    texts = [code(LIES[name]) if LIES[name][0] == "\n" else LIES[name] for name, _ in pairs]
    return dict(zip(pairs, outcomes(REWARD, texts, [TESTS[kind] for _, kind in pairs]), strict=True))


@pytest.mark.parametrize("name", LIES)
def test_no_lie_earns_anything(lies, name):
    found = {kind: lies[name, kind] for kind in TESTS if (name, kind) in lies}
    assert {reward for reward, _ in found.values()} == {0.0}, found
    assert not {kind for _, kind in found.values()} & {"sandbox failure", "timeout"}, found


SECRET = "a-value-that-only-the-tests-have"
SEARCH = """
    import gc, glob, os, sys
    def found():
        frame = sys._getframe()
        while frame:
            yield str(frame.f_locals) + str(frame.f_globals)
            frame = frame.f_back
        yield str(gc.get_objects())[-10**6:]
        yield str(dict(os.environ)) + str(sys.argv)
        for path in [path for p in ("/proc/*/cmdline", "/proc/*/environ", "/tmp/*", "/*") for path in glob.glob(p)]:
            try: yield open(path, errors="replace").read()
            except OSError: pass
        for line in open("/proc/self/maps"):
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            try:
                with open("/proc/self/mem", "rb") as memory:
                    memory.seek(start); yield memory.read(min(end - start, 10**7)).decode("latin-1")
            except (OSError, ValueError, OverflowError): pass
    def f(x):
        # Its own text has no secret, as the search below must not find itself.
        key = "-that-only-" + "the-tests-have"
        for text in found():
            at = text.find(key)
            if at > 7 and text[at - 7: at] == "a-value": return text[at - 7: at + len(key)]
    """


def test_expected_values_are_nowhere_in_the_program_s_sandbox():
    tests = [
        asserts(f"assert f(1) == {SECRET!r}"),
        asserts(f"expected = {SECRET!r}\nassert f(1) == expected"),
        row("function", [{"args": [1], "output": SECRET}], entry_point="f"),
        row("pytest", [f"import solution\ndef test(): assert solution.f(1) == {SECRET!r}"]),
    ]
    assert [r for r, _ in outcomes(REWARD, [code(SEARCH)] * 4, tests)] == [0.0] * 4
    script = row("stdin", [{"input": "1", "output": SECRET}])
    assert outcomes(REWARD, [code(SEARCH) + "print(f(1))"], [script])[0] == (0.0, "wrong answer")
    # The search itself works: it finds an argument.
    assert outcomes(REWARD, [code(SEARCH)], [asserts(f"assert f({SECRET!r}) == {SECRET!r}")])[0][0] == 1.0


HARM = {
    "hang": ("def f(x):\n    while True: pass", "timeout"),
    "sleep": ("import time\ntime.sleep(100)", "timeout"),
    "deaf": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "timeout",
    ),
    "stopped": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
    "kill all": ("import os\nos.kill(-1, 9)", "crash"),
    "kill itself": ("import os\ndef f(x): os.kill(os.getpid(), 11)", "crash"),
    "kill the first": ("import os\nos.kill(1, 9); os.kill(os.getppid(), 9)\ndef f(x): return 5", "wrong answer"),
    "memory": ("def f(x): return len(bytearray(10**10))", "crash"),
    "memory by steps": ("def f(x):\n    a = []\n    while True: a.append('x' * 10**7 + str(len(a)))", "crash"),
    "output": ("import os\ndef f(x):\n    while True: print('x' * 10**6, flush=True); 1 / 0", "crash"),
    "endless reply": (
        "import os\ndef f(x):\n    while True:\n        for fd in (3, 4, 5):\n"
        "            try: os.write(fd, b'x' * 10**6)\n            except OSError: pass",
        "crash",
    ),
    "large result": ("def f(x): return 'x' * 10**8", "crash"),
    "native recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\n"
        "class A:\n    def __repr__(self): return repr([self])\ndef f(x): return repr(A())",
        "crash",
    ),
    "laughs": ("def f(x):\n    a = ()\n    for _ in range(100): a = (a, a)\n    return a", "wrong answer"),
    "closed": ("import os\nos.closerange(0, 64)", "crash"),
    "input": ("def f(x): return input()", "crash"),
}


SLOW = ("memory by steps", "endless reply", "large result", "native recursion")


@pytest.fixture(scope="module")
def harm():
    return dict(zip(HARM, outcomes(BRIEF, [program for program, _ in HARM.values()], [CALL] * len(HARM)), strict=True))


@pytest.mark.parametrize("name", HARM)
def test_harm_ends_with_the_sandbox(harm, name):
    reward, kind = harm[name]
    assert reward == 0.0
    # What needs more than the time on a busy machine may end by the clock instead.
    assert kind == HARM[name][1] or (kind == "timeout" and name in SLOW)


SCRIPTS = {
    "exit": ("import sys; sys.exit(0)", "wrong answer"),
    "exit at once": ("import os; print(4, flush=True); os._exit(3)", "crash"),
    "error at the end": ("print(4); 1 / 0", "crash"),
    "input without input": ("input(); input(); print(4)", "crash"),
    "not text": ("import os; os.write(1, b'\\xff\\xfe4')", "wrong answer"),
    "endless output": ("while True: print('4' * 10**6)", "crash"),
    "other messages": (
        "import os\nfor fd in range(3, 64):\n"
        '    try: os.write(fd, b\'["output", "4", 0]\\n\')\n    except OSError: pass',
        "wrong answer",
    ),
    "children": ("import os\ntry: os.fork()\nexcept OSError: print(5)", "wrong answer"),
    "syntax": ("print(4", "compile error"),
    "hang": ("while True: pass", "timeout"),
}


def test_scripts_that_do_not_print_what_is_expected_earn_nothing():
    test = row("stdin", [{"input": "2", "output": "4"}])
    found = outcomes(BRIEF, [program for program, _ in SCRIPTS.values()], [test] * len(SCRIPTS))
    assert dict(zip(SCRIPTS, found, strict=True)) == {name: (0.0, kind) for name, (_, kind) in SCRIPTS.items()}


PROBES = {
    "processes": ("os.fork()", "BlockingIOError"),
    "a background process": ("__import__('subprocess').Popen(['sleep', '99'])", "BlockingIOError|PermissionError"),
    "a network": ("__import__('socket').create_connection(('1.1.1.1', 53), 1)", "PermissionError"),
    "a host socket": ("__import__('socket').socket(40, 1)", "PermissionError"),
    "local network": ("open('/proc/net/dev').read().count(':')", "[01]"),
    "memory without a limit": ("os.memfd_create('x')", "PermissionError"),
    "the system": ("open('/usr/x', 'w')", "OSError|PermissionError"),
    "the root": ("open('/x', 'w')", "OSError|PermissionError"),
    "devices": ("open('/dev/shm/x', 'w')", "OSError|PermissionError|FileNotFoundError"),
    "files of the host": (f"open({os.path.abspath(__file__)!r})", "FileNotFoundError"),
    "passwords": ("open('/etc/passwd')", "FileNotFoundError"),
    "the environment": ("sorted(os.environ)", r"\['HOME', .*'PYTHONUTF8'\]"),
    "the user": ("os.getuid()", "65534"),
    "capabilities": (
        "[x for x in open('/proc/self/status') if x.startswith('CapEff')][0].split()[1]",
        "0000000000000000",
    ),
    "other processes": ("len([p for p in os.listdir('/proc') if p.isdigit()])", "2"),
    "more memory": ("__import__('resource').setrlimit(9, (2**40, 2**40))", "ValueError|OSError"),
    "a user namespace": ("__import__('ctypes').CDLL(None, use_errno=True).unshare(0x10000000)", "-1"),
    "the disk": ("open('/tmp/x', 'wb').write(b'x' * 10**8)", "OSError|MemoryError"),
    "many files": (
        "[open(f'/tmp/{i}', 'wb').write(b'x' * 10**7) for i in range(20)]",
        "OSError",
    ),
    "what another left": ("os.listdir('/tmp')", r"\[\]"),
}


def test_a_sandbox_has_nothing_of_the_host():
    program = code(
        """
        import os
        def f(text):
            try: return str(eval(text))
            except BaseException as error: return type(error).__name__
        """
    )
    tests = []
    for text, expected in PROBES.values():
        tests.append(asserts(f"import re\nfound = f({text!r})\nassert re.fullmatch({expected!r}, found)"))
    found = dict(zip(PROBES, outcomes(REWARD, [program] * len(tests), tests), strict=True))
    assert found == dict.fromkeys(PROBES, (1.0, "passed"))


def children():
    return [child for child in psutil.Process().children(recursive=True) if "bwrap" in child.name()]


def test_nothing_outlives_a_program_and_hanging_programs_take_turns():
    reward = CodeReward(workers=4, time_limit=0.6)
    threads = threading.active_count()
    programs = [f"import time\n{'time.sleep(99)' if i % 2 else 'while True: pass'}  # {i}" for i in range(8)]
    begun = time.monotonic()
    assert outcomes(reward, programs, [CALL] * 8) == [(0.0, "timeout")] * 8
    # The clock of a sandbox that was slow to start leaves half of the limit.
    assert time.monotonic() - begun < 0.6 * 8 / 4 + 4
    assert not children() and threading.active_count() == threads


def test_a_process_that_is_killed_leaves_no_sandbox(tmp_path):
    script = (
        "from entropy_trl.rewards import CodeReward\n"
        f"CodeReward(2, 60)(['import time; time.sleep(99)  # unique-{os.getpid()}'], [{CALL!r}], 'whole')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    deadline = time.monotonic() + 60
    while len(inside := psutil.Process(process.pid).children(recursive=True)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert len(inside) == 3
    _, alive = psutil.wait_procs(inside, timeout=10)
    assert not alive


def test_order_repeats_threads_and_copies(monkeypatch):
    judged = []
    real = sandbox.command
    monkeypatch.setattr("entropy_trl.rewards.code.session.command", lambda fd: judged.append(fd) or real(fd))
    right, wrong = "def f(x): return 4", "def f(x): return 5"
    programs = [right, wrong, "no program", right, wrong, right]
    texts = [f"Here:\n```python\n{p}\n```\nDone." if "def" in p else p for p in programs]
    metrics = []
    reward = pickle.loads(pickle.dumps(REWARD))
    assert (reward.workers, reward.time_limit) == (2, 30.0)
    conversations = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = reward(
        conversations,
        tests=[CALL] * 6,
        data_source=["a", "a", "a", "b", "b", "b"],
        log_metric=lambda name, value: metrics.append((name.removeprefix("code_reward/"), value)),
    )
    assert rewards == [1.0, 0.0, 0.0, 1.0, 0.0, 1.0] and len(judged) == 2  # equal ones run once
    found = dict(metrics)
    assert found.pop("seconds") > 0
    assert [value for name, value in metrics if name == "b"] == [1.0, 0.0, 1.0]
    assert {name: found[name] for name in found if name not in "ab"} == {
        "no_program": 1 / 6,
        "compile_errors": 0,
        "wrong_answers": 2 / 6,
        "timeouts": 0,
        "crashes": 0,
        "sandbox_failures": 0,
    }
    with ThreadPoolExecutor(3) as threads:
        found = threads.map(lambda p: code_reward([p] * 2, [CALL] * 2, "whole"), [right, wrong, right])
        assert list(found) == [[1.0] * 2, [0.0] * 2, [1.0] * 2]


def test_partial_rewards_are_shares():
    reward = CodeReward(workers=2, time_limit=30, partial=True)
    hang = "import time\nif input() == '2': time.sleep(99)\nprint(1)"
    scripts = [{"input": str(i), "output": "1"} for i in (1, 2, 3)]
    tests = [
        asserts("assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 1"),
        asserts("a = f(1); assert a == 1", "a = f(2); assert a == 2", "a = f(3); assert a == 1"),
        row(
            "pytest",
            ["import solution\ndef test_a(): assert solution.f(1) == 1\ndef test_b(): assert solution.f(1) == 2"],
        ),
        row("stdin", scripts, time_limit=2),
    ]
    programs = ["def f(x): return 1"] * 3 + [hang]
    assert reward(programs, tests, "whole") == [2 / 3, 2 / 3, 1 / 2, 2 / 3]
    assert REWARD(programs[:3], tests[:3], "whole") == [0.0] * 3


def test_without_a_sandbox_nothing_runs(monkeypatch, tmp_path):
    for function in (sandbox.find_bwrap, sandbox._command, sandbox.check_sandbox):
        function.cache_clear()
    for name, text, message in (
        ("old", "echo bubblewrap 0.4.0", "version 0.4, and 0.8 is needed"),
        (
            "denied",
            '[ "$1" = --version ] && echo bubblewrap 0.9.0 && exit\n'
            'echo "bwrap: No permissions to create a new namespace" >&2; exit 1',
            "No permissions to create.*apparmor_restrict_unprivileged_userns=0.*ENTROPY_TRL_SANDBOX_URL",
        ),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "bwrap").write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bwrap").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        with monkeypatch.context() as patched:
            patched.setattr(sandbox.importlib.util, "find_spec", lambda name: None)
            with pytest.raises(SandboxError, match=f"(?s){message}"):
                REWARD([f"open({str(tmp_path / 'ran')!r}, 'w')"], [CALL], "whole")
            assert "does not work" in sandbox.sandbox_status()
        for function in (sandbox.find_bwrap, sandbox._command, sandbox.check_sandbox):
            function.cache_clear()
    assert not (tmp_path / "ran").exists()


class Server(BaseHTTPRequestHandler):
    """What SandboxFusion's `/run_code` does, without its sandbox: the programs below are this file's own."""

    requests: list = []

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).requests.append(request)
        answer = {"status": "Success", "message": "", "compile_result": None, "executor_pod_name": None, "files": {}}
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", request["code"]],
                input=request["stdin"],
                capture_output=True,
                text=True,
                timeout=request["run_timeout"],
            )
            answer["run_result"] = {
                "status": "Finished",
                "return_code": done.returncode,
                "stdout": done.stdout,
                "stderr": done.stderr,
                "execution_time": 0.1,
            }
        except subprocess.TimeoutExpired:
            answer |= {
                "status": "Failed",
                "run_result": {"status": "TimeLimitExceeded", "return_code": None, "stdout": "", "stderr": ""},
            }
        body = json.dumps(answer).encode()
        self.send_response(200 if self.path == "/run_code" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_a_server_takes_the_place_of_the_sandbox(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("ENTROPY_TRL_SANDBOX_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("subprocess.Popen.__init__", subprocess.Popen.__init__)
    script = row("stdin", [{"input": "2", "output": "4"}])
    try:
        programs = [
            "def f(x): return 4",
            "def f(x): return 4",
            YES.format(base="") + "def f(x): return Yes()",
            "print(int(input()) * 2)",
            "print(3)",
            "print(",
            "def f(x): return SECRET",
        ]
        tests = [CALL, TALK, TALK, script, script, script, asserts(f"a = f(1)\nassert a == {SECRET!r}")]
        kinds = ["passed", "passed", "wrong answer", "passed", "wrong answer", "compile error", "crash"]
        assert [kind for _, kind in outcomes(REWARD, programs, tests)] == kinds
        assert outcomes(CodeReward(1, 1.0), ["import time; time.sleep(9)"], [script]) == [(0.0, "timeout")]
        assert all({"code", "stdin", "language", "run_timeout", "memory_limit_MB"} <= set(r) for r in Server.requests)
        assert not any(
            SECRET in r["code"] + r["stdin"] for r in Server.requests if "return SECRET" in r["code"] + r["stdin"]
        )
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(SandboxError, match="does not answer"):
        REWARD(["def f(x): return 4"], [CALL], "whole")


@pytest.mark.parametrize(
    ("text", "code_format", "program"),
    [
        ("a\n```python\nx = 1\n```\nb\n```py\nx = 2\n```", "fenced", "x = 2\n"),
        ("```python\nx = 1\n```\n```text\nout\n```\n```python\n\n```", "fenced", "x = 1\n"),
        ("```python\nx = 1\n", "fenced", "x = 1\n"),
        ("1. Do\n   ```python\n   if x:\n       y\n   ```", "fenced", "if x:\n    y\n"),
        ("````python\ns = '''\n```\n'''\n````", "fenced", "s = '''\n```\n'''\n"),
        ("```\nx\n```", "fenced", "x\n"),
        ("```java\nx\n```", "fenced", ""),
        ("x = 1", "fenced", ""),
        ("    return 1\n", "whole", "    return 1\n"),
    ],
)
def test_final_program(text, code_format, program):
    assert final_program(text, code_format) == program


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (None, "Row 0 of the batch has no tests"),
        ("{", "no JSON text"),
        ("[]", "has the kind"),
        (row("exec", ["a"]), "one of asserts, stdin, function, pytest"),
        (row("asserts", []), "no cases"),
        (row("asserts", ["assert ("]), "case 0 of tests does not parse"),
        (row("stdin", [{"input": 1, "output": "2"}]), "needs the texts"),
        (row("function", [{"args": [1], "output": 1}]), "no entry_point"),
        (row("function", [{"args": [1]}], entry_point="f"), "either output or any_of"),
        (row("asserts", ["assert 1"], language="rust"), "only python"),
        (row("asserts", ["assert 1"], set_up=""), "unknown keys .set_up"),
        (row("asserts", ["assert 1"], time_limit=-1), "time_limit of -1"),
        (row("asserts", ["assert 1"], setup="("), "the setup of tests does not parse"),
    ],
)
def test_tests_that_cannot_be_read_are_refused(tests, message):
    with pytest.raises(TestsError, match=message):
        REWARD(["def f(x): return 4"], [tests], "whole")


@pytest.mark.parametrize(
    "limits", [{"workers": 0}, {"time_limit": 0}, {"time_limit": float("nan")}, {"memory_limit": 1}]
)
def test_limits_out_of_range_are_refused(limits):
    with pytest.raises(ValueError, match="CodeReward needs"):
        CodeReward(**limits)


def refuse(item):
    raise TypeError(item)


@pytest.mark.parametrize(
    ("result", "expected", "is_equal"),
    [
        (1, 1.0, True),
        (True, 1, True),
        ([1, (2,)], [1, (2,)], True),
        ([1], (1,), False),
        ({1: {2, 3}}, {1: {3, 2}}, True),
        ({1, 2}, {1, 3}, False),
        ({1: 2, 3: 4}, {1: 2}, False),
        (frozenset({(1, 2)}), {(1, 2)}, True),
        ("1", 1, False),
        (2**70, 2**70, True),
        (2**70, 2.0**70, True),
        (float("inf"), float("inf"), True),
        (float("nan"), float("nan"), False),
        (None, None, True),
        (0, None, False),
        (b"a", b"a", True),
        (0.1 + 0.2, 0.3, False),
        ({}, [], False),
        (..., ..., True),
    ],
)
def test_equality_is_python_s(result, expected, is_equal):
    encoded = json.loads(json.dumps(encode(result, refuse)))
    assert equals(encoded, expected) is is_equal
    if result == result:
        assert decode(encoded, refuse) == result


def test_a_comparison_takes_no_longer_than_what_is_expected():
    # Elements whose hashes are equal, of which a set would take hours; and a tuple of tuples with 2**100 leaves.
    count = 100_000
    colliding = [["set", *[[i + 1] for i in range(count)]], *[["int", hex(i * (2**61 - 1))] for i in range(count)]]
    nested = [*[["tuple", [i + 2], [i + 2]] for i in range(100)], ["tuple"]]
    begun = time.process_time()
    assert not equals([[0], colliding], set(range(count)))
    assert not equals([[0], [["set", [1]], *nested]], {(1, 2)})
    assert not equals([[1], [[], *nested]], ((1, 2), (3, 4)))
    assert time.process_time() - begun < 5


def test_lenient_equality_is_that_of_json():
    assert equals(encode({1: (0.1 + 0.2, 2)}, refuse), {"1": [0.3, 2]}, lenient=True, tolerance=1e-6)
    assert not equals(encode([0.31], refuse), [0.3], lenient=True, tolerance=1e-6)
    assert not equals(encode([4], refuse), [3], lenient=True, tolerance=1e9)  # integers are exact


@pytest.mark.parametrize(
    ("output", "expected", "is_same"),
    [
        ("1 2 \n3\n\n", "1 2\n3", True),
        ("1\n2", "1 2", False),
        ("0.3333333", "0.33333333", True),
        ("0.34", "0.33", False),
        ("3.0", "3", True),
        ("3.0000001", "3", False),
        ("007", "7", True),
        ("YES", "Yes", False),
        ("nan", "0.5", False),
        ("inf", "1.0", False),
        ("", "0", False),
        ("9" * 10**6, "8" * 10**6, False),
    ],
)
def test_output_is_compared_by_lines_and_numbers(output, expected, is_same):
    assert same_output(output, expected, 1e-6) is is_same


@pytest.mark.parametrize(
    ("tests", "count"),
    [
        (CALL, 1),
        (TALK, None),
        (CHECK, None),
        (asserts("assert f(1) == 2", setup="import math"), None),
        (asserts("assert sum(1, 2) == 3"), 1),  # a function of MBPP's has a built-in name
        (asserts("assert sum([f(1)]) == 3"), None),
        (asserts("assert f(x) == 1"), None),
        (
            asserts(
                "check(candidate)", setup="M = 1\ndef check(candidate):\n    assert candidate(1) == 1", entry_point="f"
            ),
            None,
        ),
        (asserts("check(candidate)", setup="def check(candidate):\n    assert candidate(1) == 1", entry_point="f"), 1),
        (asserts("check(candidate)", setup="def check(candidate):\n    assert other(1) == 1", entry_point="f"), None),
    ],
)
def test_simple_asserts_become_calls(tests, count):
    found = calls(read_tests(tests))
    assert (None if found is None else len(found)) == count
