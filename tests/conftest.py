"""What every test may use: the small trained model of examples/tiny, and the bundles exported from it, once a session."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.paths import ROOT, Tiny
from tests.support.shared import made_once

if "PYTEST_XDIST_WORKER" in os.environ:  # processes that share the cores: torch's threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # tests import onnxruntime themselves; what the project promises is tested in test_network.py


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    folder = ROOT / "examples" / "tiny"
    (checkpoint,) = folder.glob("iter_*.pth")
    return Tiny(folder / "base", folder / "sam2_tiny.pt", checkpoint, folder / "frames", folder / "annotations.json")


def _export(tiny: Tiny, factory: pytest.TempPathFactory, name: str, **changes: Any) -> Path:
    """`name`: the recipe `cpu` with other values, or another recipe's name."""
    from vessel_export.bundle.bundle_writer import ExportRequest, export_bundle
    from vessel_rt.formats.recipe import load_recipe

    recipe = msgspec.structs.replace(load_recipe("cpu"), **changes) if changes else load_recipe(name)
    name = f"tiny-{name}"
    inputs = tiny.checkpoint, str(tiny.base), str(tiny.sam2)
    return made_once(factory, name, lambda folder: export_bundle(ExportRequest(*inputs, folder / name, recipe))) / name


@pytest.fixture(scope="session")
def fp32_bundle(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(tiny, tmp_path_factory, "fp32", precision="fp32")


@pytest.fixture(scope="session")
def fp16_bundle(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(tiny, tmp_path_factory, "fp16", precision="fp16")


@pytest.fixture(scope="session")
def bf16_bundle(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(tiny, tmp_path_factory, "bf16", precision="bf16")


@pytest.fixture(scope="session")
def golden_bundle(tiny: Tiny, fp32_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FP32 bundle with goldens."""
    from vessel_export.parity.verify import VerifyRequest, record_after_export

    def make(folder: Path) -> None:
        shutil.copytree(fp32_bundle, folder / "golden")
        assert record_after_export(VerifyRequest(folder / "golden", tiny.checkpoint, str(tiny.base), str(tiny.sam2)), stream=False)

    return made_once(tmp_path_factory, "tiny-golden", make) / "golden"


@pytest.fixture(scope="session")
def int8_bundle(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(tiny, tmp_path_factory, "cpu-int8")


@pytest.fixture(scope="session")
def int8_fp16_bundle(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With DequantizeLinear, where int8_bundle has MatMulNBits."""
    return _export(tiny, tmp_path_factory, "rtx3090-int8")


@pytest.fixture(scope="session")
def int4_bundle(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(tiny, tmp_path_factory, "int4", weights="int4")
