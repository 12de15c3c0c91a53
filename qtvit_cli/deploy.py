"""Bring models to other runtimes: ``qtvit export`` and ``doctor``."""

import argparse
from pathlib import Path

from .common import RUN, Commands, make_parent, new_file, pick, positive, write_json


def add_deploy(commands: Commands) -> None:
    """Add the commands that deploy a model."""
    exporting = commands.add_parser(
        "export",
        help="write a trained model for ONNX Runtime, OpenVINO or torch.export, and check it there",
        description="Writes a model as a file that other runtimes read, with its preprocessing and class names in it. "
        "The file is run in its own runtime next to the model, at several image and batch sizes, and kept only if "
        "they agree. `qtvit predict`, `qtvit eval` and qtvit.load take it like a run.",
        epilog="Precisions: onnx has fp32, fp16, int8; openvino fp32, bf16, fp16, int8; torch fp32, bf16, fp16.",
    )
    add = exporting.add_argument
    add("run", help=f"{RUN}; or the name of a model, which then has random weights, for timing")
    add("--format", default="onnx", help="onnx, openvino or torch (default: onnx)")
    add("--precision", default="fp32", help="fp32, fp16, bf16 or int8 (default: fp32)")
    add(
        "--img-size",
        nargs="+",
        metavar=("H", "W"),
        help="side, HEIGHTxWIDTH or HEIGHT WIDTH of the images (default: the model's own)",
    )
    add(
        "--dynamic",
        metavar="AXES",
        help="what is left open: batch, hw (height and width), batch,hw, or none (default: batch; of detectors, always "
        "hw)",
    )
    add(
        "--calibration",
        metavar="FOLDER",
        help="typical images; int8 measures its ranges on them, and any file is checked on them",
    )
    add(
        "--data",
        metavar="FOLDER",
        help="labelled images, as for eval, to check the file and its accuracy on (of a detector, the file alone)",
    )
    add(
        "--max-drop", type=float, default=1.0, metavar="POINTS", help="of top-1 on --data that may be lost (default: 1)"
    )
    where = "file to write (default: RUN/model.onnx, model-int8.onnx, …)"
    add("--out", "--output", type=new_file, metavar="PATH", help=where)
    add("--force", action="store_true", help="replace the file if it exists")
    exporting.set_defaults(command=export)

    examination = commands.add_parser(
        "doctor",
        help="find what would overflow or lose precision in fp16, bf16 and int8",
        description="Runs a model on real images and measures every operation: which would overflow or lose precision "
        "in fp16, bf16 and int8, and what comes of the whole model. The exit code is 1 if fp32, fp16 or bf16 gives "
        "infinite outputs or NaN, 0 if not, 2 if nothing could be examined.",
    )
    add = examination.add_argument
    add("run", help=f"{RUN}; or the name of a model, which then has random weights")
    add("--data", required=True, help="folder of images, packed or not, or digits")
    add("--num-images", type=positive, default=64, help="how many of them, from all over the folder (default: 64)")
    add("--batch-size", type=positive, default=16)
    add("--img-size", metavar="SIZE", help="side or HEIGHTxWIDTH (default: the model's own)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--all", action="store_true", help="print all layers, not the worst 20 alone")
    add("--json", type=new_file, metavar="FILE", help="also write all that was measured to FILE")
    add("--plot", type=_png, metavar="FILE", help="also draw the ranges of all layers: a .png")
    examination.set_defaults(command=doctor)


def export(args: argparse.Namespace) -> None:
    """``qtvit export``."""
    from qtvit import console
    from qtvit.data.preprocess import parse_size
    from qtvit.deploy.export import export_model

    dynamic = None if args.dynamic is None else [name.strip() for name in args.dynamic.split(",")]
    done = export_model(
        args.run,
        img_size=parse_size("x".join(args.img_size)) if args.img_size else None,
        dynamic=[] if args.dynamic == "none" else dynamic,
        **pick(args, "format", "precision", "calibration", "data", "max_drop", "out", "force"),
    )
    console.say(f"checked next to the model on {done.images}:")
    for line in done.report.lines():
        console.result(line)
    print(f"written: {', '.join(f'{path} ({path.stat().st_size / 1e6:.1f} MB)' for path in done.files)}")


def doctor(args: argparse.Namespace) -> int:
    """``qtvit doctor``; returns 1 if the model gives infinite outputs or NaN."""
    from qtvit import console
    from qtvit.data.preprocess import parse_size
    from qtvit.doctor import examine
    from qtvit.doctor.text import lines

    img_size = parse_size(args.img_size) if args.img_size else None
    make_parent(args.json)
    make_parent(args.plot)
    if args.plot:
        from qtvit.doctor.draw import draw  # before the work, in case matplotlib is missing
    report = examine(args.run, args.data, img_size=img_size, **pick(args, "num_images", "batch_size", "device"))
    for line in lines(report, args.all):
        console.result(line)
    if args.json:
        write_json(args.json, report.to_dict())
    if args.plot:
        draw(report, args.plot)
        print(f"written: {args.plot}")
    return int(not report.is_finite)


def _png(text: str) -> Path:
    path = new_file(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{path} does not end in .png")
    return path
