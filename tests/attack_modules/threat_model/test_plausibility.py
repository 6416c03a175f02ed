"""Rounds that are no rounds of SGD: refused, or named; honest ones pass without a word."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from attack_modules import FeatureInversion
from attack_modules.threat_model.observed import ObservedRound
from attack_modules.threat_model.plausibility import (
    ObservationError,
    against_own,
    doubts,
    looks_like_signs,
    refuse_impossible,
)
from fl_lightning.client import LocalTraining, Tensors
from fl_lightning.federation import Federation
from fl_lightning.models import VGG7, ClassifierFactory, LeNet5, ResNet9

Observe = Callable[..., ObservedRound]


@pytest.fixture
def seen(observe: Observe) -> ObservedRound:
    return observe(Federation())


def altered(seen: ObservedRound, **changes: object) -> ObservedRound:
    return replace(seen, observation=replace(seen.observation, **changes))


def spoilt(state: Tensors, value: float) -> Tensors:
    spoilt = {name: tensor.clone() for name, tensor in state.items()}
    spoilt["head.2.weight"][3, 5] = value
    return spoilt


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda o: {"before": spoilt(o.before, torch.nan)},
            r"before round 0 holds NaN or infinity in 'head\.2\.weight'",
        ),
        (lambda o: {"after": spoilt(o.after, torch.inf)}, "after round 0 holds NaN.*lower the clients' learning rate"),
        (lambda o: {"own_update": spoilt(o.own_update, -torch.inf)}, "own update of round 0 holds NaN"),
        (lambda o: {"own_weight": 1.0}, "own weight in round 0 is 1, but"),
        (lambda o: {"own_weight": -0.1}, r"is -0\.1, but it must be at least 0 and below 1"),
        (lambda o: {"own_weight": torch.nan}, "is nan, but"),
        (lambda o: {"after": o.before}, "before and after round 0 are the same"),
        (
            lambda o: {"after": {n: t - o.own_weight * o.own_update[n] for n, t in o.before.items()}},
            "differs by the rounding of its numbers alone: no peer trained",
        ),
    ],
)
def test_what_no_attack_can_read_is_refused(seen: ObservedRound, change: Callable, sentence: str) -> None:
    with pytest.raises(ObservationError, match=sentence) as refusal:
        refuse_impossible(altered(seen, **change(seen.observation)).observation)
    assert len(str(refusal.value)) <= 400


def test_an_attack_refuses_before_it_works(seen: ObservedRound, attack: Callable) -> None:
    with pytest.raises(ObservationError, match="are the same"):
        attack(FeatureInversion(), altered(seen, after=seen.observation.before), steps=1)


SEVERAL = LocalTraining(lr=0.05, local_epochs=3, momentum=0.9, weight_decay=0.01, batch_size=1)


@pytest.mark.parametrize(
    ("model", "training"),
    [(LeNet5, LocalTraining(local_epochs=1)), (LeNet5, SEVERAL), (VGG7, SEVERAL), (ResNet9, SEVERAL)],
)
def test_honest_rounds_pass_without_a_word(observe: Observe, model: ClassifierFactory, training: LocalTraining) -> None:
    honest = observe(Federation(model=model, client=training))
    refuse_impossible(honest.observation)
    assert not list(doubts(honest))


@pytest.mark.parametrize("told", [True, False])
def test_swapped_models_are_named(seen: ObservedRound, told: bool) -> None:
    if not told:
        seen = replace(seen, assumptions=replace(seen.assumptions, labels=None))
    swapped = altered(seen, before=seen.observation.after, after=seen.observation.before)
    assert not list(doubts(seen))
    (doubt,) = doubts(swapped)
    assert "the models before and after are swapped" in doubt


@pytest.mark.parametrize("precision", [torch.float16, torch.float32, torch.float64])
def test_an_own_update_of_another_precision_is_compared(seen: ObservedRound, precision: torch.dtype) -> None:
    """Of many classes, where it tells whether models were swapped."""
    before = {"head.weight": torch.rand(60, 4)}
    moved = {"head.weight": torch.rand(60, 4).to(precision)}
    for sign in (1, -1):
        after = {"head.weight": before["head.weight"] - sign * moved["head.weight"].float()}
        model = {"class_path": "", "init_args": {"num_classes": 60}}
        changed = replace(seen.observation, before=before, after=after, own_update=moved, model=model)
        assert against_own(changed) == (sign < 0)


@cache
def gradients(seed: int) -> tuple[Tensors, ...]:
    """Of one image each of two clients."""
    generator = torch.Generator().manual_seed(seed)
    model = LeNet5(10, (3, 16, 16))
    found = []
    for label in range(2):
        loss = torch.nn.functional.cross_entropy(
            model(torch.rand(1, 3, 16, 16, generator=generator)), torch.tensor([label])
        )
        found.append(
            dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, model.parameters()), strict=True))
        )
    return tuple(found)


def adam(gradient: Tensor) -> Tensor:
    weight = torch.zeros_like(gradient, requires_grad=True)
    weight.grad = gradient.clone()
    torch.optim.Adam([weight], lr=0.001).step()
    return -weight.detach()


def pruned(gradient: Tensor) -> Tensor:
    return gradient * (gradient.abs() >= gradient.abs().flatten().topk(max(gradient.numel() // 20, 1)).values[-1])


@pytest.mark.parametrize(
    ("sent", "signs"),
    [
        (adam, True),
        (torch.sign, True),
        (lambda gradient: gradient, False),
        (pruned, False),
        (lambda gradient: gradient + 10 * gradient.std() * torch.randn_like(gradient), False),  # a defence's noise
    ],
)
@pytest.mark.parametrize("clients", [1, 2])
def test_adam_and_signs_are_told_from_gradients(sent: Callable, signs: bool, clients: int) -> None:
    torch.manual_seed(0)
    sums = [{name: sent(g) for name, g in own.items()} for own in gradients(0)[:clients]]
    mean = {name: sum(own[name] for own in sums) / clients for name in sums[0]}
    assert looks_like_signs(mean) is signs
