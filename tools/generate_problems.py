"""Writes the bundled word problems: `python tools/generate_problems.py --out DIR`.

The problems have one or two steps. Each problem is in English, Swahili, French and Spanish. The
wordings are in `problem_templates.jsonl`. The tables below have the inflected forms of nouns, so
templates need no inflection. The same seed gives the same bytes with every version of Python,
because choices come from SHA-256 and not from `random`.

A solution has only equations, without sentences. A teacher of 135M parameters repeats equations far
more reliably than "Amina has 3 and buys 4 more, so 3 + 4 = 7". Rollouts in this style are also
shorter.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence

SEED = 1
TRAIN, HELD_OUT_SEEN, HELD_OUT_UNSEEN = 480, 200, 100
LANGS = ("en", "sw", "fr", "es")
ONE_STEP = ("add", "subtract", "multiply", "divide")
SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
# The first four show every operation. A prompt with fewer exemplars has the first of them.
EXEMPLARS = (
    "add_buys",
    "sub_gives",
    "mul_each",
    "div_children",
    "two_buys_gives",
    "sub_difference",
    "add_together",
    "two_boxes_sells",
)

# (name, whether female). No name starts with an i-sound, which would change the Spanish "y".
NAMES = (
    *((name, True) for name in ("Amina", "Neema", "Fatima", "Maria", "Zawadi", "Sofia")),
    *((name, True) for name in ("Lucia", "Clara", "Rosa", "Grace", "Lina", "Nadia")),
    *((name, False) for name in ("Juma", "Baraka", "Hassan", "Daudi", "Musa", "Pedro")),
    *((name, False) for name in ("Carlos", "Luc", "Omar", "Peter", "Samuel", "Diego")),
)

# (English, Swahili, Swahili "how many" of its noun class, French with "de", Spanish, whether the
# Spanish noun is feminine)
OBJECTS = (
    ("books", "vitabu", "vingapi", "de livres", "libros", False),
    ("oranges", "machungwa", "mangapi", "d'oranges", "naranjas", True),
    ("pens", "kalamu", "ngapi", "de stylos", "bolígrafos", False),
    ("eggs", "mayai", "mangapi", "d'œufs", "huevos", False),
    ("bananas", "ndizi", "ngapi", "de bananes", "plátanos", False),
    ("mangoes", "maembe", "mangapi", "de mangues", "mangos", False),
    ("balls", "mipira", "mingapi", "de balles", "pelotas", True),
    ("cups", "vikombe", "vingapi", "de tasses", "tazas", True),
    ("plates", "sahani", "ngapi", "d'assiettes", "platos", False),
    ("flowers", "maua", "mangapi", "de fleurs", "flores", True),
    ("tomatoes", "nyanya", "ngapi", "de tomates", "tomates", False),
    ("potatoes", "viazi", "vingapi", "de pommes de terre", "patatas", True),
    ("stones", "mawe", "mangapi", "de pierres", "piedras", True),
    ("lemons", "malimau", "mangapi", "de citrons", "limones", False),
    ("keys", "funguo", "ngapi", "de clés", "llaves", True),
    ("shirts", "mashati", "mangapi", "de chemises", "camisas", True),
    ("notebooks", "madaftari", "mangapi", "de cahiers", "cuadernos", False),
    ("pineapples", "mananasi", "mangapi", "d'ananas", "piñas", True),
    ("candies", "peremende", "ngapi", "de bonbons", "caramelos", False),
    ("spoons", "vijiko", "vingapi", "de cuillères", "cucharas", True),
)

# Singular and plural; then "how many" for Swahili, and the articles for French and Spanish.
CONTAINERS = (
    {
        "en": ("basket", "baskets"),
        "sw": ("kikapu", "vikapu", "vingapi"),
        "fr": ("panier", "paniers", "un", "le"),
        "es": ("cesta", "cestas", "una", "la"),
    },
    {
        "en": ("box", "boxes"),
        "sw": ("sanduku", "masanduku", "mangapi"),
        "fr": ("boîte", "boîtes", "une", "la"),
        "es": ("caja", "cajas", "una", "la"),
    },
    {
        "en": ("bag", "bags"),
        "sw": ("mfuko", "mifuko", "mingapi"),
        "fr": ("sac", "sacs", "un", "le"),
        "es": ("bolsa", "bolsas", "una", "la"),
    },
)


@dataclasses.dataclass(frozen=True)
class Draw:
    """Uniform choices that depend only on a key."""

    key: str

    def below(self, n: int, *what: object) -> int:
        """Returns an integer in [0, n)."""
        text = "/".join((self.key, *(str(part) for part in what)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % n

    def between(self, low: int, high: int, *what: object) -> int:
        """Returns an integer in [low, high]."""
        return low + self.below(high - low + 1, *what)


def numbers(kind: str, draw: Draw) -> tuple[int, ...]:
    """Draws the numbers (a, b) or (a, b, c) of a problem, all at least 2, because of plurals."""
    first, _, second = kind.partition("_")
    if first == "add":
        a, b = draw.between(2, 12, "a"), draw.between(2, 12, "b")
    elif first == "subtract":
        b = draw.between(2, 10, "b")
        a = b + draw.between(2 if second else 1, 12, "rest")
    elif first == "multiply":
        a, b = draw.between(2, 6, "a"), draw.between(2, 9, "b")
    else:
        b = draw.between(2, 6, "b")
        a = b * draw.between(2, 9, "quotient")
    if not second:
        return a, b
    middle = apply(first, a, b)
    if second == "divide":
        divisors = [c for c in range(2, 7) if middle % c == 0 and middle > c]
        if not divisors:
            return ()
        return a, b, divisors[draw.below(len(divisors), "c")]
    if second == "subtract" and middle < 3:
        return ()
    return a, b, draw.between(2, min(9, middle - 1) if second == "subtract" else 9, "c")


def apply(operation: str, a: int, b: int) -> int:
    """Applies one operation to whole numbers; a division must have no remainder."""
    if operation == "divide":
        return a // b
    return {"add": a + b, "subtract": a - b, "multiply": a * b}[operation]


def solve(kind: str, values: Sequence[int]) -> tuple[int, str]:
    """Returns the answer, and one line with the equations that lead to the answer."""
    first, _, second = kind.partition("_")
    middle = apply(first, values[0], values[1])
    line = f"{values[0]} {SIGNS[first]} {values[1]} = {middle}"
    if not second:
        return middle, f"{line}."
    answer = apply(second, middle, values[2])
    return answer, f"{line} and {middle} {SIGNS[second]} {values[2]} = {answer}."


def words(draw: Draw) -> dict[str, dict[str, str]]:
    """Draws names, object and container; returns {language: {placeholder of templates: word}}."""
    i = draw.below(len(NAMES), "name")
    j = (i + 1 + draw.below(len(NAMES) - 1, "other")) % len(NAMES)
    (name, female), (other, other_female) = NAMES[i], NAMES[j]
    thing = OBJECTS[draw.below(len(OBJECTS), "object")]
    box = CONTAINERS[draw.below(len(CONTAINERS), "container")]
    both = {"n": name, "m": other}
    he, il = ("she", "elle") if female else ("he", "il")
    in_class = thing[2]
    return {
        "en": both
        | {"o": thing[0], "he": he, "He": he.capitalize()}
        | dict(zip(("k", "ks"), box["en"], strict=True)),
        "sw": both
        | {"o": thing[1], "q": f"{thing[1]} {in_class}"}
        | {"k": box["sw"][0], "ks": box["sw"][1], "qk": f"{box['sw'][1]} {box['sw'][2]}"},
        "fr": both
        | {"o": thing[3].removeprefix("de ").removeprefix("d'"), "d": thing[3]}
        | {"il": il, "Il": il.capitalize(), "il2": "elle" if other_female else "il"}
        | dict(zip(("k", "ks", "un", "le"), box["fr"], strict=True)),
        "es": both
        | {"o": thing[4], "q": f"{'Cuántas' if thing[5] else 'Cuántos'} {thing[4]}"}
        | {"qk": f"Cuántas {box['es'][1]}"}
        | dict(zip(("k", "ks", "un", "le"), box["es"], strict=True)),
    }


def problem(template: dict[str, str], row_id: str, draw: Draw) -> dict | None:
    """Builds one row with COPSD's fields; returns None if the drawn numbers do not fit."""
    values = numbers(template["kind"], draw)
    if not values:
        return None
    answer, solution = solve(template["kind"], values)
    vocabulary = words(draw)
    given = dict(zip("abc", values, strict=False))
    texts = {lang: template[lang].format(**vocabulary[lang], **given) for lang in LANGS}
    return {
        "id": row_id,
        "problem": texts["en"],
        "solution": solution,
        "answer": str(answer),
        **{f"problem_{lang}": texts[lang] for lang in LANGS[1:]},
        "wording": template["wording"],
        "steps": len(values) - 1,
        "kind": template["kind"],
        "template": template["template"],
        "numbers": list(values),
    }


