"""Where keys and values lie: a fixed number of blocks, lent to sequences and shared by those that begin alike.

A block whose tokens were all read gets a name, made of everything that decides its content: who asks, which adapter,
and every token up to its end. Whoever comes to the same name takes the block instead of computing it again. A named
block that nobody uses any more stays until its room is needed, the least recently used first. Pure; no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections import OrderedDict
from collections.abc import Sequence


class Table:
    """The blocks of one sequence, in order, reserved for its prompt and the longest answer it may get."""

    def __init__(self, blocks: list[int], names: list[bytes]) -> None:
        self.blocks = blocks
        self.names = names
        """Of the prompt's whole blocks. The last prompt token is in none of them: its logits are wanted anew."""
        self.num_named = 0


class BlockPool:
    """Lends blocks of `block_tokens` tokens."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free = list(reversed(range(num_blocks)))
        self._users = [0] * num_blocks
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Named and in nobody's use, the least recently used first."""

    @property
    def num_tokens(self) -> int:
        """Tokens that there is room for, of all sequences together."""
        return self.num_blocks * self.block_tokens

    @property
    def num_used(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - len(self._free) - self.num_kept

    @property
    def num_kept(self) -> int:
        """Blocks that nobody holds, and whose content is known."""
        return len(self._idle)

    def open(self, owner: str, prompt: Sequence[int], max_tokens: int) -> Table | None:
        """Room for a prompt and so many more tokens; None while there is not enough. Only those of the same `owner`
        share blocks."""
        num_blocks = -(-(len(prompt) + max_tokens) // self.block_tokens)
        names = self._names_of(owner, prompt)
        known = [self._named[name] for name in itertools.takewhile(self._named.__contains__, names)]
        num_kept = sum(block in self._idle for block in known)
        if num_blocks - len(known) > len(self._free) + len(self._idle) - num_kept:
            return None
        for block in known:
            self._use(block)
        return Table(known + [self._take() for _ in range(num_blocks - len(known))], names)

    def find_read(self, table: Table, num_tokens: int) -> int:
        """Of a prompt of which the first `num_tokens` were read, how many need not be read, now that others may have:
        their blocks take the place of the table's own."""
        index = num_tokens // self.block_tokens
        if num_tokens % self.block_tokens:
            return num_tokens
        while index < len(table.names) and (block := self._named.get(table.names[index])) is not None:
            if block != table.blocks[index]:
                self._use(block)
                self._give_back(table.blocks[index])
                table.blocks[index] = block
            index += 1
        table.num_named = max(table.num_named, index)
        return index * self.block_tokens

    def names_from(self, table: Table, num_tokens: int) -> list[bytes]:
        """Of the prompt's whole blocks after its first `num_tokens`; none in the middle of a block."""
        return [] if num_tokens % self.block_tokens else table.names[num_tokens // self.block_tokens :]

    def name_read(self, table: Table, num_tokens: int) -> None:
        """Lets others share the prompt's whole blocks among its first `num_tokens`, which were read."""
        last = min(len(table.names), num_tokens // self.block_tokens)
        for index in range(table.num_named, last):
            name, block = table.names[index], table.blocks[index]
            if name not in self._named:
                self._named[name], self._names[block] = block, name
        table.num_named = max(table.num_named, last)

    def close(self, table: Table) -> None:
        """Gives the blocks back, the last first, so that beginnings stay the longest."""
        for block in reversed(table.blocks):
            self._give_back(block)
        table.blocks = []

    def _names_of(self, owner: str, prompt: Sequence[int]) -> list[bytes]:
        name = hashlib.blake2b(owner.encode(), digest_size=32).digest()
        names: list[bytes] = []
        size = self.block_tokens
        for first in range(0, (len(prompt) - 1) // size * size, size):
            tokens = struct.pack(f"<{size}I", *prompt[first : first + size])
            name = hashlib.blake2b(name + tokens, digest_size=32).digest()
            names.append(name)
        return names

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._named[self._names.pop(block)]
        self._users[block] = 1
        return block

    def _use(self, block: int) -> None:
        self._idle.pop(block, None)
        self._users[block] += 1

    def _give_back(self, block: int) -> None:
        self._users[block] -= 1
        if self._users[block]:
            return
        if block in self._names:
            self._idle[block] = None
        else:
            self._free.append(block)
