"""What this machine has, for `hpo doctor`.

Owns: `examine`. Must not know: studies.
"""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from hpo.check import gpus
from training.world import versions


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `needed` says that nothing works without it."""

    name: str
    found: str
    ok: bool = True
    remedy: str = ""
    needed: bool = True


def examine() -> list[Finding]:
    """Returns what was found, each with a remedy where something is missing."""
    found = [
        Finding("python", platform.python_version()),
        *_packages(),
        _cores(),
        _memory(),
        _gpu(),
        _four_bits(),
        _compiler(),
        _ray(),
        _storage(),
    ]
    return found


def _packages() -> list[Finding]:
    known = versions()
    needed = ("torch", "transformers", "peft", "bitsandbytes", "ray")
    rows = [Finding(name, known.get(name, "missing"), name in known, f"pip install {name}") for name in needed]
    there = "deepspeed" in known
    return [
        *rows,
        Finding(
            "deepspeed", known.get("deepspeed", "missing"), there, "pip install 'paretune[deepspeed]' for ZeRO", needed=False
        ),
    ]


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("cores", str(usable), usable >= 2, "With one core, trials run one at a time: budget.parallel: 1", needed=False)


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Finding("memory", f"{total:.1f} GB", total >= 4, "Ray and two workers need about 4 GB", needed=False)


def _gpu() -> Finding:
    count = gpus()
    if not count:
        return Finding("gpu", "none", True, needed=False)
    import torch

    seen = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if seen else "present, but torch cannot use it"
    return Finding("gpu", f"{count} x {name}", seen, "Install a torch build for this GPU's driver", needed=False)


def _four_bits() -> Finding:
    """Tries what QLoRA needs: quantize a matrix to NF4 and back on the CPU."""
    import bitsandbytes.functional as bnb
    import torch

    try:
        weight = torch.linspace(-1, 1, 4096).reshape(64, 64)
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        error = (bnb.dequantize_4bit(packed, state) - weight).abs().max().item()
    except (RuntimeError, OSError, AttributeError) as failure:
        return Finding("4 bits", f"{type(failure).__name__}: {failure}", False, "Leave bits: 4 out of the space", needed=False)
    return Finding(
        "4 bits", f"NF4 works (largest error {error:.2f} on [-1, 1])", error < 0.2, "Leave bits: 4 out of the space", needed=False
    )


def _compiler() -> Finding:
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    if "ninja" in missing:
        try:
            import ninja  # noqa: F401

            missing.remove("ninja")
        except ImportError:
            pass
    return Finding("compiler", f"missing {', '.join(missing)}" if missing else "g++ and ninja", not missing,
                   "For recipe.offload DeepSpeed builds an optimizer: install g++ and ninja", needed=False)  # fmt: skip


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    return Finding("ray cluster", address or "none; a private one is started for each run", needed=False)


def _storage() -> Finding:
    folder = Path(os.path.expandvars(os.environ.get("HPO_STORAGE", "~/paretune"))).expanduser()
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(parent).free / 1e9
    return Finding("storage", f"{folder} ({free:.0f} GB free)", os.access(parent, os.W_OK) and free > 1,
                   "Set HPO_STORAGE to a folder with room that you can write")  # fmt: skip
