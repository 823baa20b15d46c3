"""Encodes text to token ids, so that text from data never becomes a special token.

The text of a template may contain special tokens, but the contents of messages may not. If a
message contains the text of a special token, that text is encoded as ordinary text.
"""

import functools
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import tokenizers
import transformers

Tokenizer = transformers.PreTrainedTokenizerFast
# A text would need 137,000 different characters to use all of these.
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


@functools.lru_cache(maxsize=4)
def _strip_added_tokens(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Copies the tokenizer without added tokens; the copy finds no special tokens in a text."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings["added_tokens"] = []
    settings["post_processor"] = settings["truncation"] = settings["padding"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(settings))


@functools.lru_cache(maxsize=4)
def find_added_tokens(tokenizer: Tokenizer) -> tuple[dict[str, int], re.Pattern]:
    """Returns a map from the texts of added tokens to ids, and a pattern that finds these texts."""
    vocabulary = dict(tokenizer.get_added_vocab())
    longest_first = sorted(vocabulary, key=len, reverse=True)
    return vocabulary, re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def encode_text(tokenizer: Tokenizer, text: str) -> tokenizers.Encoding:
    """Encodes text as ordinary text, without special tokens.

    Raises:
      ValueError: the vocabulary itself maps a part of the text to a special id.
    """
    encoding = _strip_added_tokens(tokenizer).encode(text, add_special_tokens=False)
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
    """Replaces each character that is a key of `literal` with the text that it stands for."""
    return "".join(literal.get(char, char) for char in text) if literal else text


class Guard:
    """Hides special tokens from templates: private-use characters replace the tokens' texts.

    Attributes:
      mark: a private-use character that marks the start of the last conversation.
      literal: maps each private-use character to the text of the special token that it replaces.
    """

    def __init__(self, tokenizer: Tokenizer, contents: Sequence[str]):
        used = set().union(*contents)
        free = (chr(code) for code in itertools.chain(*_PRIVATE_USE) if chr(code) not in used)
        self.mark = next(free)
        self._pattern = find_added_tokens(tokenizer)[1]
        found = {token for text in contents for token in self._pattern.findall(text)}
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
    return tokenizer.decode([*ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
