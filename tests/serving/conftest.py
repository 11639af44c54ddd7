"""For all tests of serving: the process that has imported vLLM ends with the file that used it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine import WARM


@pytest.fixture(scope="module", autouse=True)
def _warm() -> Iterator[None]:
    yield
    WARM.stop()
