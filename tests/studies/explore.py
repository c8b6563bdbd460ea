"""Make one HTML page that shows why a model recommends what it does: histories, the search, ten items.

For a few dozen users, the page has the history as cards, with the chosen item's probability if one of them
were not there; ten items with the target marked and the memory's share of each, of sft.pt and rl.pt side by
side where both exist; and the beam search level by level: what the tokens mean, their probability among their
siblings, what was cut, where the target was lost. A click on a token shows its description, its items and the
nearest words.

Reads   RUN/items.jsonl, test.jsonl (or valid), sft.pt, rl.pt if it exists, semantics.jsonl if it exists
Writes  the page, a single file that needs no server and makes no request

Example, from the project's root
  python tests/studies/explore.py --run runs/demo --out runs/demo/explore.html
"""
import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from evaluate import (Memory, Trie, build_trie, count_pairs, expand, follow, leaf_of_items,  # noqa: E402
                      make_memory, prefill, rank_of, read_tokens, recall, remembered)
from init_embeddings import check_lengths, load_model, new_items, read_semantics, sid_token_ids  # noqa: E402
from rl import Catalogue, tree_log_probs  # noqa: E402
from tokenize_items import (atomic_write, codes_of, make_parser, number, read_catalogue,  # noqa: E402
                            read_samples, set_up, sid_token)
from train import TASKS, history_fields, prompt_ids  # noqa: E402

# Letters used in shapes: W beams, M most children, K codes.
CUT_SHOWN = 6                           # the best candidates of a level that were cut
ITEMS_SHOWN, WORDS_SHOWN = 12, 10       # of a token


# ---- The search, step by step --------------------------------------------------------------------

