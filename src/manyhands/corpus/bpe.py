"""Training a byte-pair vocabulary from counted words: in one place, and to the same vocabulary every time.

Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016; on bytes as in GPT-2.
"""

from __future__ import annotations

import heapq
import json
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise

# GPT-2's words: a contraction's end; letters, digits or other signs, with the space before; white space.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"
END = 256  # tokens 0 to 255 are the bytes, the next one is the end of a document

Pair = tuple[int, int]


class Vocabulary:
    """Tokens by number, and the pairs that were merged to make them. Names are those of tokenizer files."""

    def __init__(self) -> None:
        self.names = [*_names_of_bytes(), END_OF_TEXT]
        self.merges: list[Pair] = []
        self._ids = {name: number for number, name in enumerate(self.names)}

    def merge(self, pair: Pair) -> int:
        """The token that stands for a pair from now on: a new one, or one that other pairs have made already."""
        name = self.names[pair[0]] + self.names[pair[1]]
        if name not in self._ids:
            self._ids[name] = len(self.names)
            self.names.append(name)
        self.merges.append(pair)
        return self._ids[name]


def train_bpe(counts: Mapping[str, int], size: int) -> Vocabulary:
    """A vocabulary of `size` tokens: the bytes, the end of a document, and what is merged.

    Merged is what stands side by side most often; of equals, the pair with the least tokens. Fewer come out if no pair
    comes twice any more. counts: how often each word comes; their order doesn't matter.
    """
    words = [(list(word.encode()), count) for word, count in sorted(counts.items())]
    found: dict[Pair, int] = defaultdict(int)
    where: dict[Pair, set[int]] = defaultdict(set)
    for index, (word, count) in enumerate(words):
        for pair in pairwise(word):
            found[pair] += count
            where[pair].add(index)
    heap = [(-count, pair) for pair, count in found.items()]
    heapq.heapify(heap)
    vocabulary = Vocabulary()
    while heap and len(vocabulary.names) < size:
        count, pair = heapq.heappop(heap)
        if -count != found[pair]:  # changed since: it has an entry of its own
            continue
        if -count < 2:
            break
        changed = _merge(pair, vocabulary.merge(pair), words, found, where)
        for other in changed:
            if found[other] > 0:
                heapq.heappush(heap, (-found[other], other))
    return vocabulary


def _merge(
    pair: Pair, token: int, words: list[tuple[list[int], int]], found: dict[Pair, int], where: dict[Pair, set[int]]
) -> set[Pair]:
    """Put the token in place of the pair in all words; the pairs whose counts have changed."""
    changed: set[Pair] = set()
    for index in where.pop(pair):
        word, count = words[index]
        for old in pairwise(word):
            found[old] -= count
            changed.add(old)
        merged = _merged(word, pair, token)
        words[index] = (merged, count)
        for new in pairwise(merged):
            found[new] += count
            where[new].add(index)
            changed.add(new)
    found[pair] = 0
    return changed


def _merged(word: list[int], pair: Pair, token: int) -> list[int]:
    merged, position = [], 0
    while position < len(word):
        if word[position] == pair[0] and position + 1 < len(word) and word[position + 1] == pair[1]:
            merged.append(token)
            position += 2
        else:
            merged.append(word[position])
            position += 1
    return merged


def tokenizer_json(vocabulary: Vocabulary) -> str:
    """The vocabulary as a file of Hugging Face's tokenizers: byte-level BPE."""
    names = vocabulary.names
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": END, "content": END_OF_TEXT, **special}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {name: number for number, name in enumerate(names)},
            "merges": [[names[left], names[right]] for left, right in vocabulary.merges],
        },
    }
    return json.dumps(described, ensure_ascii=False, indent=1) + "\n"


def _names_of_bytes() -> list[str]:
    """The characters that stand for the 256 bytes in such files: those that can be seen stand for themselves."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    names, hidden = [], 0
    for byte in range(END):
        names.append(chr(byte if byte in visible else 0x100 + hidden))
        hidden += byte not in visible
    return names
