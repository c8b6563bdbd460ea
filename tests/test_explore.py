"""explore.py: its trace against beam_search and by hand, the page's data, the page in a browser."""
import html
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_stops, call, random_model, write_lines

import evaluate
from init_embeddings import load_model, sid_token_ids
from tokenize_items import codes_of, read_catalogue, read_jsonl
from train import TASKS, history_fields, prompt_ids

sys.path.insert(0, str(ROOT / "tests" / "studies"))
import explore  # noqa: E402

CPU = torch.device("cpu")
LEVELS, K, FIRST = 3, 6, 40             # of a small random catalogue; FIRST: id of its first SID token


def small_search(num_items: int, seed: int):
    """A random model, a trie with collisions, the ids of the SID tokens and the codes."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(K, (num_items, LEVELS), generator=generator)
    sid_ids = FIRST + torch.arange(LEVELS * K).reshape(LEVELS, K)
    return random_model(seed=seed), evaluate.build_trie(codes, K, CPU), sid_ids, codes.tolist()


def read_page(path: Path) -> dict:
    """The data of a page."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


# ---- The search ----------------------------------------------------------------------------------

@pytest.mark.parametrize("num_beams", [1, 4, 20, 300])
def test_the_trace_is_the_search(num_beams):
    model, trie, sid_ids, codes = small_search(80, seed=1)
    for prompt in ([5, 9, 2], [7, 7, 30, 12, 3]):
        leaves, scores = evaluate.beam_search(model, trie, sid_ids, [prompt], num_beams)
        levels, *traced = explore.trace(model, trie, sid_ids, prompt, num_beams, codes[0])
        assert traced == [leaves[0].tolist(), scores[0].tolist()]
        last = [cell["q"] for cell in levels[-1]["kept"]]
        assert last == pytest.approx([math.exp(score) for score in traced[1] if score > -math.inf], abs=1e-6)
        recalled = [{3: 0.5, 8: 0.25}]
        leaf_of = dict(enumerate(evaluate.leaf_of_items(trie).tolist()))
        memory = evaluate.make_memory(recalled, leaf_of, 0.6, CPU)
        leaves, scores = evaluate.beam_search(model, trie, sid_ids, [prompt], num_beams, memory=memory)
        _, *traced = explore.trace(model, trie, sid_ids, prompt, num_beams, codes[0], memory)
        assert traced == [leaves[0].tolist(), scores[0].tolist()]


def test_the_trace_by_hand():
    """Every path of the trie, with the model called on whole sequences."""
    model, trie, sid_ids, codes = small_search(60, seed=2)
    prompt, beams, target = [5, 9, 2], 4, codes[7]
    levels, *_ = explore.trace(model, trie, sid_ids, prompt, beams, target)

    def siblings(path: tuple) -> dict[int, float]:
        ids = prompt + [int(sid_ids[level, code]) for level, code in enumerate(path)]
        logits = model(torch.tensor([ids])).logits[0, -1].double()
        known = sorted({sid[len(path)] for sid in codes if tuple(sid[:len(path)]) == path})
        odds = logits[sid_ids[len(path), known]].softmax(0)
        return dict(zip(known, odds.tolist()))
    prefixes = {(): 1.0}
    for level, shown in enumerate(levels):
        paths = list(prefixes)
        found = [(prefixes[path] * p, p, parent, path + (code,)) for parent, path in enumerate(paths)
                 for code, p in siblings(path).items()]
        found.sort(reverse=True)
        assert shown["candidates"] == len(found)
        wanted = [place for place, (*_, path) in enumerate(found, 1) if list(path) == target[:level + 1]]
        kept, others = list(enumerate(found, 1))[:beams], list(enumerate(found, 1))[beams:]
        cut = others[:explore.CUT_SHOWN] + [pair for pair in others[explore.CUT_SHOWN:] if pair[0] in wanted]
        for cells, pairs in ((shown["kept"], kept), (shown["cut"], cut)):
            assert [cell["place"] for cell in cells] == [place for place, _ in pairs]
            for cell, (place, (q, p, parent, path)) in zip(cells, pairs):
                assert cell["token"] == f"<{'abc'[level]}_{path[-1]}>" and cell["parent"] == parent
                assert (cell["q"], cell["p"]) == pytest.approx((q, p), abs=2e-6)
                assert cell["target"] == (place in wanted)
        prefixes = {path: q for _, (q, _, _, path) in kept}


