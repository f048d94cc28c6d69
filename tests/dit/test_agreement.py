"""What several ranks say becomes what one engine says."""

from __future__ import annotations

import pytest

from bagel.engine.commands import AddPicture, AddRequest, Remove
from bagel.engine.events import Begun, Event, StepTaken
from bagel.errors import ConfigError
from bagel.request import ImageSettings
from bagel.v1 import common_pb2
from bagel_dit.workers.agreement import Agreement, Disagreement
from bagel_dit.workers.messages import LoadFailed, Ready
from bagel_dit.workers.verdict import End, Weight, verdict
from tests.helpers import request

BEGUN = Begun(1, steps=4, bucket=16, rows=2)
PICTURE = AddPicture(1, ImageSettings(), (4, 4), 7, (), {}, None)


def ready(device: str, fingerprint: bytes = b"a", tokens: int = 100) -> Ready:
    info = common_pb2.ModelInfo(checkpoint_fingerprint=fingerprint, dtype="float32", device=device)
    return Ready(info.SerializeToString(), {}, tokens, (device,))


def test_a_picture_has_begun_once_all_ranks_have_its_pages() -> None:
    both = Agreement(2)
    both.sent(PICTURE)
    assert both.add(0, BEGUN) is None
    assert both.add(1, BEGUN) == BEGUN


@pytest.mark.parametrize("events", [[StepTaken(1, 1)]])
def test_the_first_rank_answers(events: list[Event]) -> None:
    both = Agreement(2)
    assert [both.add(1, event) for event in events] == [None]
    assert [both.add(0, event) for event in events] == events


def test_what_a_rank_says_of_a_request_that_is_over_leads_to_nothing() -> None:
    both = Agreement(2)
    both.sent(AddRequest(1, request("text2img")))
    assert both.add(0, BEGUN) is None
    both.sent(Remove(1))
    assert both.add(1, BEGUN) is None
    assert not both._begun


def test_a_model_is_ready_once_all_ranks_have_it_with_all_their_devices() -> None:
    both = Agreement(2)
    assert both.add(1, ready("cuda:1")) is None
    told = both.add(0, ready("cuda:0"))
    assert isinstance(told, Ready) and told.devices == ("cuda:0", "cuda:1")
    assert common_pb2.ModelInfo.FromString(told.info).device == "cuda:0"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (ready("cuda:1", b"b"), r"rank 1 says model 62 .*, where rank 0 says model 61"),
        (ready("cuda:1", tokens=99), r"room for 99 tokens, where rank 0 .*room for 100 tokens"),
    ],
)
def test_ranks_of_different_models_are_not_ready(other: Ready, said: str) -> None:
    both = Agreement(2)
    both.add(0, ready("cuda:0"))
    with pytest.raises(Disagreement, match=said):
        both.add(1, other)


def test_ranks_that_begin_differently_disagree() -> None:
    both = Agreement(2)
    both.sent(PICTURE)
    both.add(0, BEGUN)
    with pytest.raises(Disagreement, match=r"rank 1 says Begun.*bucket=32"):
        both.add(1, Begun(1, steps=4, bucket=32, rows=2))


def test_one_failure_to_load_is_told_of_whichever_rank() -> None:
    both, failed = Agreement(2), LoadFailed(ConfigError("there is no GPU 1"))
    assert both.add(1, failed) == failed
    assert both.add(0, failed) is None


def test_the_rank_that_went_first_is_blamed_not_those_that_lost_it() -> None:
    lost = End(0, "RuntimeError: Connection closed by peer", Weight.TOLD)
    assert verdict([lost, End(1, "signal 9", Weight.ENDED)]).rank == 1
    assert verdict([lost, End(1, "stopped", Weight.KILLED_HERE)]).rank == 1
    assert verdict([lost, End(1, "RuntimeError", Weight.TOLD)]).rank == 0
