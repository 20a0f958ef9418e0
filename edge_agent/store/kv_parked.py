"""One parked session: its log of ids, the rows of its last blocks, and its place in the chain of block names.

Rules: no lock (its store's is held), no budget.  Names of blocks are kept for the window only, and reckoned anew from the ids
where an earlier one is asked for.  Raises ``OSError`` where the disk does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.kv import BLOCK_TOKENS, SINK_TOKENS, KvFormat, block_start, full_blocks, next_name, root_name
from edge_agent.store.files import Disk
from edge_agent.store.kv_blocks import BlockFiles
from edge_agent.store.kv_journal import ROWS_SUFFIX, AppendedFile, BlockRows, Ids, TokenLog, added_bytes
from edge_agent.store.kv_tiers import NOTHING, Restorable, restorable

KEY_CHARS = 32


def key_of(name: str) -> str:
    """What the files of the session ``name`` are called: never its own text."""
    return hashlib.sha256(b"sly/1/session" + name.encode()).hexdigest()[:KEY_CHARS]


class ParkedSession:
    def __init__(self, disk: Disk, folder: Path, kv_format: KvFormat, blocks: BlockFiles, log: TokenLog) -> None:
        self._disk, self._folder, self._format, self._blocks = disk, folder, kv_format, blocks
        self.log, self.key = log, key_of(log.name)
        self.rows: dict[int, BlockRows] = {}
        self.pins = self.last_use = self.counted_bytes = 0
        self.sealed: dict[int, bytes] = {}
        """By number: the names of the sealed blocks that it may be restored from."""
        self._names: dict[int, bytes] = {}

    @property
    def name(self) -> str:
        return self.log.name

    @property
    def ids(self) -> Ids:
        return self.log.ids

    @property
    def named(self) -> bool:
        return not self.name.startswith("~")

    @property
    def size_bytes(self) -> int:
        """Of the files that are this session's alone."""
        return self.log.file.size_bytes + sum(rows.file.size_bytes for rows in self.rows.values())

    @property
    def used_s(self) -> int:
        """When its log was last written, in seconds since 1970; 0 if it is gone."""
        facts = self._disk.facts(self.log.file.path)
        return facts.mtime_s if facts is not None else 0

    def append_bytes(self, ids: int, rows_bytes: int) -> int:
        """The most that appending so much may add on disk, temporary files included."""
        count = rows_bytes // self._format.row_bytes
        return added_bytes(ids, count, rows_bytes) + (0 if self.sound else self.size_bytes)

    @property
    def sound(self) -> bool:
        """Can every file be appended to, with none to be replaced first?"""
        return self.log.sound and all(rows.sound for rows in self.rows.values())

    @property
    def root(self) -> bytes | None:
        """The name of its prelude, if it has one."""
        return root_name(self._format.fingerprint, self.ids[:SINK_TOKENS]) if len(self.ids) >= SINK_TOKENS else None

    def block_name(self, block: int) -> bytes:
        """Of a full block; -1 names the prelude. Raises ``ValueError`` if the session's ids do not reach so far."""
        if block >= full_blocks(len(self.ids)) or (root := self.root) is None:
            raise ValueError(f"block {block} of a session of {len(self.ids)} tokens")
        if block < 0:
            return root
        if block in self._names:
            return self._names[block]
        known = block - 1 if block - 1 in self._names else max((each for each in self._names if each < block), default=-1)
        name = self._names[known] if known >= 0 else root
        for each in range(known + 1, block + 1):
            name = next_name(name, self.ids[block_start(each) : block_start(each + 1)])
            self._names[each] = name
        return name

    def restorable(self, limit: int | None = None) -> Restorable:
        """The longest prefix of at most ``limit`` tokens whose KV is here."""
        root = self.root
        if root is None:
            return NOTHING
        limit = len(self.ids) if limit is None else min(limit, len(self.ids))
        sealed = {block for block, name in self.sealed.items() if name in self._blocks}
        rows = {block: rows.count for block, rows in self.rows.items() if self._fits(rows)}
        return restorable(limit, self._format.window_blocks, root in self._blocks, sealed, rows)

    def window(self, here: Restorable) -> tuple[bytes, ...]:
        return tuple(self.sealed[block] for block in here.window(self._format.window_blocks))

    def needs(self) -> Iterator[bytes]:
        """The prelude and the sealed blocks that this session may be restored from."""
        if self.root is not None:
            yield self.root
        yield from self.sealed.values()

    def recall(self, rows_blocks: Iterable[int]) -> list[str]:
        """For the start: find in the store what this session may be restored from; what is wrong with its rows files."""
        here = {block: self.block_name(block) for block in range(full_blocks(len(self.ids)))}
        self.sealed = {block: name for block, name in here.items() if name in self._blocks}
        notes = [note for block in rows_blocks if (note := self._recall_rows(block))]
        self._prune()
        return notes

    def forget_before_window(self) -> list[bytes]:
        """The names of sealed blocks before the window: nothing is restored from them any more, and they are forgotten.

        The window of what is durable: a block that a power cut may still take keeps those that it pushed out.
        """
        last = max((block for block, name in self.sealed.items() if self._blocks.durable(name)), default=-1)
        first = min(last + 1, self.restorable().sealed) - self._format.window_blocks
        forgotten = [self.sealed.pop(block) for block in sorted(self.sealed) if block < first]
        self._prune()
        return forgotten

    def append_ids(self, position: int, ids: Sequence[int]) -> list[bytes]:
        """``ids`` from ``position`` on; the names of sealed blocks that are the session's no more."""
        goes_back = position < len(self.ids)
        if goes_back:
            self.check_rows()
        self.log.append(position, ids)
        return self._forget_after(position) if goes_back else []

    def append_rows(self, first: int, rows: bytes | memoryview) -> None:
        """Packed rows from position ``first`` on; those of blocks that are sealed already are not needed."""
        size = self._format.row_bytes
        end = first + len(rows) // size
        if len(rows) % size or first < SINK_TOKENS or end > len(self.ids):
            raise ValueError(f"{len(rows)} bytes of rows from position {first} of a session of {len(self.ids)} tokens")
        view = memoryview(rows)
        for block in range(full_blocks(first), full_blocks(end - 1) + 1 if rows else 0):
            start, stop = max(first, block_start(block)), min(end, block_start(block + 1))
            if self.sealed.get(block, b"") not in self._blocks:
                part = view[(start - first) * size : (stop - first) * size]
                self.rows_of(block).append(start - block_start(block), self.ids[start:stop], part)

    def rows_of(self, block: int) -> BlockRows:
        """The rows file of a block, checked; an empty one where there is none that fits the session's ids."""
        rows = self.rows.get(block)
        if rows is not None and not self._fits(rows):
            rows.file.remove()
            rows = None
        if rows is None:
            path = self._folder / f"{self.key}.{block}{ROWS_SUFFIX}"
            rows = BlockRows.create(self._disk, path, self._format, block, self.block_name(block - 1))
            self.rows[block] = rows
        return rows

    def check_rows(self) -> list[str]:
        """Read and check the rows that were found at the start, if that was not done yet; what is wrong with them."""
        notes = []
        for rows in self.rows.values():
            try:
                if unsound_bytes := rows.check(self.ids):
                    notes.append(f"{unsound_bytes} bytes of rows of block {rows.block} are not as they were written")
            except (RefusedError, UnavailableError) as error:
                notes.append(str(error))
        return notes

    def read_rows(self, here: Restorable) -> bytes:
        """The packed rows after the sealed blocks of ``here``. Raises ``RefusedError``, ``UnavailableError``."""
        parts = []
        for block in (here.sealed, here.sealed + 1):
            count = min(max(0, here.tokens - block_start(block)), BLOCK_TOKENS)
            if count:
                parts.append(self._rows_here(block, count).read(count))
        return b"".join(parts)

    def drop_sealed_rows(self) -> None:
        """Remove the rows of blocks whose sealed form is durable."""
        for block in [block for block in self.rows if (name := self.sealed.get(block)) and self._blocks.durable(name)]:
            self._remove_rows(block)

    def files(self) -> list[AppendedFile]:
        return [self.log.file, *(rows.file for rows in self.rows.values() if rows.file.size_bytes)]

    def close(self) -> None:
        """Give the descriptors back."""
        for file in self.files():
            file.close()

    def distrust(self) -> None:
        self.log.distrust()
        for rows in self.rows.values():
            rows.distrust()

    def remove_rows(self) -> None:
        for block in list(self.rows):
            self._remove_rows(block)

    def _remove_rows(self, block: int) -> None:
        """If the disk cannot, they are still here and counted."""
        self.rows[block].file.remove()
        del self.rows[block]

    def _prune(self) -> None:
        """Keep the names of the chain that are asked for: of sealed blocks, and from the last of them on."""
        here = self.restorable()
        last = here.sealed - 1 if here.tokens else full_blocks(len(self.ids)) - 1
        self._names = {block: name for block, name in self._names.items() if block >= last or block in self.sealed}

    def _fits(self, rows: BlockRows) -> bool:
        return rows.block <= full_blocks(len(self.ids)) and rows.parent == self.block_name(rows.block - 1)

    def _rows_here(self, block: int, count: int) -> BlockRows:
        rows = self.rows.get(block)
        if rows is None or rows.count < count or not self._fits(rows):
            raise UnavailableError(f"KV rows of block {block}", "they are not here any more", "compute them again")
        return rows

    def _recall_rows(self, block: int) -> str:
        path = self._folder / f"{self.key}.{block}{ROWS_SUFFIX}"
        try:
            rows = BlockRows.open(self._disk, path, self._format)
            if rows.block != block or not self._fits(rows):
                raise RefusedError(f"KV rows {path.name}", "rows after other tokens", "rows of this session")
        except RefusedError as error:
            self._disk.unlink(path)
            return str(error)
        self.rows[block] = rows
        return ""

    def _forget_after(self, tokens: int) -> list[bytes]:
        """KV of positions from ``tokens`` on is of other tokens now."""
        self._names = {block: name for block, name in self._names.items() if block < full_blocks(tokens)}
        forgotten = [self.sealed.pop(block) for block in sorted(self.sealed) if block >= full_blocks(tokens)]
        for block, rows in self.rows.items():
            rows.cut(max(0, tokens - block_start(block)))
        for block in [block for block, rows in self.rows.items() if not rows.count]:
            self._remove_rows(block)
        return forgotten
