"""Tokenizers of each kind that treats a text's beginning, its bytes or its end in a way of its own; none is trained."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, CALL = "<s>", "</s>", "[CALL]"
SPECIAL = [BOS, EOS, CALL]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["the", "cat", "run", "s", "a", "Who", "is", "it", "?", ".", ":", "USER", "rain"]


def _finished(tokenizer: Tokenizer, *, adds_end: bool = False) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    ids = [(text, tokenizer.token_to_id(text)) for text in (BOS, EOS)]
    single = f"{BOS} $A {EOS}" if adds_end else f"{BOS} $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def _sentencepiece() -> models.BPE:
    """Pieces with ▁ for a space, and bytes for what no piece has; merges build every word from its letters."""
    words = [*WORDS, *("▁" + word for word in WORDS), "▁▁", "▁▁▁"]
    letters = sorted({letter for word in words for letter in word})
    pieces, merges = ["<unk>", *BYTES, *letters], []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def llama_2(*, adds_end: bool = False) -> PreTrainedTokenizerFast:
    """Llama 2's: a space is put before a text and taken from its decoded beginning; bytes are decoded in runs."""
    tokenizer = Tokenizer(_sentencepiece())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return _finished(tokenizer, adds_end=adds_end)


def metaspace(*, adds_end: bool = False) -> PreTrainedTokenizerFast:
    """As later sentencepiece models are converted: all spaces of the first token are dropped."""
    tokenizer = Tokenizer(_sentencepiece())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return _finished(tokenizer, adds_end=adds_end)


def word_piece(*, adds_end: bool = False) -> PreTrainedTokenizerFast:
    """BERT's: a space before every piece but the first and those that begin with ##; letters are made small."""
    pieces = ["[UNK]", *WORDS, *("##" + word for word in WORDS)]
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return _finished(tokenizer, adds_end=adds_end)


def byte_level(*, adds_end: bool = False, adds_space: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's: a token a byte, and some pairs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "r"), ("Ã", "©"), ("t", "h"), ("Ċ", "Ċ")]
    pieces = [*alphabet, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds_space)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, adds_end=adds_end)


def byte_level_with_space(*, adds_end: bool = False) -> PreTrainedTokenizerFast:
    """RoBERTa's: as GPT-2's, with a space put before a text."""
    return byte_level(adds_end=adds_end, adds_space=True)


def suffixes(*, adds_end: bool = False) -> PreTrainedTokenizerFast:
    """The first BPE's: a word's last piece ends with a mark, which is a space unless nothing follows."""
    pieces = ["<unk>", *WORDS, *(word + "</w>" for word in WORDS)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    return _finished(tokenizer, adds_end=adds_end)


KINDS = [llama_2, metaspace, word_piece, byte_level, byte_level_with_space, suffixes]
