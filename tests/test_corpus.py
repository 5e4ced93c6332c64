"""Corpora for training: the same bytes for any workers, which documents are dropped, and clear errors."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import manyhands as mh
from manyhands.cli.main import app
from manyhands.corpus.duplicates import MinHash, _components, jaccard
from manyhands.corpus.job import prepare_corpus
from manyhands.corpus.recipe import CorpusSchema, read_corpus_recipe
from manyhands.corpus.steps import Steps
from manyhands.corpus.text import Judge, Rules, normalized
from manyhands.corpus.tokenizing import (
    END,
    END_OF_TEXT,
    WORDS,
    ByteEncoder,
    encoder_of,
    faster,
    tokenizer_json,
    train_bpe,
)
from manyhands.prepare.engines.engine import InProcess, JobEngine
from manyhands.prepare.engines.local import Pool
from manyhands.prepare.options import Options
from support.corpus import changed, sentence, vocabulary, write_corpus

QUIET: Any = {"engine": InProcess(2**30), "progress": False}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder / "corpus.toml"


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as this process prepares it."""
    out = tmp_path_factory.mktemp("prepared")
    prepare(corpus, out, engine=InProcess(2**30))
    return out


def prepare(recipe: Path, out: Path, *overrides: str, engine: JobEngine | None = None, **options: Any) -> Any:
    how = Options(engine=engine or InProcess(2**30), progress=False, **options)
    return prepare_corpus(read_corpus_recipe(recipe, overrides), out, how)


def sha256s(folder: Path) -> dict[str, str]:
    """Hash all files except the summary and the events, which contain times."""
    timed = ("summary.json", "_events.jsonl")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in timed]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("workers", "memory"),
    [pytest.param(1, 2**27, marks=pytest.mark.slow), pytest.param(2, 2**30, marks=pytest.mark.slow), (3, 2**27)],
)
def test_the_same_bytes_with_any_workers_and_memory(
    corpus: Path, prepared: Path, tmp_path: Path, workers: int, memory: int
) -> None:
    pool = Pool(workers, memory)
    try:
        prepare(corpus, tmp_path / "out", engine=pool)
    finally:
        pool.close()
    assert sha256s(tmp_path / "out") == sha256s(prepared)
    assert len(list((prepared / "tokens").glob("*.tokens"))) > 1


@pytest.mark.parametrize(
    "step", ["exact-duplicates", *(pytest.param(s, marks=pytest.mark.slow) for s in ("clean", "near*", "voc*"))]
)
def test_a_killed_run_resumes_to_the_same_bytes(corpus: Path, prepared: Path, tmp_path: Path, step: str) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "manyhands.cli.main", "prepare", str(corpus), "--out", str(out), "-n", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while not list((out / "work").glob(step)):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "summary.json").exists()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert sha256s(out) == sha256s(prepared)
    assert json.loads(done.stdout)["figures"]["digest"]


def test_each_remaining_document_is_in_the_tokens_once_in_random_order(corpus: Path, prepared: Path) -> None:
    import tokenizers

    summary = json.loads((prepared / "summary.json").read_text())["figures"]
    tokenizer = tokenizers.Tokenizer.from_file(str(prepared / "tokenizer.json"))
    data = mh.TokenFile(prepared, 1)
    data.verify()
    flat = np.concatenate([file.tokens for file in data._files])
    ends = np.flatnonzero(flat == END)
    texts = [tokenizer.decode(part[part != END].tolist()) for part in np.split(flat, ends + 1)[:-1]]
    read = [
        json.loads(line)["text"]
        for path in sorted(corpus.parent.glob("*.jsonl"))
        for line in path.read_bytes().splitlines()
    ]
    dropped = {drop["reason"]: drop["documents"] for drop in summary["dropped"]}
    assert len(texts) == len(set(texts)) == data.documents == summary["documents"]
    assert set(texts) <= {normalized(text, "NFC") for text in read}
    assert [text for text in read if text in set(texts)] != texts
    assert dropped.pop("near-duplicate") == pytest.approx(24, abs=4)
    assert dropped == {
        "exact duplicate": 18,
        "max_replaced": 1,
        "max_repeated_lines": 1,
        "min_characters": 1,
        "min_letters": 1,
    }
    assert summary["documents_read"] == len(read) == data.documents + sum(d["documents"] for d in summary["dropped"])
    assert data.vocabulary == summary["vocabulary"] == 400
    card = (prepared / "card.md").read_text()
    assert "exact duplicates | 18 |" in card
    assert "(this document stays:)" in card
    assert sum(summary["lengths"]) == data.documents
    assert (prepared / "lengths.svg").read_text().startswith("<svg")


