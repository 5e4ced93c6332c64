"""The numerics identity: everything outside the recipe that may change the bits of its arithmetic."""

from __future__ import annotations

import platform

import torch


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
