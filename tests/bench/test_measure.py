import math
import time

import pytest
import torch

from qtvit.bench.measure import check_counts, environment, in_turns, plain_fp32, power_law


def test_a_turn_of_something_quick_is_several_calls() -> None:
    calls = {"quick": 0, "slow": 0}

    def run(name: str, seconds: float) -> None:
        calls[name] += 1
        time.sleep(seconds)

    candidates = {"quick": lambda: run("quick", 0.001), "slow": lambda: run("slow", 0.03)}
    samples = in_turns(candidates, device=torch.device("cpu"), rounds=2, warmup=1, min_seconds=0.02)
    assert calls["slow"] == 3
    assert calls["quick"] > 3 + 2  # besides the one before the clock starts
    assert [len(each) for each in samples.values()] == [2, 2]


def test_the_exponent_of_a_power() -> None:
    sizes = [10.0, 20.0, 50.0]
    assert power_law(sizes, [3 * size**1.7 for size in sizes]) == pytest.approx(1.7)
    assert math.isclose(power_law([1, 2], [5, 5]), 0, abs_tol=1e-12)


@pytest.mark.parametrize(
    ("counts", "message"), [({"rounds": 1}, "two rounds"), ({"batches": 0}, "batches of 1 or more")]
)
def test_too_few(counts: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_counts(**counts)
    check_counts(rounds=2, batches=1)


def test_tf32_comes_back() -> None:
    before = torch.backends.cudnn.allow_tf32
    with plain_fp32():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


def test_the_environment_names_what_measures() -> None:
    found = environment(torch.device("cpu"))
    assert {"torch", "timm", "cpu", "cpu_flags", "threads", "device"} <= set(found)
    assert isinstance(found["cpu_flags"], list)
