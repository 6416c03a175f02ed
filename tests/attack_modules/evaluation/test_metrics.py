import math
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
    visual_information_fidelity,
)
from torchvision.models import alexnet
from torchvision.transforms.functional import pil_to_tensor

from attack_modules.evaluation import metrics, perceptual
from attack_modules.evaluation.metrics import Scorecard, attribution, score
from attack_modules.evaluation.perceptual import Lpips
from attack_modules.evaluation.recognisers import Recogniser
from fl_lightning.storage import StorageError

IMAGENET = Path(__file__).parents[4] / "shared" / "data" / "imagenet-sample"


def images(count: int, side: int = 16, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def recogniser() -> Recogniser:
    return Recogniser()


class TestScore:
    def test_psnr_by_hand(self) -> None:
        originals = torch.stack([torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), 0.7)])
        reconstructions = torch.stack([torch.full((3, 8, 8), 0.8), torch.full((3, 8, 8), 0.2)])
        reconstructions[1, 0] = 0.5  # a third of its pixels is wrong by 0.3
        card = score(reconstructions, originals, None, torch.tensor([0, 1]))
        assert card.assignment.tolist() == [1, 0]
        assert card.per_image["psnr"].tolist() == pytest.approx([-10 * math.log10(0.09 / 3), 20.0], abs=1e-4)

    def test_clamps_before_measuring(self) -> None:
        originals = torch.full((1, 3, 8, 8), 0.9)
        card = score(torch.full((1, 3, 8, 8), 7.0), originals, None, torch.tensor([0]))
        assert card.per_image["psnr"].item() == pytest.approx(20.0, abs=1e-4)

    def test_identical_images(self) -> None:
        originals = images(3, side=176)
        card = score(originals.flip(0), originals, None, torch.arange(3))
        assert list(card.per_image) == ["psnr", "ssim", "ms_ssim", "vif"]
        assert card.per_image["psnr"].tolist() == [math.inf] * 3
        for name in ("ssim", "ms_ssim", "vif"):
            assert card.per_image[name].tolist() == pytest.approx([1.0] * 3, abs=1e-4)

    def test_each_image_has_the_value_torchmetrics_gives_it_alone(self) -> None:
        originals = images(metrics.BATCH + 2, side=176, channels=1)
        reconstructions = (originals + 0.3 * images(len(originals), side=176, channels=1, seed=1)).clamp(0, 1)
        card = score(reconstructions.roll(1, 0), originals, None, torch.arange(len(originals)))
        for i in (0, metrics.BATCH, metrics.BATCH + 1):
            pair = reconstructions[i : i + 1], originals[i : i + 1]
            expected = {
                "ssim": structural_similarity_index_measure(*pair, data_range=1.0),
                "ms_ssim": multiscale_structural_similarity_index_measure(*pair, data_range=1.0),
                "vif": visual_information_fidelity(pair[0] * 255, pair[1] * 255),
            }
            for name, value in expected.items():
                assert card.per_image[name][i].item() == pytest.approx(value.item(), abs=1e-5)

    @pytest.mark.parametrize(
        ("side", "columns"),
        [
            (5, ["psnr"]),
            (6, ["psnr", "ssim"]),
            (40, ["psnr", "ssim"]),
            (41, ["psnr", "ssim", "vif"]),
            (175, ["psnr", "ssim", "vif"]),
            (176, ["psnr", "ssim", "ms_ssim", "vif"]),
        ],
    )
    def test_columns_where_the_size_allows(self, side: int, columns: list[str]) -> None:
        originals = images(1, side)
        assert list(score(originals, originals, None, torch.tensor([0])).per_image) == columns

    def test_what_was_not_reconstructed_has_not_leaked(self) -> None:
        originals = images(4)
        card = score(originals[[2, 0]] + 0.01, originals, torch.tensor([7, 9]), torch.tensor([9, 9, 7, 7]))
        assert card.assignment.tolist() == [1, -1, 0, -1]
        for name in ("psnr", "ssim"):
            assert card.per_image[name].isnan().tolist() == [False, True, False, True]
        assert card.per_image["label_correct"].tolist() == [1, 0, 1, 0]
        assert card.labels_found == 0.5
        summary = card.summary()
        assert (summary["originals"], summary["reconstructions"]) == (4, 2)
        assert summary["share_22db"] == summary["label_accuracy"] == 0.5
        assert summary["psnr_mean"] > 30

    def test_no_reconstruction_at_all(self) -> None:
        summary = score(images(0), images(2), torch.tensor([], dtype=torch.long), torch.tensor([0, 1])).summary()
        assert math.isnan(summary["psnr_mean"]) and math.isnan(summary["psnr_min"])
        assert summary["share_18db"] == summary["label_accuracy"] == summary["labels_found"] == 0

    def test_labels_go_with_their_images_and_are_found_with_multiplicity(self) -> None:
        originals = images(5)
        labels = torch.tensor([3, 3, 3, 5, 8])
        inferred = torch.tensor([5, 3, 8, 3, 5])  # found: 3, 3, 5, 8; the second 5 counts for nothing
        card = score(originals, originals, inferred, labels)
        assert card.per_image["label_correct"].tolist() == [0, 1, 0, 0, 0]
        assert card.labels_found == 0.8

    def test_surplus_reconstructions_are_counted(self) -> None:
        everything = images(5)
        card = score(everything, everything[:2], torch.arange(5), torch.tensor([0, 4]))
        assert card.summary()["reconstructions"] == 5
        assert card.per_image["label_correct"].tolist() == [1, 0]
        assert card.labels_found == 1

    def test_the_same_inside_bf16_autocast(self) -> None:
        originals = images(2, side=48)
        reconstructions = originals * 0.98 + 0.01
        plain = score(reconstructions, originals, None, torch.arange(2)).per_image
        with torch.autocast("cpu", torch.bfloat16):
            mixed = score(reconstructions, originals, None, torch.arange(2)).per_image
        assert all(torch.equal(plain[name], mixed[name]) for name in plain)

    def test_refuses_what_does_not_fit(self) -> None:
        with pytest.raises(ValueError, match="no original"):
            score(images(1), images(0), None, torch.arange(0))
        with pytest.raises(ValueError, match="3 labels came with 2 originals"):
            score(images(2), images(2), None, torch.arange(3))
        with pytest.raises(ValueError, match="1 inferred labels came with 2 reconstructions"):
            score(images(2), images(2), torch.arange(1), torch.arange(2))