def documents_of(folder: Path) -> list[bytes]:
    """The documents of a folder of byte tokens, without their end."""
    data = mh.TokenFile(folder, 1)
    data.verify()
    flat = np.concatenate([file.tokens for file in data._files])
    return [bytes(part.tolist()) for part in np.split(flat[flat != END], _ends(flat))][:-1]


def _ends(flat: Any) -> Any:
    return np.flatnonzero(flat == END) - np.arange(np.sum(flat == END))


BYTES_ONLY = ["tokenizer={}", "duplicates={near=false}"]


def test_documents_are_held_out_by_their_text_alone(corpus: Path, tmp_path: Path) -> None:
    prepare(corpus, tmp_path / "all", *BYTES_ONLY)
    figures = prepare(corpus, tmp_path / "one", *BYTES_ONLY, "validation.fraction=0.1").figures
    pool = Pool(2, 2**27)
    try:
        prepare(corpus, tmp_path / "two", *BYTES_ONLY, "validation.fraction=0.1", engine=pool)
    finally:
        pool.close()
    assert sha256s(tmp_path / "one") == sha256s(tmp_path / "two")
    every = documents_of(tmp_path / "all")
    training, held_out = documents_of(tmp_path / "one"), documents_of(tmp_path / "one" / "validation")
    assert len(set(every)) == len(every)
    assert sorted(training + held_out) == sorted(every)
    assert 0.05 < len(held_out) / len(every) < 0.15
    assert (figures.documents, figures.validation_documents) == (len(training), len(held_out))
    assert figures.validation_tokens == sum(len(text) + 1 for text in held_out)
    assert f"{len(held_out)} more documents are held out" in (tmp_path / "one" / "card.md").read_text()

    again = prepare(corpus, tmp_path / "one", *BYTES_ONLY, "validation.fraction=0.1")
    assert again.steps == {}
    assert f"{len(held_out)} documents: {tmp_path / 'one' / 'validation'}" in str(again)
    path = min(corpus.parent.glob("*.jsonl"))  # without the other files, its documents are where they were
    prepare(corpus, tmp_path / "few", *BYTES_ONLY, "validation.fraction=0.1", f"input.paths=['{path}']")
    few = documents_of(tmp_path / "few" / "validation")
    assert 0 < len(few) < len(held_out)
    assert set(few) < set(held_out)


def test_a_number_of_documents_is_held_out_by_the_seed(corpus: Path, tmp_path: Path) -> None:
    settings = [*BYTES_ONLY, f"input.paths=['{min(corpus.parent.glob('*.jsonl'))}']", "validation.documents=20"]
    found = []
    for seed in (3, 9):
        figures = prepare(corpus, tmp_path / str(seed), *settings, f"seed={seed}").figures
        found.append(documents_of(tmp_path / str(seed) / "validation"))
        assert len(found[-1]) == figures.validation_documents == 20
        assert len(documents_of(tmp_path / str(seed))) == figures.documents
    assert set(found[0]) != set(found[1])


@pytest.mark.parametrize(("how", "part"), [("documents=100000", "training"), ("fraction=0.0000001", "validation")])
def test_a_part_without_documents_is_refused(corpus: Path, tmp_path: Path, how: str, part: str) -> None:
    with pytest.raises(mh.DataError, match=f"no document is left for {part}"):
        prepare(corpus, tmp_path / "out", *BYTES_ONLY, f"validation.{how}")


def test_an_existing_corpus_stays_and_another_one_is_refused(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "out")
    again = prepare(corpus, tmp_path / "out")
    assert not again.steps
    assert "existed already" in str(again)
    with pytest.raises(mh.ConfigError, match="holds another corpus"):
        prepare(corpus, tmp_path / "out", "seed=4")
    other = prepare_corpus(
        read_corpus_recipe(corpus, ["tokenizer={}"]), tmp_path / "out", Options(**QUIET), overwrite=True
    )
    assert other.figures.tokenizer == "bytes"
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(mh.ConfigError, match="something that is not an output"):
        prepare(corpus, tmp_path / "mine")


