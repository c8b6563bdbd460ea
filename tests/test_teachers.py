"""Stage 2's language models as teachers, against a real server on loopback; search queries."""
import json
import re
import signal
import threading
import time
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import urllib3
from conftest import assert_stops, call, toy_items, write_lines

import extract_semantics as stage

SECRET = "sk-0123456789-very-secret"
WORDS = "fastening measuring sealing storage workshop laboratory steel glass rope filter".split()
TEXT = "These items serve a workshop. They come in various sizes, e.g. Small ones. They last."
GOOD = {"description": TEXT, "keywords": WORDS}
CUT, HANG = "cut", "hang"
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


def good_answer(prompt: str) -> str:
    """What a perfect teacher says to either kind of prompt; the text differs by prompt."""
    n = len(prompt)
    return json.dumps([{"query": f"query {k} of {n}"} for k in range(5)] if "search queries" in prompt else
                      {**GOOD, "keywords": [*WORDS, f"letters of {n}"]})


def well(number: int, chat: list[dict]) -> str:
    return good_answer(chat[0]["content"])


class Handler(BaseHTTPRequestHandler):
    """Logs each request, replies with the test's `act(number, chat)`: a text, or (status, headers, body)."""
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.log)
            self.server.log.append({"path": self.path, "headers": dict(self.headers), **body})
        reply = self.server.act(number, body["messages"])
        self.close_connection = True
        if reply == HANG:
            self.server.release.wait(20)
        elif reply == CUT:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
        else:
            if isinstance(reply, str):
                reply = 200, {}, json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            status, headers, content = reply
            headers = {**headers, "Content-Length": str(len(content)), "Connection": "close"}
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A chat server that answers well unless the test sets `act`; `slept`: the waits, which cost no time."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.lock, server.release = True, threading.Lock(), threading.Event()
    server.log, server.slept, server.act = [], [], well
    server.handle_error = lambda *args: None                # a client that has gone is no news
    clock = SimpleNamespace(time=time.time, sleep=server.slept.append)
    monkeypatch.setattr(urllib3.util.retry, "time", clock)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def shop(tmp_path):
    """A run of 12 items on 2 + 3 + 6 tokens."""
    items = toy_items(12)
    for n, item in enumerate(items):
        item["sid"] = [f"<a_{n % 2}>", f"<b_{n % 3}>", f"<c_{n % 6}>"]
    write_lines(tmp_path / "items.jsonl", items)
    return tmp_path


def flags(shop, server, *more) -> list:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1/"
    return ["--run", shop, "--teacher", "http", "--base-url", url, "--teacher-model", "m", "--workers", 1,
            *more]


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def cached(shop, count: int) -> int:
    """The number of answers in the cache; waits for `count` of them, for 10 s at most."""
    deadline = time.time() + 10
    while len(rows := read(shop / "teacher_cache.jsonl")) < count and time.time() < deadline:
        time.sleep(0.01)
    return len(rows)


def counts(out: str) -> list[int]:
    """The answers that were cached, new and not usable, as the script reports them."""
    line, = (line for line in out.splitlines() if line.startswith("answers"))
    return [int(n) for n in re.findall(r"\| (\d+)", line)]


def assert_no_secret(shop, *texts: str) -> None:
    for text in (*texts, *(path.read_text(encoding="utf-8") for path in shop.iterdir())):
        assert SECRET not in text and SECRET[3:] not in text


# ---- the server behaves ----

def test_answers_reach_the_files(shop, server, capsys):
    call(stage, *flags(shop, server, "--queries", 5))
    rows = read(shop / "semantics.jsonl")
    prompts = [entry["messages"][0]["content"] for entry in server.log]
    assert len(rows) == 11 and len(prompts) == 11 + 12
    assert all(row["source"] == "http m" and row["description"] == GOOD["description"] for row in rows)
    by_prompt = {json.loads(good_answer(p))["keywords"][-1] for p in prompts if "search queries" not in p}
    assert {row["keywords"][-1] for row in rows} == by_prompt
    assert {entry["path"] for entry in server.log} == {"/v1/chat/completions"}
    assert {entry["model"] for entry in server.log} == {"m"}
    assert {entry["headers"]["Authorization"] for entry in server.log} == {f"Bearer {SECRET}"}
    queries = read(shop / "queries.jsonl")
    assert Counter(row["item_id"] for row in queries) == {n: 5 for n in range(12)}
    assert Counter(row["split"] for row in queries) == {"train": 48, "test": 12}
    assert {row["item_id"] for row in queries if row["split"] == "test"} == set(range(12))
    out = capsys.readouterr()
    assert counts(out.out) == [0, 23, 0] and server.slept == []
    assert_no_secret(shop, out.out, out.err)


