"""The summary, data card and picture of a corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from manyhands.data.token_format import HELD_OUT
from manyhands.formatting import format_bytes, format_count, format_seconds

PICTURE = "lengths.svg"

_EXACT, _NEAR = "exact duplicate", "near-duplicate"


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """The documents dropped for one reason: their number, and some of their texts."""

    reason: str
    documents: int
    characters: int
    examples: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CorpusFigures:
    """The figures of a corpus. They do not depend on workers, memory or engine, so they include no times.

    documents, characters, tokens, lengths, digest: of the documents to train on. lengths: the numbers of documents with
    1 token, 2 to 3 tokens, 4 to 7 tokens, and so on, including the end token. validation_documents, validation_tokens,
    validation_digest: of the documents that are held out.
    """

    name: str
    documents_read: int
    characters_read: int
    bad_records: int
    dropped: tuple[Dropped, ...]
    documents: int
    characters: int
    tokens: int
    vocabulary: int
    token_bytes: int
    tokenizer: str
    lengths: tuple[int, ...]
    examples: tuple[str, ...]
    digest: str
    validation_documents: int = 0
    validation_tokens: int = 0
    validation_digest: str = ""


@dataclass(frozen=True, kw_only=True)
class CorpusSummary:
    """Figures and times. seconds: the total time. steps: the seconds of each step; empty if the corpus existed
    already.
    """

    path: str
    figures: CorpusFigures
    seconds: float
    steps: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> CorpusSummary:
        """Create a summary from the values that `to_json` returned."""
        figures = value["figures"]
        dropped = tuple(Dropped(**{**drop, "examples": tuple(drop["examples"])}) for drop in figures["dropped"])
        lists = {name: tuple(figures[name]) for name in ("lengths", "examples")}
        return cls(**{**value, "figures": CorpusFigures(**{**figures, **lists, "dropped": dropped})})

    def __str__(self) -> str:
        """Return a summary for people, in a few lines."""
        got = self.figures
        lines = [
            f"{got.name}: {format_count(got.tokens)} tokens in {format_count(got.documents)} documents, "
            f"{format_bytes(got.tokens * got.token_bytes)}: {self.path}",
            f"  read        {format_count(got.documents_read)} documents, "
            f"{format_count(got.characters_read)} characters",
            *(
                f"  dropped     {format_count(drop.documents)} ({_share(drop.documents, got.documents_read)}) "
                f"{_describe_reason(drop.reason)}"
                for drop in got.dropped
                if drop.documents
            ),
            f"  vocabulary  {got.vocabulary:,} ({got.tokenizer}), {_per_token(got)} characters per token",
            f"  time        {format_seconds(self.seconds)}" if self.steps else "  existed already",
            *(f"  {format_seconds(seconds):>10}  {name}" for name, seconds in self.steps.items()),
            f"  digest      {got.digest}",
        ]
        if got.validation_documents:
            lines.insert(
                1,
                f"  validation  {format_count(got.validation_tokens)} tokens in "
                f"{format_count(got.validation_documents)} documents: {self.path}/{HELD_OUT}",
            )
            lines.append(f"              {got.validation_digest} of the validation")
        if got.bad_records:
            lines.insert(
                2 + bool(got.validation_documents),
                f"  set aside   {format_count(got.bad_records)} bad records, in _bad_records.jsonl",
            )
        return "\n".join(lines)


def duplicates_of(kind: str, documents: int, examples: Sequence[str]) -> Dropped:
    """Return the dropped duplicates, whose characters are not counted. kind: "exact" or "near"."""
    reason = _EXACT if kind == "exact" else _NEAR
    return Dropped(reason=reason, documents=documents, characters=0, examples=tuple(examples))


def card(figures: CorpusFigures, settings: Mapping[str, Any]) -> str:
    """Return the text of the data card in Markdown."""
    rows = "".join(
        f"| {_describe_reason(drop.reason)} | {drop.documents:,} | {_share(drop.documents, figures.documents_read)} |\n"
        for drop in figures.dropped
    )
    tables = {name: table for name, table in settings.items() if isinstance(table, dict)}
    parameters = "\n".join(
        f"- {name}: " + ", ".join(f"{k} = {v!r}" for k, v in table.items()) for name, table in tables.items()
    )
    remaining = figures.documents + figures.validation_documents
    held_out = ""
    if figures.validation_documents:
        held_out = (
            f"\n{figures.validation_tokens:,} tokens in {figures.validation_documents:,} more documents are held out "
            f"for validation. Digest `{figures.validation_digest}`.\n"
        )
    return f"""# {figures.name}

{figures.tokens:,} tokens in {figures.documents:,} documents.
The vocabulary has {figures.vocabulary:,} tokens ({figures.tokenizer}).
{_per_token(figures)} characters per token; {figures.token_bytes} bytes per token on disk. Digest `{figures.digest}`.
{held_out}
## Documents

| | documents | of those read |
|---|---|---|
| read | {figures.documents_read:,} | 100 % |
{rows}| remaining | {remaining:,} | {_share(remaining, figures.documents_read)} |

Bad records that were set aside: {figures.bad_records:,}.

![Histogram of the number of tokens per document]({PICTURE})

## Examples of documents

{_quoted(figures.examples)}
## Examples of dropped documents

{"".join(_dropped_examples(drop) for drop in figures.dropped) or "None."}
## Parameters

Seed {settings["seed"]}.

{parameters}
"""


def picture(lengths: Sequence[int]) -> str:
    """Return a histogram of document lengths in tokens, as SVG. Its bytes depend only on the numbers."""
    most, width, height, left, bottom = max((*lengths, 1)), 640, 240, 50, 200
    step = (width - left - 10) / max(1, len(lengths))
    bars = []
    for number, count in enumerate(lengths):
        tall = 160 * count / most
        x = left + number * step
        middle = f'x="{x + step / 2:.1f}" text-anchor="middle"'
        bars.append(
            f'<rect x="{x + 1:.1f}" y="{bottom - tall:.1f}" width="{step - 2:.1f}" height="{tall:.1f}" fill="#4477aa"/>'
            f'<text {middle} y="{bottom + 14}">{format_count(2**number).replace(" ", "")}</text>'
            f'<text {middle} y="{bottom - tall - 4:.1f}">{format_count(count)}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="10">\n<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="{left}" y="18" font-size="13">Documents by number of tokens (each bar: from N to 2 N)</text>\n'
        + "\n".join(bars)
        + f'\n<line x1="{left}" y1="{bottom}" x2="{width - 10}" y2="{bottom}" stroke="black"/>\n</svg>\n'
    )


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def _per_token(figures: CorpusFigures) -> str:
    return f"{figures.characters / max(1, figures.tokens):.2f}"


def _describe_reason(reason: str) -> str:
    return f"{reason}s" if reason in (_EXACT, _NEAR) else f"by the rule {reason}"


def _dropped_examples(drop: Dropped) -> str:
    return f"### {_describe_reason(drop.reason)}\n\n{_quoted(drop.examples)}\n" if drop.examples else ""


def _quoted(examples: Sequence[str]) -> str:
    """Return texts as indented Markdown blocks, so that Markdown in the texts is not interpreted."""
    blocks = ["".join(f"    {line}\n" for line in example[:400].split("\n")[:12]) for example in examples]
    return "\n---\n\n".join(blocks)
