"""Fixtures that all tests share: the recordings' tiny checkpoint, and what is loaded from it once.

The fixtures import torch themselves, since it takes seconds and most tests do without it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

import bagel  # noqa: F401  before torch, since it sets how PyTorch's threads wait
from tests.shared import Borrow, Pool, lending

if TYPE_CHECKING:
    from bagel.checkpoint.files import Checkpoint
    from bagel.engine.local import BagelEngine
    from bagel.model.tokenizer import BagelTokenizer

BORROWERS = {
    "the recordings' model": (
        "services/test_services",
        "client/test_omni",
        "client/test_stats",
        "bench/test_load",
        "cli/test_keys",
        "dit/test_ray",
    ),
    "bagel-nano": ("services/test_openai_client", "services/test_examples", "nano/test_meaning", "docs/test_snippets"),
    "one place a stage": ("services/test_grpc_fuzz", "services/test_batch_timeout"),
    "a browser": ("browser/",),
}
"""Files that share services, by whose."""
GOLDEN = Path(__file__).parent / "golden"

# A shell that runs the tests in the background makes them ignore Ctrl-C, and their children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline, since a shared machine may be slow, above all with the first example.
# CI runs the same examples every time; a developer's machine looks for new ones.
settings.register_profile("bagel", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("bagel")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """With -n, one process runs a file, and one all files that `borrow` the same services."""
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class Grouped(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            shared = (of for of, files in BORROWERS.items() if file.removeprefix("tests/").startswith(files))
            return next(shared, file)

    return Grouped(config, log)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of digests for the tests alone, which the services that they start use too."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAGEL_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    """The tiny checkpoint with random weights."""
    from bagel.checkpoint.files import Checkpoint

    return Checkpoint(GOLDEN / "checkpoint")


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Checkpoint) -> BagelTokenizer:
    from bagel.model.tokenizer import BagelTokenizer

    return BagelTokenizer(checkpoint.folder)


@pytest.fixture(scope="session")
def engine(checkpoint: Checkpoint) -> BagelEngine:
    """The whole model in float32 on the CPU. Tests share its cache of contexts, so none may count its computations."""
    from bagel.engine.local import BagelEngine

    return BagelEngine.load(checkpoint)


@pytest.fixture(scope="session")
def shared_services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """All services that tests share; `borrow` hands them out."""
    pool = Pool(tmp_path_factory.mktemp("shared"))
    yield pool
    pool.end()


@pytest.fixture
def borrow(shared_services: Pool) -> Iterator[Borrow]:
    """Shared services for a test that only asks them: `borrow("bagel")`. What the test leaves behind fails it."""
    with lending(shared_services) as borrow:
        yield borrow
