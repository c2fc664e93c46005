"""The tests run with type checks: arguments and results of wrong types and shapes are detected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

import tn_lens as tn
from tests import typechecker
from tests.typecheck import jaxtyped
from tn_lens.attribution.target import right_probability
from tn_lens.core.seeds import generator

if TYPE_CHECKING:
    from nowhere import Missing  # pyright: ignore[reportMissingImports]


@jaxtyped(typechecker=typechecker)
def doubled(value: int, *others: str, times: int = 2) -> int:
    return str(value) if others else times * value  # pyright: ignore[reportReturnType]


@jaxtyped(typechecker=typechecker)
def joined(left: Float[Tensor, "row column"], right: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    return left + right if left.sum() else left[0]


@jaxtyped(typechecker=typechecker)
def counted(n: int) -> Iterator[int]:
    yield from range(n)


@jaxtyped(typechecker=typechecker)
def with_a_missing_type(value: Missing, n: int) -> Missing:
    return value * n


@jaxtyped(typechecker=typechecker)
@dataclass
class Pair:
    left: int
    right: str


def nested(result: Any) -> Callable[..., int]:
    @jaxtyped(typechecker=typechecker)
    def inner(n: int, /, scale: float = 1.0, **options: int) -> int:
        return result

    return inner


def nested_of_arrays(result: Any) -> Callable[..., Any]:
    @jaxtyped(typechecker=typechecker)
    def inner(values: Float[Tensor, "row"]) -> Float[Tensor, "row"]:
        return result

    return inner


def test_right_types_pass() -> None:
    assert doubled(2) == 4
    assert joined(torch.ones(2, 3), torch.ones(2, 3)).sum() == 12
    assert list(counted(3)) == [0, 1, 2]
    assert with_a_missing_type("a", 2) == "aa"
    assert Pair(1, "a").right == "a"
    assert nested(5)(1, scale=2.0, more=3) == 5
    assert nested_of_arrays(torch.zeros(2))(torch.ones(2)).sum() == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: doubled("2"),
        lambda: doubled(2, 3),
        lambda: doubled(2, times="2"),
        lambda: doubled(2, "a"),  # returns a string
        lambda: joined(torch.ones(2, 3), torch.ones(3, 3)),
        lambda: joined(torch.zeros(2, 3), torch.zeros(2, 3)),  # returns a row
        lambda: joined(torch.ones(2, 3), torch.ones(2, 3).int()),
        lambda: counted("3"),
        lambda: with_a_missing_type("a", "b"),
        lambda: Pair(1, 2),
        lambda: nested(5)("1"),
        lambda: nested(5)(1, more="3"),
        lambda: nested("5")(1),
        lambda: nested_of_arrays(torch.zeros(2))(torch.ones(2, 2)),
        lambda: nested_of_arrays(torch.zeros(3))(torch.ones(2)),
        # functions of the package
        lambda: generator(1, "2"),
        lambda: right_probability(torch.ones(3), None),
        lambda: tn.Neuron("mlp", "0", None, 1),
    ],
)  # fmt: skip
def test_wrong_types_are_detected(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeCheckError):
        call()