def test_the_prompt_holds_the_sample_and_the_rules(shop, server):
    call(stage, *flags(shop, server, "--sample", 2))
    for row, entry in zip(read(shop / "semantics.jsonl"), server.log):
        prompt = entry["messages"][0]["content"]
        shown = [json.loads(line)["title"] for line in prompt.splitlines() if line.startswith('{"title"')]
        assert shown == [toy_items(12)[n]["title"] for n in row["sampled"]] and len(shown) == 2
        for rule in ("3-5 sentences", "10-20", "No brand names", "JSON"):
            assert rule in prompt


def test_without_a_key_no_header_not_even_from_netrc(shop, server, monkeypatch):
    (shop / "netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(shop / "netrc"))
    monkeypatch.delenv("OPENAI_API_KEY")
    call(stage, *flags(shop, server))
    assert len(server.log) == 11 and not any("Authorization" in entry["headers"] for entry in server.log)
    monkeypatch.setenv("OTHER", "other-key")
    call(stage, *flags(shop, server, "--api-key-env", "OTHER", "--teacher-model", "another"))
    assert {entry["headers"]["Authorization"] for entry in server.log[11:]} == {"Bearer other-key"}


def test_workers_ask_at_the_same_time(shop, server):
    together = threading.Barrier(4)

    def act(number, chat):
        if number < 4:
            together.wait(20)                               # breaks if fewer than four come
        return well(number, chat)

    server.act = act
    call(stage, *flags(shop, server, "--workers", 4))
    assert not together.broken and cached(shop, 11) == 11 == len(server.log)


def test_cached_answers_are_not_asked_again(shop, server, capsys):
    call(stage, *flags(shop, server))
    first = (shop / "semantics.jsonl").read_bytes()
    call(stage, *flags(shop, server))
    assert len(server.log) == 11 and (shop / "semantics.jsonl").read_bytes() == first
    call(stage, *flags(shop, server, "--teacher-model", "another"))
    assert len(server.log) == 22 and server.log[-1]["model"] == "another"
    call(stage, *flags(shop, server, "--sample", 1))        # a prompt that has changed
    assert len(server.log) == 33
    capsys.readouterr()
    call(stage, *flags(shop, server))
    assert len(server.log) == 33 and (shop / "semantics.jsonl").read_bytes() == first
    assert counts(capsys.readouterr().out) == [11, 0, 0]


def test_dry_run_asks_and_writes_nothing(shop, server, capsys):
    before = sorted(shop.iterdir())
    call(stage, "--run", shop, "--dry-run")                             # needs no server
    assert "11 requests" in capsys.readouterr().out and sorted(shop.iterdir()) == before
    call(stage, *flags(shop, server, "--queries", 5, "--dry-run"))
    out = capsys.readouterr().out
    assert server.log == [] and sorted(shop.iterdir()) == before
    call(stage, *flags(shop, server, "--queries", 5))
    prompts = [entry["messages"][0]["content"] for entry in server.log]
    assert prompts[0] in out and prompts[1] not in out
    assert "23 requests" in out and f"{sum(map(len, prompts)) // 4} input tokens" in out


# ---- the server or the line misbehaves ----

@pytest.mark.parametrize("trouble", [*((status, {}, b"<html>") for status in TRANSIENT), HANG],
                         ids=[*map(str, TRANSIENT), "timeout"])
def test_passing_trouble_is_tried_again(shop, server, trouble, monkeypatch, capsys):
    monkeypatch.setattr(stage, "TIMEOUT", 0.2)
    server.act = lambda number, chat: trouble if number in (0, 4) else well(number, chat)
    call(stage, *flags(shop, server))
    assert len(server.log) == 13 and all(row["source"] == "http m" for row in read(shop / "semantics.jsonl"))
    assert counts(capsys.readouterr().out) == [0, 11, 0]


def test_waits_grow_unless_the_server_says_how_long(shop, server):
    says = {0: {"Retry-After": "7"}, 4: {"Retry-After": formatdate(time.time() + 30, usegmt=True)},
            6: {}, 7: {}, 8: {}, 9: {}}
    server.act = lambda number, chat: (429, says[number], b"") if number in says else well(number, chat)
    call(stage, *flags(shop, server))
    assert len(server.log) == 11 + 6 and server.slept[0] == 7 and 20 < server.slept[1] <= 30
    waits = server.slept[2:]                                # the first try may come at once
    assert len(waits) >= 3 and all(b >= 2 * a > 0 for a, b in zip(waits, waits[1:]))


@pytest.mark.parametrize("status, retried", [(400, False), (401, False), (402, False), (404, False),
                                             (307, False), (429, True), (500, True)])
def test_a_refusal_ends_the_run_with_the_server_s_words(shop, server, status, retried, capsys):
    message = json.dumps({"error": {"message": f"Wrong API key:\n {SECRET}. Go away."}}).encode()
    cache, kept = shop / "teacher_cache.jsonl", set()

    def act(number, chat):
        if number < 3:
            return well(number, chat)
        kept.add(cached(shop, 3))                           # each answer is in the file at once
        return status, {"Location": "/elsewhere"}, message

    server.act = act
    with pytest.raises(SystemExit) as stopped:
        call(stage, *flags(shop, server, "--queries", 5))
    out = capsys.readouterr()
    assert stopped.value.code == 2 and out.err.count("\n") == 1 and out.err.startswith("error: ")
    for words in (str(status), "Wrong API key:", "***. Go away.", "/v1/chat/completions", str(cache)):
        assert words in out.err
    assert_no_secret(shop, out.out, out.err)
    asked = Counter(entry["messages"][0]["content"] for entry in server.log)
    assert list(asked.values())[:3] == [1, 1, 1] and (list(asked.values())[3] > 3) == retried
    assert kept == {3} == {cached(shop, 3)}
    assert not (shop / "semantics.jsonl").exists() and not (shop / "queries.jsonl").exists()
    with open(cache, "ab") as file:
        file.write(cache.read_bytes()[:150])                # a line that a kill has cut in two
    server.act = well
    call(stage, *flags(shop, server, "--queries", 5))
    assert counts(capsys.readouterr().out) == [3, 20, 0]
    assert cached(shop, 23) == 23 and all(row["source"] == "http m" for row in read(shop / "semantics.jsonl"))


def test_one_question_that_is_always_refused_is_left_to_tfidf(shop, server, capsys):
    def act(number, chat):
        return (400, {}, b"content filter") if number == 5 else well(number, chat)

    server.act = act
    call(stage, *flags(shop, server))
    assert counts(capsys.readouterr().out) == [0, 10, 1]
    sources = Counter(row["source"] for row in read(shop / "semantics.jsonl"))
    assert sources == {"http m": 10, "tfidf": 1}


def test_half_an_emoji_in_an_answer(shop, server):
    server.act = lambda number, chat: well(number, chat).replace('"keywords": ["', '"keywords": ["half \\ud83d ')
    call(stage, *flags(shop, server, "--queries", 5))
    rows = read(shop / "semantics.jsonl")
    assert all(row["keywords"][0].startswith("half ? ") for row in rows) and (shop / "queries.jsonl").exists()


@pytest.mark.parametrize("trouble", [
    CUT, (200, {}, b"<html>no json"), (200, {}, b'{"choices": []}'), (200, {}, b"[]"), (200, {}, b"null"),
    (429, {"Retry-After": "soon"}, b"")], ids=["cut", "html", "no choices", "list", "null", "Retry-After"])
def test_a_reply_that_is_none_ends_the_run(shop, server, trouble, capsys):
    server.act = lambda number, chat: trouble if number > 2 and cached(shop, 3) else well(number, chat)
    assert_stops(capsys, call, stage, *flags(shop, server), words=("/v1/chat/completions", "_cache.jsonl"))
    assert cached(shop, 3) == 3 and not (shop / "semantics.jsonl").exists()


def test_no_server_at_all(shop, server, capsys):
    more = flags(shop, server)
    server.shutdown()
    server.server_close()
    assert_stops(capsys, call, stage, *more, words=("127.0.0.1", "refused"))
    assert_no_secret(shop)


def test_a_key_that_cannot_be_one_is_not_shown(shop, server, monkeypatch, capsys):
    for key in (f"{SECRET}\nX: y", f"{SECRET} {SECRET}", f"{SECRET}é"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(SystemExit):
            call(stage, *flags(shop, server))
        out = capsys.readouterr()
        assert "$OPENAI_API_KEY" in out.err
        assert_no_secret(shop, out.out, out.err)
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\n")     # as $(cat file) or an editor leaves it
    call(stage, *flags(shop, server))
    assert server.log[0]["headers"]["Authorization"] == f"Bearer {SECRET}"


def test_interrupted_and_resumed(shop, server, capsys):
    def act(number, chat):
        if number < 5:
            return well(number, chat)
        cached(shop, 5)                                     # then Ctrl-C
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return HANG

    server.act = act
    assert_stops(capsys, call, stage, *flags(shop, server), words=("interrupted", "teacher_cache.jsonl"))
    assert cached(shop, 5) == 5 and not (shop / "semantics.jsonl").exists()
    before = -1
    while before < len(server.log):                         # what was under way may still arrive
        before = len(server.log)
        time.sleep(0.3)
    server.act = well
    call(stage, *flags(shop, server))
    assert len(server.log) == before + 6 and counts(capsys.readouterr().out) == [5, 6, 0]


# ---- the answers misbehave ----

@pytest.mark.parametrize("text, problem", [
    ("Sure! Here it is.", ""), ("", ""), ('{"description": "One. Two. Thr', ""), ('["description"]', ""),
    ({"keywords": WORDS}, '"description"'), ({"description": TEXT}, '"keywords"'),
    ({**GOOD, "keywords": "a, b"}, '"keywords"'), ({**GOOD, "keywords": [*WORDS, 7]}, "strings"),
    ({**GOOD, "keywords": [{"word": word} for word in WORDS]}, "strings"), ({**GOOD, "keywords": None}, "strings"),
    ({**GOOD, "description": ""}, "not 0"), ({**GOOD, "description": "Only this. And this."}, "not 2"),
    ({**GOOD, "description": "One. Two! Three? Four. Five. \"Six.\""}, "not 6"),
    ({**GOOD, "description": "A list. It has:\n- Steel.\n- Glass. End."}, "one paragraph"),
    ({**GOOD, "keywords": WORDS[:9]}, "not 9"), ({**GOOD, "keywords": [*WORDS[:9], " Steel ", ""]}, "not 9"),
    ({**GOOD, "keywords": [f"word {n}" for n in range(21)]}, "not 21"),
    ({**GOOD, "keywords": [*WORDS, "3/8"]}, "'3/8' has no letters"),
    ({**GOOD, "keywords": [*WORDS, "ACME wire"]}, "brand name 'Acme'")])
def test_answers_that_break_a_rule(text, problem):
    with pytest.raises(ValueError) as error:
        stage.parse_meaning(text if isinstance(text, str) else json.dumps(text), brands=["Acme", "C++ (x"])
    assert problem in str(error.value)


def test_good_answers_in_any_wrapping():
    plain = json.dumps(GOOD)
    for text in (plain, f"```json\n{plain}\n```", f"<think>{{this}}?</think>\nHere: {plain} Good luck."):
        assert stage.parse_meaning(text, brands=["Acm", "rope ladder"]) == GOOD
    text = "A No. 5 size of 1.5 ft. fits, i.e. most... So do 3. Does it last? It does! End."
    longest = {"description": text, "keywords": [f"word {n}" for n in range(20)]}
    assert stage.parse_meaning(json.dumps(longest), brands=[]) == longest
    for text in ("Это трубы. Они прочны. Их легко резать.", "École et atelier. Élégants! À poser soi-même.",
                 "这是管道。它们很结实。容易切割。"):                    # sentences of other alphabets
        assert stage.parse_meaning(json.dumps({**longest, "description": text}), brands=[])


@pytest.mark.parametrize("text, problem", [
    ("none", ""), ('[{"query": "a"}, "b"]', "query"), ('[{"query": 1}, {"query": "b"}]', "query"),
    ("[]", "not 0"), ('[{"query": "a"}]', "not 1"), ('[{"query": "a"}, {"query": "A "}]', "not 1"),
    ('[{"query": "a"}, {"query": ""}]', "not 1"),
    ('[{"query": "a"}, {"query": "b"}, {"query": "c"}]', "not 3")])
def test_queries_that_break_a_rule(text, problem):
    with pytest.raises(ValueError) as error:
        stage.parse_queries(text, count=2)
    assert problem in str(error.value)
    good = '```json\n[{"query": " a "},\n{"query": "b", "why": 1}]```'
    assert stage.parse_queries(good, count=2) == ["a", "b"]


def test_bad_answers_are_asked_again_with_what_was_wrong(shop, server, capsys):
    """The first token mends its answer, the second never does; nor does the first item."""
    bad = json.dumps({**GOOD, "keywords": WORDS[:9]})
    call(stage, *flags(shop, server, "--queries", 5))
    mends, never, item = (server.log[n]["messages"][0]["content"] for n in (0, 1, 11))
    call(stage, "--run", shop, "--queries", 5)
    offline, plain = read(shop / "semantics.jsonl"), read(shop / "queries.jsonl")
    (shop / "teacher_cache.jsonl").unlink()
    server.log.clear()
    capsys.readouterr()

    def act(number, chat):
        prompt = chat[0]["content"]
        if prompt == never or prompt == mends and len(chat) == 1:
            return bad
        return "" if prompt == item else well(number, chat)

    server.act, retries = act, stage.RETRIES
    call(stage, *flags(shop, server, "--queries", 5))
    chats = [entry["messages"] for entry in server.log]
    assert len(chats) == 23 + 1 + 2 * retries
    assert Counter(chat[0]["content"] for chat in chats)[never] == 1 + retries
    for chat in chats:
        assert [message["role"] for message in chat] in (["user"], ["user", "assistant", "user"])
    again = {chat[0]["content"]: chat for chat in chats if len(chat) == 3}
    assert set(again) == {mends, never, item} and again[never][1]["content"] == bad
    assert all("not 9" in again[prompt][2]["content"] for prompt in (mends, never))
    rows, queries = read(shop / "semantics.jsonl"), read(shop / "queries.jsonl")
    assert [row["source"] for row in rows] == ["http m", "tfidf", *["http m"] * 9]
    assert rows[1] == offline[1]
    assert queries[:5] == plain[:5] and all("query" in row["query"] for row in queries[5:])
    assert Counter(row["item_id"] for row in queries) == {n: 5 for n in range(12)}
    out = capsys.readouterr().out
    assert counts(out) == [0, 21, 2] and rows[1]["token"] in out and "item 0" in out
    assert cached(shop, 21) == 21
    before = len(server.log)
    call(stage, *flags(shop, server, "--queries", 5))       # only what is missing
    assert len(server.log) == before + 2 * (1 + retries)


# ---- the offline teacher's queries ----

def test_offline_queries(shop):
    call(stage, "--run", shop, "--queries", 5)
    rows = read(shop / "queries.jsonl")
    assert [list(row) for row in rows] == [["item_id", "query", "split"]] * 60
    assert [row["item_id"] for row in rows] == [n for n in range(12) for _ in range(5)]
    for item in toy_items(12):
        mine = [row for row in rows if row["item_id"] == item["item_id"]]
        assert len({row["query"] for row in mine}) == 5
        assert sorted(row["split"] for row in mine) == ["test"] + ["train"] * 4
        known = set(f"{item['title']} {item['brand']} {item['categories']}".lower().split())
        assert all(known.issuperset(row["query"].split()) for row in mine)
    assert len({[row["split"] for row in rows][n:n + 5].index("test") for n in range(0, 60, 5)}) > 1


def test_offline_queries_depend_on_the_item_and_the_seed(shop):
    call(stage, "--run", shop, "--queries", 4)
    first = read(shop / "queries.jsonl")
    write_lines(shop / "items.jsonl", read(shop / "items.jsonl")[::-1])
    call(stage, "--run", shop, "--queries", 4)
    assert sorted(read(shop / "queries.jsonl"), key=lambda row: row["item_id"]) == first
    call(stage, "--run", shop, "--queries", 4, "--seed", 1)
    assert sorted(read(shop / "queries.jsonl"), key=lambda row: row["item_id"]) != first


def test_an_item_of_few_words_has_few_queries(tmp_path):
    write_lines(tmp_path / "items.jsonl", [
        {"item_id": "7", "title": "77-B", "sid": ["<a_0>", "<b_0>"]},
        {"item_id": 7, "title": "", "description": "A clay pot for herbs", "sid": ["<a_0>", "<b_1>"]}])
    call(stage, "--run", tmp_path, "--queries", 5)
    one, *others = read(tmp_path / "queries.jsonl")
    assert (one["item_id"], one["query"].lower(), one["split"]) == ("7", "77-b", "train")
    assert [row["item_id"] for row in others] == [7] * len(others) and len(others) > 1
    assert sum(row["split"] == "test" for row in others) == 1


def test_without_queries_none_are_written(shop):
    call(stage, "--run", shop)
    assert sorted(path.name for path in shop.iterdir()) == ["items.jsonl", "semantics.jsonl"]


@pytest.mark.parametrize("bad", [
    ["--queries", "1"], ["--queries", "-1"], ["--teacher", "http", "--teacher-model", "m"],
    ["--teacher", "http", "--base-url", "https://x"], ["--workers", "0"],
    ["--teacher", "http", "--teacher-model", "m", "--base-url", "api.deepseek.com"]])
def test_bad_flags(bad, capsys):
    with pytest.raises(SystemExit) as stopped:
        stage.parse_args(bad)
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err
