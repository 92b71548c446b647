"""Tokenisers: bytes, which need no download, or the tokeniser of a published model."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from nio_hf.errors import ModelError, Problem, one_line

BYTES = "bytes"
"""Name of the tokeniser whose tokens are bytes."""


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokeniser.

    Args:
        name: "bytes", a name on the Hub, or a folder with a tokeniser. The tokeniser of bytes has a vocabulary of 260:
            the 256 bytes, `<pad>`, `</s>`, `<unk>` and `<mask>`. `len(tokenizer)` counts all of them, `vocab_size` the
            bytes alone.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Whether Python code of the tokeniser may run: only where you trust its author.

    Raises:
        ModelError: Tokeniser that cannot be loaded.
    """
    if name == BYTES:
        return ByT5Tokenizer(extra_ids=0, mask_token="<mask>")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # readers of its many formats raise every kind
        fix = f"Give {BYTES!r}, a folder with a tokenizer, or its name on the Hub"
        raise ModelError(Problem("tokenizer", f"{name!r} cannot be loaded: {one_line(error)}", fix)) from error
    return tokenizer


def is_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokens of a text are its bytes in UTF-8."""
    return isinstance(tokenizer, ByT5Tokenizer)


def separator_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that stands behind each document: the end of a sequence, else the separator of two.

    Raises:
        ModelError: Tokeniser that has neither.
    """
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return int(token)
    found = f"{tokenizer.name_or_path or type(tokenizer).__name__} has neither an eos_token nor a sep_token"
    fix = "Add one to the tokenizer: a token has to stand behind each document"
    raise ModelError(Problem("tokenizer", found, fix))


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokens of texts, without special tokens around them.

    A byte stays itself, also in a text that spells a special token. Other tokenisers treat special tokens in a text as
    they are configured.
    """
    options: dict[str, Any] = {"split_special_tokens": True} if is_bytes(tokenizer) else {}
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)
    tokens: list[list[int]] = encoded["input_ids"]
    return tokens
