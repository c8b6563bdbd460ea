"""Time search, training and RL against what one would write with public libraries, in one process.

Each method runs once to warm up, which also measures its peak memory beyond what was held before. Then the
methods run in turn, so that a busy machine slows all of them. Times are medians, ratios are to ours. On a CPU
all methods must find the same items with the same scores to 1e-4 (sft: the same loss, --loss vocab), or the
script stops.

Prints  the table; with --out FILE, writes its rows as JSON, one object per line

Examples, from the project's root
  python tests/studies/benchmark.py                          # a Qwen2 with 6 layers, width 256, 151,936 rows
  python tests/studies/benchmark.py --device cuda            # a random model of Qwen2.5-1.5B's shape, bf16
  python tests/studies/benchmark.py --run runs/industrial    # also search and sampling with that run's model
"""
import argparse
import collections
import contextlib
import ctypes
import gc
import importlib.util
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from evaluate import beam_search, read_pairs  # noqa: E402
from init_embeddings import (Trie, autocast, build_trie, expand, length_batches, load_model,  # noqa: E402
                             make_optimizer, sid_token_ids, trie_paths)
from rl import Catalogue, tree_log_probs  # noqa: E402
from tokenize_items import (assign, codes_of, kmeans, make_parser, number,  # noqa: E402
                            read_catalogue, seed_centroids, set_up, write_jsonl)
from train import (MAX_GRAD_NORM, PRESETS, TASKS, Batch, Example, collate,  # noqa: E402
                   micro_batches, prompt_ids, response_losses)

# Letters used in shapes: B users, T prompt tokens, W beams, G rollouts, L levels, K codes per level, N items,
# V vocabulary rows, D width.
LEVELS, CODES = 3, 256


class Sizes(NamedTuple):
    """How large the workloads are."""
    width: int                          # of the random model
    inner: int
    layers: int
    heads: int
    rows: int = 151_936                 # of its vocabulary
    prompt: int = 100                   # tokens
    users: int = 16
    items: int = 10_000
    tries: tuple[int, ...] = (10 ** 4, 10 ** 6, 10 ** 7)
    points: tuple[int, int, int] = (100_000, 384, 256)          # K-means: number, width, clusters
    batch: int = 16                     # examples of an sft update


SIZES = {
    "cpu": Sizes(width=256, inner=768, layers=6, heads=4),
    "cuda": Sizes(width=1536, inner=8960, layers=28, heads=12),         # Qwen2.5-1.5B
    "smoke": Sizes(width=32, inner=64, layers=2, heads=2, rows=3000, prompt=12, users=3, items=2000,
                   tries=(10 ** 4, 10 ** 5), points=(2000, 16, 32), batch=4),
}


# ---- Measuring -----------------------------------------------------------------------------------

