"""from_peers.py: round trips in the format of each peer, mistakes by file and line, the way into stage 1."""
import csv
import json
import sys
from pathlib import Path

import pytest
import tokenize_items
from conftest import ROOT, assert_one_line_error, assert_stops, call, run_script, write_lines

sys.path.insert(0, str(ROOT / "tests" / "data"))
import from_peers  # noqa: E402

TITLES = ("Steel rod", "Oak board", "Clay pot", "Nylon rope", "Copper wire")
ITEMS = [{"item_id": n, "title": title, "description": f"A {title} for a shed.", "brand": "Acme",
          "categories": "Shop"} for n, title in enumerate(TITLES)]
SIDS = [["<a_0>", "<b_1>", "<c_2>"], ["<a_0>", "<b_1>", "<c_2>"], ["<a_0>", "<b_3>", "<c_2>"],
        ["<a_7>", "<b_1>", "<c_0>"], ["<a_7>", "<b_3>", "<c_5>"]]       # the first two collide
USERS = [{"user_id": "u1", "items": [0, 1, 2, 3]}, {"user_id": "u2", "items": [4, 4, 0]},
         {"user_id": "7", "items": [3, 2, 1, 0, 4]}]
TOKENS = ["<a_0>", "<a_7>", "<b_1>", "<b_3>", "<c_0>", "<c_2>", "<c_5>"]
SPLIT = tokenize_items.split_samples(USERS, "leave-one-out")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def convert(folder: Path, out: Path, *flags) -> dict[str, list[dict]]:
    """Run the script; -> its files by name."""
    call(from_peers, folder, "--out", out, *flags)
    return {path.stem: read(path) for path in out.iterdir()}


def write_json(path: Path, value: object, indent: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=indent), encoding="utf-8")


def write_catalogue(folder: Path, name: str, indent: int | None = None) -> None:
    """*.item.json and *.index.json, as MiniOneRec, LC-Rec and LETTER have them."""
    fields = [{key: item[key] for key in item if key != "item_id"} for item in ITEMS]
    write_json(folder / f"{name}.item.json", {str(n): item for n, item in enumerate(fields)}, indent=2)
    write_json(folder / f"{name}.index.json", {str(n): sid for n, sid in enumerate(SIDS)}, indent)


