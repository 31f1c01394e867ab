"""The paged KV cache's blocks, and the image embeddings in flight. Nothing else touches block ids.

A block holds the keys and values of `block_size` consecutive tokens of every layer. A block is free, or owned by
one or more sequences (reference count). A full block can be found again by its content digest, also after it was
released and until it is really reused: that is prefix sharing. The digest of a block chains over its parent's and covers its
token ids and, for image placeholders, the image's 128-bit content digest and the offset in it, because all
placeholders share one token id.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from pagemill.errors import ConfigError, PagemillError

T = TypeVar("T")


class OutOfBlocks(PagemillError):
    """The pool cannot give as many blocks as were asked for; the scheduler preempts and tries again."""


class BlockPool:
    """Reference-counted blocks with content lookup.

    Invariant (checked by `check`): a block is in the free list exactly when its reference count is zero.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_sharing: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(
                f"the KV cache needs at least one block of one token, got {num_blocks} x {block_size}"
            )
        self.num_blocks, self.block_size, self.prefix_sharing = num_blocks, block_size, prefix_sharing
        self._references = [0] * num_blocks
        self._digest: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        # Reused from the front: blocks without content first, then the least recently released.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.copies: list[tuple[int, int]] = []
        """(source, destination) block copies that must run before the next step writes; the runner takes them."""

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def num_free_besides(self, blocks: Sequence[int]) -> int:
        """Blocks that could still be allocated after `share(blocks)`."""
        return len(self._free) - sum(self._references[block] == 0 for block in blocks)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, forgetting what they held. Raises `OutOfBlocks` and takes none if too few."""
        if count > len(self._free):
            raise OutOfBlocks(f"{count} KV blocks wanted, {len(self._free)} of {self.num_blocks} free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            self._references[block] = 1
        return blocks

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest known prefix of `digests`, without taking them."""
        found: list[int] = []
        if self.prefix_sharing:
            for digest in digests:
                block = self._by_digest.get(digest)
                if block is None:
                    break
                found.append(block)
        return found

    def share(self, blocks: Sequence[int]) -> None:
        """Add an owner to each of `blocks`, taking it from the free list if it lay there."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one owner of each of `blocks`; the last of a sequence's blocks is reused first."""
        for block in reversed(blocks):
            count = self._references[block] - 1
            if count < 0:
                raise AssertionError(f"block {block} released more often than owned")
            self._references[block] = count
            if count == 0:
                self._free[block] = None
                if self._digest[block] is None:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full, computed block findable by its content. The first block of a content stays the one found."""
        if self.prefix_sharing and self._digest[block] is None and digest not in self._by_digest:
            self._digest[block] = digest
            self._by_digest[digest] = block

    def truncate(self, table: list[int], num_tokens: int) -> None:
        """Shorten `table` to hold `num_tokens` tokens, in place; later tokens may then be overwritten.

        A last block that is only partly kept becomes this table's own: if others share it, it is copied (see
        `copies`), else its content digest is withdrawn. Raises `OutOfBlocks` if the copy finds no block.
        """
        keep = self.blocks_for(num_tokens)
        if keep > len(table):
            raise AssertionError(f"cannot truncate {len(table)} blocks to {num_tokens} tokens")
        self.release(table[keep:])
        del table[keep:]
        if num_tokens % self.block_size and table:
            last = table[-1]
            if self._references[last] > 1:
                (own,) = self.allocate(1)
                self.copies.append((last, own))
                self.release([last])
                table[-1] = own
            else:
                self._forget(last)

    def _forget(self, block: int) -> None:
        digest = self._digest[block]
        if digest is not None:
            del self._by_digest[digest]
            self._digest[block] = None

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise `AssertionError` unless `tables` explain every reference count and all else is free."""
        counts = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counts[block] += 1
        if counts != self._references:
            wrong = [b for b in range(self.num_blocks) if counts[b] != self._references[b]]
            raise AssertionError(
                f"blocks {wrong[:8]}: owned {[counts[b] for b in wrong[:8]]} times, "
                f"counted {[self._references[b] for b in wrong[:8]]}"
            )
        if set(self._free) != {b for b in range(self.num_blocks) if counts[b] == 0}:
            raise AssertionError(
                f"{len(self._free)} blocks in the free list, {counts.count(0)} without owner"
            )
        for digest, block in self._by_digest.items():
            if self._digest[block] != digest:
                raise AssertionError(f"block {block} is found by a digest that is not its own")


class ImageCache(Generic[T]):
    """Image embeddings between their encoding and the end of their prefill.

    Units are tokens (one embedding a token); entries are keyed by image content, so that two requests for the same
    image share one encoding. An entry lives while a sequence holds it and is dropped with its last holder.
    `T` is what the runner stores for an image.
    """

    def __init__(self, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.used_tokens = 0
        self._entries: dict[bytes, T | None] = {}
        self._holders: dict[bytes, set[int]] = {}
        self._tokens: dict[bytes, int] = {}

    def hold(self, key: bytes, holder: int) -> bool:
        """Hold an image that is there or on its way for sequence `holder`; False if it is neither."""
        holders = self._holders.get(key)
        if holders is None:
            return False
        holders.add(holder)
        return True

    def reserve(self, key: bytes, num_tokens: int, holder: int) -> bool:
        """Reserve space for an image about to be encoded, held by sequence `holder`; False if there is none.

        One image larger than the whole cache is let in when it is alone.
        """
        if self.used_tokens and self.used_tokens + num_tokens > self.capacity_tokens:
            return False
        self._entries[key], self._holders[key], self._tokens[key] = None, {holder}, num_tokens
        self.used_tokens += num_tokens
        return True

    def put(self, key: bytes, embeddings: T) -> None:
        """Store the embeddings of an image that `reserve` made space for."""
        if key not in self._holders:
            raise AssertionError("image stored without a reservation")
        self._entries[key] = embeddings

    def get(self, key: bytes) -> T:
        """Return the stored embeddings of an image that is held."""
        embeddings = self._entries[key]
        if embeddings is None:
            raise AssertionError("image used before it was encoded")
        return embeddings

    def release(self, key: bytes, holder: int) -> None:
        """Sequence `holder` no longer needs the image; a no-op if it does not hold it."""
        holders = self._holders.get(key)
        if holders is None or holder not in holders:
            return
        holders.remove(holder)
        if not holders:
            del self._entries[key], self._holders[key]
            self.used_tokens -= self._tokens.pop(key)

    def __contains__(self, key: bytes) -> bool:
        return key in self._holders

    def __len__(self) -> int:
        return len(self._holders)
