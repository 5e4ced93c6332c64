"""Finds the adapter of a peft model: its config, its tensors, and how it is merged into the base model.

peft is not imported unless the model comes from it. A checkpoint records what is found here, so that an export needs
neither peft nor the model's code.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from manyhands.checkpoint.format import AdapterRecord, Product
from manyhands.checkpoint.weight_files import config_files

_LORA = "peft.tuners.lora.layer"

_MERGEABLE = {"Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d"}
"""The classes of peft's LoRA layers for which `Product` describes what is added to the base layer."""


def adapter_of(model: nn.Module) -> AdapterRecord | None:
    """Return the active adapter of a `peft.PeftModel`.

    Return None for other models, for several active adapters, and for adapters whose file holds computed tensors, such
    as those of prompt tuning: they are exported with all tensors under the names of the model's state_dict.
    """
    peft: Any = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel) or len(model.active_adapters) != 1:
        return None
    (name,) = model.active_adapters
    tensors = _file_names(peft, model, name)
    if tensors is None:
        return None
    base = model.get_base_model()
    merging = _Merging(model, base, name)
    return AdapterRecord(
        config=_config(model.peft_config[name], base),
        tensors=tensors,
        base_files=config_files(base),
        merged={} if merging.problem else merging.merged,
        products={} if merging.problem else merging.products,
        unmergeable=merging.problem,
    )


def _file_names(peft: Any, model: nn.Module, adapter: str) -> dict[str, str] | None:
    """Return the name in the model's state_dict for each name in the file that peft would write, or None."""
    # A worker may hold only a part of a parameter. So peft gets placeholders, and only names are read.
    placeholders: dict[str, Any] = {key: _Placeholder(key) for key in model.state_dict()}
    try:
        saved = peft.get_peft_model_state_dict(
            model, state_dict=placeholders, adapter_name=adapter, save_embedding_layers=False
        )
    except Exception:  # a method that computes what it saves fails with placeholders; saving a checkpoint must not fail
        return None
    if not saved or not all(isinstance(each, _Placeholder) for each in saved.values()):
        return None
    return {name: each.key for name, each in saved.items()}


class _Placeholder:
    """Stands for the tensor `key` of a state_dict."""

    def __init__(self, key: str) -> None:
        self.key = key


def _config(config: Any, base: nn.Module) -> dict[str, Any]:
    """Return the content of adapter_config.json, as peft's `save_pretrained` writes it."""
    fields = {**config.to_dict(), "inference_mode": True}
    if not fields.get("base_model_name_or_path"):
        fields["base_model_name_or_path"] = getattr(base, "name_or_path", None) or None
    if fields.get("task_type") is None:
        fields["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    content: dict[str, Any] = json.loads(json.dumps(fields, default=_plain))
    return content


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


class _Merging:
    """How the adapter is merged. merged, products: as in `AdapterRecord`. problem: why it can't be merged, or ""."""

    def __init__(self, model: nn.Module, base: nn.Module, adapter: str) -> None:
        self._adapter = adapter
        self._times = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        self._renamed: list[tuple[str, str | None]] = []
        self.products: dict[str, Product] = {}
        prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)
        self.problem = next(self._problems(prefix, base), "")
        new_names = {key: self._new_name(key, prefix) for key in model.state_dict() if key.startswith(prefix)}
        self.merged = {new: key for key, new in new_names.items() if new is not None}

    def _problems(self, prefix: str, base: nn.Module) -> Iterator[str]:
        """Go through all layers of peft. Yield each reason why the adapter can't be merged."""
        for relative, layer in base.named_modules():
            name = prefix + relative
            if not hasattr(layer, "adapter_layer_names"):
                continue
            if type(layer).__name__ == "ModulesToSaveWrapper":
                self._renamed += [(f"{name}.modules_to_save.{self._adapter}.", f"{name}."), (f"{name}.", None)]
            elif type(layer).__module__ == _LORA and type(layer).__name__ in _MERGEABLE:
                self._renamed += [(f"{name}.base_layer.", f"{name}."), (f"{name}.", None)]
                if self._adapter in layer.scaling:
                    yield from self._problems_of_layer(name, layer)
                    self._add(name, layer)
            else:
                yield f"{name} is a {type(layer).__module__}.{type(layer).__name__}"

    def _problems_of_layer(self, name: str, layer: Any) -> Iterator[str]:
        base = layer.get_base_layer()
        if layer.merged or layer.disable_adapters:
            yield f"the adapter of {name} is merged already, or turned off"
        if layer.lora_variant.get(self._adapter) is not None:
            yield f"{name} has a {type(layer.lora_variant[self._adapter]).__name__}"
        if layer.lora_bias.get(self._adapter):
            yield f"the adapter of {name} has a bias"
        if getattr(base, "groups", 1) != 1:
            yield f"{name} is a grouped convolution"
        if self._times[id(base.weight)] != 1:
            yield f"the weight of {name} is tied to another weight"

    def _add(self, name: str, layer: Any) -> None:
        of_embedding = self._adapter in layer.lora_embedding_A
        kind, end = ("lora_embedding_", "") if of_embedding else ("lora_", ".weight")
        matrix = layer.get_base_layer().weight.ndim == 2
        self.products[f"{name}.base_layer.weight"] = Product(
            left=f"{name}.{kind}B.{self._adapter}{end}",
            right=f"{name}.{kind}A.{self._adapter}{end}",
            scaling=float(layer.scaling[self._adapter]),
            transposed=of_embedding or (matrix and layer.fan_in_fan_out),
        )

    def _new_name(self, key: str, prefix: str) -> str | None:
        """Return the name of a tensor in the base model, or None if the base model doesn't have the tensor."""
        for start, new in self._renamed:
            if key.startswith(start):
                return None if new is None else (new + key.removeprefix(start)).removeprefix(prefix)
        return key.removeprefix(prefix)