def peak_memory(work: Callable, device: torch.device) -> tuple:
    """Run it; -> its result, and its peak memory in bytes beyond what was held before (None if unknown)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return work(), torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    try:
        ctypes.CDLL(None).malloc_trim(0)                        # return freed memory, or it counts as held
        Path("/proc/self/clear_refs").write_text("5")           # restart the peak, VmHWM
        before = int(status.read_text().split("VmRSS:")[1].split()[0])
    except (OSError, AttributeError):                           # not Linux
        return work(), None
    result = work()
    peak = int(status.read_text().split("VmHWM:")[1].split()[0])
    return result, 1024 * (peak - before)


class Bench:
    """Measures methods and collects the rows of the table."""
    def __init__(self, device: torch.device, repeats: int, budget: float) -> None:
        self.device, self.repeats, self.budget, self.rows = device, repeats, budget, []

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def race(self, title: str, methods: dict[str, Callable]) -> dict:
        """Warm up, then measure in turns; -> what each method returned."""
        print(f"... {title}", file=sys.stderr, flush=True)
        found, peak, times = {}, {}, {name: [] for name in methods}
        methods["ours"]()                                       # what torch sets up once counts for nobody
        for name, work in methods.items():
            found[name], peak[name] = peak_memory(work, self.device)
        self.wait()
        for _ in range(self.repeats):
            for name, work in methods.items():
                if sum(times[name]) < self.budget:              # a slow method repeats less
                    start = time.perf_counter()
                    work()
                    self.wait()
                    times[name].append(time.perf_counter() - start)
        ours = statistics.median(times["ours"])
        for name, taken in times.items():
            median = statistics.median(taken)
            self.rows.append({"work": title, "contestant": name, "median_s": median, "min_s": min(taken),
                              "max_s": max(taken), "repeats": len(taken), "ratio": median / ours,
                              "peak_bytes": peak[name]})
        return found

    def row(self, title: str, name: str) -> dict:
        """The row of a method, to add facts to it."""
        return next(row for row in self.rows if row["work"] == title and row["contestant"] == name)

    def print_table(self) -> None:
        print(f"{'work':<34}{'method':<31}{'median':>10}{'ratio':>9}{'peak memory':>13}")
        for row in self.rows:
            median = f"{row['median_s'] * 1e3:.1f} ms" if "median_s" in row else ""
            ratio = f"{row['ratio']:.2f} x" if "ratio" in row else ""
            peak = f"{row['peak_bytes'] / 2 ** 20:.1f} MB" if row.get("peak_bytes") is not None else ""
            print(f"{row['work']:<34}{row['contestant']:<31}{median:>10}{ratio:>9}{peak:>13}  "
                  f"{row.get('note', '')}")


# ---- Models and catalogues -----------------------------------------------------------------------

class Setup(NamedTuple):
    """A model, its catalogue, and prompts of one length, so that no method has to pad."""
    name: str
    model: torch.nn.Module
    trie: Trie
    sid_ids: torch.Tensor               # (L, K)
    sids: list[list[int]]               # token ids of each leaf's SID
    prompts: list[list[int]]


def make_setup(name: str, model, codes: torch.Tensor, sid_ids: torch.Tensor,
               prompts: list[list[int]]) -> Setup:
    """Build the trie of codes (N, L) on the device of sid_ids (L, K); on CUDA the weights become bf16."""
    model.to(torch.bfloat16 if sid_ids.device.type == "cuda" else torch.float32).eval()
    leaves = torch.unique(codes, dim=0).T                       # (L, leaves), in the order of the trie's
    sids = torch.stack([row[code] for row, code in zip(sid_ids.cpu(), leaves)], 1).tolist()
    trie = build_trie(codes, sid_ids.shape[1], sid_ids.device)
    return Setup(name, model, trie, sid_ids, sids, prompts)


def random_codes(count: int, seed: int = 0) -> torch.Tensor:
    """Distinct random SIDs, (N, L)."""
    keys = torch.randperm(CODES ** LEVELS, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.stack([keys // CODES ** (LEVELS - 1 - level) % CODES for level in range(LEVELS)], 1)


def last_rows(rows: int, device: torch.device) -> torch.Tensor:
    """The vocabulary's last rows as the ids of the SID tokens, (L, K)."""
    return torch.arange(rows - LEVELS * CODES, rows, device=device).view(LEVELS, CODES)


