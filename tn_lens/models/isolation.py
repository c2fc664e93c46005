"""Independence from the caller's settings of torch: the same call gives the same numbers whatever they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)

AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def default_modes() -> Iterator[None]:
    """Use torch's default grad mode, inference mode, autocast and default dtype, and restore the caller's afterwards."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for device in AUTOCAST_DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def evaluation_mode(model: object) -> Iterator[None]:
    """Put every module of a model into evaluation mode, and restore the mode of each one afterwards."""
    # a bridge does not list the Hugging Face model that it wraps; anything but a module is refused by the caller
    models = (model, getattr(model, "original_model", None))
    modules = dict.fromkeys(module for each in models if isinstance(each, nn.Module) for module in each.modules())
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False  # not .eval(), which also changes modules that were in evaluation mode
        yield
    finally:
        for module in training:
            module.training = True


def isolated(function: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Run a function of a model in `default_modes`, with the model in evaluation mode."""

    @wraps(function)
    def call(model: M, *args: P.args, **kwargs: P.kwargs) -> R:
        with evaluation_mode(model), default_modes():
            return function(model, *args, **kwargs)

    return call
