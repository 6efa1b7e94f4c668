"""From a question to the token ids and embeddings of the prompt, and from an answer's ids back to text."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from tokenizers import Tokenizer

from vessel_rt.bundle import Bundle
from vessel_rt.errors import BundleError, VesselError

__all__ = ["EmbedTokens", "PromptTokenizer"]


class PromptTokenizer:
    """The bundle's tokenizer, with the text that training put around image and question.

    Raises:
        BundleError: the tokenizer's file cannot be read.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._spec = bundle.prompt
        path = bundle.folder / bundle.prompt.tokenizer
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises plain Exception
            raise BundleError(f"{path}: not a tokenizer ({e}); export the bundle again") from e

    def encode(self, question: str) -> tuple[list[int], list[int]]:
        """Token ids of the prompt before and after its image tokens.

        Special tokens split the text before anything else, so that these two pieces, encoded alone, give the ids of the whole.

        Raises:
            VesselError: the question is empty, or itself places an image.
        """
        spec = self._spec
        if not question.strip():
            raise VesselError("the question is empty: say what to segment, for example --prompt 'Please segment vessel in this image.'")
        for mark in ("<image>", spec.image_token):
            if mark in question:
                raise VesselError(f"the question {question!r} holds {mark}: leave it out, the image is put before the question")
        before, after = spec.prefix + spec.image_start, spec.image_end + "\n" + question + spec.suffix
        encodings = self._tokenizer.encode_batch([before, after], add_special_tokens=False)
        return encodings[0].ids, encodings[1].ids

    def encode_answer(self, answer: str) -> list[int]:
        """Token ids of an answer, as training had them: special tokens such as [SEG] are one id each."""
        ids: list[int] = self._tokenizer.encode(answer, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer, special tokens such as [SEG] shown, without blanks around it."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text.strip()


class EmbedTokens:
    """Rows of the embedding table, read from the file as they are asked for: the table itself never is in memory.

    A run asks for the same few dozen rows (a question's, the answers') again and again, so each is read once.
    """

    def __init__(self, bundle: Bundle) -> None:
        path = bundle.folder / bundle.embed_tokens.file
        with ExitStack() as stack:
            try:
                file = stack.enter_context(safe_open(path, framework="numpy"))
                self._table: Any = file.get_slice(bundle.embed_tokens.name)
            except Exception as e:  # OSError, SafetensorError
                raise BundleError(f"{path}: cannot read {bundle.embed_tokens.name} ({e}); export the bundle again") from e
            self._stack = stack.pop_all()
        self._rows: dict[int, npt.NDArray[Any]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.close()

    def rows(self, token_ids: Sequence[int]) -> npt.NDArray[Any]:
        """[len(token_ids), hidden_size], in the table's dtype."""
        with self._lock:
            for token in set(token_ids) - self._rows.keys():
                self._rows[token] = self._table[token : token + 1][0]
        return np.stack([self._rows[token] for token in token_ids])