def random_backbone(sizes: Sizes, device: torch.device):
    """A Qwen2 with random weights, scaled so that its choices are neither uniform nor certain."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=sizes.rows, hidden_size=sizes.width, intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=2,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
        initializer_range=2 / sizes.width ** 0.5)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def random_setup(sizes: Sizes, device: torch.device) -> Setup:
    """A random model with a random catalogue."""
    model = random_backbone(sizes, device)
    prompts = torch.randint(sizes.rows - LEVELS * CODES, (64, sizes.prompt)).tolist()
    return make_setup("random", model, random_codes(sizes.items), last_rows(sizes.rows, device), prompts)


def run_setup(run: Path, checkpoint: str | None, bench: Bench) -> Setup:
    """A run's model, catalogue and test prompts of the most frequent length. Notes the batches' padding."""
    items = read_catalogue(run / "items.jsonl")
    model, tokenizer, saved = load_model(checkpoint or run / "sft.pt", bench.device, items)
    pairs = read_pairs(run, saved["args"].get("recommends", "next"), "test", items, limit=0)
    prompts = prompt_ids(tokenizer, [pair.instruction for pair in pairs])
    lengths = [len(prompt) for prompt in prompts]
    batches = length_batches(lengths, 16384)
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in batches)
    padding = 1 - sum(lengths) / padded
    bench.rows.append({"work": f"{run.name}: length buckets of 16,384", "contestant": "ours",
                       "padding": padding, "note": f"{padding:.1%} padding over {len(prompts)} prompts"})
    sid = saved["sid"]
    sid_ids = sid_token_ids(tokenizer, sid["num_levels"], sid["codebook_size"]).to(bench.device)
    [(length, _)] = collections.Counter(lengths).most_common(1)
    prompts = [prompt for prompt in prompts if len(prompt) == length]
    return make_setup(run.name, model, torch.from_numpy(codes_of(items)), sid_ids, prompts)


# ---- The constraint as others write it -----------------------------------------------------------

def prefix_table(sids: list[list[int]]) -> dict[tuple[int, ...], list[int]]:
    """The token ids that may follow each prefix of token ids, as prefix_allowed_tokens_fn looks them up."""
    table = collections.defaultdict(dict)
    for sid in sids:
        for level, token in enumerate(sid):
            table[tuple(sid[:level])][token] = True
    return {prefix: list(tokens) for prefix, tokens in table.items()}


def transitions(trie: Trie, level: int, codebook_size: int) -> torch.Tensor:
    """The child of each node by code, -1 if there is none; (nodes, K)."""
    first, codes = trie.first_child[level], trie.codes[level].long()
    parents = torch.repeat_interleave(torch.arange(len(first) - 1, device=codes.device), first.diff())
    table = torch.full((len(first) - 1, codebook_size), -1, device=codes.device)
    table[parents, codes] = torch.arange(len(codes), device=codes.device)
    return table


def mask_rows(scores: torch.Tensor, ids: torch.Tensor, legal: torch.Tensor) -> torch.Tensor:
    """The scores (n, V) of the ids (K,) that are legal (n, K), -inf elsewhere."""
    masked = torch.full_like(scores, -torch.inf)
    masked[:, ids] = scores[:, ids].masked_fill(~legal, -torch.inf)
    return masked


class VectorisedMask(LogitsProcessor):
    """The constraint without a Python loop over beams: a table of transitions per level."""
    def __init__(self, setup: Setup) -> None:
        self.sid_ids, self.prompt_length = setup.sid_ids, len(setup.prompts[0])
        num_levels, codebook_size = self.sid_ids.shape
        self.tables = [transitions(setup.trie, level, codebook_size) for level in range(num_levels)]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        generated = input_ids[:, self.prompt_length:]
        nodes = torch.zeros(len(generated), dtype=torch.long, device=generated.device)
        level = generated.shape[1]
        for above in range(level):
            codes = (generated[:, above, None] == self.sid_ids[above]).int().argmax(1)
            nodes = self.tables[above][nodes, codes]
        return mask_rows(scores, self.sid_ids[level], self.tables[level][nodes] >= 0)


def generate(setup: Setup, users: int, count: int, **options):
    """Hugging Face's generate on the first prompts, `count` sequences each."""
    ids = torch.tensor(setup.prompts[:users], device=setup.sid_ids.device)
    return setup.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), num_return_sequences=count, use_cache=True,
        max_new_tokens=len(setup.sid_ids), eos_token_id=None, pad_token_id=0, renormalize_logits=True,
        **options)


def generated_sids(setup: Setup, sequences: torch.Tensor, count: int) -> list[list[tuple[int, ...]]]:
    """The SIDs at the end of generated sequences, as token ids, `count` per user."""
    sids = [tuple(row) for row in sequences[:, len(setup.prompts[0]):].tolist()]
    return [sids[start:start + count] for start in range(0, len(sids), count)]


# ---- Search, sampling and RL ---------------------------------------------------------------------

