"""What a folder knows of a person, looked for in every byte that leaves vessel-rt.

The name and the id stand in the files' names, in their folder's, in EXIF, in a JPEG's comment, in PNG's texts and in DICOM's attributes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.support.frames import make_frame
from vessel_rt.cli import main
from vessel_rt.formats.bundle import Bundle

pydicom = pytest.importorskip("pydicom", reason="extra dicom is not installed")

NAME, ID = "Study-Quokka", "4711008150"
STEM = f"{NAME}({ID})_4-1_1"
WORDS = ("quokka", ID)


@pytest.fixture
def ward(standin: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the bundle `engines/new`, and frames, good and bad ones, in a folder that has the name, too."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(standin.folder, tmp_path / "engines" / "new")
    folder = tmp_path / f"ward of {NAME}"
    folder.mkdir()
    told = Image.Exif()
    told[0x010E] = told[0x9C9C] = f"{NAME} {ID}"
    make_frame().save(folder / f"{STEM}_0001.jpg", exif=told, comment=f"{NAME} {ID}".encode())
    texts = PngInfo()
    texts.add_text("Patient", f"{NAME} {ID}")
    make_frame(seed=1).save(folder / f"{STEM}_0002.png", pnginfo=texts, exif=told)
    make_frame(seed=2).save(folder / f"{STEM}_0003.tif", tiffinfo={270: f"{NAME} {ID}"})
    (folder / f"{STEM}_0004.jpg").write_text(f"{NAME} {ID}")
    (folder / f"{STEM}_0005.jpg").write_bytes((folder / f"{STEM}_0001.jpg").read_bytes()[:900])
    (folder / f"{STEM}_0006.dcm").write_text(f"{NAME} {ID}")
    _write_cine(folder / f"{STEM}_0007.dcm", folder / f"{STEM}_0008.dcm")
    return folder


def _write_cine(whole: Path, cut: Path) -> None:
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.XRayAngiographicImageStorage
    cine = pydicom.Dataset()
    cine.file_meta = meta
    cine.SOPClassUID, cine.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3.4"
    cine.PatientName, cine.PatientID, cine.InstitutionName, cine.StudyDescription = f"{NAME}^A", ID, NAME, f"{NAME} {ID}"
    cine.PhotometricInterpretation, cine.SamplesPerPixel, cine.PixelRepresentation = "MONOCHROME2", 1, 0
    cine.Rows, cine.Columns, cine.BitsAllocated, cine.BitsStored, cine.HighBit, cine.NumberOfFrames = 64, 96, 8, 8, 7, 2
    cine.PixelData = make_frame().convert("L").tobytes() + make_frame(seed=1).convert("L").tobytes()
    cine.save_as(whole, enforce_file_format=True)
    cut.write_bytes(whole.read_bytes()[:-3000])


def _annotate(ward: Path) -> None:
    """Beside the frames: of each kind of name one, with a mismatch or without."""
    square = [0, 20, 96, 20, 96, 32, 0, 32]
    items = [{"image": path.name, "mask": [[square]], "text": ["vessel"]} for path in sorted(ward.iterdir())]
    items += [items[0], {"image": f"{STEM}_gone.jpg", "mask": [[square], [square]], "text": ["vessel"]}]
    Path("annotations.json").write_text(json.dumps(items))


def _commands(ward: Path) -> Iterator[tuple[int, list[str]]]:
    """Every command that is given frames, in good runs and bad ones, with the exit code to expect."""
    infer = ["infer", str(ward), "--threads", "1"]
    yield 1, [*infer, "-o", "out", "-v", "--json"]
    yield 1, [*infer, "-o", "out", "--devices", "cpu:2"]  # goes on: what failed is tried again
    yield 1, [*infer, "-o", "out", "--fail-fast", "--overwrite"]
    yield 1, [*infer, "-o", "two", "--devices", "cpu:2", "-v"]
    yield 1, [*infer, "-o", "two", "--prompt", "What else?"]
    yield 1, ["infer", f"{ward}/{STEM}_0001.jpg", "-o", "two"]
    yield 1, ["infer", f"{ward}/{STEM}_none.jpg", "-o", "none"]
    yield 1, ["infer", f"{ward}/{STEM}*.xyz", "-o", "none"]
    for shard in "01":
        yield 1, [*infer, "-o", f"shard{shard}", "--num-shards", "2", "--shard-id", shard]
    yield 0, ["merge-shards", "shard0", "shard1", "-o", "merged"]
    Path("merged/masks").joinpath(f"{STEM}_0003.png").write_bytes(b"drawn by hand")
    yield 1, [*infer, "-o", "merged"]
    yield 1, ["evaluate", "two", "--gt", "annotations.json"]
    yield 1, ["check-data", "annotations.json", "--images", str(ward), "--json"]
    yield 1, ["check-data", "annotations.json", "--images", str(ward), "--fix", "fixed.json"]
    yield 0, ["evaluate", "two", "--gt", "fixed.json"]
    yield 0, ["report", "two"]


def _found(content: bytes) -> bool:
    folded = content.lower()
    encoded = [word.encode(encoding) for word in WORDS for encoding in ("ascii", "utf-16-le", "utf-16-be")]
    return any(word in folded for word in encoded)


def test_nothing_but_what_the_masks_are_called_has_the_name(ward: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _annotate(ward)
    for code, command in _commands(ward):
        assert main(command) == code, command
        out, err = capfd.readouterr()
        assert not _found((out + err).encode()), command
        assert "Traceback" not in err, command
    outputs = [path for name in ("out", "two", "merged", "shard0", "shard1") for path in (tmp_path / name).rglob("*") if path.is_file()]
    named = {path.relative_to(tmp_path).as_posix() for path in outputs if _found(path.read_bytes())}
    assert {Path(name).name for name in named} == {"results.jsonl"}  # the record, by which masks are matched
    assert _found(Path("two/masks").joinpath(f"{STEM}_0001.png").name.encode())
    assert Path(f"two/cines/{STEM}_0007.tif").exists()
    assert {path.name for path in outputs} >= {"report.html", "run.json", "timings.jsonl", "evaluation.json", "metrics.csv"}
    assert not _found(Path("fixed.dropped.json").read_bytes())


def test_pseudonymized_not_even_that(ward: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _annotate(ward)
    for device in ("--device=cpu", "--devices=cpu:2"):
        assert main(["infer", str(ward), "-o", "out", "-v", "--pseudonymize", device]) == 1
    assert main(["check-data", "annotations.json", "--images", str(ward), "--fix", "fixed.json"]) == 1
    assert main(["evaluate", "out", "--gt", "fixed.json"]) == 0
    out, err = capfd.readouterr()
    assert not _found((out + err).encode())
    assert "mean Dice vessel" in out
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 5
    assert not [path for path in files if _found(path.relative_to(tmp_path).as_posix().encode()) or _found(path.read_bytes())]


def test_shown_when_asked_for(ward: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", str(ward), "-o", "out", "--show-names", "-v"]) == 1
    assert f"{STEM}_0004.jpg: not a JPG" in capfd.readouterr().err
    assert f"{STEM}_0001.jpg" in Path("out/report.html").read_text()
