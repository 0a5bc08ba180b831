"""Means of numbers with gaps, and how they are written: a gap is NaN, in JSON null, on the page `not recorded`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
from numpy.typing import NDArray


def number(value: object) -> float:
    """A finite number as it is, anything else as NaN."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def of_finite(values: NDArray[numpy.float64], what: Callable[[NDArray[numpy.float64]], Any]) -> float:
    """A number of the finite ones; NaN where there is none."""
    finite = values[numpy.isfinite(values)]
    return float(what(finite)) if len(finite) else math.nan


def mean(values: NDArray[numpy.float64]) -> float:
    """Of the finite ones; NaN where there is none."""
    return of_finite(values, numpy.mean)


def median(values: NDArray[numpy.float64]) -> float:
    """Of the finite ones; NaN where there is none."""
    return of_finite(values, numpy.median)


def last(values: NDArray[numpy.float64]) -> float:
    """The last finite one; NaN where there is none."""
    return of_finite(values, lambda finite: finite[-1])


def ratio(part: NDArray[numpy.float64], whole: NDArray[numpy.float64]) -> float:
    """Sum to sum; NaN where the whole is nothing."""
    total = float(numpy.nansum(whole))
    return float(numpy.nansum(part)) / total if total > 0 else math.nan


def smooth(values: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """Centred running mean over a fiftieth of the run (5 steps at least), NaN left out."""
    window = max(5, len(values) // 50) | 1
    kernel = numpy.ones(window)
    finite = numpy.isfinite(values)
    # "full" and a cut, as "same" would give an array as long as the kernel where the run is shorter than that
    cut = slice(window // 2, window // 2 + len(values))
    total = numpy.convolve(numpy.where(finite, values, 0.0), kernel)[cut]
    count = numpy.convolve(finite.astype(float), kernel)[cut]
    return numpy.where(count > 0.5, total / numpy.maximum(count, 1.0), numpy.nan)


def shown(value: float | None, pattern: str) -> str:
    """By a format such as {:.4f}."""
    return pattern.format(value) if value is not None and math.isfinite(value) else "not recorded"


def short(value: float) -> str:
    """Such as 1.5M."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"
