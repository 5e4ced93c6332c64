"""Prepares a corpus: cleaning, duplicates, tokens, data card."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manyhands.corpus.duplicates import near_duplicates, without
from manyhands.corpus.figures import PICTURE, CorpusFigures, CorpusSummary, Dropped, card, duplicates_of, picture
from manyhands.corpus.held_out import bound_of_fraction, bound_of_number, divide
from manyhands.corpus.recipe import CorpusSchema, located, source_of
from manyhands.corpus.steps import Steps
from manyhands.corpus.text import (
    EXAMPLES,
    NO_RULE,
    IsAmong,
    Judge,
    beginning,
    is_twice,
    nothing,
    passes_rules,
    some_examples,
    words_of,
)
from manyhands.corpus.tokenizing import (
    END_OF_TEXT,
    REFERENCE,
    ByteEncoder,
    TokenizerEncoder,
    encoder_of,
    faster,
    load_tokenizer,
    tokenizer_json,
    train_bpe,
)
from manyhands.data.token_format import FOLDER, HELD_OUT, MANIFEST, TOKENIZER, map_tokens, token_type
from manyhands.documents.toml import Document
from manyhands.errors import ConfigError, DataError
from manyhands.output import say
from manyhands.prepare.dataset import Dataset
from manyhands.prepare.io.token_writing import token_schema
from manyhands.prepare.job.output import PrepareSummary
from manyhands.prepare.job.publishing import BAD_RECORDS
from manyhands.prepare.options import Options
from manyhands.prepare.plan.fingerprint import fingerprint_code
from manyhands.prepare.records.aggregate import Aggregate
from manyhands.storage.atomic import is_temporary, remove_temporary_files, write_atomic
from manyhands.storage.files import names_in, read_bytes, remove

if TYPE_CHECKING:
    from numpy.typing import NDArray

_RECIPE, _SUMMARY, _CARD, _WORK = "recipe.json", "summary.json", "card.md", "work"

_OURS = {_RECIPE, _SUMMARY, TOKENIZER, _CARD, _WORK, FOLDER, HELD_OUT, PICTURE, BAD_RECORDS}

_SAMPLE = 200
"""The number of documents on which a faster tokenizer is compared with the reference."""


def prepare_corpus(
    document: Document[CorpusSchema], out: str | Path, options: Options, *, overwrite: bool = False
) -> CorpusSummary:
    """Prepare the corpus of a recipe in the folder `out`. Reuses its complete or partial output.

    The bytes of tokens, tokenizer, card and picture depend only on the recipe and its documents. Raises ConfigError if
    the folder holds other files, and the errors of the jobs. After an error, the same call resumes.
    """
    started = time.monotonic()
    folder = Path(out).absolute()
    source = source_of(document)
    settings = document.schema.settings()
    tokenizer = _given_tokenizer(document)
    identity = fingerprint_code([settings, source.identity, tokenizer and tokenizer.text])
    found = _found(folder, identity, overwrite=overwrite)
    if found is not None:
        return replace(found, path=str(folder), seconds=time.monotonic() - started, steps={})
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporary_files(folder)
    write_atomic(str(folder / _RECIPE), _json({"identity": identity, "settings": settings}))
    steps = Steps(folder / _WORK, options.keywords())
    figures = _Corpus(document.schema, folder, steps).prepare(source, tokenizer)
    if bad := steps.bad_records():
        write_atomic(str(folder / BAD_RECORDS), bad)
    write_atomic(str(folder / PICTURE), picture(figures.lengths).encode())
    write_atomic(str(folder / _CARD), card(figures, settings).encode("utf-8", "replace"))
    summary = CorpusSummary(
        path=str(folder), figures=figures, seconds=time.monotonic() - started, steps=dict(steps.seconds)
    )
    write_atomic(str(folder / _SUMMARY), _json(summary.to_json()))
    shutil.rmtree(folder / _WORK)
    return summary


class _Corpus:
    """The steps that prepare one corpus in one folder."""

    def __init__(self, schema: CorpusSchema, folder: Path, steps: Steps) -> None:
        self._schema, self._folder, self._steps, self._options = schema, folder, steps, steps.options

    def prepare(self, source: Dataset, tokenizer: TokenizerEncoder | None) -> CorpusFigures:
        """Run all steps. Raises DataError if no document is left."""
        clean = self._schema.clean
        judge = Judge(self._schema.input.text, clean.unicode, clean.build())
        judged, num_read = self._steps.cache("clean", source.map(judge))
        rules = self._by_rule(judged)
        accepted = rules.pop(NO_RULE, Dropped(reason=NO_RULE, documents=0, characters=0, examples=()))
        if not accepted.documents:
            reasons = ", ".join(f"{rule}: {drop.documents}" for rule, drop in rules.items())
            raise DataError(
                "no document is left after cleaning",
                expected="documents that pass the rules of [clean]",
                got=f"{num_read} documents; dropped by {reasons}" if num_read else "no documents",
                hint="check the thresholds of the rules, and input.paths",
            )
        documents, duplicates = self._unique(judged.filter(passes_rules), accepted.documents)
        count = accepted.documents - sum(each.documents for each in duplicates)
        training, held_out = self._divided(documents, count)
        encoder, kind = self._encoder(documents, training, tokenizer)
        written = self._tokens("tokens", training, encoder, FOLDER)
        lengths = _lengths(written)
        validation = self._tokens("validation tokens", held_out, encoder, HELD_OUT) if held_out else None
        if not written.records or (validation is not None and not validation.records):
            raise DataError(
                f"no document is left for {'validation' if written.records else 'training'}",
                expected="documents to train on, and documents to validate on",
                got=f"{count} documents in all",
                hint="change [validation] of the recipe, or prepare more documents",
            )
        totals = training.group_by(nothing).aggregate(
            characters=Aggregate.sum(of="characters"), examples=some_examples()
        )
        (total,) = totals.take(1, **self._options)
        return CorpusFigures(
            name=self._schema.name,
            documents_read=num_read,
            characters_read=accepted.characters + sum(drop.characters for drop in rules.values()),
            bad_records=self._steps.bad_records().count(b"\n"),
            dropped=(*rules.values(), *duplicates),
            documents=written.records,
            characters=total["characters"],
            tokens=int(lengths.sum()),
            vocabulary=encoder.vocabulary,
            token_bytes=token_type(encoder.vocabulary).itemsize,
            tokenizer=kind,
            lengths=tuple(np.bincount(np.log2(lengths).astype(np.int64)).tolist()),
            examples=tuple(total["examples"]),
            digest=written.digest,
            validation_documents=validation.records if validation else 0,
            validation_tokens=int(_lengths(validation).sum()) if validation else 0,
            validation_digest=validation.digest if validation else "",
        )

    def _by_rule(self, judged: Dataset) -> dict[str, Dropped]:
        """Return the documents that each rule dropped, by rule.

        The entry `NO_RULE` is for the documents that no rule dropped.
        """
        groups = judged.group_by("rule").aggregate(
            documents=Aggregate.count(), characters=Aggregate.sum(of="characters"), examples=some_examples()
        )
        return {
            group["rule"]: Dropped(
                reason=group["rule"],
                documents=group["documents"],
                characters=group["characters"],
                examples=tuple(group["examples"]),
            )
            for group in groups.take(1000, **self._options)
        }

    def _unique(self, documents: Dataset, count: int) -> tuple[Dataset, list[Dropped]]:
        """Return the documents without the duplicates that the recipe removes, and figures of the dropped documents."""
        table, dropped = self._schema.duplicates, []
        if table.exact:
            unique, left = self._steps.cache("exact duplicates", documents.distinct(key="id"))
            again = documents.map(beginning).group_by("id")
            twice = again.aggregate(documents=Aggregate.count(), text=Aggregate.first(of="text")).filter(is_twice)
            examples = [group["text"] for group in twice.take(EXAMPLES, **self._options)] if left < count else []
            dropped.append(duplicates_of("exact", count - left, examples))
            documents, count = unique, left
        if table.near:
            pairs, near = near_duplicates(documents, table.build(), self._steps)
            examples = self._describe_pairs(documents, pairs.take(EXAMPLES, **self._options)) if near else []
            dropped.append(duplicates_of("near", near, examples))
            if near:
                documents, _ = self._steps.cache("near-duplicates: removed", without(documents, pairs))
        return documents, dropped

    def _describe_pairs(self, documents: Dataset, pairs: list[tuple[bytes, bytes]]) -> list[str]:
        """Return examples of near-duplicates, each with the document that is kept."""
        ids = frozenset(one for pair in pairs for one in pair)
        found = documents.filter(IsAmong(ids)).map(beginning).take(len(ids), **self._options)
        texts = {document["id"]: "\n".join(document["text"].split("\n")[:5]) for document in found}
        return [f"{texts[dropped][:190]}\n  (this document stays:)\n{texts[stays][:190]}" for dropped, stays in pairs]

    def _divided(self, documents: Dataset, count: int) -> tuple[Dataset, Dataset | None]:
        """Return the documents to train on, and those that the recipe holds out, if any. Raises DataError."""
        table, seed = self._schema.validation, self._schema.seed
        if table.fraction is not None:
            return divide(documents, bound_of_fraction(table.fraction), seed)
        if table.documents is None:
            return documents, None
        if table.documents >= count:
            raise DataError(
                "no document is left for training",
                expected=f"more documents than the {table.documents:,} of validation.documents",
                got=f"{count:,} documents",
                hint="change [validation] of the recipe, or prepare more documents",
            )
        self._steps.start("validation: documents")
        below = bound_of_number(documents, table.documents, seed, self._options)
        self._steps.end("validation: documents")
        return divide(documents, below, seed)

    def _encoder(
        self, documents: Dataset, training: Dataset, tokenizer: TokenizerEncoder | None
    ) -> tuple[ByteEncoder | TokenizerEncoder, str]:
        """Return the encoder and its description, and write the tokenizer next to the tokens.

        A vocabulary is trained on the training documents, so that nothing is learned from those that are held out.
        """
        table, kind = self._schema.tokenizer, f"of {self._schema.tokenizer.file}"
        if table.vocabulary is not None:
            sampled = training.sample(table.sample, seed=self._schema.seed)
            words = self._steps.divided(documents, sampled).flat_map(words_of).group_by()
            counts, number = self._steps.cache(
                "vocabulary: words", words.aggregate(documents=Aggregate.count()).filter(is_twice)
            )
            self._steps.start("vocabulary: pairs")
            counted = {row["key"]: row["documents"] for row in counts.take(number, **self._options)}
            text = tokenizer_json(train_bpe(counted, table.vocabulary))
            self._steps.end("vocabulary: pairs")
            tokenizer, kind = encoder_of(text, END_OF_TEXT, str(self._folder / TOKENIZER)), "byte-level BPE, trained"
        if tokenizer is None:
            return ByteEncoder(), "bytes"
        write_atomic(str(self._folder / TOKENIZER), tokenizer.text.encode())
        if table.fast:
            sample = [document["text"] for document in training.take(_SAMPLE, **self._options)]
            tokenizer, reason = faster(tokenizer, sample)
            if reason and self._options.get("progress", True):
                say(f"tokenizing with the {REFERENCE} library: {reason}")
        return tokenizer, kind

    def _tokens(
        self, step: str, documents: Dataset, encoder: ByteEncoder | TokenizerEncoder, folder: str
    ) -> PrepareSummary:
        """Write the tokens of the documents, in random order, to files."""
        self._steps.start(step)
        shuffled = documents.map_batches(encoder).shuffle(self._schema.seed)
        schema = token_schema(encoder.vocabulary)
        written = shuffled.write(
            str(self._folder / folder), format="tokens", schema=schema, overwrite=True, **self._options
        )
        self._steps.end(step)
        return written


def _lengths(written: PrepareSummary) -> NDArray[np.integer]:
    """Return the number of tokens of each document, including its end token."""
    files = [map_tokens(f"{written.path}/{name}") for name in written.files]
    return np.concatenate([np.empty(0, np.uint64), *(np.diff(file.ends, prepend=np.uint64(0)) for file in files)])


def _given_tokenizer(document: Document[CorpusSchema]) -> TokenizerEncoder | None:
    """Return the encoder of the recipe's tokenizer file, or None if it names none. Raises ConfigError and DataError."""
    table = document.schema.tokenizer
    if table.file is None:
        if table.vocabulary is not None:
            # If the package is missing, this call raises immediately instead of after hours of work.
            load_tokenizer(tokenizer_json(train_bpe({}, 0)))
        return None
    path, where = located(document, table.file, "tokenizer", "file"), document.origin("tokenizer", "file")
    try:
        text = read_bytes(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the tokenizer's file can't be read: {error}", where=where) from error
    return encoder_of(text, table.end_of_text, where)


def _found(folder: Path, identity: str, *, overwrite: bool) -> CorpusSummary | None:
    """Return the summary of this corpus if it is complete. Raises ConfigError if the folder holds other files."""
    names = [name for name in names_in(folder) if not is_temporary(name)]
    if folder.exists() and not folder.is_dir():
        raise ConfigError("the output folder is a file", where=str(folder), hint="choose another path")
    foreign = [name for name in names if name not in _OURS] or (names if names and _RECIPE not in names else [])
    if foreign:
        raise ConfigError(
            "the output folder holds something that is not an output",
            where=str(folder),
            expected="a new folder, an empty folder, or the folder of an earlier run",
            got=f"a folder with {', '.join(foreign[:5])}",
            hint="choose another folder; nothing was written",
        )
    existing = _read_json(folder / _RECIPE).get("identity") if names else identity
    if existing != identity:
        if not overwrite:
            raise ConfigError(
                "the output folder holds another corpus",
                where=str(folder),
                hint="the recipe or its documents have changed: name a new folder with --out, or delete this folder",
            )
        for name in names:
            remove(str(folder / name))
        return None
    summary = _read_json(folder / _SUMMARY)
    if not summary or not (folder / FOLDER / MANIFEST).exists():
        return None
    found = CorpusSummary.from_json(summary)
    return found if not found.figures.validation_digest or (folder / HELD_OUT / MANIFEST).exists() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
