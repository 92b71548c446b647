"""Packing loses and repeats no token, whatever the documents, the size of a block and the number of workers."""

import pickle
from collections import Counter

import datasets
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nio_hf.errors import DataError
from nio_hf.text.packing import PackedBlocks, PackedStream
from tests.core.examples import examples
from tests.text.documents import blocks_of, joined, rows_of, stream_of

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

TOKEN = st.integers(0, 2**31 - 1)
DOCUMENTS = st.lists(st.lists(TOKEN, max_size=12), min_size=1, max_size=12)
BLOCK_SIZE = st.integers(2, 20)


def expected_blocks(documents, block_size):
    """The blocks, one token after the other."""
    blocks = []
    for token in joined(documents):
        if not blocks or len(blocks[-1]) == block_size:
            blocks.append([])
        blocks[-1].append(token)
    return [block for block in blocks if len(block) > 1]


@given(DOCUMENTS, BLOCK_SIZE)
@examples(150)
def test_blocks_hold_the_tokens_one_after_the_other(documents, block_size):
    wanted = expected_blocks(documents, block_size)
    packed = PackedBlocks(rows_of(documents), block_size)
    assert [packed[index]["input_ids"] for index in range(len(packed))] == wanted
    assert packed.tokens == len(joined(wanted))
    assert 0 <= len(joined(documents)) - packed.tokens <= 1, "a rest of one token is left out"
    stream = PackedStream(stream_of(documents), block_size, part="train")
    assert [block["input_ids"] for block in stream] == wanted


@given(st.lists(st.lists(TOKEN, max_size=9), min_size=2, max_size=40), BLOCK_SIZE, st.data())
@examples(40)
def test_rows_that_were_selected_and_shuffled_are_packed_in_their_order(documents, block_size, data):
    order = data.draw(st.lists(st.integers(0, len(documents) - 1), min_size=1))
    selected, shuffled = rows_of(documents).select(order), rows_of(documents).shuffle(seed=1)
    assert selected["input_ids"][:] == [documents[index] for index in order]
    for rows in (selected, shuffled):
        assert blocks_of(PackedBlocks(rows, block_size)) == expected_blocks(rows["input_ids"], block_size)


def documents_of(count):
    """Documents of different lengths, whose tokens are all different."""
    lengths = [(7 * index) % 11 for index in range(count)]
    starts = [sum(lengths[:index]) for index in range(count)]
    return [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("block_size", [2, 5, 10_000])
def test_workers_of_a_stream_share_its_documents(block_size, workers):
    documents = documents_of(60)
    assert blocks_of(PackedBlocks(rows_of(documents), block_size), workers) == expected_blocks(documents, block_size)
    shards = [documents[shard::4] for shard in range(4)]
    seen = blocks_of(PackedStream(stream_of(documents, shards=4), block_size, part="train"), workers)
    # Worker w reads the shards w, w + workers, ...
    whose = [shards] if workers == 0 else [shards[worker::workers] for worker in range(workers)]
    wanted = [block for own in whose for block in expected_blocks(joined(own), block_size)]
    assert Counter(map(tuple, seen)) == Counter(map(tuple, wanted))
    lost = Counter(joined(documents)) - Counter(joined(seen))
    assert lost.total() <= max(workers, 1)
    assert Counter(joined(seen)) <= Counter(joined(documents))


def test_tokens_on_the_disk_are_not_copied_into_memory_and_not_pickled(tmp_path):
    count = 200_000
    rows_of([list(range(100))] * (count // 100)).save_to_disk(str(tmp_path))
    rows = datasets.load_from_disk(str(tmp_path))
    before = pa.total_allocated_bytes()
    packed = PackedBlocks(rows, 128)
    assert packed[len(packed) - 1]["input_ids"]
    assert pa.total_allocated_bytes() - before < count
    pickled = pickle.dumps(packed)
    assert len(pickled) < 10_000
    again = pickle.loads(pickled)
    assert (len(again), again.tokens) == (len(packed), packed.tokens)
    assert again[77] == packed[77]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_cannot_be_read_on_is_an_error_of_ours(workers):
    def break_off():
        yield {"input_ids": [1, 2]}
        raise OSError("the\nnetwork is gone.")

    packed = PackedStream(datasets.IterableDataset.from_generator(break_off), 2, part="train")
    with pytest.raises(DataError) as raised:
        blocks_of(packed, workers)
    assert str(raised.value) == (
        "the train stream: cannot be read further: the network is gone. Check the files that it is read from."
    )
