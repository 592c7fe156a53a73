"""The dynamic loss scale, step by step, against its rule written down as arithmetic."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from deepspeedlite.optim.precision import LossScaler
from deepspeedlite.runtime.errors import LossScaleError


def rule(overflows: Iterable[bool], scale: float, window: int, hysteresis: int, consecutive: bool) -> list[float]:
    """The scale after each step: halved by overflows, the first `hysteresis - 1` of a run of growth excepted, and
    doubled by the good step after `window`, `2 * window`, ... good ones in a row.
    """
    seen, left, good = [], hysteresis, 0
    for overflow in overflows:
        if overflow:
            left, scale, good = (left - 1, scale, 0) if left > 1 else (left, scale / 2, 0)
        else:
            grows = good > 0 and good % window == 0
            scale, left = scale * (2 if grows else 1), hysteresis if grows or consecutive else left
            good += 1
        seen.append(scale)
    return seen


def follow(scaler: LossScaler, overflows: Iterable[bool]) -> list[float]:
    seen = []
    for overflow in overflows:
        scaler.update(overflow)
        seen.append(scaler.scale)
    return seen


def test_known_sequences():
    overflows = [step in (3, 5, 6) for step in range(1, 11)]
    known = {
        1: [256, 256, 128, 128, 64, 32, 32, 32, 64, 64],
        2: [256, 256, 256, 256, 128, 64, 64, 64, 128, 128],
        3: [256, 256, 256, 256, 256, 128, 128, 128, 256, 256],
    }
    for hysteresis, sequence in known.items():
        scaler = LossScaler(256.0, dynamic=True, window=2, hysteresis=hysteresis)
        assert follow(scaler, overflows) == sequence == rule(overflows, 256.0, 2, hysteresis, False)
    assert follow(LossScaler(1.0, dynamic=True, window=3), [False] * 8) == [1, 1, 1, 2, 2, 2, 4, 4]


@pytest.mark.parametrize("consecutive", [False, True])
@pytest.mark.parametrize("hysteresis", [1, 2, 3])
def test_any_pattern_of_overflows(hysteresis, consecutive):
    dice = random.Random(hysteresis)
    for window in (1, 2, 3, 10):
        for chance in (0.02, 0.2, 0.5, 0.9):
            overflows = [dice.random() < chance for _ in range(200)]
            scaler = LossScaler(2.0**16, True, window, 0.0, hysteresis, consecutive)
            middle = follow(scaler, overflows[:77])
            resumed = LossScaler(3.0, True, window, 0.0, hysteresis, consecutive)
            resumed.load_state_dict(scaler.state_dict())
            assert middle + follow(resumed, overflows[77:]) == rule(overflows, 2.0**16, window, hysteresis, consecutive)


def test_an_overflow_at_the_smallest_scale_is_fatal():
    scaler = LossScaler(2.0, dynamic=True, min_scale=1.0, hysteresis=2)
    assert follow(scaler, [True, True]) == [2.0, 1.0]
    with pytest.raises(LossScaleError, match="smallest loss scale"):
        scaler.update(True)
    assert follow(LossScaler(8.0), [True, False]) == [8.0, 8.0], "a static scale stays"
