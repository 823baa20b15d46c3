"""Text to token ids, such that text from data never becomes a special token.

Template text may hold special tokens, contents may not. If a content holds the text of a special
token, both are tokenized apart.
"""

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import tokenizers
import transformers

Tokenizer = transformers.PreTrainedTokenizerFast


@functools.lru_cache(maxsize=4)
def _strip_added_tokens(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Returns the tokenizer without its added tokens, which maps no text to a special id."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings["added_tokens"] = []
    settings["post_processor"] = settings["truncation"] = settings["padding"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(settings))


@functools.lru_cache(maxsize=4)
def find_added_tokens(tokenizer: Tokenizer) -> tuple[dict[str, int], re.Pattern]:
    """Returns the ids of added tokens (special ones, <think>) and a pattern that finds them."""
    vocabulary = dict(tokenizer.get_added_vocab())
    longest_first = sorted(vocabulary, key=len, reverse=True)
    return vocabulary, re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def encode_text(tokenizer: Tokenizer, text: str) -> tokenizers.Encoding:
    """Encodes text as it stands, without special tokens.

    Raises:
      ValueError: the vocabulary itself maps a part of the text to a special id.
    """
    encoding = _strip_added_tokens(tokenizer).encode(text, add_special_tokens=False)
    special = set(encoding.ids) & set(find_added_tokens(tokenizer)[0].values())
    if special:
        raise ValueError(f"the text {text!r} gives the special token ids {sorted(special)}")
    return encoding


def encode_templated(tokenizer: Tokenizer, text: str, literal: dict[str, str]) -> tuple[int, ...]:
    """Encodes text with special tokens, as a chat template renders it.

    Args:
      tokenizer: the model's tokenizer.
      text: the text; its special tokens become special ids.
      literal: characters of the text that stand for a text which must not become special.
    """
    added, pattern = find_added_tokens(tokenizer)
    ids, at = [], 0
    for match in [*pattern.finditer(text), None]:
        piece = restore_tokens(text[at : match.start() if match else len(text)], literal)
        ids += encode_text(tokenizer, piece).ids if piece else []
        if match:
            ids.append(added[match.group()])
            at = match.end()
    return tuple(ids)


def restore_tokens(text: str, literal: dict[str, str]) -> str:
    """Replaces the characters of `literal` by the texts that they stand for."""
    return "".join(literal.get(char, char) for char in text) if literal else text


class Guard:
    """A map from special tokens' texts to private characters, so that no template sees them.

    Attributes:
      mark: a private character that marks the start of the last conversation.
      literal: the texts by the characters that stand for them.
    """

    def __init__(self, tokenizer: Tokenizer, contents: Sequence[str]):
        used = set().union(*contents)
        free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
        self.mark = next(free)
        self._pattern = find_added_tokens(tokenizer)[1]
        found = {token for text in contents for token in self._pattern.findall(text)}
        self._stand_in = {token: next(free) for token in sorted(found)}
        self.literal = {char: token for token, char in self._stand_in.items()}

    def __call__(self, text: str) -> str:
        """Replaces the texts of special tokens by their private characters."""
        return self._pattern.sub(lambda match: self._stand_in[match.group()], text)


def truncate_text(tokenizer: Tokenizer, text: str, limit: int) -> str:
    """Truncates a text to at most `limit` tokens."""
    offsets = encode_text(tokenizer, text).offsets
    return text if len(offsets) <= limit else text[: offsets[limit][0]].rstrip()


def decode_ids(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decodes ids with special tokens shown and nothing tidied: the inverse of `build_prompt`."""
    return tokenizer.decode([*ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
