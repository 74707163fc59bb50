import multiprocessing
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wantrain import data
from wantrain.config import DataConfig
from wantrain.data import Lanes, Samples, TokenFile, find_documents, permute, read_pieces
from wantrain.errors import ConfigError, DataError
from wantrain.model_config import ModelConfig

MODEL = ModelConfig(num_layers=1, hidden=8, num_heads=1, seq_len=4)


def open_text(tmp_path: Path, text: bytes, fraction: float = 0.25) -> TokenFile:
    path = tmp_path / "text.txt"
    path.write_bytes(text)
    return TokenFile.open(DataConfig(source=str(path), validation_fraction=fraction), tmp_path / "cache")


def samples_over(num_tokens: int, seq_len: int) -> Samples:
    return Samples(np.arange(num_tokens, dtype=np.uint16), 0, num_tokens, seq_len)


def folder(tmp_path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "text"


def test_tokens_are_the_bytes_of_the_file(tmp_path: Path) -> None:
    text = bytes(range(1, 256)) * 3
    assert open_text(tmp_path, text).tokens.tobytes() == text


def test_a_folder_is_read_whole_and_binary_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    files = {"a.txt": b"aaaa\n", "deep/er/b.txt": b"bbbb\n", "c.bin": b"cc\0cc", ".d.txt": b"dddd", ".git/e": b"eeee"}
    root = folder(tmp_path, files)
    tokens = TokenFile.open(DataConfig(source=str(root)), tmp_path / "cache").tokens
    assert Counter(tokens.tobytes()) == Counter(b"aaaa\nbbbb\n")


def test_pipes_and_links_to_nowhere_are_left_out(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a.txt": b"aaaa"})
    os.mkfifo(root / "pipe")
    (root / "link").symlink_to("nowhere")
    assert [document.name for document in find_documents(str(root))] == ["a.txt"]


def test_documents_are_ordered_by_name_wherever_the_folder_is(tmp_path: Path) -> None:
    files = {f"{number}.txt": b"text" for number in range(30)}
    orders = [
        [one.name for one in find_documents(str(folder(tmp_path / place, files)))] for place in ("here", "elsewhere")
    ]
    assert orders[0] == orders[1]
    assert orders[0] != sorted(orders[0])


def test_the_standard_library_is_source_without_tests_and_packages() -> None:
    names = [document.name for document in find_documents("stdlib")]
    assert "argparse.py" in names
    assert len(names) > 300
    assert all(name.endswith(".py") for name in names)
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)


def test_pieces_end_with_lines_and_join_to_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PIECE_BYTES", 64)
    text = b"".join(b"x" * (number * 7 % 50) + b"\n" for number in range(100)) + b"y" * 300 + b"\nend"
    (document,) = find_documents(str(folder(tmp_path, {"a": text}) / "a"))
    pieces = list(read_pieces(document))
    assert b"".join(pieces) == text
    assert sum(not piece.endswith(b"\n") for piece in pieces) < 10
    assert max(len(piece) for piece in pieces) <= 128


def test_a_second_opening_reads_the_cache_and_a_changed_text_does_not(tmp_path: Path) -> None:
    first = open_text(tmp_path, b"some text to keep")
    (cached,) = (tmp_path / "cache").iterdir()
    built = cached.stat().st_mtime_ns
    again = TokenFile.open(DataConfig(source=str(tmp_path / "text.txt")), tmp_path / "cache")
    assert (again.digest, cached.stat().st_mtime_ns) == (first.digest, built)
    assert open_text(tmp_path, b"some other text, and more of it").digest != first.digest


def test_the_digest_is_that_of_the_tokens_not_of_the_place(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    assert open_text(tmp_path / "a", b"equal text").digest == open_text(tmp_path / "b", b"equal text").digest


def _open(source: str, cache: str) -> str:
    return TokenFile.open(DataConfig(source=source), Path(cache)).digest


def test_processes_that_build_at_once_end_with_the_same_file(tmp_path: Path) -> None:
    source = folder(tmp_path, {f"{number}.txt": os.urandom(2000).hex().encode() for number in range(50)})
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        digests = pool.starmap(_open, [(str(source), str(tmp_path / "cache"))] * 6)
    assert len(set(digests)) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_truncated_token_file_is_refused(tmp_path: Path) -> None:
    open_text(tmp_path, b"some text to keep")
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_bytes(cached.read_bytes()[:-3])
    with pytest.raises(DataError, match="not a whole token file"):
        TokenFile.open(DataConfig(source=str(tmp_path / "text.txt")), tmp_path / "cache")


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no text"):
        open_text(tmp_path, b"")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(DataError, match="can't write the token file"):
        open_text(tmp_path, b"some text")


def test_missing_text_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere' doesn't exist \(expected .*; check the path"):
        TokenFile.open(DataConfig(source=str(tmp_path / "nowhere")), tmp_path)


def test_a_folder_without_text_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no text \(1 files"):
        TokenFile.open(DataConfig(source=str(folder(tmp_path, {"a": b"\0\1\2"}))), tmp_path)


def test_text_shorter_than_a_sample_is_one_line(tmp_path: Path) -> None:
    tokens = open_text(tmp_path, b"twelve bytes")
    assert len(tokens.training(MODEL)) == 2
    with pytest.raises(
        DataError, match=r"held-out tail of the text is shorter than a sample \(got 3 tokens, expected .* 5"
    ):
        tokens.validation(MODEL)


def test_a_vocabulary_larger_than_the_model_is_one_line(tmp_path: Path) -> None:
    small = MODEL.model_copy(update={"vocab_size": 100})
    with pytest.raises(ConfigError, match=r"got 256, expected at most 100\); set model.vocab_size = 256"):
        open_text(tmp_path, b"long enough for samples").training(small)


def test_training_and_held_out_samples_do_not_share_a_target(tmp_path: Path) -> None:
    tokens = open_text(tmp_path, bytes(range(1, 201)))
    parts = [
        part.target_places(range(len(part))).ravel() for part in (tokens.training(MODEL), tokens.validation(MODEL))
    ]
    assert len(parts[0]) + len(parts[1]) >= 200 - 2 * MODEL.seq_len
    assert parts[0].max() < 150 <= parts[1].min()


def test_targets_are_the_inputs_one_place_on() -> None:
    inputs, targets = samples_over(100, 8).batch([3, 0, 11])
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.tolist()[0] == list(range(24, 32))
    assert (targets == inputs + 1).all()


def test_a_sample_is_the_same_whatever_it_is_drawn_with() -> None:
    samples = samples_over(100, 8)
    alone, together = samples.batch([5]), samples.batch([1, 5, 9])
    assert (alone[0][0] == together[0][1]).all()
    assert (alone[1][0] == together[1][1]).all()


@given(st.integers(9, 2000), st.integers(1, 300))
def test_spread_takes_as_many_as_asked_from_all_over_the_text(num_tokens: int, asked: int) -> None:
    samples = samples_over(num_tokens, 8)
    spread = samples.spread(asked)
    assert len(spread) == min(asked, len(samples))
    targets = spread.target_places(range(len(spread)))
    assert targets.max() < num_tokens
    assert len(np.unique(targets)) == targets.size
    assert targets.max() >= (num_tokens - 1) // 2 or asked == 1


@given(st.integers(1, 400), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(place, size, key) for place in range(size)) == list(range(size))


def test_permute_needs_no_memory_for_a_large_range() -> None:
    size = 10**15 + 37
    assert len({permute(place, size, 5) for place in range(1000)}) == 1000
    assert all(0 <= permute(place, size, 5) < size for place in range(100))


def test_permute_leaves_few_neighbours_together() -> None:
    places = [permute(place, 10_000, 1) for place in range(10_000)]
    assert sum(abs(a - b) == 1 for a, b in pairwise(places)) < 20


@given(st.integers(8, 200), st.sampled_from([1, 2, 4, 8]), st.integers(0, 99))
def test_every_sample_is_drawn_once_per_epoch_of_its_lane(num_samples: int, num_lanes: int, seed: int) -> None:
    lanes = Lanes(num_samples, num_lanes, seed)
    steps = num_samples // num_lanes  # the shortest lane's epoch
    for lane in range(num_lanes):
        drawn = [sample for step in range(steps) for sample in lanes.draw(step, num_lanes)[lane]]
        assert len(set(drawn)) == steps
        assert all(sample % num_lanes == lane and sample < num_samples for sample in drawn)


def test_a_batch_is_the_same_draw_however_it_is_asked_for() -> None:
    lanes = Lanes(1000, 4, 3)
    in_order = [lanes.draw(step, 8) for step in range(20)]
    assert Lanes(1000, 4, 3).draw(17, 8) == in_order[17]
    assert in_order[0] != in_order[1]


def test_epochs_lanes_and_seeds_have_orders_of_their_own() -> None:
    lanes = Lanes(64, 1, 0)
    assert lanes.draw(0, 64) != lanes.draw(1, 64)
    assert lanes.draw(0, 64) != Lanes(64, 1, 1).draw(0, 64)
    two = Lanes(128, 2, 0).draw(0, 128)
    assert [sample // 2 for sample in two[0]] != [sample // 2 for sample in two[1]]


def test_lanes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of num_lanes"):
        Lanes(100, 4, 0).draw(0, 6)
    with pytest.raises(DataError, match="too few samples"):
        Lanes(3, 4, 0)
