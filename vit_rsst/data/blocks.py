"""Blocks: what a stream reads at once, by offset, from the disk or over the network, and the index that lists them.

A parquet file has one block for each row group. A tar in WebDataset's layout is indexed once, member by member; the
index is cached and rebuilt when the file's size or time changes. Each read checks that the file is still the one that
was listed. A read over the network is retried with pauses; what fails for good becomes one sentence.
"""

import hashlib
import os
import re
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar

import numpy as np

from vit_rsst.errors import InputError, MissingRequirement, first_line

if TYPE_CHECKING:
    from pyarrow import Table
    from pyarrow.parquet import ParquetFile

T = TypeVar("T")

LARGEST_BLOCK = 512 * 2**20
"""Bytes of a row group that is read; it is read as a whole, since pyarrow writes pages of up to 1,024 rows."""

TAR_BLOCK_BYTES = 8 * 2**20
OPEN_FILES = 16
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt to read over the network."""

STALLED_SECONDS = 20.0
"""Without a byte, a connection is given up and opened again."""

MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
"""Key and field of a member of a tar, as in WebDataset."""


class Stamp(NamedTuple):
    """What tells that a file is still the one that was listed; the time of a remote file is 0."""

    num_bytes: int
    time_ns: int


@dataclass(frozen=True)
class Shard:
    """One file of a stream.

    Attributes:
        file: path or address.
        name: as the ids of its rows say it: relative to the folder of the data.
        members: of a tar: where image and label of each row lie, int64 (rows, 3): offset and bytes of the image, label.
    """

    file: str
    name: str
    stamp: Stamp
    members: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def is_local(self) -> bool:
        return "://" not in self.file


@dataclass(frozen=True)
class Block:
    """Rows that are read at once.

    Attributes:
        group: number of the row group; of a tar, 0.
        first: number of its first row in the file.
        num_bytes: of the columns that are read, in memory.
    """

    shard: Shard
    group: int
    first: int
    rows: int
    num_bytes: int


class Fields(NamedTuple):
    """The two columns of a parquet file, or suffixes of a tar's members, that are read."""

    image: str
    label: str


def list_blocks(files: Sequence[str], root: str | None, fields: Fields) -> tuple[Block, ...]:
    """Every block of a split, in the order of its files.

    Args:
        root: folder that names of shards are relative to; None: their own folder.

    Raises:
        InputError: a row group of more than 512 MB, a tar that is cut short or lacks a field.
        MissingRequirement: the network does not answer.
    """
    with ThreadPoolExecutor(min(16, len(files) or 1)) as pool:
        return tuple(block for found in pool.map(lambda file: _list_file(file, root, fields), files) for block in found)


def _list_file(file: str, root: str | None, fields: Fields) -> list[Block]:
    name = _name(file, root)
    if file.endswith(".tar"):
        return _tar_blocks(file, name, fields)
    with patiently(file, lambda: open_file(file)) as opened:
        shard = Shard(file, name, stamp(file, opened))
        metadata = patiently(file, lambda: _parquet(file, opened)).metadata
    blocks, first = [], 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        found = [group.column(i) for i in range(group.num_columns)]
        wanted = [column for column in found if column.path_in_schema.partition(".")[0] in fields]
        num_bytes = sum(column.total_uncompressed_size for column in wanted)
        if num_bytes > LARGEST_BLOCK:
            raise InputError(
                f"data: row group {number} of {file} has {num_bytes / 2**20:,.0f} MB, and a stream reads at most "
                f'{LARGEST_BLOCK // 2**20} MB at once; write the file anew in smaller ones: python -c "import '
                "pyarrow.parquet as p; p.write_table(p.read_table('IN.parquet'), 'OUT.parquet', row_group_size=100)\""
            )
        blocks.append(Block(shard, number, first, group.num_rows, num_bytes))
        first += group.num_rows
    return blocks


def _name(file: str, root: str | None) -> str:
    path, folder = Path(file), Path(root).expanduser() if root else None
    return path.relative_to(folder).as_posix() if folder and path.is_relative_to(folder) else path.name


# -- reading


