import pytest
from pydantic import ValidationError

from wantrain.codecs.buffer_index import BufferIndex, Record


@pytest.mark.parametrize("records", [[], [Record(7, 3, 2**32 - 1, 2**64 - 1, 0), Record(1, 1, 0, 5, -1)]])
def test_an_index_comes_back_from_its_text(records: list[Record]) -> None:
    index = BufferIndex.of(4, "sender-0", "plan", 5000, records)
    back = BufferIndex.model_validate_json(index.model_dump_json())
    assert back == index
    assert back.records() == records
    assert back.key == "buffer-0004-sender-0"


def test_columns_of_different_length_are_refused() -> None:
    text = BufferIndex.of(4, "sender-0", "plan", 5000, [Record(7, 3, 1, 1, 0)]).model_dump() | {"places": []}
    with pytest.raises(ValidationError, match="differ in length"):
        BufferIndex.model_validate(text)