def write_csv(path: Path, samples: list[dict]) -> None:
    """One part of a split in MiniOneRec's seven columns; lists are as Python prints them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow("user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,"
                        "item_sid".split(","))
        for sample in samples:
            history, target = sample["history"], sample["target"]
            writer.writerow([sample["user_id"], [ITEMS[n]["title"] for n in history], ITEMS[target]["title"],
                             history, target, ["".join(SIDS[n]) for n in history], "".join(SIDS[target])])


@pytest.fixture
def minionerec(tmp_path) -> Path:
    """A clone of MiniOneRec with two data sets."""
    folder = tmp_path / "MiniOneRec"
    for name in ("Industrial_and_Scientific", "Office_Products"):
        for part, samples in SPLIT.items():
            write_csv(folder / "data/Amazon" / part / f"{name}_5_2016-10-2018-11.csv", samples)
        write_catalogue(folder / "data/Amazon/index", name)
        meanings = [{"description": f"About {token}.", "keywords": ["rod", "oak board"], "token": token}
                    for token in TOKENS]
        write_json(folder / f"ts_rec_data/{name}.description_keywords.json", meanings, indent=2)
    return folder


@pytest.fixture
def lcrec(tmp_path) -> Path:
    folder = tmp_path / "data" / "Shop"
    write_catalogue(folder, "Shop", indent=2)
    write_json(folder / "Shop.inter.json", {user["user_id"]: user["items"] for user in USERS}, indent=4)
    return folder


def write_recbole(folder: Path) -> Path:
    """Atomic files whose lines are not in order of time."""
    folder.mkdir()
    lines = [f"{user['user_id']}\tB0{item}\t5\t{1e9 + time:.1f}" for user in USERS
             for time, item in enumerate(user["items"])]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (folder / "shop.inter").write_text("\n".join([header, *reversed(lines)]) + "\n")
    lines = [f"B0{item['item_id']}\t{item['title']}\t9.5\t{item['description']}\tAcme\tShop"
             for item in ITEMS]
    header = ("item_id:token\ttitle:token\tprice:float\tdescription:token_seq\tbrand:token\t"
              "categories:token_seq")
    (folder / "shop.item").write_text("\n".join([header, *lines]) + "\n")
    return folder


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


# ---- Round trips ---------------------------------------------------------------------------------

def test_minionerec(minionerec, tmp_path, capsys):
    files = convert(minionerec, tmp_path / "my data", "--name", "Industrial")
    assert {part: files.pop(part) for part in SPLIT} == SPLIT
    assert files.pop("items") == ITEMS
    assert files.pop("sids") == [{"item_id": n, "sid": sid} for n, sid in enumerate(SIDS)]
    meanings = files.pop("semantics")
    assert [row["token"] for row in meanings] == TOKENS
    assert meanings[2] == {"token": "<b_1>", "description": "About <b_1>.", "n_items": 3, "sampled": [],
                           "keywords": ["rod", "oak board"],
                           "source": "Industrial_and_Scientific.description_keywords.json"}
    assert not files
    printed = capsys.readouterr().out
    assert "MiniOneRec" in printed and "train         data/Amazon/train/Industrial_and" in printed
    assert "5 items | 3 train | 3 valid | 3 test | 5 sids | 7 semantics" in printed
    command = printed.partition("next:\n")[2]
    assert f"tokenize_items.py --run 'runs/my data' --data '{tmp_path}/my data' --sids" in command
    assert "cp " in command and "extract_semantics" not in command


def test_the_next_command_is_understood_and_runs(minionerec, tmp_path, monkeypatch, capsys):
    out, run = tmp_path / "data", tmp_path / "runs" / "data"
    monkeypatch.chdir(tmp_path)
    convert(minionerec, out, "--name", "Office")
    step, copy, *_ = capsys.readouterr().out.partition("next:\n")[2].split(" && \\\n")
    assert step == f"python tokenize_items.py --run runs/data --data {out} --sids {out}/sids.jsonl"
    assert copy == f"cp {out}/semantics.jsonl runs/data"
    call(tokenize_items, *step.split()[2:])
    assert [item["sid"] for item in read(run / "items.jsonl")] == SIDS
    assert read(run / "test.jsonl") == SPLIT["test"]
    from init_embeddings import read_semantics
    assert len(read_semantics(out / "semantics.jsonl", read(run / "items.jsonl"))) == 7


def test_lcrec_and_letter(lcrec, tmp_path, capsys):
    files = convert(lcrec, tmp_path / "out")
    assert files == {"items": ITEMS, "interactions": USERS,
                     "sids": [{"item_id": n, "sid": sid} for n, sid in enumerate(SIDS)]}
    assert "extract_semantics.py --run runs/out" in capsys.readouterr().out
    assert tokenize_items.read_items(tmp_path / "out" / "items.jsonl") == ITEMS
    assert tokenize_items.load_samples(tmp_path / "out", "leave-one-out", set(range(5)), 10) == SPLIT


def test_recbole(tmp_path):
    files = convert(write_recbole(tmp_path / "shop"), tmp_path / "out")
    assert files["items"] == [{**item, "item_id": f"B0{item['item_id']}"} for item in ITEMS]
    users = {user["user_id"]: user for user in files["interactions"]}
    for user in USERS:
        times = [10 ** 9 + time for time in range(len(user["items"]))]
        assert users[user["user_id"]] == {"user_id": user["user_id"], "timestamps": times,
                                          "items": [f"B0{item}" for item in user["items"]]}
    assert set(files) == {"items", "interactions"}
    assert ".0" not in (tmp_path / "out" / "interactions.jsonl").read_text()
    known = {f"B0{n}" for n in range(5)}
    parts = tokenize_items.load_samples(tmp_path / "out", "chronological", known, 10)
    assert [len(samples) for samples in parts.values()] == [7, 1, 1]


def test_parts_without_folders(minionerec, tmp_path):
    folder = tmp_path / "flat"
    write_catalogue(folder, "Shop")
    for part in SPLIT:
        path = minionerec / "data/Amazon" / part / "Office_Products_5_2016-10-2018-11.csv"
        (folder / f"{part}.csv").write_bytes(path.read_bytes())
    files = convert(folder, tmp_path / "out")
    assert {part: files[part] for part in SPLIT} == SPLIT and set(files) == {*SPLIT, "items", "sids"}


def test_quotes_in_atomic_files_are_text(tmp_path):
    folder = write_recbole(tmp_path / "shop")
    change(folder / "shop.item", "Oak board", '"Oak" board, 3"')
    assert convert(folder, tmp_path / "out")["items"][1]["title"] == '"Oak" board, 3"'


def test_ids_are_numbers_only_if_all_are(lcrec, tmp_path):
    for name in ("item", "index"):
        change(lcrec / f"Shop.{name}.json", '"4": ', '"04": ')
    text = (lcrec / "Shop.inter.json").read_text()
    (lcrec / "Shop.inter.json").write_text(text.replace("        4", '        "04"'))
    files = convert(lcrec, tmp_path / "out")
    ids = ["0", "1", "2", "3", "04"]
    assert [item["item_id"] for item in files["items"]] == [row["item_id"] for row in files["sids"]] == ids
    for user, wanted in zip(files["interactions"], USERS, strict=True):
        assert user["items"] == [ids[n] for n in wanted["items"]]


def test_recbole_without_times_keeps_the_order_of_the_file(tmp_path):
    folder = write_recbole(tmp_path / "shop")
    lines = [f"{user['user_id']}\tB0{item}" for user in USERS for item in user["items"]]
    (folder / "shop.inter").write_text("\n".join(["session_id:token\titem_id:token", *lines]))
    users = convert(folder, tmp_path / "out")["interactions"]
    assert users == [{**user, "items": [f"B0{item}" for item in user["items"]]} for user in USERS]


def test_a_split_of_recbole_with_the_items_of_minionerec(tmp_path):
    """The files that MiniOneRec's conversion starts from; the .item of RecBole is not needed."""
    folder = tmp_path / "Shop"
    write_catalogue(folder, "Shop")
    for part, samples in SPLIT.items():
        lines = [f"{s['user_id']}\t{' '.join(map(str, s['history']))}\t{s['target']}" for s in samples]
        (folder / f"Shop.{part}.inter").write_text(
            "\n".join(["user_id:token\titem_id_list:token_seq\titem_id:token", *lines]) + "\n")
    files = convert(folder, tmp_path / "out")
    assert {part: files[part] for part in SPLIT} == SPLIT and files["items"] == ITEMS


