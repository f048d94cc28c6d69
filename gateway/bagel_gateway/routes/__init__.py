"""How a request goes through the stages of its pipeline, one file a kind of way.

whole.py    one DiT that has the whole model does everything
text.py     two stages, for a text: the Thinker alone
staged.py   two stages, for a picture: contexts at the Thinker, from which a DiT draws
base.py     what they share: calls and deadlines, moves to another DiT, events to the client, timings
"""

from __future__ import annotations

from bagel.pipelines import StageExecutionType
from bagel_gateway.planning import Plan
from bagel_gateway.routes.base import Route
from bagel_gateway.routes.staged import Staged
from bagel_gateway.routes.text import Text
from bagel_gateway.routes.whole import Whole


def route_of(plan: Plan) -> type[Route]:
    """The way of a plan, by the stage that gives the user the result."""
    last = plan.path[-1]
    if last.execution_type is StageExecutionType.LLM_AR:
        return Text
    return Staged if last.omni_kv_config.need_recv_cache else Whole
