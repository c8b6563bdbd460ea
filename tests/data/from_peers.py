"""Turn a data set of MiniOneRec, LC-Rec, LETTER or RecBole into a folder for tokenize_items.py.

The layout is recognised by the files, which may lie at any depth below FOLDER:
  MiniOneRec      train/*.csv, valid/*.csv, test/*.csv, or train.csv, ...; *.item.json, *.index.json,
                  *.description_keywords.json (TS-Rec's)
  LC-Rec, LETTER  *.inter.json, {user: [item, ...]}; *.item.json, *.index.json
  RecBole         *.inter, an interaction a line, or *.train.inter, *.valid.inter, *.test.inter with
                  item_id_list; *.item or *.item.json; *.index.json

Reads   FOLDER; lists in CSV cells are read as Python literals, never run
Writes  DIR/items.jsonl; train, valid and test.jsonl if the data set is split, else interactions.jsonl;
        sids.jsonl and semantics.jsonl if it has SIDs and their meanings; nothing if anything is wrong

An item_id is a number if all are. HTML is removed, a list of texts becomes one text. An item that has
neither title nor description is unknown: its interactions are an error, or go with --drop-unknown.

Examples, from the project's root
  python tests/data/from_peers.py ../MiniOneRec --name Industrial --out data/industrial
  python tests/data/from_peers.py ../RecBole/dataset/ml-100k --out data/movies --drop-unknown
"""
import argparse
import ast
import csv
import json
import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Iterator, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (0, 2)]
from make_amazon import plain  # noqa: E402
from tokenize_items import LEVELS, SID_TOKEN, item_text, make_parser, stop, write_jsonl  # noqa: E402

PARTS = ("train", "valid", "test")
FIELDS = {                              # of our items -> what the peers call them
    "title": ("title", "movie_title", "name", "item_name"),
    "description": ("description", "features"),
    "brand": ("brand", "store"),
    "categories": ("categories", "category", "genre", "class"),
}


class Row(NamedTuple):
    """A sample, all items of a user, or one interaction."""
    line: int | str                     # of the file, or a string on that line
    user_id: str
    items: list[str]                    # oldest first; a sample's last one is its target
    time: float | None = None           # of an interaction, if known


# ---- Files ---------------------------------------------------------------------------------------

def stop_at(path: Path, line: int | str, problem: str):
    """Stop, naming the file and the line: a number, or the first one with that JSON string."""
    if isinstance(line, str):
        before, found, _ = path.read_text(encoding="utf-8-sig").partition(json.dumps(line))
        line = before.count("\n") + 1 if found else 1
    stop(f"{path}, line {line}: {problem}")


def find(folder: Path, pattern: str, name: str) -> Path | None:
    """The only file below a folder that matches the pattern and has `name` in its name."""
    paths = sorted(path for path in folder.rglob(pattern) if name in path.name)
    if len(paths) > 1:
        stop(f"{folder}: {paths[0]} or {paths[1]}? Choose one data set with --name")
    return paths[0] if paths else None


def read_table(path: Path, columns: tuple[str, ...], delimiter: str = "\t") -> Iterator[tuple[int, dict]]:
    """Yield (line, cells by column) of a CSV or an atomic file, which has "name:type" as a header."""
    quoting, count = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL, 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, quoting=quoting)
            header = [name.split(":")[0].replace("session_id", "user_id") for name in next(reader, [])]
            if missing := [name for name in columns if name not in header]:
                stop_at(path, 1, f"no column {', '.join(missing)}; the columns are {', '.join(header)}")
            for count, cells in enumerate(filter(None, reader), 1):
                if len(cells) != len(header):
                    stop_at(path, reader.line_num, f"{len(cells)} cells for {len(header)} columns")
                yield reader.line_num, dict(zip(header, cells))
    except (OSError, ValueError, csv.Error) as error:
        stop(f"{path}: cannot be read as a table in UTF-8 ({error})")
    if not count:
        stop(f"{path}: has no rows")


def read_json(path: Path, kind: type):
    """Read a JSON file that holds a dict, or a list."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        stop_at(path, getattr(error, "lineno", 1), f"cannot be read as JSON in UTF-8 ({error})")
    if not isinstance(value, kind) or not value:
        stop_at(path, 1, f"must hold a JSON {'object' if kind is dict else 'list'} that is not empty")
    return value


def literal(text: str) -> object:
    """The value of a Python literal, or the text itself: "['I1', 2]" -> ["I1", 2]."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


# ---- Interactions --------------------------------------------------------------------------------

