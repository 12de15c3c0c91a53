from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

import qtvit
from qtvit.checkpoints import ModelInfo, save_model
from qtvit.deploy import Predictor
from qtvit.models import build_model


def predictor(classes: list[str], **model_args: object) -> Predictor:
    model_args = {"num_classes": len(classes), **model_args}
    info = ModelInfo("qtvit_nano", model_args, classes, {"size": [32, 32]})
    return Predictor(build_model("qtvit_nano", **model_args), info, "cpu")


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
