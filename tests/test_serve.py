"""tests/studies/serve.py: the folder's checks, the constraints, a server on loopback."""
import http.server
import importlib
import json
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_stops, call
from transformers import GenerationConfig

from evaluate import beam_search, read_pairs
from init_embeddings import build_trie, load_model, sid_token_ids
from tokenize_items import codes_of, read_catalogue
from train import prompt_ids

sys.path.insert(0, str(ROOT / "tests" / "studies"))
serve = importlib.import_module("serve")
SIDS = [["<a_1>", "<b_2>", "<c_3>"], ["<a_1>", "<b_2>", "<c_4>"], ["<a_1>", "<b_7>", "<c_3>"],
        ["<a_10>", "<b_2>", "<c_3>"]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(finished_run, tmp_path_factory) -> Path:
    """An export of the finished run."""
    path, items = tmp_path_factory.mktemp("export"), read_catalogue(finished_run / "items.jsonl")
    model, tokenizer, _ = load_model(finished_run / "sft.pt", CPU, items)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    lines = [json.dumps({"sid": "".join(item["sid"]), "item_id": item["item_id"]}) for item in items]
    (path / "sids.jsonl").write_text("\n".join(lines))
    return path


class FakeServer(http.server.BaseHTTPRequestHandler):
    """Knows one SID; answers freely with a text, and keeps all requests."""
    bodies: list = []
    sid = status = None

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append({"path": self.path, **body})
        free = set(body) == {"model", "prompt", "max_tokens", "temperature"}
        texts = ["text"] if free else [" nonsense", self.sid] if body.get("n", 1) > 1 else [self.sid]
        choices = [{"text": text, "logprobs": {"token_logprobs": [n - 3.0, -1.0]}}
                   for n, text in enumerate(texts)]
        self.send_response(self.status or 200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": choices}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(folder, monkeypatch):
    row = json.loads((folder / "sids.jsonl").read_text().splitlines()[5])
    monkeypatch.setattr(FakeServer, "bodies", [])
    monkeypatch.setattr(FakeServer, "sid", row["sid"])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeServer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1"
        running.shutdown()


def test_the_regex_matches_exactly_the_sids():
    pattern = serve.alternatives(SIDS)
    assert pattern == "(<a_1>(<b_2>(<c_3>|<c_4>)|<b_7>(<c_3>))|<a_10>(<b_2>(<c_3>)))"
    tokens = {token for sid in SIDS for token in sid}
    texts = {a + b + c for a in tokens for b in tokens for c in tokens}
    assert {text for text in texts if re.fullmatch(pattern, text)} == {"".join(sid) for sid in SIDS}


def test_the_bonus_makes_generate_find_what_our_search_finds(finished_run):
    """What `transformers serve` does with the request, for every prompt of the toy run."""
    items = read_catalogue(finished_run / "items.jsonl")
    model, tokenizer, saved = load_model(finished_run / "sft.pt", CPU, items)
    sid_ids = sid_token_ids(tokenizer, 3, saved["sid"]["codebook_size"])
    codes = torch.from_numpy(codes_of(items))
    trie, leaves = build_trie(codes, saved["sid"]["codebook_size"], CPU), torch.unique(codes, dim=0)
    id_of = {token: tokenizer.convert_tokens_to_ids(token) for item in items for token in item["sid"]}
    body = serve.constraint("transformers", [item["sid"] for item in items], id_of, 5, 1)
    settings = GenerationConfig(**json.loads(body["generation_config"]))
    pairs = read_pairs(finished_run, "next_brief", "test", items, 10)
    for ids in prompt_ids(tokenizer, [pair.instruction for pair in pairs]):
        given = torch.tensor([ids])
        found = model.generate(given, attention_mask=torch.ones_like(given), generation_config=settings)
        leaf = beam_search(model, trie, sid_ids, [ids], 5)[0][0, 0]
        assert found[0, len(ids):].tolist() == sid_ids[range(3), leaves[leaf]].tolist()


@pytest.mark.parametrize("engine", ["transformers", "vllm", "sglang"])
def test_a_server_is_asked_freely_and_constrained(engine, finished_run, folder, server, capsys):
    flags = (folder, "--run", finished_run, "--engine", engine, "--users", 3, "--num-beams", 4)
    call(serve, *flags, "--base-url", server, "--model", "toy")
    assert len(FakeServer.bodies) == 6
    free, bound = FakeServer.bodies[0], FakeServer.bodies[3]
    assert free["path"] == "/v1/completions" and free["max_tokens"] == 3 and free["temperature"] == 0
    assert free["prompt"].startswith("The user bought <a_") and free["model"] == "toy"
    field = {"transformers": "generation_config", "vllm": "structured_outputs", "sglang": "regex"}[engine]
    assert FakeServer.sid in json.dumps(bound) or engine != "vllm"
    out = capsys.readouterr().out
    assert "free | 0 of 3 answers are SIDs" in out and "constrained | 3 of 3 answers are SIDs" in out

    call(serve, *flags, "--print")
    assert len(FakeServer.bodies) == 6
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed[field] == bound[field]


def test_a_refusal_is_shown(finished_run, folder, server, monkeypatch, capsys):
    monkeypatch.setattr(FakeServer, "status", 400)
    assert_stops(capsys, call, serve, folder, "--run", finished_run, "--engine", "vllm", "--base-url", server,
                 words=("400", "choices"))


def test_no_server_is_one_line(finished_run, folder, capsys):
    assert_stops(capsys, call, serve, folder, "--run", finished_run, "--engine", "vllm",
                 "--base-url", "http://127.0.0.1:9", words=("127.0.0.1:9", "start the server"))


def test_a_folder_with_other_weights_is_refused(finished_run, folder, capsys):
    assert_stops(capsys, call, serve, folder, "--run", finished_run, "--checkpoint", finished_run / "init.pt",
                 words=(folder, "export it again"))


def test_without_an_engine_only_the_folder_is_checked(finished_run, folder, capsys):
    call(serve, folder, "--run", finished_run, "--users", 4)
    assert capsys.readouterr().out.strip().endswith("equal logits for 4 prompts")
