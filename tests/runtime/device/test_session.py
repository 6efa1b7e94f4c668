from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tests.support.standin_gpu import StandinGpu, cuda_failure, out_of_memory
from vessel_rt.device.providers import Device
from vessel_rt.device.session import Session
from vessel_rt.errors import OutOfMemory, VesselError
from vessel_rt.formats.bundle import Bundle

CPU = Device("cpu")


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


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells what a process has")
def test_zeros_that_are_not_written_take_no_memory(standin: Bundle) -> None:
    def data_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    with Session(standin.folder / "sam2_image_encoder.onnx", CPU, 1) as session:
        before, value = data_pages(), session.zeros((1 << 28,), "float32")  # 1 GiB
        assert value.shape() == [1 << 28]
        assert data_pages() - before < 10_000


def test_where_operators_run_is_known(standin: Bundle) -> None:
    with Session(standin.folder / "language_model.onnx", CPU, 1) as session:
        assert session.placement.keys() == {"CPUExecutionProvider"}
        operators = session.placement["CPUExecutionProvider"]
        assert {"Attention", "MatMul", "TensorScatter", "Shape"} <= operators.keys()
        assert operators["Attention"] == standin.language_model.layers


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
        monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy_with_onnx_type", full)
        with pytest.raises(OutOfMemory, match="language_model fails on cpu"):
            session.zeros((1, 2), "float32")


@pytest.mark.parametrize(
    ("stage", "operator"), [("language_model", "Attention"), ("vision_encoder", "AveragePool"), ("vision_encoder", "Transpose")]
)
def test_a_gpu_without_a_kernel_is_not_used(standin: Bundle, gpu: StandinGpu, stage: str, operator: str) -> None:
    """Activations would be copied to the host and back. Arithmetic of shapes is on the CPU by design."""
    path = standin.folder / f"{stage}.onnx"
    gpu.on_the_cpu = frozenset(("Shape", "Unsqueeze", "Reshape"))
    with Session(path, Device("cuda")):
        pass
    gpu.on_the_cpu |= {operator}
    with pytest.raises(VesselError, match=rf"{stage}\.onnx: onnxruntime .* has no kernel on cuda:0 for {operator}; take another"):
        Session(path, Device("cuda"))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (out_of_memory(), "cuda:0 has no memory for this graph: end other programs"),
        (cuda_failure(2, "out of memory"), "cuda:0 has no memory for this graph: end other programs"),
        (
            cuda_failure(46, "CUDA-capable device(s) is/are busy or unavailable"),
            "cannot load this graph on cuda:0: CUDA error 46, .*nvidia-smi",
        ),
        (cuda_failure(999, "unknown error"), r"cannot load this graph on cuda:0: CUDA error 999, unknown error\Z"),
    ],
)
def test_a_gpu_that_fails_while_a_graph_is_loaded(standin: Bundle, gpu: StandinGpu, error: Exception, told: str) -> None:
    gpu.load_fault = error
    with pytest.raises(VesselError, match=rf"\A[^\n]*language_model\.onnx: [^\n]*{told}") as e:
        Session(standin.folder / "language_model.onnx", Device("cuda"))
    assert "hostname" not in str(e.value)
