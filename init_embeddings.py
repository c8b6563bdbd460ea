"""Stage 3: extend a language model's vocabulary by the SID tokens and initialise their rows.

Every SID token becomes one token that is never split. Its embedding row starts as the mean of the words
that describe its items:

    Eq. 4   V   = V_SID + V_Pre                            TS-Rec (arXiv 2602.22632), section 3.2.2
    Eq. 8   T_s = Tok(Concat(W_s))                         section 4.1; W_s are the keywords of token s
    Eq. 9   e_s = 1 / |T_s| * sum_{v in T_s} E[v]          SA-Init
    Eq. 1   e_s = 1 / |V_Pre| * sum_v E[v]                 STAR, section 2.1: --init mean, its baseline

Reads   RUN/items.jsonl, semantics.jsonl, codebook.pt (for its size, if it exists), a causal LM
Writes  RUN/init.pt: config, tokenizer, weights and SID vocabulary in one file

Differs from the paper
  1. `--backbone tiny` (default) builds a small Qwen2-shaped LM and pretrains it on the item texts.
  2. `--sa-norm`. none: eq. 9 as printed. vocab: each row gets the text rows' average norm, as in the
     authors' code. centered (default): the SA rows' mean moves to the text rows' mean, and each row gets
     the text rows' average distance from it.
  3. An untied head starts likewise, from its own rows. Unused codes get rows too.

Examples
  python init_embeddings.py --backbone runs/demo/init.pt --init mean --out runs/demo/init_mean.pt
"""
import argparse
import hashlib
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AddedToken, AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, Qwen2Tokenizer)

from extract_semantics import read_semantics
from tokenize_items import (
    atomic_write, codes_of, item_text, load_pretrained, load_pt, make_parser, number, parse_sid_token,
    read_catalogue, set_up, sid_token, stop)

# Shapes: V vocabulary rows, D width, L levels, K codes per level, B sequences, T tokens.
PRETRAIN_WINDOW, PRETRAIN_BATCH, PRETRAIN_LR = 128, 16, 2e-3
NORMAL_STD = 0.02                    # initializer_range of Qwen2
LORA_ALPHA, LORA_DROPOUT = 32, 0.05  # STAR, A.4
NOT_COMPARED = ("run", "start", "out", "resume", "device", "keep", "micro_tokens")  # by --resume
# The tiny BPE sees this too, or prompts would be spelled by letters.
PROMPT_ENGLISH = (
    "The user bought. Which item has the title? What is the title of item? Identify the specific SID token "
    "shared by items that exhibit the following scope and characteristics: Describe the typical scope and "
    "shared features of items associated with the token:")

# ---- Vocabulary extension (eq. 4) --------------
def extend_vocabulary(model, tokenizer, num_levels: int, codebook_size: int) -> Tensor:
    """Add the L * K SID tokens, to unused rows first; -> their ids (L, K)."""
    names = [sid_token(level, code) for level in range(num_levels) for code in range(codebook_size)]
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in names])
    sid_ids = sid_token_ids(tokenizer, num_levels, codebook_size)
    if sid_ids.max() >= len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(int(sid_ids.max()) + 1, mean_resizing=False)
    return sid_ids

def check_tokens(tokenizer, sid_ids: Tensor) -> None:
    """Stop unless every SID token is one id in running text and decodes back to itself."""
    ids = sid_ids.flatten().tolist()
    names = tokenizer.convert_ids_to_tokens(ids)
    texts = [f"The item {name}{name}, then" for name in names]
    for name, i, text in zip(names, ids, tokenizer(texts, add_special_tokens=False).input_ids):
        if text.count(i) != 2 or tokenizer.decode([i], skip_special_tokens=True).strip() != name:
            stop(f"this tokenizer reads {name} as {text}, not as one token; choose another backbone")

# ---- Initialisation of the SID rows (eqs. 8, 9; STAR eq. 1) ----
def keyword_rows(text_rows: Tensor, keyword_ids: list[list[int]]) -> Tensor:
    """SA-Init (eq. 9): the mean row of the word pieces of each SID token; (V, D) -> (n, D)."""
    return torch.stack([text_rows[ids].mean(0) for ids in keyword_ids])

