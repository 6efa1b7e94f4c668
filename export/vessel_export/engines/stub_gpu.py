"""The TensorRT-RTX provider of ONNX Runtime, with the GPUs that are there, or with a described one where there is none (`--describe`).

The provider compiles for a GPU that it is only told of (`nv_target_sm`), but it does not load without the driver's libraries, and does
nothing before ONNX Runtime has shown it a device. `stub_gpu.c` is both; a C compiler makes it, and a process that loads it before the
provider can compile engines for the described GPU, and run nothing on it. Knows nothing of graphs and engines.
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

__all__ = ["ARCHITECTURES", "Provider", "described_provider", "installed_provider"]

# What the provider compiles for ahead of time (its kTargetSMValues): RTX 30xx, RTX 40xx, RTX 50xx. It accepts no GPU of another
# architecture below sm120, at run time neither: so no A100 (sm80) and no H100 (sm90).
ARCHITECTURES = ("sm86", "sm89", "sm120")

_SOURCE = Path(__file__).with_name("stub_gpu.c")
_SONAMES = ("libcuda.so.1", "libnvidia-ml.so.1")
_COMPILERS = ("cc", "gcc", "clang")


@dataclasses.dataclass(frozen=True)
class Provider:
    """What to register with ONNX Runtime as the provider `name`, and what the process loads before, with all symbols global."""

    name: str
    library: Path
    preload: tuple[Path, ...] = ()


def installed_provider() -> Provider:
    """The provider as it is installed; it sees the GPUs that are there.

    Raises:
        EngineError: it is not installed.
    """
    if importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx") is None:
        raise EngineError("--builder rtx: TensorRT-RTX is not installed: pip install 'vessel-rt[rtx]'")
    onnxruntime()  # before the provider's package, which would import it with its telemetry on
    import onnxruntime_ep_nv_tensorrt_rtx as package

    library = Path(package.get_library_path())
    return Provider(package.get_ep_name(), library, packed_cuda_runtime(library))


@contextlib.contextmanager
def described_provider(architecture: str) -> Iterator[Provider]:
    """The provider, seeing one GPU of `architecture` (`sm86`) that is not there; it can be used within the block.

    Raises:
        EngineError: an architecture that the provider cannot compile for, another system than Linux, no C compiler, or no provider.
    """
    if architecture not in ARCHITECTURES:
        raise EngineError(f"--describe {architecture}: TensorRT-RTX compiles for {', '.join(ARCHITECTURES)} only")
    if sys.platform != "linux":
        raise EngineError(f"--describe {architecture}: only Linux can describe a GPU; build on Linux, or where the GPU is")
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise EngineError(
            f"--describe {architecture}: needs a C compiler ({', '.join(_COMPILERS)}); install gcc, or build where the GPU is"
        )
    real = installed_provider()
    with tempfile.TemporaryDirectory(prefix="described-gpu-") as folder:
        stand_ins = tuple(_compile(compiler, Path(folder) / soname, architecture, real.library) for soname in _SONAMES)
        yield Provider(real.name, stand_ins[0], (*stand_ins, *real.preload))  # what is found first is used


def _compile(compiler: str, out: Path, architecture: str, provider: Path) -> Path:
    major, minor = re.fullmatch(r"sm(\d+)(\d)", architecture).groups()  # type: ignore[union-attr]  # ARCHITECTURES are of this form
    quoted = str(provider).replace("\\", "\\\\").replace('"', '\\"')
    define = [f"-DMAJOR={major}", f"-DMINOR={minor}", f'-DPROVIDER="{quoted}"']
    command = [compiler, "-shared", "-fPIC", "-O1", *define, f"-Wl,-soname,{out.name}", "-o", str(out), str(_SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EngineError(f"--describe {architecture}: {compiler} cannot compile {_SOURCE.name}: {first_line(Exception(done.stderr))}")
    return out
