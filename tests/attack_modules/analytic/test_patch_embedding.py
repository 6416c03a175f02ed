"""Patch embeddings of several modules, and what an update shows of one."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from attack_modules.analytic.patch_embedding import OneImage, PatchEmbedding, PatchUpdate, TrainedPatchEmbedding
from attack_modules.threat_model.assumptions import Assumptions
from attack_modules.threat_model.observed import ObservedRound, RoundsSummary
from fl_lightning.models import ImageClassifier, LeNet5, WrappedClassifier
from fl_lightning.models.freezing import freeze
from fl_lightning.observation import Observation, describe_model

SHAPE = (3, 16, 16)
VIT = {"image_size": 16, "patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 48, "mlp_dim": 48}


class Overlapping(nn.Module):
    """Overlapping patches without a bias, positions first and two extra tokens behind, and dropout."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(16 + 2, 8))
        self.extra = nn.Parameter(torch.randn(2, 8))
        self.embed = nn.Conv2d(3, 8, 6, stride=4, padding=1, bias=False)
        self.between = between or nn.Identity()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.last = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.between(self.embed(x)).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens, self.extra.expand(len(x), -1, -1)], 1) + self.positions
        return self.last(self.layer(tokens).mean(1))


def vit() -> WrappedClassifier:
    return WrappedClassifier(10, SHAPE, VisionTransformer, {**VIT, "num_classes": 10}, mean=[0.4], std=[0.3])


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (vit(), ("conv_proj.weight", "conv_proj.bias", "encoder.pos_embedding", 1, 16)),
        (WrappedClassifier(10, SHAPE, Overlapping), ("embed.weight", None, "positions", 0, 16)),
        (WrappedClassifier(10, SHAPE, Overlapping(nn.BatchNorm2d(8))), None),
        (LeNet5(10, SHAPE), None),
    ],
    ids=["torchvision", "overlapping", "something between", "convolutional"],
)
def test_embeddings_are_found_by_their_gradients(model: ImageClassifier, expected: tuple | None) -> None:
    found = PatchEmbedding.of(model)
    assert (found and (found.weight, found.bias, found.position, found.first, found.positions)) == expected


@pytest.mark.parametrize("model", [vit(), WrappedClassifier(10, SHAPE, Overlapping, mean=[0.4], std=[0.3])])
def test_products_are_those_of_errors_and_patches_after_any_local_training(model: WrappedClassifier) -> None:
    """Three steps with momentum and dropout, in float64."""
    torch.manual_seed(0)
    image = torch.rand(1, *SHAPE, dtype=torch.float64)
    before = copy.deepcopy(model).double()
    nn.init.normal_(next(iter(before.head)).weight)  # torchvision's begins at 0
    after = copy.deepcopy(before).train()
    optimizer = torch.optim.SGD(after.parameters(), lr=0.5, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(after(image), torch.tensor([3])).backward()
        optimizer.step()
    observation = Observation(0, before.state_dict(), after.state_dict(), {}, 0.0, describe_model(model))
    seen, embedding = ObservedRound(observation, Assumptions(0.5, 3, momentum=0.9)), PatchEmbedding.of(model)
    update = PatchUpdate.of(seen, seen.peers_update(), embedding)
    expected = update.errors.T @ embedding.patches((image - 0.4) / 0.3)[0]
    torch.testing.assert_close(update.products, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    if embedding.bias:
        torch.testing.assert_close(update.total, update.errors.sum(0))
        frozen = seen.peers_update() | {embedding.bias: torch.zeros(VIT["hidden_dim"])}
        assert PatchUpdate.of(seen, frozen, embedding).total is None


def test_scattering_is_the_adjoint_of_gathering() -> None:
    embedding = PatchEmbedding.of(WrappedClassifier(10, SHAPE, Overlapping))
    image, patches = torch.randn(1, *SHAPE), torch.randn(1, 16, 3 * 36)
    inner = (embedding.patches(image) * patches).sum()
    torch.testing.assert_close(inner, (image * embedding.scattered(patches, SHAPE[1:])).sum())
    assert embedding.overlap == 4


def test_what_cannot_be_read_is_refused_in_a_sentence() -> None:
    def refusal(model: ImageClassifier, images: int | None = None) -> str | None:
        rounds = RoundsSummary(model, SHAPE, [Assumptions(0.1, 1, num_images=images)])
        return TrainedPatchEmbedding().violation(rounds) or OneImage().violation(rounds)

    assert "LeNet5 has none" in refusal(LeNet5(10, SHAPE))
    assert "leaves conv_proj.weight as it was" in refusal(freeze(vit(), {"conv_proj.weight"}))
    assert "there are 3, whose errors at a position add up" in refusal(vit(), 3)
    assert refusal(vit()) is refusal(vit(), 1) is None
