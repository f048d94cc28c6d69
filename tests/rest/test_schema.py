"""The OpenAPI document is true: what fits it is answered as it says, what does not is refused, with no 5xx."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CheckFunction, load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.rest.test_front import photo
from tests.rest.test_fuzz import front

__all__ = ["front"]

pytestmark = pytest.mark.slow

LIMIT_S = 30
CHECKS: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
]
POSTS = ["POST /v1/images/generations", "POST /v1/images/edits", "POST /v1/chat/completions"]
GETS = ["GET /v1/models", "GET /v1/models/{model}", "GET /healthz", "GET /readyz", "GET /metrics"]
FEWEST_ANSWERED = 5
"""Of right requests: the document says what each parameter may be, not which of them go together."""


@pytest.fixture(scope="module")
def operations(front: str) -> dict[str, Any]:
    """The document's operations by what they are called."""
    load_all_checks()
    schemathesis.openapi.format("binary", st.sampled_from([photo(), photo(1, 1), b"no image"]))
    schema = schemathesis.openapi.from_url(f"http://{front}/openapi.json")
    operations: list[Any] = [each.ok() for each in schema.get_all_operations()]  # type: ignore[union-attr]
    return {operation.label: operation for operation in operations}


def test_every_operation_is_tested(operations: dict[str, Any]) -> None:
    assert sorted(operations) == sorted([*POSTS, *GETS])


@pytest.mark.parametrize("operation", POSTS)
def test_what_fits_the_document_is_answered_as_it_says(operations: dict[str, Any], operation: str) -> None:
    seen = Counter[int]()

    @settings(max_examples=80, derandomize=True, database=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        case = data.draw(operations[operation].as_strategy())
        kept = data.draw(st.sets(st.sampled_from(sorted(case.body)), max_size=4)) | {"prompt", "messages", "image"}
        case.body = {name: value for name, value in case.body.items() if name in kept}
        seen[case.call_and_validate(checks=CHECKS, timeout=LIMIT_S).status_code] += 1

    check()
    assert seen[200] >= FEWEST_ANSWERED


@pytest.mark.parametrize("operation", POSTS)
def test_what_does_not_fit_the_document_is_refused(operations: dict[str, Any], operation: str) -> None:
    # A form cannot say all that JSON can: an empty list, which is no text, is not sent at all.
    checks = CHECKS if "edits" in operation else [*CHECKS, negative_data_rejection]

    @settings(max_examples=80, derandomize=True, database=None)
    @given(operations[operation].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def check(case: Any) -> None:
        case.call_and_validate(checks=checks, timeout=LIMIT_S)

    check()


@pytest.mark.parametrize("operation", GETS)
def test_what_is_asked_for_is_answered_as_the_document_says(operations: dict[str, Any], operation: str) -> None:
    @settings(max_examples=10, derandomize=True, database=None)
    @given(operations[operation].as_strategy())
    def check(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=LIMIT_S)

    check()
