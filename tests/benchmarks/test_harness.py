from pathlib import Path

from harness import append_result, read_results, spread


def test_results_are_added_never_replaced_and_carry_where_they_were_measured(tmp_path: Path) -> None:
    append_result("x", {"a": 1}, tmp_path)
    append_result("x", {"a": 2}, tmp_path)
    records = read_results("x", tmp_path)
    assert [record["a"] for record in records] == [1, 2]
    assert {"cores", "commit", "torch", "when"} <= set(records[0]["environment"])


def test_half_a_record_of_a_killed_program_is_not_read_and_goes_with_the_next(tmp_path: Path) -> None:
    path = append_result("x", {"a": 1}, tmp_path)
    with path.open("a") as file:
        file.write('{"a": 2, "envir')
    assert [record["a"] for record in read_results("x", tmp_path)] == [1]
    append_result("x", {"a": 3}, tmp_path)
    assert [record["a"] for record in read_results("x", tmp_path)] == [1, 3]


def test_there_are_no_records_where_there_is_no_file(tmp_path: Path) -> None:
    assert read_results("x", tmp_path) == []


def test_spread_is_the_median_with_both_ends() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.0]}
