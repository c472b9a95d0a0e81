"""Python processes that have torch, TRL and this package imported already, for tests that launch many.

Imports take most of the time of a launched test. `prepared_python()` is the path of a program that takes the arguments
of `python`. It asks a server, which has done the imports, to fork. The new process gets the caller's arguments,
environment, folder and standard streams. Signals reach it, and its end is the program's end. It is a process like any
other: only its imports are older. The first test that wants one starts the server. The processes of pytest-xdist share
it. It ends with the test run, also with a killed one: it ends what it started and deletes its folder. It takes 0.5 GB,
which the processes share until they write.

A test of what happens at import, or of what is imported, needs `sys.executable`. So do programs that read a setting
when they are imported: trackio its folder, pandas whether it is in a notebook.
"""

import array
import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

import psutil


MODULES = ("accelerate.commands.launch", "torch.distributed.run", "peft", "trl", "conftest", "entropy_trl.cli")
#: What starts processes of its own with `sys.executable`: they shall be prepared as well.
LAUNCHERS = ("accelerate.commands.launch", "torch.distributed.run")

PR_SET_PDEATHSIG = 1

CLIENT = """#!{python} -SE
import array, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
streams = array.array("i", [0, 1, 2])
server.sendmsg([len(request).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
server.sendall(request)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
answer = server.recv(4)
if not answer:
    sys.exit("The server of prepared processes ended during " + repr(sys.argv[1:]))
status = int.from_bytes(answer, "big", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


def prepared_python() -> str:
    """The path of the program; starts the server if this test run has none yet."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", "alone")
    owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    folder = Path(tempfile.gettempdir()) / f"prepared-python-{owner}-{run[:8]}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user: its programs may not be run. Set TMPDIR.")
    program = folder / "python"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _answers(folder):  # none yet, or it was killed
            for name in ("python", "socket"):
                (folder / name).unlink(missing_ok=True)
            command = [sys.executable, __file__, str(folder), str(owner), *MODULES]
            root = Path(__file__).parents[2]
            paths = [str(folder) for folder in (root / "tests", root / "tests" / "jobs", root / "src")]
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join(paths),
                "OMP_NUM_THREADS": "1",
                "TRL_EXPERIMENTAL_SILENCE": "1",
                "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's allocator; a fork would lose the thread
            }
            log = open(folder / "log", "w")  # noqa: SIM115 (the server's)
            server = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            while not program.exists():
                if server.poll() is not None:
                    raise RuntimeError(f"The server of prepared processes ended: {(folder / 'log').read_text()}")
                time.sleep(0.05)
    return str(program)


def _answers(folder: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(folder / "socket")) == 0


class Server:
    """Forks a process for each connection, and tells the connection how it ended."""

    def __init__(self, folder: Path, owner: int):
        self.owner, self.processes = psutil.Process(owner), {}
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "socket"))
        self.listener.listen(64)
        self.program = folder / "python"
        self.wakeup, wakes = socket.socketpair()
        wakes.setblocking(False)
        self.wakes = wakes
        signal.set_wakeup_fd(wakes.fileno())
        signal.signal(signal.SIGCHLD, lambda *args: None)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(self.wakeup, selectors.EVENT_READ)

    def publish(self, address: str) -> None:
        """Write the program, at once complete: its existence says that the server is ready."""
        new = self.program.with_name("new")
        new.write_text(CLIENT.format(python=sys.executable, address=address))
        new.chmod(0o755)
        new.rename(self.program)

    def serve(self) -> list | None:
        """In the server: work until the owner ends, then None. In a new process: its request."""
        while self.owner.is_running() and self.owner.status() != psutil.STATUS_ZOMBIE:
            for key, _ in self.selector.select(timeout=1):
                if key.fileobj is self.listener:
                    if request := self._fork(self.listener.accept()[0]):
                        return request
                elif key.fileobj is self.wakeup:
                    self.wakeup.recv(4096)
                else:
                    self._signal(key.fileobj)
            self._reap()
        for pid in self.processes.values():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.program.parent)
        return None

    def _fork(self, connection: socket.socket) -> list | None:
        size, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * 4))
        streams = array.array("i", ancillary[0][2] if ancillary else [])
        data, chunk = bytearray(), size
        while chunk and len(data) < int.from_bytes(size, "big"):
            chunk = connection.recv(1 << 20)
            data += chunk
        if not chunk:  # a probe, or a caller that was killed
            for stream in streams:
                os.close(stream)
            connection.close()
            return None
        pid = os.fork()
        if pid:
            for stream in streams:
                os.close(stream)
            self.processes[connection] = pid
            self.selector.register(connection, selectors.EVENT_READ)
            return None
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it does not outlive a killed server
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        for open_socket in (self.listener, self.wakeup, self.wakes, connection, *self.processes):
            open_socket.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return json.loads(data)

    def _signal(self, connection: socket.socket) -> None:
        try:
            numbers = connection.recv(16)
        except ConnectionResetError:
            numbers = b""
        for number in numbers or [signal.SIGKILL]:  # the caller was killed
            os.kill(self.processes[connection], number)
        if not numbers:
            self.selector.unregister(connection)

    def _reap(self) -> None:
        for connection, pid in list(self.processes.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del self.processes[connection]
                if connection in self.selector.get_map():
                    self.selector.unregister(connection)
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the caller was killed just now
                        connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
                connection.close()


def _run(arguments: list[str], environment: dict[str, str], folder: str, program: str, library: list[str]) -> None:
    """What the interpreter does with its arguments."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    while arguments[0] == "-u":
        del arguments[0]
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if arguments[0] == "-m":
        sys.argv, sys.path = arguments[1:], ["", *paths, *library]
        if arguments[1] in LAUNCHERS:
            sys.executable = program
        sys.modules.pop(arguments[1], None)  # runpy warns of a module that is imported already
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv, sys.path = ["-c", *arguments[2:]], ["", *paths, *library]
        main_module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), main_module.__dict__)
    else:
        sys.argv, sys.path = arguments, [str(Path(arguments[0]).resolve().parent), *paths, *library]
        runpy.run_path(arguments[0], run_name="__main__")


def _status(program: Callable[[], None]) -> int:
    """Run a program as the interpreter does; returns its exit status."""
    try:
        program()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _end(status: int) -> None:
    """End as the interpreter does, but for freeing the memory object by object, which takes as long as the imports."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def main(folder: Path, owner: int, modules: list[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    if psutil.Process().num_threads() > 1:
        raise RuntimeError("An import has started a thread: a fork would lose it. Find its switch.")
    gc.collect()
    gc.freeze()  # so that no collection touches, and copies, what the processes share
    ours = {str(Path(__file__).parent), *os.environ["PYTHONPATH"].split(os.pathsep)}
    library = [path for path in sys.path if path not in ours]
    server = Server(folder, owner)
    server.publish(str(folder / "socket"))
    request = server.serve()
    if request is not None:
        _end(_status(lambda: _run(*request, program=str(server.program), library=library)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
