"""The only place where autograd and module hooks are registered: each is a wire to a named method."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
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


def around_forward(
    module: nn.Module, before: Callable[[], None], after: Callable[[list[Tensor]], None]
) -> list[RemovableHandle]:
    """Call `before()` when the module's forward begins, and `after(its results' tensors)` when it ends; also by an
    error, then without any."""

    def begin(*_: object) -> None:
        before()

    def end(_: nn.Module, args: object, result: object) -> None:
        after([leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])

    return [
        module.register_forward_pre_hook(begin),
        module.register_forward_hook(end, always_call=True),
    ]