@torch.no_grad()
def trace(model, trie: Trie, sid_ids: Tensor, prompt: list[int], num_beams: int, target: list[int],
          memory: Memory | None = None) -> tuple[list[dict], list[int], list[float]]:
    """Do what evaluate.beam_search does, and note every step; target: the codes of the wanted item.

    -> the levels as the page needs them; leaves and their log-probabilities as beam_search gives them.
    """
    head, prefix = model.get_output_embeddings().weight, prefill(model, [prompt])
    hidden, best, ancestors, slots, levels = prefix.last, None, [], [], []
    nodes = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    scores, before, on_way = nodes.float(), nodes.float(), nodes == 0   # on_way: a prefix of the target?
    for level, code in enumerate(target):
        if level:
            tokens = sid_ids[level - 1][trie.codes[level - 1][nodes]]           # (1, W)
            ancestors = follow(ancestors, best // trie.max_children[level - 1])
            slots.append(tokens.shape[1])
            hidden = read_tokens(model, tokens, prefix, level - 1, ancestors, slots)
        logits = hidden.float() @ head[sid_ids[level]].float().T                # (1, W, K)
        children, log_probs = expand(trie, level, nodes, logits)
        total = mixed = scores[..., None] + log_probs   # (1, W, M)
        if memory:
            mass = remembered(trie, level + 1, children, memory).masked_fill(total == -torch.inf, 0)
            mixed = torch.logaddexp((1 - memory.share).log() + total, mass.log())
        best = mixed.flatten(1).topk(min(num_beams, total[0].numel(), len(trie.codes[level]))).indices
        codes = trie.codes[level][children]
        on_way = on_way[..., None] & (codes == code) & (total > -torch.inf)
        levels.append(describe(level, codes[0], mixed[0] - before[0, :, None], mixed[0], on_way[0], best[0]))
        scores, before, nodes, on_way = (x.flatten(1).gather(1, best)
                                         for x in (total, mixed, children, on_way))
    return levels, nodes[0].tolist(), before[0].tolist()


def describe(level: int, codes: Tensor, among_siblings: Tensor, total: Tensor, on_way: Tensor,
             best: Tensor) -> dict:
    """A level's beams: those that were kept, at the places `best` of all candidates (W, M), and those cut."""
    alive = int((total > -torch.inf).sum())
    kept = best[:alive].tolist()
    order = total.flatten().argsort(descending=True)[:alive].tolist()
    others = [place for place in order if place not in set(kept)]
    lost = [place for place in others[CUT_SHOWN:] if on_way.flatten()[place]]

    def cell(place: int) -> dict:
        parent, slot = at = divmod(place, codes.shape[1])
        return {"token": sid_token(level, int(codes[at])), "parent": parent, "target": bool(on_way[at]),
                "place": (kept + others).index(place) + 1,
                "p": round(float(among_siblings[at].exp()), 6), "q": round(float(total[at].exp()), 6)}
    return {"candidates": alive, "kept": [cell(place) for place in kept],
            "cut": [cell(place) for place in others[:CUT_SHOWN] + lost]}


def rank_items(leaves: list[int], scores: list[float], trie: Trie, masses: dict | None) -> list[dict]:
    """The items of the leaves. masses: what the memory, if any, adds to an item's probability, by row."""
    ranking = []
    for beam, (leaf, score) in enumerate(zip(leaves, scores)):
        for row in trie.leaf_items[trie.leaf_start[leaf]:trie.leaf_start[leaf + 1]].tolist():
            if score > -math.inf:
                q = math.exp(score)
                share = None if masses is None else min(1.0, masses.get(row, 0.0) / q)
                ranking.append({"item": row, "beam": beam, "q": q, "memory": share})
    return ranking


def mix(probabilities: list[float], leaves: list[int], masses: dict, leaf_of: dict) -> list[float]:
    """The mixture's probabilities of the leaves. masses: lambda * p_memory by row."""
    by_leaf, share = Counter(), sum(masses.values())
    for row, mass in masses.items():
        by_leaf[leaf_of[row]] += mass
    return [(1 - share) * p + by_leaf[leaf] for p, leaf in zip(probabilities, leaves)]


def explain(path: Path, users: list[dict], items: list[dict], num_beams: int, pairs: dict, weight: float,
            device: torch.device) -> dict:
    """Add what a checkpoint finds to each user's "found"; -> the words nearest to each SID token.

    pairs: evaluate.count_pairs of the training samples, by row; weight: lambda.
    """
    model, tokenizer, checkpoint = load_model(path, device, items)
    sid, codes, unseen = checkpoint["sid"], codes_of(items), new_items(checkpoint["sid"], items)
    sid_ids = sid_token_ids(tokenizer, sid["num_levels"], sid["codebook_size"]).to(device)
    trie = build_trie(torch.from_numpy(codes), sid["codebook_size"], device,
                      torch.tensor([item["item_id"] in unseen for item in items]))
    task = TASKS[checkpoint["args"].get("recommends", "next")]
    template = task.instructions[0] + task.end
    item_of, leaf_of = dict(enumerate(items)), dict(enumerate(leaf_of_items(trie).tolist()))
    for user in tqdm(users, desc=path.name, disable=None):
        history, target = user["history"], codes[user["target"]].tolist()
        shorter = [history[:n] + history[n + 1:] for n in range(len(history)) if len(history) > 1]
        prompts = prompt_ids(tokenizer, [template.format(**history_fields(rows, item_of))
                                         for rows in (history, *shorter)])
        recalled = [recall(rows, pairs) for rows in (history, *shorter)]
        masses = [{row: weight * mass for row, mass in found.items()} for found in recalled]
        memory = make_memory(recalled[:1], leaf_of, weight, device) if weight else None
        check_lengths(len(prompts[0]) + sid["num_levels"] - 1, model.config, in_search=True)
        levels, leaves, scores = trace(model, trie, sid_ids, prompts[0], num_beams, target, memory)
        with torch.no_grad():           # the same SIDs by the whole history, and without one of its items
            wanted = torch.tensor(leaves, device=device).expand(len(prompts), -1)
            log_probs = tree_log_probs(model, Catalogue(trie, sid_ids, None, None), prompts, wanted).sum(-1)
        without = [mix(probabilities, leaves, found, leaf_of)
                   for probabilities, found in zip(log_probs.double().exp().tolist(), masses)]
        ranking = rank_items(leaves, scores, trie, masses[0] if weight else None)
        user["found"].append({"levels": levels, "ranking": ranking,
                              "rank": rank_of(user["target"], [entry["item"] for entry in ranking]),
                              "without": [[round(p, 6) for p in row] for row in without]})
    tokens = {token for item in items for token in item["sid"]}
    return nearest_words(model, tokenizer, int(sid_ids.min()), tokens)


# ---- What a click on a token shows ---------------------------------------------------------------

def nearest_words(model, tokenizer, first_sid: int, tokens: set[str]) -> dict[str, list]:
    """For each SID token the words with the nearest embeddings, as [word, cosine]; rows less their mean."""
    weight = model.get_input_embeddings().weight.detach().float()
    pieces = tokenizer.convert_ids_to_tokens(list(range(first_sid)))
    starts = [n for n, piece in enumerate(pieces) if piece and piece[0] in "\u0120\u2581"]      # of words
    words = {n: word for n in starts if len(word := tokenizer.decode([n]).strip()) > 2 and word.isalpha()}
    unit = F.normalize(weight - weight[:first_sid].mean(0), dim=1)
    rows, names, nearest = list(words), list(words.values()), {}
    for token in tokens if rows else ():
        cosines = unit[rows] @ unit[tokenizer.convert_tokens_to_ids(token)]
        best, places = cosines.topk(min(WORDS_SHOWN, len(rows)))
        nearest[token] = [[names[n], round(cosine, 2)] for n, cosine in zip(places.tolist(), best.tolist())]
    return nearest


def gather(users: list[dict], items: list[dict], meanings: dict, words: dict) -> tuple[dict, dict]:
    """The tokens that the page shows, by name, and the items, by row."""
    with_token: dict[str, list[int]] = {}
    for row, item in enumerate(items):
        for token in item["sid"]:
            with_token.setdefault(token, []).append(row)
    rows, names = set(), set()
    for user in users:
        rows |= {*user["history"], user["target"]}
        for found in user["found"]:
            rows |= {entry["item"] for entry in found["ranking"]}
            names |= {cell["token"] for level in found["levels"] for cell in level["kept"] + level["cut"]}
    tokens = {}
    for name in sorted(names | {token for row in rows for token in items[row]["sid"]}):
        own, meaning = with_token[name], meanings.get(name, {"description": "", "keywords": []})
        tokens[name] = {"description": meaning["description"], "keywords": meaning["keywords"],
                        "words": words.get(name, []), "count": len(own), "items": own[:ITEMS_SHOWN]}
        rows |= set(own[:ITEMS_SHOWN])
    return tokens, {row: {"title": items[row]["title"] or items[row]["description"], "sid": items[row]["sid"]}
                    for row in sorted(rows)}


# ---- The page ------------------------------------------------------------------------------------

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Why this item?</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light; --row: 28px; --head: 48px; --tone: 26%; --ink: #1b1f24; --soft: #57616b;
  --line: #d3d9df; --paper: #fff; --card: #f5f7f9; --bar: #d3e3f5; --hit: #7d5200; --mark: #ffe9b8;
  --path: #0b62a8 }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; --tone: 72%; --ink: #e6e9ec;
  --soft: #a3adb7; --line: #3a434c; --paper: #14181c; --card: #1e242a; --bar: #22415f; --hit: #ffd27a;
  --mark: #4a3710; --path: #6cb6f5 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem clamp(.8rem, 3vw, 2.5rem) 3rem; max-width: 1480px; color: var(--ink);
  background: var(--paper); font: .94rem/1.45 system-ui, sans-serif }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.15rem; margin: 1.5rem 0 .5rem } p { margin: .3rem 0 }
