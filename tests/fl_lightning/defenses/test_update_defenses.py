"""Values of each defence of an update, on small tensors."""

import math

import pytest
import torch

from fl_lightning.defenses import (
    DPSGD,
    QSGD,
    AdaptiveClipping,
    Clipping,
    Defense,
    DPFedAvg,
    GaussianNoise,
    HalfPrecision,
    LocalDP,
    Quantization,
    RandomK,
    Sign,
    TopK,
    UpdateDefense,
    defenses_of,
    describe_defenses,
    memory_of,
    occasions,
)
from fl_lightning.defenses.privacy import epsilon_of
from fl_lightning.storage import StorageError

SMALL = {"a": torch.tensor([[3.0, -1.0], [0.5, 2.0]]), "b": torch.tensor([4.0, -8.0])}


def applied(defense: UpdateDefense, update: dict, memory: dict | None = None, seed: int = 0) -> tuple[dict, dict]:
    (used,) = occasions([defense], update, seed, memory or {})
    return defense.on_update(update, used[1]), memory_of([used])


def large(seed: int = 0) -> dict:
    return {"w": torch.randn(300, 200, generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize(
    ("defense", "expected"),
    [
        (TopK(keep=0.5), {"a": [[3, 0], [0, 2]], "b": [0, -8]}),
        (TopK(keep=0.5, per_layer=False), {"a": [[3, 0], [0, 0]], "b": [4, -8]}),
        (TopK(keep=0.01), {"a": [[3, 0], [0, 0]], "b": [0, -8]}),  # at least one of a layer
        (Sign(), {"a": [[1.625, -1.625], [1.625, 1.625]], "b": [6, -6]}),
        (Sign(scale=0.5), {"a": [[0.5, -0.5], [0.5, 0.5]], "b": [0.5, -0.5]}),
        (Quantization(bits=2), {"a": [[3, 0], [0, 3]], "b": [0, -8]}),  # 4 / 8 is rounded to even
        (Quantization(bits=3, range=3.0), {"a": [[3, -1], [0, 2]], "b": [3, -3]}),
        (Clipping(norm=100.0), {"a": [[3, -1], [0.5, 2]], "b": [4, -8]}),
    ],
    ids=str,
)
def test_deterministic_operators(defense: UpdateDefense, expected: dict) -> None:
    found, _ = applied(defense, SMALL)
    assert {name: tensor.tolist() for name, tensor in found.items()} == expected


def test_clipping_bounds_the_norm_over_all_layers() -> None:
    found, _ = applied(Clipping(norm=2.0), SMALL)
    factor = 2 / (9 + 1 + 0.25 + 4 + 16 + 64) ** 0.5
    for name, tensor in SMALL.items():
        torch.testing.assert_close(found[name], tensor * factor)


def test_gaussian_noise_has_its_standard_deviation() -> None:
    update = {"w": 3 * large()["w"], "v": torch.zeros(300, 200)}
    for defense, std in ((GaussianNoise(std=0.2), 0.2), (GaussianNoise(rho=2.0), 2 * 3 / 2**0.5)):
        found, _ = applied(defense, update)
        noise = torch.stack([found[name] - update[name] for name in update])
        assert noise.std().item() == pytest.approx(std, rel=0.02)
        assert abs(noise.mean().item()) < 0.02 * std
        assert not torch.equal(noise[0], noise[1])
    clipped, _ = applied(GaussianNoise(std=1e-6, clip=0.5), update)
    assert torch.stack([tensor.norm() for tensor in clipped.values()]).norm().item() == pytest.approx(0.5, rel=1e-3)


def test_stochastic_rounding_is_right_on_average_and_on_its_grid() -> None:
    update = {"w": torch.tensor([1.0, -0.3, 0.1, 0.0]).repeat(4000, 1)}
    found = applied(Quantization(bits=3, stochastic=True), update)[0]["w"]
    assert {round(3 * value, 4) for value in found.unique().tolist()} == {-1, 0, 1, 3}
    torch.testing.assert_close(found.mean(0), update["w"][0], atol=0.02, rtol=0)
    assert applied(Quantization(bits=3), update)[0]["w"][0].tolist() == pytest.approx([1, -1 / 3, 0, 0])


def test_qsgd_rounds_to_levels_of_each_buckets_norm() -> None:
    update = {"w": torch.tensor([3.0, -4.0, 1.0, 0.0, 0.0, 0.0, 6.0])}
    many = torch.stack([applied(QSGD(levels=2, bucket=3), update, seed=seed)[0]["w"] for seed in range(2000)])
    norms = torch.tensor([26.0**0.5] * 3 + [1.0] * 3 + [6.0])
    steps = many / norms * 2
    torch.testing.assert_close(steps, steps.round(), atol=1e-5, rtol=0)
    torch.testing.assert_close(many.mean(0), update["w"], atol=0.15, rtol=0)
    assert (many[:, 3:] == update["w"][3:]).all()


def test_random_k_keeps_other_entries_each_time() -> None:
    update = {"w": torch.ones(1000), "v": torch.ones(10)}
    first, second = (applied(RandomK(keep=0.2), update, seed=seed)[0] for seed in (0, 1))
    assert (first["w"].sum(), first["v"].sum()) == (200, 2)
    assert 10 < (first["w"] * second["w"]).sum() < 90


@pytest.mark.parametrize("per_layer", [True, False])
def test_error_feedback_sends_everything_in_the_end(per_layer: bool) -> None:
    defense, memory = TopK(keep=0.5, per_layer=per_layer, error_feedback=True), {}
    total = {name: torch.zeros_like(tensor) for name, tensor in SMALL.items()}
    for _ in range(6):
        sent, memory = applied(defense, SMALL, memory)
        total = {name: total[name] + tensor for name, tensor in sent.items()}
    for name, tensor in SMALL.items():
        torch.testing.assert_close(total[name] + memory[f"0/{name}"], 6 * tensor)
    assert total["a"][0, 1] <= -3  # too small to be sent in the first rounds, then all at once


def test_the_same_seed_gives_the_same_numbers_and_a_list_independent_ones() -> None:
    update = large()
    noise = GaussianNoise(std=1.0)
    once, again, other = (applied(noise, update, seed=seed)[0]["w"] for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    first, second = (defense.on_update(update, own)["w"] for defense, own in occasions([noise, noise], update, 1, {}))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: GaussianNoise(), "either std > 0 or rho > 0"),
        (lambda: GaussianNoise(std=1.0, rho=1.0), "either std > 0 or rho > 0"),
        (lambda: GaussianNoise(std=float("inf")), "either std > 0"),
        (lambda: GaussianNoise(rho=1.0, clip=0.0), "clip > 0"),
        (lambda: Clipping(norm=0.0), "norm > 0"),
        (lambda: TopK(keep=0.0), r"TopK needs keep in \(0, 1\]"),
        (lambda: RandomK(keep=1.1), r"RandomK needs keep in \(0, 1\]"),
        (lambda: Quantization(bits=1), "bits from 2 to 24.*Sign"),
        (lambda: QSGD(levels=0), "levels >= 1"),
        (lambda: Sign(scale=-1.0), "scale > 0"),
    ],
)
def test_impossible_settings_are_refused(make: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_defences_are_described_and_made_again() -> None:
    defenses = [GaussianNoise(rho=0.5), TopK(keep=0.01, error_feedback=True), Sign()]
    assert defenses_of(describe_defenses(defenses)) == defenses
    for described, sentence in (
        ({"class_path": "os.system", "init_args": {"command": "true"}}, "no such class is loaded"),
        ({"class_path": "fl_lightning.defenses.top_k.TopK", "init_args": {"share": 1}}, "settings that TopK does not"),
    ):
        with pytest.raises(StorageError, match=sentence):
            defenses_of([described])
    assert issubclass(TopK, Defense)


@pytest.mark.parametrize(("kind", "expected"), [("fp16", [1.0009765625, 0.0]), ("bf16", [1.0, 1e-8])])
def test_half_precision_rounds_to_16_bits(kind: str, expected: list[float]) -> None:
    found = applied(HalfPrecision(kind=kind), {"w": torch.tensor([1.001, 1e-8])})[0]["w"]
    assert found.tolist() == pytest.approx(expected, rel=4e-3)


def test_adaptive_clipping_follows_the_median_of_norms() -> None:
    defense, memory = AdaptiveClipping(initial=1.0, lr=0.5), {}
    for round_ in range(30):
        ((_, own),) = occasions([defense], {}, round_, memory)
        sent = [defense.on_arrival({"w": torch.tensor([float(norm)])}, 1, own)["w"].item() for norm in (1, 2, 5, 9, 20)]
        defense.on_mean({"w": torch.zeros(1)}, own)
        memory = memory_of([(defense, own)])
        if round_ == 0:
            assert sent == [1] * 5
            assert memory["0/norm"].item() == pytest.approx(math.exp(-0.5 * (0.2 - 0.5)))
    assert 4 < memory["0/norm"].item() < 6.5
    assert sent[:2] == [1, 2]
    assert sent[3] == sent[4] < 6.5


def test_dp_fed_avg_adds_what_one_client_can_hide_in() -> None:
    defense = DPFedAvg(norm=0.5, noise_multiplier=2.0)
    ((_, own),) = occasions([defense], {}, 0, {})
    arrived = [defense.on_arrival(large(seed), count, own) for seed, count in ((0, 30), (1, 10))]
    assert all(update["w"].norm().item() == pytest.approx(0.5) for update in arrived)
    noise = defense.on_mean({"w": torch.zeros(300, 200)}, own)["w"]
    assert noise.std().item() == pytest.approx(2.0 * 0.5 * 0.75, rel=0.02)
    assert memory_of([(defense, own)]) == {}


def test_local_dp_is_flowers() -> None:
    found, _ = applied(LocalDP(norm=1e-3, epsilon=2.0, delta=1e-3), large())
    expected = 2e-3 * math.sqrt(2 * math.log(1.25 / 1e-3)) / 2.0
    assert found["w"].std().item() == pytest.approx(expected, rel=0.02)


def test_epsilon_is_that_of_gaussian_mechanisms() -> None:
    """Against the exact curve of one Gaussian mechanism (Balle and Wang 2018), to which T of them are equal."""

    def delta_at(epsilon: float, sensitivity: float) -> float:
        def phi(x: float) -> float:
            return 0.5 * math.erfc(-x / math.sqrt(2))

        half, ratio = sensitivity / 2, epsilon / sensitivity
        return phi(half - ratio) - math.exp(epsilon) * phi(-half - ratio)

    for multiplier, steps in ((1.0, 1), (2.0, 20), (0.5, 3)):
        epsilon = epsilon_of(multiplier, steps, 1e-5)
        exact = delta_at(epsilon, math.sqrt(steps) / multiplier)
        assert exact <= 1e-5  # an upper bound
        assert delta_at(0.85 * epsilon, math.sqrt(steps) / multiplier) > 1e-5  # and not far above
    assert DPSGD(noise_multiplier=2.0).privacy(5, 4).epsilon == pytest.approx(epsilon_of(2.0, 20, 1e-5))
    assert DPFedAvg(noise_multiplier=2.0).privacy(20, 4).epsilon == pytest.approx(epsilon_of(2.0, 20, 1e-5))
    assert GaussianNoise(std=1.0).privacy(1, 1) is None
