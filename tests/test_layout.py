"""The tests of a module are where the module is: tests/runtime/io/test_files.py tests runtime/vessel_rt/io/files.py."""

from __future__ import annotations

import pytest

from tests.support.paths import ROOT

PACKAGES = {"runtime": ROOT / "runtime" / "vessel_rt", "export": ROOT / "export" / "vessel_export", "benchmarks": ROOT / "benchmarks"}
OF_SEVERAL_MODULES = {
    "runtime/run/test_bundle_in_use.py",
    "runtime/test_no_names.py",
    "runtime/test_package.py",
    "export/graphs/test_graphs.py",
    "export/parity/test_overflow.py",
    "export/test_streams.py",
}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_test_file_mirrors_a_module(package: str) -> None:
    tests = ROOT / "tests" / package
    for path in tests.rglob("test_*.py"):
        place = path.relative_to(tests)
        module = PACKAGES[package] / place.with_name(place.name.removeprefix("test_"))
        assert module.exists() or module.with_suffix("").is_dir() or f"{package}/{place.as_posix()}" in OF_SEVERAL_MODULES, path
