"""What else decides bits: torch version, device, CPU kind, threads; recorded and set.

The numerics identity: everything outside the recipe that may change the bits of its arithmetic.

This process's arithmetic, set as the recipe says: threads, and kernels that give the same bits every time.
"""

from __future__ import annotations

import os
import platform

import torch

from manyhands.config import Recipe


def numerics_identity(device: torch.device, threads: int, update_on: torch.device) -> dict[str, str]:
    """What a run records, and what a resumed run is compared with. The same on all workers of a run.

    update_on: where the optimizer computes. The same update has other bits on a GPU than on a CPU.
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
    """Those that torch multiplies bf16 tensors with on this CPU; none on an x86 CPU that has to emulate them. Of other
    CPUs nothing but their name is known."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return platform.machine()
    found = torch.cpu.get_capabilities()
    return "+".join(kind for kind in ("avx_ne_convert", "avx512_bf16", "amx_bf16") if found.get(kind))


def fix_arithmetic(recipe: Recipe) -> None:
    """Set the process's thread count and deterministic kernels. They stay so after the engine is closed."""
    torch.set_num_threads(recipe.threads_per_worker)
    if recipe.threads_per_worker > 1 or recipe.device == "cuda":  # one CPU thread always adds in the same order
        torch.use_deterministic_algorithms(True)
        # Filling new memory costs time, and nothing reads it before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if recipe.device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed one
        torch.backends.cudnn.benchmark = False  # it would choose kernels by their speed on the day
