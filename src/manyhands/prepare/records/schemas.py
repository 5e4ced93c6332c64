"""Finds the common schema of several tables, and casts tables safely to a schema.

A column that has only nulls, whole numbers or short texts in one table may need another type in the next table. Types
are widened only as far as every value stays the same. Casts check this for each value.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pat

from manyhands.prepare.records.array_columns import cast_tensors, common_tensor, is_tensor
from manyhands.prepare.records.columns import cast_safely, first_failing
from manyhands.prepare.records.unfit import Unfit

_LISTS = (pat.is_list, pat.is_large_list, pat.is_fixed_size_list)

_TEXTS = (pat.is_string, pat.is_large_string)

_BYTES = (pat.is_binary, pat.is_large_binary, pat.is_fixed_size_binary)

_UNITS = ("s", "ms", "us", "ns")


def common_schema(first: pa.Schema, other: pa.Schema, *, strict: bool = False) -> pa.Schema:
    """Return a schema whose columns hold all values of both schemas' columns, or `first` if it suffices.

    strict: if True, accept only types that hold all values of both types, so that no cast can fail because of a value.
    Raises Unfit if two columns of one name have no common type.
    """
    if first.equals(other):
        return first
    fields = {field.name: field for field in first}
    for field in other:
        mine = fields.get(field.name)
        if mine is None:
            fields[field.name] = field.with_nullable(True)  # the other records lack the column
            continue
        kind = common_type(mine.type, field.type, strict=strict)
        if kind is None:
            raise Unfit(field.name, f"{mine.type} and {field.type} have no common type")
        fields[field.name] = mine.with_type(kind).with_nullable(mine.nullable or field.nullable)
    for name in set(first.names) - set(other.names):
        fields[name] = fields[name].with_nullable(True)
    found = pa.schema(list(fields.values()), metadata=first.metadata)
    return first if found.equals(first) else found


def common_type(one: Any, other: Any, *, strict: bool = False) -> Any:
    """Return the narrowest type that holds the values of both types, or None. strict: as in `common_schema`."""
    if one.equals(other) or pat.is_null(other):
        return one
    if pat.is_null(one):
        return other
    if is_tensor(one) or is_tensor(other):
        return common_tensor(one, other)
    if pat.is_dictionary(one) or pat.is_dictionary(other):
        return _common_dictionary(one, other, strict)
    for common in (_common_number, _common_decimal, _common_time, _common_bytes):
        found = common(one, other, strict)
        if found is not None:
            return found
    if pat.is_struct(one) and pat.is_struct(other):
        try:
            return pa.struct(list(common_schema(pa.schema(list(one)), pa.schema(list(other)), strict=strict)))
        except Unfit:
            return None
    if pat.is_map(one) and pat.is_map(other):
        key, item = (
            common_type(*pair, strict=strict)
            for pair in ((one.key_type, other.key_type), (one.item_type, other.item_type))
        )
        return None if key is None or item is None else pa.map_(key, one.item_field.with_type(item).with_nullable(True))
    return _common_list(one, other, strict)


def _common_number(one: Any, other: Any, strict: bool) -> Any:
    if pat.is_floating(one) and pat.is_floating(other):
        return max(one, other, key=lambda kind: int(kind.bit_width))
    if pat.is_integer(one) and pat.is_integer(other):
        bits = max(one.bit_width, other.bit_width)
        if pat.is_signed_integer(one) == pat.is_signed_integer(other):
            return max(one, other, key=lambda kind: int(kind.bit_width))
        unsigned = other if pat.is_signed_integer(one) else one
        if unsigned.bit_width < 64:  # the next signed type holds all values of an unsigned type
            return {8: pa.int8(), 16: pa.int16(), 32: pa.int32(), 64: pa.int64()}[max(bits, 2 * unsigned.bit_width)]
        return None if strict else pa.uint64()  # the cast refuses negative values
    is_mixed = (pat.is_integer(one) and pat.is_floating(other)) or (pat.is_floating(one) and pat.is_integer(other))
    return pa.float64() if is_mixed and not strict else None  # the cast refuses integers that floats can't hold


def _common_decimal(one: Any, other: Any, strict: bool) -> Any:
    if not (pat.is_decimal(one) or pat.is_decimal(other)):
        return None
    digits = []
    for kind in (one, other):
        if pat.is_decimal(kind):
            digits.append((kind.precision - kind.scale, kind.scale))
        elif pat.is_integer(kind) and not strict:
            digits.append((20, 0))  # integers of 64 bits have up to 20 digits
        else:
            return None
    whole, scale = (max(column) for column in zip(*digits, strict=True))
    if whole + scale > 76:
        return None
    is_wide = whole + scale > 38 or pat.is_decimal256(one) or pat.is_decimal256(other)
    return (pa.decimal256 if is_wide else pa.decimal128)(whole + scale, scale)


def _common_time(one: Any, other: Any, strict: bool) -> Any:
    """Return the type with the finer unit. Datetimes of two zones are the same instants in the first zone.

    A date of 32 bits and a date of 64 bits, in either order, become a date of 64 bits.
    """
    for is_kind in (pat.is_timestamp, pat.is_duration, pat.is_time):
        if is_kind(one) and is_kind(other):
            unit = max(one.unit, other.unit, key=_UNITS.index)
            if pat.is_timestamp(one):
                zones = (one.tz is None, other.tz is None)
                return None if len(set(zones)) > 1 or (strict and one.tz != other.tz) else pa.timestamp(unit, one.tz)
            if pat.is_duration(one):
                return pa.duration(unit)
            return pa.time32(unit) if unit in ("s", "ms") else pa.time64(unit)
    return pa.date64() if pat.is_date(one) and pat.is_date(other) else None


def _common_bytes(one: Any, other: Any, strict: bool) -> Any:
    for kinds, small, large in ((_TEXTS, pa.string(), pa.large_string()), (_BYTES, pa.binary(), pa.large_binary())):
        if _is_any(one, kinds) and _is_any(other, kinds):
            return large if large in (one, other) else small
    return None


def _common_dictionary(one: Any, other: Any, strict: bool) -> Any:
    values = [kind.value_type if pat.is_dictionary(kind) else kind for kind in (one, other)]
    value = common_type(*values, strict=strict)
    if value is None or not (pat.is_dictionary(one) and pat.is_dictionary(other)):
        return value
    index = common_type(one.index_type, other.index_type, strict=True)
    return value if index is None else pa.dictionary(index, value, ordered=one.ordered and other.ordered)


def _common_list(one: Any, other: Any, strict: bool) -> Any:
    if not (_is_any(one, _LISTS) and _is_any(other, _LISTS)):
        return None
    value = common_type(one.value_type, other.value_type, strict=strict)
    if value is None:
        return None
    field = one.value_field.with_type(value).with_nullable(one.value_field.nullable or other.value_field.nullable)
    if pat.is_fixed_size_list(one) and pat.is_fixed_size_list(other) and one.list_size == other.list_size:
        return pa.list_(field, one.list_size)
    return pa.large_list(field) if pat.is_large_list(one) or pat.is_large_list(other) else pa.list_(field)


def _is_any(kind: Any, kinds: Iterable[Callable[[Any], bool]]) -> bool:
    return any(is_kind(kind) for is_kind in kinds)


def conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table with the columns of `schema`. Columns that the table lacks are null.

    Raises Unfit if a value can't have its column's type.
    """
    if table.schema.equals(schema, check_metadata=True):
        return table
    columns = []
    names = set(table.column_names)  # pyarrow creates a new list at each access
    for field in schema:
        if field.name not in names:
            columns.append(pa.chunked_array([pa.nulls(len(table), field.type)]))
            continue
        column = table.column(field.name)
        try:
            columns.append(_cast(column, field.type))
        except (pa.ArrowException, ValueError, TypeError, ArithmeticError) as error:
            cut = lambda count, column=column, kind=field.type: _cast(column.slice(0, count), kind)  # noqa: E731
            raise Unfit(field.name, error, first_failing(len(column), cut)) from error
    return pa.Table.from_arrays(columns, schema=schema)


