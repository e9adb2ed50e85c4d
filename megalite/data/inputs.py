"""Which files are read: paths, globs and folders -> files; opening them, decompressed."""

import glob
import importlib.util
import io
import os
import stat
import zlib
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

from megalite.errors import UserError

TEXT = (".jsonl", ".txt")
COMPRESSIONS = (".gz", ".zst")
SUFFIXES = (*TEXT, *(text + packed for text in TEXT for packed in COMPRESSIONS), ".parquet")
PACKAGES = {".zst": "zstandard", ".parquet": "pyarrow"}  # what reading such a file needs, beyond what is always there
EXTRAS = {"zstandard": "zstd", "pyarrow": "parquet"}
BUFFER = 2**17  # bytes that are read at once
# Compressed bytes that are unpacked at once. Four bytes of zstd may stand for a block of 128 KiB (RFC 8878, RLE_Block),
# so these give 64 MiB at most, whatever the file holds.
CHUNK = 2048


class InputFile(NamedTuple):
    """One file to read."""

    path: str
    size: int  # bytes on disk
    mtime_ns: int = 0  # when it was last written, where that is known

    @property
    def format(self) -> str:
        """jsonl, txt or parquet."""
        name = self.path.lower().removesuffix("." + self.compression)
        return os.path.splitext(name)[1][1:]

    @property
    def compression(self) -> str:
        """gz, zst, or an empty string."""
        suffix = os.path.splitext(self.path)[1].lower()
        return suffix[1:] if suffix in COMPRESSIONS else ""


def is_text(path: str) -> bool:
    """Whether a path names, by its suffix, a file that text is read from."""
    return path.lower().endswith(SUFFIXES)


def is_ours(path: str) -> bool:
    """Whether a build puts such a file or folder beside its output: no input, unless it is named."""
    return path.endswith((".building", ".rejects.jsonl"))


def match_paths(pattern: str) -> list[str]:
    """What a path or glob matches, sorted; an existing path is itself, whatever characters are in it."""
    if os.path.exists(pattern):
        return [pattern]
    return sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else []


def expand_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """Files of paths, globs and folders, in the order given, each glob and folder sorted, none twice.

    A folder stands for every file below it with a suffix of `SUFFIXES`; hidden ones are left out, links are followed;
    what a build left there (`is_ours`) is no input of a folder or glob.

    Raises `UserError` for a missing or unreadable file, a glob without a match, a folder without a file to read, a
    suffix that is not in `SUFFIXES`, and a format whose package is not installed.
    """
    found = _Found()
    for pattern in patterns:
        matches = match_paths(pattern)
        if pattern not in matches:  # a glob
            matches = [path for path in matches if not is_ours(path)]
        if not matches and glob.has_magic(pattern):
            raise UserError(f'no file matches "{pattern}"')
        for path in matches or [pattern]:
            found.add(path)
    if not found.files:
        raise UserError("no input files are given")
    return list(found.files.values())


class _Found:
    """Files found so far. Each file costs a `stat` and each folder one listing, however many paths lead to it."""

    def __init__(self) -> None:
        self.files: dict[str, InputFile] = {}  # by real path
        self.folders: dict[str, str] = {}  # path -> real path
        self.listed: set[str] = set()  # real paths
        self.packages: set[str] = set()  # that are installed

    def add(self, path: str) -> None:
        try:
            status = os.stat(path)
        except FileNotFoundError as error:  # or a link to nowhere
            raise UserError(f'no such file: "{path}"') from error
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        if stat.S_ISDIR(status.st_mode):
            self._add_folder(path)
            return
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f'"{path}" is not a regular file')
        if not is_text(path):
            raise UserError(
                f'"{path}" is none of {", ".join(TEXT)}, .parquet, or {"/".join(TEXT)} with '
                f"{' or '.join(COMPRESSIONS)}: convert or rename it"
            )
        if not os.access(path, os.R_OK):
            raise UserError(f"cannot read {path}: Permission denied")
        self._check_package(path)
        folder, name = os.path.split(path)
        # Not os.path.realpath(path), which asks about each folder on the way for each file anew.
        real = os.path.realpath(path) if os.path.islink(path) else os.path.join(self._real_folder(folder), name)
        self.files.setdefault(real, InputFile(path, status.st_size, status.st_mtime_ns))

    def _add_folder(self, folder: str) -> None:
        paths: list[str] = []
        again = False
        waiting = [folder]
        while waiting:
            each = waiting.pop()
            real = self._real_folder(each)
            if each != folder and f"{self._real_folder(os.path.dirname(each))}/".startswith(f"{real}/"):
                continue  # a link back to a folder that it is in
            if real in self.listed:
                again = True
                continue
            self.listed.add(real)
            try:
                with os.scandir(each) as entries:
                    shown = [entry for entry in entries if not entry.name.startswith(".") and not is_ours(entry.name)]
                    waiting += sorted((entry.path for entry in shown if entry.is_dir()), reverse=True)
                    paths += [entry.path for entry in shown if is_text(entry.name) and not entry.is_dir()]
            except OSError as error:
                raise UserError(f"cannot read {each}: {error.strerror}") from error
        if not paths and not again:
            raise UserError(f'no file below the folder "{folder}" ends in {", ".join(TEXT)} or .parquet')
        for path in sorted(paths):
            self.add(path)

    def _real_folder(self, folder: str) -> str:
        if folder not in self.folders:
            self.folders[folder] = os.path.realpath(folder)
        return self.folders[folder]

    def _check_package(self, path: str) -> None:
        package = PACKAGES.get(os.path.splitext(path)[1].lower())
        if package is None or package in self.packages:
            return
        if importlib.util.find_spec(package) is None:
            raise UserError(f'reading "{path}" needs the package {package}: pip install "megalite[{EXTRAS[package]}]"')
        self.packages.add(package)