def rescale(rows: Tensor, text_rows: Tensor, sa_norm: str) -> Tensor:
    """Apply --sa-norm to SA rows (n, D), given the pretrained rows (V, D)."""
    if sa_norm == "none":
        return rows
    center = torch.zeros_like(text_rows[0])
    if sa_norm == "centered":
        center = text_rows.mean(0)
        rows = rows - rows.mean(0)
    length = (text_rows - center).norm(dim=1).mean()
    return center + rows * (length / rows.norm(dim=1, keepdim=True).clamp_min(1e-12))

def gaussian_rows(text_rows: Tensor, noise: Tensor) -> Tensor:
    """Rows of N(mu, Sigma) fitted to the pretrained rows (section 3.2.2); (V, D), N(0, 1) noise (n, D)."""
    mu = text_rows.mean(0)
    variances, axes = torch.linalg.eigh((text_rows - mu).T @ (text_rows - mu) / len(text_rows))
    return mu + (noise * variances.clamp_min(0).sqrt()) @ axes.T

def initial_rows(text_rows: Tensor, keyword_ids: dict[tuple[int, int], list[int]], num_levels: int,
                 codebook_size: int, init: str, sa_norm: str, sa_depth: int, seed: int) -> Tensor:
    """Rows for all SID tokens, (V, D) -> (L, K, D). keyword_ids: (level, code) -> ids of its keywords.
    Unused tokens, and levels from `sa_depth` on, are gaussian."""
    if init == "mean":
        return text_rows.mean(0).expand(num_levels, codebook_size, -1)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_levels, codebook_size, text_rows.shape[1], generator=generator).to(text_rows)
    if init == "normal":
        return NORMAL_STD * noise
    rows = gaussian_rows(text_rows, noise)
    tokens = [token for token in sorted(keyword_ids) if token[0] < sa_depth]
    if init == "sa" and tokens:
        levels, codes = zip(*tokens)
        sa_rows = keyword_rows(text_rows, [keyword_ids[token] for token in tokens])
        rows[list(levels), list(codes)] = rescale(sa_rows, text_rows, sa_norm)
    return rows

def mean_cosine(rows: Tensor) -> float:
    """Mean cosine between two different rows (n, D). STAR's collapse (section 2.2) is 1."""
    unit = F.normalize(rows.detach().float(), dim=1)
    return ((unit.sum(0).square().sum() - len(unit)) / max(1, len(unit) * (len(unit) - 1))).item()