def _cast(column: Any, kind: Any) -> Any:
    """Cast a column (ChunkedArray). Raises ValueError or ArrowException unless every value stays the same."""
    if column.type.equals(kind):
        return column
    if pat.is_dictionary(column.type):
        return _cast(column.cast(column.type.value_type), kind)
    if pat.is_dictionary(kind):
        return _cast(column, kind.value_type).cast(kind)
    if is_tensor(column.type) and is_tensor(kind):
        return cast_tensors(column, kind)
    _check_types(column.type, kind)
    cast = cast_safely(column, kind)
    if not _are_safe(column.type, kind):
        # Join the parts of each column, because the division into parts may differ after a cast.
        _check_same(column.combine_chunks(), cast.combine_chunks())
    return cast


def _check_types(before: Any, after: Any) -> None:
    """Raise ValueError for casts in which Arrow would drop fields or shift datetimes."""
    if pat.is_timestamp(before) and pat.is_timestamp(after) and (before.tz is None) != (after.tz is None):
        raise ValueError(f"datetimes of type {before} can't be cast to {after}: one has a zone, the other has none")
    if pat.is_struct(before) and pat.is_struct(after):
        names = {field.name for field in after}
        for field in before:
            if field.name not in names:
                raise ValueError(f"its type lacks the field {field.name!r}: {after}")
            _check_types(field.type, after.field(field.name).type)
    elif _is_any(before, _LISTS) and _is_any(after, _LISTS):
        _check_types(before.value_type, after.value_type)
    elif pat.is_map(before) and pat.is_map(after):
        _check_types(before.key_type, after.key_type)
        _check_types(before.item_type, after.item_type)


