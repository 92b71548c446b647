"""Documents and tokenisers, made by the tests."""

import json

import datasets
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from nio_hf.text.packing import TOKENS


def rows_of(documents):
    features = datasets.Features({TOKENS: datasets.List(datasets.Value("int32"))})
    return datasets.Dataset.from_dict({TOKENS: [list(document) for document in documents]}, features=features)


def stream_of(documents, shards=1):
    """A stream of token lists, of unknown length."""
    parts = [[list(document) for document in documents[shard::shards]] for shard in range(shards)]
    return datasets.IterableDataset.from_generator(_rows, gen_kwargs={"parts": parts})


def _rows(parts):
    for part in parts:
        for document in part:
            yield {TOKENS: document}


def blocks_of(packed, workers=0):
    loader = DataLoader(packed, batch_size=None, num_workers=workers)
    return [block[TOKENS] for block in loader]


def joined(lists):
    return [number for one in lists for number in one]


def write_texts(root, texts, column="text", **others):
    """A file of JSON lines with a column of texts."""
    columns = {column: texts, **others}
    lines = [json.dumps(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
    root.mkdir(parents=True, exist_ok=True)
    (root / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(root / "data.jsonl")


def words_tokenizer(texts, **special):
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["[UNK]", *special.values()]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)