small, .soft { color: var(--soft); font-size: .86rem; font-weight: normal }
ol { list-style: none; margin: 0; padding: 0 }
button, select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: .25rem .6rem; cursor: pointer; min-width: 0 }
:focus-visible { outline: 3px solid var(--path); outline-offset: 1px }
nav { display: flex; gap: .5rem; margin: .7rem 0 }
.chip { font: 600 .78rem/1.3 ui-monospace, monospace; padding: .05rem .35rem; white-space: nowrap;
  color: var(--hue); border-color: var(--hue); background: color-mix(in srgb, var(--hue) 12%, var(--paper)) }
.chip.shared { background: var(--hue); color: var(--paper) }
.cards { display: grid; gap: .6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 15.5rem), 1fr)) }
.cards > li, .why { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .7rem }
.cards b { display: block; line-height: 1.3; margin-bottom: .35rem; overflow-wrap: anywhere }
.cards .most { border: 2px solid var(--path) } .most small { color: var(--path); font-weight: 700 }
.meaning { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .5rem; align-items: baseline }
.meaning > span, .row > span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.answer, .lists { display: flex; flex-wrap: wrap; gap: 0 1.4rem }
.lists { flex: 3 1 30rem; min-width: 0 } .lists > div { flex: 1 1 19rem; min-width: 0 }
.why { flex: 2 1 21rem; align-self: start; margin-top: 1.5rem } .why h2 { margin-top: 0 }
.why table { border-spacing: 0 .35rem; width: 100% } .why td { vertical-align: top }
.why td:first-child { width: 1%; padding-right: .6rem }
.why td:last-child { text-align: right; white-space: nowrap }
.pick, .row { background: linear-gradient(90deg, var(--bar) var(--p), var(--card) var(--p)) }
.pick { display: grid; grid-template-columns: 2.2rem 1fr max-content; gap: .2rem .3rem; width: 100%;
  text-align: left; line-height: 1.3; margin-bottom: 3px } .pick > b { font-weight: 500 }
