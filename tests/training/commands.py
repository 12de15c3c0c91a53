"""Runs ``qtvit`` commands one after another in this process, since importing torch and Lightning takes seconds.

Its argument is a JSON list of [command, event]. The event is null or [what, n]: before the n-th training step, "die"
kills this process, and "interrupt" is Ctrl-C at torchrun.
"""

import itertools
import json
import os
import signal
import sys
import time
from typing import Any
from unittest import mock

from qtvit.tasks.classify.train import Classifier
from qtvit.training.callbacks import SaveState
from qtvit_cli import main

TRAINING_STEP = Classifier.training_step


def _step_with(what: str, call: int) -> Any:
    calls = itertools.count(1)

    def step(task: Classifier, *args: Any) -> Any:
        if next(calls) == call:
            if what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if task.global_rank == 0:
                os.kill(os.getppid(), signal.SIGINT)
            save_state = next(c for c in task.trainer.callbacks if isinstance(c, SaveState))
            while not save_state.stopping:  # the signal comes by way of torchrun
                time.sleep(0.01)
        return TRAINING_STEP(task, *args)

    return step


for command, event in json.loads(sys.argv[1]):
    with (
        mock.patch.object(Classifier, "training_step", _step_with(*event) if event else TRAINING_STEP),
        mock.patch("qtvit.training.job.plot_curves"),
        mock.patch("qtvit.tasks.classify.train.write_report"),
    ):
        code = main(command.split())
    if os.environ["RANK"] == "0":
        print(f"exit code {code}", flush=True)
