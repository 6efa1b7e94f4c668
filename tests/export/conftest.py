"""Random small models in the real formats, and their bundles, made once a session."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from benchmarks.synth.random_model import SynthModel
from tests.support.paths import ROOT
from tests.support.shared import made_once
from tests.support.small_models import MODEL, fine_tuned_state, full_width_memory, write_base, write_checkpoint, write_sam2
from tests.support.traces import traced_once
from vessel_export.bundle.bundle_writer import ExportRequest
from vessel_rt.formats.recipe import load_recipe


def _request(factory: pytest.TempPathFactory, name: str, model: SynthModel) -> ExportRequest:
    def write(folder: Path) -> None:
        write_base(folder / "base", model)
        write_sam2(folder / "sam2_small.pt", model)
        write_checkpoint(folder / "iter_12192.pth", fine_tuned_state(model))

    folder = made_once(factory, name, write)
    inputs = folder / "iter_12192.pth", str(folder / "base"), str(folder / "sam2_small.pt")
    return ExportRequest(*inputs, folder / "bundle", load_recipe(ROOT / "engines" / "cpu.toml"))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> ExportRequest:
    """A random small model's inputs; `out` does not exist yet."""
    return _request(tmp_path_factory, "small", MODEL)


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> ExportRequest:
    """The same with activations beyond FP16's range: see `benchmarks.synth.random_model`."""
    return _request(tmp_path_factory, "planted", dataclasses.replace(MODEL, outliers=True))


@pytest.fixture(scope="session")
def planted_fp16(planted: ExportRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(planted, tmp_path_factory, "fp16")


@pytest.fixture(scope="session")
def planted_fp16_int8(planted: ExportRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(planted, tmp_path_factory, "fp16", "int8")


@pytest.fixture(scope="session")
def planted_bf16(planted: ExportRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(planted, tmp_path_factory, "bf16")


def _export(request: ExportRequest, factory: pytest.TempPathFactory, precision: str, weights: str | None = None) -> Path:
    from vessel_export.bundle.bundle_writer import export_bundle

    name = f"{request.out.parent.name}-{precision}" + (f"-{weights}" if weights else "")
    recipe = msgspec.structs.replace(request.recipe, precision=precision, weights=weights)
    with traced_once():
        return made_once(factory, name, lambda folder: export_bundle(dataclasses.replace(request, out=folder / name, recipe=recipe))) / name


@pytest.fixture(scope="session")
def small_fp32(small: ExportRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(small, tmp_path_factory, "fp32")


@pytest.fixture(scope="session")
def small_int8(small: ExportRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(small, tmp_path_factory, "fp32", "int8")


@pytest.fixture(scope="session")
def small_fp16(small: ExportRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(small, tmp_path_factory, "fp16")


@pytest.fixture(scope="session", params=["small_fp32", "small_fp16"])
def small_bundle(request: pytest.FixtureRequest) -> Path:
    """The random small model's bundle, in each precision."""
    bundle: Path = request.getfixturevalue(request.param)
    return bundle


@pytest.fixture(scope="session")
def full_width_cines(tmp_path_factory: pytest.TempPathFactory) -> ExportRequest:
    """A small model whose graphs of cines are as wide as the real ones: megabytes. `out` does not exist yet."""
    request = _request(tmp_path_factory, "full-width-cines", full_width_memory())
    return dataclasses.replace(request, recipe=load_recipe(ROOT / "engines" / "rtx3090.toml"))


@pytest.fixture(name="traced_once")
def _traced_once() -> Iterator[None]:
    """Exports of this test trace only what was not traced before in this session."""
    with traced_once():
        yield


@pytest.fixture(scope="session")
def full_width(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExportRequest]:
    """The real model's widths, 2 layers deep, with planted outliers, and at `out` its FP16 bundle; gone at the end: it is gigabytes."""
    from benchmarks.synth.random_model import full_size, write_synth
    from vessel_export.bundle.bundle_writer import export_bundle

    folder = tmp_path_factory.mktemp("full-width")
    write_synth(folder / "model", full_size(2))
    [checkpoint], [sam2] = (folder / "model").glob("iter_*.pth"), (folder / "model").glob("sam2_*.pt")
    recipe = load_recipe(ROOT / "engines" / "rtx3090.toml")
    request = ExportRequest(checkpoint, str(folder / "model" / "base"), str(sam2), folder / "bundle", recipe)
    export_bundle(request)
    yield request
    shutil.rmtree(folder)
