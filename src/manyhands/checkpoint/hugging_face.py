"""The files of Hugging Face's layout: their names; and the small ones, written without transformers."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file that holds all weights; or what tells which file holds which of them."""
_DTYPE_FIELDS = ("dtype", "torch_dtype")  # as new and old versions of transformers call it


def config_files(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By file name what `save_pretrained` would write, with the dtype left open; empty for other libraries' models.

    A module that only wraps such a model isn't one, also if it hands on its config: its weights have other names.
    """
    config: Any = getattr(model, "config", None)
    if not (hasattr(type(model), "config_class") and hasattr(config, "to_json_string") and hasattr(config, "to_dict")):
        return {}
    content = json.loads(config.to_json_string())
    fields = config.to_dict()
    content[_DTYPE_FIELDS[0] if _DTYPE_FIELDS[0] in fields else _DTYPE_FIELDS[1]] = None
    files = {CONFIG: {**content, "architectures": [type(model).__name__]}}
    generation: Any = getattr(model, "generation_config", None)
    if hasattr(generation, "to_json_string"):
        files[GENERATION_CONFIG] = json.loads(generation.to_json_string())
    return files


def config_text(content: dict[str, Any], dtype: str) -> str:
    """The text of a config file for weights of that dtype, such as `bfloat16`."""
    filled = {key: dtype if key in _DTYPE_FIELDS else value for key, value in content.items()}
    return json.dumps(filled, indent=2, sort_keys=True) + "\n"
