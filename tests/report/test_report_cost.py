"""What a run cost, told from rows of every age."""

from __future__ import annotations

from typing import Any

import pytest

from groundup.report.cost import costs, energy_text, peak_memory


def rows(**extra: Any) -> list[dict[str, Any]]:
    return [
        {"kind": "train", "step": step, "tokens": 100 * step, "seconds": 2.0 * step, "tokens_per_second": rate, **extra}
        for step, rate in ((1, 10.0), (2, 50.0), (3, 52.0))
    ]


def told(metrics: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    return {cost.name: (cost.value, cost.note) for cost in costs(metrics)}


def test_a_run_of_an_older_version() -> None:
    found = told([*rows(), {"kind": "eval", "step": 3, "seconds": 9.0}])
    assert list(found) == ["time", "tokens", "speed"]
    assert found["time"][0] == "9.0 s"
    assert found["tokens"] == ("300", "in 3 steps")
    assert found["speed"] == ("50 tokens/s", "median")


def test_no_training_no_cost() -> None:
    assert costs([]) == []
    assert costs([{"kind": "eval", "step": 1, "seconds": 3.0}]) == []
    assert told([{"kind": "train"}]) == {}


def test_everything_that_is_measured() -> None:
    hardware = {"kind": "hardware", "step": 3, "memory_bytes": 9_000_000_000, "seconds": 5.0}
    found = told(
        [
            *rows(mfu=0.375, memory_bytes=1_234_000_000, skipped_steps=2),
            {**hardware, "energy_joules": 1_800.0, "co2_grams": 0.2225, "watts_from": "cpu"},
            {**hardware, "energy_joules": 7_200.0, "co2_grams": 0.89, "watts_from": "cpu"},
            {**hardware, "energy_joules": None, "co2_grams": None},
        ]
    )
    assert found["MFU"][0] == "37.5%"
    assert found["peak memory"][0] == "1.23 GB"  # of training, not of everything that was watched
    assert found["skipped steps"][0] == "2"
    assert found["energy"][0] == "2 Wh"
    assert "the GPU not" in found["energy"][1]
    assert found["CO2"][0] == "0.89 g"
    assert "445 g/kWh" in found["CO2"][1]


def test_the_grid_is_told_as_it_was_given() -> None:
    last = {"kind": "hardware", "energy_joules": 3.6e9, "co2_grams": 30_000.0, "watts_from": "given"}
    found = told([*rows(), last])
    assert found["energy"] == ("1 MWh", "from the watts that were given")
    assert found["CO2"][0] == "30 kg"
    assert found["CO2"][1].startswith("on a grid of 30 g/kWh;")


def test_what_was_not_measured_is_not_invented() -> None:
    found = told([*rows(), {"kind": "hardware", "cpu_percent": 90.0, "watts": None, "energy_joules": None}])
    assert found["energy"][0] == "not measured"
    assert "CO2" not in found


@pytest.mark.parametrize(
    ("joules", "text"),
    [(0.0, "0 J"), (3_599.0, "3599 J"), (3_600.0, "1 Wh"), (3.59e6, "997 Wh"), (1.8e7, "5 kWh"), (7.2e12, "2 GWh")],
)
def test_energy_for_people(joules: float, text: str) -> None:
    assert energy_text(joules) == text


def test_peak_memory_is_none_where_nobody_noted_it() -> None:
    assert peak_memory(rows()) is None
    assert peak_memory([*rows(memory_bytes=7), {"kind": "hardware", "memory_bytes": 11}]) == 7
