"""The only place where autograd hooks are registered: each is a wire to a named method."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def on_gradients(
    named_params: Iterable[tuple[str, nn.Parameter]], arrived: Callable[[str, nn.Parameter], None]
) -> list[RemovableHandle]:
    """Call `arrived(name, parameter)` during backward whenever a parameter's gradient is complete."""

    def wire(name: str, param: nn.Parameter) -> RemovableHandle:
        def hook(_: Tensor) -> None:
            arrived(name, param)

        handle: RemovableHandle = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        return handle

    return [wire(name, param) for name, param in named_params]
