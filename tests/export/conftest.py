"""Random small models in the real formats, and their bundles, made once a session."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.export.small_models import fine_tuned_state, write_base, write_checkpoint, write_sam2
from vessel_export.bundle_writer import ExportRequest
from vessel_rt.recipe import load_recipe


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> ExportRequest:
    """A random small model's inputs; `out` does not exist yet."""
    folder = tmp_path_factory.mktemp("small")
    base, sam2 = write_base(folder / "base"), write_sam2(folder / "sam2_small.pt")
    checkpoint = write_checkpoint(folder / "iter_12192.pth", fine_tuned_state(sam2))
    return ExportRequest(checkpoint, str(base), str(sam2), folder / "bundle", load_recipe(ROOT / "engines" / "cpu.toml"))


def _export(small: ExportRequest, precision: str) -> Path:
    from vessel_export.bundle_writer import export_bundle

    out = small.out.with_name(f"small-{precision}")
    export_bundle(dataclasses.replace(small, out=out, recipe=dataclasses.replace(small.recipe, precision=precision)))
    return out


@pytest.fixture(scope="session")
def small_fp32(small: ExportRequest) -> Path:
    return _export(small, "fp32")


@pytest.fixture(scope="session")
def small_fp16(small: ExportRequest) -> Path:
    return _export(small, "fp16")


@pytest.fixture(scope="session", params=["small_fp32", "small_fp16"])
def small_bundle(request: pytest.FixtureRequest) -> Path:
    """The random small model's bundle, in each precision."""
    bundle: Path = request.getfixturevalue(request.param)
    return bundle
