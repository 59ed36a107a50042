"""What is said of steps that are not finite."""

import math

import pytest

from openmythos.train.guards import Divergence


def test_a_warning_at_the_first_step_that_is_not_finite_and_no_other() -> None:
    seen = Divergence()
    values = [(2.0, 1.0), (math.nan, 1.0), (2.0, 1.0), (2.0, math.inf), (math.nan, math.nan)]
    warnings = [seen.saw(step, *each) for step, each in enumerate(values)]
    assert [bool(text) for text in warnings] == [False, True, False, False, False]
    assert warnings[1].startswith("step 1: the loss or its gradient is not finite")
    with pytest.raises(FloatingPointError, match="loss not finite since step 3: "):
        seen.check()


def test_a_step_in_between_is_no_divergence() -> None:
    seen = Divergence()
    seen.check()
    for step, loss in enumerate((2.0, math.nan, 2.0)):
        seen.saw(step, loss)
    seen.check()
