"""The names of records' fields: the user's map of names, and advice about names.

A map such as "problem=question,answer=final" copies fields to the names of this project. On the
right side, `reward_model.ground_truth` is a field inside an object, and `question+choices` joins
two fields with a blank line between them. If a field of problems or solutions contains a
conversation, its user turn is the problem, and its last turn of the assistant is the solution.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from copsd_jax.problems import field_values, record_files
from copsd_jax.problems.record_files import Record, Unusable

FIELDS = ("id", "problem", "solution", "answer", "Answer", "group", "wording")  # and problem_*
MESSAGES = "messages"  # the field with the conversation in chat data sets
# Names that other data sets use for the same content, best first.
_OTHER_NAMES = {
    "problem": ("question", "query", "prompt", "input", "instruction", "messages", "text"),
    "solution": ("rationale", "response", "output", "completion", "explanation", "messages"),
    "answer": ("final_answer", "expected_answer", "gold", "ground_truth", "target", "final",
               "answerkey", "label"),
}  # fmt: skip
_ROLES = {"human": "user", "gpt": "assistant"}  # of the conversations that have `from` and `value`


def rename_fields(
    path: str, records: list[Record], fields: str, setting: str = "data.fields"
) -> list[Record]:
    """Copies fields to new names.

    A record without a problem, but with a field `messages`, gets its problem and its solution from
    this conversation.

    Args:
      path: the source, for error messages.
      records: the records.
      fields: a map from field names of this project to field names of the source, such as
        "problem=question,answer=final".
      setting: the name of the setting that gives `fields`, for error messages.

    Raises:
      ValueError: the map is malformed, or names an unknown field.
    """
    pairs = _parse_field_map(fields, setting)
    for ours, theirs in pairs:
        if ours not in FIELDS and not ours.startswith("problem_"):
            choices = ", ".join((*FIELDS, "problem_<code>", "problem_<code>_ok"))
            raise ValueError(f"{setting} is {fields!r}: {ours!r} is none of {choices}")
        if sum(ours == name for name, _ in pairs) > 1:
            raise ValueError(f"{setting} is {fields!r}: {ours!r} occurs twice")
        for name in _split_joined(records, theirs):
            if records and not any(_find_value(x.fields, name) is not None for x in records):
                have = record_files.list_record_fields(records[0].fields)
                near = difflib.get_close_matches(name, map(str, records[0].fields), 1)
                said = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"{setting} is {fields!r}: {path} has no {name!r}; it has {have}{said}"
                )
    parts = {ours: _split_joined(records, theirs) for ours, theirs in pairs}
    out = []
    for where, found in records:
        copied = {ours: _join_values(found, names) for ours, names in parts.items()}
        added = {ours: value for ours, value in copied.items() if value is not None}
        if MESSAGES in found and not any(name.startswith("problem") for name in (*found, *added)):
            added |= {"problem": found[MESSAGES]}
            added |= {} if "solution" in (*found, *added) else {"solution": found[MESSAGES]}
        for name, value in added.items():
            if is_conversation(value) and name.startswith(("problem", "solution")):
                added[name] = _read_conversation(value, name)
        out.append(Record(where, found | added))
    return out


def _parse_field_map(fields: str, setting: str) -> list[tuple[str, str]]:
    pairs = [tuple(pair.split("=")) for pair in fields.split(",") if pair]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise ValueError(f"{setting} is {fields!r}: write pairs such as problem=question")
    return [(pair[0], pair[1]) for pair in pairs]


def _split_joined(records: Sequence[Record], theirs: str) -> list[str]:
    """Splits the right side of a pair at "+", unless a field has exactly this name."""
    if any(theirs in record.fields for record in records):
        return [theirs]
    return theirs.split("+")


def _find_value(fields: Mapping[str, Any], name: str) -> Any:
    """Returns the value of a field, or of a field inside an object; None if there is none."""
    if name in fields:
        return fields[name]
    value: Any = fields
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value


def _join_values(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Returns the value of one field, or the text of several fields; None if one of them is blank.

    If a field cannot be shown as text, its value is returned, and is refused when it is read.
    """
    values = [_find_value(fields, name) for name in names]
    if len(values) == 1:
        return values[0]
    texts = []
    for name, value in zip(names, values, strict=True):
        if field_values.is_blank(value):
            return None
        if isinstance(value, list | dict):
            value = _show_options(value)
        try:
            texts.append(field_values.convert_problem_field(name, value))
        except field_values.UnusableValue as reason:
            return Unusable(str(reason))
    return "\n\n".join(texts)