.pick[aria-pressed=true] { border-color: var(--path); box-shadow: inset 0 0 0 1px var(--path) }
.target { --card: var(--mark); --bar: color-mix(in srgb, var(--hit) 22%, var(--mark)); font-weight: 700 }
.row.target i::before { content: "★ "; color: var(--hit) }
.memory { grid-column: 2 / 4; height: 5px;
  background: linear-gradient(90deg, var(--path) var(--p), var(--line) var(--p)) }
.tree { display: grid; grid-template-columns: var(--columns); align-items: start; margin-top: .6rem }
.tree h3 { height: var(--head); margin: 0; font-size: 1rem; line-height: 1.25 } h3 small { display: block }
.tree li { height: var(--row); padding: 1px 0 } .tree svg { width: 100%; margin-top: var(--head) }
.tree path { fill: none; stroke: var(--line); vector-effect: non-scaling-stroke }
.tree path.on { stroke: var(--path) } .row.on { box-shadow: inset 0 0 0 2px var(--path) }
.row { height: 100%; display: grid; grid-template-columns: max-content 1fr max-content; gap: .4rem;
  align-items: center; padding: 0 .35rem; border-radius: 5px; font-size: .86rem }
.row i { font-style: normal; color: var(--soft) } .items { padding-left: .8rem }
.cut { border-top: 2px dashed var(--soft); margin-top: 4px; padding-top: 4px } .cut .up { display: inline }
.up { display: none; color: var(--soft); font: .72rem ui-monospace, monospace; margin-right: .2rem }
dialog { width: min(640px, 94vw); max-height: 88vh; border: 1px solid var(--line); border-radius: 10px;
  background: var(--paper); color: var(--ink); padding: 1rem 1.3rem } dialog::backdrop { background: #0007 }
dialog form { float: right } dialog h2 { margin-top: 0 } dialog li { border-top: 1px solid var(--line) }
@media screen and (max-width: 900px) { .tree { display: block } .tree svg, .items { display: none }
  .up { display: inline } .tree h3 { height: auto; margin: .9rem 0 .3rem } }
@media print { @page { size: A4 landscape; margin: 9mm } * { print-color-adjust: exact } body { padding: 0 }
  :root { --row: 19px; --head: 34px; font-size: 11px } nav, .keys { display: none } .chip { padding: 0 .3rem }
  .cards > li, .pick, section:last-child { break-inside: avoid } }
</style>
<header><h1>Why this item?</h1><p class="soft" id="about"></p>
<nav><button id="back" aria-label="previous user">‹</button><select id="user" aria-label="user"></select>
<button id="next" aria-label="next user">›</button></nav></header>
<main id="main"></main>
<p class="keys soft">Keys: ← → another user, 1 to 9 and 0 an item, m the other model, Tab and Enter a token,
Esc closes it.</p>
<dialog id="dialog"></dialog>
<script type="application/json" id="data">{{data}}</script>
<script>
"use strict";
const $ = id => document.getElementById(id), data = JSON.parse($("data").textContent);
const at = { user: 0, model: 0, pick: 0 };                      // what is shown
const HUES = [208, 18, 162, 300, 52, 340, 235, 90];             // of the levels
const HISTORY = `oldest first. Without it: the chosen item's probability if this one were not there. Filled:
  both SIDs begin alike.`;
const SEARCH = `A row is a beam. Its bar and number are the probability of the token among its siblings; lines
  lead to the children that were kept; below the dashes are the best that were cut. ★ leads to the target.`;

function el(tag, attributes, ...children) {                     // a new element; texts are never read as HTML
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name === "onclick") node.onclick = value;
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else if (value !== false) node.setAttribute(name, value);
  node.append(...children.filter(child => child));
  return node;
}
const percent = p => p < .0005 ? "< 0.1 %" : `${(100 * p).toFixed(p < .0995 ? 1 : 0)} %`;
const title = row => data.items[row].title;
const keywords = (token, n) => data.tokens[token].keywords.slice(0, n).join(", ");
const begins = (row, sid, n) => data.items[row].sid.slice(0, n).join() === sid.slice(0, n).join();
const chip = (token, shared) => el("button", {
  class: shared ? "chip shared" : "chip", "--hue": `hsl(${HUES[token.charCodeAt(1) - 97]} 80% var(--tone))`,
  title: keywords(token, 6), onclick: () => openToken(token) }, token);

