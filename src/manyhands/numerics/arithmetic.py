"""The numerics identity (torch version, device, CPU kind, threads), and settings that make arithmetic deterministic.

The *numerics identity* is everything outside the recipe that may change the bits of the result. `fix_arithmetic` sets
the parts that a process can control: the number of threads, and deterministic kernels.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from manyhands.config import Recipe


def numerics_identity(device: torch.device, threads: int, update_on: torch.device) -> dict[str, str]:
    """Return the numerics identity. A run records it, and a resumed run is compared with the record.

    It is the same on all workers of a run.
    update_on: the device on which the optimizer computes. An update has different bits on a GPU and on a CPU.
    """
    identity = {
        "torch": torch.__version__,
        "device": device.type,
        "threads_per_worker": str(threads),
        "machine": platform.machine(),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "cpu_bf16": bf16_instructions() or "none",
        "onednn": str(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled),  # type: ignore[no-untyped-call]
    }
    if device.type == "cuda":
        identity["device_name"] = torch.cuda.get_device_name(device)
        identity["cuda"] = str(torch.version.cuda)
        identity["update"] = update_on.type
    return identity


def bf16_instructions() -> str:
    """Return the instructions with which torch multiplies bf16 tensors on this CPU.

    Returns "" on an x86 CPU without such instructions. On other architectures the instructions aren't known, so the
    architecture's name is returned.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return platform.machine()
    found = torch.cpu.get_capabilities()
    return "+".join(kind for kind in ("avx_ne_convert", "avx512_bf16", "amx_bf16") if found.get(kind))


def fix_arithmetic(recipe: Recipe) -> None:
    """Set the number of threads, and make kernels and TorchScript deterministic. These settings outlast the engine."""
    torch.set_num_threads(recipe.threads_per_worker)
    # With profiling, TorchScript would replace a function's code after its first runs in this process, so bits would
    # depend on how many micro-batches this worker has computed. Without profiling, it runs the operations one by one,
    # as written.
    torch._C._jit_set_profiling_mode(False)
    # A single CPU thread always adds in the same order, so it needs no other kernels.
    if recipe.threads_per_worker > 1 or recipe.device == "cuda":
        torch.use_deterministic_algorithms(True)
        # Filling uninitialized memory costs time, and this code reads no memory before it has been written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if recipe.device == "cuda":
        # cuBLAS is deterministic only with a workspace of fixed size.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False  # benchmarks would choose kernels by measured speed, which varies


@contextmanager
def preserved_arithmetic() -> Iterator[None]:
    """Context for one micro-batch. At its end, restore the global modes that its code may have changed.

    Otherwise the bits would depend on how many micro-batches this worker has computed.
    """
    # With autocast around the steps, torch would use its cached casts of the first step's weights in all later steps.
    torch.clear_autocast_cache()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    precision, onednn = torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()) != (
            deterministic,
            warns,
        ):
            torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
        if torch.backends.mkldnn.enabled != onednn:
            torch.backends.mkldnn.enabled = onednn
