from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto
from tokenizers import Tokenizer

from tests.support.standin import build_standin
from vessel_rt.device.providers import Device
from vessel_rt.device.session import Session
from vessel_rt.errors import ImageError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.profiles import MOST_KEPT
from vessel_rt.model.decoding import Generation, LanguageModel
from vessel_rt.model.prompt import EmbedTokens

# The length of a matrix decides the order of its sums: float32 rounding, some 1e-7 of values about 1, through two layers.
ROUNDING = 2e-6


@contextmanager
def language_model(bundle: Bundle, chunk: int | None = None) -> Iterator[LanguageModel]:
    with EmbedTokens(bundle) as embed_tokens, Session(bundle.folder / "language_model.onnx", Device("cpu"), 1) as session:
        yield LanguageModel(session, bundle, embed_tokens, chunk)


def prompt(bundle: Bundle, text: str) -> np.ndarray:
    """Embeddings of a prompt that ends as a real one does, with a line break."""
    ids = Tokenizer.from_file(str(bundle.folder / "tokenizer.json")).encode(text + "\n").ids
    with EmbedTokens(bundle) as embed_tokens:
        return embed_tokens.rows(ids)


def text_of(bundle: Bundle, ids: tuple[int, ...]) -> str:
    return Tokenizer.from_file(str(bundle.folder / "tokenizer.json")).decode(list(ids), skip_special_tokens=False)


def states_by_one_pass(bundle: Bundle, embeds: np.ndarray, positions: list[int]) -> np.ndarray:
    """The hidden states of a whole sequence at `positions`, from one run with an empty cache."""
    sizes, length = bundle.language_model, len(embeds)
    session = onnxruntime.InferenceSession(bundle.folder / "language_model.onnx", providers=["CPUExecutionProvider"])
    empty = np.zeros((1, sizes.kv_heads, sizes.capacity, sizes.head_dim), np.float32)
    feeds = {
        "inputs_embeds": embeds[None],
        "position_ids": np.arange(length)[None],
        "write_indices": np.array([0]),
        "kv_positions": np.arange(length),
        "gather_positions": np.array([positions]),
    }
    cache = {value.name: empty for value in session.get_inputs() if value.name.startswith("past")}
    states: np.ndarray = session.run(["hidden_states"], {**feeds, **cache})[0][0]
    return states


def plain_and_drafted(bundle: Bundle, question: str, draft: list[int]) -> tuple[Generation, Generation]:
    """The answer without and with a draft, which must be one."""
    start = prompt(bundle, question)
    with language_model(bundle) as model:
        [plain] = model.generate([start])
        [drafted] = model.generate([start], [draft])
    assert drafted.token_ids == plain.token_ids
    np.testing.assert_allclose(drafted.seg_states, plain.seg_states, rtol=0, atol=ROUNDING)
    return plain, drafted


def test_answers_until_the_stop_token(standin: Bundle) -> None:
    with language_model(standin) as model:
        [generation] = model.generate([prompt(standin, "Where?")])
    assert text_of(standin, generation.token_ids) == "Mask [SEG]."
    assert generation.decode_steps == len(generation.token_ids)  # each token is consumed once, the stop token never
    assert generation.seg_states.shape == (1, standin.language_model.hidden_size)


def test_the_seg_state_is_where_seg_is_consumed(standin: Bundle) -> None:
    start = prompt(standin, "Where are the vessels?")
    with language_model(standin) as model, EmbedTokens(standin) as embed_tokens:
        [generation] = model.generate([start])
        answer = embed_tokens.rows(generation.token_ids)
    consumed = len(start) + generation.token_ids.index(standin.prompt.seg_token_id)
    expected = states_by_one_pass(standin, np.concatenate([start, answer]), [consumed])
    np.testing.assert_allclose(generation.seg_states, expected, rtol=0, atol=ROUNDING)


