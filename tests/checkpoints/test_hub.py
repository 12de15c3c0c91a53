"""Models on the Hugging Face Hub (one on this machine), and in folders laid out like there."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn

from qtvit.checkpoints import ModelInfo, load_model, push_model, save_model
from qtvit.models import ModelCost, build_model, model_cost
from qtvit_cli import main

from .hub_server import TOKEN, Hub, Repo, serve

pytestmark = pytest.mark.slow

PREPROCESS = {"size": [32, 48], "crop_pct": 0.9, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.25] * 3}
SMALL = {"num_classes": 3, "depths": [1] * 4, "dims": [8, 8, 16, 16]}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("qtvit_nano", {"num_classes": 10}),
    ("qtvit_nano", {"num_classes": 3, "img_size": [16, 24], "kernel": "relu", "ape": False}),
    ("qtvit_nano", {"num_classes": 3, "in_chans": 1, "attn_eps": 1e-3, "shortcut": False}),
    ("qtvit_nano", {"num_classes": 0, "global_pool": "max", "drop_path_rate": 0.1}),
    ("convnextv2_nano.fcmae_ft_in22k_in1k", SMALL),  # to which timm gives larger images in tests
    ("convnextv2_nano.fcmae_ft_in22k_in1k_384", SMALL),  # to which it gives whole images, squashed to a square
    ("test_vit", {"num_classes": 3, "img_size": [16, 32]}),
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ModelCost(1, 1)  # counting takes longer than all the rest
    monkeypatch.setattr("qtvit.checkpoints.model_card.model_cost", lambda model, img_size: quick)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub where ``me`` is logged in."""
    with serve() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (huggingface_hub.constants, huggingface_hub.file_download):  # the latter before version 1
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def make_run(tmp_path: Path, randomize: Callable[[nn.Module, int], nn.Module]) -> Callable[..., Path]:
    """Writes a run folder, without a training."""

    def make(name: str = "qtvit_nano", /, config: dict[str, Any] | None = None, **model_args: Any) -> Path:
        model = randomize(build_model(name, **model_args), 0)
        classes = [f"class_{i}" for i in range(model_args.get("num_classes", 0))]
        size = model_args.get("img_size", PREPROCESS["size"])
        metrics = {"top1": 61.234, "top5": 98.7, "loss": 1.5, "epoch": 3}
        info = ModelInfo(name, model_args, classes, {**PREPROCESS, "size": size}, metrics)
        run = tmp_path / "runs" / "first"
        run.mkdir(parents=True)
        save_model(run / "best.safetensors", model.state_dict(), info)
        if config is not None:
            (run / "config.yaml").write_text(yaml.safe_dump(config))
        return run

    return make


@pytest.mark.parametrize(("name", "model_args"), MODELS)
def test_what_is_loaded_is_what_was_pushed(
    name: str, model_args: dict[str, Any], make_run: Callable[..., Path], hub: Hub
) -> None:
    run = make_run(name, **model_args)
    push_model(run, "me/model", folder="made")
    push_model(run, "me/model")
    expected, info = load_model(run)
    images = torch.randn(2, model_args.get("in_chans", 3), *info.preprocess["size"])
    with torch.inference_mode():
        logits = expected(images)
        assert logits.std() > 0
        for where in ("made", "local-dir:made", "hf-hub:me/model", "hf-hub:me/model@v1"):
            own, own_info = load_model(where)
            assert torch.equal(own(images), logits)
            assert own_info == replace(info, version=own_info.version)
            if where == "made":
                continue
            through_timm = timm.create_model(where, pretrained=True).eval()
            assert torch.equal(through_timm(images), logits)
            assert list(through_timm.pretrained_cfg.get("label_names", [])) == info.classes
            if images.shape[1] == 3:
                data = timm.data.resolve_model_data_config(through_timm, use_test_size=True)
                assert list(data.pop("input_size")) == [3, *info.preprocess["size"]]
                assert data.pop("crop_mode") == "center"
                assert data == {name: value for name, value in info.preprocess.items() if name != "size"}


