import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor

import qtvit
from qtvit.checkpoints import ModelInfo, save_model
from qtvit.deploy import predictor as predictor_module
from qtvit.deploy.runtimes import Runtime
from qtvit.models import build_model
from qtvit.tasks.classify.predict import ClassPredictor


def predictor(classes: list[str], **model_args: object) -> ClassPredictor:
    model_args = {"num_classes": len(classes), **model_args}
    info = ModelInfo("qtvit_nano", model_args, classes, {"size": [32, 32]})
    return ClassPredictor(build_model("qtvit_nano", **model_args), info, "cpu")


def test_wordnet_classes_are_shown_by_name() -> None:
    trained = predictor(["n01440764", "n07753592"])
    assert trained.classes == ["tench, Tinca tinca", "banana"]
    assert trained.info.classes == ["n01440764", "n07753592"]
    labels = trained.predict(Image.new("RGB", (5, 5))).labels
    assert sorted(labels) == ["banana", "tench, Tinca tinca"]


def test_a_released_checkpoint_predicts_imagenet_classes(tmp_path: Path) -> None:
    torch.save({"state_dict": build_model("qtvit_0").state_dict()}, tmp_path / "qtvit_0.pth")
    loaded = qtvit.load(tmp_path / "qtvit_0.pth", device="cpu")
    assert loaded.classes[1] == "goldfish, Carassius auratus"
    assert loaded.info.classes == ImageNetInfo().label_names()
    assert tuple(loaded.preprocess.size) == (224, 224)
    prediction = loaded.predict(Image.new("RGB", (1, 1)))
    assert len(prediction.labels) == 5
    assert set(prediction.labels) <= set(loaded.classes)


def test_other_classes_keep_their_names() -> None:
    assert predictor(["cat", "dog"]).classes == ["cat", "dog"]


def test_models_that_cannot_predict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this qtvit_nano has no classifier"):
        predictor([])
    with pytest.raises(ValueError, match="this qtvit_nano is for images of 1 channels"):
        predictor(["cat", "dog"], in_chans=1)


def test_the_same_prediction_for_one_picture_in_any_form(tmp_path: Path, randomize: object) -> None:
    trained = predictor(["cat", "dog", "cow"])
    randomize(trained.model, 0)
    save_model(tmp_path / "best.safetensors", trained.model.state_dict(), trained.info)
    trained = qtvit.load(tmp_path, device="cpu")
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    image.save(tmp_path / "x.png")
    tensor = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(40, 50, 3)
    path = tmp_path / "x.png"
    sources = [path, str(path), path.read_bytes(), image, tensor.numpy(), tensor.numpy() / 255, tensor.permute(2, 0, 1)]
    first, *others = trained.predict(sources)
    assert len(others) == 6
    for other in others:
        assert other.labels == first.labels
        assert other.probabilities == pytest.approx(first.probabilities, abs=1e-6)


class Brightness(Runtime):
    """Says of an image how bright it is: its logits are 100 for one class, chosen by the mean pixel."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        self.batches.append(len(pixels))
        levels = (pixels.mean((1, 2, 3)) * 10).round().long()
        return 100 * torch.nn.functional.one_hot(levels, 10).float()


def brightness() -> ClassPredictor:
    preprocess = {"size": [4, 4], "mean": [0, 0, 0], "std": [1, 1, 1]}
    return ClassPredictor(Brightness(), ModelInfo("qtvit_nano", {}, [str(i) for i in range(10)], preprocess))


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (int(25.5 * level),) * 3)


def test_predictions_come_in_the_order_of_the_images() -> None:
    predictor = brightness()
    levels = [(7 * i) % 10 for i in range(41)]
    found = predictor.predict([grey(level) for level in levels], batch_size=4)
    assert [prediction.label for prediction in found] == [str(level) for level in levels]
    assert predictor.runtime.batches == [4] * 10 + [1]
    assert predictor.predict([]) == []


def test_a_broken_image_stops_after_the_batches_before_it_or_is_skipped() -> None:
    predictor = brightness()
    images = [grey(1), grey(2), grey(3), b"not a picture", grey(4), grey(5)]
    predictions = predictor.iter_predict(images, batch_size=2)
    assert [next(predictions).label, next(predictions).label] == ["1", "2"]
    with pytest.raises(ValueError, match="image bytes: not an image that can be read"):
        next(predictions)
    found = predictor.iter_predict(images, batch_size=2, skip_broken=True)
    assert [prediction and prediction.label for prediction in found] == ["1", "2", "3", None, "4", "5"]
    assert list(predictor.iter_predict([b"", b""], batch_size=2, skip_broken=True)) == [None, None]


def test_images_are_read_ahead_but_not_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    enough = threading.Event()

    def open_image(image: int) -> Image.Image:
        opened.append(image)
        if len(opened) == 6:
            enough.set()
        return grey(image % 10)

    monkeypatch.setattr(predictor_module, "open_image", open_image)
    predictions = brightness().iter_predict(range(100), batch_size=2)  # type: ignore[arg-type]
    assert next(predictions).label == "0"
    assert enough.wait(10)  # two are in the network, four are read meanwhile
    predictions.close()  # type: ignore[attr-defined]
    assert max(opened) <= 6
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("qtvit-read")]


def test_an_exported_model_has_no_layers() -> None:
    with pytest.raises(ValueError, match="an exported model has no layers to look into"):
        _ = brightness().model