def show_neighbours(model, tokenizer, sid_ids: Tensor, used: list[str], count: int = 6) -> None:
    """Print the five text tokens nearest to some SID tokens (cosine of centered rows)."""
    weight = model.get_input_embeddings().weight.detach()
    mu = weight[:int(sid_ids.min())].mean(0)
    unit = F.normalize(weight - mu, dim=1)
    for name in used[::max(1, len(used) // count)][:count]:
        row = unit[tokenizer.convert_tokens_to_ids(name)]
        cosines, ids = (unit[:int(sid_ids.min())] @ row).topk(5)
        words = [f"{tokenizer.decode([i]).strip()!r} {cosine:.2f}" for i, cosine in zip(ids, cosines)]
        print(f"neighbours {name:>8} | {', '.join(words)}")

# ---- Backbones ---------------------------------
def pretrain(model, tokens: Tensor, steps: int, seed: int) -> float:
    """Next-token prediction on windows of tokens (n,); -> loss of the last steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), PRETRAIN_LR, betas=(0.95, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PRETRAIN_LR, steps, pct_start=0.3)  # beta1 too
    window, losses = min(PRETRAIN_WINDOW, len(tokens) - 1), []
    torch.backends.cuda.enable_flash_sdp(model.device.type != "cpu")  # slow on a CPU
    model.train()
    for _ in tqdm(range(steps), desc="pretrain", unit="step", disable=None):
        starts = torch.randint(len(tokens) - window, (PRETRAIN_BATCH, 1), generator=generator)
        batch = tokens[starts + torch.arange(window + 1)].to(model.device)  # (B, T + 1)
        with autocast(model.device, "fast"):
            logits = model(batch[:, :-1], use_cache=False).logits  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return sum(losses[-20:]) / len(losses[-20:])

def build_tiny(texts: list[str], width: int, layers: int, vocab_size: int, steps: int, seed: int,
               device: torch.device):
    """A small Qwen2 with its own BPE, pretrained on the item texts; -> model, tokenizer."""
    corpus = texts + [PROMPT_ENGLISH] * max(1, len(texts) // 100)
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(corpus, vocab_size, show_progress=False)
    eos = tokenizer.eos_token_id
    config = AutoConfig.for_model(
        "qwen2", vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=width // 32, num_key_value_heads=width // 32,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None, eos_token_id=eos)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device)
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    tokens = torch.tensor([token for text in ids for token in [*text, eos]])
    loss = pretrain(model, tokens, steps, seed)
    print(f"tiny backbone | {count_parameters(model):.2f} M parameters | {len(tokenizer)} pieces | "
          f"{steps} steps of {PRETRAIN_BATCH * PRETRAIN_WINDOW} tokens, loss {loss:.3f}")
    return model, tokenizer

def load_backbone(name: str, device: torch.device):
    """A Hugging Face causal LM and its tokenizer, in float32."""
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    model, tokenizer = load_pretrained(AutoModelForCausalLM, name, **options)
    if not tokenizer.is_fast or tokenizer.eos_token is None:
        stop(f"--backbone {name}: has no fast tokenizer with an end token; choose another model")
    return model.to(device), tokenizer

@torch.no_grad()
def check_head(model, name: str) -> None:
    """Stop unless logits = last hidden state @ head.T, also if read in two parts, as the search does."""
    ids = torch.arange(1, 9, device=model.device)[None]
    mask = torch.ones(4, 8, dtype=torch.bool, device=model.device).tril(4)[None, None]
    try:
        logits, cache = model(ids, use_cache=False).logits[:, 4:], DynamicCache()
        model.base_model(ids[:, :4], past_key_values=cache, use_cache=True)
        hidden = model.base_model(ids[:, 4:], past_key_values=cache, use_cache=True, attention_mask=mask,
                                  position_ids=torch.arange(4, 8, device=ids.device)[None]).last_hidden_state
        same = torch.allclose(logits, hidden @ model.get_output_embeddings().weight.T, atol=1e-3, rtol=1e-3)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError):
        same = False
    if not same:
        stop(f"--backbone {name}: no plain attention, or its logits are no linear map; choose another")

# ---- Low-rank adapters (train.py --lora) and dropout ----
class LoRA(nn.Module):
    """y = W x + alpha / R * B A dropout(x), with B = 0 at first (arXiv 2106.09685)."""
    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        device = linear.weight.device
        self.linear, self.scale = linear, LORA_ALPHA / rank
        self.a = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.dropout(x, LORA_DROPOUT, self.training), self.a)
        return self.linear(x) + self.scale * F.linear(low, self.b)

def add_lora(model, rank: int) -> None:
    """Put an adapter around every linear layer but the LM head, whatever its name."""
    head = model.get_output_embeddings()
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
             if isinstance(child, nn.Linear) and child is not head]
    if not found:
        stop("--lora: the backbone has no torch.nn.Linear layers; train it without --lora")
    for parent, name, child in found:
        setattr(parent, name, LoRA(child, rank))

def merged_weights(model) -> dict[str, Tensor]:
    """The weights of the same model without adapters: W becomes W + alpha / R * B A."""
    weights = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            a, b = weights.pop(f"{name}.a"), weights.pop(f"{name}.b")
            weights[f"{name}.weight"] = weights.pop(f"{name}.linear.weight") + module.scale * b @ a
            if f"{name}.linear.bias" in weights:
                weights[f"{name}.bias"] = weights.pop(f"{name}.linear.bias")
    return weights

def add_dropout(model, p: float) -> None:
    """Drop parts of embeddings and residual branches of a Llama-like model in training."""
    def hook(module, inputs, output):
        return F.dropout(output, p, model.training)
    model.get_input_embeddings().register_forward_hook(hook)
    for name, module in model.named_modules():
        if name.endswith((".o_proj", ".down_proj")):
            module.register_forward_hook(hook)

# ---- Checkpoints, precision, lengths: for all later stages ----
def sid_digest(items: list[dict]) -> str:
    """Fingerprint of the items' ids and SIDs, in order."""
    text = "\n".join(f"{json.dumps(item['item_id'])} {''.join(item['sid'])}" for item in items)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

def sid_token_ids(tokenizer, num_levels: int, codebook_size: int) -> Tensor:
    """Vocabulary ids of all SID tokens, (L, K)."""
    return torch.tensor([[tokenizer.convert_tokens_to_ids(sid_token(level, code))
                          for code in range(codebook_size)] for level in range(num_levels)])

def new_items(sid: dict, items: list[dict]) -> set:
    """The item_ids that joined after stage 3 and were never a target in training."""
    return {*sid["new_items"], *(item["item_id"] for item in items[sid["num_items"]:])}

def update_sid(sid: dict, items: list[dict], targets: set) -> dict:
    """The "sid" entry of a checkpoint after training on these items, with these targets."""
    still_new = sorted(new_items(sid, items) - targets, key=str)
    return {**sid, "num_items": len(items), "digest": sid_digest(items), "new_items": still_new}

def tied_names(model) -> set[str]:
    """The names of parameters that share another's tensor."""
    once = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - once

def save_model(path: str | Path, model, tokenizer, sid: dict, **extra) -> None:
    """Write a checkpoint: tied weights once, adapters merged."""
    tied = tied_names(model)
    weights = {name: weight.detach() for name, weight in merged_weights(model).items() if name not in tied}
    special = {f"{kind}_token": getattr(tokenizer, f"{kind}_token") for kind in ("bos", "eos", "pad")}
    with atomic_write(path) as temporary:
        torch.save({"config": json.dumps(model.config.to_dict(), default=str), "weights": weights,
                    "tokenizer": tokenizer.backend_tokenizer.to_str(), "special": special, "sid": sid,
                    **extra}, temporary)

def load_model(path: str | Path, device: torch.device, items: list[dict] | None = None):
    """Read a checkpoint of these items; -> model in eval mode, tokenizer, other entries."""
    checkpoint = load_pt(path, ("config", "weights", "tokenizer", "special", "sid"))
    config, weights = json.loads(checkpoint.pop("config")), checkpoint.pop("weights")
    if items is not None:
        sid, known = checkpoint["sid"], items[:checkpoint["sid"]["num_items"]]
        if sid_digest(known) != sid["digest"] or codes_of(items).max() >= sid["codebook_size"]:
            stop(f"{path} is of other SIDs than RUN/items.jsonl; run the stages after stage 1 again")
    config["pad_token_id"] = None  # or its embedding row never trains
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="sdpa")
    model.to(next(iter(weights.values())).dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - tied_names(model):
        stop(f"{path}: weights and config do not fit each other; write the checkpoint again")
    model.tie_weights()
    tokenizer = load_tokenizer(checkpoint.pop("tokenizer"), checkpoint.pop("special"))
    return model.to(device).eval(), tokenizer, checkpoint

def load_tokenizer(text: str, special: dict) -> PreTrainedTokenizerFast:
    """Rebuild a fast tokenizer from its JSON text and its special tokens."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(text, encoding="utf-8")
        special = {name: token for name, token in special.items() if token}
        special["clean_up_tokenization_spaces"] = False
        return PreTrainedTokenizerFast(tokenizer_file=str(path), **special)

def autocast(device: torch.device, precision: str):
    """bf16 arithmetic over float32 weights; "fast": where it is native, "cuda": on GPUs alone."""
    on_cuda = device.type == "cuda"
    on_cpu = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)  # not in torch 2.11
    enabled = {"bfloat16": True, "fast": on_cuda or on_cpu, "cuda": on_cuda, "float32": False}[precision]
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

def read_in_bf16(model) -> None:
    """Make the weights bf16, where nothing trains. Buffers, like rotary frequencies, stay."""
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16)

def count_parameters(model) -> float:
    """The number of parameters, in millions."""
    return sum(p.numel() for p in model.parameters()) / 1e6

def check_lengths(longest: int, config, in_search: bool = False) -> float:
    """Stop if a sequence is too long, in search also for a sliding window; -> the limit."""
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    window = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    limit = min(limit, window) if in_search and window else limit
    if longest > limit:
        stop(f"the longest sequence has {longest} tokens, the backbone reads {limit}; give shorter histories "
             "(--max-history), or leave out tasks with long texts")
    return limit

def length_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Group rows of similar length into batches of at most `max_tokens` tokens with padding."""
    batches = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if not batches or lengths[row] * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches

# ---- The trie as flat tensors: for train.py, evaluate.py and rl.py ----
class Trie(NamedTuple):
    """All SIDs as a prefix tree. The children of node n at depth l are first_child[l][n] up to, without it,
    first_child[l][n + 1]; their codes are in codes[l]. Nodes of depth L are leaves, one per SID."""
    first_child: list[Tensor]  # per level: (nodes + 1,)
    codes: list[Tensor]        # per level: (children,)
    max_children: list[int]    # per level: M
    is_new: list[Tensor]       # per level: (children,), are all items below new? [] if none is
    is_hidden: list[Tensor]    # the same for hidden items
    leaf_start: np.ndarray     # (leaves + 1,) places in leaf_items
    leaf_items: np.ndarray     # (N,) rows of the catalogue, ascending within a leaf

def build_trie(codes: Tensor, codebook_size: int, device: torch.device, new: Tensor | None = None,
               hidden: Tensor | None = None) -> Trie:
    """The trie of codes (N, L), by one sort. new, hidden (N,): which items are so."""
    num_levels = codes.shape[1]
    place = codebook_size ** torch.arange(num_levels).flip(0)
    leaf_of_row = (codes * place).sum(1)
    in_order, order = leaf_of_row.sort(stable=True)  # catalogue order within a leaf
    nodes, items = torch.unique_consecutive(in_order, return_counts=True)
    leaf_start = F.pad(items.cumsum(0), (1, 0))
    first_child, level_codes, max_children, is_new, is_hidden = [], [], [], [], []
    for height in range(num_levels):  # from the leaves up
        parents, counts = torch.unique_consecutive(nodes // codebook_size, return_counts=True)
        start = F.pad(counts.cumsum(0), (1, 0))
        first_child.insert(0, start.to(device, torch.int32))
        level_codes.insert(0, (nodes % codebook_size).to(device, torch.int32))
        max_children.insert(0, int(counts.max()))
        for rows, marks in ((new, is_new), (hidden, is_hidden)):
            if rows is not None and rows.any():
                others = leaf_of_row[~rows] // codebook_size ** height
                marks.insert(0, ~torch.isin(nodes, others).to(device))
        nodes = parents
    return Trie(first_child, level_codes, max_children, is_new, is_hidden, leaf_start.numpy(), order.numpy())

def leaf_of_items(trie: Trie) -> np.ndarray:
    """The leaf of each catalogue row, (N,)."""
    leaves = np.repeat(np.arange(len(trie.leaf_start) - 1), np.diff(trie.leaf_start))
    return leaves[trie.leaf_items.argsort()]

def trie_paths(trie: Trie, leaves: Tensor) -> list[Tensor]:
    """The nodes from depth 1 down to each leaf; (B, G) -> L times (B, G)."""
    path = [leaves]
    for first_child in trie.first_child[:0:-1]:  # a node's children are a range: find it
        path.insert(0, torch.searchsorted(first_child, path[0].to(first_child.dtype), right=True) - 1)
    return path

def average_siblings(logits: Tensor, new: Tensor) -> Tensor:
    """Give a new child the mean probability of its old siblings; logits, new (B, W, M).

    With --loss vocab, a model hardly recommends a code that it never saw there.
    """
    old = logits.masked_fill(new, -torch.inf)
    count = (old > -torch.inf).sum(-1, keepdim=True)  # of old siblings
    return torch.where(new & (count > 0), old.logsumexp(-1, keepdim=True) - count.log(), logits)

def expand(trie: Trie, level: int, nodes: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Children of beams and their log-probabilities; nodes (B, W), logits (B, W, K) -> two (B, W, M).

    Slots beyond a node's children, and hidden children, get -inf.
    """
    start, end = trie.first_child[level][nodes], trie.first_child[level][nodes + 1]
    slot = torch.arange(trie.max_children[level], device=nodes.device)
    live = slot < (end - start)[..., None]
    children = torch.where(live, start[..., None] + slot, 0)
    logits = logits.gather(-1, trie.codes[level][children].long()).masked_fill(~live, -torch.inf)
    if trie.is_new:
        logits = average_siblings(logits, trie.is_new[level][children] & live)
    log_probs = logits.log_softmax(-1)
    if trie.is_hidden:
        log_probs = log_probs.masked_fill(trie.is_hidden[level][children], -torch.inf)
    return children, log_probs

def path_log_probs(trie: Trie, level: int, path: list[Tensor], logits: Tensor) -> Tensor:
    """Log-probability of each path's next node among siblings; logits (B, 1 or G, K) -> (B, G).

    path: from `trie_paths`, L times (B, G).
    """
    parents = path[level - 1] if level else torch.zeros_like(path[0][:, :1])
    _, log_probs = expand(trie, level, parents, logits)  # (B, 1 or G, M)
    slot = path[level] - trie.first_child[level][parents]
    return log_probs.expand(-1, slot.shape[1], -1).gather(-1, slot[..., None]).squeeze(-1)

# ---- Processes, interrupts, optimizer, resuming: for train.py and rl.py ----
def join_processes(device_name: str, seed: int) -> tuple[torch.device, int, int]:
    """Device, rank and number of processes, of torchrun if any. Only rank 0 prints."""
    device = set_up(device_name, seed)
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu")  # slow on a CPU
    if "RANK" not in os.environ:
        return device, 0, 1
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
    return device, dist.get_rank(), dist.get_world_size()

def leave_processes(interrupted: bool, step: int, resume_path: Path, result: str) -> None:
    """End a training, with exit code 130 if it was interrupted."""
    print(f"stopped after update {step}: continue with --resume" if interrupted else result)
    if not interrupted:
        resume_path.unlink(missing_ok=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if interrupted:
        sys.exit(130)

def sum_over_processes(value: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; -> the same tensor."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value

def sum_gradients(model) -> None:
    """Replace each gradient by its sum over all processes."""
    for p in model.parameters():
        if p.requires_grad and dist.is_initialized():
            p.grad = sum_over_processes(torch.zeros_like(p) if p.grad is None else p.grad)

def catch_interrupts(device: torch.device) -> Callable[[], bool]:
    """Make Ctrl-C and SIGTERM set a flag; -> a function that says if any process got one."""
    received = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: received.append(number))

    def interrupted() -> bool:
        if not dist.is_initialized():
            return bool(received)
        return bool(sum_over_processes(torch.tensor(len(received), device=device)).item())
    return interrupted

def make_optimizer(model, lr: float, beta2: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW on what trains, with weight decay on matrices but not on norms and biases."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=model.device.type == "cuda")

def learning_rate(step: int, steps: int, lr: float, warmup: int) -> float:
    """Linear warm-up over at most a tenth of the run, then a cosine down to zero."""
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

def save_progress(path: Path, model, optimizer, state: dict, settings: dict) -> None:
    """Write what --resume needs."""
    with atomic_write(path) as temporary:
        torch.save({"weights": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state,
                    "settings": settings}, temporary)

def load_progress(path: Path, model, optimizer, settings: dict) -> dict:
    """Restore weights and optimizer; -> the state. Stops if the file is of another run."""
    saved = load_pt(path, ("weights", "optimizer", "state", "settings"))
    for key, value in saved["settings"].items():
        if key not in NOT_COMPARED and settings.get(key) != value:
            stop(f"{path} is of a run with {key.replace('_', '-')} {value}, not {settings.get(key)}; "
                 "give the same flags and files, or leave out --resume")
    model.load_state_dict(saved["weights"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["state"]

def fingerprint(model, sid_ids: Tensor) -> int:
    """The sum of the SID rows' bits, to tell checkpoints apart."""
    return model.get_input_embeddings().weight.detach()[sid_ids].view(torch.int32).sum().item()

def output_paths(out: Path, start: str | Path) -> tuple[Path, Path, Path]:
    """A checkpoint, its log, and what --resume needs; stops if `out` is a folder, or `start`."""
    if out.is_dir() or out.resolve() == Path(start).resolve():
        stop(f"--out {out}: is a folder, or --from; name another file")
    return out, *(out.with_name(out.stem + end) for end in ("_log.jsonl", "_resume.pt"))

# ---- Command line ------------------------------
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "run", "seed", "device")
    flag = parser.add_argument
    flag("--out", help="checkpoint to write, instead of RUN/init.pt")
    flag("--init", choices=("sa", "mean", "gaussian", "normal"), default="sa",
         help="mean of the keywords (eq. 9), mean or Gaussian of the vocabulary, or N(0, 0.02^2)")
    flag("--sa-depth", type=number(int, 0, 9), default=8, help="levels with SA-Init")
    flag("--sa-norm", choices=("none", "vocab", "centered"), default="centered", help="none: eq. 9")
    flag("--backbone", default="tiny", help="tiny, or a causal LM: name, folder, or checkpoint")
    flag("--width", type=number(int, 32), default=128, help="tiny: hidden size, a multiple of 32")
    flag("--layers", type=number(int, 1), default=3, help="tiny: layers")
    flag("--vocab-size", type=number(int, 1), default=6000, help="tiny: pieces of the BPE")
    flag("--pretrain-steps", type=number(int, 1), default=150, help="tiny: steps")
    args = parser.parse_args(argv)
    if args.width % 32:
        parser.error("--width must be a multiple of 32")
    return args

def main() -> None:
    args = parse_args()
    device, run = set_up(args.device, args.seed), Path(args.run)
    items = read_catalogue(run / "items.jsonl")
    used = sorted({token for item in items for token in item["sid"]}, key=parse_sid_token)
    num_levels, codebook_size = len(items[0]["sid"]), 1 + int(codes_of(items).max())
    if (run / "codebook.pt").exists():
        codebook_size = max(codebook_size, load_pt(run / "codebook.pt", ("centroids",))["centroids"].shape[1])
    if codebook_size ** num_levels > 2 ** 62:  # as build_trie counts leaves
        stop(f"{num_levels} levels of {codebook_size} codes do not fit 64 bits; make SIDs with fewer")
    keywords = {}
    if args.init == "sa":
        for row in read_semantics(run / "semantics.jsonl", items):
            keywords[row["token"]] = " ".join(map(str, row["keywords"]))
        missing = [token for token in used if not keywords.get(token, "").strip()]
        if missing:
            stop(f"{run}/semantics.jsonl: no keywords for {missing[0]}; run extract_semantics.py again")

    if args.backbone == "tiny":
        texts = [item_text(item) for item in items]
        model, tokenizer = build_tiny(texts, args.width, args.layers, args.vocab_size,
                                      args.pretrain_steps, args.seed, device)
    elif args.backbone.endswith(".pt"):
        model, tokenizer, checkpoint = load_model(args.backbone, device)
        args.backbone = checkpoint["args"]["backbone"]  # stages 4 and 5 choose settings by it
    else:
        model, tokenizer = load_backbone(args.backbone, device)
    check_head(model, args.backbone)
    keyword_ids = {parse_sid_token(token): tokenizer(" " + text, add_special_tokens=False).input_ids
                   for token, text in keywords.items()}
    sid_ids = extend_vocabulary(model, tokenizer, num_levels, codebook_size)
    check_tokens(tokenizer, sid_ids)

    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    matrices = {"embedding, tied": embedding} if embedding is head else {"embedding": embedding, "head": head}
    for name, weight in matrices.items():
        text_rows = weight.detach()[:int(sid_ids.min())]  # before the first SID token
        rows = initial_rows(text_rows, keyword_ids, num_levels, codebook_size, args.init, args.sa_norm,
                            args.sa_depth, args.seed)
        with torch.no_grad():
            weight[sid_ids.to(device)] = rows.to(weight)
        print(f"{name} | {sid_ids.numel()} SID rows by {args.init}, {len(keyword_ids)} have keywords | "
              f"mean norm {rows.norm(dim=-1).mean():.3f}, of text rows {text_rows.norm(dim=1).mean():.3f} | "
              f"mean cosine {mean_cosine(rows.flatten(0, 1)):.3f}")
    show_neighbours(model, tokenizer, sid_ids, used if args.init != "mean" else [])

    out = args.out or run / "init.pt"
    sid = {"num_levels": num_levels, "codebook_size": codebook_size, "num_items": len(items),
           "digest": sid_digest(items), "new_items": []}
    save_model(out, model, tokenizer, sid, stage="init", args=vars(args), step=0, metrics={})
    print(f"wrote {out}: {count_parameters(model):.2f} M parameters, {len(embedding)} rows")

if __name__ == "__main__":
    main()
