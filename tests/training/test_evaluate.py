import math

import pytest
import torch
from torch import nn

from qtvit.models import build_model
from qtvit.training.classify import parameter_groups, warmup_cosine
from qtvit.training.evaluate import Evaluation


def test_accuracy_and_confusion_by_hand() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
    evaluation = Evaluation(["a", "b", "c"], torch.tensor([0, 1, 1, 0]), probabilities, 1.0)
    assert evaluation.accuracy(1) == 50
    assert evaluation.accuracy(2) == 75
    assert evaluation.accuracy(5) == 100
    assert evaluation.confusion().tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]


def test_learning_rate_rises_then_falls() -> None:
    factors = [warmup_cosine(step, num_steps=10, num_warmup=4) for step in range(11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1
    assert factors[7] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert factors[10] == pytest.approx(0)


def test_decay_follows_the_released_names() -> None:
    model = build_model("qtvit_nano")
    exempt = model.no_weight_decay()
    assert {"stages.1.1.attn.proj.norm.weight", "stages.1.1.local.depth_conv.conv.bias", "head.norm.bias"} <= exempt
    decayed = {"stages.1.1.attn.scalars.c", "stages.1.1.attn.shortcut_norm.weight", "stages.1.1.attn.pos_embed"}
    assert not decayed & exempt
    with_decay, without = parameter_groups(model, 0.1)
    assert (with_decay["weight_decay"], without["weight_decay"]) == (0.1, 0.0)
    assert len(without["params"]) == len(exempt)
    assert len(with_decay["params"]) + len(without["params"]) == len(list(model.parameters()))
    assert len(parameter_groups(nn.Linear(2, 2), 0.1)) == 2
