"""The model card: a model's architecture, data, training, scores, use and licence."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from qtvit.errors import some
from qtvit.models import QTViT, model_cost
from qtvit.version import __version__

from .hub import HUB
from .model_file import ModelInfo, own_args

METRICS = {
    "top1": "Top-1 (%)",
    "top5": "Top-5 (%)",
    "balanced_accuracy": "Mean recall of the classes (%)",
    "ece": "Expected calibration error (%)",
    "loss": "Cross-entropy",
}
SETTINGS = {
    "epochs": "Epochs",
    "batch_size": "Batch size per device",
    "accumulate": "Batches per step",
    "lr": "Peak learning rate per device",
    "precision": "Precision",
    "train_images": "Training images used",
    "freeze": "Kept as it was",
    "checkpoint": "Started from",
    "seed": "Seed",
}
"""Settings in a run's config.yaml that the card lists, if they are set, above the whole file."""
NUM_CLASSES_SHOWN = 50
CITATION = """\
@inproceedings{xu2024qtvit,
  title = {{QT-ViT}: Improving Linear Attention in {ViT} with Quadratic {Taylor} Expansion},
  author = {Xu, Yixing and Li, Chao and Li, Dong and Sheng, Xiao and Jiang, Fan and Tian, Lu and Barsoum, Emad},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024}
}"""


