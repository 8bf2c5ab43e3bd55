"""Files into sentences, sentences into tokens."""

import json
from pathlib import Path

import pytest
from conftest import SENTENCES, wordpiece

from fusion_model.data.text import detokenize, read_documents, read_text, split_sentences
from fusion_model.data.tokenizer import cut_vocabulary, encode_sentences, encoder_ids, train_bpe
from fusion_model.errors import EncoderError, TextError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"text\0more", "is a binary file"),
        ("café".encode("latin1"), r"is not UTF-8 \(byte 3 is 0xe9\).*iconv"),
    ],
)
def test_unusable_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes(content)
    with pytest.raises(TextError, match=f"some.txt {message}"):
        read_text(path)


def test_missing_file_and_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"cannot read .*nothing\.txt: No such file"):
        read_documents([str(tmp_path / "nothing.txt")])
    with pytest.raises(TextError, match=r"holds no \.txt file"):
        read_documents([str(tmp_path)])


def test_sentences_of_wrapped_paragraphs() -> None:
    text = "Mr. Smith went\nhome. He slept.\n\nThe  end\n"
    assert split_sentences(text) == ["Mr. Smith went home.", "He slept.", "The end"]
    assert split_sentences(text, "lines") == ["Mr. Smith went", "home. He slept.", "The end"]
    with pytest.raises(TextError, match="unknown split 'words'"):
        split_sentences(text, "words")


def test_folder_and_local_dataset(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("B one. B two.")
    (tmp_path / "a.txt").write_text("\ufeffA one.")
    documents = read_documents([str(tmp_path)])
    assert [d.sentences for d in documents] == [["A one."], ["B one.", "B two."]]
    (tmp_path / "a.txt").unlink()
    [dataset] = read_documents([f"hf:{tmp_path}"])
    assert dataset.sentences == ["B one.", "B two."]
    with pytest.raises(TextError, match="cannot load the dataset"):
        read_documents([f"hf:{tmp_path}:validation"])


def test_lines_end_where_editors_end_them() -> None:
    text = "One\x0ctwo.\nThree\x85 four.\r\n\nFive\u2028six.\rSeven."
    lines = ["One two.", "Three four.", "Five six.", "Seven."]
    assert split_sentences(text, "lines") == lines


def test_datasets_may_have_gaps_and_must_have_text(tmp_path: Path) -> None:
    rows = [{"text": "Hello there."}, {"text": None}, {"text": "Good day."}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    [dataset] = read_documents([f"hf:{tmp_path}"])
    assert dataset.sentences == ["Hello there.", "Good day."]
    (tmp_path / "a.jsonl").write_text('{"text": 5}')
    with pytest.raises(TextError, match="holds more than text"):
        read_documents([f"hf:{tmp_path}"])


def test_a_closed_standard_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(TextError, match="standard input is closed"):
        read_documents(["-"])


def test_detokenize_undoes_wikitext() -> None:
    wiki = ' = Title = \n He said , " 1 @,@ 000 well @-@ known men ( and more ) " . It did n\'t .'
    assert detokenize(wiki) == 'Title.\n He said, "1,000 well-known men (and more)". It didn\'t.'


def test_bpe_reaches_its_size_or_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert len(train_bpe(SENTENCES, 280)) == 280
    assert not caplog.records
    small = train_bpe(SENTENCES, 5000)
    assert len(small) < 5000
    assert f"the vocabulary has {len(small)}" in caplog.text
    with pytest.raises(TextError, match="at least 259 tokens"):
        train_bpe(SENTENCES, 100)


def test_bpe_is_lossless_and_adds_no_specials(bpe) -> None:
    for text in (*SENTENCES, "Ünïcode → 漢字 🙂  two  spaces"):
        ids = bpe(text)["input_ids"]
        assert not set(ids) & set(bpe.all_special_ids)
        assert bpe.decode(ids) == text


def test_sentences_get_bos_and_eos_and_are_cut(bpe) -> None:
    whole = encode_sentences(bpe, SENTENCES[:2])
    assert all(ids[0] == 1 and ids[-1] == 2 for ids in whole)
    pieces = encode_sentences(bpe, SENTENCES[:1], max_tokens=4)
    assert [t for ids in pieces for t in ids[1:-1]] == whole[0][1:-1]
    assert max(len(ids) for ids in pieces) == 6
    assert encode_sentences(bpe, [""]) == [[1, 2]]


def test_cut_vocabulary_is_part_of_the_encoders() -> None:
    encoder = wordpiece()
    cut = cut_vocabulary(encoder, SENTENCES, 60)
    assert len(cut) == 60
    mapping = encoder_ids(cut, encoder)
    assert (mapping >= 0).sum() == 60 - 3  # all but padding, BOS and EOS
    for sentence in SENTENCES:
        ids = cut(sentence)["input_ids"]
        assert cut.unk_token_id not in ids
        pieces = encoder.convert_ids_to_tokens(mapping[ids].tolist())
        assert pieces == cut.convert_ids_to_tokens(ids)
    full = cut_vocabulary(encoder, SENTENCES, 10_000)
    sentence = SENTENCES[3]
    expected = encoder(sentence, add_special_tokens=False)["input_ids"]
    assert encoder_ids(full, encoder)[full(sentence)["input_ids"]].tolist() == expected


def test_only_wordpiece_can_be_cut(bpe) -> None:
    with pytest.raises(EncoderError, match="only a WordPiece vocabulary"):
        cut_vocabulary(bpe, SENTENCES, 100)
