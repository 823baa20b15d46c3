"""Encodes text to token ids, so that text from data never becomes a special token.

The text of a template may contain special tokens, but the contents of messages may not. If a
message contains the text of a special token, that text is encoded as ordinary text.
"""

import contextlib
import functools
import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import tokenizers
import transformers

from copsd_jax.runtime import rust_errors

Tokenizer = transformers.PreTrainedTokenizerFast


def _explain_errors(tokenizer: Tokenizer) -> contextlib.AbstractContextManager[None]:
    """Reports each error that `tokenizers` raises in the `with` block in one sentence."""
    return rust_errors.explain_rust_errors(
        f"the tokenizer in {tokenizer.name_or_path or 'this run'} fails at a text",
        "set model.tokenizer to another folder",
    )


@functools.lru_cache(maxsize=8)
def _copy_backend(tokenizer: Tokenizer, *, added: bool) -> tokenizers.Tokenizer:
    """Copies the tokenizer; if `added` is False, the copy finds no special tokens in a text."""
    with _explain_errors(tokenizer):
        settings = json.loads(tokenizer.backend_tokenizer.to_str())
        if not added:
            settings["added_tokens"] = []
        settings["post_processor"] = settings["truncation"] = settings["padding"] = None
        return tokenizers.Tokenizer.from_str(json.dumps(settings))


def _encode(tokenizer: Tokenizer, text: str, *, added: bool) -> tokenizers.Encoding:
    """Encodes a text with the copy of the tokenizer that `_copy_backend` makes."""
    backend = _copy_backend(tokenizer, added=added)
    with _explain_errors(tokenizer):
        return backend.encode(text, add_special_tokens=False)


@functools.lru_cache(maxsize=4)
def find_added_tokens(tokenizer: Tokenizer) -> tuple[dict[str, int], re.Pattern]:
    """Returns a map from the texts of added tokens to ids, and a pattern that finds these texts."""
    vocabulary = dict(tokenizer.get_added_vocab())
    longest_first = sorted(vocabulary, key=len, reverse=True)
    return vocabulary, re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def find_token_spans(tokenizer: Tokenizer, text: str) -> list[tuple[int, int, int]]:
    """Finds the added tokens in a text, in the same way as the tokenizer.

    Args:
      tokenizer: the model's tokenizer.
      text: a text, for example a rendered chat template.

    Returns:
      Start, end and id of each added token. If the token's options `lstrip` and `rstrip` remove the
      white space around the token, this white space is part of the range.
    """
    encoding = _encode(tokenizer, text, added=True)
    added = set(find_added_tokens(tokenizer)[0].values())
    pairs = zip(encoding.offsets, encoding.ids, strict=True)
    return [(start, end, token) for (start, end), token in pairs if token in added]


def encode_text(tokenizer: Tokenizer, text: str) -> tokenizers.Encoding:
    """Encodes text as ordinary text, without special tokens.

    Raises:
      ValueError: the vocabulary itself maps a part of the text to a special id.
    """
    encoding = _encode(tokenizer, text, added=False)
    special = set(encoding.ids) & set(find_added_tokens(tokenizer)[0].values())
    if special:
        raise ValueError(f"the text {text!r} gives the special token ids {sorted(special)}")
    return encoding


def encode_templated(tokenizer: Tokenizer, text: str, literal: dict[str, str]) -> tuple[int, ...]:
    """Encodes a text that contains special tokens, for example a rendered chat template.

    Args:
      tokenizer: the model's tokenizer.
      text: the text; special tokens in it become special ids.
      literal: maps a character in `text` to the text that replaces it; the replacement is encoded
        as ordinary text.
    """
    if literal.keys().isdisjoint(text):
        return tuple(_encode(tokenizer, text, added=True).ids)
    ids, at = [], 0
    for start, end, token in [*find_token_spans(tokenizer, text), (len(text), len(text), None)]:
        if piece := restore_tokens(text[at:start], literal):
            ids += encode_text(tokenizer, piece).ids
        ids += [] if token is None else [token]
        at = end
    return tuple(ids)


def restore_tokens(text: str, literal: dict[str, str]) -> str:
    """Replaces each character that is a key of `literal` with the text that it stands for."""
    return "".join(literal.get(char, char) for char in text) if literal else text


@functools.lru_cache(maxsize=4)
def _reserved_characters(tokenizer: Tokenizer) -> frozenset[str]:
    """Returns the characters of the chat template and of the added tokens."""
    return frozenset(f"{tokenizer.chat_template}{''.join(find_added_tokens(tokenizer)[0])}")


@functools.lru_cache(maxsize=4)
def _normalizes_encoded_tokens(tokenizer: Tokenizer) -> bool:
    """Returns whether the tokenizer normalizes a text before it looks for added tokens."""
    found = tokenizer.added_tokens_decoder.values()
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and any(token.normalized for token in found)


def _list_private_characters(used: Collection[str]) -> Iterator[str]:
    """Yields the private-use characters that are not in `used`."""
    for first, last in ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD)):
        yield from (chr(code) for code in range(first, last + 1) if chr(code) not in used)
    raise ValueError(
        "a prompt contains all of Unicode's private-use characters, but unused ones are needed to "
        "mark special tokens: remove private-use characters from the data"
    )


class Guard:
    """Hides special tokens from chat templates by putting private-use characters in their place.

    Attributes:
      mark: a private-use character that marks the start of the last conversation.
      literal: maps each private-use character to the text of the special token that it replaces.
    """

    def __init__(self, tokenizer: Tokenizer, contents: Sequence[str]):
        free = _list_private_characters(_reserved_characters(tokenizer).union(*contents))
        self.mark = next(free)
        pattern = find_added_tokens(tokenizer)[1]
        found = {token for text in contents for token in pattern.findall(text)}
        if _normalizes_encoded_tokens(tokenizer):
            for text in contents:
                found |= {text[start:end] for start, end, _ in find_token_spans(tokenizer, text)}
        longest_first = sorted(found, key=lambda token: (-len(token), token))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._stand_in = {token: next(free) for token in sorted(found)}
        self.literal = {char: token for token, char in self._stand_in.items()}

    def __call__(self, text: str) -> str:
        """Returns a text in which private-use characters replace the texts of special tokens."""
        return self._pattern.sub(lambda match: self._stand_in[match.group()], text)


def truncate_text(tokenizer: Tokenizer, text: str, limit: int) -> str:
    """Truncates a text to at most `limit` tokens."""
    offsets = encode_text(tokenizer, text).offsets
    return text if len(offsets) <= limit else text[: offsets[limit][0]].rstrip()


def decode_ids(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decodes ids to text, keeping special tokens and all white space."""
    with _explain_errors(tokenizer):
        return tokenizer.decode(
            [*ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
