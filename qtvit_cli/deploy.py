"""Bringing models to other runtimes: ``qtvit export`` and ``doctor``."""

import argparse
from pathlib import Path

from .common import RUN, Commands, make_parent, new_file, positive, write_json


def add_deploy(commands: Commands) -> None:
    """Add the commands that deploy a model."""
    _add_export(commands)
    _add_doctor(commands)


def _add_export(commands: Commands) -> None:
    exporting = commands.add_parser(
        "export",
        help="write a trained model for ONNX Runtime, OpenVINO or torch.export, and check it there",
        description="Writes a model as a file that other runtimes read, with its preprocessing and class names in it. "
        "The file is run in its own runtime next to the model, at several image and batch sizes, and kept only if "
        "they agree. `qtvit predict`, `qtvit eval` and qtvit.load take it like a run.",
        epilog="Precisions: onnx has fp32, fp16, int8; openvino fp32, bf16, fp16, int8; torch fp32, bf16, fp16.",
    )
    exporting.add_argument("run", help=f"{RUN}; or the name of a model, which then has random weights, for timing")
    exporting.add_argument("--format", default="onnx", help="onnx, openvino or torch (default: onnx)")
    exporting.add_argument("--precision", default="fp32", help="fp32, fp16, bf16 or int8 (default: fp32)")
    exporting.add_argument(
        "--img-size",
        nargs="+",
        metavar=("H", "W"),
        help="side, HEIGHTxWIDTH or HEIGHT WIDTH of the images (default: the model's own)",
    )
    exporting.add_argument(
        "--dynamic",
        metavar="AXES",
        help="what is left open: batch, hw (height and width), batch,hw, or none (default: batch; of detectors, always "
        "hw)",
    )
    exporting.add_argument(
        "--calibration",
        metavar="FOLDER",
        help="typical images; int8 measures its ranges on them, and any file is checked on them",
    )
    exporting.add_argument(
        "--data",
        metavar="FOLDER",
        help="labelled images, as for eval, to check the file and its accuracy on (of a detector, the file alone)",
    )
    exporting.add_argument(
        "--max-drop", type=float, default=1.0, metavar="POINTS", help="of top-1 on --data that may be lost (default: 1)"
    )
    exporting.add_argument(
        "--out",
        "--output",
        type=new_file,
        metavar="PATH",
        help="file to write (default: RUN/model.onnx, model-int8.onnx, …)",
    )
    exporting.add_argument("--force", action="store_true", help="replace the file if it exists")
    exporting.set_defaults(command=export)


def _add_doctor(commands: Commands) -> None:
    examination = commands.add_parser(
        "doctor",
        help="find what would overflow or lose precision in fp16, bf16 and int8",
        description="Runs a model on real images and measures every operation: which would overflow or lose precision "
        "in fp16, bf16 and int8, and what comes of the whole model. The exit code is 1 if fp32, fp16 or bf16 gives "
        "infinite outputs or NaN, 0 if not, 2 if nothing could be examined.",
    )
    examination.add_argument("run", help=f"{RUN}; or the name of a model, which then has random weights")
    examination.add_argument("--data", required=True, help="folder of images, packed or not, or digits")
    examination.add_argument(
        "--num-images", type=positive, default=64, help="how many of them, from all over the folder (default: 64)"
    )
    examination.add_argument("--batch-size", type=positive, default=16)
    examination.add_argument("--img-size", metavar="SIZE", help="side or HEIGHTxWIDTH (default: the model's own)")
    examination.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    examination.add_argument("--all", action="store_true", help="print all layers, not the worst 20 alone")
    examination.add_argument("--json", type=new_file, metavar="FILE", help="also write all that was measured to FILE")
    examination.add_argument("--plot", type=_png, metavar="FILE", help="also draw the ranges of all layers: a .png")
    examination.set_defaults(command=doctor)


def export(args: argparse.Namespace) -> None:
    """``qtvit export``."""
    from qtvit import console
    from qtvit.data.preprocess import parse_size
    from qtvit.deploy.export import export_model

    done = export_model(
        args.run,
        format=args.format,
        precision=args.precision,
        img_size=parse_size("x".join(args.img_size)) if args.img_size else None,
        dynamic=_axes(args.dynamic),
        calibration=args.calibration,
        data=args.data,
        max_drop=args.max_drop,
        out=args.out,
        force=args.force,
    )
    console.say(f"checked next to the model on {done.images}:")
    for line in done.report.lines():
        console.result(line)
    print(f"written: {', '.join(f'{path} ({path.stat().st_size / 1e6:.1f} MB)' for path in done.files)}")


def doctor(args: argparse.Namespace) -> int:
    """``qtvit doctor``; 1 if the model as it is gives infinite outputs or NaN."""
    from qtvit import console
    from qtvit.data.preprocess import parse_size
    from qtvit.doctor import examine
    from qtvit.doctor.text import lines

    img_size = parse_size(args.img_size) if args.img_size else None
    make_parent(args.json)
    make_parent(args.plot)
    if args.plot:
        from qtvit.doctor.draw import draw  # before the work, in case matplotlib is missing
    report = examine(
        args.run,
        args.data,
        num_images=args.num_images,
        batch_size=args.batch_size,
        img_size=img_size,
        device=args.device,
    )
    for line in lines(report, args.all):
        console.result(line)
    if args.json:
        write_json(args.json, report.to_dict())
    if args.plot:
        draw(report, args.plot)
        print(f"written: {args.plot}")
    return int(not report.is_finite)


def _axes(text: str | None) -> list[str] | None:
    if text is None:
        return None
    return [] if text == "none" else [name.strip() for name in text.split(",")]


def _png(text: str) -> Path:
    path = new_file(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{path} does not end in .png")
    return path