def test_texts_become_plain(lcrec, tmp_path):
    fields = {"title": "T&Uuml;RLEN <b>dial</b>", "description": "['Two parts.', \"It's one.\\n\", '']",
              "brand": None, "categories": ["Tools", "Dials"], "price": 3}
    others = {str(n): {"title": f"[{n}"} for n in range(1, 5)}          # no list, though it looks like one
    write_json(lcrec / "Shop.item.json", {"0": fields, **others})
    items = convert(lcrec, tmp_path / "out")["items"]
    assert items[0] == {"item_id": 0, "title": "TÜRLEN dial", "description": "Two parts. It's one.",
                        "brand": "", "categories": "Tools > Dials"}
    assert items[3] == {"item_id": 3, "title": "[3", "description": "", "brand": "", "categories": ""}


def test_lists_are_never_run(minionerec, tmp_path, capsys):
    path = minionerec / "data/Amazon/test/Office_Products_5_2016-10-2018-11.csv"
    trap = tmp_path / "trap"
    lines = path.read_text().splitlines()
    lines[2] = f"u2,[],x,\"[open('{trap}', 'w')]\",0,[],<a_0>"
    path.write_text("\n".join(lines))
    assert_stops(capsys, convert, minionerec, tmp_path / "out", "--name", "Office",
                 words=(f"{path}, line 3", "history_item_id"))
    assert not trap.exists()


