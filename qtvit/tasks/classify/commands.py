"""What the command line asks and prints for classifiers."""

import argparse
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..commands import EvalReport, Option, Quickstart, TaskCommands


class ClassifyCommands(TaskCommands):
    """The part of the commands that is about labels of images."""

    noun = "classifier"
    eval_options = (
        Option("--batch-size", "images at a time (default: 64)", 64, {"type": "positive"}),
        Option("--on-bad-image", "what to do about unreadable files (stop)", "stop", {"choices": ("stop", "skip")}),
    )
    predict_options = (
        Option("--top-k", "classes to show per image (default: 5)", 5, {"type": "positive"}),
        Option("--batch-size", "images at a time (default: 32)", 32, {"type": "positive"}),
        Option("--csv", "a table of image, rank, label, …", None, {"type": "new_file", "metavar": "FILE"}),
    )
    check_options = (
        Option("--min-side", "report smaller images (default: 32)", 32, {"type": "positive", "metavar": "PX"}),
    )
    quickstart = Quickstart(
        "quickstart",
        """
Next, with your own images in folders named by class (photos/cat/1.jpg, photos/dog/2.jpg, …):

    {command} train classify --model qtvit_1 --data photos --epochs 50
    {command} eval runs/qtvit_1-photos --data photos
    {command} predict runs/qtvit_1-photos some_image.jpg

and with the model just trained:  {command} eval {run} --data digits""",
    )

    def evaluate(self, args: argparse.Namespace, predictor: Any) -> Callable[[], EvalReport]:
        from qtvit.errors import some

        from .evaluate import evaluate
        from .held_out import held_out_samples
        from .report import class_table, headline, scores, write_report
        from .unreadable import drop_broken

        samples, which = held_out_samples(args.data, predictor.info)

        def run() -> EvalReport:
            readable = drop_broken(samples) if args.on_bad_image == "skip" else samples
            evaluation = evaluate(predictor, readable, batch_size=args.batch_size, num_workers=args.num_workers)
            absent = [row.label for row in evaluation.per_class() if row.num_images == 0]
            about = {"run": args.run, "data": args.data, "images": which}
            remark = f"no images of {len(absent)} of the {len(predictor.classes)} classes: {some(absent)}"
            return EvalReport(
                f"{headline(evaluation)}: {which}",
                class_table(evaluation),
                scores(evaluation, about),
                lambda folder: write_report(evaluation, readable, folder, about),
                [remark] if absent else [],
            )

        return run

    def iter_predict(self, args: argparse.Namespace, predictor: Any, files: Sequence[Path]) -> Iterator[Any]:
        skip = args.on_bad_image == "skip"
        return predictor.iter_predict(files, args.top_k, args.batch_size, skip_broken=skip)

    def line(self, prediction: Any, predictor: Any) -> str:
        from qtvit.console import shorten

        width = min(max(map(len, predictor.classes)), 30)
        (label, p), *rest = zip(prediction.labels, prediction.probabilities, strict=True)
        others = "   ".join(f"{shorten(other, width)} {q:.1%}" for other, q in rest)
        return f"{shorten(label, width):<{width}}  {p:>6.1%}   {others}"

    def row(self, prediction: Any) -> dict[str, Any]:
        pairs = zip(prediction.labels, prediction.probabilities, strict=True)
        return {"predictions": [{"label": label, "probability": p} for label, p in pairs]}

    def picture(self, image: Any, prediction: Any, predictor: Any) -> tuple[Any, Sequence[str]]:
        pairs = zip(prediction.labels, prediction.probabilities, strict=True)
        return image, [f"{p:.0%} {label}" for label, p in pairs]

    def write_csv(self, path: Path, rows: Sequence[dict[str, Any]]) -> None:
        from qtvit.files import write_text

        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["image", "rank", "label", "probability"])
        for row in rows:
            for rank, found in enumerate(row["predictions"], start=1):
                writer.writerow([row["image"], rank, found["label"], f"{found['probability']:.6f}"])
        write_text(path, table.getvalue())
        print(f"written: {path}")
