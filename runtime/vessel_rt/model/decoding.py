"""Greedy decoding with a KV cache, and the hidden states that become masks.

A draft is an answer that is expected. It runs through the model together with the prompt, and its tokens are accepted as long as the model
would have generated them itself. It is ignored after the first rejected token. A draft changes the number of runs, never the answer.

Knows the language_model graph (docs/architecture.md) and token ids. Does not know about text, images or masks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vessel_rt.device.session import Session
from vessel_rt.errors import ImageError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.profiles import MOST_KEPT
from vessel_rt.model.prompt import EmbedTokens

if TYPE_CHECKING:
    from onnxruntime import OrtValue

__all__ = ["Generation", "LanguageModel"]

# ONNX Runtime's fused CUDA kernel for Attention with a mask needs such a number of keys; with another one it writes all scores to memory,
# 4.3 GB for a prompt of 13 tiles (docs/engines.md).
_LIVE_STEP = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """One answer: its ids without the stop token, and a state [masks, hidden_size] for each [SEG] in it.

    `drafted` tokens ran with the prompt; the model would have generated the first `accepted` of them itself. `decode_steps` runs followed.
    """

    token_ids: tuple[int, ...]
    seg_states: npt.NDArray[Any]
    drafted: int
    accepted: int
    decode_steps: int


class _NotFiniteError(ImageError):
    """Numbers that overflow the bundle's precision."""


@dataclasses.dataclass
class _Row:
    """One prompt of the batch and what was generated after it; the last emitted token is not consumed yet."""

    prompt_length: int
    draft: tuple[int, ...]
    accepted: int = 0
    emitted: list[int] = dataclasses.field(default_factory=list)
    seg_states: list[npt.NDArray[Any]] = dataclasses.field(default_factory=list)
    decode_steps: int = 0

    @property
    def position(self) -> int:
        """The position of the last emitted token in the sequence."""
        return self.prompt_length + len(self.emitted) - 1


