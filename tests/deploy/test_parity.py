import dataclasses

import pytest
import torch
from torch import Tensor

from qtvit.checkpoints import ModelInfo
from qtvit.deploy.artifact import Artifact
from qtvit.deploy.parity import Case, Gain, Report, check, synthetic_images, time_in_turns
from qtvit.deploy.runtimes import Runtime

SURE = torch.tensor([[4.0, 0.0], [0.0, 4.0], [1.0, 1.05]])


class Shifted(Runtime):
    """Says of pixels their mean, and 0; the second logit is shifted."""

    device = torch.device("cpu")

    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        self.shapes.append(tuple(pixels.shape))
        mean = pixels.mean((1, 2, 3))
        return torch.stack([mean, torch.full_like(mean, self.shift)], -1)


def artifact(precision: str = "fp32", *dynamic: str) -> Artifact:
    preprocess = {"size": [8, 12], "mean": [0.5] * 3, "std": [0.5] * 3}
    return Artifact(ModelInfo("qtvit_nano", {}, ["light", "dark"], preprocess), "onnx", precision, dynamic)


def test_a_case_compares_logits_and_classes() -> None:
    found = torch.tensor([[4.0, 0.0], [3.0, 2.0], [1.1, 1.0]])
    case = Case.compare((8, 12), 2, SURE, found)
    assert (case.num_images, case.scale, case.num_clear, case.num_agreeing) == (3, 4.0, 2, 1)
    assert case.agreement == 0.5
    assert case.max_diff == 3.0
    assert case.mean_diff == pytest.approx((3 + 2 + 0.1 + 0.05) / 6)


@pytest.mark.parametrize(
    ("precision", "found", "problem"),
    [
        ("fp32", SURE + 3e-4, None),
        (
            "fp32",
            SURE + 5e-4,
            "its logits differ by 0.0005 at 8x12 in batches of 2, with a largest logit of 4; allowed",
        ),
        ("fp16", SURE + 0.5, None),
        (
            "fp16",
            SURE.flip(1),
            "it gives the class of the network for 0 of 2 images at 8x12 in batches of 2; fp16 has to",
        ),
        ("int8", SURE * torch.tensor([[1.0], [torch.nan], [1.0]]), "its logits are not finite at 8x12 in batches of 2"),
        ("bf16", SURE * torch.tensor([[1.0], [1.0], [torch.inf]]), "its logits are not finite at 8x12 in batches of 2"),
    ],
)
def test_what_is_wrong_with_a_case(precision: str, found: Tensor, problem: str | None) -> None:
    said = Case.compare((8, 12), 2, SURE, found).problem(precision)
    assert said == problem if problem is None else said is not None and said.startswith(problem)


def test_agreement_is_asked_for_by_precision() -> None:
    expected = torch.tensor([[1.0, 0.0]]).repeat(100, 1)
    for num_wrong, passes in ((1, {"fp16", "bf16", "int8"}), (5, {"int8"}), (6, set())):
        found = expected.clone()
        found[:num_wrong] = found[:num_wrong].flip(1)
        case = Case.compare((8, 8), 1, expected, found)
        assert {name for name in ("fp16", "bf16", "int8") if case.problem(name) is None} == passes


def test_ties_alone_agree() -> None:
    case = Case.compare((8, 8), 1, torch.ones(3, 2), torch.ones(3, 2) * torch.tensor([1.0, 1.5]))
    assert (case.num_clear, case.agreement) == (0, 1.0)
    one_class = Case.compare((8, 8), 1, torch.ones(3, 1), torch.ones(3, 1))
    assert (one_class.num_clear, one_class.problem("fp32")) == (0, None)


def test_accuracy_may_drop_by_so_much() -> None:
    case = Case.compare((8, 8), 1, SURE, SURE)
    report = Report("int8", [case], (90.0, 89.0))
    assert report.problem() is None
    assert report.lines()[-1] == "top-1: 89.00 %, of the network 90.00 %"
    worse = dataclasses.replace(report, accuracy=(90.0, 88.5))
    assert worse.problem() == "its top-1 is 88.50 %, 1.50 points below the network's; allowed are 1"
    assert dataclasses.replace(worse, max_drop=2).problem() is None


def test_what_a_precision_brings() -> None:
    gain = Gain({"int8": 1_000_000, "fp32": 4_000_000}, {"int8": 0.002, "fp32": 0.003})
    report = Report("int8", [Case.compare((8, 8), 1, SURE, SURE)], gain=gain)
    assert report.lines()[-3:] == [
        "precision        size   one image  next to int8 (medians of 30 turns each)",
        "int8           1.0 MB     2.00 ms  1.00",
        "fp32           4.0 MB     3.00 ms  1.50",
    ]
    sizes = dict.fromkeys(("int8", "fp32", "bf16"), 1)
    assert Gain(sizes, {"int8": 0.1, "fp32": 0.2, "bf16": 0.105}).lines()[-1] == (
        "on this machine, bf16 is as fast as int8"
    )
    assert Gain(sizes, {"int8": 0.1, "fp32": 0.05, "bf16": 0.1}).lines()[-1] == (
        "on this machine, fp32 and bf16 are as fast as int8"
    )


def test_all_images_are_compared_and_a_few_at_other_sizes_and_batches() -> None:
    network, exported = Shifted(), Shifted(1e-6)
    images = synthetic_images(20, (8, 12))
    labels = [0, 1] * 10
    report = check(network, exported, artifact("fp32", "batch", "hw"), images, labels)
    assert network.shapes == exported.shapes
    assert network.shapes[:3] == [(8, 3, 8, 12), (8, 3, 8, 12), (4, 3, 8, 12)]
    cases = [(case.img_size, case.batch_size, case.num_images) for case in report.cases]
    assert cases == [
        ((8, 12), 8, 20),
        ((8, 12), 1, 8),
        ((8, 12), 3, 8),
        ((12, 18), 3, 8),
        ((11, 24), 3, 8),
        ((16, 16), 3, 8),
    ]
    assert report.problem() is None
    assert report.accuracy is not None
    assert report.accuracy[0] == report.accuracy[1]
    assert report.lines()[1].split()[:3] == ["8x12", "8", "20"]
    fixed = check(network, exported, artifact(), images[:3])
    assert [(case.img_size, case.batch_size, case.num_images) for case in fixed.cases] == [((8, 12), 1, 3)]
    assert fixed.accuracy is None


def test_synthetic_images_are_the_same_each_time_and_like_photographs() -> None:
    images = synthetic_images(4, (64, 64))
    again = synthetic_images(4, (64, 64))
    for image, other in zip(images, again, strict=True):
        assert isinstance(image, Tensor)
        assert torch.equal(image, other)
        assert image.shape == (3, 64, 64)
        assert image.std() > 0.05
        spectrum = torch.fft.rfft2(image).abs().mean(0)
        assert spectrum[1:4, 1:4].mean() > 5 * spectrum[20:32, 20:32].mean()
    assert not torch.equal(images[0], images[1])  # type: ignore[arg-type]


def test_runtimes_are_timed_in_turns() -> None:
    order: list[str] = []

    class Named(Shifted):
        def __call__(self, pixels: Tensor) -> Tensor:
            order.append(self.name)
            return super().__call__(pixels)

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    seconds = time_in_turns([Named("a"), Named("b")], torch.zeros(1, 3, 8, 8))
    assert order == ["a", "b"] * 35
    assert min(seconds) > 0
