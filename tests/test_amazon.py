"""The Amazon download: resume, damage and refusals against a real server; cleaning, window, core, both releases."""
import base64
import gzip
import hashlib
import json
import random
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tokenize_items as stage
from conftest import assert_one_line_error, assert_stops, call, run_script, toy_interactions, toy_items

RATINGS = {2018: "amazon_v2/categoryFilesSmall/{}.csv",
           2023: "amazon_2023/benchmark/0core/rating_only/{}.csv.gz"}
METADATA = {2018: "amazon_v2/metaFiles2/meta_{}.json.gz", 2023: "amazon_2023/raw/meta_categories/meta_{}.jsonl.gz"}
DAY = 86_400


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; `server.replies` says what befalls the next GETs: a status, a cut or a short body."""

    def answer(self, status: int = 200, cut: int | None = None, short: int | None = None):
        server, wanted = self.server, self.headers.get("Range")
        body = server.files.get(self.path.lstrip("/"), b"")[:short] or None
        if body is None or status != 200:
            return self.send_error(404 if status == 200 else status)
        start = 0
        if wanted and server.ranges and self.headers.get("If-Range") == server.extra.get("ETag"):
            start, status = int(wanted[len("bytes="):-1]), 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        for name, value in {"Content-Length": len(body) - start, **server.extra}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[start:][:cut])

    do_HEAD = answer

    def do_GET(self):
        self.server.seen.append(self.headers.get("Range"))
        kind, value = self.server.replies.pop(0) if self.server.replies else ("cut", None)
        if kind == "hang":
            self.server.hang.wait(5)
        else:
            self.answer(**{kind: value})

    def log_message(self, *_):
        pass


@pytest.fixture
def host(monkeypatch):
    """A server on loopback with nothing in it; no waiting between attempts."""
    monkeypatch.setattr(stage, "WAITS", (0, 0, 0, None))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.replies, server.seen, server.ranges = {}, [], [], True
    server.extra, server.hang = {"ETag": '"v1"'}, threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.hang.set()
    server.shutdown()
    server.server_close()
    thread.join()


def noise(size: int = 300_000) -> bytes:
    return random.Random(0).randbytes(size)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------------------
# Download
# ---------------------------------------------------------------------------------------------------------

def test_a_cut_download_goes_on_where_it_stopped(host, tmp_path):
    host.files["a/b.csv"] = noise()
    host.replies = [("cut", 100_000), ("cut", 80_000)]
    path = stage.download(f"{host.url}/a/b.csv", tmp_path / "a" / "b.csv")
    assert path.read_bytes() == noise() and [p.name for p in path.parent.iterdir()] == ["b.csv"]
    first, second = (int(r[6:-1]) for r in host.seen[1:])
    assert 0 < first <= 100_000 and first < second <= first + 80_000 and host.seen[0] is None
    assert stage.download(f"{host.url}/a/b.csv", path) == path and len(host.seen) == 3      # cached


def test_a_later_run_goes_on_too(host, tmp_path, capsys, monkeypatch):
    host.files["b.csv"], path = noise(), tmp_path / "b.csv"
    monkeypatch.setattr(stage, "WAITS", (None,))
    host.replies = [("cut", 200_000)]
    assert_stops(capsys, stage.download, f"{host.url}/b.csv", path, words=(host.url, "kept", "run again"))
    assert not path.exists() and len(list(tmp_path.glob("*.part"))) == 1
    stage.download(f"{host.url}/b.csv", path)
    assert path.read_bytes() == noise() and host.seen[0] is None and 0 < int(host.seen[1][6:-1]) <= 200_000


@pytest.mark.parametrize("extra, ranges", [({"ETag": '"v1"'}, False), ({}, True), ({"ETag": 'W/"v1"'}, True)])
def test_where_nothing_can_be_resumed_it_starts_over(host, tmp_path, extra, ranges):
    host.files["b.csv"], host.extra, host.ranges, path = noise(), extra, ranges, tmp_path / "b.csv"
    host.replies = [("cut", 100_000)]
    stage.download(f"{host.url}/b.csv", path)
    assert path.read_bytes() == noise() and (host.seen == [None, None]) == ranges


def test_a_new_version_starts_over(host, tmp_path, capsys, monkeypatch):
    path = tmp_path / "b.csv"
    monkeypatch.setattr(stage, "WAITS", (None,))
    host.files["b.csv"], host.replies = noise()[::-1], [("cut", 200_000)]
    assert_stops(capsys, stage.download, f"{host.url}/b.csv", path)
    host.files["b.csv"], host.extra = noise(), {"Last-Modified": "Fri, 20 Nov 2026 11:00:00 GMT"}
    stage.download(f"{host.url}/b.csv", path)
    assert path.read_bytes() == noise()


def test_a_body_shorter_than_the_file_is_a_cut(host, tmp_path):
    host.files["b.csv"], host.replies = noise(), [("short", 100_000)]
    assert stage.download(f"{host.url}/b.csv", tmp_path / "b.csv").read_bytes() == noise()
    assert host.seen == [None, "bytes=100000-"]


def test_the_version_changes_between_asking_and_resuming(host, tmp_path, monkeypatch):
    host.files["b.csv"], path = noise(), tmp_path / "b.csv"
    host.replies, get = [("cut", 100_000)], stage.requests.get

    def changing(url, headers, **options):
        if "Range" in headers:
            host.extra, host.files["b.csv"] = {"ETag": '"v2"'}, noise()[::-1]
        return get(url, headers=headers, **options)
    monkeypatch.setattr(stage.requests, "get", changing)
    stage.download(f"{host.url}/b.csv", path)
    assert path.read_bytes() == noise()[::-1]


def test_the_hosts_checksum(host, tmp_path, capsys):
    host.files["b.csv"], path = noise(), tmp_path / "b.csv"
    right, wrong = (base64.b64encode(hashlib.md5(data).digest()).decode() for data in (noise(), b"other"))
    host.extra["Content-MD5"] = wrong
    assert_stops(capsys, stage.download, f"{host.url}/b.csv", path, words=(f"{host.url}/b.csv", "Content-MD5"))
    assert list(tmp_path.iterdir()) == [] and len(host.seen) == 1
    host.extra["Content-MD5"], host.replies = right, [("cut", 100_000)]
    stage.download(f"{host.url}/b.csv", path)                           # the whole file's, resumed or not
    assert path.read_bytes() == noise()


def test_refusals_stop_at_once_and_faults_are_tried_again(host, tmp_path, capsys, monkeypatch):
    path = tmp_path / "b.csv"
    assert_stops(capsys, stage.download, f"{host.url}/b.csv", path, words=("404", f"{host.url}/b.csv", "--year"))
    assert host.seen == [] and not path.exists()
    host.files["b.csv"], host.replies = b"x", [("status", 403)]
    assert_stops(capsys, stage.download, f"{host.url}/b.csv", path, words=("403", "--amazon-url"))
    assert len(host.seen) == 1 and not path.exists()
    host.files["b.csv"] = noise()
    monkeypatch.setattr(stage, "TIMEOUT", (5, 0.2))
    host.replies = [("status", 503), ("status", 429), ("hang", None)]
    assert stage.download(f"{host.url}/b.csv", path).read_bytes() == noise() and len(host.seen) == 5
    path.unlink()
    host.replies = [("status", 500)] * 4
    assert_stops(capsys, stage.download, f"{host.url}/b.csv", path, words=("500", "run again"))
    (tmp_path / "file").write_text("no folder")
    assert_stops(capsys, stage.download, f"{host.url}/b.csv", tmp_path / "file" / "b.csv", words=("cannot be written",))


def test_nobody_listens(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stage, "WAITS", (0, None))
    assert_stops(capsys, stage.download, "http://127.0.0.1:9/b.csv", tmp_path / "b.csv", words=("run again",))


@pytest.mark.parametrize("url", ["http://", "http://host:port", "httpx://host"])
def test_a_url_that_is_none_is_not_tried_again(tmp_path, capsys, monkeypatch, url):
    monkeypatch.setattr(stage, "WAITS", ("no number of seconds",))
    assert_stops(capsys, stage.download, f"{url}/b.csv", tmp_path / "b.csv", words=("--amazon-url",))


def test_a_gz_stays_a_gz(host, tmp_path):
    host.files["b.gz"] = gzip.compress(noise())
    host.extra["Content-Encoding"] = "gzip"                             # as some hosts label such files
    host.replies = [("cut", 100_000)]
    assert stage.download(f"{host.url}/b.gz", tmp_path / "b.gz").read_bytes() == host.files["b.gz"]
    assert 0 < int(host.seen[-1][6:-1]) <= 100_000


@pytest.mark.parametrize("name, data", [
    ("cut.gz", gzip.compress(b"1\n" * 99_999)[:-20]), ("no.gz", b"<html>busy</html>"), ("a.csv", b"1\n\xff\xfe\n"),
    ("bad.gz", gzip.compress(b"1\n" * 99)[:-8] + bytes(8)), ("word.csv", b"1\ntwo\n"),
    ("worse.gz", gzip.compress(b"1\n" * 99)[:12] + b"\xff" * 20)])
def test_damaged_files_are_one_line(tmp_path, capsys, name, data):
    (tmp_path / name).write_bytes(data)
    assert_stops(capsys, lambda: list(stage.read_dump(tmp_path / name, int)), words=(tmp_path / name, "delete it"))


# ---------------------------------------------------------------------------------------------------------
# Cleaning
# ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("field, text", [
    ("Nuts &amp; bolts, 1/2&quot; &#39;steel&#39;", "Nuts & bolts, 1/2\" 'steel'"), (None, ""), ([], ""), ("", ""),
    (["First <b>part</b>.", "Second<br>part."], "First part . Second part."), ("&lt;p&gt;Hidden&lt;/p&gt;", "Hidden"),
    ("a <script type='x'>var aPageStart = 1 < 2;</script> b", "a b"), ("a <!-- <b> --> b", "a b"),
    ("5 < 6 and 7 > 2", "5 < 6 and 7 > 2"), ("below <100 C", "below <100 C"), (" two\n\t words\xa0", "two words"),
    ('<a href="http://x.y/z?a=b">link</a>', "link"), ([1, "m"], "1 m"),
    ("rod \ud83d!", "rod !"), ("rod \U0001f600", "rod \U0001f600")])
def test_plain(field, text):
    assert stage.plain(field) == text


def amazon_args(*flags):
    return stage.parse_args(["--amazon", "Toys", *map(str, flags)])


def metadata(tmp_path, *flags, rows) -> dict:
    path = tmp_path / "meta.json.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return stage.read_metadata(path, amazon_args(*flags), {row.get("parent_asin", row.get("asin")) for row in rows[1:]})


def test_metadata_fields_and_the_peers_filter(tmp_path):
    rows = [{"asin": "unwanted", "title": "Rod"},
            {"asin": "ok", "title": '"Acme&reg; rod" ', "description": ["Long.", "<i>Steel</i>"], "brand": "Acme",
             "category": ["Industrial &amp; Scientific", "", "<b>Rods</b>"], "price": "$5"},
            {"asin": "twenty", "title": " ".join("abcdefghijklmnopqrst")},
            {"asin": "twenty-one", "title": " ".join("abcdefghijklmnopqrstu")},
            {"asin": "ok", "title": "another line of the same item"},
            {"asin": "span", "title": "<span id='x'>", "description": ["A rod"]},
            {"asin": "script", "title": "var aPageStart = (new Date()).getTime();", "description": "A rope"},
            {"asin": "untitled", "description": ["A beaker"]}, {"asin": "short", "title": "X"},
            {"asin": "empty", "title": None, "description": None, "brand": None, "category": None}]
    items = metadata(tmp_path, rows=rows)
    assert list(items) == ["ok", "twenty", "twenty-one", "span", "script", "untitled", "short"]
    assert items["ok"] == {"item_id": "ok", "title": "Acme® rod", "description": "Long. Steel", "brand": "Acme",
                           "categories": "Industrial & Scientific > Rods"}
    assert [items[i]["title"] for i in ("span", "script", "untitled")] == ["", "", ""]
    assert list(metadata(tmp_path, "--peers", rows=rows)) == ["ok", "twenty"]
    rows = [{"parent_asin": "unwanted", "title": "Rod"},
            {"parent_asin": "p", "asin": "q", "title": "Rod", "description": [], "features": ["x &amp;", "y"],
             "store": "Ajax", "categories": ["Industrial", "Rods"]}]
    assert metadata(tmp_path, "--year", 2023, rows=rows) == {
        "p": {"item_id": "p", "title": "Rod", "description": "x & y", "brand": "Ajax",
              "categories": "Industrial > Rods"}}


@pytest.mark.parametrize("line", ["{\"asin\": 1", "[]", "{\"title\": \"no id\"}", "7"])
def test_metadata_that_is_none(tmp_path, capsys, line):
    (tmp_path / "meta.json.gz").write_bytes(gzip.compress(f'{{"asin": "a", "title": "Rod"}}\n{line}\n'.encode()))
    assert_stops(capsys, stage.read_metadata, tmp_path / "meta.json.gz", amazon_args(), {"a"},
                 words=("meta.json.gz", "line 2"))


# ---------------------------------------------------------------------------------------------------------
# From the dumps to the two input files
# ---------------------------------------------------------------------------------------------------------

def serve(host, year: int, ratings: list[tuple], rows: list[dict], category: str = "Toys") -> None:
    """Lay out a category as the host does: ratings are (user, item, seconds), rows what the metadata file holds."""
    if year == 2018:
        lines = [f"{item},{user},5.0,{seconds}\n" for user, item, seconds in ratings]
    else:
        lines = ["user_id,parent_asin,rating,timestamp\n"]
        lines += [f"{user},{item},5.0,{1000 * seconds + 7}\n" for user, item, seconds in ratings]
    csv, meta = "".join(lines).encode(), "".join(json.dumps(row) + "\n" for row in rows).encode()
    host.files[RATINGS[year].format(category)] = gzip.compress(csv) if year == 2023 else csv
    host.files[METADATA[year].format(category)] = gzip.compress(meta)


def raw_items(year: int) -> list[dict]:
    """The toy catalogue as a metadata file of that release, with item ids like B007."""
    names = ("asin", "brand", "category") if year == 2018 else ("parent_asin", "store", "categories")
    return [{names[0]: f"B{item['item_id']:03}", "title": item["title"], "description": [item["description"]],
             names[1]: item["brand"], names[2]: item["categories"].split(" > ")} for item in toy_items()]


def slow_core(ratings: list[tuple], least: int) -> list[tuple]:
    """Drop one weak rating at a time."""
    ratings = list(ratings)
    while True:
        users, items = Counter(u for u, _, _ in ratings), Counter(i for _, i, _ in ratings)
        weak = [r for r in ratings if users[r[0]] < least or items[r[1]] < least]
        if not weak:
            return ratings
        ratings.remove(weak[0])


@pytest.mark.parametrize("year", [2018, 2023])
def test_both_releases_end_to_end(host, tmp_path, capsys, year):
    start = stage.month("2016-10")
    ratings = [(user["user_id"], f"B{i:03}", start + DAY * (user["timestamps"][t] % 100) * 40)
               for user in toy_interactions() for t, i in enumerate(user["items"])]
    ratings += [("u1", "B999", start + DAY), ("u1", "B998", start + DAY)] * 5           # no metadata, no text
    random.Random(0).shuffle(ratings)
    serve(host, year, ratings, [*raw_items(year), {"asin": "B998", "parent_asin": "B998"}])
    flags = ("--run", tmp_path / "run", "--amazon", "Toys", "--year", year, "--cache", tmp_path / "cache",
             "--amazon-url", host.url, "--since", "2016-10", "--until", "2017-04", "--min-count", 3,
             "--codebook-size", 8)
    call(stage, *flags)
    out, data = capsys.readouterr().out, tmp_path / "run" / "data"
    high = stage.month("2017-04")
    kept = slow_core([r for r in ratings if r[2] < high and r[1] < "B900"], 3)
    users, items = read(data / "interactions.jsonl"), read(data / "items.jsonl")
    unit, rest = (1, 0) if year == 2018 else (1000, 7)
    assert sorted((u["user_id"], i, (t - rest) // unit) for u in users for i, t in zip(u["items"], u["timestamps"])
                  ) == sorted(kept) and 0 < len(kept) < len(ratings)
    assert all(u["timestamps"] == sorted(u["timestamps"]) for u in users)
    wanted = {i for _, i, _ in kept}
    assert items == [{**item, "item_id": f"B{item['item_id']:03}"} for item in toy_items()
                     if f"B{item['item_id']:03}" in wanted]
    assert f"{len(users)} users, {len(items)} items, {len(kept)} interactions" in out
    assert [{k: v for k, v in i.items() if k != "sid"} for i in read(tmp_path / "run" / "items.jsonl")] == items
    assert len(host.seen) == 2
    host.files.clear()                                                  # from the cache, and RUN/data as --data
    before = (tmp_path / "run" / "train.jsonl").read_bytes()
    call(stage, *flags)
    call(stage, "--run", tmp_path / "other", "--data", data, "--codebook-size", 8)
    assert len(host.seen) == 2 and (tmp_path / "other" / "train.jsonl").read_bytes() == before


def test_five_core_repeats_and_peers_by_hand(host, tmp_path, capsys):
    """Users u0-u4 rate a-e. v0-v4 rate a-d and "long", v0-v3 g, w0-w4 h alone; u0 rates a twice at once."""
    ratings = [(f"u{u}", item, DAY * day) for u in range(5) for day, item in enumerate("abcde")]
    ratings += [(f"v{v}", item, DAY * day) for v in range(5) for day, item in enumerate("abcd")]
    ratings += [(f"v{v}", "g", 9 * DAY) for v in range(4)] + [("u0", "a", 0), ("u0", "a", DAY), ("u1", "long", 0)] + [
        (f"v{v}", "long", 8 * DAY) for v in range(5)] + [(f"w{w}", "h", DAY) for w in range(5)]
    rows = [{"asin": c, "title": f"Item {c}"} for c in "abcdegh"] + [{"asin": "long", "title": "word " * 21}]
    serve(host, 2018, ratings, rows)
    flags = ("--run", tmp_path, "--cache", tmp_path / "cache", "--amazon-url", host.url)
    stage.prepare_amazon(amazon_args(*flags))                           # "long" keeps the five v in
    users = {u["user_id"]: u for u in read(tmp_path / "data" / "interactions.jsonl")}
    assert users["u0"] == {"user_id": "u0", "items": list("abacde"),
                           "timestamps": [0, DAY, DAY, 2 * DAY, 3 * DAY, 4 * DAY]}
    assert users["u1"]["items"] == ["a", "long", *"bcde"] and users["v0"]["items"] == [*"abcd", "long"]
    assert "10 users, 6 items, 52 interactions" in capsys.readouterr().out
    stage.prepare_amazon(amazon_args(*flags, "--peers"))              # without it they fall; u0's repeat stays
    users = read(tmp_path / "data" / "interactions.jsonl")
    assert [u["user_id"] for u in users] == [f"u{n}" for n in range(5)]
    assert [u["items"] for u in users] == [list("aabacde")] + [list("abcde")] * 4
    assert [i["item_id"] for i in read(tmp_path / "data" / "items.jsonl")] == list("abcde")
    assert "5 users, 5 items, 27 interactions" in capsys.readouterr().out


def test_chronological_is_the_peers_split():
    """One sample per target but the first, by its time (users in order where equal), cut at 80 and 90 %."""
    rng = random.Random(2)
    users = [{"user_id": u, "items": [rng.randrange(9) for _ in range(6)],
              "timestamps": sorted(rng.randrange(40) for _ in range(6))} for u in range(31)]
    peers = [(user["timestamps"][t], user["user_id"], user["items"][:t], user["items"][t])
             for user in users for t in range(1, 6)]
    peers.sort(key=lambda sample: sample[0])
    cuts = (0, int(0.8 * len(peers)), int(0.9 * len(peers)), len(peers))
    ours = stage.split_samples(users, "chronological")
    for name, low, high in zip(("train", "valid", "test"), cuts, cuts[1:]):
        assert [(s["user_id"], s["history"], s["target"]) for s in ours[name]] == [p[1:] for p in peers[low:high]]


# ---------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------

def test_nothing_left(host, tmp_path, capsys):
    serve(host, 2018, [("u", "B001", 5)] * 7, raw_items(2018))
    flags = ("--run", tmp_path / "run", "--amazon", "Toys", "--cache", tmp_path / "cache", "--amazon-url", host.url)
    for more in ((), ("--since", "2017-01")):
        assert_stops(capsys, call, stage, *flags, *more, words=("nothing is left", "--min-count"))
    assert not (tmp_path / "run").exists()


def test_a_bad_rating_names_its_line(tmp_path, capsys):
    for content, line in (("B1,u,5.0,17\nB1,u\n", 2), ("<html>\n", 1), ("B1,u,5.0,17\nB1,u,5.0,noon\n", 2)):
        (tmp_path / "r.csv").write_text(content)
        assert_stops(capsys, lambda: list(stage.read_ratings(tmp_path / "r.csv", amazon_args())),
                     words=("r.csv", f"line {line}"))


@pytest.mark.parametrize("year, unit", [(2018, 1), (2023, 1000)])
def test_the_window_takes_its_first_second_and_not_the_next_months(tmp_path, year, unit):
    low, high = (unit * stage.month(m) for m in ("2016-10", "2016-12"))
    rows = [("u", "i", t) for t in (0, low - 1, low, high - 1, high, 2 * high)]
    lines = ["user_id,parent_asin,rating,timestamp\n"] * (year == 2023)
    lines += [f"i,u,5.0,{t}\n" if year == 2018 else f"u,i,5.0,{t}\n" for _, _, t in rows]
    (tmp_path / "r.csv").write_text("".join(lines))
    args = amazon_args("--year", year, "--since", "2016-10", "--until", "2016-12")
    assert list(stage.read_ratings(tmp_path / "r.csv", args)) == rows[2:4]
    assert list(stage.read_ratings(tmp_path / "r.csv", amazon_args("--year", year))) == rows


def test_months():
    assert stage.month("1970-01") == 0 and stage.month("1970-02") == 31 * DAY
    args = amazon_args("--since", "2016-10", "--until", "2018-11")
    assert (args.since, args.until) == (1_475_280_000, 1_541_030_400)   # 2016-10-01 and 2018-11-01, UTC


@pytest.mark.parametrize("flags", [
    ["--amazon"], ["--amazon", "Toys", "--year", "2014"], ["--amazon", "Toys", "--since", "2016"],
    ["--amazon", "Toys", "--since", "2016-13"], ["--amazon", "Toys", "--since", "2018-01", "--until", "2018-01"],
    ["--amazon", "Toys", "--data", "x"], ["--amazon", "Toys", "--items", "x"],
    ["--amazon", "Toys", "--interactions", "x"],
    ["--amazon", "Toys", "--items", "x", "--codebook", "y"], ["--amazon", "Toys", "--amazon-url", "ftp.host"],
    ["--peers"], ["--since", "2016-10"], ["--until", "2016-10"]])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        stage.parse_args(flags)
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err


def test_min_count_and_data_follow_amazon():
    args = stage.parse_args(["--amazon", "Toys", "--run", "r"])
    assert (args.min_count, Path(args.data), args.split, args.year) == (5, Path("r/data"), "leave-one-out", 2018)
    assert amazon_args("--min-count", 2).min_count == 2 and stage.parse_args([]).min_count == 1


def test_as_a_user_sees_it(host, tmp_path):
    done = run_script("tokenize_items.py", "--run", tmp_path / "run", "--amazon", "Toyz", "--cache", tmp_path / "cache",
                      "--amazon-url", host.url)
    assert_one_line_error(done, "404", "Toyz.csv", "--amazon")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