class TestSummary:
    def test_numbers_of_known_scores(self) -> None:
        decibels = [17.9, 18.1, 20.1, 26.0]
        card = Scorecard(torch.tensor([0, 1, 2, 3, -1]), {"psnr": torch.tensor([*decibels, math.nan])}, 4, None)
        assert card.summary() == pytest.approx(
            {
                "originals": 5,
                "reconstructions": 4,
                "psnr_mean": sum(decibels) / 4,
                "psnr_median": 19.1,
                "psnr_min": 17.9,
                "share_18db": 3 / 5,
                "share_20db": 2 / 5,
                "share_22db": 1 / 5,
            }
        )

    def test_a_threshold_is_reached_by_equality(self) -> None:
        card = Scorecard(torch.tensor([0]), {"psnr": torch.tensor([20.0])}, 1, None)
        assert [card.summary()[f"share_{threshold}db"] for threshold in metrics.THRESHOLDS] == [1, 1, 0]


class TestLpips:
    @pytest.fixture(autouse=True)
    def empty_folders(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr(perceptual, "CHECKPOINTS", tmp_path / "checkpoints")
        perceptual._warn_without_lpips.cache_clear()

    @staticmethod
    def put_weights(folder: Path) -> dict[str, Tensor]:
        weights = {key: value for key, value in alexnet().state_dict().items() if key.startswith("features")}
        folder.mkdir(parents=True)
        torch.save(weights, folder / "alexnet-owt-7be5be79.pth")
        return weights

    def test_missing_weights_warn_once_and_say_what_to_do(self, tmp_path: Path) -> None:
        with pytest.warns(UserWarning) as caught:
            assert Lpips.if_available() is None
            assert Lpips.if_available() is None
        assert len(caught) == 1
        message = str(caught[0].message)
        for part in ("alexnet-owt-7be5be79.pth", "https://", str(tmp_path / "hub"), str(tmp_path / "checkpoints")):
            assert part in message
        assert "lpips" not in score(images(1, 32), images(1, 32), None, torch.tensor([0])).per_image

    @pytest.mark.parametrize("folder", ["hub/checkpoints", "checkpoints"])
    def test_found_weights_are_used(self, tmp_path: Path, folder: str) -> None:
        weights = self.put_weights(tmp_path / folder)
        state = torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lpips = Lpips.if_available()
        assert torch.equal(torch.get_rng_state(), state)
        assert lpips
        assert torch.equal(lpips.network.net.slice1[0].weight, weights["features.0.weight"])
        assert torch.equal(lpips.network.net.slice5[0].bias, weights["features.10.bias"])

        originals = images(2, side=32)
        reconstructions = originals.clone()
        reconstructions[1] = images(1, side=32, seed=1)
        card = score(reconstructions, originals, None, torch.arange(2), lpips=lpips)
        same, different = card.per_image["lpips"].tolist()
        assert same == 0 and different > 0
        assert "lpips_mean" in card.summary()

    def test_grey_and_too_small_images(self, tmp_path: Path) -> None:
        self.put_weights(tmp_path / "checkpoints")
        lpips = Lpips.if_available()
        for side, measured in ((30, False), (31, True)):
            grey = images(1, side, channels=1)
            assert ("lpips" in score(grey, grey, None, torch.tensor([0]), lpips=lpips).per_image) == measured

    def test_refuses_foreign_and_truncated_files(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        torch.save({"features.0.weight": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match="does not hold torchvision's AlexNet"):
            Lpips(path)
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(StorageError, match="cannot be read"):
            Lpips(path)


class TestRecogniser:
    def test_recognises_photographs(self, recogniser: Recogniser) -> None:
        if not IMAGENET.is_dir():
            pytest.skip(f"needs the ImageNet sample in '{IMAGENET}'")
        labels = torch.arange(0, 1000, 25)
        synsets = sorted(IMAGENET.iterdir())
        pictures = [Image.open(next(synsets[label].glob("*.jpg"))).convert("RGB") for label in labels]
        photographs = torch.stack([pil_to_tensor(picture) for picture in pictures]) / 255
        photographs = F.interpolate(photographs, (128, 128), mode="bicubic", antialias=True)
        top1, top5 = recogniser(photographs, labels)  # of all 1000: 75 % and 93 %
        assert top1.float().mean() > 0.6 and top5.float().mean() > 0.85
        assert (top5 >= top1).all()

        card = score(photographs[[1, 0]], photographs[:4], None, labels[:4], recogniser)
        assert card.per_image["original_top5"].tolist() == top5[:4].tolist()
        assert card.per_image["recognised_top5"].tolist() == [*top5[:2].tolist(), 0, 0]

    def test_small_and_grey_images(self, recogniser: Recogniser) -> None:
        grey = images(2, side=32, channels=1)
        labels = torch.tensor([1, 2])
        top1, top5 = recogniser(grey, labels)
        assert top1.shape == top5.shape == (2,) and top1.dtype == torch.bool
        likeliest = recogniser.network(recogniser._preprocess(grey.expand(-1, 3, -1, -1))).topk(5).indices
        assert recogniser(grey, likeliest[:, 0])[0].all()
        assert not recogniser(grey, likeliest[:, 4])[0].any() and recogniser(grey, likeliest[:, 4])[1].all()

    def test_nothing_reconstructed(self, recogniser: Recogniser) -> None:
        card = score(images(0, 32), images(2, 32), None, torch.tensor([0, 1]), recogniser)
        assert card.summary()["recognised_top1"] == 0

    def test_leaves_the_random_state_alone(self) -> None:
        state = torch.get_rng_state()
        Recogniser()
        assert torch.equal(torch.get_rng_state(), state)

    def test_refuses_labels_that_are_not_imagenets(self, recogniser: Recogniser) -> None:
        with pytest.raises(ValueError, match="labels 0 to 999, but labels run from 3 to 1000"):
            recogniser(images(2), torch.tensor([3, 1000]))


def test_attribution_counts_pairs_that_belong_together() -> None:
    clients, assignment = torch.tensor([0, 0, 3, 3, 4]), torch.tensor([3, 2, 1, 0, -1])
    found = attribution(torch.tensor([8, 8, 5, 5]), clients, assignment)
    assert found == {"peers": 2, "clients": 3, "adjusted_rand": 1.0}
    crossed = torch.tensor([0, 2, 1, 3, -1])
    assert attribution(torch.tensor([8, 5, 8, 5]), clients, crossed)["adjusted_rand"] == 1
    assert attribution(torch.zeros(4).long(), clients, assignment)["adjusted_rand"] == 0
    assert attribution(torch.tensor([0, 1, 0, 1]), clients, assignment)["adjusted_rand"] < 0