def name_files(paths: Sequence[str]) -> str:
    """`"a.txt" and 2 more`: for an error that is about all of them."""
    return f'"{paths[0]}"' + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def open_raw(path: str) -> BinaryIO:
    """The bytes of a file as they are on disk. Raises `UserError` where it can't be opened."""
    try:
        return open(path, "rb", buffering=BUFFER)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def open_text(file: InputFile) -> BinaryIO:
    """The bytes of a .jsonl or .txt file, decompressed; memory is bounded, whatever the file holds.

    Raises `UserError` where it can't be opened. A compressed one raises `DamagedInput` while reading, once all that
    could be had from it is read.
    """
    raw = open_raw(file.path)
    if not file.compression:
        return raw
    return io.BufferedReader(_Decompressed(raw, file), buffer_size=BUFFER)


class DamagedInput(UserError):
    """A compressed file breaks off, or is not what its name says.

    Attributes: `reason`, without the file's name.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


class _Decompressed(io.RawIOBase):
    """What a .gz or .zst holds, all members or frames of it.

    The libraries' own readers lose what they had unpacked when the damage comes, and that of zstandard takes a frame
    that breaks off for the end of the file.
    """

    def __init__(self, raw: BinaryIO, file: InputFile) -> None:
        self.raw, self.path, self.kind = raw, file.path, {"gz": "gzip", "zst": "zstd"}[file.compression]
        self.member: Any = None  # the decompressor of the member that is being read
        self.members = 0
        self.packed = b""  # read, not yet unpacked
        self.ready = memoryview(b"")  # unpacked, not yet handed out
        if self.kind == "zstd":
            import zstandard

            # Without this, files of `zstd --long=31`, as some published dumps are, would be refused.
            decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
            self.new_member, self.error = decompressor.decompressobj, zstandard.ZstdError
        else:
            self.new_member, self.error = (lambda: zlib.decompressobj(wbits=31)), zlib.error  # 31: gzip's header

    def readable(self) -> bool:
        return True

    @property
    def position(self) -> int:
        """Bytes of the compressed file that are read."""
        return self.raw.tell() - len(self.packed)

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            if not self._unpack():
                return 0
        size = min(len(buffer), len(self.ready))
        buffer[:size] = self.ready[:size]
        self.ready = self.ready[size:]
        return size

    def _unpack(self) -> bool:
        """Unpack one chunk; False at the end of the file."""
        packed = self.packed or self.raw.read(CHUNK)
        self.packed = b""
        if not packed:
            if self.member is not None or not self.members:
                raise self._damage("it is empty" if not self.members and self.member is None else "it breaks off")
            return False
        if self.member is None:
            if self.members and self.kind == "gzip":
                packed = packed.lstrip(b"\0")  # gzip(1) takes zeros after a member for padding too
                if not packed:
                    return True
            self.member = self.new_member()
        try:
            self.ready = memoryview(self.member.decompress(packed))
        except self.error as error:
            raise self._damage(str(error)) from error
        if self.member.eof:
            self.packed, self.member = self.member.unused_data, None
            self.members += 1
        return True

    def _damage(self, what: str) -> DamagedInput:
        return DamagedInput(self.path, f"truncated or corrupt {self.kind} ({what})")

    def close(self) -> None:
        self.raw.close()
        super().close()
