"""Rows of text out of a .parquet file, streamed. Needs the package pyarrow."""

from collections.abc import Iterator, Sequence
from typing import Any

from megalite.data.inputs import BUFFER, open_raw
from megalite.errors import UserError

BATCH_ROWS = 64  # small, for a row may be megabytes
TEXT_TYPES = ("string", "large_string", "string_view")  # by name, for pyarrow 14 knows no string_view


def read_rows(path: str, keys: Sequence[str], start: int = 0) -> Iterator[tuple[int, int, tuple[str, ...] | str]]:
    """(row, rows in the file, texts of the columns `keys`) of each row from `start` on, counted from 0.

    Where one of the texts is none, a reason in words stands for them. Memory is bounded by the largest rows and by the
    pages of the file (of about 1 MB), not by its row groups.

    Raises `UserError` for a file that can't be read, and for a column that is missing or does not hold text.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        # By default a whole column of a row group is read at once, which may be gigabytes.
        with open_raw(path) as raw, ParquetFile(raw, buffer_size=BUFFER, pre_buffer=False) as file:
            for key in keys:
                _check_column(path, file.schema_arrow, key)
            total, row, first = file.metadata.num_rows, 0, 0
            while first < file.num_row_groups and row + file.metadata.row_group(first).num_rows <= start:
                row += file.metadata.row_group(first).num_rows
                first += 1
            groups = range(first, file.num_row_groups)
            for batch in file.iter_batches(BATCH_ROWS, groups, list(keys), use_threads=False):
                for values in zip(*(_values(batch.column(key)) for key in keys), strict=True):
                    if row >= start:
                        yield row, total, _reason(keys, values) or values
                    row += 1
            if row != total:
                raise UserError(f"cannot read {path}: it has {row} rows, but says that it has {total}: it is damaged")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _check_column(path: str, schema: Any, key: str) -> None:
    places = schema.get_all_field_indices(key)
    if len(places) != 1:
        names = ", ".join(ascii(name) for name in schema.names[:8]) or "none"
        what = f'{len(places)} columns "{key}"' if places else f'no column "{key}"'
        raise UserError(f"{path}: {what} (its columns: {names}); say which with --json-key")
    kind = schema.field(places[0]).type
    is_dictionary = str(kind).startswith("dictionary<")
    if str(kind.value_type if is_dictionary else kind) not in TEXT_TYPES:
        raise UserError(f'{path}: column "{key}" is not text but {kind}')


def _values(column: Any) -> list[str | UnicodeDecodeError | None]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # the file's own promise, which nobody checked
        return [_value(each) for each in column]


def _value(scalar: Any) -> str | UnicodeDecodeError | None:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _reason(keys: Sequence[str], values: Sequence[str | UnicodeDecodeError | None]) -> str:
    """Why a row is none; empty if it is one."""
    for key, value in zip(keys, values, strict=True):
        if value is None:
            return f'the value of "{key}" is null'
        if isinstance(value, UnicodeDecodeError):
            return f"invalid UTF-8 ({value.reason})"
    return ""