def test_a_given_tokenizer_is_used(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    given = prepare(corpus, tmp_path / "out", f"tokenizer={{file='{prepared / 'tokenizer.json'}'}}")
    assert sha256s(tmp_path / "out" / "tokens") == sha256s(prepared / "tokens")
    assert given.figures.vocabulary == 400
    for overrides, message in (
        (["tokenizer={file='nowhere.json'}"], "file can't be read"),
        ([f"tokenizer={{file='{corpus}'}}"], "can't be read"),
        ([f"tokenizer={{file='{prepared / 'tokenizer.json'}', end_of_text='</s>'}}"], "no token </s>"),
    ):
        with pytest.raises((mh.ConfigError, mh.DataError), match=message):
            prepare(corpus, tmp_path / "other", *overrides)


def test_every_form_of_input_is_read_and_bad_records_are_set_aside(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(
        "a document a line, of some length and sense\n" * 2 + "another one of them, as long\n"
    )
    (tmp_path / "b.py").write_text("'''A file that is a document.'''\nimport this\n")
    (tmp_path / "c.jsonl").write_text('{"body": "the text is in another column here"}\n{"body": 3}\n')
    (tmp_path / "own.py").write_text(
        "import manyhands as mh\n"
        "def paths(name):\n    from pathlib import Path\n    return [Path(__file__).parent / name]\n"
        "def dataset():\n    return mh.Dataset.from_records([{'text': 'a record of a Dataset'}])\n"
        "def wrong():\n    return 3\n"
    )

    def tokens(name: str, **table: Any) -> int:
        written = "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items())
        (tmp_path / f"{name}.toml").write_text(f"[input]\n{written}\n[clean]\nmin_characters = 9\n")
        return int(prepare(tmp_path / f"{name}.toml", tmp_path / "out" / name, max_bad_records=1).figures.tokens)

    assert tokens("lines", paths=["a.txt"]) == 44 + 29
    assert (
        tokens("files", paths=["*.py"], format="files")
        == len((tmp_path / "b.py").read_text() + (tmp_path / "own.py").read_text()) + 2
    )
    assert tokens("column", paths=["c.jsonl"], text="body") == 35
    assert "no text in column 'body'" in (tmp_path / "out" / "column" / "_bad_records.jsonl").read_text()
    (tmp_path / "named.toml").write_text(
        '[input]\npath = "own:paths"\nformat = "files"\n[input.arguments]\nname = "b.py"\n[clean]\nmin_characters = 9\n'
    )
    assert prepare(tmp_path / "named.toml", tmp_path / "out" / "named").figures.documents == 1
    assert tokens("own", path="own:dataset") == 22
    with pytest.raises(mh.ConfigError, match="neither paths nor a Dataset"):
        tokens("wrong", path="own:wrong")
    with pytest.raises(mh.ConfigError, match="own:paths raised TypeError"):
        tokens("raises", path="own:paths")
    with pytest.raises(mh.DataError, match="no document is left"):
        prepare(tmp_path / "lines.toml", tmp_path / "none", "clean.min_characters=1000")


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        (["tokeniser.vocabulary=300"], "tokeniser is not known", "did you mean 'tokenizer'?"),
        (["clean.min_leters=0.1"], "clean.min_leters is not known", "did you mean 'min_letters'?"),
        (["clean.min_letters=2.5"], "clean.min_letters is out of range", "a number from 0.0 to 1.0"),
        (["clean.unicode=NFX"], "clean.unicode has an unknown value", "did you mean 'NFC'?"),
        (["input.format=json"], "input.format has an unknown value", "did you mean 'jsonl'?"),
        (["input.paths=[]"], "input.paths is missing", "module:function"),
        (["input.path=a:b"], "can't be used together with paths", "module:function"),
        (["duplicates.exact=false"], "duplicates.near requires exact", "near = false"),
        (["tokenizer.file=x"], "can't be used together with vocabulary", "to train a tokenizer"),
        (["validation={fraction=0.1, documents=5}"], "can't be used together with documents", "documents = 1000"),
        (["validation.fraction=1.0"], "validation.fraction has a wrong value", "less than 1"),
        (["tokenizer.vocabulary=many"], "tokenizer.vocabulary has a wrong value", "valid integer"),
        (["input.paths=['nowhere/*']"], "no file matches", "--set input.paths"),
        (["input={path='nowhere:f'}"], "there is no module nowhere", "--set input"),
    ],
)
def test_a_wrong_corpus_recipe_is_reported(
    corpus: Path, tmp_path: Path, overrides: list[str], message: str, hint: str
) -> None:
    with pytest.raises((mh.ConfigError, mh.DataError)) as caught:
        prepare(corpus, tmp_path / "out", *overrides)
    assert message in str(caught.value)
    assert hint in str(caught.value)
    assert "--set" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_recipe_in_the_documents_has_the_defaults() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "prepare.md").read_text()
    text = page.split("```toml\n")[1].split("```")[0]
    documented = tomllib.loads(text)
    documented["tokenizer"].pop("vocabulary")
    defaults = CorpusSchema.model_validate({"name": "posts", "input": {"paths": ["posts/*.jsonl"], "format": "jsonl"}})
    for name, table in documented.items():
        default = getattr(defaults, name)
        assert (default if not isinstance(table, dict) else {key: getattr(default, key) for key in table}) == table
    unset = re.findall(r"^# (\w+) =", text, re.MULTILINE)
    assert unset == ["path", "file", "end_of_text", "fast", "fraction", "documents"]
    for name, model in CorpusSchema.model_fields.items():
        fields = getattr(model.annotation, "model_fields", {})
        rare = {"arguments", "partition_bytes"}  # of [input]
        assert set(fields) - rare <= {*(documented.get(name) or {}), *unset, "vocabulary"}, name


