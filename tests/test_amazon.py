"""make_amazon.py: downloads that resume, from a real server; cleaning, window, k-core, both releases."""
import gzip
import json
import random
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tokenize_items
from conftest import (ROOT, assert_one_line_error, assert_stops, call, run_script, toy_interactions,
                      toy_items)

sys.path.insert(0, str(ROOT / "tests" / "data"))
import make_amazon  # noqa: E402

DAY = 86_400


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; `server.replies` says how the next GETs fail: a status, a cut or a wait."""

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.seen.append(wanted)
        failure = server.replies.pop(0) if server.replies else {}
        body = server.files.get(self.path.lstrip("/"))
        start = int(wanted[len("bytes="):-1]) if wanted and server.ranges else 0
        if "wait" in failure:
            server.stopped.wait(5)
        elif body is None or "status" in failure:
            self.send_error(failure.get("status", 404))
        elif start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.end_headers()
        else:
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - start))
            if self.path.endswith(".gz"):
                self.send_header("Content-Encoding", "gzip")        # as some hosts label such files
            self.end_headers()
            self.wfile.write(body[start:][:failure.get("cut")])

    def log_message(self, *_):
        pass


@pytest.fixture
def host(monkeypatch):
    """A server on loopback without files; no waiting between attempts."""
    monkeypatch.setattr(make_amazon, "RETRIES", make_amazon.RETRIES.new(backoff_factor=0))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.replies, server.seen, server.ranges = {}, [], [], True
    server.stopped = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.stopped.set()
    server.shutdown()
    server.server_close()
    thread.join()


NOISE = random.Random(0).randbytes(300_000)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- Download ------------------------------------------------------------------------------------

def test_a_cut_download_goes_on_where_it_stopped(host, tmp_path):
    host.files["a/b.csv"] = NOISE
    host.replies = [{"cut": 100_000}, {"cut": 80_000}]
    path = make_amazon.download(host.url, "a/b.csv", tmp_path)
    assert path == tmp_path / "a" / "b.csv" and path.read_bytes() == NOISE
    assert [p.name for p in path.parent.iterdir()] == ["b.csv"]
    assert host.seen[0] is None
    first, second = (int(wanted[6:-1]) for wanted in host.seen[1:])
    assert 0 < first <= 100_000 and first < second <= first + 80_000
    assert make_amazon.download(host.url, "a/b.csv", tmp_path) == path and len(host.seen) == 3  # cached


def test_a_later_run_goes_on_too(host, tmp_path, capsys, monkeypatch):
    host.files["b.csv"] = NOISE
    host.replies = [{"cut": 200_000}]
    monkeypatch.setattr(make_amazon, "ATTEMPTS", 1)
    assert_stops(capsys, make_amazon.download, host.url, "b.csv", tmp_path, words=(host.url, "run again"))
    assert [p.name for p in tmp_path.iterdir()] == ["b.csv.part"]
    assert make_amazon.download(host.url, "b.csv", tmp_path).read_bytes() == NOISE
    assert host.seen[0] is None and 0 < int(host.seen[1][6:-1]) <= 200_000


def test_a_host_without_ranges_sends_the_whole_file_again(host, tmp_path):
    host.files["b.csv"], host.ranges, host.replies = NOISE, False, [{"cut": 100_000}]
    assert make_amazon.download(host.url, "b.csv", tmp_path).read_bytes() == NOISE
    assert len(host.seen) == 2


def test_a_part_file_that_is_whole_already(host, tmp_path, capsys):
    host.files["b.csv"] = NOISE
    (tmp_path / "b.csv.part").write_bytes(NOISE)
    assert make_amazon.download(host.url, "b.csv", tmp_path).read_bytes() == NOISE
    assert host.seen == ["bytes=300000-"]
    host.files["c.csv"] = NOISE
    (tmp_path / "c.csv.part").write_bytes(NOISE + b"more")
    assert_stops(capsys, make_amazon.download, host.url, "c.csv", tmp_path,
                 words=("300004 of 300000 bytes", "delete", "c.csv.part"))


def test_a_gz_stays_a_gz(host, tmp_path):
    host.files["b.gz"] = gzip.compress(NOISE)
    host.replies = [{"cut": 100_000}]
    assert make_amazon.download(host.url, "b.gz", tmp_path).read_bytes() == host.files["b.gz"]
    assert 0 < int(host.seen[-1][6:-1]) <= 100_000


def test_refusals_stop_at_once_and_faults_are_tried_again(host, tmp_path, capsys, monkeypatch):
    flags = (make_amazon.download, host.url, "b.csv", tmp_path)
    assert_stops(capsys, *flags, words=("404", f"{host.url}/b.csv", "category", "--year"))
    host.files["b.csv"], host.replies = NOISE, [{"status": 403}]
    assert_stops(capsys, *flags, words=("403", "--url"))
    assert len(host.seen) == 2 and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(make_amazon, "TIMEOUT", (5, 0.2))
    host.replies = [{"status": 503}, {"status": 429}, {"wait": True}]
    assert make_amazon.download(*flags[1:]).read_bytes() == NOISE and len(host.seen) == 6
    host.files["c.csv"], host.replies = NOISE, [{"status": 500}] * 5
    assert_stops(capsys, make_amazon.download, host.url, "c.csv", tmp_path, words=("500", "try again"))
    (tmp_path / "file").write_text("not a folder")
    assert_stops(capsys, make_amazon.download, host.url, "b.csv", tmp_path / "file",
                 words=("cannot be written",))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://", "http://host:port", "ftp://host", "host"])
def test_a_host_that_is_not_there(tmp_path, capsys, monkeypatch, url):
    monkeypatch.setattr(make_amazon, "RETRIES", make_amazon.RETRIES.new(backoff_factor=0))
    assert_stops(capsys, make_amazon.download, url, "b.csv", tmp_path, words=("--url",))


@pytest.mark.parametrize("name, data", [
    ("cut.gz", gzip.compress(b"1\n" * 99_999)[:-20]), ("no.gz", b"<html>busy</html>"),
    ("bad.gz", gzip.compress(b"1\n" * 99)[:-8] + bytes(8)), ("word.csv", b"1\ntwo\n"),
    ("worse.gz", gzip.compress(b"1\n" * 99)[:12] + b"\xff" * 20), ("a.csv", b"1\n\xff\xfe\n")])
def test_a_damaged_file_is_one_line(tmp_path, capsys, name, data):
    (tmp_path / name).write_bytes(data)
    assert_stops(capsys, lambda: list(make_amazon.read_dump(tmp_path / name, int)),
                 words=(tmp_path / name, "delete it"))


# ---- Cleaning ------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, clean", [
    ("Nuts &amp; bolts, 1/2&quot; &#39;steel&#39;", "Nuts & bolts, 1/2\" 'steel'"),
    (None, ""), ([], ""), ("", ""), ([1, "m"], "1 m"), (" two\n\t words\xa0", "two words"),
    (["First <b>part</b>.", "Second<br>part."], "First part . Second part."),
    ("&lt;p&gt;Hidden&lt;/p&gt;", "Hidden"), ('<a href="http://x.y/z?a=b">link</a>', "link"),
    ("a <script type='x'>var aPageStart = 1 < 2;</script> b", "a b"), ("a <!-- <b> --> b", "a b"),
    ("5 < 6 and 7 > 2", "5 < 6 and 7 > 2"), ("below <100 C", "below <100 C"),
    ("rod \U0001f600", "rod \U0001f600")])
def test_plain(text, clean):
    assert make_amazon.plain(text) == clean


def metadata(tmp_path: Path, year: int, rows: list[dict], peers: bool = False) -> dict:
    """read_metadata on `rows`; all but the first are wanted."""
    path, release = tmp_path / "meta.json.gz", make_amazon.RELEASES[year]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return make_amazon.read_metadata(path, release, {row[release["item_id"]] for row in rows[1:]}, peers)


def test_metadata_fields_and_the_peers_filter(tmp_path):
    twenty = "a b c d e f g h i j k l m n o p q r s t"
    rows = [{"asin": "unwanted", "title": "Rod"},
            {"asin": "ok", "title": '"Acme&reg; rod" ', "description": ["Long.", "<i>Steel</i>"],
             "brand": "Acme", "category": ["Industrial &amp; Scientific", "", "<b>Rods</b>"]},
            {"asin": "twenty", "title": twenty}, {"asin": "twenty-one", "title": twenty + " u"},
            {"asin": "ok", "title": "another line of the same item"},
            {"asin": "span", "title": "<span id='x'>", "description": ["A rod"]},
            {"asin": "script", "title": "var a = (new Date()).getTime();", "description": "A rope"},
            {"asin": "untitled", "description": ["A beaker"]}, {"asin": "short", "title": "X"},
            {"asin": "empty", "title": None, "description": None, "brand": None, "category": None}]
    items = metadata(tmp_path, 2018, rows)
    assert list(items) == ["ok", "twenty", "twenty-one", "span", "script", "untitled", "short"]
    assert items["ok"] == {"item_id": "ok", "title": "Acme® rod", "description": "Long. Steel",
                           "brand": "Acme", "categories": "Industrial & Scientific > Rods"}
    assert [items[i]["title"] for i in ("span", "script", "untitled")] == ["", "", ""]
    assert list(metadata(tmp_path, 2018, rows, peers=True)) == ["ok", "twenty"]
    rows = [{"parent_asin": "unwanted", "title": "Rod"},
            {"parent_asin": "p", "asin": "q", "title": "Rod", "description": [],
             "features": ["x &amp;", "y"], "store": "Ajax", "categories": ["Industrial", "Rods"]}]
    assert metadata(tmp_path, 2023, rows) == {
        "p": {"item_id": "p", "title": "Rod", "description": "x & y", "brand": "Ajax",
              "categories": "Industrial > Rods"}}


@pytest.mark.parametrize("line", ['{"asin": 1', "[]", '{"title": "no id"}', "7"])
def test_a_bad_metadata_row_names_its_line(tmp_path, capsys, line):
    path = tmp_path / "meta.json.gz"
    path.write_bytes(gzip.compress(f'{{"asin": "a", "title": "Rod"}}\n{line}\n'.encode()))
    assert_stops(capsys, make_amazon.read_metadata, path, make_amazon.RELEASES[2018], {"a"}, False,
                 words=("meta.json.gz", "line 2"))


def test_a_bad_rating_names_its_line(tmp_path, capsys):
    path = tmp_path / "r.csv"
    for content, line in (("B1,u,5.0,17\nB1,u\n", 2), ("<html>\n", 1), ("B1,u,5.0,17\nB1,u,5.0,noon\n", 2)):
        path.write_text(content)
        ratings = make_amazon.read_ratings(path, make_amazon.RELEASES[2018], 0, 1e12)
        assert_stops(capsys, list, ratings, words=("r.csv", f"line {line}"))


@pytest.mark.parametrize("year, unit", [(2018, 1), (2023, 1000)])
def test_the_window_takes_its_first_second_and_not_the_next_months(tmp_path, year, unit):
    since, until = make_amazon.month("2016-10"), make_amazon.month("2016-12")
    low, high = unit * since, unit * until
    rows = [("u", "i", t) for t in (0, low - 1, low, high - 1, high, 2 * high)]
    lines = ["user_id,parent_asin,rating,timestamp\n"] * (year == 2023)
    lines += [f"i,u,5.0,{t}\n" if year == 2018 else f"u,i,5.0,{t}\n" for _, _, t in rows]
    path, release = tmp_path / "r.csv", make_amazon.RELEASES[year]
    path.write_text("".join(lines))
    assert list(make_amazon.read_ratings(path, release, since, until)) == rows[2:4]
    assert list(make_amazon.read_ratings(path, release, 0, float("inf"))) == rows


# ---- From the downloaded files to the two input files --------------------------------------------

def serve(host, year: int, ratings: list[tuple], rows: list[dict]) -> None:
    """Offer a category "Toys": ratings are (user, item, seconds), rows the lines of the metadata."""
    if year == 2018:
        lines = [f"{item},{user},5.0,{seconds}\n" for user, item, seconds in ratings]
    else:
        lines = ["user_id,parent_asin,rating,timestamp\n"]
        lines += [f"{user},{item},5.0,{1000 * seconds + 7}\n" for user, item, seconds in ratings]
    csv, meta = "".join(lines).encode(), "".join(json.dumps(row) + "\n" for row in rows).encode()
    release = make_amazon.RELEASES[year]
    host.files[release["ratings"].format("Toys")] = gzip.compress(csv) if year == 2023 else csv
    host.files[release["metadata"].format("Toys")] = gzip.compress(meta)


def raw_items(year: int) -> list[dict]:
    """The toy catalogue as the metadata of that release, with item ids like B007."""
    names = make_amazon.RELEASES[year]
    return [{names["item_id"]: f"B{item['item_id']:03}", "title": item["title"],
             "description": [item["description"]], names["brand"]: item["brand"],
             names["categories"]: item["categories"].split(" > ")} for item in toy_items()]


def slow_core(ratings: list[tuple], least: int) -> list[tuple]:
    """Drop one weak rating (user, item, time) at a time."""
    ratings = list(ratings)
    while True:
        users, items = Counter(u for u, _, _ in ratings), Counter(i for _, i, _ in ratings)
        weak = [r for r in ratings if users[r[0]] < least or items[r[1]] < least]
        if not weak:
            return ratings
        ratings.remove(weak[0])


def test_k_core_equals_a_naive_loop():
    rng = random.Random(1)
    ratings = [(u, min(rng.randrange(30), rng.randrange(30)), t)
               for u in range(30) for t in range(rng.randrange(2, 12))]
    histories = {}
    for user, item, when in ratings:
        histories.setdefault(user, []).append((when, item))
    kept = [(user, item, when) for user, pairs in make_amazon.k_core(histories, 4).items()
            for when, item in pairs]
    assert kept == slow_core(ratings, 4) and 0 < len(kept) < len(ratings)
    assert make_amazon.k_core(histories, 1000) == {}


@pytest.mark.parametrize("year", [2018, 2023])
def test_both_releases_end_to_end(host, tmp_path, capsys, year):
    start = make_amazon.month("2016-10")
    ratings = [(user["user_id"], f"B{i:03}", start + DAY * (time % 100) * 40)
               for user in toy_interactions() for i, time in zip(user["items"], user["timestamps"])]
    ratings += [("u1", "B999", start + DAY), ("u1", "B998", start + DAY)] * 5       # no metadata, no text
    random.Random(0).shuffle(ratings)
    serve(host, year, ratings, [*raw_items(year), {"asin": "B998", "parent_asin": "B998"}])
    flags = ("Toys", "--year", year, "--cache", tmp_path / "cache", "--url", host.url,
             "--since", "2016-10", "--until", "2017-04", "--min-count", 3, "--out")
    call(make_amazon, *flags, tmp_path / "data")
    out, data = capsys.readouterr().out, tmp_path / "data"
    high = make_amazon.month("2017-04")
    kept = slow_core([r for r in ratings if r[2] < high and r[1] < "B900"], 3)
    users, items = read(data / "interactions.jsonl"), read(data / "items.jsonl")
    unit, rest = (1, 0) if year == 2018 else (1000, 7)
    written = [(u["user_id"], i, (t - rest) // unit) for u in users
               for i, t in zip(u["items"], u["timestamps"])]
    assert sorted(written) == sorted(kept) and 0 < len(kept) < len(ratings)
    assert all(u["timestamps"] == sorted(u["timestamps"]) for u in users)
    wanted = {i for _, i, _ in kept}
    renamed = [{**item, "item_id": f"B{item['item_id']:03}"} for item in toy_items()]
    assert items == [item for item in renamed if item["item_id"] in wanted]
    assert f"amazon {year} Toys | " in out and "3-core" in out
    assert f"{len(users)} users, {len(items)} items, {len(kept)} interactions" in out
    assert len(host.seen) == 2
    host.files.clear()                                                  # from the cache
    call(make_amazon, *flags, tmp_path / "again")
    assert read(tmp_path / "again" / "interactions.jsonl") == users and len(host.seen) == 2
    call(tokenize_items, "--run", tmp_path / "run", "--data", data, "--codebook-size", 8)
    tokenized = read(tmp_path / "run" / "items.jsonl")
    assert [{k: v for k, v in item.items() if k != "sid"} for item in tokenized] == items


def test_five_core_repeats_and_peers_by_hand(host, tmp_path, capsys):
    """u0-u4 rate a-e; v0-v4 a-d and "long"; v0-v3 g; w0-w4 only h; u0 rates a twice at once."""
    ratings = [(f"u{u}", item, DAY * day) for u in range(5) for day, item in enumerate("abcde")]
    ratings += [(f"v{v}", item, DAY * day) for v in range(5) for day, item in enumerate("abcd")]
    ratings += [(f"v{v}", "g", 9 * DAY) for v in range(4)]
    ratings += [("u0", "a", 0), ("u0", "a", DAY), ("u1", "long", 0)]
    ratings += [(f"v{v}", "long", 8 * DAY) for v in range(5)] + [(f"w{w}", "h", DAY) for w in range(5)]
    rows = [{"asin": c, "title": f"Item {c}"} for c in "abcdegh"] + [{"asin": "long", "title": "word " * 21}]
    serve(host, 2018, ratings, rows)
    flags = ("Toys", "--out", tmp_path, "--cache", tmp_path / "cache", "--url", host.url)
    call(make_amazon, *flags)                                           # "long" keeps the five v
    users = {u["user_id"]: u for u in read(tmp_path / "interactions.jsonl")}
    assert users["u0"] == {"user_id": "u0", "items": list("abacde"),
                           "timestamps": [0, DAY, DAY, 2 * DAY, 3 * DAY, 4 * DAY]}
    assert users["u1"]["items"] == ["a", "long", *"bcde"] and users["v0"]["items"] == [*"abcd", "long"]
    assert "10 users, 6 items, 52 interactions" in capsys.readouterr().out
    call(make_amazon, *flags, "--peers")                                # no "long", no v; u0's repeat stays
    users = read(tmp_path / "interactions.jsonl")
    assert [u["user_id"] for u in users] == [f"u{n}" for n in range(5)]
    assert [u["items"] for u in users] == [list("aabacde")] + [list("abcde")] * 4
    assert [i["item_id"] for i in read(tmp_path / "items.jsonl")] == list("abcde")
    assert "5 users, 5 items, 27 interactions" in capsys.readouterr().out


# ---- Command line --------------------------------------------------------------------------------

def test_nothing_left(host, tmp_path, capsys):
    serve(host, 2018, [("u", "B001", 5)] * 7, raw_items(2018))
    flags = ("Toys", "--out", tmp_path / "out", "--cache", tmp_path / "cache", "--url", host.url)
    for more in ((), ("--since", "2017-01")):
        assert_stops(capsys, call, make_amazon, *flags, *more, words=("nothing is left", "--min-count"))
    assert not (tmp_path / "out").exists()


def test_months_and_defaults():
    assert make_amazon.month("1970-01") == 0 and make_amazon.month("1970-02") == 31 * DAY
    args = make_amazon.parse_args(["Toys", "--out", "x", "--since", "2016-10", "--until", "2018-11"])
    assert (args.since, args.until) == (1_475_280_000, 1_541_030_400)   # 2016-10-01 and 2018-11-01, UTC
    assert (args.min_count, args.year, args.peers) == (5, 2018, False)


@pytest.mark.parametrize("flags", [
    [], ["Toys"], ["--out", "x"], ["Toys", "--out", "x", "--year", "2014"],
    ["Toys", "--out", "x", "--since", "2016"], ["Toys", "--out", "x", "--since", "2016-13"],
    ["Toys", "--out", "x", "--min-count", "0"]])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        make_amazon.parse_args(flags)
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err


def test_the_window_must_not_be_empty(capsys):
    assert_stops(capsys, call, make_amazon, "Toys", "--out", "x", "--since", "2018-01", "--until", "2018-01",
                 words=("--since", "--until"))


def test_as_a_user_sees_it(host, tmp_path):
    script = Path("tests") / "data" / "make_amazon.py"
    done = run_script(script, "Toyz", "--out", tmp_path / "out", "--cache", tmp_path / "cache",
                      "--url", host.url)
    assert_one_line_error(done, "404", "Toyz.csv", "category")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        call(make_amazon, "--help")
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "Amazon reviews" in text and "--peers" in text
