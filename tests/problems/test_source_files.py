"""CSV, compressed files, folders and globs, against the same records in one JSONL file."""

import csv
import gzip
import json

import pyarrow
import pytest

from copsd_jax.problems import sources

RECORDS = [
    {"problem": f'What is "{k}",\n + {k}? é', "solution": f"{k}, so {2 * k}", "answer": str(2 * k)}
    for k in range(6)
]


def text_of(records, kind):
    if kind == "jsonl":
        return "\n".join(map(json.dumps, records))
    return json.dumps(records)


def write_csv(path, records):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def pack(raw, end):
    packers = {"": bytes, ".gz": lambda x: gzip.compress(x, mtime=0),
               ".zst": lambda x: pyarrow.Codec("zstd").compress(x, asbytes=True)}  # fmt: skip
    return packers[end](raw)


def load(path, **options):
    return sources.load_rows(str(path), ("en",), needs=("solution", "answer"), **options)[0]


@pytest.fixture
def expected(tmp_path):
    (tmp_path / "all.jsonl").write_text(text_of(RECORDS, "jsonl"), encoding="utf-8")
    return load(tmp_path / "all.jsonl")


@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_packed_files_give_the_same_rows(tmp_path, expected, kind, end):
    if kind == "csv":
        write_csv(tmp_path / "plain.csv", RECORDS)
        raw = (tmp_path / "plain.csv").read_bytes()
    else:
        raw = text_of(RECORDS, kind).encode()
    path = tmp_path / f"rows.{kind}{end}"
    path.write_bytes(pack(raw, end))
    assert load(path) == expected
    if end == ".gz":  # several members, as `cat a.gz b.gz` writes them
        path.write_bytes(b"".join(pack(raw[k : k + 50], end) for k in range(0, len(raw), 50)))
        assert load(path) == expected


def test_a_packed_tsv_file_has_one_language(tmp_path):
    path = tmp_path / "mgsm.tsv.gz"
    path.write_bytes(gzip.compress(b"Mbili?\t2\nTatu?\t3\n"))
    rows, _ = sources.load_rows(str(path), ("sw",))
    assert [(row.problem, row.answer) for row in rows] == [("Mbili?", "2"), ("Tatu?", "3")]
    with pytest.raises(ValueError, match="a TSV file has one language"):
        sources.load_rows(str(path), ("sw", "en"))
    with pytest.raises(ValueError, match="a TSV file has one language"):
        sources.load_rows(str(tmp_path), ("sw", "en"))


@pytest.mark.parametrize("end", ["", ".zst"])
def test_shards_are_read_in_the_order_of_their_names(tmp_path, expected, end):
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, records in (("c", RECORDS[4:]), ("a", RECORDS[:1]), ("b", RECORDS[1:4])):
        raw = text_of(records, "jsonl").encode()
        (folder / f"{name}.jsonl{end}").write_bytes(pack(raw, end))
    (folder / "README.md").write_text("# Not a shard")
    (folder / ".hidden.jsonl").write_text("not a shard")
    (folder / "_SUCCESS").write_text("")
    for path in (folder, f"{folder}/", folder / f"*.jsonl{end}", tmp_path / "s*" / "[abc].*"):
        assert load(path) == expected
    assert load(folder / f"[ab].jsonl{end}") == expected[:4]
    lone = tmp_path / "brackets[1].jsonl"
    lone.write_text(text_of(RECORDS, "jsonl"))
    assert load(lone) == expected


def test_an_error_names_the_shard_and_its_line(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    good = json.dumps(RECORDS[0])
    (folder / "a.jsonl").write_text(good)
    (folder / "b.jsonl").write_text(f'{good}\n{{"problem": "p"}}')
    with pytest.raises(ValueError, match=r"shards, b\.jsonl line 2: (answer|solution) is missing"):
        load(folder)
    (folder / "b.jsonl").write_text(f"{good}\n{{")
    with pytest.raises(ValueError, match=r"shards/b\.jsonl, line 2: broken JSON"):
        load(folder)
    (folder / "b.csv").write_text("problem,answer\np,1\n")
    with pytest.raises(ValueError, match=r"several kinds \(b\.csv, b\.jsonl\); choose one kind"):
        load(folder)
    (folder / "b.csv").unlink()
    (folder / "b.jsonl").unlink()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(good.encode()))
    with pytest.raises(ValueError, match=r"several kinds \(a\.jsonl, b\.jsonl\.gz\)"):
        load(folder)


LINE = b'{"problem": "p", "solution": "s", "answer": "1"}\n' * 40
GZ, ZST = pack(LINE, ".gz"), pack(LINE, ".zst")


@pytest.mark.parametrize(
    "name, raw, said",
    [
        ("d.jsonl.gz", GZ[:-9], r"d\.jsonl\.gz: the \.gz data are damaged or cut \(.*end"),
        ("d.jsonl.gz", GZ[:20] + b"\0\0\0" + GZ[23:], r"the \.gz data are damaged or cut"),
        ("d.jsonl.gz", LINE, r"the content is other data, not \.gz data"),
        ("d.jsonl.gz", ZST, r"the content is \.zst data, not \.gz data"),
        ("d.jsonl.zst", GZ, r"the content is \.gz data, not \.zst data"),
        ("d.jsonl.zst", ZST[:-3], r"the \.zst data are damaged or cut \(Truncated"),
        ("d.jsonl", GZ, r"the content is \.gz data, not text; rename or unpack"),
        ("d.json", b"PK\x03\x04zip", r"the content is \.zip data, not text"),
        ("d.csv", b"problem,answer\na,1,2\n", "line 2: expected 2 cells as in the header, found 3"),
        ("d.csv", b'problem,answer\n"a\n', r"line 2: broken CSV"),
        ("d.csv", b"problem,problem\na,1\n", "line 1: the column 'problem' occurs twice"),
        ("d.csv", b"problem;answer\na;1\n", "has no comma; separate the cells .* not with ';'"),
        ("d.csv", b"", "it has no rows"),
        ("d.csv", b"problem,answer\n", "it has no rows"),
        ("d.csv", b"What is 1+1?,2\nWhat?,3", "problem is missing .*the record has What is 1"),
        ("d.csv", b"problem,answer\n\xff,1\n", r"line 2: the text is not UTF-8"),
        ("d.parquet.gz", GZ, r"must end in .*, and all but \.parquet may be followed by \.gz or"),
    ],
    ids=lambda value: value if str(value).startswith("d.") else "",
)
def test_damaged_files(tmp_path, name, raw, said):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=said) as caught:
        load(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path, said",
    [
        ("", "a folder must contain the files itself, not in further folders"),
        ("*.jsonl", "no file matches it; it needs files that end in .jsonl"),
        ("gone.jsonl", "there is no such file"),
        ("gone/", "must end in"),
    ],
)
def test_empty_folders_and_globs(tmp_path, path, said):
    (tmp_path / "train").mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match=rf"^data\.path is .*{said}"):
        load(f"{tmp_path}/{path}")


def test_a_long_cell_is_read_whole(tmp_path):
    record = {"problem": "p", "solution": "x" * 200_000, "answer": "1"}
    write_csv(tmp_path / "d.csv", [record])
    (row,) = load(tmp_path / "d.csv")
    assert row.solution == record["solution"]