def test_a_target_far_below_the_cut_is_shown_with_its_place():
    model, trie, sid_ids, codes = small_search(80, seed=3)
    lost = 0
    for target in codes:
        levels, leaves, _ = explore.trace(model, trie, sid_ids, [8, 3], 2, target)
        marks = [[cell for cell in level["kept"] + level["cut"] if cell["target"]] for level in levels]
        kept = [any(cell["target"] for cell in level["kept"]) for level in levels]
        assert [len(cells) for cells in marks] == [1] * (sum(kept) + 1 if not kept[-1] else 3) + [0] * (
            0 if kept[-1] else 2 - sum(kept))
        lost += not kept[0] and marks[0][0]["place"] > 2 + explore.CUT_SHOWN - 3
    assert lost


def test_items_that_share_a_sid_and_the_memory():
    _, trie, _, codes = small_search(200, seed=4)
    leaf = int(np.diff(trie.leaf_start).argmax())
    twins = trie.leaf_items[trie.leaf_start[leaf]:trie.leaf_start[leaf + 1]].tolist()
    assert len(twins) > 1 and len({tuple(codes[row]) for row in twins}) == 1
    ranking = explore.rank_items([leaf, leaf], [math.log(0.25), -math.inf], trie, {twins[0]: 0.1875})
    assert [entry["item"] for entry in ranking] == twins
    assert [entry["memory"] for entry in ranking] == pytest.approx([0.75] + [0] * (len(twins) - 1))
    assert explore.rank_items([leaf], [0.0], trie, None)[0]["memory"] is None
    assert all(entry["beam"] == 0 and entry["q"] == pytest.approx(0.25) for entry in ranking)


# ---- The page ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def page(finished_run, tmp_path_factory) -> Path:
    """A page of a run with sft.pt and another checkpoint as rl.pt, 8 users and 12 beams."""
    run = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("page") / "shop"))
    shutil.copy(run / "init.pt", run / "rl.pt")
    call(explore, "--run", run, "--users", 8, "--num-beams", 12, "--memory", 0)
    return run / "explore.html"


