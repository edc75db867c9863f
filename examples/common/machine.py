"""The machine: what a figure must be quoted with, and how much memory this process holds."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from slide_torch import __version__, instruction_set

__all__ = ["machine", "machine_line", "reset_peak_memory", "resident_gb"]


def machine() -> dict[str, Any]:
    """What a figure must be quoted with."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "slide_torch": __version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def machine_line(seed: int) -> str:
    """The machine in a line, for quoting beside any number."""
    of = machine()
    return (
        f"{of['cpu']}, {of['threads']} of {of['cores']} cores, {of['instruction_set']}, "
        f"torch {of['torch']}, slide_torch {of['slide_torch']}, seed {seed}"
    )


def resident_gb(key: str = "VmRSS") -> float:
    """Resident gigabytes (VmRSS) of this process, or their peak (VmHWM); NaN but on Linux."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) / 2**20
    except OSError:
        pass
    return float("nan")


def reset_peak_memory() -> float:
    """Forgets the peak so far and returns the resident gigabytes now."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return resident_gb()
