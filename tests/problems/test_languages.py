"""The registry of languages: complete, normalised, strict about a user's file."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import unicodedata
import zipfile

import hypothesis
import pytest
from hypothesis import strategies as st

from copsd_jax.problems import languages

POLYMATH = (
    *("EN", "DE", "ES", "FR", "JA", "ZH", "RU", "SW", "BN", "TE", "TH"),
    *("AR", "ID", "IT", "KO", "MS", "PT", "VI"),
)
AFRIMGSM = (
    *("EWE", "HAU", "IBO", "TWI", "VAI", "WOL", "YOR", "AMH", "KIN"),
    *("LUG", "SWA", "ORM", "SNA", "XHO", "ZUL", "SOT", "LIN"),
)
ROOT = pathlib.Path(__file__).resolve().parents[2]

# A word of Unicode names that each script's letters have.
SCRIPTS = {
    **{"Latin": "LATIN", "Cyrillic": "CYRILLIC", "Bengali": "BENGALI", "Telugu": "TELUGU"},
    **{"Thai": "THAI", "Ethiopic": "ETHIOPIC", "Simplified Han": "CJK", "Arabic": "ARABIC"},
    "Hangul": "HANGUL",
}


@pytest.fixture(scope="module")
def registry() -> dict[str, languages.Language]:
    return languages.load_languages()


def entry(**changes) -> dict:
    """A complete entry for a user's file, read from the shipped JSON and changed."""
    shipped = json.loads((ROOT / "copsd_jax/problems/languages.json").read_text(encoding="utf-8"))
    return shipped["de"] | {"aliases": []} | changes


def load_file(tmp_path, content) -> dict[str, languages.Language]:
    path = tmp_path / "mine.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return languages.load_languages(str(path))


def test_bug_26_every_code_of_the_paper_is_known(registry):
    assert (len(POLYMATH), len(AFRIMGSM)) == (18, 17)
    for code in POLYMATH + AFRIMGSM:
        language = registry[languages.resolve_code(code, registry)]
        assert code.lower() in (language.code, *language.aliases)
        assert registry[languages.resolve_code(code.lower(), registry)] is language
    # Bug 26 of the reference: Swahili stood there twice, with texts of its own each.
    assert len({languages.resolve_code(code, registry) for code in POLYMATH + AFRIMGSM}) == 34
    assert len(registry) == 34
    assert languages.resolve_code("SWA", registry) == languages.resolve_code("sw", registry) == "sw"


def test_texts_differ_between_languages(registry):
    """No entry is a copy of another's; Vai is English, and says so."""
    for name in ("instruction", "think_prefix", "reason_first", "transition"):
        texts = [getattr(x, name) for code, x in registry.items() if code != "vai"]
        assert len(set(texts)) == len(texts), name
    vai = registry["vai"]
    assert vai.instruction == registry["en"].instruction
    assert "The wording is English" in vai.note
    assert not any(x.note for code, x in registry.items() if code != "vai")


def test_letters_are_of_the_named_script(registry):
    for code, language in registry.items():
        if language.script not in SCRIPTS:
            assert language.script in ("Japanese", "Vai"), code
            continue
        text = language.instruction.replace(languages.BOX, "") + language.transition
        letters = [
            unicodedata.name(c) for c in text if c.isalpha() and unicodedata.combining(c) == 0
        ]
        assert letters, code
        assert all(SCRIPTS[language.script] in name for name in letters), code


def test_shipped_entries_are_sound(registry):
    """Read apart from the loader, so that a loader that checks nothing is noticed."""
    shipped = json.loads((ROOT / "copsd_jax/problems/languages.json").read_text(encoding="utf-8"))
    assert list(shipped) == list(registry)
    for code, fields in shipped.items():
        assert {"code": code, **fields, "aliases": tuple(fields["aliases"])} == dataclasses.asdict(
            registry[code]
        )
        texts = {k: v for k, v in fields.items() if isinstance(v, str) and k != "note"}
        assert len(texts) == 13
        for name, text in texts.items():
            assert text, (code, name)
            assert unicodedata.normalize("NFC", text) == text, (code, name)
        assert r"\boxed{}" in fields["instruction"]
        assert "boxed" not in fields["instruction_answer_is"]
        assert '"The answer is N."' in fields["instruction_answer_is"]
        assert not any(texts[k].endswith(":") for k in texts if k.startswith("label_"))
    assert [code for code, x in registry.items() if x.checked_by_speaker] == ["en"]


def test_bug_20_unknown_language_lists_the_known_ones(registry):
    """Bug 20 of the reference: an unknown language became English with a print."""
    for code in ("xx", "", "english", "sw,fr", "problem"):
        with pytest.raises(
            ValueError,
            match=r"unknown language .*en \(eng\).*sw \(swa\).*lin.*named by languages_file",
        ):
            languages.resolve_code(code, registry)


def test_a_file_adds_and_replaces(tmp_path, registry):
    mine = {"nya": entry(name="Chichewa", aliases=["ny"]), "fr": entry(name="autre")}
    loaded = load_file(tmp_path, mine)
    assert len(loaded) == 35
    assert languages.resolve_code("NY", loaded) == "nya"
    assert loaded["nya"].name == "Chichewa"
    assert loaded["fr"].name == "autre"
    assert loaded["sw"] == registry["sw"]
    assert "fra" not in loaded["fr"].aliases  # replaced as a whole, never mixed
    assert languages.load_languages()["fr"] == registry["fr"]  # and nothing sticks