def test_what_timm_can_do_with_its_own_it_can_do_with_these(make_run: Callable[..., Path]) -> None:
    run = make_run(num_classes=3, img_size=[16, 24])
    push_model(run, "me/model", folder="made")
    expected = load_model(run)[0]
    backbone = timm.create_model("local-dir:made", pretrained=True, features_only=True).eval()
    images = torch.randn(1, 3, 16, 24)
    with torch.inference_mode():
        assert torch.equal(backbone(images)[-1], expected.forward_features(images))
    model = timm.create_model("local-dir:made", pretrained=True, num_classes=5, img_size=32)
    assert model.head.fc.out_features == 5
    assert torch.equal(model.stages[0][0].conv.weight, expected.stages[0][0].conv.weight)


def test_imagenet_classes_get_their_names(make_run: Callable[..., Path]) -> None:
    run = make_run(num_classes=1000)
    model, info = load_model(run)
    classes = timm.data.ImageNetInfo().label_names()
    save_model(run / "best.safetensors", model.state_dict(), replace(info, classes=classes))
    push_model(run, "me/model", folder="made")
    config = json.loads(Path("made/config.json").read_text())
    assert config["label_names"][0] == "n01440764"
    assert config["label_descriptions"]["n01440764"] == "tench, Tinca tinca"


def test_weights_of_others_are_not_described_as_these(make_run: Callable[..., Path]) -> None:
    push_model(make_run("test_efficientnet.r160_in1k", num_classes=3), "me/model", folder="made")
    config = json.loads(Path("made/config.json").read_text())
    assert config["architecture"] == "test_efficientnet"
    assert not config["pretrained_cfg"].keys() & {"hf_hub_id", "url", "tag", "license", "origin_url", "paper_ids"}
    card = Path("made/README.md").read_text()
    assert "Citation" not in card
    assert "registers the network" not in card


def test_only_files_without_code_are_published(make_run: Callable[..., Path], hub: Hub) -> None:
    run = make_run(num_classes=3)
    (run / "last.ckpt").touch()
    assert push_model(run, "me/model") == f"{hub.url}/me/model"
    assert hub.repos["me/model"].files.keys() == {"model.safetensors", "config.json", "README.md"}


# The card

CONFIG = {
    "data": "/home/someone/photos",
    "model": "qtvit_nano",
    "epochs": 7,
    "batch_size": 8,
    "lr": 0.003,
    "checkpoint": None,
    "device": "cuda:0",
    "seed": 1,
    "freeze": None,
    "model_args": {"checkpoint_path": "/home/someone/secret/start.pth"},
    "augment": {"train_sizes": [16, 24], "mirror": ["https://someone:secret@server.example/bucket/shards?key=secret"]},
}