def test_the_command_line_prepares_and_prints_a_summary(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(
        app, ["prepare", str(corpus), "-n", "1", "--memory", "512MiB", "--set", "tokenizer={}", "--set", "name=mine"]
    )
    assert done.exit_code == 0, done.output
    assert "near-duplicates" in done.output
    assert "vocabulary  257 (bytes)" in done.output
    assert mh.TokenFile("prepared/mine", 64, boundaries=True)[0]["tokens"].max() <= END


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("Ein ganz gewöhnlicher Satz, wie er im Buche steht, mit einem Komma.", ""),
        ("हिन्दी में लिखा हुआ एक साधारण वाक्य, जिसमें कई शब्द हैं और कुछ नहीं।", ""),
        ("这是一个普通的中文句子。" * 5, ""),
        ("kurz", "min_characters"),
        ("x" * 2001, "max_characters"),
        ("=-" * 50, "min_letters"),
        ("caf\ufffd " * 20, "max_replaced"),
        ("line after line\n" * 20, "max_repeated_lines"),
        ("y" * 1500, "max_line"),
    ],
)
def test_rules_apply_to_any_language(text: str, rule: str) -> None:
    assert Rules(max_characters=2000, max_line=1000).broken_by(text) == rule


def test_unicode_is_normalized() -> None:
    assert normalized("e\u0301\r\nx\r\0\ufeff\ud800y\tz", "NFC") == "é\nx\ny\tz"
    assert normalized("ﬁ", "NFKC") == "fi"
    assert normalized("e\u0301", "none") == "e\u0301"
    judge = Judge("text", "NFC", Rules(min_characters=1))
    assert judge("e\u0301")["id"] == judge({"text": "é"})["id"]


def test_near_duplicates_are_found_at_the_rates_that_are_documented() -> None:
    generator, minhash = random.Random(1), MinHash()
    words = vocabulary(generator)
    for share, least, most in ((0.01, 0.99, 1.0), (0.05, 0.9, 1.0), (0.1, 0.3, 0.7), (0.3, 0.0, 0.03)):
        found, expected = [], []
        for _ in range(60):
            text = sentence(generator, words, 300)
            other = changed(text, share, generator, words)
            found.append(bool(set(minhash.band_keys(text)) & set(minhash.band_keys(other))))
            expected.append(minhash.probability(jaccard(text, other)))
        assert least <= np.mean(found) <= most, (share, np.mean(found), np.mean(expected))
        assert np.mean(found) == pytest.approx(np.mean(expected), abs=0.15)


def test_equal_minima_estimate_the_similarity() -> None:
    generator, minhash = random.Random(2), MinHash(bands=64, rows=8)
    words = vocabulary(generator)
    text = sentence(generator, words, 300)
    for share in (0.0, 0.01, 0.05, 0.3):
        other = changed(text, share, generator, words)
        estimate = np.mean(minhash.signature(text) == minhash.signature(other))
        assert estimate == pytest.approx(jaccard(text, other), abs=0.07)
    assert minhash.band_keys("A  b\n C d") == minhash.band_keys("a b c D")
    assert len(minhash.band_keys("")) == 64


