"""The pages of `--help`. Oracles: the table of settings, and the parser of the command line."""

import re
import shlex

import conftest
import pytest

from copsd_jax import main
from copsd_jax.config import help_pages
from copsd_jax.config import settings as config_lib
from copsd_jax.training import table_rules

CARD = str(conftest.ROOT / "configs" / "copsd.py")
FLAG = re.compile(r"^  (--config\.\S+=.*?)(?:  +\(default .*)?$", flags=re.M)


def test_every_setting_is_in_one_section():
    found = [
        name for section in help_pages.SECTIONS for name in help_pages.select_settings(section)
    ]
    assert sorted(found) == sorted(config_lib.SETTINGS)
    assert help_pages.select_settings("all") == list(config_lib.SETTINGS)
    for name in ("train.lr", "--config.train.lr", "config.train.lr"):
        assert help_pages.select_settings(name) == ["train.lr"]
    assert help_pages.select_settings("train.") == help_pages.select_settings("train")
    for section in help_pages.SECTIONS:
        assert f"\n  {section} " in help_pages.format_overview()


def test_the_page_of_all_settings_has_defaults_and_real_choices():
    page = help_pages.format_settings(
        help_pages.select_settings("all"), table_rules.collect_choice_tables()
    )
    flags = FLAG.findall(page)
    assert [re.split("[.=]", flag, maxsplit=1)[1].split("=")[0] for flag in flags] == list(
        config_lib.SETTINGS
    )
    assert ".py" not in re.sub("languages.json|file.*py", "", page)  # no name of a source table
    assert "choices: '', tiny, " in page
    # Every flag can be copied to the command line: nothing changes, because it is the default.
    words = shlex.split(" ".join(flags))
    config = main.parse_command(["main", f"--config={write_default()}", *words]).config
    assert config_lib.flat(config) == config_lib.flat(config_lib.default())


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_default() -> str:
    text = "from copsd_jax import config\ndef get_config(preset=''):\n  return config.default()\n"
    with open("plain.py", "w") as file:
        file.write(text)
    return "plain.py"


@pytest.mark.parametrize("preset", ["", ":tiny", ":qwen3_4b"])
def test_the_values_of_a_card_give_its_settings_again(preset):
    page = help_pages.format_card(CARD + preset)
    assert page.startswith("COPSD: ")
    assert f"\npresets (--config={CARD}:PRESET):\n  smollm2 " in page
    words = shlex.split(" ".join(FLAG.findall(page)))
    config = main.parse_command(
        ["main", f"--config={write_default()}", "--dry_run=v5e:2x2", *words]
    )
    wanted = main.parse_command(["main", f"--config={CARD}{preset}", "--dry_run=v5e:2x2"])
    assert config_lib.flat(config.config) == config_lib.flat(wanted.config)
    assert len(words) > 8


def test_cards_without_presets_and_with_a_broken_preset():
    page = help_pages.format_card(write_default())
    assert page == "the card plain.py\n\n--config=plain.py has the defaults"
    with open("plain.py", "a") as file:
        file.write("PRESETS = {'a': 1, 'b': 2}\nget_config_ = get_config\n")
        file.write("def get_config(p=''):\n  return get_config_() if p != 'b' else {}['x']\n")
    page = help_pages.format_card("plain.py")
    assert "  b  --config='plain.py:b', line 7: KeyError: 'x'\n" in page


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], None),
        (["--config=c.py", "--workdir=w"], None),
        (["--help"], ("", "")),
        (["-h"], ("", "")),
        (["--help", "loss"], ("loss", "")),
        (["--help=loss"], ("loss", "")),
        (["--help", "--config=c.py"], ("", "c.py")),
        (["--config", "c.py:p", "--config.train.steps=2", "--help"], ("", "c.py:p")),
        (["--config=c.py", "--config.train.steps", "--help", "train"], ("train", "c.py")),
        (["--helpful"], None),
        (["--workdir=help", "help"], None),
    ],
)
def test_requests(words, wanted):
    assert help_pages.find_request(["main", *words]) == wanted


def test_pages_fit_the_terminal(monkeypatch):
    for columns, widest in ((50, 50), (200, 100)):
        monkeypatch.setenv("COLUMNS", str(columns))
        page = help_pages.format_settings(help_pages.select_settings("policy"), None)
        lines = [line for line in page.split("\n") if line.startswith("      ")]
        assert widest - 15 < max(map(len, lines)) <= widest
