from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from tests.support.standin_gpu import StandinGpu, cuda_failure
from vessel_rt.cli import main
from vessel_rt.device import providers
from vessel_rt.device.deployment import choose_device
from vessel_rt.device.providers import PROVIDERS, Device, EngineCache, device_fault, open_device
from vessel_rt.errors import VesselError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.profiles import Workload, stage_profile

CPU = Device("cpu")
GPU_KINDS = sorted(PROVIDERS.keys() - {"cpu"})


@pytest.mark.parametrize(
    ("text", "device"),
    [("auto", Device("auto")), ("cpu", CPU), ("cuda", Device("cuda")), ("rtx:3", Device("rtx", 3)), ("tensorrt:1", Device("tensorrt", 1))],
)
def test_parse(text: str, device: Device) -> None:
    assert Device.parse(text) == device


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:x", "rtx:-1", "cpu:1", "auto:0", "CPU"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is not a device"):
        Device.parse(text)


def test_the_cpu_is_always_there() -> None:
    assert open_device(CPU) == CPU


@pytest.mark.parametrize("kind", GPU_KINDS)
def test_a_gpu_that_is_not_there_is_an_error(kind: str) -> None:
    with pytest.raises(VesselError, match=f"--device {kind}:99: there is no"):  # no driver, or no GPU of that number
        open_device(Device(kind, 99))


def test_what_is_not_installed_is_named_with_how_to_install_it() -> None:
    if PROVIDERS["cuda"].installed:
        pytest.skip("onnxruntime here has the CUDA provider")
    assert "CUDAExecutionProvider is not installed: pip uninstall onnxruntime onnxruntime-gpu, then pip install 'vessel-rt[gpu]'" in str(
        device_fault(Device("cuda"))
    )


def test_tensorrt_is_told_its_profile_and_cache_and_no_precision(standin: Bundle, tmp_path: Path) -> None:
    cache = EngineCache(tmp_path, stage_profile(standin, standin.stages["sam2_mask_decoder"], Workload(max_batch=2)))
    chosen = PROVIDERS["tensorrt"].choose(None, Device("tensorrt", 1), cache)
    assert chosen is not None
    (name, settings), (fallback, _) = chosen
    assert (name, fallback) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert settings["device_id"] == "1"
    assert settings["trt_engine_cache_path"] == settings["trt_timing_cache_path"] == str(tmp_path)
    assert settings["trt_profile_min_shapes"] == "fpn_0:1x3x16x16,fpn_1:1x3x8x8,image_features:1x3x4x4,seg_states:1x64,image_index:1"
    assert settings["trt_profile_max_shapes"].endswith("seg_states:8x64,image_index:8")
    assert not [key for key in settings if key.startswith(("trt_fp16", "trt_bf16", "trt_int8"))]


def test_without_onnxruntime_the_error_names_the_extras() -> None:
    program = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from vessel_rt.device.providers import Device, open_device\n"
        "from vessel_rt.errors import VesselError\n"
        "try: open_device(Device('cpu'))\n"
        "except VesselError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'vessel-rt[cpu]'" in done.stdout


ABSENT = "cannot open shared object file: No such file or directory"
REINSTALL = "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'vessel-rt[gpu]'"
NEEDS = f"onnxruntime-gpu {onnxruntime.__version__} needs CUDA 13.0 and cuDNN 9: {REINSTALL}"
NOT_AVAILABLE = RuntimeError(  # when the provider's library cannot be loaded
    "/onnxruntime_src/onnxruntime/core/session/provider_bridge_ort.cc:2403 onnxruntime::ProviderInfo_CUDA& "
    "onnxruntime::GetProviderInfo_CUDA() CUDA Provider not available, can't get interface for it"
)


def no_gpu(gpu: StandinGpu, monkeypatch: pytest.MonkeyPatch) -> str:
    gpu.driver_fault = VesselError("there is no NVIDIA driver here")
    return "there is no NVIDIA driver here"


def old_driver(gpu: StandinGpu, monkeypatch: pytest.MonkeyPatch) -> str:
    words = "CUDA driver version is insufficient for CUDA runtime version"
    gpu.memory_fault = cuda_failure(35, words)
    return f"CUDA error 35, {words}: NVIDIA's driver is too old: install the newest one for the GPU"


def no_cudnn(gpu: StandinGpu, monkeypatch: pytest.MonkeyPatch) -> str:
    gpu.missing = {providers._CUDNN: ABSENT}
    return f"{providers._CUDNN} is missing; {NEEDS}"


