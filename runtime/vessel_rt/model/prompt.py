"""From a question to the token ids and embeddings of the prompt, and from an answer's ids to text. Does not know about images."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from tokenizers import Tokenizer

from vessel_rt.errors import BundleError, VesselError, first_line
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.schema import shown

__all__ = ["EmbedTokens", "PromptTokenizer"]

_DTYPES = ("F32", "F16")  # safetensors' names of types that NumPy has


class PromptTokenizer:
    """The bundle's tokenizer, with the text that training put around image and question.

    Raises:
        BundleError: the tokenizer's file cannot be read; any method may also raise it, if the library fails on the file's rules.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._spec = bundle.prompt
        self._path = bundle.folder / bundle.prompt.tokenizer
        with self._faults():
            self._tokenizer = Tokenizer.from_file(str(self._path))

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """The library raises plain Exception; its panics are not even that."""
        try:
            yield
        except BaseException as e:
            if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
                raise
            raise BundleError(f"{self._path}: not a tokenizer ({first_line(e)}); export the bundle again") from e

    def encode(self, question: str) -> tuple[list[int], list[int]]:
        """Token ids of the prompt before and after its image tokens.

        Special tokens split the text before anything else, so these two pieces, encoded separately, give the ids of the whole.

        Raises:
            VesselError: the question is empty, or contains an image token.
        """
        spec = self._spec
        if not question.strip():
            raise VesselError("the question is empty: say what to segment, for example --prompt 'Please segment vessel in this image.'")
        for mark in ("<image>", spec.image_token):
            if mark in question:
                raise VesselError(f"the question {question!r} holds {mark}: leave it out, the image is put before the question")
        try:
            question.encode()
        except UnicodeEncodeError:
            raise VesselError(f"the question {question!r} is not Unicode text: it has half of a surrogate pair") from None
        before, after = spec.prefix + spec.image_start, spec.image_end + "\n" + question + spec.suffix
        with self._faults():
            encodings = self._tokenizer.encode_batch([before, after], add_special_tokens=False)
        return encodings[0].ids, encodings[1].ids

    def encode_separator(self) -> list[int]:
        """Token ids of the prompt between the image tokens of two images, such as two frames of a cine."""
        with self._faults():
            ids: list[int] = self._tokenizer.encode(f"{self._spec.image_end}\n{self._spec.image_start}", add_special_tokens=False).ids
        return ids

    def encode_answer(self, answer: str) -> list[int]:
        """Token ids of an answer, as in training: special tokens such as [SEG] are one id each."""
        with self._faults():
            ids: list[int] = self._tokenizer.encode(answer, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer, with special tokens such as [SEG], without surrounding blanks."""
        with self._faults():
            text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text.strip()


class EmbedTokens:
    """Rows of the embedding table, read from the file on demand: the table is never in memory.

    A run needs the same few dozen rows (of the question and the answers) again and again, so each is read once.

    Raises:
        BundleError: the file cannot be read, or the table's shape is not that of the language model.
    """

    def __init__(self, bundle: Bundle) -> None:
        path, name, sizes = bundle.folder / bundle.embed_tokens.file, bundle.embed_tokens.name, bundle.language_model
        with ExitStack() as stack:
            try:
                file = stack.enter_context(safe_open(path, framework="numpy"))
                self._table: Any = file.get_slice(name)
                dtype, shape = self._table.get_dtype(), self._table.get_shape()
            except Exception as e:  # OSError, SafetensorError
                raise BundleError(f"{path}: cannot read {shown(name)} ({first_line(e)}); export the bundle again") from e
            if dtype not in _DTYPES or shape != [sizes.vocabulary, sizes.hidden_size]:
                raise BundleError(
                    f"{path}: {shown(name)} is {dtype} {shape}, not {' or '.join(_DTYPES)} "
                    f"[{sizes.vocabulary}, {sizes.hidden_size}]; export the bundle again"
                )
            self._stack = stack.pop_all()
        self._path, self._vocabulary = path, sizes.vocabulary
        self._rows: dict[int, npt.NDArray[Any]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.close()

    def rows(self, token_ids: Sequence[int]) -> npt.NDArray[Any]:
        """[len(token_ids), hidden_size], in the table's dtype.

        Raises:
            BundleError: there is no row for a token, so the files do not belong together.
        """
        strange = [token for token in token_ids if not 0 <= token < self._vocabulary]
        if strange or not token_ids:
            raise BundleError(f"{self._path}: has no row for the tokens {strange[:1]}; export the bundle again")
        with self._lock:
            for token in set(token_ids) - self._rows.keys():
                self._rows[token] = self._table[token : token + 1][0]
        return np.stack([self._rows[token] for token in token_ids])
