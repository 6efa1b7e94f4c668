from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from vessel_rt.errors import BundleError, VesselError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.model.prompt import EmbedTokens, PromptTokenizer

QUESTIONS = ["Please segment vessel in this image.", "Q", "  two  blanks, ümläute, 导管 ", "ends in a line break\n", "a [SEG] b"]


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_pieces_give_the_ids_of_the_whole(standin: Bundle, question: str) -> None:
    before, after = PromptTokenizer(standin).encode(question)
    whole = f"<|im_start|>user\n<img>{'<IMG_CONTEXT>' * 12}</img>\n{question}<|im_end|>\n<|im_start|>assistant\n"
    expected = Tokenizer.from_file(str(standin.folder / "tokenizer.json")).encode(whole, add_special_tokens=False).ids
    assert before + [standin.prompt.image_token_id] * 12 + after == expected


@pytest.mark.parametrize("question", ["", " \n", "<image>\nPlease segment vessel.", "what is <IMG_CONTEXT>?"])
def test_questions_that_cannot_be_asked(standin: Bundle, question: str) -> None:
    with pytest.raises(VesselError, match="question"):
        PromptTokenizer(standin).encode(question)


def test_decode_shows_special_tokens_and_strips(standin: Bundle) -> None:
    tokenizer = Tokenizer.from_file(str(standin.folder / "tokenizer.json"))
    assert PromptTokenizer(standin).decode(tokenizer.encode(" Sure, [SEG].\n").ids) == "Sure, [SEG]."
    assert PromptTokenizer(standin).decode([]) == ""


def test_rows_are_those_of_the_table(standin: Bundle) -> None:
    table = load_file(standin.folder / standin.embed_tokens.file)[standin.embed_tokens.name]
    with EmbedTokens(standin) as embed_tokens:
        for ids in ([5, 0, 5, len(table) - 1], [7], [5, 7]):
            rows = embed_tokens.rows(ids)
            assert rows.dtype == table.dtype
            np.testing.assert_array_equal(rows, table[ids])


def test_files_that_are_not_what_they_should_be(standin: Bundle, tmp_path: Path) -> None:
    bundle = msgspec.structs.replace(standin, folder=tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        PromptTokenizer(bundle)
    with pytest.raises(BundleError, match=r"embed_tokens\.safetensors"):
        EmbedTokens(bundle)
