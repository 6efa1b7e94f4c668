"""Study codes: what is shown instead of a file's name, which may contain a patient's. Does not know which files a run has.

A plain hash of a ten-digit id can be reversed by trying all of them, so a code is an HMAC. Its key stays with the user, not in the output.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import stat
import sys
import threading
from pathlib import Path

from vessel_rt.errors import VesselError
from vessel_rt.io.files import open_regular

__all__ = ["CODE_DIGITS", "StudyCodes", "conceal", "printable", "remember"]

CODE_DIGITS = 12  # hexadecimal: of 10,000 files two share a code in one of 5 million folders, and the run then ends with a message

_LARGEST = 1024  # bytes of a key file, most of them white space

# Files of these names are not concealed by stem: in messages and tracebacks the words have other meanings.
_COMMON = re.compile("cine|data|error|(file|frame|image|mask|result)s?|folder|input|line|name|output|path|report", re.IGNORECASE)

# How a name is matched in a text.
_PLAIN = r"(?<![^\W_]){}(?![^\W_])(?!\.pyc?\b)"
_WHOLE = r"(?<![\w.-]){}(?![\w-])"
_WITH_SUFFIX = r"(?<![\w.-]){}(?=(?:_\d+|_frame_\d+|_gt|_mask)*\.(?:jpe?g|png|tiff?|bmp|webp|dcm|dicom)(?!\w))"

_known: dict[str, tuple[str, str]] = {}  # what to conceal: what to show instead, and the pattern that matches it


class StudyCodes:
    """Codes under one key: HMAC-SHA256 of a file's stem, shortened. The same stem has the same code in every run with that key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def load(cls, path: Path | None = None, outside: Path | None = None) -> StudyCodes:
        """The key in `path`, created on first use; None is $VESSEL_KEY, else study-codes.key in the user's configuration folder.

        Raises:
            VesselError: it cannot be read or created, others may read it, or it lies in the folder `outside`, which may be passed on.
        """
        path = path or _default_path()
        if outside is not None and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(outside)):
            raise VesselError(f"{path}: the key must not lie in the output folder, whose study codes it reveals; name another with --key")
        try:
            return cls(_read(path) if path.exists() else _make(path))
        except OSError as e:
            raise VesselError(f"{path}: no key for study codes ({e.strerror or e}); name another place with --key or VESSEL_KEY") from e

    def code(self, stem: str) -> str:
        """12 hexadecimal digits for a file's stem."""
        return self._digits(stem.encode("utf-8", "surrogatepass"))

    @property
    def key_id(self) -> str:
        """12 hexadecimal digits that identify the key without revealing it. No stem contains a zero byte."""
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
    """A new key, or that of another process that was faster."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
        try:
            os.link(temporary, path)  # unlike a rename, this fails if another key exists
            print(f"vessel-rt: created the key of study codes {path}; keep it, and keep it apart from results", file=sys.stderr)
        except FileExistsError:
            pass
    finally:
        temporary.unlink(missing_ok=True)
    return _read(path)


def remember(path: Path | str, shown: str) -> None:
    """Let `conceal` replace this path, its name and its stem by `shown`, also in the form of Python's repr."""
    path = Path(path)
    distinct = _is_distinct(path.stem)
    for text in (str(path), os.path.abspath(path), path.name):
        whole = text not in (path.stem, path.name) or bool(path.suffix)  # a path, or a name with its suffix
        _learn(text, shown, _PLAIN if distinct else _WHOLE if whole and _is_distinct(text) else _WITH_SUFFIX)
    _learn(path.stem, shown, _PLAIN if distinct else _WITH_SUFFIX)


def printable(text: str) -> str:
    """`text` in one line, with control and invisible characters escaped: a file name may contain any."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text)


def conceal(text: str) -> str:
    """`text` without the names that were passed to `remember`, for texts of libraries and for tracebacks.

    A path, a name with its suffix, or a distinct stem is replaced wherever it is not part of a longer word. A stem that is not distinct,
    such as `1`, `86` or `image`, is replaced only with the suffix of an image: otherwise it would match in `line 86` and `1 of 78`. The
    messages of this program itself contain no names.
    """
    names = sorted((name for name in _known if name in text), key=len, reverse=True)  # if two begin at the same place, the longer
    if not names:
        return text
    pattern = "|".join(_known[name][1].format(re.escape(name)) for name in names)
    return re.sub(pattern, lambda found: _known[found.group()][0], text)


def _is_distinct(stem: str) -> bool:
    """Whether a stem is unlikely to occur in a text by chance: at least 4 letters (2 outside ASCII) or 6 digits, and no common word."""
    signs = re.sub(r"[\W_]", "", stem)
    if signs.isdigit():
        return len(signs) >= 6
    return sum(1 if sign.isascii() else 2 for sign in signs) >= 4 and not _COMMON.fullmatch(stem)


def _learn(text: str, shown: str, pattern: str) -> None:
    if not re.search(r"[^\W_]", text):  # `.`, `..`, `*`
        return
    written = {text, repr(text)[1:-1], ascii(text)[1:-1]}
    with contextlib.suppress(UnicodeEncodeError):
        written.add(repr(os.fsencode(text))[2:-1])
    _known.update(dict.fromkeys(written, (shown, pattern)))