@torch.no_grad()
def bench_search(bench: Bench, setup: Setup, users: int, beams: int) -> None:
    """Constrained beam search: ours, the prefill alone, generate with a Python constraint and with a mask."""
    model, prompts = setup.model, setup.prompts[:users]
    users, length = len(prompts), len(prompts[0])
    ids, table = torch.tensor(prompts, device=bench.device), prefix_table(setup.sids)

    def prefill():
        with autocast(bench.device, "cuda"):
            model.base_model(input_ids=ids, use_cache=True)

    def allowed_tokens(_, sequence: torch.Tensor) -> list[int]:
        return table[tuple(sequence[length:].tolist())]

    beam = {"num_beams": beams, "do_sample": False, "length_penalty": 0.0}
    theirs = {
        "HF prefix_allowed_tokens_fn": {**beam, "prefix_allowed_tokens_fn": allowed_tokens},
        "HF vectorised mask": {**beam, "logits_processor": [VectorisedMask(setup)]},
    }
    methods = {"ours": lambda: beam_search(model, setup.trie, setup.sid_ids, prompts, beams),
               "prefill alone": prefill}
    for name, options in theirs.items():
        methods[name] = lambda options=options: generate(setup, users, beams, **options)
    title = f"{setup.name}: beams B={users} T={length} W={beams}"
    found = bench.race(title, methods)

    leaves, scores = found["ours"]
    ours = [{tuple(setup.sids[leaf]) for leaf in row} for row in leaves.tolist()]
    for name, options in theirs.items():
        lists = generated_sids(setup, found[name], beams)
        same = sum(len(mine & set(other)) for mine, other in zip(ours, lists)) / (users * beams)
        scored = generate(setup, 2, beams, return_dict_in_generate=True, output_scores=True, **options)
        their_scores = scored.sequences_scores.view(2, -1)
        difference = float((their_scores - scores[:2]).abs().max())
        bench.row(title, name).update(
            same_items=same, score_difference=difference,
            note=f"{same:.2%} same items, scores within {difference:.0e}")
        if bench.device.type == "cpu":
            assert difference < 1e-4 and same > 0.999, f"{name} and ours disagree"


@torch.no_grad()
def bench_sampling(bench: Bench, setup: Setup, users: int, group: int) -> None:
    """G rollouts per prompt: distinct ones by stochastic beam search, independent ones by generate."""
    noise, prompts = torch.Generator(bench.device).manual_seed(0), setup.prompts[:users]
    title, theirs = f"{setup.name}: rollouts B={len(prompts)} G={group}", "HF do_sample, vectorised mask"
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0,
               "logits_processor": [VectorisedMask(setup)]}
    found = bench.race(title, {
        "ours": lambda: beam_search(setup.model, setup.trie, setup.sid_ids, prompts, group, sample=noise),
        theirs: lambda: generate(setup, users, group, **options)})
    rollouts = {"ours": found["ours"][0].tolist(), theirs: generated_sids(setup, found[theirs], group)}
    for name, rows in rollouts.items():
        repeated = 1 - sum(len(set(row)) for row in rows) / sum(len(row) for row in rows)
        bench.row(title, name).update(duplicates=repeated,
                                      note=f"{repeated:.1%} of the rollouts repeat another")


def bench_update(bench: Bench, setup: Setup, users: int, group: int) -> None:
    """Log-probabilities of G rollouts per prompt, forward and backward, without the optimizer."""
    model, trie, sid_ids, prompts = setup.model, setup.trie, setup.sid_ids, setup.prompts[:users]
    device, (num_levels, codebook_size) = bench.device, sid_ids.shape
    noise = torch.Generator(device).manual_seed(0)
    leaves, _ = beam_search(model, trie, sid_ids, prompts, group, sample=noise)
    advantages = torch.randn(leaves.shape, generator=torch.Generator().manual_seed(0)).to(device)
    catalogue = Catalogue(trie, sid_ids, codes=torch.empty(0), item_ids=[])     # codes and ids are not used

    tokens = torch.tensor(setup.sids, device=device)[leaves].flatten(0, 1)      # (B * G, L)
    repeated_prompts = torch.tensor(prompts, device=device).repeat_interleave(group, 0)
    sequences = torch.cat([repeated_prompts, tokens], 1)[:, :-1]                # (B * G, T + L - 1)
    parents = [torch.zeros_like(leaves), *trie_paths(trie, leaves)[:-1]]
    legal, codes = [], []                               # for each level (B * G, K) and (B * G, 1)
    for level in range(num_levels):
        legal.append((transitions(trie, level, codebook_size) >= 0)[parents[level].flatten()])
        codes.append((tokens[:, level, None] == sid_ids[level]).int().argmax(1, keepdim=True))

    def backward(log_probs: torch.Tensor) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        log_probs = log_probs.view(*leaves.shape, num_levels)
        (log_probs * advantages[..., None]).mean().backward()
        return log_probs.detach()

    def ours():
        return backward(tree_log_probs(model, catalogue, prompts, leaves))

    def repeated():
        with autocast(device, "cuda"):
            hidden = model.base_model(input_ids=sequences, use_cache=False).last_hidden_state
        hidden, rows = hidden[:, -num_levels:], model.get_output_embeddings().weight[sid_ids].float()
        log_probs = []
        for level in range(num_levels):
            logits = (hidden[:, level].float() @ rows[level].T).masked_fill(~legal[level], -torch.inf)
            log_probs.append(logits.log_softmax(-1).gather(1, codes[level]))
        return backward(torch.cat(log_probs, 1))

    def whole_vocabulary():
        with autocast(device, "cuda"):
            logits = model(input_ids=sequences, use_cache=False, logits_to_keep=num_levels).logits
        return backward(logits.float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1))

    title = f"{setup.name}: update B={len(prompts)} T={len(prompts[0])} G={group}"
    found = bench.race(title, {"ours": ours, "prompt repeated, needed logits": repeated,
                               "prompt repeated, all logits": whole_vocabulary})
    difference = float((found["ours"] - found["prompt repeated, needed logits"]).abs().max())
    bench.row(title, "prompt repeated, needed logits").update(
        difference=difference, note=f"log-probs within {difference:.0e}")
    if device.type == "cpu":
        assert difference < 1e-4, "repeated prompts and ours disagree"
    model.zero_grad(set_to_none=True)


