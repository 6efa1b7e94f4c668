"""Study codes: what is shown of a file whose name may carry a patient's.

A bare hash of a ten-digit id is found by trying them all, so a code is an HMAC, and its key stays with the user, apart from any output.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from vessel_rt.errors import VesselError
from vessel_rt.files import open_regular

__all__ = ["CODE_DIGITS", "StudyCodes", "conceal", "remember"]

CODE_DIGITS = 12  # hexadecimal: among 10,000 files two share a code once in 5 million folders, and then the run says so and ends

_LARGEST = 1024  # bytes of a key's file, most of which would be white space

_known: dict[str, str] = {}  # what may not be seen: what to show in its place


class StudyCodes:
    """Codes under one key: HMAC-SHA256 of a file's stem, shortened. The same stem has the same code in every run with that key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def load(cls, path: Path | None = None, outside: Path | None = None) -> StudyCodes:
        """The key in `path`, made on first use; None is $VESSEL_KEY, else study-codes.key in the user's configuration folder.

        Raises:
            VesselError: it cannot be read or made, others may read it, or it lies in the folder `outside`, which may be passed on.
        """
        path = path or _default_path()
        if outside is not None and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(outside)):
            raise VesselError(f"{path}: the key may not lie among the results, which it would unlock; name another with --key")
        try:
            return cls(_read(path) if path.exists() else _make(path))
        except OSError as e:
            raise VesselError(f"{path}: no key for study codes ({e.strerror or e}); name another place with --key or VESSEL_KEY") from e

    def code(self, stem: str) -> str:
        """12 hexadecimal digits for a file's stem."""
        return self._digits(stem.encode("utf-8", "surrogatepass"))

    @property
    def key_id(self) -> str:
        """12 hexadecimal digits for the key itself, which do not tell it; no stem has a zero byte."""
        return self._digits(b"\0key")

    def _digits(self, message: bytes) -> str:
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()[:CODE_DIGITS]


def _default_path() -> Path:
    if os.environ.get("VESSEL_KEY"):
        return Path(os.environ["VESSEL_KEY"])
    try:
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    except RuntimeError:
        raise VesselError("there is no home folder for the key of study codes; name a place with --key or VESSEL_KEY") from None
    return folder / "vessel-rt" / "study-codes.key"


def _read(path: Path) -> bytes:
    with open_regular(path) as file:
        if os.name == "posix" and os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise VesselError(f"{path}: others may read this key; chmod 600 it")
        text = file.read(_LARGEST + 1).strip()
    if not re.fullmatch(rb"[0-9a-f]{64}", text):
        raise VesselError(f"{path}: not a key that vessel-rt made (64 hexadecimal digits); name another with --key")
    return bytes.fromhex(text.decode())


def _make(path: Path) -> bytes:
    """A new key, or that of another process that was quicker."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
        try:
            os.link(temporary, path)  # unlike a rename, it fails where the other key is there already
            print(f"vessel-rt: study codes are made with the new key {path}; keep it, and keep it apart from results", file=sys.stderr)
        except FileExistsError:
            pass
    finally:
        temporary.unlink(missing_ok=True)
    return _read(path)


def remember(path: Path | str, shown: str) -> None:
    """Have `conceal` put `shown` for this path, its name and its stem."""
    for text in (str(path), os.path.abspath(path), Path(path).name, Path(path).stem):
        if text.strip("./"):
            _known[text] = shown


def conceal(text: str) -> str:
    """`text` without the names that `remember` was told: for what libraries say, and for tracebacks.

    A name is found wherever it is not part of a longer word. What this program says itself never has names in it.
    """
    return _concealed(text, sorted((name for name in _known if name in text), key=len, reverse=True))


def _concealed(text: str, names: Iterable[str]) -> str:
    for name in names:
        text = re.sub(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", lambda _, name=name: _known[name], text)  # type: ignore[misc]
    return text
