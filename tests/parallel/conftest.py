from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.ranks import Ranks, ranks_in


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Processes for all tests here, as each takes seconds to load torch."""
    with ranks_in(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks
