"""How fast search, training and RL are, against what one would write with public libraries, in one process.

    python tests/benchmark.py                          # two cores: a 6-layer, 256-wide Qwen2 with 151,936 rows
    python tests/benchmark.py --device cuda            # a random model of Qwen2.5-1.5B's shape, bf16
    python tests/benchmark.py --run runs/industrial    # and the search and sampling of that run's model

Every contestant runs once to warm up (there its peak memory is taken, above what was resident before), then in turn
with the others, so that a busy machine is busy for all. Medians; ratios to ours. On a CPU the contestants must find
the same items with the same scores to 1e-4 (sft: the same loss), or the script stops. pytest does not run this file.
"""
import argparse
import collections
import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import Trie, beam_search, build_trie, expand  # noqa: E402
from init_embeddings import autocast, load_model, sid_token_ids  # noqa: E402
from rl import tree_log_probs, trie_paths  # noqa: E402
from tokenize_items import (assign, codes_of, kmeans, pick_device, read_catalogue, read_samples,  # noqa: E402
                            seed_centroids)
from train import (PRESETS, Example, ResponseLoss, collate, length_batches, make_optimizer, parse_args,  # noqa: E402
                   prompt_ids, recommends_by, task_pairs, train_step)

# Letters used in shapes: B users, T prompt tokens, W beams, G group, L = 3 levels, K = 256 codes, N items, V rows.
L, K = 3, 256
SHAPES = {"cpu": (256, 768, 6, 4), "cuda": (1536, 8960, 28, 12), "smoke": (32, 64, 2, 2)}   # CUDA: Qwen2.5-1.5B


# ---- measuring ----

def peak_memory(work: Callable, device: torch.device) -> tuple:
    """Run it; -> result and the bytes it held at its peak beyond what was held before (None where unknown)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return work(), torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    try:
        ctypes.CDLL(None).malloc_trim(0)                # freed memory goes back, lest it hides in the baseline
        Path("/proc/self/clear_refs").write_text("5")   # the peak, VmHWM, starts again from here
        before = int(status.read_text().split("VmRSS:")[1].split()[0])
    except (OSError, AttributeError):
        return work(), None
    return work(), 1024 * (int(status.read_text().split("VmHWM:")[1].split()[0]) - before)


class Bench:
    """Runs contestants and collects the rows of the table."""
    def __init__(self, device: torch.device, repeats: int, budget: float) -> None:
        self.device, self.repeats, self.budget, self.rows = device, repeats, budget, []
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def race(self, title: str, contestants: dict[str, Callable]) -> dict:
        """Warm up, then measure in turns; returns what each contestant found."""
        print(f"... {title}", file=sys.stderr, flush=True)
        found, peak, times = {}, {}, {name: [] for name in contestants}
        contestants["ours"]()                           # what torch sets up once counts for nobody
        for name, work in contestants.items():
            found[name], peak[name] = peak_memory(work, self.device)
        self.wait()
        for _ in range(self.repeats):
            for name, work in contestants.items():      # slow ones stop when their share of time is used up
                if not times[name] or sum(times[name]) < self.budget:
                    start = time.perf_counter()
                    work()
                    self.wait()
                    times[name].append(time.perf_counter() - start)
        median = {name: statistics.median(taken) for name, taken in times.items()}
        self.rows += [dict(work=title, contestant=name, median_s=median[name], min_s=min(taken), max_s=max(taken),
                           repeats=len(taken), ratio=median[name] / median["ours"], peak_bytes=peak[name])
                      for name, taken in times.items()]
        return found

    def note(self, title: str, name: str, text: str, **facts) -> None:
        """Put facts beside a contestant's row."""
        next(r for r in self.rows if (r["work"], r["contestant"]) == (title, name)).update(note=text, **facts)

    def table(self) -> None:
        print(f"{'work':<34}{'contestant':<31}{'median':>10}{'ratio':>9}{'peak memory':>13}")
        for row in self.rows:
            cells = [f"{row['median_s'] * 1e3:.1f} ms" if "median_s" in row else "",
                     f"{row['ratio']:.2f} x" if "ratio" in row else "",
                     f"{row['peak_bytes'] / 2 ** 20:.1f} MB" if row.get("peak_bytes") is not None else ""]
            print(f"{row['work']:<34}{row['contestant']:<31}{cells[0]:>10}{cells[1]:>9}{cells[2]:>13}  "
                  f"{row.get('note', '')}")


# ---- the model, the catalogue, and the constraint as others write it ----

class Setup(NamedTuple):
    """A model, its catalogue, and prompts of one length (which spares the others all padding)."""
    name: str
    model: torch.nn.Module
    trie: Trie
    sid_ids: torch.Tensor               # (L, K)
    sids: list[list[int]]               # the leaves' SIDs as token ids
    prompts: list[list[int]]


def make_setup(name: str, model, codes: torch.Tensor, ids: torch.Tensor, prompts: list[list[int]]) -> Setup:
    """Build the trie of codes (N, L) on the device of ids (L, K); weights in bf16 on CUDA."""
    model.to(torch.bfloat16 if ids.device.type == "cuda" else torch.float32).eval()
    leaves = torch.unique(codes, dim=0).T               # in the order of the trie's
    sids = torch.stack([row[c] for row, c in zip(ids.cpu(), leaves)], 1).tolist()
    return Setup(name, model, build_trie(codes, ids.shape[1], ids.device), ids, sids, prompts)


def random_codes(count: int, seed: int = 0) -> torch.Tensor:
    """Distinct random SIDs, (N, L)."""
    keys = torch.randperm(K ** L, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.stack([keys // K ** (L - 1 - level) % K for level in range(L)], 1)


def random_backbone(args: argparse.Namespace, device: torch.device):
    """Qwen2's architecture with random weights, scaled so that its choices are neither uniform nor certain."""
    width, inner, layers, heads = SHAPES["smoke" if args.smoke else device.type]
    rows = 3000 if args.smoke else 151936
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=rows, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, initializer_range=2 / width ** 0.5)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def random_setup(args: argparse.Namespace, device: torch.device) -> Setup:
    """A random model with a random catalogue."""
    model = random_backbone(args, device)
    rows = model.config.vocab_size
    prompts = torch.randint(rows - L * K, (64, 100 if not args.smoke else 12)).tolist()
    ids = torch.arange(rows - L * K, rows, device=device).view(L, K)
    return make_setup("random", model, random_codes(10000 if not args.smoke else 2000), ids, prompts)


def run_setup(args: argparse.Namespace, device: torch.device, bench: Bench) -> Setup:
    """A finished run's model, catalogue and test prompts of the commonest length; notes its buckets' padding."""
    run = Path(args.run)
    items = read_catalogue(run / "items.jsonl")
    model, tokenizer, checkpoint = load_model(args.checkpoint or run / "sft.pt", device, items)
    samples = read_samples(run / "test.jsonl", {item["item_id"] for item in items})
    name = recommends_by(checkpoint["args"])
    prompts = prompt_ids(tokenizer, [p for p, _ in task_pairs(name, {"items": items, "samples": samples})])
    padding = 1 - sum(map(len, prompts)) / sum(
        len(rows) * max(len(prompts[r]) for r in rows) for rows in length_batches(prompts, 16384))
    bench.rows.append(dict(work=f"{run.name}: length buckets of 16,384", contestant="ours", padding=padding,
                           note=f"{padding:.1%} padding over {len(prompts)} prompts"))
    length = collections.Counter(map(len, prompts)).most_common(1)[0][0]
    ids = sid_token_ids(tokenizer, checkpoint["sid"]["num_levels"], checkpoint["sid"]["codebook_size"]).to(device)
    prompts = [p for p in prompts if len(p) == length]
    return make_setup(run.name, model, torch.from_numpy(codes_of(items)), ids, prompts)


def prefix_table(sids: list[list[int]]) -> dict[tuple[int, ...], list[int]]:
    """Token ids that may follow each prefix of token ids: the dictionary that prefix_allowed_tokens_fn looks up."""
    table = collections.defaultdict(dict)
    for sid in sids:
        for level, token in enumerate(sid):
            table[tuple(sid[:level])][token] = True
    return {prefix: list(tokens) for prefix, tokens in table.items()}


def transitions(trie: Trie, level: int, k: int) -> torch.Tensor:
    """The child of each node by code, -1 where there is none; (nodes, K)."""
    first, codes = trie.first_child[level], trie.codes[level].long()
    parents = torch.repeat_interleave(torch.arange(len(first) - 1, device=codes.device), first.diff())
    table = torch.full((len(first) - 1, k), -1, device=codes.device)
    table[parents, codes] = torch.arange(len(codes), device=codes.device)
    return table


def mask_rows(scores: torch.Tensor, ids: torch.Tensor, legal: torch.Tensor) -> torch.Tensor:
    """Scores (rows, V) where legal (rows, K) allows the ids (K,), -inf elsewhere."""
    out = torch.full_like(scores, -torch.inf)
    out[:, ids] = scores[:, ids].masked_fill(~legal, -torch.inf)
    return out


class VectorisedMask(LogitsProcessor):
    """The constraint without a Python loop over beams: a table of transitions per level."""
    def __init__(self, setup: Setup) -> None:
        self.ids, self.prompt = setup.sid_ids, len(setup.prompts[0])
        self.tables = [transitions(setup.trie, level, self.ids.shape[1]) for level in range(len(self.ids))]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = input_ids[:, self.prompt:]
        nodes = torch.zeros(len(said), dtype=torch.long, device=said.device)
        for level in range(said.shape[1]):
            nodes = self.tables[level][nodes, (said[:, level, None] == self.ids[level]).int().argmax(1)]
        return mask_rows(scores, self.ids[said.shape[1]], self.tables[said.shape[1]][nodes] >= 0)


def generate(setup: Setup, users: int, count: int, **how):
    """Hugging Face's generate on the first prompts, `count` sequences each."""
    ids = torch.tensor(setup.prompts[:users], device=setup.sid_ids.device)
    return setup.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), num_return_sequences=count, use_cache=True,
        max_new_tokens=len(setup.sid_ids), eos_token_id=None, pad_token_id=0, renormalize_logits=True, **how)


def said(setup: Setup, sequences: torch.Tensor, count: int) -> list[list[tuple[int, ...]]]:
    """The SIDs of generated rows as token ids, per user."""
    rows = list(map(tuple, sequences[:, len(setup.prompts[0]):].tolist()))
    return [rows[a:a + count] for a in range(0, len(rows), count)]


# ---- the rows of the table ----

@torch.no_grad()
def bench_search(bench: Bench, setup: Setup, users: int, beams: int) -> None:
    """Constrained beam search: ours, the prefill alone, generate with a Python constraint and with a mask."""
    model, device, prompts = setup.model, bench.device, setup.prompts[:users]
    users = len(prompts)
    ids, table, length = torch.tensor(prompts, device=device), prefix_table(setup.sids), len(prompts[0])

    title = f"{setup.name}: beams B={users} T={length} W={beams}"
    beam = dict(num_beams=beams, do_sample=False, length_penalty=0.0)
    constraint = {"HF prefix_allowed_tokens_fn": dict(
                      beam, prefix_allowed_tokens_fn=lambda _, sent: table[tuple(sent[length:].tolist())]),
                  "HF vectorised mask": dict(beam, logits_processor=[VectorisedMask(setup)])}

    def prefill():
        with autocast(device):
            model.base_model(input_ids=ids, use_cache=True)

    found = bench.race(title, {
        "ours": lambda: beam_search(model, setup.trie, setup.sid_ids, prompts, beams),
        "prefill alone": prefill,
        **{name: lambda how=how: generate(setup, users, beams, **how) for name, how in constraint.items()}})
    leaves, scores = (x.tolist() for x in found["ours"])
    ours = [{tuple(setup.sids[n]) for n in row} for row in leaves]
    for name, how in constraint.items():
        lists = zip(ours, said(setup, found[name], beams))
        share = sum(len(mine & set(theirs)) for mine, theirs in lists) / (users * beams)
        scored = generate(setup, 2, beams, return_dict_in_generate=True, output_scores=True, **how)
        worst = float((scored.sequences_scores.view(2, -1).cpu() - torch.tensor(scores[:2])).abs().max())
        bench.note(title, name, f"{share:.2%} same items, scores within {worst:.0e}", same_items=share,
                   score_difference=worst)
        assert device.type != "cpu" or worst < 1e-4 and share > 0.999, f"{name} and ours disagree"


@torch.no_grad()
def bench_sampling(bench: Bench, setup: Setup, users: int, group: int) -> None:
    """G rollouts per prompt: distinct ones by stochastic beam search, independent ones by generate."""
    noise, prompts = torch.Generator(bench.device).manual_seed(0), setup.prompts[:users]
    title, theirs = f"{setup.name}: rollouts B={len(prompts)} G={group}", "HF do_sample, vectorised mask"
    how = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, logits_processor=[VectorisedMask(setup)])
    found = bench.race(title, {
        "ours": lambda: beam_search(setup.model, setup.trie, setup.sid_ids, prompts, group, sample=noise),
        theirs: lambda: generate(setup, users, group, **how)})
    for name, rows in (("ours", found["ours"][0].tolist()), (theirs, said(setup, found[theirs], group))):
        repeated = 1 - sum(len(set(row)) for row in rows) / sum(map(len, rows))
        bench.note(title, name, f"{repeated:.1%} of the rollouts repeat another", duplicates=repeated)


def bench_update(bench: Bench, setup: Setup, users: int, group: int) -> None:
    """Log-probabilities of G rollouts per prompt, forward and backward; what the optimizer adds is the same for all."""
    model, trie, ids, prompts = setup.model, setup.trie, setup.sid_ids, setup.prompts[:users]
    title = f"{setup.name}: update B={len(prompts)} T={len(prompts[0])} G={group}"
    device, levels = bench.device, len(ids)
    leaves, _, _ = beam_search(model, trie, ids, prompts, group, sample=torch.Generator(device).manual_seed(0))
    advantage = torch.randn(leaves.shape, generator=torch.Generator().manual_seed(0)).to(device)[..., None]
    said = torch.tensor(setup.sids, device=device)[leaves].flatten(0, 1)                     # (B * G, L) token ids
    written = torch.cat([torch.tensor(prompts, device=device).repeat_interleave(group, 0), said], 1)[:, :-1]
    parents = [torch.zeros_like(leaves), *trie_paths(trie, leaves)[:-1]]
    legal = [(transitions(trie, level, ids.shape[1]) >= 0)[nodes.flatten()] for level, nodes in enumerate(parents)]
    code = [(said[:, level, None] == ids[level]).int().argmax(1, keepdim=True) for level in range(levels)]

    def backward(log_probs):
        model.zero_grad(set_to_none=True)
        (log_probs.view(*leaves.shape, levels) * advantage).mean().backward()
        return log_probs.detach().view(*leaves.shape, levels)

    def repeated():
        with autocast(device):
            hidden = model.base_model(input_ids=written, use_cache=False).last_hidden_state[:, -levels:]
        rows = model.get_output_embeddings().weight[ids].float()
        logits = [(hidden[:, level].float() @ rows[level].T).masked_fill(~legal[level], -torch.inf)
                  for level in range(levels)]
        return backward(torch.cat([x.log_softmax(-1).gather(1, c) for x, c in zip(logits, code)], 1))

    def whole_vocabulary():
        with autocast(device):
            logits = model(input_ids=written, use_cache=False, logits_to_keep=levels).logits
        return backward(logits.float().log_softmax(-1).gather(-1, said[..., None]).squeeze(-1))

    found = bench.race(title, {
        "ours": lambda: backward(tree_log_probs(model, trie, ids, prompts, leaves)),
        "prompt repeated, needed logits": repeated, "prompt repeated, all logits": whole_vocabulary})
    worst = float((found["ours"] - found["prompt repeated, needed logits"]).abs().max())
    bench.note(title, "prompt repeated, needed logits", f"log-probs within {worst:.0e}", difference=worst)
    assert device.type != "cpu" or worst < 1e-4, "repeated prompts and ours disagree"
    model.zero_grad(set_to_none=True)


def bench_trie(bench: Bench, count: int, users: int, beams: int, rows: int) -> None:
    """The last level's step from given logits: legal continuations, their log-probabilities, the best W."""
    codes, device, g = random_codes(count, seed=1), bench.device, torch.Generator().manual_seed(0)
    title, start = f"trie step N={count:,} W={beams}", time.perf_counter()
    trie, took = build_trie(codes, K, device), time.perf_counter() - start
    size = sum(x.nbytes for x in (*trie.first_child, *trie.codes, trie.leaf_start, trie.leaf_items)) / count
    bench.rows.append(dict(work=title, contestant="build", median_s=took, note=f"{size:.1f} bytes per item"))
    ids, depth2 = torch.arange(rows - L * K, rows, device=device).view(L, K), len(trie.codes[1])
    nodes = torch.randperm(depth2, generator=g)[:users * beams].view(users, beams).to(device)
    logits = torch.randn(users * beams, rows, generator=g).to(device)
    small = logits[:, ids[2]].view(users, beams, K).contiguous()
    before = torch.randn(users, beams, generator=g).to(device)
    parent = torch.searchsorted(trie.first_child[1].long(), torch.arange(depth2, device=device), right=True) - 1
    prefixes = list(zip(ids[0][trie.codes[0][parent]].tolist(), ids[1][trie.codes[1]].tolist()))
    bounds, tokens = trie.first_child[2].tolist(), ids[2][trie.codes[2]].tolist()
    table = {prefix: tokens[a:b] for prefix, a, b in zip(prefixes, bounds, bounds[1:])}
    asked, legal = [prefixes[n] for n in nodes.flatten().tolist()], transitions(trie, 2, K) >= 0

    def best(masked):
        total = masked.log_softmax(-1).view(users, beams, rows) + before[..., None]
        return total.flatten(1).topk(beams).values

    def by_dictionary():
        mask = torch.full_like(logits, -torch.inf)
        for row, prefix in enumerate(asked):
            mask[row, table[prefix]] = 0
        return best(logits + mask)

    found = bench.race(title, {
        "ours": lambda: expand(trie, 2, nodes, before, small, "trie")[1].flatten(1).topk(beams).values,
        "python dict per beam": by_dictionary,
        "dense mask over the vocabulary": lambda: best(mask_rows(logits, ids[2], legal[nodes.flatten()]))})
    assert all(torch.allclose(scores, found["ours"], atol=1e-4) for scores in found.values()), "not the same scores"


def bench_kmeans(bench: Bench, count: int, width: int, k: int) -> None:
    """At most 20 rounds of Lloyd's algorithm from the same k-means++ start, on clusters that overlap."""
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        return print("K-means: scikit-learn is not installed, row left out")
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(k, width, generator=g)[torch.randint(k, (count,), generator=g)] * 0.5
         + torch.randn(count, width, generator=g)).to(bench.device)
    host = x.cpu().numpy()
    title = f"K-means {count:,} x {width}, K={k}"

    def theirs() -> torch.Tensor:
        start = seed_centroids(x, k, torch.Generator().manual_seed(0)).cpu().numpy()
        fitted = KMeans(k, init=start, n_init=1, max_iter=20, tol=0, algorithm="lloyd").fit(host)
        return torch.from_numpy(fitted.cluster_centers_)

    found = bench.race(title, {"ours": lambda: kmeans(x, k, 20, torch.Generator().manual_seed(0)),
                               "scikit-learn Lloyd": theirs})
    for name, centroids in found.items():
        bench.note(title, name, f"mean squared error {assign(x, centroids.to(x))[1].mean():.3f}")


def ragged_samples(count: int, rows: int) -> list[Example]:
    """Prompts of 60 to 140 tokens, each with a SID of three; every fourth with a text of 10 to 40 instead."""
    rng = random.Random(0)
    lengths = [(rng.randrange(60, 141), rng.randrange(10, 41) if n % 4 == 3 else 3) for n in range(count)]
    return [Example("next", [rng.randrange(1, rows) for _ in range(p + r)], p) for p, r in lengths]


def make_trainer(model, samples: list[Example], batch_size: int, precision: str, folder: str):
    """Hugging Face's Trainer as its users set it up: labels of -100 on the prompt, batches padded to the longest."""
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer, TrainingArguments
    rows = [{"input_ids": e.ids, "attention_mask": [1] * len(e.ids),
             "labels": [-100] * e.start + e.ids[e.start:]} for e in samples]
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"pad": 0}, "pad")), pad_token="pad")
    settings = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=batch_size, num_train_epochs=1, learning_rate=1e-6,
        bf16=precision == "bfloat16", use_cpu=model.device.type == "cpu", report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)
    return Trainer(model, settings, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(words))


