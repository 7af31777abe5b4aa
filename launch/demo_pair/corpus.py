"""The training text of the demo pair: books and Python source as token streams, with long-range repetition mixed in.

Text refers far back only now and then, so plain windows teach a small model little about long context. Samples
therefore (1) are pieces of a much longer window, each at its true position, with the text between left out, which
trains long distances at the price of short sequences (positional skip-wise training, arXiv 2309.10400), and (2) contain
spans that occurred far earlier and key-value facts that are asked for again later.
"""

from __future__ import annotations

import shutil
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from conf.schema import ConfigError
from launch.demo_pair.training_config import TrainDemoConfig
from launch.prompts.needle import NeedleForm, named_fact

BOS, EOS = "<s>", "</s>"
HELD_OUT_STDLIB_INITIALS = "_ab"
"""Unseen by training, so that the default prompt (the standard library in sorted order) is unseen too."""
TOKENIZER_BOOK_CHARS, TOKENIZER_PYTHON_FILES = 300_000, 1200
"""Text that the tokenizer is trained on: so much of each book, so many source files."""
PLANTED_FORMS = (NeedleForm.assignment, NeedleForm.sentence)

Ints: TypeAlias = NDArray[np.int64]


def python_files(held_out_packages: list[str], max_package_bytes: int) -> list[Path]:
    """The .py files of the standard library and of the installed packages, less those held out for measuring."""
    paths = sysconfig.get_paths()
    stdlib, packages = Path(paths["stdlib"]), Path(paths["purelib"])
    chosen = [
        path
        for path in sorted(stdlib.rglob("*.py"))
        if "site-packages" not in path.parts and path.relative_to(stdlib).parts[0][0] not in HELD_OUT_STDLIB_INITIALS
    ]
    for package in sorted(path for path in packages.iterdir() if path.is_dir()):
        budget = 0 if package.name in held_out_packages else max_package_bytes
        for path in sorted(package.rglob("*.py"), key=lambda path: hash_of(path.name)):
            budget -= path.stat().st_size
            if budget < 0:
                break
            chosen.append(path)
    return chosen


def hash_of(name: str) -> int:
    """A stable hash: which files of a big package are taken must not depend on PYTHONHASHSEED."""
    return zlib.crc32(name.encode())


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with BOS prepended, digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the tokenizer must have."""
    found = tokenizer.token_to_id(token)
    assert found is not None, f"the tokenizer has no {token}"
    return found


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> NDArray[np.uint16]:
    """All texts as one array of token ids, each followed by EOS."""
    eos = token_id(tokenizer, EOS)
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([*encoding.ids, eos], dtype=np.uint16) for encoding in encoded])


def prepare_streams(config: TrainDemoConfig, work: Path) -> tuple[Tokenizer, list[NDArray[np.uint16]]]:
    """The tokenizer and one token stream each for books and Python source, made once and kept in `work`.

    Raises ConfigError where there are no books.
    """
    kept = [work / "tokenizer.json", work / "books.npy", work / "python.npy"]
    if config.refine_pair is not None and not kept[0].exists():
        shutil.copy(Path(config.refine_pair) / "target" / "tokenizer.json", kept[0])
    if not all(path.exists() for path in kept):
        books = [path.read_text(encoding="utf-8") for path in sorted(Path(config.books or "").glob("*.txt"))]
        if not books:
            raise ConfigError(f"books is {config.books!r}; it must be a folder with .txt files")
        files = python_files(config.held_out_packages, config.max_package_mib << 20)
        python = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
        rng = np.random.default_rng(config.seed)
        if not kept[0].exists():
            starts = [int(rng.integers(len(book) // 2)) for book in books]
            some_books = [book[start : start + TOKENIZER_BOOK_CHARS] for start, book in zip(starts, books, strict=True)]
            some_python = [python[index] for index in rng.permutation(len(python))[:TOKENIZER_PYTHON_FILES]]
            train_tokenizer(some_books + some_python, config.tokenizer_vocab).save(str(kept[0]))
        tokenizer = Tokenizer.from_file(str(kept[0]))
        for path, texts in zip(kept[1:], (books, python), strict=True):
            np.save(path, token_stream(tokenizer, texts))
    return Tokenizer.from_file(str(kept[0])), [np.load(path) for path in kept[1:]]


@dataclass(kw_only=True)
class SampleMaker:
    """Draws training samples: (token ids, position ids), both of shape [context]."""

    streams: list[NDArray[np.uint16]]
    tokenizer: Tokenizer
    rng: np.random.Generator

    def sample(self, context: int, span: int) -> tuple[Ints, Ints]:
        """`context` tokens out of `span` consecutive ones of some stream, with their positions in them."""
        stream = self.streams[self.rng.integers(len(self.streams))]
        start = self.rng.integers(len(stream) - span)
        positions = self._positions(context, span)
        tokens = stream[start + positions].astype(np.int64)
        if self.rng.random() < 0.5:
            self._copy_spans(tokens)
        if self.rng.random() < 0.3:
            self._plant_facts(tokens)
        tokens[0] = token_id(self.tokenizer, BOS)
        return tokens, positions

    def _positions(self, context: int, span: int) -> Ints:
        """`context` of `span` positions, in up to eight contiguous pieces, the first at 0."""
        if context == span:
            return np.arange(context)
        num_pieces = self.rng.integers(2, 9)
        cuts = np.sort(self.rng.choice(np.arange(64, context - 64), num_pieces - 1, replace=False))
        gaps = self.rng.multinomial(self.rng.integers(span - context + 1), np.ones(num_pieces - 1) / (num_pieces - 1))
        skipped = np.zeros(context, dtype=np.int64)
        skipped[cuts] = gaps
        return np.arange(context) + np.cumsum(skipped)

    def _copy_spans(self, tokens: Ints) -> None:
        """Overwrites later spans with copies of earlier ones, at any distance."""
        context = len(tokens)
        for _ in range(self.rng.integers(1, 2 + context // 512)):
            length = int(self.rng.integers(24, min(257, context // 4)))
            target = int(self.rng.integers(length, context - length))
            source = int(self.rng.integers(0, target - length + 1))
            tokens[target : target + length] = tokens[source : source + length]

    def _plant_facts(self, tokens: Ints) -> None:
        """Writes `name = value` facts early and repeats them later, in shuffled order."""
        letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
        facts = []
        for _ in range(self.rng.integers(2, 9)):
            name = "".join(self.rng.choice(letters, self.rng.integers(3, 8)))
            form = PLANTED_FORMS[self.rng.integers(len(PLANTED_FORMS))]
            facts.append(named_fact(form, name, str(self.rng.integers(10_000, 1_000_000))).text)
        for half in (0, 1):
            for fact in self.rng.permutation(facts):
                ids = self.tokenizer.encode(str(fact), add_special_tokens=False).ids
                low, high = (
                    (1, len(tokens) // 2 - len(ids)) if half == 0 else (len(tokens) // 2, len(tokens) - len(ids))
                )
                at = int(self.rng.integers(low, high))
                tokens[at : at + len(ids)] = ids