class Reader:
    """Reads blocks; keeps some files open, and the blocks that were read last where several windows share them.

    Attributes:
        rows_read, bytes_read: so far.
    """

    KEPT_BYTES = 64 * 2**20

    def __init__(self, fields: Fields):
        self.fields = fields
        self.rows_read = self.bytes_read = 0
        self._open: OrderedDict[str, BinaryIO | ParquetFile] = OrderedDict()
        self._kept: OrderedDict[Block, tuple[list, list]] = OrderedDict()

    def read(self, block: Block, is_shared: bool = False) -> tuple[list, list]:
        """Encoded images and labels of all rows of a block.

        Args:
            is_shared: whether more of it is wanted soon, so that it is kept while there is room.

        Raises:
            InputError: the file has changed, or is damaged.
            MissingRequirement: the network does not answer.
        """
        if block in self._kept:
            self._kept.move_to_end(block)
            return self._kept[block]
        rows = self._read(block)
        self.rows_read += block.rows
        self.bytes_read += block.num_bytes
        if is_shared:
            self._kept[block] = rows
            while len(self._kept) > 1 and sum(kept.num_bytes for kept in self._kept) > self.KEPT_BYTES:
                self._kept.popitem(last=False)
        return rows

    def _read(self, block: Block) -> tuple[list, list]:
        shard = block.shard
        if shard.members is not None:
            return self._read_members(block)

        def read() -> "Table":
            try:
                wanted = [self.fields.image, self.fields.label]
                return self._opened(shard).read_row_group(block.group, columns=wanted, use_threads=False)
            except BaseException:
                self._open.pop(shard.file, None)  # what failed is opened again
                raise

        table = patiently(shard.file, read)
        if table.num_rows != block.rows:
            raise changed(shard.file, f"row group {block.group} had {block.rows:,} rows, now {table.num_rows:,}")
        images = [
            {"bytes": i, "path": None} if isinstance(i, bytes) else i for i in table[self.fields.image].to_pylist()
        ]
        return images, table[self.fields.label].to_pylist()

    def _read_members(self, block: Block) -> tuple[list, list]:
        """A run of members in one reading."""
        members = block.shard.members[block.first : block.first + block.rows]
        begin, end = int(members[0, 0]), int(members[-1, 0] + members[-1, 1])

        def read() -> bytes:
            opened = self._opened(block.shard)
            opened.seek(begin)
            return opened.read(end - begin)

        content = memoryview(patiently(block.shard.file, read))
        if len(content) < end - begin:
            raise changed(block.shard.file, f"{block.shard.stamp.num_bytes:,} bytes then, fewer now")
        starts = (members[:, 0] - begin).tolist()
        images = [
            {"bytes": bytes(content[start : start + size]), "path": None}
            for start, size in zip(starts, members[:, 1].tolist(), strict=True)
        ]
        return images, members[:, 2].tolist()

    def _opened(self, shard: Shard) -> "BinaryIO | ParquetFile":
        if shard.is_local:
            _check_stamp(shard, stamp(shard.file))
        if shard.file not in self._open:
            opened = open_file(shard.file)
            _check_stamp(shard, stamp(shard.file, opened))
            self._open[shard.file] = opened if shard.members is not None else _parquet(shard.file, opened)
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard.file)
        return self._open[shard.file]


def stamp(file: str, opened: BinaryIO | None = None) -> Stamp:
    """Size and time of a file as it is now.

    Args:
        opened: a remote file.
    """
    if "://" in file:
        return Stamp(opened.size, 0)
    found = os.stat(file)
    return Stamp(found.st_size, found.st_mtime_ns)


def _check_stamp(shard: Shard, now: Stamp) -> None:
    if now.num_bytes != shard.stamp.num_bytes:
        raise changed(shard.file, f"{shard.stamp.num_bytes:,} bytes then, {now.num_bytes:,} now")
    if now != shard.stamp:
        raise changed(shard.file, "it was written to")


def changed(file: str, what: str) -> InputError:
    return InputError(
        f"data: {file} has changed since it was opened ({what}); put the file back and run the same command to resume."
    )


def open_file(file: str) -> BinaryIO:
    """A file of the disk or the network, for reading by offset."""
    if "://" not in file:
        return open(file, "rb")
    import fsspec

    options = {}
    if file.startswith("http"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=STALLED_SECONDS, sock_read=STALLED_SECONDS)
        options = {"client_kwargs": {"timeout": timeout}, "cache_type": "none"}
    return fsspec.open(file, "rb", **options).open()


def _parquet(file: str, opened: BinaryIO) -> "ParquetFile":
    from pyarrow.parquet import ParquetFile

    return ParquetFile(opened, pre_buffer="://" in file)


def patiently(file: str, attempt: Callable[[], T]) -> T:
    """What an attempt to read gives; over the network, the first that succeeds.

    Raises:
        InputError: the file is gone or damaged.
        MissingRequirement: the network does not answer.
    """
    is_remote = "://" in file
    for pause in (*(PAUSES if is_remote else ()), None):
        try:
            return attempt()
        except InputError:
            raise
        except FileNotFoundError as error:
            raise InputError(f"data: {file} is gone; put the file back and run the same command to resume.") from error
        except _failures() as error:
            status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", 500)
            if is_remote and pause is not None and (status >= 500 or status in (408, 429)):
                time.sleep(pause)
                continue
            if is_remote:
                raise MissingRequirement(
                    f"data: {file} cannot be read over the network, in {len(PAUSES) + 1} attempts "
                    f"({first_line(error)}); run the same command to resume once it answers, or name a local copy with "
                    "data.path=FOLDER."
                ) from error
            raise InputError(
                f"data: {file} cannot be read ({first_line(error)}); it is damaged or cut short: fetch it again, and "
                "run the same command to resume."
            ) from error
    raise AssertionError("the last attempt returns or raises")


