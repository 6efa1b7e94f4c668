from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vessel_rt.bundle import Bundle
from vessel_rt.errors import VesselError
from vessel_rt.session import PROVIDERS, Device, Session, onnxruntime, open_device

CPU = Device("cpu")
HAS_CUDA = PROVIDERS["cuda"].name in onnxruntime().get_available_providers()


@pytest.mark.parametrize(
    ("text", "device"), [("auto", Device("auto")), ("cpu", CPU), ("cuda", Device("cuda")), ("cuda:3", Device("cuda", 3))]
)
def test_parse(text: str, device: Device) -> None:
    assert Device.parse(text) == device


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:x", "cpu:1", "auto:0", "CPU"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is not a device"):
        Device.parse(text)


@pytest.mark.skipif(HAS_CUDA, reason="onnxruntime here has the CUDA provider")
def test_a_device_asked_for_and_absent_is_an_error_but_auto_takes_the_cpu() -> None:
    with pytest.raises(VesselError, match=r"--device cuda:0: .*vessel-rt\[gpu\]"):
        open_device(Device("cuda"))
    assert open_device(Device("auto")) == CPU


def test_without_onnxruntime_the_error_names_the_extras() -> None:
    program = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from vessel_rt.session import Device, open_device\n"
        "from vessel_rt.errors import VesselError\n"
        "try: open_device(Device('auto'))\n"
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
    arrays = {f"{part}.{layer}": np.zeros(shape, np.float32) for layer in range(sizes.layers) for part in ("past_key", "past_value")}
    with Session(standin.folder / "language_model.onnx", CPU, 1) as session:
        cache = {name: session.to_device(array) for name, array in arrays.items()}
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
    for array in arrays.values():
        assert np.any(array[:, :, :3])
        assert not np.any(array[:, :, 3:])


def test_a_graph_that_does_not_load_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(VesselError, match=r"broken.onnx: onnxruntime .* cannot load this graph on cpu"):
        Session(path, CPU)
