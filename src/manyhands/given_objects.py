"""Checks of the functions and data sets that a user gives to a recipe."""

from __future__ import annotations

from manyhands.errors import ConfigError

FUNCTIONS = {
    "model": "lambda: Net()",
    "loss": "lambda model, batch: cross_entropy(model(batch[0]), batch[1])",
    "optimizer": "lambda params: torch.optim.AdamW(params, lr=1e-3)",
    "schedule": "lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=100)",
    "collate": "lambda samples: torch.stack(samples)",
    "sample": "lambda model: generate(model)",
}
"""The recipe's fields that are functions, with an example of each."""


def check_function(field: str, value: object) -> None:
    """Raise ConfigError if a field that expects a function holds something else, such as the model itself."""
    if field == "model" and hasattr(value, "named_parameters") and not isinstance(value, type):
        raise ConfigError(
            "recipe.model is a model, not a function that builds one",
            expected=f"a function without arguments, or the model's class, for example {FUNCTIONS[field]}",
            got=f"an object of the class {type(value).__name__}",
            hint="build the model inside the function: each worker calls it once, with the run's seed set",
        )
    if field == "loss" and type(value).__module__ == "torch.nn.modules.loss":
        name = type(value).__name__
        raise ConfigError(
            "recipe.loss is a loss of torch.nn, which is called with outputs and targets",
            expected=f"a function of the model and a batch, for example {FUNCTIONS[field]}",
            got=name,
            hint=f"call it in the function: lambda model, batch: {name}()(model(batch[0]), batch[1])",
        )
    if not (callable(value) or (value is None and field in ("schedule", "collate", "sample"))):
        raise ConfigError(
            f"recipe.{field} can't be called",
            expected=f"a function, for example {FUNCTIONS[field]}",
            got=f"an object of the class {type(value).__name__}",
        )