def model_card(
    model: nn.Module,
    info: ModelInfo,
    repo_id: str,
    run: Path | None = None,
    *,
    license: str | None = None,
    dataset: str | None = None,
) -> ModelCard:
    """Generate the card of a model that will be ``repo_id`` on the Hub.

    Args:
        model, info: the result of `load_model`.
        repo_id: "USER/MODEL".
        run: run folder; its config.yaml, scores.json and summary.json are used, without folders and servers in them.
        license, dataset: the Hub's identifiers of the weights' licence and of the training data.
    """
    files = ("config.yaml", "summary.json", "scores.json")
    config, summary, scores = (_read(run / name) if run else {} for name in files)
    metrics = {**info.metrics, **scores}
    data = dataset or config.get("data")
    ours = isinstance(model, QTViT)
    checkpoint = str(config.get("checkpoint"))
    shown = [name for name in ("top1", "top5") if name in metrics and (name == "top1" or len(info.classes) > 5)]
    facts = ModelCardData(
        library_name="timm",
        tags=["image-classification", "timm", "qtvit"],
        pipeline_tag="image-classification",
        license=license,
        datasets=[dataset] if dataset else None,
        base_model=checkpoint.removeprefix(HUB).partition("@")[0] if checkpoint.startswith(HUB) else None,
        metrics=["accuracy"] if "top1" in metrics else None,
        model_name=repo_id.split("/")[-1],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset or "imagefolder",
                dataset_name=data or "held-out images",
                metric_type="accuracy",
                metric_name=METRICS[name],
                metric_value=round(metrics[name], 2),
            )
            for name in shown
        ]
        or None,
    )
    parts = [
        f"# {repo_id.split('/')[-1]}",
        _what(model, info, data),
        *_scores(metrics, len(info.classes), data),
        "## Use",
        _use(info, repo_id, ours),
        *_training(config, summary, info.metrics.get("epoch")),
        "## Licence",
        f"The weights: {license}." if license else "The author of these weights has stated no licence for them.",
        "The code, qtvit, is under Apache-2.0.",
    ]
    if ours:
        parts += ["## Citation", f"```bibtex\n{CITATION}\n```"]
    return ModelCard(f"---\n{facts.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _what(model: nn.Module, info: ModelInfo, data: str | None) -> str:
    """The section that describes the network and its classes."""
    preprocess = dict(info.preprocess)
    height, width = preprocess.pop("size")
    cost = model_cost(model, (height, width))
    args = {name: value for name, value in own_args(info.model_args).items() if name != "num_classes"}
    rows = {
        "Network": ", ".join([_code(info.model), *(_code(f"{name}={value}") for name, value in args.items())]),
        "Size": f"{cost.num_params / 1e6:,.2f} M parameters, {cost.num_macs / 1e6:,.0f} M multiply-accumulates (MACs)",
        "Images": f"{height} x {width} px (height x width); "
        + ", ".join(f"{name} {_show(value)}" for name, value in preprocess.items()),
        "Weights": info.source and f"converted from {_code(info.source)}",
        "Made with": f"qtvit {info.version or __version__}",
    }
    kind = f" with the network of QT-ViT (attention kernel {_code(model.kernel)})" if isinstance(model, QTViT) else ""
    head = f"An image classifier{kind}{f', trained on {_code(data)}' if data else ''}."
    classes = f"{len(info.classes)} classes: {some([*map(_code, info.classes)], NUM_CLASSES_SHOWN)}."
    tail = classes if info.classes else "It has no classifier: its output are features."
    return "\n\n".join([head, _table({name: value for name, value in rows.items() if value}), tail])


def _scores(metrics: Mapping[str, Any], num_classes: int, data: str | None) -> list[str]:
    rows = {
        text: f"{metrics[name]:.4f}" if name == "loss" else f"{metrics[name]:.2f}"
        for name, text in METRICS.items()
        if name in metrics and (name != "top5" or num_classes > 5)
    }
    count = f"{metrics['num_images']:,} " if "num_images" in metrics else ""
    where = f" of {_code(data)}" if data else ""
    chosen = "; the epoch whose weights were kept was chosen by them too" if "epoch" in metrics else ""
    head = f"On {count}images{where} that were held out from training{chosen}:"
    return ["## Scores", head, _table(rows)] if rows else []


def _use(info: ModelInfo, repo_id: str, ours: bool) -> str:
    name = f"{HUB}{repo_id}"
    in_chans = info.model_args.get("in_chans", 3)
    height, width = info.preprocess["size"]
    imports = "import qtvit  # registers the network with timm\n" * ours + "import timm\nimport torch"
    create = f'model = timm.create_model("{name}", pretrained=True).eval()'
    if in_chans != 3 or not info.classes:
        run = f"output = model(torch.zeros(1, {in_chans}, {height}, {width}))"
        return f"```python\n{imports}\n\n{create}\n{run}\n```"
    return f"""With the package `qtvit`, at the command line, to label images and to train on from here:

```sh
qtvit predict {name} image.jpg
qtvit train classify --checkpoint {name} --data photos
```

from Python:

```python
import qtvit

print(qtvit.load("{name}").predict("image.jpg"))
```

and through timm:

```python
{imports}
from PIL import Image

{create}
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
with torch.inference_mode():
    probabilities = model(transform(Image.open("image.jpg").convert("RGB"))[None])[0].softmax(-1)
best = int(probabilities.argmax())
print(model.pretrained_cfg["label_names"][best], float(probabilities[best]))
```"""


def _training(config: Mapping[str, Any], summary: Mapping[str, Any], epoch: float | None) -> list[str]:
    if not config:
        return []
    rows = {text: _show(config[name]) for name, text in SETTINGS.items() if config.get(name) is not None}
    if epoch is not None:
        rows["Epochs"] += f", of which the weights are those after epoch {epoch:.0f}"
    if "train_seconds" not in summary:
        rows["Epochs"] += "; this run was not finished"
    else:
        rows["Time"] = f"{summary['train_seconds'] / 60:,.1f} minutes on {config.get('device')}"
    recipe = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return [
        "## Training",
        _table(rows),
        "<details>\n<summary>All settings, as in config.yaml</summary>\n\n"
        f"`qtvit train classify --recipe config.yaml` takes them.\n\n```yaml\n{recipe}```\n\n</details>",
    ]


def _read(path: Path) -> dict[str, Any]:
    """The content of a YAML or JSON file, without the author's folders and servers; empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        return _public(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: damaged, and the model card is made of it ({error})") from error


def _public(value: Any) -> Any:
    """``value`` with every absolute path and URL in it cut to its last part."""
    match value:
        case dict():
            return {name: _public(item) for name, item in value.items()}
        case list():
            return [_public(item) for item in value]
        case str() if "://" in value:
            return Path(urlsplit(value).path).name
        case str() if Path(value).is_absolute():
            return Path(value).name
    return value


def _show(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_show, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _code(text: str) -> str:
    """``text`` as Markdown code, so that no character in it is markup."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _table(rows: Mapping[str, str]) -> str:
    lines = ["| {} | {} |".format(name, value.replace("|", "\\|")) for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
