"""Every set of values and every example, as a parameter of tests of general rules."""

from __future__ import annotations

import pytest

from tests.helm.chart import EXAMPLES, Release, render
from tests.helm.value_sets import SETS


@pytest.fixture(params=[*SETS, *(f"example:{path.stem}" for path in EXAMPLES)])
def release(request: pytest.FixtureRequest) -> Release:
    """The chart rendered with one of the value sets or examples."""
    name: str = request.param
    if name.startswith("example:"):
        (path,) = [p for p in EXAMPLES if p.stem == name.removeprefix("example:")]
        return render(files=(path,))
    return render(SETS[name])


@pytest.fixture(params=[path.stem for path in EXAMPLES])
def example(request: pytest.FixtureRequest) -> Release:
    """The chart rendered with one of the examples."""
    (path,) = [p for p in EXAMPLES if p.stem == request.param]
    return render(files=(path,))