def bench_sft(bench: Bench, args: argparse.Namespace, batch_size: int, precision: str) -> None:
    """One update on one batch, optimizer and all: ours against Hugging Face's Trainer."""
    if importlib.util.find_spec("accelerate") is None:
        return print("sft: accelerate is not installed, row left out (pip install accelerate)")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")      # as train.py does, here for both
    model = random_backbone(args, bench.device)
    samples = ragged_samples(batch_size, model.config.vocab_size)
    ours = parse_args(["--lr", "1e-6", "--precision", precision])
    vars(ours).update({k: v for k, v in PRESETS["hf" if bench.device.type == "cuda" else "tiny"].items() if k != "lr"},
                      rank=0, world=1)

    def our_update() -> None:
        torch.backends.cuda.enable_flash_sdp(bench.device.type != "cpu")                # as train.py does
        train_step(ResponseLoss(model).train(), make_optimizer(model, ours), samples, ours)
        model.zero_grad(set_to_none=True)
        torch.backends.cuda.enable_flash_sdp(True)

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, samples, batch_size, precision, folder)
        with torch.no_grad():                           # the same loss, hence the same work
            mine = ResponseLoss(model)(*collate(samples[:4], bench.device)).mean().item()
            inputs = {k: v.to(bench.device) for k, v in trainer.data_collator(trainer.train_dataset[:4]).items()}
            loss = trainer.compute_loss(model, inputs).item()
        assert bench.device.type != "cpu" or abs(mine - loss) < 1e-4, f"losses differ: {mine}, {loss}"

        def their_update() -> None:
            with contextlib.redirect_stdout(sys.stderr):                # it prints a summary
                trainer.train()                                         # its setting up is not counted
            model.zero_grad(set_to_none=True)

        title = f"sft update B={batch_size}, {precision}"
        bench.race(title, {"ours": our_update, "HF Trainer": their_update})
    for name in ("ours", "HF Trainer"):
        row = next(r for r in bench.rows if (r["work"], r["contestant"]) == (title, name))
        bench.note(title, name, f"{len(samples) / row['median_s']:.2f} samples per second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each contestant")
    parser.add_argument("--budget", type=float, default=60, help="seconds after which a contestant repeats no more")
    parser.add_argument("--works", default="search,sampling,trie,kmeans,sft,rl", help="parts of the table, by commas")
    parser.add_argument("--run", help="also measure with this run's model and test prompts")
    parser.add_argument("--checkpoint", help="instead of RUN/sft.pt")
    parser.add_argument("--out", help="write the rows to this file, one JSON object per line")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device, works = pick_device(args.device), args.works.split(",")
    chip = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__} | transformers {transformers.__version__} | {device} | {chip} | "
          f"load {os.getloadavg()[0]:.1f}")
    bench = Bench(device, 1 if args.smoke else args.repeats, args.budget)
    users, rows = (3, 3000) if args.smoke else (16, 151936)
    setups = [random_setup(args, device)] if {"search", "sampling", "rl"} & set(works) else []
    setups += [run_setup(args, device, bench)] if args.run else []
    for setup in setups:
        if "search" in works:
            bench_search(bench, setup, users, 20)
            bench_search(bench, setup, 2 * users, 50)
        if "sampling" in works:
            bench_sampling(bench, setup, users, 16)
        if "rl" in works:
            bench_update(bench, setup, users, 16)
    for count in () if "trie" not in works else (10 ** 4, 10 ** 5) if args.smoke else (10 ** 4, 10 ** 6, 10 ** 7):
        bench_trie(bench, count, users, 20, rows)
    if "kmeans" in works:
        bench_kmeans(bench, *((2000, 16, 32) if args.smoke else (100_000, 384, 256)))
    with autocast(device, "fast"):
        fast = torch.is_autocast_enabled(device.type)
    for precision in () if "sft" not in works else ("float32", "bfloat16") if fast else ("float32",):
        bench_sft(bench, args, 4 if args.smoke else 16, precision)
    bench.table()
    if args.out:
        Path(args.out).write_text("".join(json.dumps(row) + "\n" for row in bench.rows), encoding="utf-8")


if __name__ == "__main__":
    main()
