"""Stage 2's language models as teachers, against a real server on loopback and a tiny local model; search queries."""
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import wait
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_stops, call, random_model, toy_items, write_lines

import extract_semantics as stage
from init_embeddings import train_bpe

SECRET = "sk-0123456789-very-secret"
WORDS = ["fastening", "measuring", "sealing", "storage", "workshop", "laboratory", "steel", "glass", "rope", "filter"]
GOOD = {"description": "These items serve a workshop. They come in various sizes, e.g. Small ones. They last.",
        "keywords": WORDS}
CUT, HANG = "cut", "hang"


def good_answer(prompt: str) -> str:
    """What a perfect teacher says to either kind of prompt; the text differs by prompt."""
    n = len(prompt)
    return json.dumps([{"query": f"query {k} of {n}"} for k in range(5)] if "search queries" in prompt else
                      {**GOOD, "keywords": [*WORDS, f"letters of {n}"]})


def completion(text) -> tuple[int, dict, bytes]:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Handler(BaseHTTPRequestHandler):
    """Logs each request, then does what the test's `act(number, chat)` says."""
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
            status, headers, content = reply if isinstance(reply, tuple) else completion(reply)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A chat server that answers well unless the test sets `act`; waits between tries are a hundredth."""
    monkeypatch.setattr(stage, "FIRST_WAIT", 0.002)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.log, server.lock, server.release = True, [], threading.Lock(), threading.Event()
    server.act = lambda number, chat: good_answer(chat[0]["content"])
    server.handle_error = lambda *args: None                            # a client that has gone is no news
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
    return ["--run", shop, "--teacher", "http", "--base-url", url, "--teacher-model", "m", "--workers", 1, *more]


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
    assert "0 cached | 23 asked | 0 retried | 0 fell back" in out.out
    assert_no_secret(shop, out.out, out.err)


def test_the_prompt_holds_the_sample_and_the_rules(shop, server):
    call(stage, *flags(shop, server, "--sample", 2))
    for row, entry in zip(read(shop / "semantics.jsonl"), server.log):
        prompt = entry["messages"][0]["content"]
        shown = [json.loads(line)["title"] for line in prompt.splitlines() if line.startswith('{"title"')]
        assert shown == [toy_items(12)[n]["title"] for n in row["sampled"]] and len(shown) == 2
        for rule in ("3-5 sentences", "10-20", "No brand names", "JSON", "in Shop product"):
            assert rule in prompt


def test_without_a_key_no_header_not_even_from_netrc(shop, server, monkeypatch):
    (shop / "netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(shop / "netrc"))
    monkeypatch.delenv("OPENAI_API_KEY")
    call(stage, *flags(shop, server))
    assert len(server.log) == 11 and not any("Authorization" in entry["headers"] for entry in server.log)
    monkeypatch.setenv("OTHER", "other-key")
    call(stage, *flags(shop, server, "--api-key-env", "OTHER", "--cache", shop / "second.jsonl"))
    assert {entry["headers"]["Authorization"] for entry in server.log[11:]} == {"Bearer other-key"}


def test_workers_ask_at_the_same_time(shop, server):
    together = threading.Barrier(4)

    def act(number, chat):
        if number < 4:
            together.wait(20)                                           # breaks if fewer than four come
        return good_answer(chat[0]["content"])

    server.act = act
    call(stage, *flags(shop, server, "--workers", 4))
    assert not together.broken and len(read(shop / "teacher_cache.jsonl")) == 11 == len(server.log)


def test_cached_answers_are_not_asked_again(shop, server, capsys):
    call(stage, *flags(shop, server))
    first = (shop / "semantics.jsonl").read_bytes()
    call(stage, *flags(shop, server))
    assert len(server.log) == 11 and (shop / "semantics.jsonl").read_bytes() == first
    call(stage, *flags(shop, server, "--teacher-model", "another"))
    assert len(server.log) == 22 and server.log[-1]["model"] == "another"
    call(stage, *flags(shop, server, "--sample", 1))                    # a prompt that has changed
    assert len(server.log) == 33
    call(stage, *flags(shop, server))
    assert len(server.log) == 33 and (shop / "semantics.jsonl").read_bytes() == first
    assert "0 requests to m, 11 more are cached" in capsys.readouterr().out


def test_dry_run_asks_and_writes_nothing(shop, server, capsys):
    before = sorted(shop.iterdir())
    with pytest.raises(SystemExit) as ended:
        call(stage, *flags(shop, server, "--queries", 5, "--dry-run"))
    out = capsys.readouterr().out
    assert not ended.value.code and server.log == [] and sorted(shop.iterdir()) == before
    assert "23 requests to m, 0 more are cached" in out and out.count("the prompt for") == 1
    call(stage, *flags(shop, server))
    assert server.log[0]["messages"][0]["content"] in out
    with pytest.raises(SystemExit):
        call(stage, *flags(shop, server, "--queries", 5, "--dry-run"))
    out = capsys.readouterr().out
    letters = sum(len(stage.QUERIES_PROMPT.format(item=stage.item_json(item), count=5)) for item in toy_items(12))
    assert f"12 requests to m, 11 more are cached | about {letters // 4} tokens in, 1200 out" in out


# ---- the server or the line misbehaves ----

@pytest.mark.parametrize("trouble", [
    (429, {"Retry-After": "0"}, b'{"error": {"message": "slow down"}}'), (500, {}, b"<html>"), (503, {}, b""), CUT,
    HANG, (200, {}, b"<html>no json"), (200, {}, b'{"choices": []}'), (200, {}, b"[" * 100_000)],
    ids=["429", "500", "503", "cut", "timeout", "html", "no choices", "deep"])
def test_passing_trouble_is_tried_again(shop, server, trouble, capsys):
    server.act = lambda number, chat: trouble if number in (0, 4) else good_answer(chat[0]["content"])
    call(stage, *flags(shop, server, "--timeout", 0.2))
    assert len(server.log) == 13 and all(row["source"] == "http m" for row in read(shop / "semantics.jsonl"))
    assert "11 asked | 0 retried | 0 fell back" in capsys.readouterr().out


def test_waiting_time(monkeypatch):
    monkeypatch.setattr(stage.time, "time", lambda: 1_000_000.0)
    assert stage.waiting_time(0, "7") == 7 and stage.waiting_time(5, "0") == 0
    assert stage.waiting_time(0, formatdate(1_000_030, usegmt=True)) == 30
    assert stage.waiting_time(0, formatdate(999_000, usegmt=True)) == 0
    for nonsense in ("", "soon", "1.5", "-3", "²", "Wed, 99 Oct 2015"):
        for attempt in range(12):
            whole = min(stage.FIRST_WAIT * 2 ** attempt, 2 * stage.MAX_WAIT)
            assert min(whole / 2, stage.MAX_WAIT) <= stage.waiting_time(attempt, nonsense) <= min(whole, stage.MAX_WAIT)
    assert len({stage.waiting_time(3, "") for _ in range(20)}) > 1      # jitter
    assert stage.waiting_time(0, "99999") == stage.waiting_time(60, "") == stage.MAX_WAIT


def test_the_server_s_wish_reaches_the_wait(shop, server, monkeypatch):
    asked = []
    monkeypatch.setattr(stage, "waiting_time", lambda attempt, header: asked.append((attempt, header)) or 0)
    server.act = lambda number, chat: (429, {"Retry-After": str(number)}, b"") if 0 < number < 3 else good_answer(
        chat[0]["content"])
    call(stage, *flags(shop, server))
    assert asked == [(0, "1"), (1, "2")]


def test_lasting_trouble_falls_back_and_is_said(shop, server, capsys):
    call(stage, "--run", shop, "--out", shop / "offline.jsonl")
    prompt = []

    def act(number, chat):
        prompt.extend([chat[0]["content"]] * (number == 1))
        return (502, {}, b"bad gateway") if chat[0]["content"] in prompt else good_answer(chat[0]["content"])

    server.act = act
    call(stage, *flags(shop, server))
    assert len(server.log) == 10 + stage.TRIES
    rows, offline = read(shop / "semantics.jsonl"), read(shop / "offline.jsonl")
    assert [row["source"] for row in rows] == ["http m", "tfidf", *["http m"] * 9] and rows[1] == offline[1]
    out = capsys.readouterr().out
    assert "11 asked | 0 retried | 1 fell back to tfidf, 1 of which failed" in out
    assert f"fell back | {rows[1]['token']} | 502: bad gateway" in out


def test_a_server_that_never_answers_ends_the_run(shop, server, capsys):
    server.act = lambda number, chat: (500, {}, b"out of order")
    assert_stops(capsys, call, stage, *flags(shop, server), words=("500: out of order", "/v1/chat/completions"))
    assert len(server.log) == stage.TRIES and not (shop / "semantics.jsonl").exists()


def test_no_server_at_all(shop, server, capsys):
    more = flags(shop, server)
    server.shutdown()
    server.server_close()
    assert_stops(capsys, call, stage, *more, words=("no answer: ConnectionError", f"{stage.TRIES} times"))
    assert_no_secret(shop)


@pytest.mark.parametrize("status", [400, 401, 402, 404, 307])
def test_a_refusal_ends_the_run_with_the_server_s_words(shop, server, status, capsys):
    message = json.dumps({"error": {"message": f"Incorrect API key provided:\n {SECRET}. Go away."}}).encode()
    server.act = lambda number, chat: good_answer(chat[0]["content"]) if number < 3 else (
        status, {"Location": "/elsewhere"}, message)
    call_it = ["--queries", 5]
    with pytest.raises(SystemExit) as stopped:
        call(stage, *flags(shop, server, *call_it))
    out = capsys.readouterr()
    assert stopped.value.code == 2 and out.err.count("\n") == 1
    assert f"says {status}: Incorrect API key provided: ***. Go away.; the answers so far are in" in out.err
    assert_no_secret(shop, out.out, out.err)
    assert len(server.log) == 4 and len(read(shop / "teacher_cache.jsonl")) == 3
    assert not (shop / "semantics.jsonl").exists() and not (shop / "queries.jsonl").exists()
    server.act = lambda number, chat: good_answer(chat[0]["content"])
    call(stage, *flags(shop, server, *call_it))
    assert len(server.log) == 4 + 20


def test_answers_that_came_beside_a_refusal_are_kept(shop, server, monkeypatch, capsys):
    monkeypatch.setattr(stage, "as_completed", lambda futures: sorted(      # the refusal is looked at first
        wait(futures).done, key=lambda future: future.exception() is None))
    server.act = lambda number, chat: good_answer(chat[0]["content"]) if number < 3 else (402, {}, b"no money")
    assert_stops(capsys, call, stage, *flags(shop, server), words=("402: no money",))
    assert len(server.log) == 4 and len(read(shop / "teacher_cache.jsonl")) == 3


def test_a_key_that_cannot_be_one_is_not_shown(shop, server, monkeypatch, capsys):
    for key in (f"{SECRET}\nX: y", f"{SECRET} {SECRET}", f"{SECRET}é"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(SystemExit):
            call(stage, *flags(shop, server))
        out = capsys.readouterr()
        assert "$OPENAI_API_KEY" in out.err
        assert_no_secret(shop, out.out, out.err)
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\n")                 # as $(cat file) or an editor leaves it
    call(stage, *flags(shop, server))
    assert server.log[0]["headers"]["Authorization"] == f"Bearer {SECRET}"


def test_interrupted_and_resumed(shop, server, capsys):
    def act(number, chat):
        if number >= 5:                                                 # Python loses one that meets a destructor
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)       # Ctrl-C
            return HANG
        return good_answer(chat[0]["content"])

    server.act = act
    assert_stops(capsys, call, stage, *flags(shop, server), words=("interrupted", "teacher_cache.jsonl"))
    assert len(read(shop / "teacher_cache.jsonl")) == 5 and not (shop / "semantics.jsonl").exists()
    server.act, before = lambda number, chat: good_answer(chat[0]["content"]), len(server.log)
    call(stage, *flags(shop, server))
    assert len(server.log) == before + 6 and "5 cached | 6 asked" in capsys.readouterr().out


def test_killed_and_resumed(shop, server, capsys):
    done, at_work = threading.Event(), threading.Event()

    def act(number, chat):
        if number == 4:
            at_work.set()
            done.wait(60)
        return good_answer(chat[0]["content"])

    server.act = act
    process = subprocess.Popen([sys.executable, ROOT / "extract_semantics.py", *map(str, flags(shop, server))],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert at_work.wait(60)
    while len(read(shop / "teacher_cache.jsonl")) < 4:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0]
    done.set()
    cache = shop / "teacher_cache.jsonl"
    with open(cache, "ab") as file:
        file.write(cache.read_bytes()[:150])                            # a line that the kill has cut in two
    server.act = lambda number, chat: good_answer(chat[0]["content"])
    call(stage, *flags(shop, server))
    assert len(server.log) == 5 + 7 and "4 cached | 7 asked" in capsys.readouterr().out
    assert len(read(cache)) == 11 and all(row["source"] == "http m" for row in read(shop / "semantics.jsonl"))
    assert_no_secret(shop, output)


def test_a_cache_that_is_none_is_left_alone(shop, server, capsys):
    before = (shop / "items.jsonl").read_bytes()
    assert_stops(capsys, call, stage, *flags(shop, server, "--cache", shop / "items.jsonl"), words=("items.jsonl",))
    assert (shop / "items.jsonl").read_bytes() == before and server.log == []


# ---- the answers misbehave ----

@pytest.mark.parametrize("text, problem", [
    ("Sure! Here it is.", "valid JSON"), ("", "valid JSON"), ("{" * 5000, "valid JSON"),
    ('{"description": "One. Two. Thr', "valid JSON"), ('["description"]', "valid JSON"),
    ({"keywords": WORDS}, '"description"'), ({"description": GOOD["description"], "keywords": "a, b"}, '"keywords"'),
    ({"description": GOOD["description"], "keywords": [*WORDS, 7]}, '"keywords"'),
    ({**GOOD, "description": ""}, "not 0"), ({**GOOD, "description": "Only this. And this."}, "not 2"),
    ({**GOOD, "description": "One. Two! Three? Four. Five. \"Six.\""}, "not 6"),
    ({**GOOD, "description": "A list. It has:\n- Steel.\n- Glass. End."}, "one paragraph"),
    ({**GOOD, "keywords": WORDS[:9]}, "not 9"), ({**GOOD, "keywords": [*WORDS[:9], " Steel ", ""]}, "not 9"),
    ({**GOOD, "keywords": [f"word {n}" for n in range(21)]}, "not 21"),
    ({**GOOD, "keywords": [*WORDS, "3/8"]}, "'3/8' has no letters"),
    ({**GOOD, "keywords": [*WORDS, "ACME wire"]}, "brand name 'Acme'"),
    ({**GOOD, "description": "\ud800. One. Two."}, "valid JSON")])
def test_answers_that_break_a_rule(text, problem):
    found = stage.check_meaning(text if isinstance(text, str) else json.dumps(text), brands=["Acme", "C++ (x"])
    assert isinstance(found, str) and problem in found


def test_good_answers_in_any_wrapping():
    plain = json.dumps(GOOD)
    for text in (plain, f"```json\n{plain}\n```", f"<think>maybe {{this}}?</think>\nHere: {plain} I hope it helps."):
        assert stage.check_meaning(text, brands=["Acm", "rope ladder"]) == [GOOD["description"], WORDS]
    longest = {"keywords": [f"word {n}" for n in range(20)],
               "description": "It is used in the U.S. Army. A No. 5 size, i.e. Large, fits. So do 3. It lasts! End."}
    assert stage.check_meaning(json.dumps(longest), brands=[]) == [longest["description"], longest["keywords"]]


@pytest.mark.parametrize("text, problem", [
    ("none", "valid JSON"), ('[{"query": "a"}, "b"]', "valid JSON"), ('[{"query": 1}, {"query": "b"}]', "valid JSON"),
    ("[]", "valid JSON"), ('[{"query": "a"}]', "not 1"), ('[{"query": "a"}, {"query": "A "}]', "not 1"),
    ('[{"query": "a"}, {"query": ""}]', "not 1"), ('[{"query": "a"}, {"query": "b"}, {"query": "c"}]', "not 3")])
def test_queries_that_break_a_rule(text, problem):
    assert problem in stage.check_queries(text, count=2)
    assert stage.check_queries('```json\n[{"query": " a "},\n{"query": "b", "why": 1}]```', count=2) == ["a", "b"]


def test_bad_answers_are_asked_again_with_what_was_wrong(shop, server, capsys):
    """Of 11 tokens and 12 items: the first mends its answer, the second never does; nor does the first item."""
    bad = json.dumps({**GOOD, "keywords": WORDS[:9]})
    call(stage, *flags(shop, server, "--queries", 5, "--cache", shop / "first.jsonl"))
    mends, never, item = (server.log[n]["messages"][0]["content"] for n in (0, 1, 11))
    server.log.clear()
    capsys.readouterr()

    def act(number, chat):
        prompt = chat[0]["content"]
        if prompt == never or prompt == mends and len(chat) == 1:
            return bad
        return "" if prompt == item else good_answer(prompt)

    server.act = act
    call(stage, *flags(shop, server, "--queries", 5, "--retries", 3))
    chats = [entry["messages"] for entry in server.log]
    assert len(chats) == 23 + 1 + 3 + 3 and Counter(chat[0]["content"] for chat in chats)[never] == 4
    for chat in chats:
        assert [message["role"] for message in chat] in (["user"], ["user", "assistant", "user"])
    again = [chat for chat in chats if len(chat) == 3]
    assert {chat[1]["content"] for chat in again} == {bad, "(nothing)"}
    assert all("not 9" in chat[2]["content"] or "valid JSON" in chat[2]["content"] for chat in again)
    rows = read(shop / "semantics.jsonl")
    assert [row["source"] for row in rows] == ["http m", "tfidf", *["http m"] * 9]
    queries = read(shop / "queries.jsonl")
    assert Counter(row["item_id"] for row in queries) == {n: 5 for n in range(12)}
    assert ["query" in row["query"] for row in queries] == [False] * 5 + [True] * 55
    out = capsys.readouterr().out
    assert "0 cached | 23 asked | 7 retried | 2 fell back to tfidf, 0 of which failed" in out
    assert f"fell back | {rows[1]['token']} | there must be 10 to 20" in out
    assert "fell back | item 0 | it must be valid JSON" in out
    assert len(read(shop / "teacher_cache.jsonl")) == 21
    call(stage, *flags(shop, server, "--queries", 5, "--retries", 0))   # only what is missing
    assert len(server.log) == 30 + 2


# ---- a local model ----

@pytest.fixture(scope="module")
def local_model(tmp_path_factory):
    """A random model and its tokenizer in a folder, with a generation config that would spoil greedy decoding."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe([item["description"] for item in toy_items()], 400)
    tokenizer.chat_template = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
                               "{% if add_generation_prompt %}<assistant>{% endif %}")
    model = random_model(rows=len(tokenizer))
    model.config.max_position_embeddings = 4096
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=3, repetition_penalty=1.5, eos_token_id=5,
                                   pad_token_id=0, max_new_tokens=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_local_model_is_greedy_whatever_its_own_settings(local_model, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    monkeypatch.setattr(stage, "MAX_NEW_TOKENS", 8)
    chats = {f"<a_{n}>": [{"role": "user", "content": "steel rod " * (5 * n + 1)}] for n in range(5)}
    args = SimpleNamespace(teacher_model=str(local_model), device="cpu", batch_size=2)
    found = {name: text for name, text, failure in stage.hf_teacher(args)(chats)}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(local_model), AutoTokenizer.from_pretrained(local_model)
    for name, chat in chats.items():                                    # each alone, token by token, without a cache
        ids = tokenizer.encode(f"<user>{chat[0]['content']}<assistant>", add_special_tokens=False)
        start = len(ids)
        while len(ids) < start + 8 and ids[-1] != 5:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert found[name] == tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert set(found) == set(chats)


def test_local_model_that_talks_nonsense_falls_back_throughout(shop, local_model, monkeypatch, capsys):
    monkeypatch.setattr(stage, "MAX_NEW_TOKENS", 4)
    call(stage, "--run", shop, "--out", shop / "offline.jsonl", "--queries", 3, "--queries-out", shop / "plain.jsonl",
         "--sample", 1)
    call(stage, "--run", shop, "--teacher", "hf", "--teacher-model", local_model, "--queries", 3, "--retries", 1,
         "--sample", 1)
    assert (shop / "semantics.jsonl").read_bytes() == (shop / "offline.jsonl").read_bytes()
    assert (shop / "queries.jsonl").read_bytes() == (shop / "plain.jsonl").read_bytes()
    out = capsys.readouterr().out
    assert "0 cached | 23 asked | 23 retried | 23 fell back to tfidf, 0 of which failed" in out
    assert out.count("fell back | <") == 11 and out.count("fell back | item ") == 12


def test_local_model_s_good_answers_are_kept(shop, local_model, monkeypatch):
    monkeypatch.setattr(stage, "MAX_NEW_TOKENS", 1)
    monkeypatch.setattr(stage, "check_meaning", lambda text, brands: [GOOD["description"], WORDS])
    call(stage, "--run", shop, "--teacher", "hf", "--teacher-model", local_model)
    assert {row["source"] for row in read(shop / "semantics.jsonl")} == {f"hf {local_model}"}
    monkeypatch.setitem(stage.TEACHERS, "hf", None)                     # all is cached: nobody is loaded
    call(stage, "--run", shop, "--teacher", "hf", "--teacher-model", local_model)


def test_local_model_errors(shop, local_model, capsys):
    arguments = ["--run", shop, "--teacher", "hf", "--teacher-model"]
    assert_stops(capsys, call, stage, *arguments, shop / "none", words=("--teacher-model", "cannot be loaded"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "MAX_NEW_TOKENS", 4090)
        with pytest.raises(SystemExit):
            call(stage, *arguments, local_model)
    assert "choose a smaller --sample" in capsys.readouterr().err


# ---- the offline teacher's queries ----

def test_offline_queries(shop, capsys):
    call(stage, "--run", shop, "--queries", 5)
    rows, items = read(shop / "queries.jsonl"), toy_items(12)
    assert [list(row) for row in rows] == [["item_id", "query", "split"]] * 60
    assert [row["item_id"] for row in rows] == [n for n in range(12) for _ in range(5)]
    assert "60 queries, 12 for testing" in capsys.readouterr().out
    right, wrong = 0, 0
    for item in items:
        mine = [row for row in rows if row["item_id"] == item["item_id"]]
        assert len({row["query"] for row in mine}) == 5
        assert sorted(row["split"] for row in mine) == ["test"] + ["train"] * 4
        known = set(f"{item['title']} {item['brand']} {item['categories']}".lower().replace(">", "").split())
        for row in mine:
            words = row["query"].split()
            right += known.issuperset(words)
            wrong += not known.issuperset(words)
            assert {"".join(sorted(word)) for word in words} <= {"".join(sorted(word)) for word in known}
    assert right > 5 * wrong > 0                                        # typos now and then, and nothing worse
    assert len({[row["split"] for row in rows][n:n + 5].index("test") for n in range(0, 60, 5)}) > 1


def test_offline_queries_depend_on_the_item_and_the_seed(shop):
    call(stage, "--run", shop, "--queries", 4)
    first = read(shop / "queries.jsonl")
    write_lines(shop / "turned.jsonl", read(shop / "items.jsonl")[::-1])
    call(stage, "--run", shop, "--queries", 4, "--items", shop / "turned.jsonl")
    assert sorted(read(shop / "queries.jsonl"), key=lambda row: row["item_id"]) == first
    call(stage, "--run", shop, "--queries", 4, "--seed", 1)
    assert read(shop / "queries.jsonl") != first


def test_an_item_of_few_words_has_few_queries(tmp_path):
    write_lines(tmp_path / "items.jsonl", [
        {"item_id": "7", "title": "77-B", "sid": ["<a_0>", "<b_0>"]},
        {"item_id": 7, "title": "", "description": "A clay pot for herbs", "sid": ["<a_0>", "<b_1>"]}])
    call(stage, "--run", tmp_path, "--queries", 5)
    rows = read(tmp_path / "queries.jsonl")
    assert [row for row in rows if row["item_id"] == "7"] == [{"item_id": "7", "query": "77-b", "split": "train"}]
    assert sum(row["item_id"] == 7 and row["split"] == "test" for row in rows) == 1


def test_without_queries_none_are_written(shop):
    call(stage, "--run", shop)
    assert sorted(path.name for path in shop.iterdir()) == ["items.jsonl", "semantics.jsonl"]


@pytest.mark.parametrize("bad", [
    ["--queries", "1"], ["--queries", "-1"], ["--teacher", "http", "--teacher-model", "m"],
    ["--teacher", "http", "--base-url", "https://x"], ["--teacher", "hf"], ["--dry-run"], ["--teacher-model", "m"],
    ["--teacher", "http", "--teacher-model", "m", "--base-url", "api.deepseek.com"],
    ["--teacher", "http", "--teacher-model", "m", "--base-url", "https://user:pass@host/v1"],
    ["--workers", "0"], ["--retries", "-1"], ["--timeout", "0"], ["--batch-size", "0"]])
def test_bad_flags(bad, capsys):
    with pytest.raises(SystemExit) as stopped:
        stage.parse_args(bad)
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err
