"""Every requirement: what meets it, and what the sentence says otherwise."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRound, ObservedRounds, RoundsSummary
from attack_modules.threat_model.requirements import (
    FullBatches,
    ImageSize,
    KnownClientSizes,
    KnownLabelsByPeer,
    LinearHead,
    NoBatchNorm,
    NoRandomLayers,
    OtherImages,
    ReadableDropout,
    Requirement,
    RequirementError,
    SingleRound,
    TwoLayersForSeveralRounds,
    check,
)
from fl_lightning.client import LocalTraining
from fl_lightning.federation import Federation
from fl_lightning.models import ClassifierFactory, TorchvisionClassifier

Observe = Callable[..., ObservedRound]


@pytest.fixture
def met(observe: Observe) -> RoundsSummary:
    """Two linear layers, one round, full batches, all told."""
    return RoundsSummary.of([observe(Federation())], dataset="NoiseImages")


def changed(summary: RoundsSummary, **assumptions: object) -> RoundsSummary:
    return replace(summary, assumptions=[replace(summary.assumptions[0], **assumptions)])


ALL = [
    SingleRound(),
    LinearHead(),
    TwoLayersForSeveralRounds(),
    FullBatches(),
    KnownClientSizes(2),
    KnownLabelsByPeer(),
    NoRandomLayers(),
    NoBatchNorm(),
    ImageSize(8, rgb=True, reason="that"),
    OtherImages("Photographs"),
]


def test_all_are_met(met: RoundsSummary) -> None:
    check(ALL, met, "The attack")


def refused(requirement: Requirement, rounds: RoundsSummary, sentence: str) -> None:
    with pytest.raises(RequirementError, match=rf"^The attack requires {requirement.name}, but .*{sentence}"):
        check([requirement], rounds, "The attack")


def test_each_names_what_is_missing_and_what_to_do(
    met: RoundsSummary, observe: Observe, linear_classifier: ClassifierFactory, batch_norm_classifier: ClassifierFactory
) -> None:
    two = replace(met, assumptions=[*met.assumptions, *met.assumptions])
    refused(SingleRound(), two, r"2 were observed. Name one in `federation.observed_rounds`\.$")
    part = SingleRound("model.convolutions")
    refused(
        part, two, "Name one in `federation.observed_rounds`, or set `model.convolutions: null`, by which all are read"
    )
    refused(
        part,
        replace(two, clients=(0, 1)),
        "`federation.seat.secure_aggregation: true`, or set `model.convolutions: null`",
    )
    narrow = RoundsSummary.of([observe(Federation(model=linear_classifier))] * 2)
    refused(TwoLayersForSeveralRounds(), narrow, "LinearClassifier has one layer and 2 rounds were observed")
    batches = changed(met, batch_size=1, client_sizes=[2, 2])
    refused(FullBatches(), batches, "they train in batches of 1.*`model.refinement: null`")
    refused(KnownClientSizes(), changed(met, client_sizes=None), "knows neither.*`knowledge.num_clients`")
    refused(KnownClientSizes(3), met, r"2 peers cannot be divided among 3 processes")
    unknown = changed(met, sources={"labels": "inferred", "label_counts": "known"})
    refused(KnownLabelsByPeer(), unknown, "only their counts are known.*`model.merged: true`, or `knowledge.labels")
    normed = RoundsSummary.of([observe(Federation(model=batch_norm_classifier))])
    refused(NoBatchNorm(), normed, "BatchNormClassifier has it")
    refused(ImageSize(32, rgb=False, reason="`x`"), met, "they are 3 x 16 x 16. Change `data.image_size` or `x`")
    refused(ImageSize(8, rgb=True, reason="`x`"), replace(met, image_shape=(1, 16, 16)), "they are 1 x 16 x 16")
    refused(OtherImages("NoiseImages"), met, "these are of `NoiseImages`")


def test_random_layers(observe: Observe) -> None:
    def with_dropout(num_classes: int, image_shape: tuple[int, int, int]) -> TorchvisionClassifier:
        return TorchvisionClassifier(num_classes, image_shape, name="mobilenet_v3_small", dropout=0.2)

    training = LocalTraining(local_epochs=1)
    random = RoundsSummary.of([observe(Federation(model=with_dropout, client=training), image_size=32)])
    refused(NoRandomLayers(), random, r"is random while it trains: features.classifier.2 \(Dropout\)")
    assert ReadableDropout().violation(random) is None  # in front of the head, and one step
    refused(ReadableDropout(), changed(random, local_epochs=2), "drops other units at each of 1 x 2 steps")


def test_rounds_are_refused_before_they_are_simulated(noise_images: type, tmp_path: str) -> None:
    data = noise_images(num_clients=3, images_per_client=2, image_size=16)
    rounds = ObservedRounds(Knowledge(), Federation(rounds=2, observed_rounds=[0, 1]), data, tmp_path / "record")
    with pytest.raises(RequirementError, match="2 were observed"):
        check([SingleRound()], rounds.summary(), "The attack")
    assert not (tmp_path / "record").exists()