def test_the_card_says_what_the_run_says(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtvit.checkpoints.model_card.model_cost", model_cost)
    run = make_run(config=CONFIG, num_classes=10, kernel="relu")
    (run / "scores.json").write_text('{"top1": 61.23, "num_images": 2000, "ece": 4.5, "balanced_accuracy": 60.9}')
    (run / "summary.json").write_text('{"train_seconds": 90}')
    push_model(run, "me/model", folder="made", license="mit")
    card = ModelCard.load("made/README.md")
    cost = model_cost(load_model(run)[0], (32, 48))
    assert card.data.license == "mit"
    assert card.data.library_name == "timm"
    assert {"timm", "qtvit", "image-classification"} <= set(card.data.tags)
    results = card.data.eval_results
    assert [(r.dataset_name, r.dataset_type, r.metric_name, r.metric_value) for r in results] == [
        ("photos", "imagefolder", "Top-1 (%)", 61.23),
        ("photos", "imagefolder", "Top-5 (%)", 98.7),
    ]
    text = card.text
    for said in (
        "with the network of QT-ViT (attention kernel `relu`), trained on `photos`.",
        "`qtvit_nano`, `kernel=relu`",
        f"{cost.num_params / 1e6:.2f} M parameters, {cost.num_macs / 1e6:.0f} M multiply-accumulates",
        "10 classes: `class_0`, `class_1`",
        "On 2,000 images of `photos` that were held out",
        "| Top-1 (%) | 61.23 |",
        "| Expected calibration error (%) | 4.50 |",
        "| Cross-entropy | 1.5000 |",
        "| Epochs | 7, of which the weights are those after epoch 3 |",
        "| Time | 1.5 minutes on cuda:0 |",
        "The weights: mit.",
        "@inproceedings{xu2024qtvit,",
    ):
        assert said in text
    assert "Kept as it was" not in text
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert recipe == {
        **CONFIG,
        "data": "photos",
        "model_args": {"checkpoint_path": "start.pth"},
        "augment": {"train_sizes": [16, 24], "mirror": ["shards"]},
    }


def test_no_file_says_where_things_were(make_run: Callable[..., Path], tmp_path: Path) -> None:
    push_model(make_run(config={**CONFIG, "data": str(tmp_path / "photos")}, num_classes=3), "me/model", folder="made")
    for file in Path("made").iterdir():
        content = file.read_bytes()
        for private in (b"someone", b"secret", str(tmp_path).encode()):
            assert private not in content


def test_the_card_of_a_model_of_which_little_is_known(make_run: Callable[..., Path]) -> None:
    run = make_run(num_classes=3)
    model, info = load_model(run)
    save_model(Path("alone.safetensors"), model.state_dict(), replace(info, metrics={}, source="theirs | best.pt"))
    push_model("alone.safetensors", "me/model", folder="made")
    card = ModelCard.load("made/README.md")
    assert card.data.license is None
    assert card.data.eval_results is None
    assert "has stated no licence" in card.text
    assert r"| Weights | converted from `theirs \| best.pt` |" in card.text
    for heading in ("Scores", "Training"):
        assert f"## {heading}" not in card.text


def test_few_classes_have_no_top_5(make_run: Callable[..., Path]) -> None:
    push_model(make_run(num_classes=3), "me/model", folder="made")
    assert "Top-5" not in Path("made/README.md").read_text()


def test_class_names_do_not_break_the_card(make_run: Callable[..., Path]) -> None:
    run = make_run(num_classes=60)
    model, info = load_model(run)
    classes = ["a`b", "<img src=x>", "new\nline", *(f"class_{i}" for i in range(57))]
    save_model(run / "best.safetensors", model.state_dict(), replace(info, classes=classes))
    push_model(run, "me/model", folder="made")
    text = Path("made/README.md").read_text()
    assert "60 classes: `a'b`, `<img src=x>`, `new line`, `class_0`" in text
    assert "and 10 more." in text
    assert timm.create_model("local-dir:made").pretrained_cfg["label_names"] == classes


def test_the_model_it_started_from_is_linked(make_run: Callable[..., Path]) -> None:
    run = make_run(config={**CONFIG, "checkpoint": "hf-hub:you/base@v1"}, num_classes=3)
    push_model(run, "me/model", folder="made", dataset="you/photos")
    assert "after epoch 3; this run was not finished |" in Path("made/README.md").read_text()
    card = ModelCard.load("made/README.md")
    assert card.data.base_model == "you/base"
    assert card.data.datasets == ["you/photos"]
    assert [(r.dataset_name, r.dataset_type) for r in card.data.eval_results] == [("you/photos", "you/photos")]
    assert "| Started from | hf-hub:you/base@v1 |" in card.text


def blocks(language: str) -> list[str]:
    text = Path("made/README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize(("name", "model_args"), MODELS[1:4] + MODELS[-1:])
def test_its_python_runs(
    name: str,
    model_args: dict[str, Any],
    make_run: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    hub: Hub,
) -> None:
    run = make_run(name, **model_args)
    push_model(run, "me/model", folder="made")
    push_model(run, "me/model")
    Image.radial_gradient("L").resize((40, 30)).convert("RGB").save("image.jpg")
    is_for_pictures = model_args["num_classes"] > 0 and model_args.get("in_chans", 3) == 3
    assert len(blocks("python")) == (2 if is_for_pictures else 1)
    said = []
    for block in blocks("python"):
        variables: dict[str, Any] = {}
        exec(compile(block, "README.md", "exec"), variables)
        said.append(capsys.readouterr().out.split())
    if is_for_pictures:  # and both say the same
        assert said[0][0] == said[1][0]
        assert float(said[0][1].strip("%,")) / 100 == pytest.approx(float(said[1][1]), abs=0.01)
    else:
        assert variables["output"].shape[0] == 1


def test_its_commands_run(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for slow in ("training.job.plot_curves", "tasks.classify.train.write_report"):
        monkeypatch.setattr(f"qtvit.{slow}", lambda *args: None)
    run = make_run(num_classes=3, img_size=[16, 16])
    push_model(run, "me/model", folder="made")
    push_model(run, "me/model")
    Image.effect_noise((40, 30), 80).convert("RGB").save("image.jpg")
    for i in range(10):
        Path(f"photos/class_{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(f"photos/class_{i % 2}/{i}.png")
    predict, train = (shlex.split(line)[1:] for line in blocks("sh")[0].splitlines())
    assert main(predict) == 0
    assert "image.jpg  class_" in capsys.readouterr().out
    options = "--epochs 1 --batch-size 4 --num-workers 0 --output tuned"
    assert main([*train, *options.split()]) == 0
    assert load_model("tuned")[1].classes == ["class_0", "class_1"]
    push_model("tuned", "me/tuned", folder="published")
    assert ModelCard.load("published/README.md").data.base_model == "me/model"


def test_the_examples_of_the_page_run(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    for slow in ("training.job.plot_curves", "tasks.classify.train.write_report", "tasks.classify.report.write_report"):
        monkeypatch.setattr(f"qtvit.{slow}", lambda *args: None)
    make_run(num_classes=2, img_size=[16, 16]).rename("runs/qtvit_1-photos")
    Image.radial_gradient("L").resize((40, 30)).convert("RGB").save("cat.jpg")
    for i in range(20 + 100):
        image = Path("photos" if i < 20 else "others", f"class_{i % 2}", f"{i}.png")
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (2 * i, 0, 0)).save(image)
    text = (Path(__file__).parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            exec(compile(block, "hub.md", "exec"), {})
            continue
        for line in block.splitlines():
            assert main(shlex.split(line)[1:]) == 0
    assert hub.repos.keys() == {"me/photos", "me/frogs"}
    options = re.search(r'push_model\("runs/qtvit_1-photos", "me/photos", (.*?)\)', text)[1]
    assert push_model("runs/qtvit_1-photos", "me/python", **eval(f"dict({options})")) == f"{hub.url}/me/python"


# At the command line


def test_push_to_a_folder_then_edit_the_card_then_push(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str], hub: Hub
) -> None:
    run = make_run(num_classes=3)
    assert main(["push", str(run), "me/model", "--folder", "made", "--license", "mit"]) == 0
    assert 'timm.create_model("local-dir:made", pretrained=True)' in capsys.readouterr().out
    card = Path("made/README.md")
    card.write_text(card.read_text() + "\nMind the frogs.\n")
    for _ in range(2):
        assert main(["push", "made", "me/model", "--private"]) == 0
    assert f"pushed: {hub.url}/me/model\n" in capsys.readouterr().out
    repo = hub.repos["me/model"]
    assert repo.private
    assert repo.files["README.md"].endswith(b"Mind the frogs.\n")


def test_a_new_card_does_not_replace_the_one_that_is_there(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str], hub: Hub
) -> None:
    hub.repos["me/model"] = Repo(files={"README.md": b"mine"})
    run = make_run(num_classes=3)
    assert main(["push", str(run), "me/model"]) == 0
    assert "the README.md that me/model has stays" in capsys.readouterr().out
    assert hub.repos["me/model"].files["README.md"] == b"mine"
    (run / "README.md").write_text("newer")
    assert main(["push", str(run / "best.safetensors"), "me/model"]) == 0
    assert hub.repos["me/model"].files["README.md"] == b"newer"


@pytest.mark.parametrize(
    ("options", "token", "message"),
    [
        ("me/model", None, "me/model: you are not logged in to the Hub; run `hf auth login`, or set HF_TOKEN"),
        ("me/model", "hf_bad", "me/model: the Hub says no (Invalid username or password); `hf auth login` or"),
        ("you/model", TOKEN, "you/model: the Hub says no (You don't have the rights to create a model under the name"),
        ("me/model --license wtf", TOKEN, '"license" must be one of [apache-2.0'),
        ("me/public --private", TOKEN, "me/public is on the Hub already, and public; make it private in its settings"),
        ("model", TOKEN, "model: not the name of a model on the Hub, which is USER/MODEL"),
        ("me/a/b", TOKEN, "me/a/b: not the name of a model on the Hub, which is USER/MODEL (Repo id must be in the"),
        ("me/model --folder runs", TOKEN, "runs exists already and is not empty; name another folder"),
        ("me/model --folder new --private", TOKEN, "private is for models on the Hub, not for a folder, new"),
    ],
)
def test_pushes_that_fail(
    options: str,
    token: str | None,
    message: str,
    make_run: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.repos["me/public"] = Repo()
    monkeypatch.setenv("HF_TOKEN", token or "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "nowhere")
    assert main(["push", str(make_run(num_classes=3)), *options.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not any(repo.files for repo in hub.repos.values())
    assert not Path("new").exists()


def test_a_card_of_ones_own_is_where_its_licence_is(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(num_classes=3)
    (run / "README.md").touch()
    assert main(["push", str(run), "me/model", "--license", "mit", "--folder", "made"]) == 2
    assert f"are for a new model card, and there is {run / 'README.md'}" in capsys.readouterr().err


def test_a_damaged_run_folder(make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(num_classes=3)
    for name in ("config.yaml", "scores.json"):
        (run / name).write_text("{")
        assert main(["push", str(run), "me/model", "--folder", "made"]) == 2
        assert f"{name}: damaged, and the model card is made of it" in capsys.readouterr().err
        (run / name).unlink()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:me/none", "hf-hub:me/none: no such model on the Hub, or a private one that you cannot see"),
        ("hf-hub:me/empty", "hf-hub:me/empty: there is no model.safetensors in this model on the Hub"),
        ("hf-hub:me/empty@v9", "hf-hub:me/empty@v9: the model has no such revision"),
        ("hf-hub:me/gated", "hf-hub:me/gated: access to this model has to be asked for, on its page"),
        ("hf-hub:me/a/b", "hf-hub:me/a/b: not the name of a model on the Hub, which is USER/MODEL"),
        ("hf-hub:", "hf-hub:: not the name of a model on the Hub, which is USER/MODEL"),
        ("local-dir:nowhere", "nowhere: no such run folder or model file"),
        ("local-dir:empty", "empty: no best.safetensors in this folder, nor model.safetensors"),
    ],
)
def test_models_that_do_not_load(name: str, message: str, capsys: pytest.CaptureFixture[str], hub: Hub) -> None:
    hub.repos.update({"me/empty": Repo(), "me/gated": Repo(gated=True)})
    Path("empty").mkdir()
    assert main(["predict", name, "image.jpg"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_a_network_the_cache_serves(
    make_run: Callable[..., Path], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(num_classes=3)
    push_model(run, "me/model")
    load_model("hf-hub:me/model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model, _ = load_model("hf-hub:me/model")
    assert torch.equal(model.head.fc.weight, load_model(run)[0].head.fc.weight)
    with pytest.raises(FileNotFoundError, match="hf-hub:me/other: not in the cache, and the Hub cannot be reached"):
        load_model("hf-hub:me/other")
    with pytest.raises(OSError, match="offline mode is enabled"):
        push_model(run, "me/model")


def test_a_hub_that_does_not_answer(make_run: Callable[..., Path], hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port
    with pytest.raises(ConnectionError, match="me/model: the Hub cannot be reached"):
        push_model(make_run(num_classes=3), "me/model")


# pretrained=True


@pytest.mark.parametrize("model_args", [{}, {"num_classes": 3, "features_only": True}, {"pretrained_cfg_overlay": {}}])
def test_models_without_weights_say_how_to_get_them(model_args: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"no weights of qtvit_1 can be downloaded; `qtvit convert` .* checkpoint_path="
    ):
        timm.create_model("qtvit_1", pretrained=True, **model_args)


def test_weights_given_in_their_place_are_taken(make_run: Callable[..., Path], hub: Hub) -> None:
    run = make_run(num_classes=3)
    push_model(run, "me/model")
    expected = load_model(run)[0].state_dict()
    for source in (
        {"file": str(run / "best.safetensors")},
        {"file": None, "hf_hub_id": "me/model"},
        {"file": None, "state_dict": dict(expected)},
    ):
        overlay = {**source, "num_classes": 3}
        model = timm.create_model("qtvit_nano", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
