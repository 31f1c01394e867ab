"""Packed weights on disk: a model is packed once, later starts map the file and read no weight of the checkpoint.

A file is named by what its bytes follow from (`entry`): the checkpoint's content, the shapes, the compute dtype, the scheme and
the layout that the kernels pack into. It is written beside its place and renamed, so that nobody ever sees half of it; two
processes at once do the work twice. Mapped pages belong to the system's page cache: processes share them, and they can be dropped
and read again when memory is short.

The file is in the safetensors format, tensors aligned to 64 bytes. Its last tensors are a checksum of every block of data,
and a digest of the header and these checksums. Header and digest are verified when the file is opened. The data is summed at the
speed of memory, without the interpreter lock, beside whatever else a start has to do; nothing computes before it is found
whole (`PackedWeights.check`). That is a guard against decay, not against somebody who can write into the cache folder: it should
belong to the user alone. Nothing here shortens a file or writes to one in place, and files are made read-only. Somebody who
truncates a mapped one all the same ends the processes that use it with SIGBUS, as with every mapped file.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import math
import mmap
import os
import shutil
import struct
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import numpy as np
import torch
from torch import Tensor

from pagemill import folders
from pagemill.errors import PagemillError, sentence
from pagemill.files import sync_folder
from pagemill.kernels import Kernels, PackedLinear, Scheme
from pagemill.model.config import ModelConfig
from pagemill.model.weights import Checkpoint

Item = Tensor | PackedLinear
T = TypeVar("T", Tensor, PackedLinear)

_FORMAT = "pagemill packed weights 1"
_ALIGN = 64
_PAGE = 1 << 16  # the data begins at a multiple of any system's page size
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_WIDE = "/wide"  # after the name of a weight: its second form
_SUMS, _DIGEST = "pagemill.block_sums", "pagemill.digest"
_BLOCK = 1 << 20  # bytes under one checksum
_MAPPED = 256 << 20  # bytes mapped at a time where they are read but once
_PIECE = 32 << 20  # bytes written, or summed by one thread, at a time
_LARGEST_HEADER = 100_000_000  # as in the safetensors library
_SAMPLE, _SAMPLE_EVERY = 64 << 10, 64 << 20  # of a checkpoint's bytes, for its digest
_SMALL = 1 << 30  # a checkpoint below this is packed in about a second
_UNUSED_S = 30 * 86400.0
_LARGEST_CACHE = 64 << 30
_LEAVE_FREE = 4 << 30
_FRESH_S = 10.0  # a file that is being written gets its lock within this time


class _Damaged(PagemillError):
    """A file of packed weights is not what was written; says why."""


_CHANGED = "its data changed"


class _NoRoom(PagemillError):
    """The disk has no room for another file."""


def cache_folder() -> Path:
    """Return where packed weights are kept: `packed` in the user's cache folder."""
    return folders.cache_folder("packed")


def content_digest(files: Iterable[Path]) -> str:
    """Return a digest of weight files that costs milliseconds.

    A blob of the Hugging Face hub's cache is named by the hash of its content: its name and its size are enough. Of another file
    it covers name, size, time of change, the whole header (names, dtypes, shapes) and 64 KB of every 64 MB, the beginning and the
    end among them. So it notices every new checkpoint, every training step and every download, and a copy counts as new; it does
    not notice a file that was changed between these pieces, in place, and given its old time of change again.
    """
    digest = hashlib.sha256()
    for path in files:
        real = path.resolve()
        stat = real.stat()
        digest.update(f"{path.name}\0{stat.st_size}\0".encode())
        if (
            real.parent.name == "blobs"
            and len(real.name) == 64
            and not set(real.name) - set("0123456789abcdef")
        ):
            digest.update(real.name.encode())
            continue
        digest.update(f"{stat.st_mtime_ns}\0".encode())
        with open(real, "rb", buffering=0) as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            digest.update(head + file.read(min(length, _LARGEST_HEADER)))
            for at in [*range(0, stat.st_size, _SAMPLE_EVERY), max(0, stat.st_size - _SAMPLE)]:
                digest.update(os.pread(file.fileno(), _SAMPLE, at))
    return digest.hexdigest()