# ---- One step down a large trie ------------------------------------------------------------------

def bench_trie(bench: Bench, count: int, users: int, beams: int, rows: int) -> None:
    """The last level's step from given logits: legal continuations, their log-probabilities, the best W."""
    device, generator = bench.device, torch.Generator().manual_seed(0)
    codes, start = random_codes(count, seed=1), time.perf_counter()
    trie, seconds = build_trie(codes, CODES, device), time.perf_counter() - start
    parts = [*trie.first_child, *trie.codes, *trie.is_new, trie.leaf_start, trie.leaf_items]
    size = sum(part.nbytes for part in parts) / count
    title = f"trie step N={count:,} W={beams}"
    bench.rows.append({"work": title, "contestant": "build", "median_s": seconds,
                       "note": f"{size:.1f} bytes per item"})

    sid_ids, num_nodes = last_rows(rows, device), len(trie.codes[1])            # nodes of depth 2
    nodes = torch.randperm(num_nodes, generator=generator)[:users * beams].view(users, beams).to(device)
    logits = torch.randn(users * beams, rows, generator=generator).to(device)
    level_logits = logits[:, sid_ids[2]].view(users, beams, CODES).contiguous()
    scores = torch.randn(users, beams, generator=generator).to(device)          # of the beams so far
    nodes_of_depth_2 = torch.arange(num_nodes, device=device)
    parents = torch.searchsorted(trie.first_child[1].long(), nodes_of_depth_2, right=True) - 1
    prefixes = list(zip(sid_ids[0][trie.codes[0][parents]].tolist(), sid_ids[1][trie.codes[1]].tolist()))
    bounds, tokens = trie.first_child[2].tolist(), sid_ids[2][trie.codes[2]].tolist()
    table = {prefix: tokens[a:b] for prefix, a, b in zip(prefixes, bounds, bounds[1:])}
    asked = [prefixes[node] for node in nodes.flatten().tolist()]
    legal = transitions(trie, 2, CODES) >= 0

    def ours():
        _, log_probs = expand(trie, 2, nodes, level_logits)
        return (scores[..., None] + log_probs).flatten(1).topk(beams).values

    def best(masked: torch.Tensor) -> torch.Tensor:
        total = masked.log_softmax(-1).view(users, beams, rows) + scores[..., None]
        return total.flatten(1).topk(beams).values

    def by_dictionary():
        mask = torch.full_like(logits, -torch.inf)
        for row, prefix in enumerate(asked):
            mask[row, table[prefix]] = 0
        return best(logits + mask)

    def by_mask():
        return best(mask_rows(logits, sid_ids[2], legal[nodes.flatten()]))

    found = bench.race(title, {"ours": ours, "python dict per beam": by_dictionary,
                               "dense mask over the vocabulary": by_mask})
    for name, best_scores in found.items():
        assert torch.allclose(best_scores, found["ours"], atol=1e-4), f"{name} and ours disagree"


