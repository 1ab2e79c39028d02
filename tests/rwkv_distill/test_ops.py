"""The names that other programs import."""

import inspect

from rwkv_distill import ops, reference


def test_every_operator_has_a_definition_that_takes_the_same_arguments_first() -> None:
    assert ops.__all__ == reference.__all__
    for name in ops.__all__:
        defined = list(inspect.signature(getattr(reference, name)).parameters)
        offered = list(inspect.signature(getattr(ops, name)).parameters)
        assert offered[: len(defined)] == defined or set(defined) <= set(offered), name