def read_samples(path: Path) -> Iterator[Row]:
    """MiniOneRec, and RecBole's split: a sample a line."""
    is_csv = path.suffix == ".csv"
    column, delimiter = ("history_item_id", ",") if is_csv else ("item_id_list", "\t")
    for line, cells in read_table(path, ("user_id", column, "item_id"), delimiter):
        history = literal(cells[column]) if is_csv else cells[column].split()
        if not isinstance(history, list) or not history:
            stop_at(path, line, f"{column} must be a list of items, not {str(history)[:40]!r}")
        yield Row(line, cells["user_id"], [*map(str, history), cells["item_id"]])


def read_inter(path: Path) -> Iterator[Row]:
    """RecBole: an interaction a line."""
    for line, cells in read_table(path, ("user_id", "item_id")):
        if "item_id_list" in cells:
            stop_at(path, 1, "item_id_list needs a split: *.train.inter, *.valid.inter and *.test.inter")
        try:
            time = float(cells["timestamp"]) if "timestamp" in cells else None
        except ValueError:
            stop_at(path, line, f"timestamp must be a number, not {cells['timestamp']!r}")
        yield Row(line, cells["user_id"], [cells["item_id"]], time)


def read_inter_json(path: Path) -> Iterator[Row]:
    """LC-Rec and LETTER: one object, the items of each user."""
    for user_id, items in read_json(path, dict).items():
        if not isinstance(items, list) or not items:
            stop_at(path, user_id, f"user {user_id!r} needs a list of items")
        yield Row(user_id, user_id, list(map(str, items)))


LAYOUTS = (                             # the first one of which a file is there counts
    ("MiniOneRec", "{}/*.csv", read_samples),
    ("MiniOneRec", "{}.csv", read_samples),
    ("RecBole, split", "*.{}.inter", read_samples),
    ("LC-Rec or LETTER", "*.inter.json", read_inter_json),
    ("RecBole", "*.inter", read_inter),
)


def make_samples(rows: list[Row], id_of: dict) -> list[dict]:
    """Our train, valid or test.jsonl, without unknown items."""
    samples = []
    for row in rows:
        *history, target = row.items
        history = [id_of[item] for item in history if item in id_of]
        if history and target in id_of:
            samples.append({"user_id": row.user_id, "history": history, "target": id_of[target]})
    return samples


def make_users(rows: list[Row], id_of: dict) -> list[dict]:
    """Our interactions.jsonl, without unknown items: by time, or in the order of the file without times."""
    pairs_of: dict[str, list] = {}
    for row in rows:
        known = [id_of[item] for item in row.items if item in id_of]
        pairs_of.setdefault(row.user_id, []).extend((row.time, item) for item in known)
    users = []
    for user_id, pairs in pairs_of.items():
        timed = rows[0].time is not None
        pairs.sort(key=lambda pair: pair[0] if timed else 0)            # equal times keep their order
        user = {"user_id": user_id, "items": [item for _, item in pairs]}
        if timed:
            user["timestamps"] = [int(time) if time.is_integer() else time for time, _ in pairs]
        users += [user] if pairs else []
    return users


# ---- Items, SIDs, meanings -----------------------------------------------------------------------

def text_of(value: object, between: str) -> str:
    """Plain text of a text or a list of texts, also of a list that Python printed."""
    if isinstance(value, str) and value.startswith("["):
        value = literal(value)
    texts = value if isinstance(value, list) else [value]
    return between.join(text for text in map(plain, texts) if text)


def read_items(path: Path) -> dict[str, dict]:
    """The items with a text, by their id in the file: an *.item.json, or an atomic *.item."""
    source = read_json(path, dict) if path.suffix == ".json" else {}
    for line, cells in read_table(path, ()) if not source else ():
        item_id = cells.get("item_id") or next(iter(cells.values()))
        if item_id in source:
            stop_at(path, line, f"item {item_id!r} is there twice")
        source[item_id] = cells
    items = {}
    for item_id, fields in source.items():
        if not isinstance(fields, dict):
            stop_at(path, item_id, f"item {item_id!r} must be an object with a title")
        item = {}
        for field, names in FIELDS.items():
            found = next((fields[name] for name in names if fields.get(name)), "")
            item[field] = text_of(found, " > " if field == "categories" else " ")
        if item_text(item):
            items[item_id] = item
    return items


def read_sids(path: Path, items: dict) -> dict[str, list[str]]:
    """The SID of every item, from an *.index.json."""
    index, num_levels = read_json(path, dict), 0
    for item_id in items:
        sid = index.get(item_id)
        tokens = sid if isinstance(sid, list) else []
        num_levels = num_levels or len(tokens)
        levels = "".join(match[1] for token in tokens if (match := SID_TOKEN.fullmatch(str(token))))
        if len(tokens) < 2 or len(tokens) != num_levels or levels != LEVELS[:num_levels]:
            stop_at(path, item_id, f"item {item_id!r} needs a SID like ['<a_1>', '<b_2>'], as long as the "
                    f"others, not {sid!r}; without this file, stage 1 makes the SIDs")
    return {item_id: index[item_id] for item_id in items}


