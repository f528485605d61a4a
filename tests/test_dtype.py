"""float32 only where it is faster."""

from __future__ import annotations

from pathlib import Path

import pytest

from arriero.model import dtype
from arriero.model.dtype import computes_bfloat16, fast_dtype

AVX2 = "processor : 0\nflags : fpu sse4_2 avx avx2 fma\n"
AVX512 = "processor : 0\nflags : fpu avx2 avx512f avx512dq avx512bw avx512vl\nprocessor : 1\n"
ARM = "processor : 0\nFeatures : fp asimd\n"


@pytest.mark.parametrize(
    ("cpuinfo", "is_cpu_build", "expected"),
    [(AVX2, True, "float32"), (AVX2, False, "auto"), (AVX512, True, "auto"), (ARM, True, "auto"), (None, True, "auto")],
)
def test_a_cpu_without_bfloat16_computes_in_float32(
    cpuinfo: str | None, is_cpu_build: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: there is no such file, as on macOS. Another build of vLLM runs on a GPU, whatever the CPU."""
    monkeypatch.setattr(dtype, "_is_cpu_build", lambda: is_cpu_build)
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    assert fast_dtype(path) == expected
    assert computes_bfloat16(path) == (cpuinfo != AVX2)