# ---- K-means -------------------------------------------------------------------------------------

def bench_kmeans(bench: Bench, count: int, width: int, clusters: int) -> None:
    """At most 20 rounds of Lloyd's algorithm from the same k-means++ start, on clusters that overlap."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        print(f"K-means: scikit-learn cannot be imported ({error}), row left out")
        return
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(clusters, width, generator=generator)
    x = centers[torch.randint(clusters, (count,), generator=generator)] * 0.5
    x = (x + torch.randn(count, width, generator=generator)).to(bench.device)
    host = x.cpu().numpy()

    def ours() -> torch.Tensor:
        return kmeans(x, clusters, 20, torch.Generator().manual_seed(0))

    def theirs() -> torch.Tensor:
        start = seed_centroids(x, clusters, torch.Generator().manual_seed(0)).cpu().numpy()
        fitted = KMeans(clusters, init=start, n_init=1, max_iter=20, tol=0, algorithm="lloyd").fit(host)
        return torch.from_numpy(fitted.cluster_centers_)

    title = f"K-means {count:,} x {width}, K={clusters}"
    found = bench.race(title, {"ours": ours, "scikit-learn Lloyd": theirs})
    for name, centroids in found.items():
        _, distance = assign(x, centroids.to(x))
        bench.row(title, name).update(note=f"mean squared error {distance.mean():.3f}")


# ---- Supervised training -------------------------------------------------------------------------

def ragged_examples(count: int, rows: int) -> list[Example]:
    """Prompts of 60 to 140 tokens, each with a SID of three; every fourth with a text of 10 to 40 instead."""
    rng, examples = random.Random(0), []
    lengths = [(rng.randrange(60, 141), rng.randrange(10, 41) if n % 4 == 3 else 3) for n in range(count)]
    for prompt, response in lengths:
        ids = [rng.randrange(1, rows) for _ in range(prompt + response)]
        examples.append(Example("next", ids, prompt))
    return examples


def make_trainer(model, examples: list[Example], precision: str, folder: str):
    """Hugging Face's Trainer as its users set it up: labels of -100 on the prompt, padding to the longest."""
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer, TrainingArguments
    dataset = [{"input_ids": e.ids, "attention_mask": [1] * len(e.ids),
                "labels": [-100] * e.start + e.ids[e.start:]} for e in examples]
    words = Tokenizer(models.WordLevel({"pad": 0}, "pad"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="pad")
    settings = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=len(examples), num_train_epochs=1, learning_rate=1e-6,
        bf16=precision == "bfloat16", use_cpu=model.device.type == "cpu", report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)
    return Trainer(model, settings, train_dataset=dataset, data_collator=DataCollatorForSeq2Seq(tokenizer))


def vocabulary_loss(model, batch: Batch) -> torch.Tensor:
    """The losses of train.py over the whole vocabulary, as --loss vocab: its trie is not used."""
    sid_ids = last_rows(len(model.get_output_embeddings().weight), model.device)
    one_item = torch.zeros(1, LEVELS, dtype=torch.long)
    return response_losses(model, build_trie(one_item, CODES, model.device), sid_ids, batch)


def train_update(model, examples: list[Example], precision: str, beta2: float, weight_decay: float,
                 micro_tokens: int) -> None:
    """One update as in the loop of train.py, with a new optimizer."""
    device = model.train().device
    optimizer = make_optimizer(model, 1e-6, beta2, weight_decay)
    nll, counts = torch.zeros(len(TASKS), device=device), torch.zeros(len(TASKS), device=device)
    optimizer.zero_grad(set_to_none=True)
    supervised = sum(e.weight * (len(e.ids) - e.start) for e in examples)
    for piece in micro_batches(examples, micro_tokens, rank=0, world=1):
        inputs = collate(piece, device)
        with autocast(device, precision):
            losses = vocabulary_loss(model, inputs) * inputs.weights
        (losses.sum() / supervised).backward()
        nll.index_add_(0, inputs.tasks, losses.detach())
        counts.index_add_(0, inputs.tasks, inputs.weights)
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()


