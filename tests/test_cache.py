"""Block pool and image cache: exact accounting, and nobody's tokens are ever overwritten."""

import hashlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pagemill.cache import BlockPool, ImageCache, OutOfBlocks
from pagemill.errors import ConfigError


def digests(tokens, block_size):
    out, parent = [], b""
    for i in range(len(tokens) // block_size):
        parent = hashlib.blake2b(
            parent + bytes(tokens[i * block_size : (i + 1) * block_size]), digest_size=16
        ).digest()
        out.append(parent)
    return out


class PoolMachine(RuleBasedStateMachine):
    """Sequences grow, share prefixes, fork, are cut and end; a shadow memory holds what a kernel would have written."""

    def __init__(self):
        super().__init__()
        self.block_size = 3
        self.pool = BlockPool(12, self.block_size)
        self.memory = [[None] * self.block_size for _ in range(12)]
        self.tables: list[tuple[list[int], list[int]]] = []  # (blocks, tokens)

    def run_copies(self):
        for source, destination in self.pool.copies:
            self.memory[destination] = list(self.memory[source])
        self.pool.copies = []

    def write(self, table, tokens, start):
        self.run_copies()
        for i in range(start, len(tokens)):
            self.memory[table[i // self.block_size]][i % self.block_size] = tokens[i]
        for i, digest in enumerate(digests(tokens, self.block_size)):
            self.pool.publish(table[i], digest)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def start(self, tokens):
        shared = self.pool.match(digests(tokens, self.block_size))
        missing = self.pool.blocks_for(len(tokens)) - len(shared)
        fits = missing <= self.pool.num_free_besides(shared)
        self.pool.share(shared)
        table = shared
        try:
            table += self.pool.allocate(missing)
        except OutOfBlocks:
            assert not fits
            self.pool.release(shared)
            return
        assert fits
        self.tables.append((table, tokens))
        self.write(table, tokens, (len(table) - missing) * self.block_size)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def grow(self, data, more):
        table, tokens = data.draw(st.sampled_from(self.tables))
        # A shared partial block may not be appended to: only its owner by `truncate` may.
        missing = self.pool.blocks_for(len(tokens) + len(more)) - len(table)
        try:
            table += self.pool.allocate(missing)
        except OutOfBlocks:
            return
        start = len(tokens)
        tokens += more
        self.write(table, tokens, start)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data):
        table, tokens = data.draw(st.sampled_from(self.tables))
        child, kept = list(table), list(tokens)
        self.pool.share(child)
        length = data.draw(st.integers(0, len(tokens)))
        try:
            self.pool.truncate(child, length)
        except OutOfBlocks:
            self.pool.release(child)
            return
        self.run_copies()
        self.tables.append((child, kept[:length]))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def truncate(self, data):
        table, tokens = data.draw(st.sampled_from(self.tables))
        length = data.draw(st.integers(0, len(tokens)))
        try:
            self.pool.truncate(table, length)
        except OutOfBlocks:
            # Nothing is free for the copy: the cut still happened at the block boundary, the caller ends the sequence.
            self.pool.release(table)
            self.tables = [entry for entry in self.tables if entry[0] is not table]
            return
        del tokens[length:]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data):
        i = data.draw(st.integers(0, len(self.tables) - 1))
        table, _ = self.tables.pop(i)
        self.pool.release(table)

    @invariant()
    def accounts(self):
        self.pool.check(table for table, _ in self.tables)

    @invariant()
    def contents(self):
        self.run_copies()
        for table, tokens in self.tables:
            held = [self.memory[table[i // self.block_size]][i % self.block_size] for i in range(len(tokens))]
            assert held == tokens

    @invariant()
    def found_blocks_hold_what_their_digest_says(self):
        known = {
            digest: tokens[i * self.block_size : (i + 1) * self.block_size]
            for _, tokens in self.tables
            for i, digest in enumerate(digests(tokens, self.block_size))
        }
        for digest, expected in known.items():
            for block in self.pool.match([digest]):
                assert self.memory[block] == expected


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_released_content_is_found_until_reused():
    pool = BlockPool(4, 2)
    table = pool.allocate(2)
    keys = [b"a" * 16, b"b" * 16]
    for block, key in zip(table, keys, strict=True):
        pool.publish(block, key)
    pool.release(table)
    assert pool.num_free == 4
    assert pool.match(keys) == table
    pool.allocate(2)  # blocks without content go first
    assert pool.match(keys) == table
    pool.allocate(1)  # the tail of the released sequence goes next
    assert pool.match(keys) == table[:1]


def test_sharing_can_be_switched_off():
    pool = BlockPool(2, 2, prefix_sharing=False)
    (block,) = pool.allocate(1)
    pool.publish(block, b"a" * 16)
    assert pool.match([b"a" * 16]) == []


def test_double_release_is_noticed():
    pool = BlockPool(2, 2)
    table = pool.allocate(1)
    pool.release(table)
    with pytest.raises(AssertionError, match="more often than owned"):
        pool.release(table)


def test_an_empty_pool_is_refused():
    with pytest.raises(ConfigError):
        BlockPool(0, 16)


def test_images_are_shared_and_dropped_with_their_last_holder():
    cache: ImageCache[str] = ImageCache(10)
    assert not cache.hold(b"x", 1)
    assert cache.reserve(b"x", 6, 1)
    assert not cache.reserve(b"y", 5, 2), "6 + 5 exceed 10"
    cache.put(b"x", "embeddings")
    assert cache.hold(b"x", 2)
    cache.release(b"x", 1)
    assert cache.get(b"x") == "embeddings"
    cache.release(b"x", 3)  # holds nothing
    cache.release(b"x", 2)
    assert b"x" not in cache
    assert cache.used_tokens == 0
    assert cache.reserve(b"big", 99, 1), "an image larger than the cache is let in alone"
    assert not cache.reserve(b"y", 1, 2)


def test_an_image_is_never_used_before_it_is_encoded():
    cache: ImageCache[str] = ImageCache(10)
    cache.reserve(b"x", 6, 1)
    with pytest.raises(AssertionError, match="before it was encoded"):
        cache.get(b"x")
    with pytest.raises(AssertionError, match="without a reservation"):
        cache.put(b"y", "embeddings")
