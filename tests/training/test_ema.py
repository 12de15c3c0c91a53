"""The moving average, against numbers computed by hand."""

import copy
import io
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from qtvit.models import Architecture, QTViT
from qtvit.training.ema import MovingAverage

DECAY, WARMUP = 0.9998, 4000


def set_weight(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        model.weight.fill_(value)


def by_hand(values: list[float], decay: float, warmup_steps: float) -> list[float]:
    """The average after each update; the first value is the one that it begins with."""
    average, averages = values[0], []
    for step, value in enumerate(values[1:], 1):
        now = decay * (1 - math.exp(-step / warmup_steps)) if warmup_steps else decay
        average = now * average + (1 - now) * value
        averages.append(average)
    return averages


def steps(model: nn.Module, average: MovingAverage, num: int, seed: int) -> None:
    """Training steps, with statistics and weights that change."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num):
        model.train()(torch.randn(4, 3, 64, 64, generator=generator))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        average.update_parameters(model)


def assert_equal(ours: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert ours.keys() == want.keys()
    assert [key for key, value in ours.items() if not torch.equal(value, want[key])] == []


@pytest.mark.parametrize(("decay", "warmup_steps"), [(DECAY, WARMUP), (0.9, 3), (0.9, 0), (0.0, 10)])
def test_every_step_by_hand(decay: float, warmup_steps: int) -> None:
    values = [1.0, 3.0, -2.0, 0.5, 7.0, 7.0, -4.0]
    model = nn.Linear(1, 1, bias=False).double()
    set_weight(model, values[0])
    average = MovingAverage(model, decay, warmup_steps)
    seen = []
    for value in values[1:]:
        set_weight(model, value)
        average.update_parameters(model)
        seen.append(average.module.weight.item())
    assert seen == pytest.approx(by_hand(values, decay, warmup_steps), rel=1e-12)


def test_the_recipes_first_step_nearly_copies_and_late_ones_keep_the_decay() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    set_weight(model, 0.0)
    average = MovingAverage(model)
    set_weight(model, 1.0)
    average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(1 - 0.9998 * 0.00024996875, rel=1e-9)  # 1 - exp(-1 / 4000)
    average.n_averaged.fill_(100_000)
    average.module.weight.zero_()
    average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(1 - 0.9998, rel=1e-6)


def test_it_begins_as_a_copy() -> None:
    model = nn.Linear(2, 2)
    average = MovingAverage(model)
    before = model.weight.detach().clone()
    set_weight(model, 5.0)
    assert torch.equal(average.module.weight, before)
    x = torch.randn(3, 2)
    assert torch.equal(average(x), x @ before.T + model.bias)


def test_statistics_are_averaged_and_counts_are_copied() -> None:
    model = nn.BatchNorm1d(1, momentum=None).double()
    average = MovingAverage(model, 0.5, 0)
    model(torch.tensor([[1.0], [3.0]]).double())  # mean 2, variance 2
    average.update_parameters(model)
    model(torch.tensor([[5.0], [5.0]]).double())  # cumulative: mean 3.5, variance 1
    average.update_parameters(model)
    norm = average.module
    assert norm.running_mean.item() == pytest.approx(0.5 * (0.5 * 0 + 0.5 * 2) + 0.5 * 3.5)
    assert norm.running_var.item() == pytest.approx(0.5 * (0.5 * 1 + 0.5 * 2) + 0.5 * 1)
    assert norm.num_batches_tracked.item() == 2


def test_it_stays_in_evaluation_mode_without_gradients() -> None:
    task = nn.Module()
    task.model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    task.average = MovingAverage(task.model)
    task.train()
    assert all(module.training for module in task.model.modules())
    assert not any(module.training for module in task.average.modules())
    task.average.train(True)
    assert not any(module.training for module in task.average.modules())
    assert not any(parameter.requires_grad for parameter in task.average.parameters())
    assert all(parameter.requires_grad for parameter in task.model.parameters())
    statistics = task.average.module[1].running_mean.clone()
    task.average(torch.randn(8, 2))
    assert torch.equal(task.average.module[1].running_mean, statistics)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_saved_and_loaded_in_the_middle_is_as_if_uninterrupted(
    memory_format: torch.memory_format, tiny_architectures: Mapping[str, Architecture]
) -> None:
    def task() -> nn.Module:
        torch.manual_seed(0)
        whole = nn.Module()
        whole.model = QTViT(tiny_architectures["nano"], drop_path_rate=0.2).to(memory_format=memory_format)
        whole.average = MovingAverage(whole.model, 0.9, 5)
        return whole

    torch.manual_seed(1)
    through = task()
    steps(through.model, through.average, 3, seed=1)
    file = io.BytesIO()
    torch.save(through.state_dict(), file)
    torch.manual_seed(2)
    steps(through.model, through.average, 3, seed=2)

    resumed = task()
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.average.n_averaged == 4
    torch.manual_seed(2)
    steps(resumed.model, resumed.average, 3, seed=2)
    assert_equal(resumed.state_dict(), through.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(resumed.average(x), through.average(x))
    assert not torch.equal(through.average(x), through.model.eval()(x))
    conv = next(m for m in resumed.average.modules() if isinstance(m, nn.Conv2d) and m.weight[0].numel() > 9)
    assert conv.weight.is_contiguous(memory_format=memory_format)


def test_a_model_of_another_memory_format_is_averaged_too() -> None:
    model = nn.Conv2d(3, 4, 3)
    average = MovingAverage(model, 0.5, 0)
    before = model.weight.detach().clone()
    model = model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        model.weight.normal_()
    average.update_parameters(model)
    torch.testing.assert_close(average.module.weight, (before + model.weight.detach()) / 2)
    assert average.module.weight.is_contiguous()


def test_a_copy_goes_its_own_way() -> None:
    model = nn.Linear(1, 1)
    average = MovingAverage(model, 0.5, 0)
    second = copy.deepcopy(average)
    set_weight(model, 9.0)
    second.update_parameters(model)
    assert (average.n_averaged, second.n_averaged) == (1, 2)
    assert second.module.weight != average.module.weight


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"decay": 1.0}, "decay .* got 1.0"), ({"decay": -0.1}, "got -0.1"), ({"warmup_steps": -1}, "warmup_steps .* -1")],
)
def test_impossible_values(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MovingAverage(nn.Linear(1, 1), **arguments)
