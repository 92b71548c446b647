"""Text data sets of every kind: documents, parts and blocks, and the refusal of broken ones."""

import gzip
import json
import logging
from collections import Counter

import datasets
import huggingface_hub
import pytest

import nio_hf.text.datasets as text_datasets
from nio_hf.errors import DataError
from nio_hf.recipe.settings import DataSettings
from nio_hf.text.datasets import find_text_column, load_text_data, name_undecodable_file
from nio_hf.text.tokenizers import load_tokenizer
from tests.text.documents import blocks_of, joined, words_tokenizer, write_texts

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

BYTES = load_tokenizer("bytes")
TEXTS = [f"document {index}\nends with {index * index}\n" for index in range(40)]


STREAMED = pytest.mark.parametrize("streaming", [False, True])


def load(name="json", block_size=16, *, tokenizer=BYTES, text_column=None, num_proc=None, seed=0, **settings):
    data = DataSettings(dataset_name=name, **settings)
    return load_text_data(data, tokenizer, block_size, text_column=text_column, num_proc=num_proc, seed=seed)


def refused(name="json", **settings):
    """The message of a data set that is refused, in one line."""
    with pytest.raises(DataError) as raised:
        load(name, **settings)
    message = str(raised.value)
    assert "\n" not in message
    return message


def texts(data, part):
    """The documents of a part, told apart by the separator. The last one is left out where it is a rest of its own."""
    tokens = joined(blocks_of(getattr(data, part)))
    documents = bytes(token - 3 if token > 2 else 0 for token in tokens).decode()
    return documents.removesuffix("\0").split("\0")


def json_lines(root):
    return {"name": "json", "data_files": write_texts(root, TEXTS)}


def parquet(root):
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(str(root / "data.parquet"))
    return {"name": "parquet", "data_files": str(root / "data.parquet")}


def text_files(root):
    for index, text in enumerate(TEXTS):
        (root / f"{index}.txt").write_text(text)
    return {"name": "text", "data_files": str(root / "*.txt")}


@STREAMED
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("make", [json_lines, parquet, text_files])
def test_every_format_gives_every_document_in_one_of_the_parts(make, by_name, streaming, tmp_path):
    settings = make(tmp_path)
    data = load(**({"name": str(tmp_path)} if by_name else settings), streaming=streaming, eval_fraction=0.3)
    trained, evaluated = texts(data, "train"), texts(data, "evaluation")
    assert Counter(trained + evaluated) == Counter(TEXTS)
    assert evaluated
    assert not data.is_split
    assert data.tokenizer is BYTES