def test_the_hashes_never_change() -> None:
    assert (
        hashlib.sha256(repr(MinHash().band_keys("to be or not to be")).encode()).hexdigest()[:16] == "7e0dcbf0997d5c92"
    )


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), max_size=40))
def test_groups_are_the_connected_components(
    tmp_path_factory: pytest.TempPathFactory, edges: list[tuple[int, int]]
) -> None:
    pairs = sorted({(max(edge), min(edge)) for edge in edges if edge[0] != edge[1]})
    parent = {node: node for edge in pairs for node in edge}
    for _ in parent:
        for one, other in pairs:
            parent[one] = parent[other] = min(parent[one], parent[other])
    as_bytes = [(bytes([one]), bytes([other])) for one, other in pairs]
    steps = Steps(tmp_path_factory.mktemp("steps"), QUIET)
    records, count = steps.cache("near-duplicates: pairs", mh.Dataset.from_records(as_bytes))
    found, count = _components(records, count, steps)
    expected = {(bytes([node]), bytes([root])) for node, root in parent.items() if node != root}
    assert set(found.take(1000, **QUIET)) == expected
    assert count == len(expected)


def test_a_vocabulary_depends_on_the_counts_alone_and_encodes_as_it_was_trained() -> None:
    import regex

    text = (Path(__file__).read_text()[:1500] + " é漢字 abcabc abcab 12 123 ") * 2
    words = regex.findall(WORDS, text)
    counts = {word: words.count(word) for word in set(words)}
    trained = train_bpe(counts, 400)
    shuffled = dict(random.Random(0).sample(sorted(counts.items()), len(counts)))
    assert tokenizer_json(train_bpe(shuffled, 400)) == tokenizer_json(trained)
    assert len(trained.names) == len(set(trained.names)) == 400
    encoder = encoder_of(tokenizer_json(trained), END_OF_TEXT, "here")
    assert (encoder.end, encoder.vocabulary) == (END, 400)
    (ids,) = encoder.encode([text])
    expected = []
    for word in words:
        tokens = list(word.encode())
        for left, right in trained.merges:  # applies the definition of BPE to each word
            token = trained.names.index(trained.names[left] + trained.names[right])
            merged: list[int] = []
            for one in tokens:
                if merged and (merged[-1], one) == (left, right):
                    merged[-1] = token
                else:
                    merged.append(one)
            tokens = merged
        expected += tokens
    assert ids.tolist() == expected
    assert len(ids) < 0.5 * len(text)
    assert len(train_bpe({"aa": 1}, 300).names) == 257


def test_a_special_token_in_a_document_is_text() -> None:
    import pyarrow as pa

    encoder = encoder_of(tokenizer_json(train_bpe({}, 0)), END_OF_TEXT, "here")
    text = f"a {END_OF_TEXT} b"
    table = pa.table({"text": [text, ""]})
    assert encoder(table).column("tokens").to_pylist() == [[*text.encode(), END], [END]]
    assert ByteEncoder()(table).equals(encoder(table))


def test_a_faster_tokenizer_is_used_only_if_it_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(tokenizer_json(train_bpe({"abab": 9}, 258)), END_OF_TEXT, "here")
    sample = ["ab abab", "x"]
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert faster(encoder, sample) == (encoder, "gigatoken isn't installed")

    def library(encode: Any) -> Any:
        return SimpleNamespace(Tokenizer=lambda _: SimpleNamespace(encode_batch_list=encode))

    def encode(texts: list[str], parallel: bool) -> list[list[int]]:
        assert not any(END_OF_TEXT in text for text in texts)
        return [ids.tolist() for ids in encoder.encode(texts)]

    from manyhands.corpus import tokenizing as module

    module._fast.cache_clear()
    monkeypatch.setitem(sys.modules, "gigatoken", library(encode))
    quick, why_not = faster(encoder, sample)
    assert (quick.library, why_not) == ("gigatoken", "")
    assert [ids.tolist() for ids in quick.encode([END_OF_TEXT])] == [list(END_OF_TEXT.encode())]
    module._fast.cache_clear()
    monkeypatch.setitem(sys.modules, "gigatoken", library(lambda texts, parallel: [[1] for _ in texts]))
    assert faster(encoder, sample) == (encoder, "gigatoken gives different tokens for 'ab abab'")
    module._fast.cache_clear()
    monkeypatch.setitem(sys.modules, "gigatoken", library(lambda texts, parallel: 1 / 0))
    assert "does not support this tokenizer: ZeroDivisionError" in faster(encoder, sample)[1]
    module._fast.cache_clear()


def test_without_its_packages_bytes_can_be_prepared_and_a_vocabulary_cannot(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from manyhands.corpus.tokenizing import load_tokenizer

    load_tokenizer.cache_clear()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(mh.ConfigError, match=r"pip install 'manyhands\[text\]'"):
        prepare(corpus, tmp_path / "out")
    assert prepare(corpus, tmp_path / "out", "tokenizer={}").figures.vocabulary == 257
    load_tokenizer.cache_clear()
