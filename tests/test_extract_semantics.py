"""Stage 2: clusters, the offline teacher's contrast and cleanliness, the output files, errors."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, assert_stops, call, write_lines

import extract_semantics as stage

ITEMS = [       # title, description, brand, SID
    ("Stanley TRA708T 1/2-Inch Heavy Duty Staples, Steel (1000 Count)",
     "Steel staples for upholstery and insulation work. Best quality workshop supplies!", "Stanley", "2 0 0"),
    ("Stanley Narrow Crown Staples 3/8 in, 12mm",
     "Galvanized staples, ideal for upholstery. The workshop classic. Made by STANLEY.", "Stanley", "2 0 1"),
    ("Arrow T50 Upholstery Staples and Tools, 500-Pack",
     "These upholstery staples fit Stanley tools. &lt;br&gt;Workshop use.", "Arrow", "2 1 2"),
    ("Precision Tools Glass Beaker 250 ml",
     "Borosilicate glass beaker for laboratory tools. For the workshop.", "Precision Tools", "10 1 0"),
    ("Karterly Glass Beaker Set 50 mL, 100 mL",
     "Graduated beakers for laboratory use; workshop safe. Model number: KB-77", "Karterly", "10 1 1"),
    ("Karterly Erlenmeyer Flask with Tools 2.5 lbs",
     "A laboratory flask of borosilicate glass, 4 inches tall, for workshop tools.", "Karterly", "10 2 3"),
    ("Xyzzy 77-B", "", "Xyzzy", "11 3 4"),
]
BRANDS = {"stanley", "arrow", "karterly", "precision", "xyzzy"}


@pytest.fixture
def items() -> list[dict]:
    return [{"item_id": n, "title": title, "description": description, "brand": brand, "categories": "",
             "sid": [f"<{level}_{code}>" for level, code in zip("abc", sid.split())]}
            for n, (title, description, brand, sid) in enumerate(ITEMS)]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def semantics(folder: Path, items: list[dict], *flags) -> dict[str, dict]:
    """What the script writes about each token."""
    write_lines(folder / "items.jsonl", items)
    call(stage, "--run", folder, *flags)
    return {row["token"]: row for row in read(folder / "semantics.jsonl")}


def teach(items: list[dict], folder: Path) -> dict[str, tuple[str, list[str]]]:
    """What the offline teacher says about each token: a description, keywords."""
    return {token: (row["description"], row["keywords"]) for token, row in semantics(folder, items).items()}


def test_clusters_are_eq_6(items, tmp_path):
    rows = semantics(tmp_path, items)
    tokens = {token for item in items for token in item["sid"]}
    for token in tokens:
        cluster = [item["item_id"] for item in items if token in item["sid"]]
        assert sorted(rows[token]["sampled"]) == cluster and rows[token]["n_items"] == len(cluster)
    assert set(rows) == tokens and list(rows)[:4] == ["<a_2>", "<a_10>", "<a_11>", "<b_0>"]


def test_sample_is_a_bounded_subset_and_independent_of_other_tokens(items, tmp_path):
    samples = [semantics(tmp_path, items, "--sample", 2, "--seed", seed)["<b_1>"] for seed in range(9)]
    assert all(row["n_items"] == 3 and len(set(row["sampled"])) == 2 for row in samples)
    assert all(set(row["sampled"]) < {2, 3, 4} for row in samples)
    assert len({tuple(row["sampled"]) for row in samples}) > 1
    for item in items:
        item["sid"][0] = "<a_0>"
    assert semantics(tmp_path, items, "--sample", 2, "--seed", 0)["<b_1>"]["sampled"] == samples[0]["sampled"]


def test_no_brands_and_no_numbers_but_the_ordinary_word_of_a_brand(items, tmp_path):
    meaning, tools = teach(items, tmp_path), 0
    for token, (description, keywords) in meaning.items():
        words = set(re.findall(r"\w+", " ".join([description, *keywords]).lower()))
        assert words.isdisjoint(BRANDS), token
        assert not any(character.isdigit() for word in words for character in word), token
        tools += "tools" in words
    assert tools                                            # of Precision Tools, and of two other titles


def test_contrast_prefers_what_is_specific(items, tmp_path):
    meaning = teach(items[:6], tmp_path)
    assert meaning["<a_2>"][1][0] in ("staples", "upholstery", "upholstery staples")
    assert set(meaning["<a_10>"][1][:4]) & {"glass", "glass beaker", "laboratory"}
    for token, own in (("<a_2>", "staple"), ("<a_10>", "glass")):
        keywords = meaning[token][1]
        first = next(n for n, keyword in enumerate(keywords) if own in keyword)
        assert all(n > first for n, keyword in enumerate(keywords) if "workshop" in keyword)
    assert "staples" in meaning["<a_2>"][0].lower() and "beaker" in meaning["<a_10>"][0].lower()


def test_keywords_are_bounded_distinct_and_never_empty(items, tmp_path):
    meaning = teach(items, tmp_path)
    for description, keywords in meaning.values():
        assert 1 <= len(keywords) <= 20 and len(set(keywords)) == len(keywords) and description
    assert len(meaning["<a_2>"][1]) >= 10
    assert meaning["<a_11>"] == meaning["<b_3>"] != meaning["<b_2>"]    # an item that is nothing but a code


def test_the_demo_shop_gets_10_to_20_keywords_without_its_brands(tmp_path):
    items = read(ROOT / "tests" / "demo" / "items.jsonl")
    for n, item in enumerate(items):
        item["sid"] = [f"<a_{n % 64}>", f"<b_{n // 16}>"]
    brands = {item["brand"].lower() for item in items}
    for description, keywords in teach(items, tmp_path).values():
        assert 10 <= len(set(keywords)) == len(keywords) <= 20
        assert all(keyword in description for keyword in keywords[:3])
        text = " ".join([description, *keywords]).lower()
        assert not re.search(r"\d", text) and brands.isdisjoint(re.findall(r"\w+", text))


def test_file_has_one_line_per_token_in_order_and_is_reproducible(items, tmp_path, capsys):
    write_lines(tmp_path / "items.jsonl", items)
    flags = ["--run", str(tmp_path), "--sample", "2", "--seed", "3", "--queries", "3"]
    call(stage, *flags)
    data = [(tmp_path / f"{name}.jsonl").read_bytes() for name in ("semantics", "queries")]
    rows = read(tmp_path / "semantics.jsonl")
    levels_and_codes = [(row["token"][1], int(row["token"][3:-1])) for row in rows]
    assert levels_and_codes == sorted(set(levels_and_codes)) and len(rows) == 3 + 4 + 5
    for row in rows:
        assert list(row) == ["token", "description", "keywords", "n_items", "sampled", "source"]
        assert len(row["sampled"]) == min(2, row["n_items"]) and row["source"] == "tfidf"
    assert "semantics.jsonl" in capsys.readouterr().out
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, stage.__file__, *flags], env=environment, check=True)
    assert [(tmp_path / f"{name}.jsonl").read_bytes() for name in ("semantics", "queries")] == data


def test_missing_input_is_one_line_and_writes_nothing(tmp_path, capsys):
    assert_stops(capsys, call, stage, "--run", tmp_path / "run", words=("items.jsonl",))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [["--no-flag"], ["--sample", "0"], ["--teacher", "hf"], ["--seed", "-1"]])
def test_bad_flags_exit_2(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        stage.parse_args(flags)
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err