def test_a_padded_batch_equals_single_runs(standin: Bundle) -> None:
    prompts = [prompt(standin, text) for text in ("A", "a much longer question than the others are", "Where is the catheter?")]
    with language_model(standin) as model:
        together = model.generate(prompts)
        alone = [model.generate([one])[0] for one in prompts]
    for batched, single in zip(together, alone, strict=True):
        assert batched.token_ids == single.token_ids
        assert batched.decode_steps == single.decode_steps
        np.testing.assert_allclose(batched.seg_states, single.seg_states, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("chunk", [1, 3, 7, 8, 100])
@pytest.mark.parametrize("draft", ["", "Mask [SEG]", "Mask [SEG]."])
def test_a_prompt_in_chunks_is_answered_as_one_in_a_run(standin: Bundle, draft: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    start = prompt(standin, "a much longer question than the others are")
    ids = Tokenizer.from_file(str(standin.folder / "tokenizer.json")).encode(draft).ids
    with language_model(standin) as whole, language_model(standin, chunk) as chunked:
        [expected] = whole.generate([start], [ids])
        run, lengths = chunked._session.run, []
        monkeypatch.setattr(
            chunked._session, "run", lambda feeds, **more: lengths.append(feeds["inputs_embeds"].shape[1]) or run(feeds, **more)
        )
        [found] = chunked.generate([start], [ids])
    assert (found.token_ids, found.accepted, found.decode_steps) == (expected.token_ids, expected.accepted, expected.decode_steps)
    np.testing.assert_allclose(found.seg_states, expected.seg_states, rtol=0, atol=ROUNDING)
    assert max(lengths) <= chunk + 1 + len(ids)
    assert sum(lengths) == len(start) + len(ids) + found.decode_steps


def test_rows_that_finish_early_wait_for_the_others(tmp_path: Path) -> None:
    """One prompt ends in the stop token's predecessor and is answered at once; the other needs every step."""
    bundle = build_standin(tmp_path / "bundle")
    short, long = prompt(bundle, "x")[:-1], prompt(bundle, "y")
    with EmbedTokens(bundle) as embed_tokens:
        dot = Tokenizer.from_file(str(bundle.folder / "tokenizer.json")).encode(".").ids
        short = np.concatenate([short, embed_tokens.rows(dot)])
    with language_model(bundle) as model:
        first, second = model.generate([short, long])
        assert (first.token_ids, first.decode_steps, len(first.seg_states)) == ((), 0, 0)
        [alone] = model.generate([long])
    assert second.token_ids == alone.token_ids
    np.testing.assert_allclose(second.seg_states, alone.seg_states, rtol=0, atol=ROUNDING)


def test_earlier_prompts_leave_no_trace(standin: Bundle) -> None:
    with language_model(standin) as model:
        [fresh] = model.generate([prompt(standin, "Where?")])
        model.generate([prompt(standin, "something very much longer " * 4)])
        [again] = model.generate([prompt(standin, "Where?")])
    np.testing.assert_array_equal(again.seg_states, fresh.seg_states)


@pytest.mark.parametrize(
    ("max_new_tokens", "answer", "decode_steps"),
    [
        (1, "[SEG]", 1),  # the budget ends with [SEG]: one more run consumes it
        (2, "[SEG],", 1),
        (3, "[SEG],[SEG]", 3),
        (6, "[SEG],[SEG],[SEG],", 5),
    ],
)
def test_every_seg_within_the_budget_has_its_state(tmp_path: Path, max_new_tokens: int, answer: str, decode_steps: int) -> None:
    bundle = build_standin(tmp_path / "bundle", answer="[SEG],[SEG]", max_new_tokens=max_new_tokens)  # goes round and round
    start = prompt(bundle, "All?")
    with language_model(bundle) as model, EmbedTokens(bundle) as embed_tokens:
        [generation] = model.generate([start])
        embeds = np.concatenate([start, embed_tokens.rows(generation.token_ids)])
    assert text_of(bundle, generation.token_ids) == answer
    assert generation.decode_steps == decode_steps
    consumed = [len(start) + i for i, token in enumerate(generation.token_ids) if token == bundle.prompt.seg_token_id]
    np.testing.assert_allclose(generation.seg_states, states_by_one_pass(bundle, embeds, consumed), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("draft", "accepted"),
    [
        ("", 0),
        ("Mask [SEG].", 7),
        ("Mask", 4),  # the answer goes on
        ("Mask [SEG]. And", 7),  # and here the draft does
        ("Mask [SEG]. And many more words than are tried at once", 7),
        ("Mask [SEG][SEG]", 6),  # two masks drafted, one said
        ("It is [SEG].", 0),
        ("Musk [SEG].", 1),
        ("<|im_end|>", 0),
        ("Mask [SEG].<|im_end|>Mask", 7),  # what stands behind a stop token was never said
    ],
)
def test_a_draft_never_changes_the_answer(standin: Bundle, draft: str, accepted: int) -> None:
    ids = Tokenizer.from_file(str(standin.folder / "tokenizer.json")).encode(draft).ids
    plain, drafted = plain_and_drafted(standin, "Where?", ids)
    assert (drafted.drafted, drafted.accepted) == (min(len(ids), MOST_KEPT - 1), accepted)
    assert drafted.decode_steps == len(plain.token_ids) - accepted


@pytest.mark.parametrize("max_new_tokens", range(1, 9))
@pytest.mark.parametrize("draft", ["[SEG]", "[SEG],", "[SEG],[SEG]", "[SEG],[SEG],[SEG],[SEG],[SEG],[SEG]", "[SEG],Mask"])
def test_a_draft_never_changes_what_a_budget_cuts_short(tmp_path: Path, max_new_tokens: int, draft: str) -> None:
    bundle = build_standin(tmp_path / "bundle", answer="[SEG],[SEG]", max_new_tokens=max_new_tokens)  # goes round and round
    plain_and_drafted(bundle, "All?", Tokenizer.from_file(str(bundle.folder / "tokenizer.json")).encode(draft).ids)


def test_drafts_of_different_lengths_share_a_batch(standin: Bundle) -> None:
    prompts = [prompt(standin, text) for text in ("A", "a much longer question than the others are", "Where is the catheter?")]
    tokenizer = Tokenizer.from_file(str(standin.folder / "tokenizer.json"))
    drafts = [tokenizer.encode(text).ids for text in ("Mask [SEG].", "", "Mask it")]
    with language_model(standin) as model:
        together = model.generate(prompts, drafts)
        alone = [model.generate([one])[0] for one in prompts]
    for drafted, single in zip(together, alone, strict=True):
        assert drafted.token_ids == single.token_ids
        np.testing.assert_allclose(drafted.seg_states, single.seg_states, rtol=0, atol=ROUNDING)


def test_a_draft_whose_numbers_overflow_is_dropped(standin: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    start = prompt(standin, "Where?")
    rows = EmbedTokens.rows
    with language_model(standin) as model:
        [plain] = model.generate([start])
        monkeypatch.setattr(EmbedTokens, "rows", lambda self, ids: rows(self, ids) * (np.nan if list(ids) == [7, 8] else 1))
        [drafted] = model.generate([start], [[7, 8]])
    assert drafted.token_ids == plain.token_ids
    np.testing.assert_allclose(drafted.seg_states, plain.seg_states, rtol=0, atol=ROUNDING)


def test_an_answer_without_seg_has_no_states(tmp_path: Path) -> None:
    bundle = build_standin(tmp_path / "bundle", answer="None.")
    with language_model(bundle) as model:
        [generation] = model.generate([prompt(bundle, "Where?")])
    assert text_of(bundle, generation.token_ids) == "None."
    assert generation.seg_states.shape == (0, bundle.language_model.hidden_size)


def test_the_longest_prompt_that_fits_and_one_token_more(tmp_path: Path) -> None:
    bundle = build_standin(tmp_path / "bundle", capacity=40, max_new_tokens=8)
    with language_model(bundle) as model:
        [generation] = model.generate([prompt(bundle, "x" * 31)])
        assert text_of(bundle, generation.token_ids) == "Mask [SEG]."
        with pytest.raises(ImageError, match=r"33 tokens, but this bundle takes 32 \(40 less 8"):
            model.generate([prompt(bundle, "x" * 32)])


def test_states_that_are_not_finite_are_an_error_and_do_not_spread(standin: Bundle) -> None:
    good = prompt(standin, "Where?")
    with language_model(standin) as model:
        [before] = model.generate([good])
        with pytest.raises(ImageError, match=r"not finite in fp32; export the bundle with --precision fp32"):
            model.generate([np.full((60, standin.language_model.hidden_size), np.nan, np.float32)])
        [after] = model.generate([good])
    np.testing.assert_array_equal(after.seg_states, before.seg_states)


def test_the_cache_has_the_graphs_type_and_embeddings_are_given_the_graphs(standin: Bundle, tmp_path: Path) -> None:
    """As in a bf16 bundle: float32 at the graph's ends, bfloat16 in the cache, and float16 in the table of embeddings."""
    bundle = build_standin(tmp_path / "bundle", cache=TensorProto.BFLOAT16)
    start = prompt(standin, "Where are the vessels?")
    with language_model(standin) as exact, language_model(bundle) as rounded:
        [expected], [found] = exact.generate([start]), rounded.generate([start.astype(np.float16)])
    assert found.token_ids == expected.token_ids
    assert found.seg_states.dtype == np.float32
    np.testing.assert_allclose(found.seg_states, expected.seg_states, rtol=0, atol=2**-8)  # bfloat16's rounding of values about 1
    assert not np.array_equal(found.seg_states, expected.seg_states)


def test_keys_come_in_multiples_of_eight_up_to_the_capacity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's fused kernel needs them so; the surplus is masked."""
    bundle = build_standin(tmp_path / "bundle", capacity=30)
    keys: list[int] = []
    run = Session.run

    def noted(self: Session, feeds: Any, **more: Any) -> Any:
        keys.append(len(feeds["kv_positions"]))
        return run(self, feeds, **more)

    monkeypatch.setattr(Session, "run", noted)
    start = prompt(bundle, "x" * 12)
    with language_model(bundle) as model:
        [generation] = model.generate([start])
    assert len(start) == 13
    assert keys == [16, 16, 16, 16, 24, 24, 24, 24]
    with language_model(bundle) as model:
        model.generate([prompt(bundle, "x" * 13)])
    assert text_of(bundle, generation.token_ids) == "Mask [SEG]."
    assert max(keys) == 24