def other_cuda(gpu: StandinGpu, monkeypatch: pytest.MonkeyPatch) -> str:
    """CUDA 11's or 12's libraries are there, not those of CUDA 13."""
    gpu.missing, gpu.memory_fault = dict.fromkeys(("libcublasLt.so.13", "libcublas.so.13"), ABSENT), NOT_AVAILABLE
    return f"libcublasLt.so.13 is missing; {NEEDS}"


def broken_library(gpu: StandinGpu, monkeypatch: pytest.MonkeyPatch) -> str:
    gpu.missing, gpu.memory_fault = {"libcublas.so.13": "undefined symbol: cublasLtCreate, version libcublasLt.so.13"}, NOT_AVAILABLE
    return f"libcublas.so.13 cannot be loaded (libcublas.so.13: undefined symbol: cublasLtCreate, version libcublasLt.so.13); {NEEDS}"


def both_packages(gpu: StandinGpu, monkeypatch: pytest.MonkeyPatch) -> str:
    gpu.providers = ["AzureExecutionProvider", "CPUExecutionProvider"]
    packages = [SimpleNamespace(name=name) for name in ("onnxruntime", "onnxruntime-gpu")]
    monkeypatch.setattr(providers.importlib.metadata, "distributions", lambda: packages)
    both = "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other"
    return f"{both}; CUDAExecutionProvider is not installed: {REINSTALL}"


def busy(gpu: StandinGpu, monkeypatch: pytest.MonkeyPatch) -> str:
    """Another process has it, in exclusive mode."""
    words = "CUDA-capable device(s) is/are busy or unavailable"
    gpu.memory_fault = cuda_failure(46, words)
    return f"CUDA error 46, {words}: another program has the GPU to itself (nvidia-smi lists them), or its compute mode .*"


def full(gpu: StandinGpu, monkeypatch: pytest.MonkeyPatch) -> str:
    gpu.memory_fault = cuda_failure(2, "out of memory")
    return "CUDA error 2, out of memory: end other programs on the GPU (nvidia-smi lists them)"


def hidden(gpu: StandinGpu, monkeypatch: pytest.MonkeyPatch) -> str:
    gpu.memory_fault = cuda_failure(100, "no CUDA-capable device is detected")
    return "CUDA error 100, no CUDA-capable device is detected: if there is one, CUDA_VISIBLE_DEVICES may hide it"


def unknown(gpu: StandinGpu, monkeypatch: pytest.MonkeyPatch) -> str:
    gpu.memory_fault = RuntimeError("it fails\nin two lines")
    return f"it fails: {REINSTALL}, or a newer driver"


@pytest.mark.parametrize(
    "fault",
    [no_gpu, old_driver, no_cudnn, other_cuda, broken_library, both_packages, busy, full, hidden, unknown],
    ids=lambda fault: fault.__name__,
)
def test_a_set_up_that_does_not_work_is_one_line_with_the_mend(
    fault: Any, standin: Bundle, gpu: StandinGpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], frames: Path
) -> None:
    """In the table of `devices`, as the error of `infer`, and as the reason why `auto` takes the CPU."""
    text = re.escape(fault(gpu, monkeypatch)).replace(r"\.\*", ".*")
    assert main(["devices"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cuda:0")]
    assert re.search(rf"  {text}\Z", line)
    assert main(["infer", str(frames), "--bundle", str(standin.folder), "--device", "cuda", "-o", str(frames.parent / "out")]) == 1
    assert re.fullmatch(rf"vessel-rt: error: --device cuda:0: {text}\n", capsys.readouterr().err)
    assert choose_device(standin, Device("auto")) == CPU


def test_with_everything_in_place_a_gpu_is_usable(standin: Bundle, gpu: StandinGpu) -> None:
    assert device_fault(Device("cuda")) is None
    assert choose_device(standin, Device("auto")) == Device("cuda")


def test_an_onnxruntime_of_which_only_some_files_are_left() -> None:
    """As `pip uninstall onnxruntime` leaves it, when onnxruntime-gpu was installed beside it."""
    program = (
        "import sys, types; sys.modules['onnxruntime'] = types.ModuleType('onnxruntime')\n"
        "from vessel_rt.device.providers import Device, open_device\n"
        "from vessel_rt.errors import VesselError\n"
        "try: open_device(Device('cpu'))\n"
        "except VesselError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("onnxruntime is incomplete: pip uninstall onnxruntime onnxruntime-gpu, then pip install one of")
