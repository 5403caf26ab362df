"""The error tree: every class mapped, every reason used and documented, everything survives a process border."""

import pickle
import re
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from knowledge_engine import errors
from knowledge_engine.errors import KnowledgeEngineError, Reason, Violation, from_dict
from knowledge_engine.server.status import CODES, DOMAIN, to_status

SOURCE = Path(__file__).parent.parent / "src" / "knowledge_engine"
CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, KnowledgeEngineError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_has_a_code_and_a_place_in_the_tree(kind: type[KnowledgeEngineError]) -> None:
    assert kind in CODES
    assert errors.KINDS[kind.__name__] is kind
    assert kind.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_survives_pickling_and_plain_data(kind: type[KnowledgeEngineError]) -> None:
    error = kind(
        "what", reason=Reason.QUEUE_FULL, violations=[Violation("a.b", "is bad")], retry_after_seconds=1.5, limit=3
    )
    for copy in (pickle.loads(pickle.dumps(error)), from_dict(error.to_dict())):
        assert type(copy) is kind
        assert copy.to_dict() == error.to_dict()


def test_every_reason_is_used() -> None:
    text = "".join(
        path.read_text() for path in SOURCE.rglob("*.py") if path.name != "errors.py" and "v1" not in path.parts
    ) + "".join(path.read_text() for path in (SOURCE.parent.parent / "gateway").glob("*.py"))
    unused = [reason.name for reason in Reason if not re.search(rf"Reason\.{reason.name}\b", text)]
    assert not unused


def test_every_reason_is_documented() -> None:
    readme = (SOURCE.parent.parent / "README.md").read_text()
    missing = [reason.value for reason in Reason if f"`{reason.value}`" not in readme]
    assert not missing


def test_a_status_holds_reason_violations_and_retry_hint() -> None:
    status = to_status(errors.CapacityError("full", reason=Reason.QUEUE_FULL, retry_after_seconds=2.5, limit=64))
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert (info.reason, info.domain, dict(info.metadata)) == ("QUEUE_FULL", DOMAIN, {"limit": "64"})
    assert retry.retry_delay.ToMilliseconds() == 2500


def test_a_long_list_of_violations_stays_small_enough_for_trailing_metadata() -> None:
    violations = [Violation(f"line {index}", "x" * 200) for index in range(1000)]
    status = to_status(errors.InvalidSpecError("y" * 100_000, violations=violations))
    assert status.ByteSize() < 6000
    bad = error_details_pb2.BadRequest()
    assert status.details[1].Unpack(bad)
    assert bad.field_violations[0].field == "line 0"
