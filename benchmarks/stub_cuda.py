"""A stub CUDA device, on which ONNX Runtime's CUDA provider loads graphs and runs without a GPU. Linux only.

The provider is NVIDIA's and Microsoft's own library; the libraries of CUDA and cuDNN that it needs are stubs (`stub_cuda.c`). So all that
happens on the host is real: which nodes have a kernel, how graphs are fused, how memory is allocated and copied, which kernel is launched
for which shape. Kernels compute nothing.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

__all__ = ["StubCuda", "provider_library"]

_SOURCE = Path(__file__).with_suffix(".c")

# The library of each function, by the beginning of its name.
_PREFIXES = {
    "cublasLt": "libcublasLt", "cublas": "libcublas", "cudnn": "libcudnn", "cufft": "libcufft", "nvrtc": "libnvrtc", "__cuda": "libcudart",
    "cuda": "libcudart", "cu": "libcuda",
}  # fmt: skip
_LOOKED_UP = re.compile(rb"(?<=\0)(?:cudnn|cufft)[A-Z]\w+(?=\0)")  # in libraries that newer providers open themselves
# Those that vessel_rt.device.cuda_driver calls.
_DRIVER = ["cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute", "cuDeviceTotalMem_v2"]
_STUB = ["stub_reset", "stub_memory", "stub_device_fault", "stub_launch_fault", "stub_copied", "stub_largest", "stub_launched"]


def provider_library() -> Path:
    """The CUDA provider of the onnxruntime-gpu that Python would import. Raises FileNotFoundError if it is another package."""
    spec = find_spec("onnxruntime")
    path = Path(str(spec.origin)).with_name("capi") / "libonnxruntime_providers_cuda.so" if spec else None
    if path is None or not path.exists():
        raise FileNotFoundError("no onnxruntime-gpu here: pip install --target FOLDER --no-deps onnxruntime-gpu, and set PYTHONPATH=FOLDER")
    return path


class StubCuda:
    """The stub device, loaded into this process, before onnxruntime is imported. It stays until the process ends.

    Needs a C compiler and its binutils. `cuda` is the major version of CUDA that the provider was built for.
    """

    def __init__(self, provider: Path) -> None:
        needed = subprocess.run(["readelf", "-d", provider], check=True, capture_output=True, text=True).stdout
        sonames = set(re.findall(r"\[(lib(?:cu|nv)\w+\.so\.\d+)\]", needed))
        self.cuda = next(int(name.rpartition(".")[2]) for name in sonames if name.startswith("libcudart.so."))
        sonames |= {"libcuda.so.1", "libcudnn.so.9", f"libcufft.so.{self.cuda - 1}", f"libnvrtc.so.{self.cuda}", "libcurand.so.10"}
        functions: dict[str, list[str]] = {soname: [] for soname in sonames}
        imports = subprocess.run(["nm", "-D", "--undefined-only", provider], check=True, capture_output=True, text=True).stdout
        names = {line.split()[-1].partition("@")[0] for line in imports.splitlines()}
        names |= {found.decode() for found in _LOOKED_UP.findall(provider.read_bytes())}
        for name in sorted(name for name in names | set(_DRIVER) if name.startswith(tuple(_PREFIXES))):
            library = next(library for prefix, library in _PREFIXES.items() if name.startswith(prefix))
            for soname in sonames:
                if soname.startswith(f"{library}.so."):
                    functions[soname].append(name)
        with tempfile.TemporaryDirectory(prefix="stub-cuda-") as folder:
            loaded = {soname: self._load(Path(folder) / soname, names) for soname, names in functions.items()}
        self._runtime = loaded[f"libcudart.so.{self.cuda}"]
        self._runtime.stub_launched.restype = ctypes.c_char_p
        self._runtime.stub_copied.restype = self._runtime.stub_largest.restype = ctypes.c_long

    def _load(self, library: Path, names: list[str]) -> ctypes.CDLL:
        generic, exports = library.with_suffix(".c"), library.with_suffix(".map")
        generic.write_text("".join(f"__attribute__((weak)) int {name}(void) {{ return 0; }}\n" for name in names))
        exported = [*names, *_STUB] if library.name.startswith("libcudart") else [*names, "stub_none"]
        exports.write_text(f"{library.name} {{ global: {' '.join(f'{name};' for name in exported)} local: *; }};\n")
        define = [f"-DDRIVER={self.cuda}000", *(["-DLAYOUT_13"] if self.cuda >= 13 else [])]
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
        command = [compiler, "-shared", "-fPIC", "-O1", "-w", *define, f"-Wl,-soname,{library.name},--version-script,{exports}"]
        subprocess.run([*command, "-o", library, generic, _SOURCE, "-lpthread"], check=True)
        return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    def reset(self) -> None:
        """Forget what was copied, launched and allocated."""
        self._runtime.stub_reset()

    def copied(self) -> tuple[int, int]:
        """Bytes that were copied from the host to the device, and from the device to the host."""
        return self._runtime.stub_copied(1), self._runtime.stub_copied(2)

    def largest(self) -> int:
        """Bytes of the largest piece of device memory that was allocated."""
        return int(self._runtime.stub_largest())

    def launched(self) -> list[str]:
        """The mangled names of the kernels that were launched, in order; at most 4096."""
        names = map(self._runtime.stub_launched, range(1 << 12))
        return [name.decode() for name in itertools.takewhile(bool, names)]

    def set_memory(self, size: int) -> None:
        """Let the device have `size` bytes of memory in total."""
        self._runtime.stub_memory(ctypes.c_long(size))

    def fail(self, *, device: int = 0, launch: int = 0, after: int = 0) -> None:
        """Let the device, or every launch of a kernel but the first `after`, fail with this CUDA error; 0 ends it."""
        self._runtime.stub_device_fault(device)
        self._runtime.stub_launch_fault(launch, after)
