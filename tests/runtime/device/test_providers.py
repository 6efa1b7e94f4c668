from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
    assert "CUDAExecutionProvider is not installed: pip uninstall onnxruntime, then pip install 'vessel-rt[gpu]'" in str(
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