@pytest.mark.parametrize("nth, name", [(0, "sft.pt"), (1, "rl.pt")])
def test_the_page_has_what_evaluate_finds(page, tmp_path, nth, name):
    data, run, predicted = read_page(page), page.parent, tmp_path / "predictions"
    call(evaluate, "--run", run, "--checkpoint", run / name, "--num-beams", 12, "--predictions", predicted,
         "--metrics", tmp_path / "metrics", "--memory", 0)
    predictions = read_jsonl(predicted, {})
    items = read_catalogue(run / "items.jsonl")
    assert data["models"] == ["sft.pt", "rl.pt"] and len(data["users"]) == 8
    for n, user in enumerate(data["users"]):
        wanted, found = predictions[n * len(predictions) // 8], user["found"][nth]
        assert user["id"] == wanted["user_id"] and items[user["target"]]["item_id"] == wanted["target"]
        assert [items[entry["item"]]["item_id"] for entry in found["ranking"]] == wanted["items"]
        scores = [math.log(entry["q"]) for entry in found["ranking"]]
        assert scores == pytest.approx(wanted["scores"], abs=1e-4)
        assert found["rank"] == evaluate.rank_of(wanted["target"], wanted["items"])
        assert all(entry["memory"] is None for entry in found["ranking"])


def test_the_page_with_the_memory_has_what_evaluate_finds(page, tmp_path):
    run, out, predicted = page.parent, tmp_path / "page.html", tmp_path / "predictions"
    call(explore, "--run", run, "--users", 8, "--num-beams", 12, "--out", out)
    call(evaluate, "--run", run, "--num-beams", 12, "--predictions", predicted, "--metrics", tmp_path / "m")
    predictions, items, shares = read_jsonl(predicted, {}), read_catalogue(run / "items.jsonl"), []
    for n, user in enumerate(read_page(out)["users"]):
        wanted, found = predictions[n * len(predictions) // 8], user["found"][0]
        assert [items[entry["item"]]["item_id"] for entry in found["ranking"]] == wanted["items"]
        scores = [math.log(entry["q"]) for entry in found["ranking"]]
        assert scores == pytest.approx(wanted["scores"], abs=1e-4)
        for entry in found["ranking"]:                          # the whole history's probabilities
            assert found["without"][0][entry["beam"]] == pytest.approx(entry["q"], abs=1e-4)
            shares.append(entry["memory"])
    assert all(0 <= share <= 1 for share in shares) and max(shares) > 0.1


def test_without_an_item_of_the_history(page):
    """The first row is the whole history's, and each further row the search's without one item."""
    data, run = read_page(page), page.parent
    items = read_catalogue(run / "items.jsonl")
    model, tokenizer, checkpoint = load_model(run / "sft.pt", CPU, items)
    size = checkpoint["sid"]["codebook_size"]
    trie = evaluate.build_trie(torch.from_numpy(codes_of(items)), size, CPU)
    sid_ids, leaf_of = sid_token_ids(tokenizer, 3, size), evaluate.leaf_of_items(trie)
    template = TASKS[checkpoint["args"]["recommends"]].instructions[0]
    for user in data["users"][:3]:
        history, found = user["history"], user["found"][0]
        histories = [history] + [history[:n] + history[n + 1:] for n in range(len(history))]
        for rows, probabilities in zip(histories, found["without"], strict=True):
            prompt = prompt_ids(tokenizer, [template.format(**history_fields(rows, dict(enumerate(items))))])
            leaves, scores = evaluate.beam_search(model, trie, sid_ids, prompt, len(items))
            by_leaf = dict(zip(leaves[0].tolist(), scores[0].exp().tolist()))
            for entry in found["ranking"]:
                wanted = by_leaf[leaf_of[entry["item"]]]
                assert probabilities[entry["beam"]] == pytest.approx(wanted, abs=1e-5)


def test_what_a_click_on_a_token_shows(page):
    data, run = read_page(page), page.parent
    items = read_catalogue(run / "items.jsonl")
    meanings = {row["token"]: row for row in read_jsonl(run / "semantics.jsonl", {})}
    stored = torch.load(run / "sft.pt", weights_only=True)
    matrix = stored["weights"]["model.embed_tokens.weight"].double().numpy()
    vocabulary = json.loads(stored["tokenizer"])["model"]["vocab"]
    ids = {token["content"]: token["id"] for token in json.loads(stored["tokenizer"])["added_tokens"]}
    first = min(n for token, n in ids.items() if token.startswith("<a_"))
    rows = matrix - matrix[:first].mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    words = {piece[1:]: n for piece, n in vocabulary.items() if re.fullmatch(r"Ġ[^\W\d_]{3,}", piece)}
    assert len(data["tokens"]) > 10 and words
    for token, about in data["tokens"].items():
        own = [row for row, item in enumerate(items) if token in item["sid"]]
        assert about["count"] == len(own) and about["items"] == own[:explore.ITEMS_SHOWN]
        assert about["description"] == meanings[token]["description"]
        assert about["keywords"] == meanings[token]["keywords"]
        cosines = sorted((rows[n] @ rows[ids[token]] for n in words.values()), reverse=True)
        best = [cosine for _, cosine in about["words"]]
        assert best == pytest.approx(cosines[:explore.WORDS_SHOWN], abs=0.006)
        for word, cosine in about["words"]:
            assert rows[words[word]] @ rows[ids[token]] == pytest.approx(cosine, abs=0.006)
    shown = {cell["token"] for user in data["users"] for found in user["found"] for level in found["levels"]
             for cell in level["kept"] + level["cut"]}
    shown |= {token for item in data["items"].values() for token in item["sid"]} & set(data["tokens"])
    assert shown <= set(data["tokens"])
    for user in data["users"]:
        for row in [*user["history"], user["target"]]:
            assert data["items"][str(row)] == {"title": items[row]["title"], "sid": items[row]["sid"]}
            assert set(items[row]["sid"]) <= set(data["tokens"])


def test_one_file_without_requests(page):
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\s\"'`]+", text) == ["http://www.w3.org/2000/svg"]     # a name, no link
    assert not re.search(r"@import|\bfetch\(|XMLHttpRequest|\beval\(|innerHTML| src=", text)
    assert "{{data}}" not in text


def test_one_model_no_meanings_hostile_titles(run, capsys):
    """No rl.pt, no semantics.jsonl, more users than there are, an id that is text, HTML in a title."""
    (run / "semantics.jsonl").unlink()
    items = read_jsonl(run / "items.jsonl", {})
    for item in items:
        item["title"] = f"</script><img src=x onerror=alert(1)> {item['title']} <!--"
    write_lines(run / "items.jsonl", items)
    call(explore, "--run", run, "--users", 10_000, "--split", "valid", "--out", run / "new" / "page.html")
    text = (run / "new" / "page.html").read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and "<img" not in text and "<!--" not in text
    data = read_page(run / "new" / "page.html")
    assert data["models"] == ["sft.pt"] and len(data["users"]) == len(read_jsonl(run / "valid.jsonl", {}))
    assert data["items"][str(data["users"][0]["target"])]["title"].startswith("</script><img")
    assert all(about["keywords"] == [] and about["description"] == "" for about in data["tokens"].values())
    assert "sft.pt: the target is among ten items for" in capsys.readouterr().out


def test_mistakes(run, capsys):
    (run / "sft.pt").unlink()
    assert_stops(capsys, call, explore, "--run", run, words=("sft.pt", "cannot be loaded"))
    assert not (run / "explore.html").exists()


# ---- In a browser --------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ERRORS = """<script>
window.problems = [];
window.onerror = console.error = console.warn = (...all) => problems.push(String(all));
</script>"""
STEPS = """
const seen = [], $$ = selector => [...document.querySelectorAll(selector)];
const texts = selector => $$(selector).map(node => node.textContent).join("");
const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const look = () => seen.push({
  user: $("user").value, cards: $$(".cards > li").length, picks: $$(".pick").length, why: texts(".why h2"),
  chosen: texts(".pick[aria-pressed=true]"), targets: $$(".pick.target").length, memory: $$(".memory").length,
  model: $$("h2 small").at(-1).textContent, path: $$("path.on").length,
  pressed: $$(".pick[aria-pressed=true]").length, on: texts(".row.on .chip"),
  tree: texts("ol:not(.cut) .row .chip"),
  open: $("dialog").open, dialog: $("dialog").textContent });
look();
$$(".pick")[2].click(); look();
press("m"); look();
press("ArrowRight"); look();
press("ArrowLeft"); look();
$$(".cards .chip")[0].click(); look();
press("ArrowRight"); look();
$$("dialog button")[0].click(); look();
$("user").value = 5; $("user").onchange(); press("0"); look();
document.body.append(el("pre", { id: "seen" }, JSON.stringify([seen, problems])));
"""


def visit(page: Path, folder: Path) -> tuple[list[dict], list[str]]:
    """Open a copy of the page in Chromium and do STEPS; -> what was seen after each one, errors."""
    text = page.read_text(encoding="utf-8").replace("<style>", ERRORS + "<style>", 1)
    end, copy = text.rindex("</script>"), folder / "copy.html"
    copy.write_text(text[:end] + STEPS + text[end:], encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom"]
    command = [CHROMIUM, *flags, f"--user-data-dir={folder / 'profile'}", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    match = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert match, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(html.unescape(match[1]))


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_in_a_browser(page, tmp_path):
    data = read_page(page)
    (first, third, other, right, left, opened, still_open, closed, last), problems = visit(page, tmp_path)
    assert problems == []
    user = data["users"][0]

    def is_right(seen: dict, user: dict, model: int, pick: int) -> None:
        found = user["found"][model]
        entry = found["ranking"][pick]
        name = data["items"][str(entry["item"])]["title"]
        assert seen["cards"] == len(user["history"]) and seen["picks"] == 20 and seen["memory"] == 0
        assert seen["why"] == f"Why “{name}”?" and name in seen["chosen"]
        assert seen["chosen"].startswith(f"{pick + 1}") and seen["model"] == data["models"][model]
        assert seen["tree"] == "".join(cell["token"] for level in found["levels"] for cell in level["kept"])
        assert seen["path"] == len(found["levels"]) - 1 and seen["pressed"] == 1
        assert seen["on"] == "".join(data["items"][str(entry["item"])]["sid"])
        assert seen["targets"] == sum((one["rank"] or 99) <= 10 for one in user["found"])
    is_right(first, user, 0, 0)
    is_right(third, user, 0, 2)
    is_right(other, user, 1, 2)
    is_right(right, data["users"][1], 1, 0)
    is_right(left, user, 1, 0)
    assert not left["open"] and opened["open"] and still_open["open"] and not closed["open"]
    token = data["items"][str(user["history"][0])]["sid"][0]
    about = data["tokens"][token]
    for text in (token, about["description"], ", ".join(about["keywords"]), about["words"][0][0],
                 f"Items: {about['count']}", data["items"][str(about["items"][-1])]["title"]):
        assert text in opened["dialog"]
    assert still_open["user"] == "0"                    # keys do nothing behind the dialog
    is_right(last, data["users"][5], 1, 9)


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_memory_in_a_browser(page, tmp_path):
    """Shown where a recommendation has a share."""
    data = read_page(page)
    for entry in data["users"][0]["found"][0]["ranking"]:
        entry["memory"] = 0.3
    text = page.read_text(encoding="utf-8")
    start, end = text.index('id="data">') + 10, text.index("</script>", text.index('id="data">'))
    (tmp_path / "page.html").write_text(text[:start] + json.dumps(data) + text[end:], encoding="utf-8")
    (first, *_), problems = visit(tmp_path / "page.html", tmp_path)
    assert problems == [] and first["memory"] == 10
