"""Where scales and codes lie."""

import pytest

from wantrain_kernels.layout import BASE_FORMATS, BITS, GROUP_SIZES, Layout, base_bytes, layout_of


def test_a_tensor_is_rows_of_its_last_dimension() -> None:
    layout = layout_of((2, 3, 300), 4, 128)
    assert (layout.rows, layout.row_length, layout.groups_per_row, layout.num_groups) == (6, 300, 3, 18)


def test_a_scalar_is_one_row_of_one_value() -> None:
    assert layout_of((), 8, 32) == Layout(1, 1, 8, 32)


@pytest.mark.parametrize(("num_values", "codes_bytes"), [(1, 3), (8, 3), (9, 6), (63, 24), (64, 24), (65, 27)])
def test_a_short_group_takes_whole_octets(num_values: int, codes_bytes: int) -> None:
    assert layout_of((num_values,), 3, 64).codes_bytes == codes_bytes


@pytest.mark.parametrize(("num_groups", "scales_bytes"), [(0, 0), (1, 16), (8, 16), (9, 32), (16, 32)])
def test_scales_are_padded_to_sixteen_bytes(num_groups: int, scales_bytes: int) -> None:
    assert layout_of((num_groups, 32), 4, 32).scales_bytes == scales_bytes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_codes_of_whole_octets_waste_no_bit(bits: int, group_size: int) -> None:
    layout = layout_of((5, 1600), bits, group_size)
    assert layout.codes_bytes * 8 == layout.num_values * bits
    assert layout.body_bytes == layout.scales_bytes + layout.codes_bytes


@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 64)])
def test_an_empty_tensor_takes_no_bytes(shape: tuple[int, ...]) -> None:
    assert layout_of(shape, 4, 128).body_bytes == 0
    assert [base_bytes(shape, base_format, 128) for base_format in BASE_FORMATS] == [0, 0, 0, 0]


def test_a_message_takes_two_bytes_a_value_or_a_body() -> None:
    assert base_bytes((3, 100), "bf16", 64) == base_bytes((3, 100), "fp16", 64) == 600
    assert base_bytes((3, 100), "q8", 64) == layout_of((3, 100), 8, 64).body_bytes
    assert base_bytes((3, 100), "q4", 64) == layout_of((3, 100), 4, 64).body_bytes


@pytest.mark.parametrize(("bits", "group_size"), [(5, 64), (1, 64), (4, 16), (4, 100)])
def test_an_unknown_layout_is_refused_with_what_there_is(bits: int, group_size: int) -> None:
    with pytest.raises(ValueError, match=rf"{bits} bits in groups of {group_size} \(expected \(2, 3, 4, 6, 8\)"):
        layout_of((8,), bits, group_size)


def test_an_unknown_form_of_messages_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no base format 'q2' \(expected bf16, fp16, q8, q4"):
        base_bytes((8,), "q2", 64)