# ---- Unknown items -------------------------------------------------------------------------------

def test_unknown_items_are_an_error_or_left_out(lcrec, minionerec, tmp_path, capsys):
    for folder in (lcrec, minionerec / "data/Amazon/index"):
        for path in folder.glob("*.item.json"):
            items = json.loads(path.read_text())
            items["0"] = {"title": " ", "description": ""}              # no text: as if it were not there
            del items["4"]
            write_json(path, items)
    for path in (minionerec / "ts_rec_data").iterdir():
        path.unlink()
    out = tmp_path / "out"
    assert_stops(capsys, convert, lcrec, out, words=("Shop.inter.json, line 2", "item '0'", "--drop-unknown"))
    assert not out.exists()
    files = convert(lcrec, out, "--drop-unknown")
    assert files["interactions"] == [{"user_id": "u1", "items": [1, 2, 3]},
                                     {"user_id": "7", "items": [3, 2, 1]}]
    for name in ("items", "sids"):
        assert [row["item_id"] for row in files[name]] == [1, 2, 3]
    assert "6 times an unknown item" in capsys.readouterr().out

    files = convert(minionerec, tmp_path / "split", "--drop-unknown", "--name", "Office")
    kept = {part: [{**s, "history": [n for n in s["history"] if n in (1, 2, 3)]} for s in samples
                   if s["target"] in (1, 2, 3)] for part, samples in SPLIT.items()}
    for part in SPLIT:
        assert files[part] == [sample for sample in kept[part] if sample["history"]]


# ---- Mistakes ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, old, new, words", [
    ("Shop.inter.json", "    4,\n", "    4;\n", ("Shop.inter.json, line", "not")),
    ("Shop.inter.json", "[\n        4,\n        4,\n        0\n    ]", "[]", ("line 8", "user 'u2'")),
    ("Shop.inter.json", "[\n        4,\n        4,\n        0\n    ]", "3", ("line 8", "user 'u2'")),
    ("Shop.inter.json", "        3\n", "        33\n", ("line 2", "item '33'")),
    ("Shop.item.json", "{", "[{", ("Shop.item.json, line",)),
    ("Shop.item.json", '"1": {', '"1": 5, "x": {', ("Shop.item.json, line 8", "item '1'", "object")),
    ("Shop.index.json", '"2": [', '"22": [', ("Shop.index.json", "item '2'", "not None")),
    ("Shop.index.json", '"<a_7>"', '"<a-7>"', ("Shop.index.json, line 17", "item '3'", "<a-7>")),
    ("Shop.index.json", '    "<c_5>"', '    "<c_5>", "<d_1>"', ("line 22", "item '4'", "as long as")),
    ("Shop.index.json", '    "<c_5>"', '    "<b_5>"', ("line 22", "item '4'")),
    ("Shop.index.json", '    "<c_5>"', '    "<c_5>", "d1"', ("line 22", "item '4'")),
])
def test_mistakes_in_json(lcrec, tmp_path, capsys, name, old, new, words):
    change(lcrec / name, old, new)
    assert_stops(capsys, convert, lcrec, tmp_path / "out", words=words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, old, new, words", [
    ("data/Amazon/train/{}_5_2016-10-2018-11.csv", "[0]", "[]", ("line 2", "history_item_id")),
    ("data/Amazon/train/{}_5_2016-10-2018-11.csv", "[0]", "0", ("line 2", "history_item_id")),
    ("data/Amazon/valid/{}_5_2016-10-2018-11.csv", "history_item_id", "ids", ("line 1", "no column")),
    ("data/Amazon/test/{}_5_2016-10-2018-11.csv", "<a_7><b_1><c_0>\r\n", "x,y\r\n", ("line 2", "8 cells")),
    ("ts_rec_data/{}.description_keywords.json", '"<b_3>"', '"<b_4>"', ("line", "no item has '<b_4>'")),
    ("ts_rec_data/{}.description_keywords.json", '"description": "About <b_3>."', '"text": ""', ("'<b_3>'",)),
    ("ts_rec_data/{}.description_keywords.json", '"<b_3>"', "null", ("no item has None",)),
    ("ts_rec_data/{}.description_keywords.json", '"keywords": [', '"words": [', ("line 8", "'<a_0>'")),
])
def test_mistakes_of_minionerec(minionerec, tmp_path, capsys, name, old, new, words):
    path = minionerec / name.format("Office_Products")
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode(), 1))
    assert_stops(capsys, convert, minionerec, tmp_path / "out", "--name", "Office", words=(path, *words))
    assert not (tmp_path / "out").exists()