WRONG = {
    "empty object": ({}, "must be a JSON object"),
    "list": ([entry()], "must be a JSON object"),
    "number": (7, "must be a JSON object"),
    "entry is text": ({"nya": "x"}, "language 'nya': must be an object"),
    "upper case code": ({"NYA": entry()}, "language 'NYA': a code must look"),
    "path as a code": ({"../x": entry()}, "a code must look"),
    "empty code": ({"": entry()}, "a code must look"),
    "unknown field": ({"nya": entry(extra="x")}, "unknown field 'extra'; fields are name"),
    "code as a field": ({"nya": entry(code="x")}, "unknown field 'code'"),
    "number for text": ({"nya": entry(transition=3)}, "field 'transition': must be text, not 3"),
    "null": ({"nya": entry(name=None)}, "field 'name': must be text, not null"),
    "empty": ({"nya": entry(think_prefix="")}, "field 'think_prefix': is empty"),
    "blank": ({"nya": entry(think_prefix=" \n")}, "field 'think_prefix': is empty"),
    "blank note": ({"nya": entry(note=" ")}, "field 'note': is empty"),
    "spaces": ({"nya": entry(label_problem="Vuto ")}, "'label_problem': begins or ends with"),
    "no box": (
        {"nya": entry(instruction="Ganizani.")},
        r"'instruction': must contain \\boxed\{\} once",
    ),
    "two boxes": (
        {"nya": entry(instruction=r"a \boxed{} b \boxed{}")},
        r"must contain \\boxed\{\} once",
    ),
    "filled box": ({"nya": entry(instruction=r"\boxed{3}")}, r"must contain \\boxed\{\} once"),
    "no answer": ({"nya": entry(instruction_answer_is="x")}, "must contain 'The answer is'"),
    "not NFC": ({"nya": entry(name="e\u0301")}, "field 'name': is not in Unicode form NFC"),
    "control": ({"nya": entry(name="a\x00b")}, r"contains the character U\+0000"),
    "surrogate": ({"nya": entry(name="a\ud800")}, r"contains the character U\+D800"),
    "special token": ({"nya": entry(transition="a<|im_end|>b")}, r"contains '<\|', which belongs"),
    "end of thinking": ({"nya": entry(think_prefix="a</think>b")}, "contains '</think>'"),
    "text for a flag": ({"nya": entry(checked_by_speaker="no")}, "must be true or false"),
    "number for a flag": ({"nya": entry(checked_by_speaker=1)}, "must be true or false"),
    "aliases is text": ({"nya": entry(aliases="ny")}, "field 'aliases': must be a list"),
    "alias is a number": ({"nya": entry(aliases=[1])}, "field 'aliases': must be a list"),
    "alias in upper case": ({"nya": entry(aliases=["NY"])}, "field 'aliases': must be a list"),
    "alias of another": ({"nya": entry(aliases=["swa"])}, "'swa' is an alias of 'nya'"),
    "alias is a code": ({"nya": entry(aliases=["fr"])}, "'fr' is an alias of 'nya'"),
    "alias of itself": ({"nya": entry(aliases=["nya"])}, "'nya' is an alias of 'nya'"),
    "code is an alias": ({"swa": entry()}, "'swa' is an alias of 'sw' and also means 'swa'"),
    "same markers": (
        {"nya": entry(begin_reference="---", end_reference="---")},
        "'end_reference': equals",
    ),
    "not JSON": (b'{"nya":\n {,}}', "not JSON at line 2"),
    "nothing": (b"", "not JSON at line 1"),
    "not UTF-8": (b'{"nya": "\xff"}', "not UTF-8 at byte 9"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "huge number": (b'{"nya": ' + b"9" * 5000 + b"}", "integer string conversion"),
    "twice": (b'{"nya": 1, "nya": 2}', "the key 'nya' occurs twice"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, case):
    content, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as error:
        load_file(tmp_path, content)
    assert "mine.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", languages.FIELDS)
def test_every_field_is_required(tmp_path, field):
    fields = entry()
    del fields[field]
    with pytest.raises(ValueError, match=f"'nya': lacks the field {field}$"):
        load_file(tmp_path, {"nya": fields})


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            languages.load_languages(str(path))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(field=st.sampled_from(languages.FIELDS), value=JSON_VALUES)
def test_any_value_loads_as_it_is_or_is_refused(tmp_path_factory, field, value):
    folder = tmp_path_factory.mktemp("hostile")
    message = ""
    try:
        loaded = load_file(folder, {"nya": entry(**{field: value})})
    except ValueError as error:
        loaded, message = {}, str(error)
    if not loaded:
        assert "mine.json" in message
        return
    kept = getattr(loaded["nya"], field)
    assert (list(kept) if isinstance(kept, tuple) else kept) == value


@pytest.mark.slow
def test_a_wheel_brings_the_data(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    source = tmp_path / "source"
    shutil.copytree(ROOT / "copsd_jax", source / "copsd_jax")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = (
        "from copsd_jax.problems import bundled, languages\n"
        "files = map(bundled.find_file, bundled.NAMES)\n"
        "sizes = [len(file.read_text('utf-8').splitlines()) for file in files]\n"
        "print(languages.__file__, len(languages.load_languages()), *sizes)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=site,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    where, *counts = result.stdout.split()
    assert pathlib.Path(where).is_relative_to(site)
    assert counts == ["34", "480", "300", "8"]