def test_the_standard_library_is_loaded_by_its_name():
    data = load("stdlib", block_size=256, max_train_samples=20, max_eval_samples=3)
    assert len(texts(data, "train")) + len(texts(data, "evaluation")) in (22, 23)
    assert len(data.train) == -(-data.train.tokens // 256)
    stream = load("stdlib", block_size=256, streaming=True, max_train_samples=5, max_eval_samples=1)
    assert {len(block) for block in blocks_of(stream.train)[:-1]} == {256}


def test_another_tokenizer_gives_its_tokens_and_its_separator(tmp_path):
    tokenizer = words_tokenizer(TEXTS, sep_token="[SEP]")
    data = load(**json_lines(tmp_path), tokenizer=tokenizer, eval_fraction=0.5)
    tokens = joined(blocks_of(data.train))
    assert Counter(tokens)[tokenizer.sep_token_id] == 20
    assert set(tokenizer.decode(tokens).split("[SEP]")[0].split()) & {"document", "ends", "with"}


def test_the_parts_of_a_stream_depend_on_the_texts_alone(tmp_path):
    settings = {"streaming": True, "eval_fraction": 0.5}
    here = load(data_files=write_texts(tmp_path / "here", TEXTS * 2), **settings)
    there = load(data_files=write_texts(tmp_path / "there", TEXTS[::-1]), **settings)
    assert set(texts(here, "evaluation")) == set(texts(there, "evaluation"))
    assert not set(texts(here, "train")) & set(texts(here, "evaluation")), "copies are on one side"


@STREAMED
def test_workers_share_the_documents(streaming, tmp_path):
    files = [write_texts(tmp_path / str(shard), TEXTS[shard::2]) for shard in range(2)]
    data = load(data_files=files, streaming=streaming, eval_fraction=0.3)
    for part in (data.train, data.evaluation):
        seen = [Counter(joined(blocks_of(part, workers))) for workers in (0, 2)]
        assert ((seen[0] - seen[1]) + (seen[1] - seen[0])).total() <= (2 if streaming else 0)
    assert sum(seen[1].values()) > 0
    few = load(data_files=files, streaming=streaming, eval_fraction=0.3, max_train_samples=7, max_eval_samples=3)
    assert (len(texts(few, "train")), len(texts(few, "evaluation"))) == (7, 3)


class Counting:
    """Counts the documents that are tokenised in this process."""

    def __init__(self, monkeypatch):
        self.documents = 0
        encode = text_datasets.encode_texts

        def counted(tokenizer, given):
            self.documents += len(given)
            return encode(tokenizer, given)

        monkeypatch.setattr(text_datasets, "encode_texts", counted)

    def take(self):
        count, self.documents = self.documents, 0
        return count


def word_tokenizer_with_truncation():
    tokenizer = words_tokenizer(TEXTS, eos_token="[EOS]")
    tokenizer.backend_tokenizer.enable_truncation(max_length=4)
    return tokenizer


@pytest.mark.parametrize("make", [lambda: load_tokenizer("bytes"), word_tokenizer_with_truncation])
def test_what_was_tokenised_once_is_not_tokenised_again(make, tmp_path, monkeypatch):
    counting = Counting(monkeypatch)
    settings = {**json_lines(tmp_path), "max_train_samples": 20}
    first = load(**settings, tokenizer=make())
    assert counting.take() == 28
    again = load(**settings, tokenizer=make(), block_size=32)
    assert counting.take() == 0
    assert joined(blocks_of(again.train)) == joined(blocks_of(first.train))
    load(**settings, tokenizer=words_tokenizer(["another"], eos_token="[EOS]"))
    assert counting.take() == 28
    load(**settings, tokenizer=make(), seed=5)
    assert counting.take() == 28


def test_several_processes_give_the_same_tokens(tmp_path, monkeypatch):
    alone = load(data_files=write_texts(tmp_path / "alone", TEXTS))
    counting = Counting(monkeypatch)
    shared = load(data_files=write_texts(tmp_path / "shared", TEXTS), num_proc=2)
    assert counting.take() == 0, "other processes did it"
    assert texts(shared, "train") == texts(alone, "train")


@STREAMED
def test_empty_documents_are_passed_over_and_counted(streaming, tmp_path, caplog):
    file = write_texts(tmp_path, [None, "", *TEXTS, None, ""])
    with caplog.at_level(logging.INFO, logger="nio_hf"):
        data = load(data_files=file, streaming=streaming, eval_fraction=0.5)
    assert Counter(texts(data, "train") + texts(data, "evaluation")) == Counter(TEXTS)
    told = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert sum(int(message.split()[0]) for message in told) == (0 if streaming else 4)
    assert all(message.endswith("part are empty: passed over.") for message in told)


@STREAMED
@pytest.mark.parametrize("part", ["train", "evaluation"])
def test_a_part_of_empty_texts_is_refused(part, streaming, tmp_path):
    other = {"train": "validation", "evaluation": "train"}[part]
    split = {"train": "train", "evaluation": "validation"}[part]
    files = {split: write_texts(tmp_path / "empty", ["", None, ""]), other: write_texts(tmp_path / "full", TEXTS)}
    part = {"train": "training"}.get(part, part)
    assert refused(data_files=files, streaming=streaming) == (
        f"text_column: 'text' holds only empty texts in the {part} part of json, 3 of them. "
        "Name a column with texts, or give documents that have some."
    )


def test_texts_without_a_token_are_refused(tmp_path):
    files = {"train": write_texts(tmp_path / "train", TEXTS), "validation": write_texts(tmp_path / "val", [" ", "\n"])}
    assert refused(data_files=files, tokenizer=words_tokenizer(TEXTS, eos_token="[EOS]")) == (
        "text_column: 2 documents of the evaluation part give no two tokens together. "
        "Give documents whose texts the tokenizer has tokens for."
    )


def test_a_block_size_below_two_is_refused_before_anything_is_loaded():
    message = refused("user/missing", block_size=1)
    assert message == "block_size: 1. Give 2 or more: a token is predicted from those before it."


def test_what_is_no_data_set_is_refused_with_the_setting_to_look_at(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    assert refused("csv") == "dataset_name: 'csv' without data_dir or data_files. Give one of them with it."
    for name in ("user/missing", str(tmp_path / "missing"), str(tmp_path / "empty")):
        message = refused(name)
        assert message.startswith(f"dataset_name: {name!r} cannot be loaded: ")
        assert message.endswith(
            "'stdlib', the name of a data set on the Hub, a local folder, or text, json, csv, parquet."
        )
    for streaming in (False, True):
        folder, file = str(tmp_path / "empty"), str(tmp_path / "missing.txt")
        message = refused("text", data_dir=folder, streaming=streaming)
        assert message.startswith(f"data_dir: {folder!r} cannot be loaded as 'text': ")
        assert message.endswith("Give a folder with text files.")
        message = refused("text", data_files=file, streaming=streaming)
        assert message.startswith(f"data_files: {file!r} cannot be loaded as 'text': ")
        assert message.endswith("Give files that exist and hold texts, relative to where you are.")


@STREAMED
def test_a_column_of_several_is_asked_for(streaming, tmp_path):
    settings = {"data_files": write_texts(tmp_path, TEXTS, "question", answer=TEXTS), "streaming": streaming}
    message = "text_column: 2 columns of texts in json. Name one of its columns: question (string), answer (string)."
    assert refused(**settings) == message
    assert texts(load(**settings, text_column="answer"), "evaluation")[0] in TEXTS


def test_too_few_documents_for_their_parts_are_refused(tmp_path):
    settings = {"data_files": write_texts(tmp_path, TEXTS), "streaming": True}
    for fraction, part in ((1e-6, "evaluation"), (1 - 1e-6, "training")):
        assert refused(**settings, eval_fraction=fraction) == (
            f"eval_fraction: no document is in the {part} part of json. "
            "Give another fraction, more documents, or an eval_split."
        )
    (tmp_path / "book.txt").write_text("a long story\n" * 100)
    message = refused("text", data_files=str(tmp_path / "book.txt"))
    assert message.startswith("eval_fraction: 0.2 of 1 samples of text cannot be set aside (")
    assert message.endswith(
        "Give a part in (0, 1) that leaves a document on either side: a file of plain text is one, or an eval_split."
    )


def latin_1(root, kind):
    """A file of a format with a byte that is not UTF-8, and its offset."""
    head = "\N{SNOWMAN} fine\n" * 200_000 if kind == "text" else ""
    file = root / f"broken.{ {'text': 'txt', 'json': 'jsonl', 'csv': 'csv'}[kind] }"
    before = {"text": head, "json": '{"text": "caf', "csv": "text\ncaf"}[kind].encode()
    file.write_bytes(before + "é".encode("latin-1") + {"text": b" x", "json": b'"}\n', "csv": b"\n"}[kind])
    return file, len(before)


def read_all(name, **settings):
    data = load(name, **settings)
    return texts(data, "train") + texts(data, "evaluation")


@pytest.mark.usefixtures("given_up_files")
@STREAMED
@pytest.mark.parametrize("kind", ["text", "json", "csv"])
def test_a_file_that_is_not_utf_8_is_named_with_the_place(kind, streaming, tmp_path):
    file, offset = latin_1(tmp_path, kind)
    fine = tmp_path / f"a{file.suffix}"
    fine.write_text({"text": "fine", "json": json.dumps({"text": "fine"}), "csv": "text\nfine"}[kind])
    ending = f"{file} is not UTF-8: it cannot be decoded at byte {offset}, counted from 0. Convert the file to UTF-8, "
    ending += "or leave it out."
    given = [
        (kind, {"data_files": [str(file), str(fine)]}, "data_files"),
        (kind, {"data_files": {"train": f"{tmp_path}/*{file.suffix}"}}, "data_files"),
        (kind, {"data_dir": str(tmp_path)}, "data_dir"),
        (str(tmp_path), {}, "dataset_name"),
    ]
    for name, settings, where in given:
        with pytest.raises(DataError) as raised:
            read_all(name, **settings, streaming=streaming, eval_fraction=0.5)
        assert str(raised.value) == f"{where}: {ending}"


@pytest.mark.usefixtures("given_up_files")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_not_utf_8_is_named_in_the_middle_of_a_stream(workers, tmp_path):
    text_files(tmp_path)
    (tmp_path / "z.txt").write_bytes(b"abc\xff")
    files = [str(tmp_path / f"{index}.txt") for index in range(40)]
    data = load("text", data_files={"train": [*files, str(tmp_path / "z.txt")], "validation": files}, streaming=True)
    with pytest.raises(DataError) as raised:
        blocks_of(data.train, workers)
    assert str(raised.value) == (
        f"data_files: {tmp_path / 'z.txt'} is not UTF-8: it cannot be decoded at byte 3, counted from 0. "
        "Convert the file to UTF-8, or leave it out."
    )


def test_an_archive_is_not_taken_for_a_broken_text(tmp_path):
    with gzip.open(tmp_path / "a.txt.gz", "wb") as archive:
        archive.write(b"caf\xe9")
    message = refused("text", data_files=str(tmp_path / "a.txt.gz"))
    assert message.startswith("data_files: ")
    assert "cannot be loaded as 'text': 'utf-8' codec can't decode byte 0xe9 in position 3" in message


def rows_of(**dtypes):
    features = datasets.Features({name: datasets.Value(dtype) for name, dtype in dtypes.items()})
    return datasets.Dataset.from_dict({name: [] for name in dtypes}, features=features)


@pytest.mark.parametrize("dtype", ["string", "large_string"])
def test_the_column_called_text_or_the_only_one_of_texts_is_chosen(dtype):
    assert find_text_column(rows_of(id="int64", body=dtype), None, "notes") == "body"
    assert find_text_column(rows_of(body=dtype, text=dtype), None, "notes") == "text"
    assert find_text_column(rows_of(body=dtype, text=dtype), "body", "notes") == "body"
    assert find_text_column(rows_of(body=dtype, text="int64"), None, "notes") == "body"


SNOWMAN = "\N{SNOWMAN}".encode()


@pytest.mark.parametrize(
    ("content", "offset"),
    [
        (b"\xff", 0),
        (b"fine\xe9 not fine", 4),
        (SNOWMAN * 3 + b"\n" + SNOWMAN + b"\r\n\xff", 15),
        (b"x\n" * 100 + SNOWMAN[:2] + b"\n", 200),
        (b"x" * 100 + SNOWMAN[:2], 100),
    ],
)
def test_the_first_byte_that_cannot_be_decoded_is_found_wherever_it_is(content, offset, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 99 + SNOWMAN)
    file = tmp_path / "b.txt"
    file.write_bytes(content)
    with pytest.raises(UnicodeDecodeError) as of_python:
        content.decode()
    assert of_python.value.start == offset
    settings = DataSettings(dataset_name="text", data_dir=str(tmp_path))
    with pytest.raises(DataError) as raised, name_undecodable_file(settings):
        raise RuntimeError("it failed") from of_python.value
    assert f"{file} is not UTF-8: it cannot be decoded at byte {offset}, counted from 0." in str(raised.value)
    with pytest.raises(OSError, match=r"^the network is gone$"), name_undecodable_file(settings):
        raise OSError("the network is gone")
    file.unlink()
    with pytest.raises(UnicodeDecodeError), name_undecodable_file(settings):
        content.decode()
