"""One stream of hidden states in one block, run as often as its stages need and no further than they need.

Hooks do it: they hand out what linears take, keep what modules give, give that instead of computing it again,
and end a run where nothing behind it is asked for. This module does not know which modules are worth keeping,
nor what is made of what it hands out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from services.quantizer.source import Weights


class BlockStream:
    """`layer` is the block's, run on `hidden`.

    Attributes:
        hidden: [windows, length, hidden] before the block.
        complete: modules whose outputs are kept for all windows, and given instead of being computed.
    """

    def __init__(self, layer: nn.Module, hidden: Tensor) -> None:
        self._layer, self.hidden = layer, hidden
        self._kept: dict[str, Tensor] = {}
        self._tuples: set[str] = set()
        self.complete: set[str] = set()

    def run(
        self,
        weights: Weights,
        window: slice,
        batch: Tensor,
        positions: dict[str, Any],
        *,
        listeners: Mapping[str, Callable[[Tensor], None]] | None = None,
        record: Collection[str] = (),
        before: str | None = None,
        behind: str | None = None,
    ) -> Tensor | None:
        """One batch through the block; None if it ended `before` or `behind` a module. `listeners` get what
        linears take, [windows, length, in].
        """
        with ExitStack() as stack:
            for name in self.complete:
                self._replay(stack, name, window)
            for name in record:
                stack.callback(self._record(name, window).remove)
            for name, listener in (listeners or {}).items():
                stack.callback(_listen(self._layer.get_submodule(name), listener).remove)
            if before is not None:
                hook = self._layer.get_submodule(before).register_forward_pre_hook(_stop)
                stack.callback(hook.remove)
            if behind is not None:
                stack.callback(self._layer.get_submodule(behind).register_forward_hook(_stop).remove)
            try:
                output: Tensor = functional_call(self._layer, weights, (batch,), positions)
            except _Reached:
                return None
        return output

    def _record(self, name: str, window: slice) -> Any:
        kept = self._kept.setdefault(name, torch.empty_like(self.hidden))

        def store(_module: nn.Module, _arguments: Any, output: Any) -> None:
            if isinstance(output, tuple):  # an attention gives its weights as well, or None
                self._tuples.add(name)
                output = output[0]
            kept[window] = output.to(kept.device)

        return self._layer.get_submodule(name).register_forward_hook(store)

    def _replay(self, stack: ExitStack, name: str, window: slice) -> None:
        module = self._layer.get_submodule(name)
        is_tuple = name in self._tuples

        def forward(inputs: Tensor | None = None, **options: Any) -> Any:
            like = options["hidden_states"] if inputs is None else inputs
            kept = self._kept[name][window].to(like.device)
            return (kept, None) if is_tuple else kept

        module.__dict__["forward"] = forward
        stack.callback(module.__dict__.pop, "forward")


class _Reached(Exception):
    """Raised in a hook: the rest of the block has nothing to tell."""


def _listen(module: nn.Module, listener: Callable[[Tensor], None]) -> Any:
    def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        listener(arguments[0])

    return module.register_forward_pre_hook(hook)


def _stop(*_arguments: Any) -> None:
    raise _Reached
