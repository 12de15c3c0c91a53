"""The commands as a user types them, run in-process; true subprocesses only where the process itself is the point."""

import dataclasses
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import qtvit
from qtvit.checkpoints import load_model, save_model
from qtvit.tasks.classify.data import load_labelled_images
from qtvit.tasks.classify.held_out import held_out_samples
from qtvit_cli import main
from tests.training.conftest import COLORS, draw

pytestmark = pytest.mark.slow


def test_a_run_learns_and_leaves_its_files(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["top1"] == 100
    assert summary["num_params"] == sum(p.numel() for p in load_model(run)[0].parameters())
    for name in ("curves.png", "confusion.png", "predictions.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 200
    assert (run / "last.ckpt").is_file()
    assert any((run / "tensorboard").iterdir())
    header, *rows = (run / "metrics.csv").read_text().splitlines()
    assert {"train/loss", "val/loss", "val/top1", "lr"} <= set(header.split(","))
    assert len(rows) >= 12


def test_the_model_file_says_how_to_use_it(run: Path, photos: Path) -> None:
    _, info = load_model(run)
    assert (info.model, info.classes, info.task) == ("qtvit_nano", ["blue", "green", "red"], "classify")
    assert info.preprocess["size"] == [12, 16]
    assert {"crop_pct", "mean", "std", "interpolation"} <= set(info.preprocess)
    assert {"val_fraction": 0.2, "seed": 0}.items() <= info.split.items()
    assert str(photos.parent) not in json.dumps(dataclasses.asdict(info))
    assert info.version == qtvit.__version__


def test_the_saved_config_repeats_the_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["epochs"], config["img_size"]) == (12, "12x16")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "classify", "--recipe", str(run / "config.yaml")]) == 0
    weights, again = (load_model(folder)[0].state_dict() for folder in (run, "runs/qtvit_nano-photos"))
    for name, tensor in weights.items():
        torch.testing.assert_close(again[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


def test_eval_scores_the_held_out_part(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    assert main(["eval", str(run), "--data", str(photos), "--json", str(out)]) == 0
    scores = json.loads(out.read_text())
    assert (scores["top1"], scores["num_images"]) == (100, 6)
    assert "top-1 100.00 %" in capsys.readouterr().out


def test_eval_knows_the_training_images_in_a_moved_and_changed_folder(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {Path(path).name for path, label in load_labelled_images(str(photos)).val if label == 0}
    moved = tmp_path / "elsewhere"
    shutil.copytree(photos, moved)
    shutil.rmtree(moved / "red")
    draw(moved / "blue" / "new.png", COLORS["blue"], 3)
    samples, which = held_out_samples(str(moved), load_model(run)[1])
    assert "held out from training" in which
    assert len([name for name, label in samples if label == 0 and Path(name).name not in before]) <= 1
    assert len(samples) == 4
    assert main(["eval", str(run), "--data", str(moved)]) == 0
    assert "of 4 images: the part of" in capsys.readouterr().out


def test_eval_on_other_images_counts_all_of_them(run: Path, tmp_path: Path) -> None:
    for i in range(3):
        draw(tmp_path / "other" / "red" / f"{i}.png", COLORS["red"], i)
        draw(tmp_path / "other" / "green" / f"{i}.png", COLORS["blue"], i)  # wrong on purpose
    out = tmp_path / "scores.json"
    assert main(["eval", str(run), "--data", str(tmp_path / "other"), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["num_images"] == 6
    assert json.loads(out.read_text())["top1"] == 50


def test_predict_files_and_folders(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "predictions.json"
    image = photos / "red" / "3.png"
    assert main(["predict", str(run), str(image), str(photos / "blue"), "--top-k", "2", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert len(rows) == 11
    assert [row["predictions"][0]["label"] for row in rows] == ["red", *["blue"] * 10]
    assert len(rows[0]["predictions"]) == 2
    assert capsys.readouterr().out.split()[:2] == [str(image), "red"]


def test_predict_from_python(run: Path, photos: Path) -> None:
    predictor = qtvit.load(run)
    path = photos / "green" / "5.png"
    one = predictor.predict(path)
    assert one.label == "green"
    assert sum(one.probabilities) == pytest.approx(1, abs=1e-6)
    array = np.asarray(Image.open(path))
    for other in predictor.predict((str(path), path.read_bytes(), Image.open(path), array), batch_size=3):
        assert other.labels == one.labels
        assert other.probabilities == pytest.approx(one.probabilities, abs=1e-5)
    assert len(predictor.predict(path, top_k=1).labels) == 1
    with pytest.raises(ValueError, match="top_k must be 1 or more, got 0"):
        predictor.predict(path, top_k=0)
    with pytest.raises(ValueError, match="given as int"):
        predictor.predict(3)


def test_training_goes_on_from_a_run_with_other_classes(run: Path, photos: Path, tmp_path: Path) -> None:
    for name in ("blue", "red"):
        (tmp_path / "two" / name).mkdir(parents=True)
        for file in (photos / name).iterdir():
            (tmp_path / "two" / name / file.name).write_bytes(file.read_bytes())
    argv = f"train classify --model qtvit_nano --data {tmp_path / 'two'} --epochs 1 --batch-size 8"
    output = tmp_path / "tuned"
    options = ["--checkpoint", str(run), "--num-workers", "0", "--lr", "1e-9", "--output", str(output)]
    options += ["--model-args.drop_path_rate", "0.1"]
    assert main([*argv.split(), *options]) == 0
    before, after = (load_model(folder)[0] for folder in (run, output))
    torch.testing.assert_close(after.stages[0][0].conv.weight, before.stages[0][0].conv.weight, atol=1e-6, rtol=0)
    assert after.head.fc.out_features == 2
    assert qtvit.load(output).preprocess == qtvit.load(run).preprocess


def test_weights_that_timm_loaded_are_in_the_model_file(photos: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("qtvit_nano", num_classes=3).state_dict(), weights)
    argv = f"train classify --model qtvit_nano --data {photos} --epochs 1 --batch-size 8 --num-workers 0 --bn-images 8"
    output = tmp_path / "run"
    assert main([*argv.split(), "--model-args.checkpoint_path", str(weights), "--output", str(output)]) == 0
    weights.unlink()
    assert qtvit.load(output).predict(photos / "red" / "0.png").labels


def test_train_and_val_folders_with_worker_and_a_model_of_timm(photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "split"
    for part in ("train", "val"):
        data.mkdir(exist_ok=True)
        (data / part).symlink_to(photos, target_is_directory=True)
    argv = f"train classify --model test_vit --data {data} --img-size 160 --epochs 1 --batch-size 8 --num-workers 1"
    assert main([*argv.split(), "--output", str(tmp_path / "vit")]) == 0
    assert json.loads((tmp_path / "vit" / "summary.json").read_text())["num_params"] > 0


def test_bf16_and_other_kernels_train(photos: Path, tmp_path: Path) -> None:
    argv = f"train classify --model qtvit_nano --data {photos} --img-size 16 --epochs 1 --batch-size 8 --num-workers 0"
    options = "--precision bf16-mixed --model-args.kernel taylor2_paper --model-args.drop_path_rate 0.1 --bn-images 0"
    assert main([*argv.split(), *options.split(), "--output", str(tmp_path / "bf16")]) == 0
    assert qtvit.load(tmp_path / "bf16").model.kernel == "taylor2_paper"


def test_quickstart_ends_with_what_to_type_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Path(qtvit.__file__).parent / "recipes" / "quickstart.yaml"
    short = tmp_path / "quickstart.yaml"
    short.write_text(recipe.read_text().replace("epochs: 10", "epochs: 2"))
    monkeypatch.setattr("qtvit.training.options._recipe_path", lambda name: short)
    assert main(["quickstart", "--output", str(tmp_path / "digits")]) == 0
    out = capsys.readouterr().out
    assert "train classify --model qtvit_1 --data photos" in out
    assert json.loads((tmp_path / "digits" / "summary.json").read_text())["top1"] > 60
    assert main(["eval", str(tmp_path / "digits"), "--data", "digits"]) == 0
    assert "of 359 images" in capsys.readouterr().out


def test_run_folders_are_numbered(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = f"train classify --model qtvit_nano --data {photos} --img-size 8 --epochs 1 --batch-size 16 --num-workers 0"
    for _ in range(2):
        assert main([*argv.split(), "--bn-images", "0"]) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["qtvit_nano-photos", "qtvit_nano-photos-2"]


def test_models_lists_all_with_published_scores_marked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)}
    assert len(rows) == 8
    assert rows["qtvit_1"]["published_imagenet_top1_top5"] == [79.6, 94.7]
    assert rows["qtvit_nano"]["published_imagenet_top1_top5"] is None
    assert main(["models"]) == 0
    assert "as published" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = f"train classify --model qtvit_nano --data {photos} --img-size 16 --epochs 9 --batch-size 8 --num-workers 0"
    assert main([*argv.split(), "--lr", "1e30", "--output", str(tmp_path / "nan")]) == 2
    assert "the loss is nan" in capsys.readouterr().err


def mistakes() -> list[tuple[str, str]]:
    """A command line ({} are the fixtures) and what its one line of error has to say."""
    train = "train classify --model qtvit_nano --num-workers 0 --batch-size 8"
    return [
        (f"{train} --data nowhere", "nowhere: no such folder"),
        (f"{train} --data {{empty}}", "no class folders"),
        (f"{train} --data {{photos}}/red", "no class folders"),
        (
            f"{train} --data {{photos}} --model qtvit_9",
            "unknown model 'qtvit_9'; did you mean qtvit_6 or qtvit_5 or qtvit_4?",
        ),
        (f"{train} --data {{photos}} --model-args.kernal relu", "unexpected keyword argument 'kernal'"),
        (f"{train} --data {{photos}} --model-args.kernel taylor3", "did you mean taylor2"),
        (f"{train} --data {{photos}} --model-args.num_classes 7", "--model-args.num-classes must be left to the data"),
        (f"{train} --data {{photos}} --model vit_tiny_patch16_224 --model-args.depth x", "cannot be built with"),
        (f"{train} --data {{photos}} --augment.auto-augment foo", "--augment.auto-augment 'foo' is not one of timm's"),
        (f"{train} --data {{photos}} --augment.interpolation foo", "--augment.interpolation: Expected a Literal"),
        (f"{train} --data {{photos}} --optim.betas [0.9,2]", "--optim.betas must be two numbers"),
        (f"{train} --data {{splits}}", "has validation/ but no train/"),
        (f"{train} --data {{one_class}}", "one class only (red); there is nothing to tell apart"),
        (f"{train} --data {{only_in_val}}", "class folders that the model or train/ does not have: cow"),
        (f"{train} --data {{not_in_val}}", "val: no folders for blue, which"),
        (f"{train} --data {{broken}}", ".png: broken image (image file is truncated"),
        (f"{train} --data {{photos}}/red/1.png", "a file, where a folder of images is expected"),
        (f"{train} --data {{photos}} --epochs 0", "--epochs must be 1 or more, got 0"),
        (f"{train} --data {{photos}} --img-size 3", "--img-size 3x3 is below the network's minimum of 4 px"),
        (f"{train} --data {{photos}} --model test_vit --img-size 33", "--img-size 33x33 does not fit"),
        (f"{train} --data {{photos}} --freeze stages=7", "--freeze stages=7: QTViT has 3 stages"),
        (f"{train} --data {{photos}} --output {{photos}}/red/1.png/run", "cannot write to this folder"),
        (f"{train} --data {{photos}} --epohs 3", "unknown option '--epohs'; did you mean --epochs"),
        (f"{train} --data {{photos}} --recipe quikstart", "did you mean quickstart"),
        (f"{train} --data {{photos}} --device cuda:99", "no such device: 'cuda:99'; this machine has: cpu"),
        (f"{train} --data {{photos}} --device gpu", "no such device: 'gpu'"),
        (f"{train} --data {{photos}} --device cpu --precision 16-mixed", "16-mixed needs a GPU"),
        (f"{train} --data {{photos}} --batch-size 1000", "--batch-size 1000 is more than the 24 training images"),
        (f"{train} --data {{photos}} --output {{run}}", "exists already"),
        (f"{train} --data {{photos}} --checkpoint nowhere", "nowhere: no such run folder or model file"),
        (f"{train} --data {{photos}} --checkpoint {{run}} --model qtvit_0", "holds qtvit_nano, not qtvit_0"),
        ("train classify", "required: --data"),
        ("eval {run} --data nowhere", "nowhere: no such folder"),
        ("eval {run} --data digits", "the digits are not what qtvit_nano was trained on"),
        ("eval {run} --data {foreign}", "does not have: cow"),
        ("eval {empty} --data {photos}", "no best.safetensors in this folder"),
        ("eval {two_names} --data {photos}", "names 2 classes, but its qtvit_nano has 3"),
        ("eval {run} --data {broken}", ".png: broken image (image file is truncated"),
        ("eval {run} --data {photos} --output {run}", "exists already"),
        ("eval nowhere --data {photos}", "nowhere: no such run folder or model file"),
        ("predict {run} nowhere.jpg", "nowhere.jpg: no such image file"),
        ("predict {run} {empty}", "no images in this folder"),
        ("predict {run} {run}/summary.json", "summary.json: not an image"),
        ("predict {run}/summary.json {photos}", "summary.json: a text file that begins with"),
        ("predict {run} {photos} --device tpu", "no such device: 'tpu'"),
    ]


def bad_folders(root: Path, photos: Path, run: Path) -> dict[str, Path]:
    """Folders, and a model file, that cannot be worked with, by what is wrong with them."""
    layouts = {
        "foreign": ["cow"],
        "splits": ["validation/red", "Testing/red"],
        "one_class": ["red"],
        "only_in_val": ["train/blue", "train/red", "val/blue", "val/cow", "val/red"],
        "not_in_val": ["train/blue", "train/red", "val/red"],
    }
    for name, folders in layouts.items():
        for folder in folders:
            for i in range(4):
                draw(root / name / folder / f"{i}.png", COLORS["red"], i)
    (root / "empty").mkdir()
    shutil.copytree(photos, root / "broken")
    for image in (root / "broken" / "green").iterdir():
        image.write_bytes(image.read_bytes()[:100])
    model, info = load_model(run)
    save_model(root / "two_names.safetensors", model.state_dict(), dataclasses.replace(info, classes=["a", "b"]))
    return {name: root / name for name in ("empty", "broken", *layouts)} | {"two_names": root / "two_names.safetensors"}


@pytest.mark.parametrize(("command", "message"), mistakes())
def test_mistakes_get_one_line_and_exit_code_2(
    command: str, message: str, run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {"run": run, "photos": photos, **bad_folders(tmp_path, photos, run)}
    output = ["--output", str(tmp_path / "out")] if "train" in command and "--output" not in command else []
    assert main([*command.format(**folders).split(), *output]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("qtvit: error: ")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_workers", ["0", "1"])
def test_a_broken_image_is_named_whoever_reads_it(
    num_workers: str, photos: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos, tmp_path / "broken")
    (tmp_path / "broken" / "red" / "0.png").write_text("not a picture")
    (tmp_path / "broken" / "green" / "1.png").write_text("not a picture")
    argv = f"train classify --model qtvit_nano --data {tmp_path / 'broken'} --img-size 8 --epochs 1 --batch-size 8"
    assert main([*argv.split(), "--num-workers", num_workers, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "png: not an image that can be read" in error
    assert "Traceback" not in error
    assert error.count("\n") == 1


def test_a_folder_without_write_permission(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("qtvit.files.tempfile.TemporaryFile", refuse)  # root may write anywhere
    argv = f"train classify --model qtvit_nano --data {photos} --batch-size 8 --output {tmp_path / 'out'}"
    assert main(argv.split()) == 2
    assert (
        capsys.readouterr().err
        == f"qtvit: error: {tmp_path / 'out'}: cannot write to this folder (Permission denied)\n"
    )


@pytest.mark.parametrize(("megabytes", "file"), [(1, "best.safetensors"), (3, "last.ckpt")])
def test_a_disk_that_fills(megabytes: int, file: str, photos: Path, tmp_path: Path) -> None:
    """No file may grow beyond a limit, which is how a full disk looks to a program."""
    resource = pytest.importorskip("resource")
    limit = megabytes * 1_000_000
    argv = f"train classify --model qtvit_nano --data {photos} --img-size 16 --epochs 1 --batch-size 8 --num-workers 0"
    done = subprocess.run(
        [sys.executable, "-m", "qtvit_cli", *argv.split(), "--output", str(tmp_path / "out")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{file}" in done.stderr
    assert "cannot be written" in done.stderr
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert not (tmp_path / "out" / file).exists()


def test_options_out_of_range_are_refused_before_any_work(run: Path, tmp_path: Path) -> None:
    for option in (["--top-k", "0"], ["--batch-size", "-1"], ["--json", str(tmp_path)]):
        with pytest.raises(SystemExit):
            main(["predict", str(run), "x.jpg", *option])


def test_json_makes_its_folder(run: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "scores.json"
    assert main(["eval", str(run), "--data", str(photos), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["num_images"] == 6


@pytest.mark.parametrize("argv", [["fly"], ["train"], ["train", "fly"], ["eval"], ["models", "--jsn"]])
def test_unknown_commands_exit_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(FileNotFoundError):
        main(["predict", "nowhere", "cat.jpg", "--debug"])


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, qtvit_cli\n"
        "try: qtvit_cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'timm', 'qtvit', 'numpy') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "predict" in out
    assert out.splitlines()[-1] == "[]"


def test_train_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "classify", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--img-size" in out
    assert "--augment.random-erasing" in out


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "qtvit.training.options", raising=False)
    assert main(["quickstart"]) == 2
    assert "pip install 'qtvit[train]'" in capsys.readouterr().err


def test_the_missing_extra_is_that_of_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ModuleNotFoundError("No module named 'openvino.runtime'", name="openvino.runtime")

    monkeypatch.setattr("qtvit.models.model_cost", lambda *args: fail())
    assert main(["models"]) == 2
    assert capsys.readouterr().err == "qtvit: error: openvino is not installed; pip install 'qtvit[deploy]'\n"


def test_a_reader_that_leaves_is_no_error(run: Path, photos: Path) -> None:
    command = [sys.executable, "-m", "qtvit", "predict", str(run), str(photos), "--batch-size", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_module_and_script_are_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qtvit", "predict", "nowhere", "x.jpg"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("qtvit: error: nowhere")


@pytest.mark.parametrize("command", ["eval nowhere --data x --batch 2", "predict nowhere x.jpg --top 2", "models --js"])
def test_a_misspelt_option_is_no_abbreviation(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 2
    assert "unrecognized arguments: --" in capsys.readouterr().err
