"""The forecast of a run's time, after its third step."""

from types import SimpleNamespace
from unittest import mock

import pytest

from attack_modules.evaluation.callback import Evaluation


@pytest.mark.parametrize(
    ("step", "said"), [(2.0, "194 s for the 97 steps that are left, 20 s for the verdict"), (0.1, "")]
)
def test_the_rest_is_told_once_where_it_takes_long(capsys: pytest.CaptureFixture, step: float, said: str) -> None:
    evaluation, attack = Evaluation(), SimpleNamespace(seconds_of_verdict=lambda: 10 * step, steps_loaded=0)
    for done in range(1, 8):
        now = 50.0 + step * done  # the first step, with what it warms up, ends late
        with mock.patch("attack_modules.evaluation.callback.time.perf_counter", return_value=now):
            evaluation._forecast(SimpleNamespace(global_step=done, max_steps=100), attack)
    told = capsys.readouterr().out
    assert said in told
    assert told.count("forecast") == bool(said)
