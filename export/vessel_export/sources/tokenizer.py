"""The bundle's tokenizer.json: the base model's tokenizer with the fine-tune's tokens, in one file for the tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from vessel_export.errors import BaseModelError
from vessel_rt.errors import first_line

__all__ = ["extend_tokenizer"]


def extend_tokenizer(folder: Path, vocabulary: int, new_tokens: Sequence[str]) -> Tokenizer:
    """The tokenizer in `folder`, cut to the base model's `vocabulary`, with `new_tokens` at the next ids.

    The transformers-native layout of InternVL3 adds a `<video>` token that the original layout, which Sa2VA trains on, does not have.
    Added tokens beyond the embedding's rows are therefore left out.

    Raises:
        BaseModelError: the tokenizer cannot be read, or does not fill the vocabulary.
    """
    try:
        document = json.loads(_load(folder).to_str())
    except Exception as e:  # both libraries raise bare Exceptions if the files are not a tokenizer
        raise BaseModelError(f"{folder}: its tokenizer cannot be read ({first_line(e)}); download the whole base model again") from e
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < vocabulary]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    if tokenizer.get_vocab_size() != vocabulary:
        raise BaseModelError(
            f"{folder}: its tokenizer has {tokenizer.get_vocab_size()} tokens, config.json {vocabulary}; download the base model again"
        )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new_tokens])
    ids = [tokenizer.token_to_id(token) for token in new_tokens]
    if ids != list(range(vocabulary, vocabulary + len(new_tokens))):
        raise BaseModelError(
            f"{folder}: its tokenizer already has one of {', '.join(new_tokens)}; give --base the model before fine-tuning"
        )
    return tokenizer


def _load(folder: Path) -> Tokenizer:
    """The native layout has tokenizer.json. The original one has vocab.json and merges.txt, which transformers converts."""
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8-sig"))
    from transformers import Qwen2Tokenizer

    loaded: Tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    return loaded
