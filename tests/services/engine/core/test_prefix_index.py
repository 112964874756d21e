"""The prefix index against the simplest thing that keeps its promises: a list, searched from end to end."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.core import prefix_index
from services.engine.core.block import TOKEN_TYPECODE, Block, chain_hash, common_head
from services.engine.core.prefix_index import PrefixIndex

BLOCK_SIZE, MIN_HEAD, NUM_BLOCKS, SCANNED = 4, 2, 12, 3
PARENTS = (b"a" * 16, b"b" * 16)

texts = st.lists(st.integers(0, 1), min_size=1, max_size=BLOCK_SIZE)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, NUM_BLOCKS - 1), st.sampled_from(PARENTS), texts),
        st.tuples(st.just("remove"), st.integers(0, NUM_BLOCKS - 1)),
        st.tuples(st.just("find"), st.sampled_from(PARENTS), texts),
    ),
    max_size=60,
)


def write(index, listed, block, parent, text):
    """Let a block hold more, as the block manager does: listed when it can be found, and again when full."""
    if block.token_ids and block.parent_hash != parent:
        return
    room = BLOCK_SIZE - block.num_filled
    block.token_ids.extend(text[:room])
    if not room or (block.num_filled < BLOCK_SIZE and (block.is_indexed or block.num_filled < MIN_HEAD)):
        return
    block.parent_hash = parent
    if block.num_filled == BLOCK_SIZE:
        block.chain_hash = chain_hash(parent, block.token_ids)
        if any(other is not block and other.chain_hash == block.chain_hash for other in listed):
            listed[:] = [other for other in listed if other is not block]
            index.add(block)
            return
    if block not in listed:
        listed.append(block)
    index.add(block)


def longest(listed, parent, tokens):
    """What `find_head` is to find: the newest of the longest among the newest that begin alike."""
    alike = [b for b in listed if b.parent_hash == parent and b.token_ids[:MIN_HEAD] == tokens[:MIN_HEAD]]
    newest = alike[: -SCANNED - 1 : -1]
    return max(newest, key=lambda b: common_head(b.token_ids, tokens), default=None)


@settings(max_examples=400, deadline=None)
@given(actions)
def test_it_finds_what_a_search_from_end_to_end_finds(commands):
    before, prefix_index.MAX_HEADS_SCANNED = prefix_index.MAX_HEADS_SCANNED, SCANNED
    try:
        index, listed = PrefixIndex(BLOCK_SIZE, MIN_HEAD), []
        blocks = [Block(i) for i in range(NUM_BLOCKS)]
        for name, *arguments in commands:
            if name == "write":
                i, parent, text = arguments
                write(index, listed, blocks[i], parent, text)
            elif name == "remove":
                block = blocks[arguments[0]]
                if block.is_indexed:
                    index.remove(block)
                    listed.remove(block)
                blocks[arguments[0]] = Block(arguments[0])
            else:
                parent, tokens = arguments[0], array(TOKEN_TYPECODE, arguments[1])
                found = index.find_head(parent, tokens)
                expected = longest(listed, parent, tokens) if len(tokens) >= MIN_HEAD else None
                assert (found and found.block) is expected
            assert index.blocks() == {block.index for block in listed}
            assert all(block.is_indexed == (block in listed) for block in blocks)
    finally:
        prefix_index.MAX_HEADS_SCANNED = before
