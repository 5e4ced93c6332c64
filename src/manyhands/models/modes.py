"""Training and evaluation modes of a model's modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn

from manyhands.errors import ConfigError
from manyhands.options import hint_nearest


class TrainingMode:
    """The modes of a model's modules in a training step: training mode, except for those that match a pattern.

    Raises ConfigError for a pattern that matches no module.
    """

    def __init__(self, model: nn.Module, eval_modules: Sequence[str]) -> None:
        self._model = model
        named = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
        for pattern in eval_modules:
            if not any(fnmatchcase(name, pattern) for name in named):
                raise ConfigError(
                    "recipe.eval_modules matches no module",
                    expected="the name of a module of the model, or a pattern",
                    got=repr(pattern),
                    hint=hint_nearest(pattern.rstrip("*."), named),
                )
        chosen = (module for name, module in named.items() if any(fnmatchcase(name, each) for each in eval_modules))
        self._evaluated = list(dict.fromkeys(chosen))

    def begin(self) -> None:
        """Set the modes for a micro-batch. Code between steps, or the previous micro-batch, may have changed them."""
        self._model.train()
        for module in self._evaluated:
            module.eval()


def silent_in_evaluation(model: nn.Module) -> frozenset[str]:
    """Return the names of the modules that draw no random numbers in evaluation mode: those made of torch's own."""
    silent = {name for name, module in model.named_modules() if _is_silent(module)}
    return frozenset(name for name in silent if all(map(_is_silent, model.get_submodule(name).modules())))


def _is_silent(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.startswith("torch.nn.modules.") and not kind.__name__.startswith("FractionalMaxPool")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set all modules to evaluation mode in a context. At its end, the mode of each module is restored."""
    before = [(module, module.training) for module in model.modules()]
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)  # also runs the `train` methods of the model, which may do more than set the mode
        for module, mode in before:
            module.training = mode
