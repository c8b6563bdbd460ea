"""Stage 2: clusters, the keywords' contrast and cleanliness, the output file, errors."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import assert_stops, call

import extract_semantics as stage

SCRIPT = Path(stage.__file__)
ITEMS = [       # title, description, brand, SID
    ("Stanley TRA708T 1/2-Inch Heavy Duty Staples, Steel (1000 Count)",
     "Steel staples for upholstery and insulation work. Best quality workshop supplies!", "Stanley", "2 0 0"),
    ("Stanley Narrow Crown Staples 3/8 in, 12mm",
     "Galvanized staples, ideal for upholstery. The workshop classic.", "Stanley", "2 0 1"),
    ("Arrow T50 Upholstery Staples, 500-Pack",
     "These upholstery staples come with hand tools. &lt;br&gt;Workshop use.", "Arrow", "2 1 2"),
    ("Precision Tools Glass Beaker 250 ml",
     "Borosilicate glass beaker for laboratory tools. Amazon exclusive. For the workshop.",
     "Precision Tools", "10 1 0"),
    ("Karterly Glass Beaker Set 50 mL, 100 mL",
     "Graduated beakers for laboratory use; workshop safe. Model number: KB-77", "Karterly", "10 1 1"),
    ("Karterly Erlenmeyer Flask 2.5 lbs",
     "A laboratory flask of borosilicate glass, 4 inches tall, for workshop tools.", "Karterly", "10 2 3"),
    ("Xyzzy 77-B", "", "Xyzzy", "11 3 4"),
]
UNWANTED = {"stanley", "arrow", "karterly", "best", "quality", "amazon", "exclusive", "lt", "br",
            "inch", "inches", "mm", "ml", "lbs", "count", "pack"}


@pytest.fixture
def items() -> list[dict]:
    return [{"item_id": n, "title": title, "description": description, "brand": brand, "categories": "",
             "sid": [f"<{level}_{code}>" for level, code in zip("abc", sid.split())]}
            for n, (title, description, brand, sid) in enumerate(ITEMS)]


def run(folder: Path, *flags: str, hash_seed: str = "0") -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), "--run", str(folder), *flags], capture_output=True,
                          text=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})


def write_items(folder: Path, items: list[dict]) -> None:
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def read_rows(folder: Path) -> list[dict]:
    with open(folder / "semantics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def teach(items: list[dict]) -> dict[str, tuple[str, list[str]]]:
    catalogue = stage.study(items)
    return {token: stage.tfidf_teacher(token, cluster, catalogue)[:2]
            for token, cluster in stage.make_clusters(items).items()}


def test_clusters_are_eq_6(items):
    clusters = stage.make_clusters(items)
    tokens = {token for item in items for token in item["sid"]}
    assert {token: [item for item in items if token in item["sid"]] for token in tokens} == clusters
    assert list(clusters)[:4] == ["<a_2>", "<a_10>", "<a_11>", "<b_0>"]


def test_sample_is_a_bounded_subset_and_independent_of_other_tokens(items):
    cluster = stage.make_clusters(items)["<b_1>"]
    sample = stage.draw_sample("<b_1>", cluster, 2, 0)
    assert len(sample) == 2 and all(item in cluster for item in sample)
    assert sample == stage.draw_sample("<b_1>", cluster, 2, 0)
    assert len({tuple(item["item_id"] for item in stage.draw_sample("<b_1>", cluster, 2, seed))
                for seed in range(20)}) > 1
    assert sorted(item["item_id"] for item in stage.draw_sample("<b_1>", cluster, 99, 0)) == [2, 3, 4]


def test_no_brands_numbers_codes_measures_or_promotion(items):
    for token, (description, keywords) in teach(items).items():
        if token in ("<a_11>", "<b_3>", "<c_4>"):
            continue                                                # the item that is nothing but a code
        words = set(re.findall(r"\w+", " ".join([description, *keywords]).lower()))
        assert words.isdisjoint(UNWANTED), token
        assert not any(character.isdigit() for word in words for character in word), token


def test_an_ordinary_word_of_a_brand_stays(items):
    texts = [set(stage.split_words(stage.clean(f"{item['title']}. {item['description']}", item["brand"])))
             for item in items]
    names = stage.find_names(items, texts)
    assert {"stanley", "karterly", "precision"} <= names and "tools" not in names


def test_contrast_prefers_what_is_specific(items):
    meaning = teach(items[:6])
    assert meaning["<a_2>"][1][0] in ("staples", "upholstery", "upholstery staples")
    assert set(meaning["<a_10>"][1][:4]) & {"glass", "glass beaker", "laboratory"}
    for token, own in (("<a_2>", "staple"), ("<a_10>", "glass")):
        keywords = meaning[token][1]
        first = next(n for n, keyword in enumerate(keywords) if own in keyword)
        assert all(n > first for n, keyword in enumerate(keywords) if "workshop" in keyword)
    assert "staples" in meaning["<a_2>"][0].lower() and "beaker" in meaning["<a_10>"][0].lower()


def test_keywords_are_bounded_distinct_and_never_empty(items):
    meaning = teach(items)
    for description, keywords in meaning.values():
        assert 1 <= len(keywords) <= 20 and len(set(keywords)) == len(keywords) and description
    assert len(meaning["<a_2>"][1]) >= 10
    assert len({description for description, _ in meaning.values()}) == len(meaning)


def test_words_and_singular():
    assert stage.split_words("Arrow T50 1/2-Inch Heavy Duty Gun")[0] == "Arrow"
    assert [word for word in stage.split_words("3D Printer, 10-Pack, Non-Slip T50 user's") if word] == [
        "3D", "Printer", "Non-Slip", "user", "s"]
    vocabulary = {"brush", "battery", "tie", "brass", "tube", "tub"}
    words = {"brushes": "brush", "batteries": "battery", "ties": "tie", "tubes": "tube", "brass": "brass",
             "lens": "lens"}
    assert {word: stage.singular(word, vocabulary) for word in words} == words
    assert stage.listing(["a"]) == "a" and stage.listing(["a", "b", "c"]) == "a, b and c"


def test_file_has_one_line_per_token_in_order_and_is_reproducible(items, tmp_path):
    write_items(tmp_path, items)
    first = run(tmp_path, "--sample", "2", "--seed", "3", "--queries", "3")
    assert first.returncode == 0, first.stderr
    data, queries = (tmp_path / "semantics.jsonl").read_bytes(), (tmp_path / "queries.jsonl").read_bytes()
    rows = read_rows(tmp_path)
    clusters = stage.make_clusters(items)
    assert [row["token"] for row in rows] == list(clusters)
    for row in rows:
        assert list(row) == ["token", "description", "keywords", "n_items", "sampled", "source"]
        ids = [item["item_id"] for item in clusters[row["token"]]]
        assert row["n_items"] == len(ids) and row["source"] == "tfidf"
        assert len(row["sampled"]) == min(2, len(ids)) and set(row["sampled"]) <= set(ids)
    again = run(tmp_path, "--sample", "2", "--seed", "3", "--queries", "3", "--out", str(tmp_path / "again.jsonl"),
                hash_seed="1")
    assert again.returncode == 0 and (tmp_path / "again.jsonl").read_bytes() == data
    assert (tmp_path / "queries.jsonl").read_bytes() == queries
    assert "example |" in first.stdout and "wrote" in first.stdout


@pytest.mark.parametrize("bad", ["file/x.jsonl", "folder"])
@pytest.mark.parametrize("flag, other", [("--out", "queries.jsonl"), ("--queries-out", "semantics.jsonl")])
def test_both_files_are_replaced_or_none(items, tmp_path, capsys, bad, flag, other):
    write_items(tmp_path, items)
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder").mkdir()
    (tmp_path / other).write_text("old")
    assert_stops(capsys, call, stage, "--run", tmp_path, "--queries", 3, flag, tmp_path / bad, words=(bad, "written"))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["file", "folder", "items.jsonl", other])
    assert (tmp_path / other).read_text() == "old"


def test_missing_input_is_one_line_and_writes_nothing(tmp_path):
    result = run(tmp_path / "run")
    assert result.returncode == 2 and not (tmp_path / "run").exists()
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("flags", [["--no-such-flag"], ["--sample", "0"], ["--teacher", "oracle"], ["--seed", "-1"]])
def test_bad_flags_exit_2(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        stage.parse_args(flags)
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err
