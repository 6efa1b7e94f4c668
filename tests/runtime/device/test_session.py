from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from vessel_rt.device.session import PROVIDERS, Device, EngineCache, Session, _operators_on_the_cpu, device_fault, open_device
from vessel_rt.errors import OutOfMemory, VesselError
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
        "from vessel_rt.device.session import Device, open_device\n"
        "from vessel_rt.errors import VesselError\n"
        "try: open_device(Device('cpu'))\n"
        "except VesselError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'vessel-rt[cpu]'" in done.stdout


def test_outputs_kept_on_the_device_can_be_fed_again(standin: Bundle) -> None:
    pixels = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
    decoder_inputs = {"seg_states": np.zeros((2, 64), np.float32), "image_index": np.zeros(2, np.int64)}
    with (
        Session(standin.folder / "sam2_image_encoder.onnx", CPU, 1) as encoder,
        Session(standin.folder / "sam2_mask_decoder.onnx", CPU, 1) as decoder,
    ):
        arrays = encoder.run({"pixel_values": pixels})
        kept = encoder.run({"pixel_values": pixels}, keep=("fpn_0", "fpn_1", "image_features"))
        assert all(isinstance(array, np.ndarray) for array in arrays.values())
        assert not any(isinstance(value, np.ndarray) for value in kept.values())
        expected, found = decoder.run({**arrays, **decoder_inputs}), decoder.run({**kept, **decoder_inputs})
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_outputs_outlive_the_session(standin: Bundle) -> None:
    pixels = np.ones((1, 3, 64, 64), np.float32)
    with Session(standin.folder / "sam2_image_encoder.onnx", CPU, 1) as encoder:
        features = encoder.run({"pixel_values": pixels})["fpn_0"]
    np.testing.assert_array_equal(features, np.ones((1, 3, 16, 16), np.float32))


def test_a_cache_is_written_in_place(standin: Bundle) -> None:
    sizes = standin.language_model
    shape = (1, sizes.kv_heads, sizes.capacity, sizes.head_dim)
    with Session(standin.folder / "language_model.onnx", CPU, 1) as session:
        cache = {f"{part}.{i}": session.zeros(shape, "float32") for i in range(sizes.layers) for part in ("past_key", "past_value")}
        outputs = session.run(
            {
                "inputs_embeds": np.ones((1, 3, sizes.hidden_size), np.float32),
                "position_ids": np.arange(3)[None],
                "write_indices": np.array([0]),
                "kv_positions": np.arange(3),
                "gather_positions": np.array([[2]]),
                **cache,
            },
            into={name.replace("past", "present"): value for name, value in cache.items()},
        )
    assert outputs.keys() == {"hidden_states", "next_ids"}
    for value in cache.values():
        assert np.any(value.numpy()[:, :, :3])
        assert not np.any(value.numpy()[:, :, 3:])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_zeros_are_zero_in_types_that_numpy_lacks_too(standin: Bundle, dtype: str) -> None:
    with Session(standin.folder / "sam2_image_encoder.onnx", CPU, 1) as session:
        for _ in range(8):  # memory that was used before comes back
            value = session.zeros((3, 1000), dtype)
            content = (ctypes.c_char * value.tensor_size_in_bytes()).from_address(value.data_ptr())
            assert value.data_type() == {"float32": "tensor(float)"}.get(dtype, f"tensor({dtype})")
            assert len(content) == 3000 * (4 if dtype == "float32" else 2)
            assert not any(content.raw)
            content[:] = b"\xff" * len(content)
            del value


def test_where_operators_run_is_known(standin: Bundle) -> None:
    with Session(standin.folder / "language_model.onnx", CPU, 1) as session:
        assert {"Attention", "MatMul", "TensorScatter", "Shape"} <= _operators_on_the_cpu(session._session)


def test_a_graph_that_does_not_load_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(VesselError, match=r"broken.onnx: onnxruntime .* cannot load this graph on cpu"):
        Session(path, CPU)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA failure 2: out of memory")])
def test_no_room_for_a_value_is_out_of_memory(standin: Bundle, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*_: object) -> None:
        raise error

    with Session(standin.folder / "language_model.onnx", Device("cpu"), 1) as session:
        monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", full)
        with pytest.raises(OutOfMemory, match="language_model fails on cpu"):
            session.zeros((1, 2), "float32")