class Maker:
    """A maker of rows; no two rows have the same template and the same numbers in any order."""

    def __init__(self, templates: Sequence[dict[str, str]], seed: int):
        self.templates = templates
        self.seed = seed
        self.used: set[tuple[str, tuple[int, ...]]] = set()

    def row(self, template: dict[str, str], row_id: str) -> dict:
        """Returns the first draw that fits and is new; raises RuntimeError after 1000 draws."""
        for attempt in range(1000):
            row = problem(template, row_id, Draw(f"{self.seed}/{row_id}/{attempt}"))
            if row is None:
                continue
            used = (row["template"], tuple(sorted(row["numbers"])))
            if used not in self.used:
                self.used.add(used)
                return row
        raise RuntimeError(f"{template['template']}: no new numbers for {row_id} in 1000 draws")

    def rows(self, wording: str, count: int, prefix: str) -> list[dict]:
        """Makes `count` rows; three of four have one step; operations and templates take turns."""
        pool = [template for template in self.templates if template["wording"] == wording]
        two_step = [template for template in pool if "_" in template["kind"]]
        by_kind = {k: [t for t in pool if t["kind"] == k] for k in ONE_STEP}
        made, ones = [], 0
        for i in range(count):
            if i % 4 == 3:
                template = two_step[(i // 4) % len(two_step)]
            else:
                kind = ONE_STEP[ones % 4]
                template = by_kind[kind][(ones // 4) % len(by_kind[kind])]
                ones += 1
            made.append(self.row(template, f"{prefix}_{i:04d}"))
        return made


def generate(seed: int = SEED) -> dict[str, list[dict]]:
    """Generates the three sets of rows.

    Held-out rows repeat the order seen, seen, unseen, so that the first n rows have both kinds.
    """
    source = pathlib.Path(__file__).parent / "problem_templates.jsonl"
    templates = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    by_name = {template["template"]: template for template in templates}
    maker = Maker(templates, seed)
    exemplars = [maker.row(by_name[name], f"exemplar_{i}") for i, name in enumerate(EXEMPLARS)]
    train = maker.rows("seen", TRAIN, "train")
    seen = iter(maker.rows("seen", HELD_OUT_SEEN, "held_out_seen"))
    unseen = iter(maker.rows("unseen", HELD_OUT_UNSEEN, "held_out_unseen"))
    turns = (seen, seen, unseen) * HELD_OUT_UNSEEN
    return {
        "train": train,
        "held_out": [next(turn) for turn in turns],
        "exemplars": exemplars,
    }


def write(out: pathlib.Path, seed: int = SEED) -> None:
    """Writes train.jsonl, held_out.jsonl and exemplars.jsonl into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in generate(seed).items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Writes the bundled word problems.")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    write(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
