"""Files of weights and the list of models: ``qtvit convert``, ``push`` and ``models``."""

import argparse
import json
import shlex
from pathlib import Path

from .common import RUN, Commands, command_name, make_parent, new_file, pick, positive


def add_weights(commands: Commands) -> None:
    """Add the commands about files of weights and models."""
    conversion = commands.add_parser(
        "convert",
        help="make a model file of weights of others: the authors' release, EfficientViT (MIT's, timm's)",
        description="Finds the model that the weights are of, maps every tensor, and writes a model file that every "
        "command and timm take; whatever it cannot explain is an error.",
    )
    add = conversion.add_argument
    add("src", help="weights (.pt, .pth, .safetensors), model file, run folder, or nano-cifar10")
    add("dst", type=new_file, help="file to write: .safetensors; with --to released .pt or .pth too")
    add("--model", metavar="NAME", help="the model they have to be of (default: found by shapes)")
    add("--kernel", metavar="NAME", help="attention kernel of the model to write (taylor2 for EfficientViT's weights)")
    add("--img-size", nargs=2, type=positive, metavar=("H", "W"), help="image size to resize positional maps to")
    add("--ema", action="store_true", help="take the moving average in a training checkpoint")
    add("--classes", type=Path, metavar="FILE", help="names of the classes, one a line")
    add("--to", choices=("qtvit", "released"), default="qtvit", help="released: names of the authors' code (qtvit)")
    add("--overwrite", action="store_true", help="replace DST if it exists")
    add("-v", "--verbose", action="store_true", help="list every tensor")
    conversion.set_defaults(command=convert)

    publication = commands.add_parser(
        "push",
        help="put a trained model on the Hugging Face Hub, with a model card",
        description="Uploads the model, the description that timm.create_model needs, and a model card. A README.md in "
        "the folder of RUN is the card; without one it is written from what the run says, but does not replace one on "
        "the Hub. `hf auth login`, or HF_TOKEN, says who you are.",
    )
    add = publication.add_argument
    add("run", help=RUN)
    add("name", metavar="USER/MODEL", help="what to call it on the Hub; made if it is not there")
    add("--private", action="store_true", help="nobody else is to see it")
    add("--folder", metavar="DIR", help="write the files to a new folder, and upload nothing")
    add("--license", metavar="ID", help="of the weights, as the Hub calls it: apache-2.0, mit, …")
    add("--dataset", metavar="ID", help="what it was trained on, if that is on the Hub: uoft-cs/cifar10, …")
    publication.set_defaults(command=push)

    models = commands.add_parser("models", help="list the models with size, cost and published accuracy")
    models.add_argument("--json", action="store_true", help="print JSON instead of a table")
    models.set_defaults(command=list_models)


def convert(args: argparse.Namespace) -> None:
    """``qtvit convert``."""
    released = args.to == "released"
    suffixes = [".safetensors", *([".pt", ".pth"] if released else [])]
    if args.dst.suffix.lower() not in suffixes:
        raise ValueError(f"{args.dst}: the file to write has to end in {' or '.join(suffixes)}")
    if args.dst.exists() and not args.overwrite:
        raise FileExistsError(f"{args.dst} exists already; name another file, or replace it with --overwrite")
    classes = None
    if args.classes:
        classes = [line.strip() for line in args.classes.read_text(encoding="utf-8").splitlines() if line.strip()]

    from qtvit import checkpoints

    options = pick(args, "model", "kernel", "img_size", "ema")
    conversion = checkpoints.convert(args.src, classes=classes, **options)
    if released:
        checkpoints.save_released(args.dst, conversion.state_dict, conversion.info)
    else:
        make_parent(args.dst)
        checkpoints.save_model(args.dst, conversion.state_dict, conversion.info)
    print(conversion.report(args.verbose))
    print(f"written: {args.dst}")


def push(args: argparse.Namespace) -> None:
    """``qtvit push``."""
    from qtvit.checkpoints import push_model

    place = push_model(args.run, args.name, **pick(args, "folder", "private", "license", "dataset"))
    if args.folder:
        print(f"written: {place} (model.safetensors, config.json, README.md)")
        print(f'it loads like a run folder, and as timm.create_model("local-dir:{place}", pretrained=True)')
        print(f"to upload it: {command_name()} push {shlex.quote(place)} {args.name}")
    else:
        print(f"pushed: {place}")
        print(f"to use it: {command_name()} predict hf-hub:{args.name} image.jpg")


def list_models(args: argparse.Namespace) -> None:
    """``qtvit models``."""
    import torch

    from qtvit.models import ARCHITECTURES, PUBLISHED_ACCURACY, build_model, model_cost

    costs = {}
    for name, architecture in ARCHITECTURES.items():
        with torch.device("meta"):
            costs[name] = model_cost(build_model(name), (architecture.img_size, architecture.img_size))
    if args.json:
        rows = [
            {
                "model": name,
                "img_size": ARCHITECTURES[name].img_size,
                "num_params": cost.num_params,
                "num_macs": cost.num_macs,
                "published_imagenet_top1_top5": PUBLISHED_ACCURACY.get(name),
            }
            for name, cost in costs.items()
        ]
        print(json.dumps(rows, indent=2))
        return
    print(f"{'model':<12}{'px':>5}{'params':>11}{'MACs':>11}{'top-1 *':>10}{'top-5 *':>9}")
    for name, cost in costs.items():
        published = [f"{accuracy:.1f}" for accuracy in PUBLISHED_ACCURACY.get(name, ())] or ["–", "–"]
        print(
            f"{name:<12}{ARCHITECTURES[name].img_size:>5}{cost.num_params / 1e6:>9.2f} M{cost.num_macs / 1e9:>9.3f} G"
            f"{published[0]:>10}{published[1]:>9}"
        )
    print("* ImageNet-1k accuracy in percent as published by the paper's authors, not reproduced here")