def bench_sft(bench: Bench, sizes: Sizes, precision: str) -> None:
    """One update on one batch, optimizer included: ours against Hugging Face's Trainer."""
    if importlib.util.find_spec("accelerate") is None:
        print("sft: accelerate is not installed, row left out (pip install accelerate)")
        return
    model = random_backbone(sizes, bench.device)
    examples = ragged_examples(sizes.batch, sizes.rows)
    preset = PRESETS["hf" if bench.device.type == "cuda" else "tiny"]
    settings = {name: preset[name] for name in ("beta2", "weight_decay", "micro_tokens")}

    def our_update() -> None:
        torch.backends.cuda.enable_flash_sdp(bench.device.type != "cpu")        # as train.py does
        train_update(model, examples, precision, **settings)
        model.zero_grad(set_to_none=True)
        torch.backends.cuda.enable_flash_sdp(True)

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, examples, precision, folder)
        with torch.no_grad():                                   # the same loss, hence the same work
            ours = vocabulary_loss(model, collate(examples[:4], bench.device)).mean().item()
            inputs = trainer.data_collator(trainer.train_dataset[:4])
            inputs = {name: tensor.to(bench.device) for name, tensor in inputs.items()}
            theirs = trainer.compute_loss(model, inputs).item()
        if bench.device.type == "cpu":
            assert abs(ours - theirs) < 1e-4, f"the losses differ: {ours}, {theirs}"

        def their_update() -> None:
            with contextlib.redirect_stdout(sys.stderr):        # it prints a summary
                trainer.train()                                 # setting it up is not counted
            model.zero_grad(set_to_none=True)

        title = f"sft update B={len(examples)}, {precision}"
        bench.race(title, {"ours": our_update, "HF Trainer": their_update})
    for name in ("ours", "HF Trainer"):
        row = bench.row(title, name)
        row["note"] = f"{len(examples) / row['median_s']:.2f} samples per second"


# ---- Command line --------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    flag = parser.add_argument
    flag("--device", default="cpu", help="cpu or cuda")
    flag("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    flag("--repeats", type=number(int, 1), default=5, help="timed runs of each method")
    flag("--budget", type=number(float, 1e-3), default=60, help="seconds until a method repeats no more")
    flag("--works", default="search,sampling,trie,kmeans,sft,rl", help="parts of the table, by commas")
    flag("--run", help="also measure with this run's model and test prompts")
    flag("--checkpoint", help="instead of RUN/sft.pt")
    flag("--out", help="write the rows of the table to this file")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    transformers.logging.set_verbosity_error()
    device, works = set_up(args.device), args.works.split(",")
    torch.backends.cuda.enable_flash_sdp(True)                  # torch's default, for all but sft
    chip = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__} | transformers {transformers.__version__} | {device} | {chip} | "
          f"load {os.getloadavg()[0]:.1f}")
    bench = Bench(device, 1 if args.smoke else args.repeats, args.budget)
    sizes = SIZES["smoke" if args.smoke else device.type]

    setups = []
    if {"search", "sampling", "rl"} & set(works):
        setups.append(random_setup(sizes, device))
    if args.run:
        setups.append(run_setup(Path(args.run), args.checkpoint, bench))
    for setup in setups:
        if "search" in works:
            bench_search(bench, setup, sizes.users, beams=20)
            bench_search(bench, setup, 2 * sizes.users, beams=50)
        if "sampling" in works:
            bench_sampling(bench, setup, sizes.users, group=16)
        if "rl" in works:
            bench_update(bench, setup, sizes.users, group=16)
    if "trie" in works:
        for count in sizes.tries:
            bench_trie(bench, count, sizes.users, beams=20, rows=sizes.rows)
    if "kmeans" in works:
        bench_kmeans(bench, *sizes.points)
    if "sft" in works:
        bench_sft(bench, sizes, "float32")
        with autocast(device, "fast"):
            has_bf16 = torch.is_autocast_enabled(device.type)
        if has_bf16:
            bench_sft(bench, sizes, "bfloat16")
    bench.print_table()
    if args.out:
        write_jsonl(args.out, bench.rows)


if __name__ == "__main__":
    main()
