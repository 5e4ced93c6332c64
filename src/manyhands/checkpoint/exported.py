"""What an export writes: all tensors of a model, the adapter of a peft model, or its base model after merging."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from manyhands.checkpoint.format import AdapterRecord, Product, TensorRecord
from manyhands.checkpoint.saved_weights import SavedWeights
from manyhands.checkpoint.weight_files import config_text
from manyhands.errors import CheckpointError, ConfigError
from manyhands.storage.tensor_file import TensorEntry, dtype_name

Form = Literal["model", "adapter", "merged"]

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"

LISTED = 5
"""An error lists at most this many tensors."""

_ROWS = 64
"""The number of rows of a product that are computed at a time. It is constant, because it decides the bits."""


class Exported:
    """All tensors of a checkpoint under their own names.

    file: the name of the only file, or None if there may be more.
    """

    form: Form = "model"
    file: str | None = None

    def __init__(self, saved: SavedWeights, sources: dict[str, TensorEntry] | None = None) -> None:
        self.saved = saved
        self._sources = {entry.name: entry for entry in saved.entries} if sources is None else sources
        self.entries = [TensorEntry(name, entry.dtype, entry.shape) for name, entry in self._sources.items()]
        self.dtype = next((entry.dtype for entry in self.entries if entry.dtype.is_floating_point), torch.float32)
        self.nbytes = sum(entry.nbytes for entry in self.entries)
        records = (saved.records.get(entry.name) for entry in self._sources.values())
        self.num_parameters = sum(record.numel for record in records if record is not None and record.is_parameter)

    def parts(self, entry: TensorEntry) -> Iterator[Tensor]:
        """Yield the elements of a tensor in parts, in order."""
        return self.saved.parts(self._sources[entry.name])

    def config_files(self) -> dict[str, str]:
        """Return the texts of the config files by their names."""
        files = self.saved.manifest.config_files.items()
        return {name: config_text(content, dtype_name(self.dtype)) for name, content in files}


class _Adapter(Exported):
    """The adapter alone."""

    form: Form = "adapter"
    file = ADAPTER

    def __init__(self, saved: SavedWeights, adapter: AdapterRecord) -> None:
        found = _sources(saved, adapter.tensors)
        super().__init__(saved, found)
        self._config = adapter.config
        included = {entry.name for entry in found.values()}
        left = [record.name for key, record in saved.records.items() if record.kind == "master" and key not in included]
        if left:
            raise ConfigError(
                "parameters that are not part of the adapter were trained, too",
                where=str(saved.folder),
                got=", ".join(left[:LISTED]),
                hint="use merge (--merge), or add their modules to modules_to_save in peft's config",
            )

    def config_files(self) -> dict[str, str]:
        return {ADAPTER_CONFIG: json.dumps(self._config, indent=2, sort_keys=True) + "\n"}


class _Merged(Exported):
    """The base model with the adapter's products added to its weights."""

    form: Form = "merged"

    def __init__(self, saved: SavedWeights, adapter: AdapterRecord) -> None:
        super().__init__(saved, _sources(saved, adapter.merged))
        self._adapter = adapter
        self._products = {key: _Delta(saved, saved.records[key], product) for key, product in adapter.products.items()}

    def parts(self, entry: TensorEntry) -> Iterator[Tensor]:
        source = self._sources[entry.name]
        delta = self._products.get(source.name)
        if delta is None:
            yield from self.saved.parts(source)
            return
        start = 0
        for part in self.saved.parts_of(self.saved.records[source.name]):
            yield (part.float() + delta.elements(start, part.numel())).to(source.dtype)
            start += part.numel()

    def config_files(self) -> dict[str, str]:
        files = self._adapter.base_files.items()
        return {name: config_text(content, dtype_name(self.dtype)) for name, content in files}