def read_meanings(path: Path, sids: dict) -> list[dict]:
    """Our semantics.jsonl, one line per SID token, from a *.description_keywords.json."""
    n_items, rows = Counter(token for sid in sids.values() for token in sid), {}
    for entry in read_json(path, list):
        fields = entry if isinstance(entry, dict) else {}
        token, description, keywords = map(fields.get, ("token", "description", "keywords"))
        if not isinstance(description, str) or not isinstance(keywords, list) or not keywords:
            stop_at(path, str(token), f"token {token!r} needs a description and a list of keywords")
        if not isinstance(token, str) or token not in n_items:
            stop_at(path, str(token), f"no item has {token!r} in its SID; use files of one run")
        rows[token] = {"token": token, "description": description, "keywords": keywords,
                       "n_items": n_items[token], "sampled": [], "source": path.name}
    if missing := n_items.keys() - rows.keys():
        stop(f"{path}: no meaning of {min(missing)}; without this file, stage 2 finds the meanings")
    return list(rows.values())


# ---- Command line --------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    flag = parser.add_argument
    flag("folder", help="where the peers' files are, at any depth")
    flag("--out", required=True, metavar="DIR", help="folder for our files")
    flag("--name", default="", help="only files with this in their name, where there are several data sets")
    flag("--drop-unknown", action="store_true", help="leave out interactions with items that have no text")
    return parser.parse_args(argv)


def next_command(out: Path, names: dict) -> str:
    """The stages that are left, as one command."""
    run, data = (shlex.quote(str(path)) for path in (Path("runs") / out.resolve().name, out))
    steps = [f"python {name}.py --run {run}" for name in (
        "tokenize_items", "extract_semantics", "init_embeddings", "train", "evaluate")]
    steps[0] += f" --data {data}" + (f" --sids {data}/sids.jsonl" if "sids" in names else "")
    if "semantics" in names:
        steps[1] = f"cp {data}/semantics.jsonl {run}"
    return " && \\\n".join(steps)


def main() -> None:
    args = parse_args()
    folder, out = Path(args.folder), Path(args.out)
    for layout, pattern, read in LAYOUTS:
        outputs = PARTS if "{}" in pattern else ("interactions",)
        files = {output: find(folder, pattern.format(output), args.name) for output in outputs}
        if any(files.values()):
            break
    files["items"] = find(folder, "*.item.json", args.name) or find(folder, "*.item", args.name)
    if missing := [name for name, path in files.items() if not path]:
        stop(f"{folder}: no file for {', '.join(missing)}; the top of from_peers.py lists the layouts")
    found = {**files, "sids": find(folder, "*.index.json", args.name),
             "semantics": find(folder, "*.description_keywords.json", args.name)}
    print(f"{layout}, in {folder}:")
    for name, path in found.items():
        print(f"  {name:<14}{path.relative_to(folder) if path else '-'}")

    items, lines = read_items(files.pop("items")), {}
    numbers = all(re.fullmatch("0|[1-9][0-9]*", item) for item in items)
    id_of = {item: int(item) if numbers else item for item in items}
    lines["items"] = [{"item_id": id_of[item], **fields} for item, fields in items.items()]
    unknown = 0
    for output, path in files.items():
        rows = list(read(path))
        for row in rows:
            strange = [item for item in row.items if item not in id_of]
            unknown += len(strange)
            if strange and not args.drop_unknown:
                stop_at(path, row.line, f"item {strange[0]!r} has no title or description; add it to the "
                        "items, or leave such items out with --drop-unknown")
        lines[output] = (make_samples if output in PARTS else make_users)(rows, id_of)
    if found["sids"]:
        sids = read_sids(found["sids"], items)
        lines["sids"] = [{"item_id": id_of[item], "sid": sid} for item, sid in sids.items()]
        if found["semantics"]:
            lines["semantics"] = read_meanings(found["semantics"], sids)
    if empty := [name for name, rows in lines.items() if not rows]:
        stop(f"{folder}: nothing is left for {', '.join(empty)}")
    for name in {"interactions", *PARTS, *found} - set(lines):
        if (out / f"{name}.jsonl").exists():
            stop(f"{out}/{name}.jsonl is there already, of another data set; choose an empty folder")

    print(" | ".join(f"{len(rows)} {name}" for name, rows in lines.items())
          + (f" | {unknown} times an unknown item, left out" if unknown else ""))
    for name, rows in lines.items():
        write_jsonl(out / f"{name}.jsonl", rows)
    print(f"wrote {out}: {', '.join(f'{name}.jsonl' for name in lines)}")
    print(f"next:\n{next_command(out, lines)}")


if __name__ == "__main__":
    main()
