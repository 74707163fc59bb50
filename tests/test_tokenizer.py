import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from wantrain.errors import ConfigError
from wantrain.tokenizer import ByteTokenizer, load_tokenizer


@pytest.fixture
def word_file(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[unk]": 0, "to": 1, "be": 2, "or": 3, "not": 700}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[unk]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    return tmp_path / "words.json"


def test_bytes_come_back_as_text() -> None:
    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.decode(tokenizer.encode("naïve Ω".encode()).tolist()) == "naïve Ω"


def test_half_a_character_does_not_stop_decoding() -> None:
    assert ByteTokenizer().decode(list("Ω".encode()[:1])) == "\ufffd"


def test_a_tokenizers_file_encodes_and_decodes(word_file: Path) -> None:
    tokenizer = load_tokenizer(str(word_file))
    assert tokenizer.encode(b"to be or not").tolist() == [1, 2, 3, 700]
    assert tokenizer.decode([1, 2]) == "to be"


def test_the_vocabulary_reaches_to_the_greatest_token(word_file: Path) -> None:
    assert load_tokenizer(str(word_file)).vocab_size == 701


def test_bytes_that_are_not_text_are_encoded_too(word_file: Path) -> None:
    assert load_tokenizer(str(word_file)).encode(b"to \xff\xfe be").tolist() == [1, 0, 2]


def test_different_files_have_different_identities(word_file: Path) -> None:
    before = load_tokenizer(str(word_file)).identity
    word_file.write_text(word_file.read_text().replace('"not"', '"nor"'))
    assert load_tokenizer(str(word_file)).identity != before


def test_a_missing_file_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"can't read tokenizer nowhere.json \(No such file"):
        load_tokenizer("nowhere.json")


def test_a_file_that_is_not_json_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_tokenizer(str(tmp_path / "a.json"))


def test_json_that_is_no_tokenizer_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "a.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(ConfigError, match="not a file of the tokenizers library"):
        load_tokenizer(str(tmp_path / "a.json"))


def test_a_missing_library_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("{}")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'wantrain\[tokenizers\]'"):
        load_tokenizer(str(tmp_path / "a.json"))