class _Delta:
    """The product that is added to a weight, computed in fp32 for some rows at a time."""

    def __init__(self, saved: SavedWeights, weight: TensorRecord, product: Product) -> None:
        self._saved, self._product, self._factors = saved, product, (product.left, product.right)
        left, right = (saved.records[key].shape for key in self._factors)
        rows, columns = math.prod(left[:1]), math.prod(right[1:])
        expected = (columns, rows) if product.transposed else (rows, columns)
        if math.prod(left[1:]) != math.prod(right[:1]) or expected != (weight.shape[0], math.prod(weight.shape[1:])):
            raise CheckpointError(
                "the adapter doesn't fit the base model",
                where=str(saved.folder),
                expected=f"{weight.name} {list(weight.shape)}",
                got=f"{product.left} {list(left)}, {product.right} {list(right)}",
                hint="go back to an earlier checkpoint",
            )
        self._num_rows, self._columns = expected
        self._group = -1
        self._values = torch.empty(0)
        self._matrices: tuple[Tensor, Tensor] | None = None

    def elements(self, start: int, numel: int) -> Tensor:
        """Return the elements [start, start + numel) of the flattened product, in fp32."""
        end = start + numel
        groups = range(start // self._columns // _ROWS, -(-end // self._columns // _ROWS) if numel else 0)
        parts = []
        for group in groups:
            first = group * _ROWS * self._columns
            values = self._rows(group).view(-1)
            parts.append(values[max(0, start - first) : max(0, end - first)])
        return torch.cat(parts) if parts else torch.empty(0)

    def _rows(self, group: int) -> Tensor:
        if self._group != group:
            left, right = self._read()
            padded = torch.zeros(_ROWS, left.shape[1])
            rows = left[group * _ROWS : (group + 1) * _ROWS]
            padded[: len(rows)] = rows
            self._group, self._values = group, (padded @ right)[: len(rows)] * self._product.scaling
        return self._values

    def _read(self) -> tuple[Tensor, Tensor]:
        if self._matrices is None:
            left, right = (
                torch.cat([part.float().view(-1) for part in self._saved.parts_of(record)])
                .view(record.shape)
                .flatten(1)
                for record in (self._saved.records[key] for key in self._factors)
            )
            pair = (right.T, left.T) if self._product.transposed else (left, right)
            self._matrices = pair[0].contiguous(), pair[1].contiguous()
        return self._matrices


def exported_form(saved: SavedWeights, *, merge: bool) -> Exported:
    """Return what an export of the checkpoint writes.

    Raises ConfigError if the adapter can't be merged, and CheckpointError.
    """
    adapter = saved.manifest.adapter
    if not merge:
        return Exported(saved) if adapter is None else _Adapter(saved, adapter)
    if adapter is None:
        raise ConfigError(
            "the model has no adapter to merge",
            where=str(saved.folder),
            expected="a checkpoint of a peft model with one active LoRA adapter",
            hint="without merge (--merge), the export writes the model's weights",
        )
    if adapter.unmergeable:
        raise ConfigError(
            "the adapter can't be merged into its base model",
            where=str(saved.folder),
            expected="plain LoRA of linear layers, embeddings and convolutions, and modules_to_save",
            got=adapter.unmergeable,
            hint="merge it with peft: manyhands.load_model(run, recipe).merge_and_unload()",
        )
    return _Merged(saved, adapter)


def _sources(saved: SavedWeights, names: dict[str, str]) -> dict[str, TensorEntry]:
    """Return the saved tensor for each name in the export. Of tensors that are tied, only the first name is written."""
    entries = {entry.name: entry for entry in saved.entries}
    firsts = {key: record.keys[0] for record in saved.records.values() for key in record.keys}
    missing = sorted({key for key in names.values() if firsts.get(key, key) not in entries})
    if missing:
        raise CheckpointError(
            "tensors of the adapter are missing from the checkpoint",
            where=str(saved.folder),
            got=", ".join(missing[:LISTED]),
            hint="go back to an earlier checkpoint",
        )
    return {name: entries[key] for name, key in names.items() if firsts.get(key, key) == key}