def _layout_digest(kernels: Kernels) -> str:
    """Return a digest of how these kernels pack: of small matrices, packed. Another layout or dtype gives another one."""
    digest = hashlib.sha256(f"{kernels.implementations['linear']} {kernels.fp8_weights}".encode())
    for (n, k), scheme in itertools.product(((70, 37), (128, 256)), get_args(Scheme)):
        numbers = (torch.arange(n * k, dtype=torch.float32) * 0.7).sin()
        weight, bias = numbers.view(n, k), numbers[:n]
        plain = kernels.pack_linear(weight, bias, scheme=scheme)
        gated = kernels.pack_swiglu(weight[: n // 2], weight[n // 2 :], bias, scheme=scheme)
        for name, value in (*_parts(plain), *_parts(gated)):
            shown = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            digest.update(f"{name} {shown}\0".encode())
            if isinstance(value, Tensor):
                digest.update(_bytes(value).numpy().data)
    return digest.hexdigest()


def entry(
    checkpoint: Checkpoint, config: ModelConfig, kernels: Kernels, dtype: torch.dtype, scheme: str = "plain"
) -> Path:
    """Return the file for these weights, packed by these kernels for `dtype`; `scheme` names the form that each layer gets."""
    what = (
        _FORMAT,
        content_digest(checkpoint.files),
        repr((config.text, config.vision)),
        str(dtype),
        scheme,
        _layout_digest(kernels),
    )
    return cache_folder() / f"pagemill-{hashlib.sha256(repr(what).encode()).hexdigest()[:32]}.safetensors"


class PackedWeights:
    """What a model is built from: each item is taken from the file of an earlier start, or else packed now.

    `path` is None where no file is wanted. A file that cannot be used is deleted with a warning, and written anew by `keep`.
    With `check_beside`, a file's data is checked in a thread, and `check` tells the end of it.
    """

    def __init__(self, checkpoint: Checkpoint, path: Path | None, check_beside: bool = False) -> None:
        self.checkpoint, self.path = checkpoint, path
        self.check: Future[bool] | None = None
        """Whether the mapped data is what was written, for who asked for a check beside; until then it may be anything."""
        self.mapped_bytes = 0
        """Of the file, when it is in use."""
        self.note = "packed at start"
        """Where the weights came from, and where they went."""
        self._stored: dict[str, Item] = {}
        self._items: dict[str, Item] = {}
        if path is None:
            return
        try:
            self._stored, is_whole = _open_file(path)
            if check_beside:
                self.check = Future()
                threading.Thread(target=_settle, args=(self.check, is_whole), name="pagemill-check").start()
            elif not is_whole():
                raise _Damaged(_CHANGED)
        except (FileNotFoundError, NotADirectoryError):
            return
        except (_Damaged, OSError) as error:
            self._stored = {}
            refuse(path, error)
            return
        self.mapped_bytes = sum(
            tensor.nbytes
            for item in _flat(self._stored).values()
            for tensor in ([item] if isinstance(item, Tensor) else [v for _, v in _parts(item)])
            if isinstance(tensor, Tensor)
        )
        self.note = f"mapped from {path}"
        with suppress(OSError):
            os.utime(path)  # the time of last use, for `_make_room`

    def read(self, name: str) -> Tensor:
        """Return a tensor of the checkpoint; see `Checkpoint.read`."""
        return self.checkpoint.read(name)

    def packed(self, name: str, make: Callable[[], T]) -> T:
        """Return the item `name`: the stored one, or what `make` gives. Every name is asked for once."""
        if name in self._items:
            raise ValueError(f"name: {name!r} was asked for before")
        item = self._stored.get(name)
        if item is None:
            item = make()
        self._items[name] = item
        return cast(T, item)

    def keep(self) -> None:
        """Write the file, unless everything came from it. A file that cannot be written is a warning, no error."""
        if self.path is None or self._items.keys() <= self._stored.keys():
            return
        try:
            save(self.path, self._items)
            self.note = f"packed at start, kept in {self.path}"
        except (_NoRoom, OSError) as error:
            self.note = f"packed at start, not kept: {sentence(error)}"
            warnings.warn(
                f"packed weights are not kept ({sentence(error)}); set PAGEMILL_CACHE_DIR, or weight_cache to off",
                stacklevel=2,
            )


def refuse(path: Path, error: Exception | None = None) -> None:
    """Warn that a file cannot be used, and delete it if it is damaged; without an error, its data changed."""
    error = error or _Damaged(_CHANGED)
    warnings.warn(f"packed weights {path} cannot be used ({sentence(error)}): packing again", stacklevel=3)
    if isinstance(error, _Damaged):
        with suppress(OSError):
            path.unlink()


def _settle(check: Future[bool], is_whole: Callable[[], bool]) -> None:
    try:
        check.set_result(is_whole())
    except BaseException as error:  # whoever waits must hear of it
        check.set_exception(error)


def is_wanted(weight_cache: str, checkpoint: Checkpoint, device: torch.device) -> bool:
    """Whether packed weights are kept: never on a GPU, and with "auto" only where packing takes more than about a second."""
    if weight_cache == "off" or device.type != "cpu":
        return False
    return weight_cache == "on" or sum(map(path_size, checkpoint.files)) >= _SMALL


def path_size(path: Path) -> int:
    """Return a file's bytes."""
    return path.stat().st_size


def save(path: Path, items: Mapping[str, Item]) -> None:
    """Write `items` to `path`, all of it or nothing; it takes no memory beside them. Raises OSError."""
    tensors: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    for name, item in _flat(items).items():
        if isinstance(item, Tensor):
            tensors[name] = item
            continue
        described[name] = {}
        for field, value in _parts(item):
            if isinstance(value, Tensor):
                tensors[f"{name}.{field}"] = value
            else:
                described[name][field] = value
    header, data_bytes = _header(tensors, described)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _make_room(path.parent, 8 + len(header) + data_bytes)
    fd, part = tempfile.mkstemp(prefix=f"{path.stem}.", suffix=".part", dir=path.parent)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # says that its writer is alive
        _write(fd, struct.pack("<Q", len(header)) + header)
        for tensor in tensors.values():
            data = _bytes(tensor)
            _write(fd, data.numpy().data)
            _write(fd, bytes(-len(data) % _ALIGN))
        start, end = 8 + len(header), os.lseek(fd, 0, os.SEEK_CUR)
        # A piece at a time, since mapped pages count as this process's memory.
        pieces = [(at, min(_MAPPED, end - at)) for at in range(start, end, _MAPPED)]
        sums = torch.cat([_block_sums(_map(fd, size, at), fd, at) for at, size in pieces])
        _write(fd, _bytes(sums).numpy().data)
        _write(fd, bytes(-sums.nbytes % _ALIGN))
        _write(fd, _seal(header, sums))
        os.fchmod(fd, 0o400)  # nobody shortens by mistake what others have mapped
        os.fsync(fd)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise
    finally:
        os.close(fd)
    sync_folder(path)


def load(path: Path) -> dict[str, Item]:
    """Map a file and return its items; their tensors share the mapping and cannot be written to.

    Everything is checked first. Raises `_Damaged` for what is not a whole file of this format, OSError if it cannot be read.
    """
    items, is_whole = _open_file(path)
    if not is_whole():
        raise _Damaged(_CHANGED)
    return items


def _open_file(path: Path) -> tuple[dict[str, Item], Callable[[], bool]]:
    """Return a file's items, see `load`, of a whole header; whether their data is whole, too, is to be asked, once."""
    with open(path, "rb", buffering=0) as file:
        fd = file.fileno()
        size = os.fstat(fd).st_size
        prefix = os.pread(fd, 8, 0)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_LARGEST_HEADER, size - 8) or (8 + length) % _PAGE:
            raise _Damaged("it is truncated or no such file")
        header = os.pread(fd, length, 8)
        data = _map(fd, size)[8 + length :]
        try:
            tensors, described = _open(header, data)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise _Damaged("its header makes no sense") from None
        sums, digest = tensors.pop(_SUMS), tensors.pop(_DIGEST)
        if _seal(header, sums) != bytes(digest.tolist()):
            raise _Damaged("its header or its checksums changed")
        kept = os.dup(fd)  # of this very file, whatever has its name by then
    covered = sums.data_ptr() - data.data_ptr()

    def is_whole() -> bool:
        try:
            return torch.equal(_block_sums(data[:covered], kept, 8 + length), sums)
        finally:
            os.close(kept)

    items: dict[str, PackedLinear] = {}
    known = {field.name for field in fields(PackedLinear)}
    for name, scalars in described.items():
        values = scalars | {f: tensors.pop(f"{name}.{f}") for f in known if f"{name}.{f}" in tensors}
        if values.keys() != known:
            os.close(kept)
            raise _Damaged(f"{name} has the fields {', '.join(sorted(values))}")
        items[name] = PackedLinear(**values)
    for name in [name for name in items if name.endswith(_WIDE)]:
        narrow = name.removesuffix(_WIDE)
        if narrow not in items:
            os.close(kept)
            raise _Damaged(f"{name} is of no weight")
        items[narrow] = replace(items[narrow], wide=items.pop(name))
    return items | tensors, is_whole


def _header(tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> tuple[bytes, int]:
    """Return the header of a file of these tensors, its checksums and its digest, and the bytes after it."""
    entries: dict[str, Any] = {"__metadata__": {"format": _FORMAT, "items": json.dumps(described)}}
    offset = 0

    def place(name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        nonlocal offset
        size = math.prod(shape) * dtype.itemsize
        entries[name] = dict(dtype=_NAMES[dtype], shape=list(shape), data_offsets=[offset, offset + size])
        offset += size
        if gap := -offset % _ALIGN:  # the format wants every byte to belong to a tensor
            pad = f"pagemill.padding.{len(entries)}"
            entries[pad] = dict(dtype="U8", shape=[gap], data_offsets=[offset, offset + gap])
            offset += gap

    for name, tensor in tensors.items():
        place(name, tensor.dtype, tensor.shape)
    place(_SUMS, torch.int64, [-(-offset // _BLOCK)])
    entries[_DIGEST] = dict(dtype="U8", shape=[32], data_offsets=[offset, offset + 32])
    text = json.dumps(entries).encode()
    return text + b" " * (-(8 + len(text)) % _PAGE), offset + 32


def _open(header: bytes, data: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return the tensors of a file as views of its `data`, and what else belongs to its items."""
    entries = json.loads(header)
    metadata = entries.pop("__metadata__")
    if metadata["format"] != _FORMAT:
        raise ValueError
    tensors: dict[str, Tensor] = {}
    end = 0
    for name, value in entries.items():
        dtype, shape = _DTYPES[value["dtype"]], [int(size) for size in value["shape"]]
        first, last = value["data_offsets"]
        size = math.prod(shape) * dtype.itemsize
        if first != end or last != first + size or last > len(data) or min(shape, default=1) < 0:
            raise ValueError
        end = last
        if not name.startswith("pagemill.padding."):
            tensors[name] = data[first:last].view(dtype).view(shape)
    if end != len(data) or tensors[_DIGEST].shape != (32,) or tensors[_SUMS].dtype != torch.int64:
        raise ValueError
    return tensors, json.loads(metadata["items"])


def _flat(items: Mapping[str, Item]) -> dict[str, Item]:
    """The items, the wide form of a weight as one of its own."""
    flat: dict[str, Item] = {}
    for name, item in items.items():
        if isinstance(item, PackedLinear) and item.wide is not None:
            flat[name + _WIDE] = item.wide
            item = replace(item, wide=None)
        flat[name] = item
    return flat


def _parts(item: PackedLinear) -> list[tuple[str, Any]]:
    """Return the fields of a packed weight: tensors, and what JSON can hold."""
    parts = [(field.name, getattr(item, field.name)) for field in fields(item)]
    for name, value in parts:
        if not isinstance(value, Tensor | int | float | str | None):
            raise TypeError(f"a {type(value).__name__} cannot be stored: {name} of {type(item).__name__}")
    return parts


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _seal(header: bytes, sums: Tensor) -> bytes:
    digest = hashlib.sha256(header)
    digest.update(_bytes(sums).numpy().data)
    return digest.digest()


def _write(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(fd, view[:_PIECE]) :]


def _map(fd: int, size: int, start: int = 0) -> Tensor:
    """Return a file's bytes, mapped for reading only: private to no one, not counted as memory that must be had."""
    mapped = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is not writable: nobody writes to weights
        return torch.frombuffer(mapped, dtype=torch.uint8)


def _block_sums(data: Tensor, fd: int, start: int) -> Tensor:
    """Return the sum of the 64-bit words of every block, modulo 2**64; `data` is what `fd` holds from `start` on.

    Reading it all also brings it into memory in the order of the disk, and into this process's page tables. A piece is one call
    of numpy's, which holds no interpreter lock and starts no threads.
    """
    words = data.view(torch.int64).numpy()
    per_block, per_piece = _BLOCK // 8, _PIECE // 8
    sums = np.empty(-(-len(words) // per_block), dtype=np.int64)

    def run(first: int) -> None:
        ahead = start + 8 * first + 2 * _PIECE
        with suppress(OSError):
            os.posix_fadvise(fd, ahead, _PIECE, os.POSIX_FADV_WILLNEED)
        piece = words[first : first + per_piece]
        whole, at = len(piece) // per_block, first // per_block
        blocks = piece[: whole * per_block].reshape(whole, per_block)
        np.add.reduce(blocks, axis=1, out=sums[at : at + whole])
        if whole * per_block < len(piece):
            sums[at + whole] = np.add.reduce(piece[whole * per_block :])

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(run, range(0, len(words), per_piece)))
    return torch.from_numpy(sums)


def _make_room(folder: Path, size: int) -> None:
    """Delete what dead writers left, what has not been used for a month, and the least recently used beyond the limits.

    Raises `_NoRoom`, and deletes none, where that would not leave 4 GB of the disk beside `size` more bytes.
    """
    now = time.time()
    for part in folder.glob("pagemill-*.part"):
        with suppress(OSError):
            if now - part.stat().st_mtime > _FRESH_S and _is_abandoned(part):
                part.unlink()
    found: list[tuple[float, int, Path]] = []
    for path in folder.glob("pagemill-*.safetensors"):
        with suppress(OSError):
            stat = path.stat()
            found.append((stat.st_mtime, stat.st_size, path))
    free, total = shutil.disk_usage(folder).free, sum(used for _, used, _ in found)
    if free + total < size + _LEAVE_FREE:
        raise _NoRoom(
            f"{folder} has {free / 1e9:.1f} GB free, {size / 1e9:.1f} and {_LEAVE_FREE / 1e9:.1f} to spare are needed"
        )
    for last_use, used, path in sorted(found):
        if now - last_use > _UNUSED_S or total + size > _LARGEST_CACHE or free < size + _LEAVE_FREE:
            with suppress(OSError):
                path.unlink()
                total, free = total - used, free + used


def _is_abandoned(part: Path) -> bool:
    fd = os.open(part, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
