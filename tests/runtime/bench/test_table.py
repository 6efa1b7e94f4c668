from __future__ import annotations

import msgspec
import pytest

from tests.support.benches import bench_file, bench_run
from vessel_rt.bench.schema import BenchFile
from vessel_rt.bench.table import lines_of, step_ms, table
from vessel_rt.measure.schema import BundleFacts


def test_rows_of_the_same_tiles_are_together_and_faults_come_last() -> None:
    text = table(bench_file()).splitlines()
    head, body, faults = text[0].split(), text[1:17], text[17:-1]
    assert head[:7] == ["bundle", "device", "tiles", "batch", "images/s", "ms", "p50"]
    assert [line.split()[2] for line in body] == ["1"] * 8 + ["10"] * 8
    assert body[0].split()[:5] == ["fp32", "cpu", "1", "1", "10.00"]
    assert faults == [
        "fp16 on cuda:0, batch 4: not run: needs about 20.00 GB of memory with 4 images at once",
        "bundle 3 on cpu: bundle: <damaged> bundle",
    ]


def test_columns_without_a_figure_are_left_out() -> None:
    run = bench_run()
    rows = tuple(msgspec.structs.replace(row, dice=None, device_peak_bytes=None) for row in run.rows)
    head = table(BenchFile(runs=(msgspec.structs.replace(run, rows=rows),))).splitlines()[0]
    assert "Dice" not in head
    assert "device mem." not in head
    assert "least IoU" in head
    assert "machine" not in head


def test_several_machines_have_a_column_and_are_described() -> None:
    text = table(bench_file(bench_run("here"), bench_run("there")))
    assert text.splitlines()[0].startswith("machine")
    assert text.splitlines()[-1] == (
        "machine 2: there, 8 cores, 32.0 GiB, Card, onnxruntime 1.32.0, CPUExecutionProvider, CUDAExecutionProvider, 2026-01-02"
    )


def test_nothing_measured_is_only_its_faults() -> None:
    run = bench_run()
    text = table(BenchFile(runs=(msgspec.structs.replace(run, rows=run.rows[-1:]),)))
    assert text.splitlines()[0] == "bundle 3 on cpu: bundle: <damaged> bundle"
    assert text.splitlines()[1].startswith("machine: A <processor>, 8 cores")


@pytest.mark.parametrize(
    ("bundles", "names"),
    [
        ((BundleFacts("0" * 64, "fp32", "int8", "a.pth", 1),), ["fp32 int8"]),
        (
            (BundleFacts("0" * 64, "fp16", "fp16", "a.pth", 1), BundleFacts("1" * 64, "fp16", "fp16", "b.pth", 1)),
            ["fp16 a.pth", "fp16 b.pth"],
        ),
        (
            (BundleFacts("0" * 64, "fp16", "fp16", "a.pth", 1), BundleFacts("1" * 64, "fp16", "fp16", "a.pth", 2)),
            ["fp16 a.pth 00000000", "fp16 a.pth 11111111"],
        ),
    ],
)
def test_bundles_are_called_by_what_tells_them_apart(bundles: tuple[BundleFacts, ...], names: list[str]) -> None:
    run = bench_run()
    rows = tuple(msgspec.structs.replace(run.rows[0], bundle=number) for number in range(len(bundles)))
    assert [line.bundle for line in lines_of(BenchFile(runs=(msgspec.structs.replace(run, bundles=bundles, rows=rows),)))] == names


def test_columns_add_the_steps_that_ran() -> None:
    row = bench_run().rows[0]
    assert step_ms(row, "prepare") == 25.0
    assert step_ms(row, "total") == 100.0
    assert step_ms(msgspec.structs.replace(row, steps=row.steps[-1:]), "SAM2 dec.") is None