function historyCards(user, without, most, sid) {
  const card = (row, n) => el("li", { class: n === most && "most" },
    el("small", {}, `${n + 1} of ${user.history.length}`,
      n in without && `; without it ${percent(without[n])}`), el("b", {}, title(row)),
    el("div", { class: "meaning" }, ...data.items[row].sid.flatMap((token, l) =>
      [chip(token, begins(row, sid, l + 1)), el("span", { class: "soft" }, keywords(token, 4))])));
  return el("ol", { class: "cards" }, ...user.history.map(card));
}
function recommendations(user, trace, model) {
  const button = (entry, n, hit) => el("button", { class: hit ? "pick target" : "pick",
    "--p": `${100 * entry.q / trace.ranking[0].q}%`, "aria-pressed": `${model === at.model && n === at.pick}`,
    onclick: () => show({ model, pick: n }) },
    `${n + 1}${hit ? " ★" : ""}`, el("b", {}, title(entry.item)), percent(entry.q),
    entry.memory !== null && el("span", { class: "memory", "--p": `${100 * entry.memory}%` }));
  return el("div", {}, el("h2", {}, "Ten recommendations ", el("small", {}, data.models[model])),
    el("ol", {}, ...trace.ranking.slice(0, 10).map((entry, n) =>
      el("li", {}, button(entry, n, entry.item === user.target)))));
}
function why(user, entry, path, sid, reason) {
  const line = (...cells) => el("tr", {}, ...cells.map(cell => el("td", {}, ...cell)));
  const lines = path.map((cell, l) => {
    const same = user.history.filter(row => begins(row, sid, l + 1)).length;
    const share = same && el("small", {}, `; as ${same} of ${user.history.length} in the history`);
    const factor = `${l ? "× " : ""}${percent(cell.p)}`;
    return line([chip(cell.token, same)], [keywords(cell.token, 5), share], [factor]);
  });
  return el("div", { class: "why" }, el("h2", {}, `Why “${title(entry.item)}”?`), el("table", {}, ...lines,
    line([], [el("b", {}, "probability of the item")], [el("b", {}, `= ${percent(entry.q)}`)])),
    reason && el("p", {}, reason),
    entry.memory !== null && el("p", {}, `${percent(entry.memory)} of it (thin bar) comes from the memory.`));
}
function fate(user, trace) {                                    // where the target was found, or lost
  const name = `The target, “${title(user.target)}”,`;
  if (trace.rank) return `${name} is number ${trace.rank} of the ranking.`;
  const lost = trace.levels.findIndex(level => level.cut.some(cell => cell.target));
  const { cut, kept, candidates } = trace.levels[lost], { place } = cut.find(cell => cell.target);
  return `${name} was cut at level ${lost + 1}: number ${place} of ${candidates}, ${kept.length} are kept.`;
}
function beam(cell, l, levels, chosen) {
  let above = "";
  for (let k = l - 1, up = cell; k >= 0; k--) above = (up = levels[k].kept[up.parent]).token + above;
  return el("li", {}, el("div", { class: `row${cell === chosen ? " on" : ""}${cell.target ? " target" : ""}`,
    "--p": `${100 * cell.p}%`, title: `number ${cell.place} of the level; ${percent(cell.q)} with its path` },
    el("div", {}, el("span", { class: "up" }, above), chip(cell.token)),
    el("span", {}, keywords(cell.token, 3)), el("i", {}, percent(cell.p))));
}
function links(left, right, chosen) {                           // curves from beams to their kept children
  const height = Math.max(left.kept.length, right.kept.length);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 100 ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.style.height = `calc(var(--row) * ${height})`;
  for (const cell of [...right.kept].sort((one, other) => (one === chosen) - (other === chosen))) {
    const path = svg.appendChild(document.createElementNS(svg.namespaceURI, "path"));
    const from = cell.parent + .5, to = cell.place - .5;
    path.setAttribute("d", `M0 ${from} C50 ${from} 50 ${to} 100 ${to}`);
    path.setAttribute("class", cell === chosen ? "on" : "");
    path.style.strokeWidth = `${1 + 10 * Math.sqrt(cell.q)}px`;
  }
  return svg;
}
function tree({ levels, ranking }, path) {
  const parts = levels.flatMap((level, l) => [l && links(levels[l - 1], level, path[l]), el("div", {},
    el("h3", {}, `Level ${l + 1}`, el("small", {}, `${level.kept.length} of ${level.candidates} kept`)),
    el("ol", {}, ...level.kept.map(cell => beam(cell, l, levels, path[l]))),
    level.cut.length && el("ol", { class: "cut" }, ...level.cut.map(cell => beam(cell, l, levels))))]);
  const items = n => ranking.filter(entry => entry.beam === n).map(entry => title(entry.item)).join(" / ");
  const ends = levels.at(-1).kept.map((cell, n) => el("li", {}, el("div", { "--p": "0%",
    class: `row${cell === path.at(-1) ? " on" : ""}${cell.target ? " target" : ""}` },
    `${n + 1}`, el("span", {}, items(n)))));
  const columns = "minmax(0, 1fr) minmax(30px, 70px) ".repeat(levels.length - 1);
  return el("div", { class: "tree", "--columns": `${columns}repeat(2, minmax(0, 1fr))` }, ...parts,
    el("div", { class: "items" }, el("h3", {}, "Items"), el("ol", {}, ...ends)));
}
function openToken(token) {
  const about = data.tokens[token];
  const text = (name, value) => value && el("p", {}, el("b", {}, `${name}: `), value);
  $("dialog").replaceChildren(el("div", {}, el("form", { method: "dialog" }, el("button", {}, "Close")),
    el("h2", {}, token), text("Meaning", about.description), text("Keywords", about.keywords.join(", ")),
    text(`Nearest words in ${data.models[0]}, with their cosine`,
      about.words.map(([word, cosine]) => `${word} ${cosine.toFixed(2)}`).join(", ")),
    text("Items", about.count + (about.count > about.items.length ? ", for example" : "")),
    el("ol", {}, ...about.items.map(row => el("li", {}, title(row))))));
  $("dialog").showModal();
}
function show(change) {
  Object.assign(at, change);
  const user = data.users[at.user], trace = user.found[at.model];
  const entry = trace.ranking[at.pick = Math.min(at.pick, trace.ranking.length - 1)];
  const sid = data.items[entry.item].sid, path = [], picked = document.activeElement.matches(".pick");
  for (let l = sid.length - 1, n = entry.beam; l >= 0; n = path[0].parent, l--)
    path.unshift(trace.levels[l].kept[n]);
  const [whole, ...without] = trace.without.map(probabilities => probabilities[entry.beam]);
  const most = without.indexOf(Math.min(whole * .8, ...without));               // -1 if none matters much
  const reason = most >= 0 && `It would be ${percent(without[most])} without “${title(user.history[most])}”.`;
  $("user").value = at.user;
  $("main").replaceChildren(
    el("section", {}, el("h2", {}, "History ", el("small", {}, HISTORY)),
      historyCards(user, without, most, sid)),
    el("section", { class: "answer" }, el("div", { class: "lists" }, ...user.found.map((trace, model) =>
      recommendations(user, trace, model))), why(user, entry, path, sid, reason)),
    el("section", {}, el("h2", {}, "The search ", el("small", {}, data.models[at.model])),
      el("p", {}, fate(user, trace)), el("p", { class: "soft" }, SEARCH), tree(trace, path)));
  if (picked) document.querySelector(".pick[aria-pressed=true]").focus();
}
const go = step => show({ user: (at.user + step + data.users.length) % data.users.length, pick: 0 });
$("about").textContent = data.about;
$("user").append(...data.users.map((user, n) => el("option", { value: n }, `user ${user.id}: target ` +
  user.found.map(trace => trace.rank ? `number ${trace.rank}` : "was cut").join(", "))));