def test_a_token_without_meaning(minionerec, tmp_path, capsys):
    path = minionerec / "ts_rec_data/Office_Products.description_keywords.json"
    write_json(path, json.loads(path.read_text())[1:])
    assert_stops(capsys, convert, minionerec, tmp_path / "out", "--name", "Office",
                 words=(path, "<a_0>", "stage 2"))


@pytest.mark.parametrize("name, old, new, words", [
    ("shop.inter", "1000000001.0", "yesterday", ("line 5", "timestamp", "yesterday")),
    ("shop.inter", "\t5\t", "\t", ("line 2", "3 cells for 4 columns")),
    ("shop.inter", "item_id:", "movie:", ("line 1", "no column item_id", "movie")),
    ("shop.inter", "rating:float", "item_id_list:token_seq", ("line 1", "train.inter")),
    ("shop.inter", "B04", "B09", ("line 2", "'B09'")),
    ("shop.item", "B01", "B00", ("line 3", "'B00' is there twice")),
])
def test_mistakes_of_recbole(tmp_path, capsys, name, old, new, words):
    folder = write_recbole(tmp_path / "shop")
    change(folder / name, old, new)
    assert_stops(capsys, convert, folder, tmp_path / "out", words=words)
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_there_or_too_many(minionerec, lcrec, tmp_path, capsys):
    out = tmp_path / "out"
    assert_stops(capsys, convert, minionerec, out, words=("Industrial", "Office", "--name"))
    assert_stops(capsys, convert, tmp_path / "nowhere", out, words=("no file for interactions, items",))
    (minionerec / "data/Amazon/valid/Office_Products_5_2016-10-2018-11.csv").unlink()
    assert_stops(capsys, convert, minionerec, out, "--name", "Office", words=("no file for valid",))
    write_json(lcrec / "Shop.inter.json", {"u1": [77]})
    assert_stops(capsys, convert, lcrec, out, "--drop-unknown", words=("nothing is left for interactions",))
    (lcrec / "Shop.inter.json").write_text("{}")
    assert_stops(capsys, convert, lcrec, out, words=("Shop.inter.json, line 1", "not empty"))
    (lcrec / "Shop.inter.json").write_bytes(b'{"u": [\xff]}')
    assert_stops(capsys, convert, lcrec, out, words=("Shop.inter.json", "UTF-8"))
    (lcrec / "Shop.item.json").unlink()
    assert_stops(capsys, convert, lcrec, out, words=("no file for items",))
    assert not out.exists()


def test_files_of_another_data_set_are_not_mixed(lcrec, tmp_path, capsys):
    """Stage 1 would take an old train.jsonl for the split."""
    out = tmp_path / "out"
    convert(lcrec, out)
    convert(lcrec, out)                                 # the same files again are fine
    write_lines(out / "train.jsonl", SPLIT["train"])
    before = (out / "items.jsonl").stat().st_mtime_ns
    assert_stops(capsys, convert, lcrec, out, words=("train.jsonl", "empty folder"))
    assert (out / "items.jsonl").stat().st_mtime_ns == before


def test_on_the_command_line(lcrec, tmp_path):
    change(lcrec / "Shop.index.json", '"<a_7>"', '"a7"')
    done = run_script("tests/data/from_peers.py", lcrec, "--out", tmp_path / "out")
    assert_one_line_error(done, "Shop.index.json", "line 17")