def _show_options(value: Any) -> Any:
    """Writes a list of options as lines "A) text"; returns any other value unchanged.

    The options are a list of texts, an object with the lists `text` and `label`, or an object that
    maps letters to texts.
    """
    texts, labels = value, None
    if isinstance(value, dict):
        texts, labels = value.get("text"), value.get("label")
        if all(isinstance(key, str) and len(key) == 1 for key in value):
            texts, labels = list(value.values()), list(value)
    if not isinstance(texts, list) or not texts or not all(isinstance(x, str) for x in texts):
        return value
    labels = labels or [chr(ord("A") + k) for k in range(len(texts))]
    if not isinstance(labels, list) or len(labels) != len(texts) or len(texts) > 26:
        return value
    return "\n".join(f"{label}) {text}" for label, text in zip(labels, texts, strict=True))


# -------------------------------------------------------------------------------- conversations


def is_conversation(value: object) -> bool:
    """Returns whether a value is a list of messages with role and content, or from and value."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(x, dict) and ({"role", "content"} <= {*x} or {"from", "value"} <= {*x})
                for x in value)
    )  # fmt: skip


def _read_conversation(turns: Sequence[Mapping[str, Any]], name: str) -> Any:
    """Returns the part of a conversation that the field `name` needs, or an `Unusable` value.

    The user's turn is the problem; a system message stands before it, because prompts have no
    system message. The assistant's turn is the solution; None if there is none.
    """
    said = [(str(x.get("role", x.get("from"))), x.get("content", x.get("value"))) for x in turns]
    roles = [_ROLES.get(role, role) for role, _ in said]
    asked = roles.count("user")
    if asked != 1:
        return Unusable(f"the conversation of {name} has {asked} user turns instead of one")
    if roles not in (["user"], ["user", "assistant"], ["system", "user"],
                     ["system", "user", "assistant"]):  # fmt: skip
        return Unusable(f"the conversation of {name} is not: system, user, assistant")
    texts = [_join_parts(text) for _, text in said]
    if not all(isinstance(text, str) for text in texts):
        return Unusable(f"the conversation of {name} has a message that is not text")
    end = roles.index("user") + 1
    if name == "solution":
        return texts[end] if end < len(texts) else None
    return "\n\n".join(text for text in texts[:end] if text.strip())


def _join_parts(content: Any) -> Any:
    """Joins a message that consists of parts such as {"type": "text", "text": "..."}."""
    if isinstance(content, list) and all(
        isinstance(x, dict) and x.get("type") == "text" and isinstance(x.get("text"), str)
        for x in content
    ):
        return "".join(x["text"] for x in content)
    return content


# --------------------------------------------------------------------------------------- advice


def suggest_field(missing: str, names: Iterable[str]) -> str:
    """Returns the field of a record that probably contains a missing field; "" if none does.

    Args:
      missing: the name of the missing field, such as "problem_sw".
      names: the names of the record's fields.
    """
    base, _, code = missing.lower().partition("_")
    free = {
        name.lower(): name
        for name in names
        if name not in FIELDS and not name.startswith("problem")
    }
    others = _OTHER_NAMES.get(base, ())
    if code:  # a translation must have a name that says so
        wanted = [*(f"{name}_{code}" for name in others), f"{code}_{base}", "m_query"]
    else:
        wanted = [*others, *difflib.get_close_matches(base, free, 1, cutoff=0.7)]
    return next((free[name] for name in wanted if name in free), "")


def list_unread_fields(
    records: Iterable[Record], fields: str, options: Sequence[str] = ()
) -> tuple[str, ...]:
    """Lists the fields that nothing reads, in the order of their first occurrence.

    Translations count as read, because a file may have more languages than a run.

    Args:
      records: the records of a source, before fields are renamed.
      fields: the map of field names.
      options: further names that are read.
    """
    read = {*FIELDS, *options}
    for _, theirs in _parse_field_map(fields, "data.fields"):
        for part in (theirs, *theirs.split("+")):
            read |= {part, part.partition(".")[0]}
    every = dict.fromkeys(name for record in records for name in record.fields)
    conversation = MESSAGES in every and not any(name.startswith("problem") for name in every)
    return tuple(
        name for name in every
        if name not in read and not str(name).startswith("problem_")
        and not (conversation and name == MESSAGES)
    )  # fmt: skip
