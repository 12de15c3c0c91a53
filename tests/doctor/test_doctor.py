"""``qtvit doctor``: verdicts on operations whose numbers are known, and on networks that were tampered with."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from qtvit.checkpoints import load_model, save_model
from qtvit.doctor import Report, examine
from qtvit.doctor.int8 import SCHEMES, Calibration, fake_int8, fake_int8_weight
from qtvit.doctor.measure import Ranges
from qtvit.doctor.report import MIN_INT8_SNR, Operation, Run
from qtvit.doctor.runs import layer_names, run_all
from qtvit.doctor.text import lines
from qtvit.models import Architecture, QTViT
from qtvit.tasks.classify.predict import ClassPredictor
from qtvit_cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of blobs, in two folders."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for index in range(6):
        blobs = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        folder = root / "ab"[index % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(blobs).resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return root


class Steps(nn.Module):
    """One operation after the other on an (B, N) input, to which the last result is of no account."""

    def __init__(self, *steps: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def examined(model: nn.Module, *batches: Tensor) -> tuple[dict[str, Operation], dict[tuple[str, bool], Run]]:
    """The operations by their place and name, and the runs by theirs."""
    operations, runs = run_all(model.eval(), batches)
    by_name = {f"{op.site.module}.{op.site.op}.{op.site.number}".lstrip("."): op for op in operations}
    return by_name, {(run.name, run.cast): run for run in runs}


def only(model: nn.Module, *batches: Tensor) -> Operation:
    """The last operation."""
    return list(examined(model, *batches)[0].values())[-1]


def test_ranges_over_all_batches() -> None:
    op = only(Steps(torch.neg), torch.tensor([[1.0, 0.0, -3.0]]), torch.tensor([[2e-8, 1e-6, 5.0], [0.0, 0.5, 7.0]]))
    found = op.numbers
    assert (found.low, found.high, found.largest, found.count, found.zeros) == (-7, 3, 7, 9, 2)
    assert found.smallest == pytest.approx(2e-8)
    assert (found.flushed, found.subnormal, found.non_finite) == (1, 2, 0)
    assert op.verdict("fp16") == op.verdict("bf16") == "ok"


def test_what_fp16_makes_of_small_numbers() -> None:
    x = 2.0 ** torch.arange(-30, -9, 0.25)[None]
    found = only(Steps(torch.neg), x).numbers
    assert found.flushed == int((x.half() == 0).sum())
    assert found.subnormal == int((x < torch.finfo(torch.float16).tiny).sum())


@pytest.mark.parametrize(
    ("largest", "verdict"), [(8187.0, "ok"), (8192.0, "close"), (65504.0, "close"), (65600.0, "overflow")]
)
def test_how_large_numbers_may_be(largest: float, verdict: str) -> None:
    op = only(Steps(torch.neg), torch.tensor([[1.0, largest]]))
    assert (op.verdict("fp16"), op.verdict("bf16")) == (verdict, "ok")


def test_who_is_to_blame_for_an_overflow() -> None:
    """The square is; what comes of it is if it is too large itself."""
    model = Steps(torch.square, lambda x: x / 1000, lambda x: x * 900, lambda x: x.clamp(-1, 1))
    ops, runs = examined(model, torch.tensor([[300.0, 2.0]]))
    verdicts = {name: op.verdict("fp16") for name, op in ops.items()}
    assert verdicts == {"pow.0": "overflow", "div.0": "inputs", "mul.0": "overflow", "clamp.0": "ok"}
    assert ops["pow.0"].reason("fp16") == "numbers up to 9e+04"
    assert runs["fp16", False].num_bad == 0  # they are clamped
    assert examined(Steps(torch.square), torch.tensor([[300.0, 2.0]]))[1]["fp16", False].num_bad == 1


def test_a_weight_that_is_too_large() -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 1e5)
    ops, runs = examined(model, torch.full((1, 2), 1e-3))
    assert ops["mm.0"].numbers.largest == pytest.approx(200)
    assert (ops["mm.0"].verdict("fp16"), ops["mm.0"].verdict("bf16")) == ("overflow", "ok")
    assert ops["mm.0"].reason("fp16") == "a weight is too large for fp16"
    assert runs["fp16", False].num_bad == 1


def test_a_divisor_that_becomes_0() -> None:
    model = Steps(lambda x: x / (x * 1e-9), lambda x: x * 1e-9)
    ops, _ = examined(model, torch.tensor([[1.0, 2.0]]))
    assert ops["mul.0"].verdict("fp16") == "underflow"
    assert ops["mul.0"].reason("fp16") == "100% of the numbers become 0; 0 dB"
    model = Steps(lambda x: (x * 1e-6) / (x * 1e-9))
    ops, runs = examined(model, torch.tensor([[1.0, 2.0]]))
    assert ops["div.0"].verdict("fp16") == "not finite"
    assert ops["div.0"].reason("fp16") == "infinite or NaN in fp16, where an input becomes 0"
    assert ops["div.0"].verdict("bf16") == "ok"
    assert runs["fp16", False].num_bad == 2
    assert runs["fp16", False].first.count("(x * 1e-6) / (x * 1e-9)") == 1


def test_partial_sums() -> None:
    """60000 + 60000 - 60000 - 60000 fits, but not on the way there."""
    x = torch.tensor([[6e4, 6e4, -6e4, -6e4 + 64]])
    total = only(Steps(lambda x: x.sum(1)), x)
    assert (total.numbers.largest, total.numbers.partial, total.numbers.terms) == (64, 239936, 4)
    assert total.verdict("fp16") == "sum"
    mean = only(Steps(lambda x: x.mean(1)), x)
    assert (mean.numbers.largest, mean.numbers.partial, mean.verdict("fp16")) == (16, 239936, "sum")
    product = nn.Linear(4, 1, bias=False)
    nn.init.constant_(product.weight, -0.5)
    assert (only(product, x).numbers.partial, only(product, x).verdict("fp16")) == (119968, "sum")
    conv = nn.Conv2d(4, 1, 1, bias=False)
    nn.init.constant_(conv.weight, 0.5)
    op = only(conv, x.view(1, 4, 1, 1))
    assert (op.numbers.partial, op.numbers.terms, op.verdict("fp16")) == (119968, 4, "sum")
    length = only(Steps(lambda x: torch.linalg.vector_norm(x, dim=1)), torch.tensor([[200.0, 100, -200, 0]]))
    assert (length.numbers.partial, length.numbers.terms, length.verdict("fp16")) == (9e4, 4, "sum")
    norm = only(nn.LayerNorm(4), torch.tensor([[200.0, 100, -200, 0]]))
    assert (norm.numbers.partial, norm.verdict("fp16")) == (9e4, "sum")


def test_cancellation_is_imprecise() -> None:
    x = torch.linspace(0, 1, 11)[None]
    op = only(Steps(lambda x: (1000 + x) - 1000), x)
    assert op.verdict("bf16") == op.verdict("fp16") == "imprecise"
    assert op.numbers.snr("bf16") < op.numbers.snr("fp16") < 40
    want = x.half().float() - ((1000 + x).half().float() - 1000).half().float()
    assert math.isfinite(op.numbers.snr("fp16"))
    assert want.abs().max() > 0.1


def test_signal_to_noise_ratio_is_that_of_rounding() -> None:
    x = torch.randn(1, 1000)
    op = only(Steps(torch.neg), x)
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        error = (x.to(dtype).float() - x).square().sum()
        want = 10 * math.log10(float(x.square().sum() / error))
        assert op.numbers.snr(name) == pytest.approx(want, abs=1e-3)


def test_what_the_model_keeps_in_fp32() -> None:
    model = Steps(
        lambda x: x.float().square(),
        lambda x: x.sum(1, keepdim=True).sqrt(),
        lambda x: x.half(),
    )
    ops, runs = examined(nn.Sequential(nn.Identity(), model), torch.full((2, 4), 300.0))
    assert {name: op.kept for name, op in ops.items()} == {
        name: {"fp16", "bf16"} for name in ("1.pow.0", "1.sum.0", "1.sqrt.0")
    }
    assert ops["1.pow.0"].verdict("fp16") == "overflow"
    assert runs["fp16", False].num_bad == 0
    assert runs["fp16", True].num_bad == 2
    assert runs["fp16", True].first.startswith("1: ")
    assert "x.float().square()" in runs["fp16", True].first  # before Python 3.11 the whole line


def test_constants_that_fp16_cannot_hold() -> None:
    """They are infinite if all is cast, as the numbers are."""
    model = Steps(lambda x: x.float().clamp(-1e9, 1e9), lambda x: 2.0 ** (x / 10), lambda x: x.half())
    _, runs = examined(model, torch.tensor([[1.0, -2.0]]))
    assert all((run.error, run.num_bad) == ("", 0) for run in runs.values())
    model = Steps(lambda x: x.float() / 1e9 * 1e9, lambda x: x.half())
    _, runs = examined(model, torch.tensor([[1.0, -2.0]]))
    assert [runs["fp16", cast].num_bad for cast in (False, True)] == [0, 2]


def test_numbers_that_are_not_finite_in_fp32() -> None:
    model = Steps(lambda x: x.log(), torch.neg)
    ops, runs = examined(model, torch.tensor([[1.0, -1.0], [0.0, 2.0]]))
    assert ops["log.0"].numbers.non_finite == 2
    assert (ops["log.0"].numbers.low, ops["log.0"].numbers.high) == (0, pytest.approx(math.log(2)))
    assert ops["log.0"].verdict("fp16") == "not finite"
    assert runs["fp32", False].num_bad == 2
    assert "x.log()" in runs["fp32", False].first


def test_int8_of_activations_and_weights() -> None:
    x = torch.tensor([-1.0, 0.0, 0.3, 3.1, 5.0])
    step = 6 / 255
    zero = round(1 / step)
    want = torch.tensor([(min(max(round(v / step) + zero, 0), 255) - zero) * step for v in x.tolist()])
    torch.testing.assert_close(fake_int8(x, -1.0, 5.0), want)
    assert fake_int8(x, -1.0, 2.0).max() == pytest.approx(2, abs=0.01)
    assert torch.equal(fake_int8(torch.zeros(3), 0.0, 0.0), torch.zeros(3))
    weight = torch.tensor([[1.0, -0.5], [100.0, 3.0]])
    want = torch.stack([(row / (row.abs().max() / 127)).round() * row.abs().max() / 127 for row in weight])
    torch.testing.assert_close(fake_int8_weight(weight, 0), want)
    torch.testing.assert_close(fake_int8_weight(weight.T.contiguous(), 1), want.T)


def test_ranges_of_activations() -> None:
    """In parts as at once, with as many numbers beyond the clipped range as belong there."""
    x = torch.randn(40, 1000)
    x[7, 5] = 100.0
    model = nn.Linear(1000, 3)
    for size in (40, 10):
        calibration = Calibration(model, 40 // size)
        with torch.no_grad(), calibration:
            for batch in x.split(size):
                model(batch)
        (found,) = calibration.found.values()
        assert found.weighted
        assert found.ranges[0].ends() == (pytest.approx(float(x.min())), 100)
        assert found.ranges[0].ends("symmetric") == (-100, 100)
        low, high = found.ranges[0].ends("asymmetric clipped")
        assert low == x.flatten().kthvalue(2).values
        assert high == x.flatten().kthvalue(x.numel() - 1).values
        assert found.input_spread == pytest.approx(100 / float(x.abs().amax(0).median()))


class Outlier(nn.Module):
    """Two layers, of which the second sees one channel that dwarfs the others and is of no account."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16, bias=False)
        self.second = nn.Linear(16, 4, bias=False)
        with torch.no_grad():
            self.first.weight[0] *= 3000
            self.second.weight[:, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_what_to_keep_out_of_int8() -> None:
    operations, runs = run_all(Outlier().eval(), [torch.randn(32, 16), torch.randn(32, 16)])
    report = Report("outlier", False, 0, "", 64, (1, 1), "cpu", operations, runs)
    assert report.keep == ["second"]
    first, second = operations
    assert second.output_snr < 10 < MIN_INT8_SNR < first.output_snr
    assert second.quantized is not None
    assert second.quantized.input_spread > 1000
    assert set(second.quantized.input_noise) == set(SCHEMES)
    by_name = {run.name: run for run in runs}
    assert by_name["int8"].snr < 10 < MIN_INT8_SNR < by_name["int8 but for 1 layer"].snr
    agreement = by_name["int8 but for 1 layer"].agreement
    assert agreement is not None
    assert by_name["int8"].agreement is not None
    assert by_name["int8"].agreement < agreement
    text = "\n".join(lines(report))
    assert "keep these in higher precision: second" in text
    assert "    int8: mm, sums 16: model outputs " in text


def test_layers() -> None:
    names = layer_names(load_model("nano-cifar10")[0])
    assert names["stages.0.0.conv"] == names["stages.0.0.norm"] == names["stages.0.0.act"] == "stages.0.0"
    assert names["stages.1.1.attn.aggregate.1"] == "stages.1.1.attn.aggregate.1"
    assert names["stages.1.1.attn.shortcut_norm"] == "stages.1.1.attn.shortcut_norm"
    assert names["head.fc"] == "head.fc"
    assert layer_names(nn.Linear(1, 1)) == {"": ""}


@pytest.mark.parametrize("kernel", ["taylor2", "relu", "softmax"])
def test_attention_stays_in_fp32(
    kernel: str, tiny_architectures: Mapping[str, Architecture], randomize: Callable[[nn.Module, int], nn.Module]
) -> None:
    model = randomize(QTViT(tiny_architectures["nano"], num_classes=3, kernel=kernel), 0)
    operations, runs = run_all(model.eval(), [torch.randn(2, 3, 16, 24)])
    kept = {op.site.module for op in operations if op.kept}
    assert kept == {"stages.1.1.attn", "stages.2.1.attn"}
    products = [op for op in operations if op.quantized and not op.is_weighted]
    assert {op.site.module for op in products} == kept
    assert all(op.kept == {"fp16", "bf16"} for op in products)
    assert [(run.name, run.cast) for run in runs if not run.name.startswith("int8 but")] == [
        *((name, False) for name in ("fp32", "fp16", "bf16", "int8")),
        *((name, True) for name in ("fp16", "bf16", "int8")),
    ]
    assert ("released" in {op.site.op for op in operations}) == (kernel == "taylor2")


def test_fused_attention_is_taken_apart() -> None:
    """And is not said to stay in fp32, as no runtime that takes it apart would do that."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    operations, _ = run_all(model.eval(), [torch.randn(2, 3, 32, 32)])
    assert {"bmm", "_safe_softmax"} <= {op.site.op for op in operations if op.site.module == "blocks.0.attn"}
    assert not [op for op in operations if op.kept]


def test_measuring_changes_nothing() -> None:
    """Not even where activations overwrite their input."""
    model = timm.create_model("resnet10t", num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    before = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    with torch.no_grad():
        want = model(x)
        with Ranges(model) as ranges:
            assert torch.equal(model(x), want)
    assert {op for _, op, _ in ranges.numbers} >= {"convolution", "relu", "batch_norm", "addmm"}
    assert all(numbers.low == 0 for site, numbers in ranges.numbers.items() if site.op == "relu")
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == before


@torch.no_grad()
def test_token_sums_that_fp16_cannot_hold(photos: Path) -> None:
    """The model holds them in fp32, so it is fine in fp16; a runtime that casts all of it gives NaN."""
    model, _ = load_model("nano-cifar10")
    model.get_parameter("stages.1.1.attn.qkv.weight").mul_(200)
    report = examine(model, photos, num_images=2, img_size=(64, 48))
    assert report.is_finite
    runs = {(run.name, run.cast): run for run in report.runs}
    assert (runs["fp16", False].num_bad, runs["fp16", False].agreement) == (0, 1)
    assert runs["fp16", True].num_bad > 0
    assert runs["fp16", True].first.startswith("stages.1.1.attn: ")
    attention = report.layers()["stages.1.1.attn"]
    sums = next(op for op in attention if op.site.op == "bmm" and op.numbers.terms == 32 * 24)
    assert "values @ f_k.mT" in sums.name
    assert "sums 768" in sums.name
    assert sums.verdict("fp16") == "overflow"
    assert sums.kept == {"fp16", "bf16"}
    released = [op for op in attention if op.site.op == "released"]
    assert [op.verdict("fp16") for op in released] == ["overflow", "overflow"]
    text = "\n".join(lines(report))
    assert "the model keeps it in fp32" in text
    assert "the released code in fp16: " in text


@torch.no_grad()
def test_a_layer_that_fp16_cannot_hold(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, info = load_model("nano-cifar10")
    model.get_parameter("stages.2.1.local.depth_conv.conv.weight").mul_(1e4)
    save_model(tmp_path / "model.safetensors", model.state_dict(), info)
    command = ["doctor", str(tmp_path / "model.safetensors"), "--data", str(photos), "--num-images", "2", "--img-size"]
    assert main([*command, "16", "--json", str(tmp_path / "new" / "report.json")]) == 1
    printed = capsys.readouterr().out
    assert "fp16: 20 outputs are infinite or NaN, first in stages.2.1.local.depth_conv.conv: convolution" in printed
    assert "bf16: safe" in printed
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    bad = [op for op in report["operations"] if op["fp16"]["verdict"] == "overflow" and not op["fp16"]["kept_in_fp32"]]
    assert bad[0]["layer"] == "stages.2.1.local.depth_conv"
    assert report["is_finite"] is False


def test_the_command(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / "report.json"), str(tmp_path / "ranges.png")]
    command = ["doctor", "nano-cifar10", "--data", str(photos), "--num-images", "3", "--batch-size", "2"]
    assert main([*command, "--json", files[0], "--plot", files[1]]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"nano-cifar10: 0.44 M parameters, 3 images of 32x32 from {photos}, cpu\n\n")
    assert "more layers that are no worse (--all shows them)" in printed
    assert "\nfp16: safe: numbers up to " in printed
    assert "\nbf16: safe: numbers up to " in printed
    assert "\nint8: top-1 as fp32 " in printed
    report = json.loads(Path(files[0]).read_text())
    assert (report["num_images"], report["img_size"], report["is_random"]) == (3, [32, 32], False)
    assert [run["name"] for run in report["runs"]][:4] == ["fp32", "fp16", "bf16", "int8"]
    ops = report["operations"]
    conv = next(op for op in ops if op["module"] == "stages.0.0.conv")
    assert set(conv["int8"]["input_snr_db"]) == set(SCHEMES)
    assert conv["int8"]["weight_snr_db"] > conv["int8"]["weight_snr_db_per_tensor"]
    assert all(op["low"] <= op["high"] for op in ops)
    with Image.open(files[1]) as picture:
        assert picture.height > 800


def test_all_layers_on_request(photos: Path) -> None:
    report = examine(load_model("nano-cifar10")[0], photos, num_images=1, img_size=(16, 16))
    text = "\n".join(lines(report, show_all=True))
    assert all(f"\n{layer} " in text for layer in report.layers())
    assert "no worse" not in text


def test_models_of_all_kinds(photos: Path) -> None:
    images = [Image.open(path) for path in sorted(photos.rglob("*.png"))][:2]
    predictor = ClassPredictor.load("nano-cifar10", "cpu")
    predictor.model.train()
    want = examine(predictor, images, img_size=(16, 16))
    assert (want.model, want.data, want.num_images) == ("qtvit_nano", "memory", 2)
    assert predictor.model.training
    half = examine(predictor.model.bfloat16(), images, img_size=(16, 16))
    assert half.model == "QTViT"
    assert next(predictor.model.parameters()).dtype == torch.bfloat16
    random = examine("resnet10t", images, img_size=(32, 32))
    assert random.is_random
    assert not want.is_random
    assert "the weights are random" in "\n".join(lines(random))
    again = examine("resnet10t", images, img_size=(32, 32))
    assert again.to_dict() == random.to_dict()


def test_images_are_from_all_over_the_folder(tmp_path: Path) -> None:
    for index, grey in enumerate((0, 0, 0, 255, 255, 255)):
        Image.new("L", (8, 8), grey).save(tmp_path / f"{index}.png")
    model = nn.Sequential(nn.Conv2d(3, 1, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nn.init.constant_(model.get_parameter("0.weight"), 1.0)
    report = examine(model, tmp_path, num_images=2, img_size=(4, 4))
    found = report.operations[0].numbers
    assert (found.low, found.high) == (pytest.approx(-5.958, abs=0.001), pytest.approx(7.317, abs=0.001))
    assert (report.num_images, examine(model, tmp_path, img_size=(4, 4)).num_images) == (2, 6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(photos: Path) -> None:
    there, here = (examine("nano-cifar10", photos, img_size=(16, 16), device=device) for device in ("cuda", "cpu"))
    assert there.is_finite
    assert [op.site for op in there.operations] == [op.site for op in here.operations]
    for one, other in zip(there.operations, here.operations, strict=True):
        assert one.kept == other.kept
        assert one.numbers.largest == pytest.approx(other.numbers.largest, rel=1e-3)


def test_the_embedded_digits_and_packed_folders(photos: Path, tmp_path: Path) -> None:
    from qtvit.tasks.classify.pack import pack_folder

    pack_folder(photos, tmp_path / "packed")
    model = timm.create_model("test_resnet.r160_in1k", num_classes=3)
    packed = examine(model, tmp_path / "packed", img_size=(32, 32))
    assert packed.num_images == 6
    assert packed.operations[0].numbers == examine(model, photos, img_size=(32, 32)).operations[0].numbers
    assert examine(model, "digits", num_images=5, img_size=(32, 32)).num_images == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nano-cifar10", "--data", "EMPTY"], "EMPTY: no images in this folder"),
        (["nano-cifar10", "--data", "nowhere"], "nowhere: no such folder"),
        (["nano-cifar10", "--data", "BROKEN"], "broken.png: "),
        (
            ["nano-cifar10", "--data", "PHOTOS", "--img-size", "3"],
            "--img-size 3x3 is below the network's minimum of 4 px",
        ),
        (["nano-cifar10", "--data", "PHOTOS", "--img-size", "0"], "--img-size must be a side such as 224, or"),
        (["vit_tiny_patch16_224", "--data", "PHOTOS", "--img-size", "100"], "--img-size 100x100 does not fit Vision"),
        (["nano", "--data", "PHOTOS"], "nano: no such run folder or model file (with the package comes: nano-cifar10)"),
        (["model.onnx", "--data", "PHOTOS"], "model.onnx: an exported model has no layers to look into; give the run"),
        (["nano-cifar10", "--data", "PHOTOS", "--device", "tpu"], "no such device: 'tpu'"),
    ],
)
def test_what_users_get_wrong(
    arguments: list[str], message: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {"EMPTY": tmp_path / "empty", "BROKEN": tmp_path / "broken", "PHOTOS": photos}
    folders["EMPTY"].mkdir()
    folders["BROKEN"].mkdir()
    (folders["BROKEN"] / "broken.png").write_bytes(b"\x89PNG")
    assert main(["doctor", *(str(folders.get(argument, argument)) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message.replace("EMPTY", str(folders["EMPTY"])) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nano-cifar10"], "the following arguments are required: --data"),
        (["nano-cifar10", "--data", "x", "--plot", "ranges.jpg"], "ranges.jpg does not end in .png"),
        (["nano-cifar10", "--data", "x", "--num-images", "0"], "must be 1 or more, got 0"),
    ],
)
def test_options_that_are_none(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            timm.create_model("resnet10t", in_chans=1),
            {},
            "ResNet: for images of 1 channels, and images are read as RGB",
        ),
        (timm.create_model("resnet10t", features_only=True), {}, "gives a list; models that give a single tensor"),
        (nn.Identity(), {}, "Identity: computes nothing that could be examined"),
        (3, {}, "a model given as int; expected a predictor, a network, a path or a name"),
        ("nano-cifar10", {"num_images": 0}, "num_images and batch_size must be 1 or more, got 0 and 16"),
    ],
)
def test_what_callers_get_wrong(model: Any, options: dict[str, Any], message: str, photos: Path) -> None:
    with pytest.raises(ValueError, match=message):
        examine(model, photos, **options)
    with pytest.raises(ValueError, match="no images given"):
        examine("nano-cifar10", [])


def test_the_example_of_the_page_runs(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[2] / "docs" / "doctor.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(block.replace('"photos", num_images=16', f"{str(photos)!r}, num_images=1"), str(page), "exec"), {})
    assert capsys.readouterr().out.startswith("True ")
