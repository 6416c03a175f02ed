"""What the benchmarks compare is the same thing."""

from collections.abc import Callable

import pytest
from steps import step_of

from attack_modules.threat_model.observed import ObservedRound
from fl_lightning.federation import Federation


@pytest.mark.parametrize(("way", "exact"), [("merged", "yardstick"), ("chunks", "yardstick"), ("vmap", "loop")])
def test_the_gradient_is_that_of_the_plain_way(observe: Callable[..., ObservedRound], way: str, exact: str) -> None:
    seen = observe(Federation(), num_clients=3, images_per_client=2)
    gradient, plain = step_of(way, seen)().clone(), step_of(exact, seen)()
    assert (gradient - plain).norm() < 1e-4 * plain.norm()
