"""Every set of values and every example as a parameter of general rules, and a release that runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helm.chart import EXAMPLES, Release, defaults, render
from tests.helm.pods import Cluster
from tests.helm.value_sets import RUNNING, SETS, small


@pytest.fixture(params=["defaults", *SETS, *(f"example:{path.stem}" for path in EXAMPLES)])
def release(request: pytest.FixtureRequest) -> Release:
    """The chart rendered with one of the value sets or examples."""
    name: str = request.param
    if name == "defaults":
        return defaults()
    if name.startswith("example:"):
        (path,) = [p for p in EXAMPLES if p.stem == name.removeprefix("example:")]
        return render(files=(path,))
    return render(SETS[name])


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The chart's own pools, one of them with two replicas, behind one gateway, all running."""
    with Cluster(render(small(*RUNNING)), tmp_path_factory.mktemp("cluster")) as running:
        running.run()
        yield running


@pytest.fixture(scope="session")
def key(cluster: Cluster) -> str:
    """API key of the running release."""
    return cluster.secret("bootstrap-key", "api-key")
