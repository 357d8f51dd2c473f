"""Check a file of ``torch.save`` before ``torch.load`` reads it: checksums, kinds of values, sizes.

``torch.load`` ignores checksums, and makes tensors of any kind and of the size that the file claims.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import IO, Any

import torch

ZIP = b"PK\x03\x04"  # first bytes of an archive; files of torch before 1.6 are none
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
FOLDER = 0x10  # attribute of a record, which torch.load then leaves as uninitialised memory
BLOCK_BYTES = 1 << 22  # read at a time for a checksum
ITEM_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2,
    "LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
    "ComplexDoubleStorage": 16, "ComplexFloatStorage": 8,
}  # fmt: skip
SETS = (pickle.ADDITEMS[0], pickle.FROZENSET[0])  # operations that torch.load has not
PLAIN = ("collections.Counter", "torch.Size", "torch.device", "torch._utils._rebuild_parameter")


class RefusedError(Exception):
    """The file holds what is not read; the message says what."""


def check_torch_file(file: IO[bytes]) -> None:
    """Refuse what ``torch.load`` would read wrongly, or by allocating more than the file's size.

    Raises:
        RefusedError: pickled code, or tensors other than dense ones of plain dtypes. Any other error: damaged.
    """
    is_archive = file.read(len(ZIP)) == ZIP
    file.seek(0)
    (_check_archive if is_archive else _check_legacy)(file)
    file.seek(0)


def _check_archive(file: IO[bytes]) -> None:
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        sizes = {record.filename: record.file_size for record in records}
        plain = all(
            r.compress_type == zipfile.ZIP_STORED and r.compress_size == r.file_size and not r.external_attr & FOLDER
            for r in records
        )
        if not plain or len(sizes) < len(records) or sum(sizes.values()) > os.fstat(file.fileno()).st_size:
            raise zipfile.BadZipFile("not as torch.save writes")
        checked = any(record.CRC for record in records)  # torch can leave checksums out
        for record in records:
            if not checked:
                del record.CRC  # zipfile then verifies none
            with archive.open(record) as content:
                while content.read(BLOCK_BYTES):
                    pass  # reading to the end verifies the checksum
        root = records[0].filename.partition("/")[0]

        def check_storage(key: str, size: int) -> None:
            if sizes[f"{root}/data/{key}"] != size:
                raise pickle.UnpicklingError(f"storage {key} has another size")

        with archive.open(f"{root}/data.pkl") as pickled:
            _Checker(io.BytesIO(pickled.read()), check_storage).load()


def _check_legacy(file: IO[bytes]) -> None:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        total: dict[str, int] = {}

        def check_storage(key: str, size: int) -> None:
            total[key] = size
            if sum(total.values()) > len(content):
                raise EOFError("storages beyond the end of the file")

        try:
            known = _Checker(content, check_storage).load() == LEGACY_MAGIC
        except RefusedError:
            raise
        except Exception:
            known = False
        if not known:
            raise RefusedError("not a checkpoint")
        for _ in ("protocol", "system", "content"):
            _Checker(content, check_storage).load()


UNPICKLER: Any = pickle._Unpickler  # in Python: that in C allocates by numbers in the file


class _Checker(UNPICKLER):  # type: ignore[misc]
    """Walk a pickle without making a tensor; the only class that is made is OrderedDict."""

    def __init__(self, file: Any, check_storage: Callable[[str, int], None]) -> None:
        super().__init__(file, encoding="utf-8")
        self._check_storage = check_storage

    def find_class(self, module: str, name: str) -> object:
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return _ordered_dict
        if full in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            return _check_tensor
        if module == "torch" and name in ITEM_BYTES:
            return name
        if full in PLAIN:
            return _ignore
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise RefusedError(
            f"holds pickled code ({full}), which is refused; expected plain values and dense tensors of float, "
            "complex, integer or bool dtypes"
        )

    def persistent_load(self, saved: Any) -> int:
        """Return the number of elements of a storage."""
        kind, storage, key, _device, elements, *view = saved
        if kind != "storage" or any(view) or type(elements) is not int or elements < 0:
            raise pickle.UnpicklingError("not as torch.save writes")
        self._check_storage(key, elements * ITEM_BYTES[storage])
        return elements

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])
        super().load_setitems()

    dispatch = {code: load for code, load in UNPICKLER.dispatch.items() if code not in SETS} | {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def _check_keys(keys: Iterable[Any]) -> None:
    """Refuse nested tuples as keys: hashing deep ones overflows the stack of Python."""
    for key in keys:
        if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
            raise pickle.UnpicklingError("a key is a tuple of tuples")


def _ordered_dict(items: Iterable[tuple[Any, Any]] = ()) -> OrderedDict[Any, Any]:
    _check_keys(key for key, _ in items)
    return OrderedDict(items)


def _check_tensor(elements: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_more: Any) -> None:
    """Refuse a tensor that reaches beyond its storage, which torch would extend by what lies in memory."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= elements):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")


def _ignore(*_arguments: Any) -> None:
    """Stand in for a value that torch.load makes."""
