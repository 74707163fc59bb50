import numpy as np

from wantrain.scheduler.native import compiled


def twice(x: float) -> float:
    return 2 * x


def doubled(values: list[float]) -> float:
    total = 0.0
    for i in range(len(values)):
        values[i] = twice(values[i])
        total += values[i]
    return total


def test_machine_code_does_what_the_plain_function_does() -> None:
    plain, array = [1.0, 2.5], np.array([1.0, 2.5])
    assert doubled(plain) == compiled(doubled, twice)(array) == 7.0
    assert array.tolist() == plain


def test_a_function_is_compiled_once() -> None:
    assert compiled(doubled, twice) is compiled(doubled, twice)
