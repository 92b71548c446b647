"""Tokenizers: bytes come back as they were, others are loaded from a folder, and each document gets its separator."""

import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer

from nio_hf.errors import ModelError
from nio_hf.text.tokenizers import encode_texts, is_bytes, load_tokenizer, separator_of
from tests.core.examples import examples
from tests.text.documents import words_tokenizer

SPECIAL = ("<pad>", "</s>", "<unk>", "<mask>")
TEXT = st.lists(st.one_of(st.text(), st.sampled_from(SPECIAL), st.sampled_from([" ", "\n", "\r\n"]))).map("".join)


@given(TEXT)
@examples(200)
def test_bytes_come_back_as_they_were(text):
    tokenizer = load_tokenizer("bytes")
    (tokens,) = encode_texts(tokenizer, [text])
    assert [token - 3 for token in tokens] == list(text.encode())
    assert tokenizer.decode(tokens) == text


def test_the_vocabulary_of_bytes_has_256_of_them_and_four_special_tokens_also_where_it_was_saved(tmp_path):
    load_tokenizer("bytes").save_pretrained(tmp_path)
    for tokenizer in (load_tokenizer("bytes"), load_tokenizer(str(tmp_path))):
        assert is_bytes(tokenizer)
        assert (len(tokenizer), tokenizer.vocab_size) == (260, 256)
        assert tokenizer.get_vocab() == load_tokenizer("bytes").get_vocab()
        assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2, 259]
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (0, 1, 259)
        (tokens,) = encode_texts(tokenizer, [bytes(range(128)).decode()])
        assert 259 not in tokens


def test_a_folder_with_a_tokenizer_is_loaded_and_a_long_text_is_no_warning(tmp_path, caplog):
    words_tokenizer(["red green", "blue"], eos_token="[EOS]").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert not is_bytes(tokenizer)
    tokenizer.model_max_length = 1
    assert encode_texts(tokenizer, ["blue red", ""]) == [tokenizer.convert_tokens_to_ids(["blue", "red"]), []]
    assert not caplog.text


def test_revision_and_trust_reach_the_loader(monkeypatch):
    asked = []

    def load(name, **options):
        asked.append((name, options))
        return ByT5Tokenizer()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    load_tokenizer("user/name", revision="v2", trust_remote_code=True)
    assert asked == [("user/name", {"revision": "v2", "trust_remote_code": True})]


def test_a_tokenizer_that_cannot_be_loaded_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text("{")
    (tmp_path / "damaged" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for name in ("user/missing", str(tmp_path), str(tmp_path / "damaged")):
        with pytest.raises(ModelError) as raised:
            load_tokenizer(name)
        message = str(raised.value)
        assert message.startswith(f"tokenizer: {name!r} cannot be loaded: ")
        assert message.endswith(". Give 'bytes', a folder with a tokenizer, or its name on the Hub.")
        assert "\n" not in message


def test_the_separator_is_the_end_of_a_sequence_else_what_stands_between_two_and_has_to_be_there():
    assert separator_of(load_tokenizer("bytes")) == 1
    both = words_tokenizer(["a"], sep_token="[SEP]", eos_token="[EOS]")
    assert separator_of(both) == both.convert_tokens_to_ids("[EOS]")
    one = words_tokenizer(["a"], pad_token="[PAD]", sep_token="[SEP]")
    assert separator_of(one) == one.convert_tokens_to_ids("[SEP]") == 2
    one.eos_token = "[UNK]"
    assert separator_of(one) == 0
    with pytest.raises(ModelError) as raised:
        separator_of(words_tokenizer(["a"]))
    assert str(raised.value) == (
        f"tokenizer: {type(one).__name__} has neither an eos_token nor a sep_token. "
        "Add one to the tokenizer: a token has to stand behind each document."
    )
