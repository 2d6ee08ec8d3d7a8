"""The values that cross the layers: frozen, in bytes, and strict about what a device can be."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_memplan.errors import ApplyError, DoesNotFitError, MemplanError, TraceError
from lightning_memplan.memory.events import Event, Trace
from lightning_memplan.types import Device, Layer, Measurement, Plan

PLAN = Plan(
    batch_size=8,
    device=Device("card", total=2**34),
    budget=2**33,
    margin=0.5,
    limited_by="memory",
    method="trace",
    peak_reserved=2**32,
    peak_allocated=2**31,
    formula_peak=2**31,
)
VALUES = [
    Trace(2, (Event(0, 4096),)),
    Layer("conv", "Conv3d", 840, 3360, 3360, (30, 191, 227, 191), 993_742_440),
    Device("card", total=2**34),
    PLAN,
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_are_frozen_equal_by_content_and_can_be_sent(value: Any) -> None:
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)
    assert copy.deepcopy(value) == pickle.loads(pickle.dumps(value)) == value
    assert dataclasses.replace(value) == value


def test_a_measurement_is_frozen_equal_by_content_and_can_be_sent() -> None:
    value = Measurement(1, 2, 3, 4, 5, phases={"forward": 4})
    with pytest.raises(AttributeError):
        value.step = 2  # type: ignore[misc]
    assert copy.deepcopy(value) == pickle.loads(pickle.dumps(value)) == value == value._replace()
    assert value.predicted_phases == {}


def test_a_plan_has_a_breakdown_and_notes_of_its_own() -> None:
    assert PLAN.accumulate_grad_batches == 1
    assert dict(PLAN.breakdown) == {}
    assert PLAN.notes == ()


def test_an_event_is_a_free_where_its_size_is_negative() -> None:
    assert Event(7, -1).is_free
    assert not Event(7, 0).is_free
    assert Event(7, 1) == Event(block=7, size=1, phase="forward", step=0, category="other")


# --- devices ----------------------------------------------------------------------------------------------------------


def test_capacity_is_what_is_free_less_the_context() -> None:
    assert Device("card", total=1000).capacity == 1000
    assert Device("card", total=1000, context=100).capacity == 900
    assert Device("card", total=1000, free=600, context=100).capacity == 500
    assert Device("card", total=1000, free=50, context=100).capacity == 0
    assert Device("card", total=1000, free=0).capacity == 0


def test_a_limit_holds_where_it_is_lower() -> None:
    assert Device("card", total=1000, context=100, limit=500).capacity == 500
    assert Device("card", total=1000, free=300, context=100, limit=500).capacity == 200
    assert Device("card", total=1000, limit=0).capacity == 0


sizes = st.integers(0, 2**44)


@given(total=st.integers(1, 2**44), taken=sizes, context=sizes, limit=st.none() | sizes)
def test_a_capacity_never_exceeds_the_card(total: int, taken: int, context: int, limit: int | None) -> None:
    free = max(0, total - taken)
    capacity = Device("card", total=total, free=free, context=context, limit=limit).capacity
    assert 0 <= capacity <= free <= total
    assert limit is None or capacity <= limit


@pytest.mark.parametrize("name", ["total", "free", "context", "limit"])
@pytest.mark.parametrize("value", [-1, 1.5, "24GiB", True])
def test_a_devices_figures_are_bytes(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"a device's {name} is a number of bytes"):
        Device("card", **{"total": 1000, name: value})


@pytest.mark.parametrize("name", ["total", "context"])
def test_total_and_context_cannot_be_left_unsaid(name: str) -> None:
    with pytest.raises(ValueError, match=f"a device's {name} is a number of bytes"):
        Device("card", **{"total": 1000, name: None})  # type: ignore[arg-type]


def test_a_device_has_memory_and_no_more_free_than_it_has() -> None:
    with pytest.raises(ValueError, match="0 is none"):
        Device("card", total=0)
    with pytest.raises(ValueError, match="1001 bytes free of 1000"):
        Device("card", total=1000, free=1001)


# --- measurements and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "actual", "error"), [(110, 100, 10.0), (90, 100, -10.0), (7, 7, 0.0), (7, 0, 0.0)]
)
def test_the_error_is_in_percent_of_the_actual(predicted: int, actual: int, error: float) -> None:
    measurement = Measurement(0, predicted, 0, actual, 0)
    assert measurement.error_percent == pytest.approx(error)


def test_errors_are_one_tree() -> None:
    for kind in (TraceError, DoesNotFitError, ApplyError):
        assert issubclass(kind, MemplanError)
    error = DoesNotFitError("no", needed=3, available=2)
    assert (str(error), error.needed, error.available) == ("no", 3, 2)


def test_what_does_not_fit_can_be_sent_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(DoesNotFitError("no", needed=3, available=2)))
    assert (str(error), error.needed, error.available) == ("no", 3, 2)