$("user").onchange = () => show({ user: Number($("user").value), pick: 0 });
$("back").onclick = () => go(-1);
$("next").onclick = () => go(1);
$("dialog").onclick = event => { if (event.target === $("dialog")) $("dialog").close(); };      // beside it
document.onkeydown = event => {
  if ($("dialog").open || event.target.tagName === "SELECT") return;
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "ArrowLeft") go(-1);
  if (event.key === "ArrowRight") go(1);
  if (event.key === "m") show({ model: (at.model + 1) % data.models.length });
  if (/^[0-9]$/.test(event.key)) show({ pick: (Number(event.key) + 9) % 10 });
};
show({});
</script>
</html>
"""


# ---- Command line --------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "run", "device")
    flag = parser.add_argument
    flag("--out", help="the page, instead of RUN/explore.html")
    flag("--split", choices=("test", "valid"), default="test", help="whose histories")
    flag("--users", type=number(int, 1), default=24, help="how many, evenly spread over the split")
    flag("--num-beams", type=number(int, 1), default=20, help="W, beams of the search")
    flag("--memory", type=number(float, 0, 1), default=0.6, metavar="LAMBDA", help="as in evaluate.py")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    device, run = set_up(args.device), Path(args.run)
    items, meanings = read_catalogue(run / "items.jsonl"), {}
    row_of = {item["item_id"]: row for row, item in enumerate(items)}
    if (run / "semantics.jsonl").exists():
        meanings = {row["token"]: row for row in read_semantics(run / "semantics.jsonl", items)}
    samples = read_samples(run / f"{args.split}.jsonl", set(row_of))
    count = min(args.users, len(samples))
    users = [{"id": sample["user_id"], "history": [row_of[item_id] for item_id in sample["history"]],
              "target": row_of[sample["target"]], "found": []}
             for sample in (samples[n * len(samples) // count] for n in range(count))]
    names = [name for name in ("sft.pt", "rl.pt") if name == "sft.pt" or (run / name).exists()]
    train = []
    for sample in read_samples(run / "train.jsonl", set(row_of)):
        history = [row_of[item_id] for item_id in sample["history"]]
        train.append({"history": history, "target": row_of[sample["target"]]})
    pairs = count_pairs(train) if args.memory else {}
    words = [explain(run / name, users, items, args.num_beams, pairs, args.memory, device)
             for name in names][0]
    tokens, shown = gather(users, items, meanings, words)
    about = (f"{run.resolve().name}: {len(items)} items, {args.num_beams} beams, {count} {args.split} users. "
             f"★ is the target, which the user took next. The memory's weight is {args.memory:g}.")
    data = {"about": about, "models": names, "users": users, "tokens": tokens, "items": shown}
    page = PAGE.replace("{{data}}", json.dumps(data).replace("<", "\\u003c"))   # no tag in it ends the script
    out = Path(args.out or run / "explore.html")
    with atomic_write(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    for name, found in zip(names, zip(*(user["found"] for user in users))):
        hits = sum((one["rank"] or math.inf) <= 10 for one in found)
        print(f"{name}: the target is among ten items for {hits} of {count} users")
    print(f"wrote {out}, {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