def _failures() -> tuple[type[Exception], ...]:
    """What reading raises: of the system, of pyarrow, of the network's libraries."""
    from pyarrow import ArrowException

    found: list[type[Exception]] = [OSError, EOFError, ArrowException, tarfile.TarError]
    for package, name in (("aiohttp", "ClientError"), ("httpx", "HTTPError")):
        try:
            found.append(getattr(__import__(package), name))
        except ImportError:
            continue
    return tuple(found)


# -- tars


def tar_labels(files: Sequence[str], fields: Fields) -> dict[str, np.ndarray]:
    """Labels of the rows of each tar, int64 (rows,), from its index.

    Raises:
        InputError: a tar that is cut short or lacks a field, a label that is no number.
    """
    return {file: _tar_shard(file, file, fields).members[:, 2] for file in files}


def _tar_shard(file: str, name: str, fields: Fields) -> Shard:
    with patiently(file, lambda: open_file(file)) as opened:
        now = stamp(file, opened)
        members = _kept_index(file, now, fields)
        if members is None:
            members = patiently(file, lambda: _index(file, opened, fields))
            _keep_index(file, now, fields, members)
    return Shard(file, name, now, members)


def _tar_blocks(file: str, name: str, fields: Fields) -> list[Block]:
    shard = _tar_shard(file, name, fields)
    members = shard.members
    if not len(members):
        return []
    # A block ends where it would be larger than the bound.
    number = (members[:, 0] - members[0, 0]) // TAR_BLOCK_BYTES
    starts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(members)]
    return [
        Block(shard, 0, first, last - first, int(members[last - 1, :2].sum() - members[first, 0]))
        for first, last in pairwise(starts)
    ]


def _index(file: str, opened: BinaryIO, fields: Fields) -> np.ndarray:
    """Offset and bytes of the image and the label of every sample, int64 (rows, 3).

    Raises:
        InputError: cut short; a sample without image or label; a label that is no number.
    """
    rows = []
    opened.seek(0)
    with tarfile.open(fileobj=opened, mode="r:") as tar:
        members = [member for member in tar if member.isfile()]
        opened.seek(tar.offset)
        if opened.read(512) != bytes(512):
            raise tarfile.ReadError("the end of the archive is missing")
        named = ((*found.groups(), member) for member in members if (found := MEMBER.match(member.name)))
        for key, group in groupby(named, key=lambda found: found[0]):
            found = {suffix.lower(): member for _, suffix, member in group}
            if not found.keys() >= set(fields):
                missing = " and no ".join(f".{name}" for name in fields if name not in found)
                raise InputError(f"data: sample {key} of {file} has no {missing} (it has {', '.join(found)}).")
            image, text = found[fields.image], tar.extractfile(found[fields.label]).read()
            try:
                rows.append((image.offset_data, image.size, int(text)))
            except ValueError as error:
                raise InputError(
                    f"data: the label of sample {key} of {file} is {text[:20]!r}, which is no whole number."
                ) from error
    return np.asarray(rows, dtype=np.int64).reshape(-1, 3)


def _index_path(file: str, fields: Fields) -> Path:
    from datasets import config

    digest = hashlib.sha256(repr((os.path.abspath(file), fields)).encode()).hexdigest()[:32]
    return Path(config.HF_DATASETS_CACHE) / "vit_rsst" / f"tar-{digest}.index"


def _kept_index(file: str, now: Stamp, fields: Fields) -> np.ndarray | None:
    """The index of the cache; None: there is none of this file as it is now."""
    try:
        kept = np.fromfile(_index_path(file, fields), dtype=np.int64)
    except OSError:
        return None
    if len(kept) < 3 or tuple(kept[:2].tolist()) != now or len(kept) != 3 + 3 * kept[2]:
        return None
    return kept[3:].reshape(-1, 3)


def _keep_index(file: str, now: Stamp, fields: Fields, members: np.ndarray) -> None:
    """Writes size, time, number of rows, rows."""
    path = _index_path(file, fields)
    draft = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.concatenate([[*now, len(members)], members.ravel()]).astype(np.int64).tofile(draft)
        draft.replace(path)
    except OSError:  # a cache that cannot be written to: the index is made at each start
        draft.unlink(missing_ok=True)