def _are_safe(before: Any, after: Any) -> bool:
    """Return True if Arrow's cast itself refuses to change a value."""
    if before.equals(after) or pat.is_null(before):
        return True
    if pat.is_struct(before) and pat.is_struct(after):
        return all(_are_safe(field.type, after.field(field.name).type) for field in before)
    if _is_any(before, _LISTS) and _is_any(after, _LISTS):
        return _are_safe(before.value_type, after.value_type)
    if pat.is_integer(before):
        return _is_any(after, (pat.is_integer, pat.is_decimal, pat.is_float64, pat.is_float32))
    if pat.is_floating(before) and pat.is_floating(after):
        return int(after.bit_width) >= int(before.bit_width)
    for kinds in (_TEXTS, _BYTES, (pat.is_timestamp,), (pat.is_duration,), (pat.is_time,), (pat.is_decimal,)):
        if _is_any(before, kinds):
            return _is_any(after, kinds)
    return False


def _check_same(before: Any, after: Any) -> None:
    """Raise ValueError if a cast has changed a value. Floats may be rounded to shorter floats, but not to infinity."""
    one, other = before.type, after.type
    if _are_safe(one, other):
        return
    if pat.is_struct(one) and pat.is_struct(other):
        fields = {field.name: array for field, array in zip(other, after.flatten(), strict=True)}
        for field, array in zip(one, before.flatten(), strict=True):
            _check_same(array, fields[field.name])
    elif _is_any(one, _LISTS) and _is_any(other, _LISTS):
        _check_same(before.flatten(), after.flatten())
    elif pat.is_floating(one) and pat.is_floating(other):
        if not pc.equal(pc.is_finite(before), pc.is_finite(after)).fill_null(True).to_numpy(zero_copy_only=False).all():
            raise ValueError(f"it has numbers that its type {other} can't hold")
    elif not after.cast(one).equals(before):
        raise ValueError(f"a value would change: it has the type {one}, and the column has {other}")


def combined(tables: Sequence[pa.Table]) -> pa.Table:
    """Return all rows in one table with the common schema. Raises Unfit if there is none."""
    schema = tables[0].schema
    for table in tables[1:]:
        schema = common_schema(schema, table.schema)
    return pa.concat_tables([conformed(table, schema) for table in tables])


def schema_to_text(schema: pa.Schema) -> str:
    """Return a schema as ASCII text."""
    return base64.b85encode(zlib.compress(schema.serialize().to_pybytes())).decode()


def schema_digest(schema: pa.Schema) -> str:
    """Return the SHA-256 of a schema.

    A schema's text must not be its identity, because it differs between versions of zlib.
    """
    return hashlib.sha256(schema.serialize()).hexdigest()


def schema_from_text(text: str) -> pa.Schema:
    """Return the schema that `schema_to_text` received."""
    return pa.ipc.read_schema(pa.py_buffer(zlib.decompress(base64.b85decode(text))))