class LanguageModel:
    """The language_model graph and its KV caches: one for each thread that generates at the same time.

    A cache lies on the device, is written in place, and is reused for later prompts: what an earlier prompt left in it lies beyond the
    positions of the later one, and the graph masks it. Its type is the graph's, which NumPy may lack.

    Args:
        session: the loaded graph.
        bundle: the bundle that it belongs to.
        embed_tokens: its embedding table.
        chunk: the most tokens of a single prompt that run at once. Activations take memory for so many. None runs all at once.
    """

    def __init__(self, session: Session, bundle: Bundle, embed_tokens: EmbedTokens, chunk: int | None = None) -> None:
        self._session, self._chunk = session, chunk
        self._sizes = bundle.language_model
        self._seg, self._stops = bundle.prompt.seg_token_id, frozenset(bundle.prompt.stop_token_ids)
        self._embed_tokens = embed_tokens
        stage = bundle.stages["language_model"]
        self._dtype = stage.input_dtype("inputs_embeds")  # the states' dtype too
        self._cache_dtype = stage.input("past_key.0").dtype
        self._precision = bundle.precision
        self._unused: list[tuple[int, list[OrtValue]]] = []  # caches, each with its number of rows

    def generate(self, prompts: Sequence[npt.NDArray[Any]], drafts: Sequence[Sequence[int]] | None = None) -> list[Generation]:
        """Answer each prompt, given as embeddings [tokens, hidden_size], until a stop token or `max_new_tokens`.

        `drafts` are the ids of the expected answers, without a stop token; of a long one only the beginning is tried. A [SEG] that is the
        last token of the budget is still consumed, since its state becomes the mask.

        Raises:
            ImageError: a prompt that leaves no room in the cache for an answer, or states that are not finite.
        """
        longest, room = max(map(len, prompts)), self._sizes.capacity - self._sizes.max_new_tokens
        if longest > room:
            raise ImageError(
                f"its prompt has {longest} tokens, but this bundle takes {room} "
                f"({self._sizes.capacity} less {self._sizes.max_new_tokens} for the answer); export it with a larger capacity"
            )
        tried = min(MOST_KEPT - 1, self._sizes.max_new_tokens)
        rows = [_Row(len(prompt), tuple(draft[:tried])) for prompt, draft in zip(prompts, drafts or [()] * len(prompts), strict=True)]
        try:
            with self._cache_of(len(rows)) as cache:
                self._begin(rows, prompts, cache)
                while any(map(self._unfinished, rows)):
                    self._step(rows, cache)
        except _NotFiniteError:
            if not any(row.draft for row in rows):
                raise
            return self.generate(prompts)  # NaN of a draft in the cache spoils the prompt although it is masked: 0 times NaN is NaN
        return [self._generation(row) for row in rows]

    def _begin(self, rows: Sequence[_Row], prompts: Sequence[npt.NDArray[Any]], cache: Sequence[OrtValue]) -> None:
        """Run every prompt with its draft, and accept the draft's tokens as long as the model generates them itself."""
        chunks = [np.concatenate([prompt, *self._embedded(row.draft)]) for row, prompt in zip(rows, prompts, strict=True)]
        gathered = 1 + max(len(row.draft) for row in rows)
        gather = [[row.prompt_length - 1 + min(i, len(row.draft)) for i in range(gathered)] for row in rows]
        start = self._begin_long(chunks[0], gathered, cache) if len(rows) == 1 else 0
        gather = [[position - start for position in positions] for positions in gather]
        next_ids, states = self._run([chunk[start:] for chunk in chunks], [start] * len(rows), gather, cache)
        for row, said, state in zip(rows, next_ids, states, strict=True):
            self._check(state[0])
            row.emitted.append(int(said[0]))
            for i, expected in enumerate(row.draft, start=1):
                if row.emitted[-1] != expected or not self._unfinished(row):
                    break
                self._consumed(row, state[i], int(said[i]))
                row.accepted += 1

    def _begin_long(self, prompt: npt.NDArray[Any], gathered: int, cache: Sequence[OrtValue]) -> int:
        """Run the first chunks of a prompt, and return the start of the last one, which has the `gathered` last positions.

        Chunks are about equal: a CPU takes twice as long for a token of a short one.
        """
        start, chunks = 0, -(-len(prompt) // self._chunk) if self._chunk else 1
        size = -(-len(prompt) // chunks)
        while len(prompt) - start - gathered > size:
            self._run([prompt[start : start + size]], [start], [[0]], cache)
            start += size
        return start

    def _embedded(self, token_ids: Sequence[int]) -> list[npt.NDArray[Any]]:
        return [self._embed_tokens.rows(token_ids)] if token_ids else []

    def _step(self, rows: Sequence[_Row], cache: Sequence[OrtValue]) -> None:
        """Consume every row's last token. A finished row repeats its own in place, and the result is ignored."""
        tokens = self._embed_tokens.rows([row.emitted[-1] for row in rows])
        next_ids, states = self._run(list(tokens[:, None]), [row.position for row in rows], [[0]] * len(rows), cache)
        for row, said, state in zip(rows, next_ids, states, strict=True):
            if self._unfinished(row):
                row.decode_steps += 1
                self._consumed(row, state[0], int(said[0]))

    def _consumed(self, row: _Row, state: npt.NDArray[Any], said: int) -> None:
        """Note that the row's last token led to `state` and to the token `said`."""
        self._check(state)
        if row.emitted[-1] == self._seg:
            row.seg_states.append(state)
        if len(row.emitted) < self._sizes.max_new_tokens:
            row.emitted.append(said)

    def _unfinished(self, row: _Row) -> bool:
        last = row.emitted[-1]
        owed = last == self._seg and len(row.seg_states) < row.emitted.count(self._seg)
        return last not in self._stops and (owed or len(row.emitted) < self._sizes.max_new_tokens)

    def _generation(self, row: _Row) -> Generation:
        answer = row.emitted[:-1] if row.emitted[-1] in self._stops else row.emitted
        states = np.stack(row.seg_states) if row.seg_states else np.empty((0, self._sizes.hidden_size), self._dtype)
        return Generation(tuple(answer), states, len(row.draft), row.accepted, row.decode_steps)

    def _run(
        self, chunks: Sequence[npt.NDArray[Any]], starts: Sequence[int], gather: Sequence[Sequence[int]], cache: Sequence[OrtValue]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """Run the graph over one chunk of embeddings per row, written to the cache from position `starts[row]` on.

        Returns:
            For each row, at the positions `gather[row]` of its chunk (the same number for each row): the next tokens' ids [rows, positions]
            and the hidden states [rows, positions, hidden_size].
        """
        batch, sequence = len(chunks), max(map(len, chunks))
        embeds = np.zeros((batch, sequence, self._sizes.hidden_size), self._dtype)
        for padded, chunk in zip(embeds, chunks, strict=True):
            padded[: len(chunk)] = chunk
        first = np.array(starts, np.int64)
        written = max(start + len(chunk) for start, chunk in zip(starts, chunks, strict=True))
        live = min(-(-written // _LIVE_STEP) * _LIVE_STEP, self._sizes.capacity)  # the graph masks what lies beyond a row's positions
        past, present = self._cache_names("past"), self._cache_names("present")
        outputs = self._session.run(
            {
                "inputs_embeds": embeds,
                "position_ids": first[:, None] + np.arange(sequence),
                "write_indices": first,
                "kv_positions": np.arange(live),
                "gather_positions": np.array(gather, np.int64),
                **dict(zip(past, cache, strict=True)),
            },
            into=dict(zip(present, cache, strict=True)),
        )
        return outputs["next_ids"], outputs["hidden_states"]

    def _check(self, state: npt.NDArray[Any]) -> None:
        """Check a state that is used. States after a rejected token may be anything."""
        if not np.isfinite(state).all():
            raise _NotFiniteError(
                f"the language model's states are not finite in {self._precision}; export the bundle with --precision fp32"
            )

    def _cache_names(self, when: str) -> list[str]:
        return [f"{when}_{part}.{layer}" for layer in range(self._sizes.layers) for part in ("key", "value")]

    @contextmanager
    def _cache_of(self, batch: int) -> Iterator[list[OrtValue]]:
        """A cache of `batch` rows, each tensor [batch, kv_heads, capacity, head_dim], for this block alone.

        A later block reuses it, unless this one fails: the cache may then hold numbers that are not finite.
        """
        rows, cache = self._unused.pop() if self._unused else (0, [])
        if rows != batch:
            shape = (batch, self._sizes.kv_heads, self._sizes.capacity, self._sizes.head_dim)
            cache = []  # freed before the new one is allocated
            cache = [self._session.zeros(shape, self._cache_dtype) for _ in range(2 * self._sizes.layers)]
        yield cache
        self._unused.append((batch, cache))
