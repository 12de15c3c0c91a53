"""A task from outside the package, all of it in one module: tell how bright an image is, from 0 to 1."""

import argparse
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtvit.checkpoints import ModelInfo, own_args
from qtvit.data import ImageSource, Preprocess, ProblemReport, find_images, open_image
from qtvit.deploy.artifact import Artifact
from qtvit.deploy.export import Exporter, chosen
from qtvit.deploy.predictor import Predictor
from qtvit.files import write_text
from qtvit.models import build_model
from qtvit.tasks import Task
from qtvit.tasks.commands import EvalReport, Option, TaskCommands
from qtvit.training.config import TrainConfig
from qtvit.training.job import Job, Speed, Summary, make_loaders
from qtvit.training.task import Task as TaskInTraining

TASK = Task(
    name="brightness",
    what="how bright an image is",
    package="tests.tasks",
    build="toy.build",
    config="toy.BrightnessConfig",
    job="toy.BrightnessJob",
    predictor="toy.BrightnessPredictor",
    exporter="toy.BrightnessExporter",
    check="toy.check",
    commands="toy.BrightnessCommands",
)
PREPROCESS = Preprocess((16, 16), 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Images:
    """The images of a folder, each named by its brightness in percent, and a number."""

    name: str
    train: list[Path]
    val: list[Path]

    def digest(self) -> str:
        return hashlib.sha256(" ".join(path.name for path in self.train + self.val).encode()).hexdigest()


def read(folder: str) -> Images:
    root = Path(folder)
    return Images(root.name, find_images(root / "train"), find_images(root / "val"))


def truth(path: Path) -> float:
    return int(path.stem.split("-")[0]) / 100


class Dataset(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.paths[index]
        return PREPROCESS.transform()(open_image(path)), torch.tensor([truth(path)])


def build(name: str, model_args: dict[str, Any], task_args: dict[str, Any]) -> nn.Module:
    return build_model(name, **model_args)


def check(folder: str, num_threads: int, darkest: int) -> ProblemReport:
    dark = [str(path) for path in find_images(Path(folder)) if 100 * truth(path) < darkest]
    return ProblemReport(["images of some brightness"], {"too dark": dark})


@dataclass
class BrightnessConfig(TrainConfig):
    """Train a model that tells how bright an image is.

    Args:
        power: of the error in the loss.
    """

    task: ClassVar[str] = "brightness"

    power: float = 2.0


@dataclass(frozen=True)
class BrightnessSummary(Summary):
    error: float
    train_seconds: float
    train_images_per_second: float | None

    def lines(self) -> list[tuple[str, str]]:
        return [("error", f"{self.error:.3f}")]


class Regressor(TaskInTraining):
    config: BrightnessConfig

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        loss = (self.model(images) - targets).abs().pow(self.config.power).mean()
        self.count_loss(loss, len(images))
        return loss

    def on_validation_epoch_start(self) -> None:
        self.errors: list[Tensor] = []

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, targets = batch
        self.errors.append((self.model(images) - targets).abs().flatten())

    def on_validation_epoch_end(self) -> None:
        self.log("val/goodness", 1 - torch.cat(self.errors).mean())
        super().on_validation_epoch_end()


class BrightnessJob(Job[BrightnessConfig, BrightnessSummary]):
    monitor = "val/goodness"
    score = "goodness"
    columns: ClassVar = {"train/loss": "loss {:.4f}", "val/goodness": "goodness {:.3f}"}
    curves: ClassVar = {"Loss": {"": "train/loss"}}

    def read_data(self, config: BrightnessConfig) -> Images:
        return read(config.data)

    def build(self, config: BrightnessConfig, data: Images) -> tuple[nn.Module, ModelInfo]:
        args = {**config.model_args, "num_classes": 1}
        name = config.model or "qtvit_nano"
        info = ModelInfo(name, own_args(args), ["brightness"], asdict(PREPROCESS), task="brightness")
        return build(name, args, {}), info

    def set_up(self, model: Any, device: torch.device, past: dict[str, Any]) -> None:
        data = self.data
        self.task = Regressor(model, self.config)
        train, val = Dataset(data.train), Dataset(data.val)
        self.loaders = make_loaders(self.config, device, [train], len(train), val, len(val))
        self.sources = data.train
        self.about = f"{data.name}: {len(train)} images"

    def resolved(self) -> dict[str, Any]:
        return {}

    def report(self, run: Path, speed: Speed) -> BrightnessSummary:
        predictor = BrightnessPredictor.load(run, self.config.device)
        return BrightnessSummary(str(run), mean_error(predictor, self.data.val), **speed.summary())


class BrightnessPredictor(Predictor[float]):
    task = "brightness"

    def predict(self, images: Any, *args: Any, **options: Any) -> Any:
        return list(self.iter_predict(images))

    def iter_predict(self, images: Sequence[ImageSource]) -> Iterator[float | None]:
        return self._iterate(images, 4, False, PREPROCESS.transform(), self._run)

    @torch.inference_mode()
    def _run(self, pixels: list[Tensor]) -> list[float]:
        return self.runtime(torch.stack(pixels)).flatten().tolist()


def mean_error(predictor: BrightnessPredictor, paths: Sequence[Path]) -> float:
    found = torch.tensor(predictor.predict(paths))
    return float(F.l1_loss(found, torch.tensor([truth(path) for path in paths])))


class BrightnessExporter(Exporter):
    def check_images(self, artifact: Artifact) -> tuple[list[ImageSource], None, str]:
        images = self.request.calibration or []
        return [images[i] for i in chosen(len(images), 4)], None, "some images"


class BrightnessCommands(TaskCommands):
    noun = "brightness"
    eval_options = (Option("--worst", "how many to name", 1, {"type": "positive"}),)
    predict_options = (Option("--digits", "of the number", 2, {"type": int}),)
    check_options = (Option("--darkest", "least brightness in percent", 0, {"type": int}),)

    def evaluate(self, args: argparse.Namespace, predictor: Any) -> Callable[[], EvalReport]:
        paths = read(args.data).val

        def run() -> EvalReport:
            error = mean_error(predictor, paths)
            lines = [path.name for path in paths[: args.worst]]

            def write(folder: Path) -> None:
                write_text(folder / "error.txt", str(error))

            return EvalReport(f"error {error:.3f}", lines, {"error": error}, write)

        return run

    def iter_predict(self, args: argparse.Namespace, predictor: Any, files: Sequence[Path]) -> Iterator[Any]:
        return iter([round(found, args.digits) for found in predictor.predict(files)])

    def line(self, prediction: Any, predictor: Any) -> str:
        return f"brightness {prediction}"

    def row(self, prediction: Any) -> dict[str, Any]:
        return {"brightness": prediction}

    def picture(self, image: Any, prediction: Any, predictor: Any) -> tuple[Any, Sequence[str]]:
        return image, [str(prediction)]
