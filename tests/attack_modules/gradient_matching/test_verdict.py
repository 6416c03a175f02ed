import pytest

from attack_modules.attack import Level
from attack_modules.gradient_matching.verdict import judge


@pytest.mark.parametrize(
    ("misfit", "level"),
    [(0.0, Level.LIKELY), (0.3, Level.UNRELIABLE), (1.75, Level.NOT_READ), (float("nan"), Level.NOT_READ)],
)
def test_level_follows_the_misfit_and_is_never_certain(misfit: float, level: Level) -> None:
    found = judge(misfit, 3)
    assert found.levels == [level] * 3
    assert found.reasons
    assert found.advice


def test_a_layer_that_outweighs_all_others_does_not_make_images_likely() -> None:
    found = judge(0.04, 2, typical=7.3)
    assert found.levels == [Level.NOT_READ] * 2
    assert "of most parameters' updates they leave 730%" in found.reasons[0]
