"""ONNX Runtime's TensorRT-RTX provider, with this machine's GPUs, or with a stub GPU on a machine without one (`--describe`).

The provider can compile for a GPU that this machine does not have (`nv_target_sm`). But it does not load without the driver's libraries,
and does nothing until ONNX Runtime shows it a device. `stub_gpu.c` stands in for both. A C compiler builds it; a process that loads it
before the provider can compile engines for the stub GPU, but not run them. Does not know graphs and engines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vessel_rt.device.providers import onnxruntime
from vessel_rt.errors import EngineError, first_line
from vessel_rt.formats.engine_sidecar import packed_cuda_runtime

__all__ = ["ARCHITECTURES", "ProviderLibrary", "installed_provider", "stub_provider"]

# What the provider compiles for ahead of time (its kTargetSMValues): RTX 30xx, RTX 40xx, RTX 50xx. At run time, too, it accepts no other
# architecture below sm120: no A100 (sm80) and no H100 (sm90).
ARCHITECTURES = ("sm86", "sm89", "sm120")

_SOURCE = Path(__file__).with_name("stub_gpu.c")
_SONAMES = ("libcuda.so.1", "libnvidia-ml.so.1")
_COMPILERS = ("cc", "gcc", "clang")


@dataclasses.dataclass(frozen=True)
class ProviderLibrary:
    """The library to register with ONNX Runtime as the provider `name`, and those to load before it, with global symbols."""

    name: str
    library: Path
    preload: tuple[Path, ...] = ()


def installed_provider() -> ProviderLibrary:
    """The installed provider, which finds this machine's GPUs.

    Raises:
        EngineError: it is not installed.
    """
    if importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx") is None:
        raise EngineError("--builder rtx: TensorRT-RTX is not installed; pip install 'vessel-rt[rtx]'")
    onnxruntime()  # first: the provider's package would import it with telemetry on
    import onnxruntime_ep_nv_tensorrt_rtx as package

    library = Path(package.get_library_path())
    return ProviderLibrary(package.get_ep_name(), library, packed_cuda_runtime(library))


@contextlib.contextmanager
def stub_provider(architecture: str) -> Iterator[ProviderLibrary]:
    """The provider with one stub GPU of `architecture` (`sm86`), usable within the block.

    Raises:
        EngineError: the provider cannot compile for the architecture, the system is not Linux, or there is no C compiler or no provider.
    """
    if architecture not in ARCHITECTURES:
        raise EngineError(f"--describe {architecture}: TensorRT-RTX compiles for {', '.join(ARCHITECTURES)} only")
    if sys.platform != "linux":
        raise EngineError(f"--describe {architecture}: works on Linux only; build on Linux, or on a machine with the GPU")
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise EngineError(
            f"--describe {architecture}: needs a C compiler ({', '.join(_COMPILERS)}); install gcc, or build on a machine with the GPU"
        )
    real = installed_provider()
    with tempfile.TemporaryDirectory(prefix="stub-gpu-") as folder:
        stubs = tuple(_compile(compiler, Path(folder) / soname, architecture, real.library) for soname in _SONAMES)
        yield ProviderLibrary(real.name, stubs[0], (*stubs, *real.preload))  # the first definition of a symbol is used


def _compile(compiler: str, out: Path, architecture: str, provider: Path) -> Path:
    major, minor = re.fullmatch(r"sm(\d+)(\d)", architecture).groups()  # type: ignore[union-attr]  # ARCHITECTURES have this form
    quoted = str(provider).replace("\\", "\\\\").replace('"', '\\"')
    define = [f"-DMAJOR={major}", f"-DMINOR={minor}", f'-DPROVIDER="{quoted}"']
    command = [compiler, "-shared", "-fPIC", "-O1", *define, f"-Wl,-soname,{out.name}", "-o", str(out), str(_SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EngineError(f"--describe {architecture}: {compiler} cannot compile {_SOURCE.name}: {first_line(Exception(done.stderr))}")
    return out
