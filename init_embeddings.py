"""Stage 3: extend a language model's vocabulary by the SID tokens and give their rows a start.

Every SID token becomes one never-split token whose embedding row starts from the words that describe its items:

    Eq. 4   V   = V_SID + V_Pre                            TS-Rec (arXiv 2602.22632), section 3.2.2
    Eq. 8   T_s = Tok(Concat(W_s))                         section 4.1; W_s are the keywords of token s
    Eq. 9   e_s = 1 / |T_s| * sum_{v in T_s} E[v]          SA-Init
    Eq. 1   e_s = 1 / |V_Pre| * sum_v E[v]                 STAR, section 2.1: --init mean, the baseline it diagnoses

Reads   RUN/items.jsonl, RUN/semantics.jsonl, RUN/codebook.pt (for its size; optional), a causal LM
Writes  RUN/init.pt: config, tokenizer, weights and SID vocabulary in one self-contained file

Differs from the paper
  1. `--backbone tiny` (default) builds a small Qwen2-shaped LM with its own byte-level BPE and pretrains it on
     the item texts for about a minute, so that there is a language space to borrow from without a download.
  2. `--sa-norm`: none is eq. 9 as printed; vocab rescales each row to the vocabulary's average norm, as the
     authors' released code does; centered first takes out what all SA rows share (keyword means all point one
     way, a collapse of the kind STAR diagnoses): e_s <- mu + (e_s - mean_s e_s), rescaled to the mean |e_v - mu|.
  3. An untied LM head gets the same treatment in its own space.

Examples
  python init_embeddings.py                                             # the demo, 1 to 2 minutes on two cores
  python init_embeddings.py --run runs/qwen --backbone Qwen/Qwen2.5-1.5B --sa-norm vocab
  python init_embeddings.py --backbone runs/demo/init.pt --init mean --out runs/demo/init_mean.pt    # same weights
"""
import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import (AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast,
                          Qwen2Tokenizer)

from tokenize_items import (LEVELS, SEED, item_text, load_codebook, load_pt, parse_sid_token, pick_device,
                            read_catalogue, read_jsonl, replacing, sid_token, stop, within)

# Letters used in shapes: V vocabulary rows, D width, L levels, K codes per level, B sequences, T tokens.
WINDOW, BATCH, LEARNING_RATE = 128, 16, 2e-3            # pretraining of the tiny backbone
# The tiny BPE sees the catalogue and this text, so that instructions are not spelled letter by letter.
PLAIN_ENGLISH = (
    "The user has interacted with items in chronological order. Can you predict the next possible item that the "
    "user may expect? Which item has the title? What is the title of item? The user has sequentially interacted "
    "with items. Can you recommend the next item for him? Tell me the title of the item. Please review the user's "
    "historical interactions: and describe what kind of item he still needs. Identify the specific SID token "
    "shared by items that exhibit the following scope and characteristics: Describe the typical scope and shared "
    "features of items associated with the token: Response: Instruction: Answer:")


# ---------------------------------------------------------------------------------------------------------
# Checkpoints: what init.pt, align.pt, sft.pt and rl.pt share
# ---------------------------------------------------------------------------------------------------------

def sid_digest(items: list[dict]) -> str:
    """Fingerprint of the items' ids and SIDs, in order; new items appended later leave a prefix intact."""
    text = "\n".join(f"{json.dumps(item['item_id'])} {''.join(item['sid'])}" for item in items)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sid_token_ids(tokenizer, num_levels: int, codebook_size: int) -> torch.Tensor:
    """Vocabulary ids of all SID tokens, (L, K)."""
    return torch.tensor([tokenizer.convert_tokens_to_ids([sid_token(l, k) for k in range(codebook_size)])
                         for l in range(num_levels)])


def new_items(sid: dict, items: list[dict]) -> list:
    """The item_ids that joined the catalogue after stage 3 and were no target in the checkpoint's training."""
    return [*sid.get("new_items", ()), *(item["item_id"] for item in items[sid["num_items"]:])]


def save_model(path: str | Path, model, tokenizer, sid: dict, weights: dict | None = None, **extra) -> None:
    """Write a self-contained checkpoint, atomically; tied weights once.

    `weights` stand in for the model's own (shards put together, adapters merged); `sid` is {"num_levels",
    "codebook_size", "num_items", "digest", "new_items"}; `extra` (stage, args, step, metrics, ...) is stored as it
    is and must consist of plain Python values and tensors.
    """
    once = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    weights = {n: t.detach() for n, t in (weights or model.state_dict()).items() if n not in tied}
    special = {f"{kind}_token": getattr(tokenizer, f"{kind}_token") for kind in ("bos", "eos", "pad")}
    with replacing(path) as temporary:
        torch.save({"config": json.dumps(model.config.to_dict(), default=str), "weights": weights,
                    "tokenizer": tokenizer.backend_tokenizer.to_str(), "special": special, "sid": sid, **extra},
                   temporary)


def load_model(path: str | Path, device: torch.device, items: list[dict] | None = None):
    """Read a checkpoint; returns model, tokenizer and the checkpoint's other entries.

    With `items`, stops unless the checkpoint was made for them: its items must be the first ones, in order, with
    the same SIDs (tokenize_items.py --codebook only appends).
    """
    checkpoint = load_pt(path, ("config", "weights", "tokenizer", "special", "sid"))
    config, weights = json.loads(checkpoint.pop("config")), checkpoint.pop("weights")
    tokenizer_text, special, sid = checkpoint.pop("tokenizer"), checkpoint.pop("special"), checkpoint["sid"]
    n = sid["num_items"]
    if items is not None and (len(items) < n or sid_digest(items[:n]) != sid["digest"]):
        stop(f"{path} was made for another catalogue: the SIDs of its {n} items are not those of items.jsonl; "
             "run init_embeddings.py again, or name the run it belongs to")
    beyond = [t for item in items or () for t in item["sid"] if parse_sid_token(t)[1] >= sid["codebook_size"]]
    if beyond:
        stop(f"{path} knows {sid['codebook_size']} codes per level, items.jsonl holds {beyond[0]}; give new items "
             "their SIDs with tokenize_items.py --codebook, or run init_embeddings.py again")
    config["pad_token_id"] = None                   # padding is ours, on the right: no row is special to the model
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="sdpa")
    model.to(next(iter(weights.values())).dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    state = model.state_dict()
    loaded = {state[name].data_ptr() for name in weights if name in state}
    wrong = unexpected + [name for name in missing if state[name].data_ptr() not in loaded]     # tied ones share
    if wrong:
        stop(f"{path}: weights and config disagree about {wrong[0]}; write the checkpoint again")
    return model.to(device), load_tokenizer(tokenizer_text, special), checkpoint


def autocast(device: torch.device, precision: str = "auto"):
    """bf16 arithmetic over float32 weights: on CUDA, on request, or ("fast") where the CPU has it in hardware."""
    fast = device.type == "cuda" or getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    wanted = {"auto": device.type == "cuda", "fast": fast, "float32": False, "bfloat16": True}[precision]
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def to_bfloat16(model) -> None:
    """Round the weights; the buffers stay as they are: rotary frequencies in bfloat16 would misplace late tokens."""
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16)


def load_tokenizer(text: str, special: dict) -> PreTrainedTokenizerFast:
    """Rebuild a fast tokenizer from its JSON text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(text, encoding="utf-8")
        return PreTrainedTokenizerFast(tokenizer_file=str(path), clean_up_tokenization_spaces=False,
                                       **{k: v for k, v in special.items() if v})


# ---------------------------------------------------------------------------------------------------------
# The backbone
# ---------------------------------------------------------------------------------------------------------

def train_bpe(texts: list[str], vocab_size: int):
    """Train a byte-level BPE on the catalogue's texts, with <|endoftext|> as end and pad token."""
    corpus = texts + [PLAIN_ENGLISH] * max(1, len(texts) // 100)
    return Qwen2Tokenizer().train_new_from_iterator(corpus, vocab_size=vocab_size, show_progress=False)


def pretrain(model, tokens: torch.Tensor, steps: int, seed: int) -> float:
    """Next-token prediction on windows of the item texts, all weights; returns the last steps' mean loss."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps,
                                                   pct_start=0.1 if steps > 10 else 0.3)
    losses, window = [], min(WINDOW, len(tokens) - 1)
    model.train()
    for _ in tqdm(range(steps), desc="pretrain", unit="step", disable=None):
        starts = torch.randint(len(tokens) - window, (BATCH, 1), generator=generator)
        batch = tokens[starts + torch.arange(window + 1)].to(model.device)               # (B, T + 1)
        with autocast(model.device, "fast"):
            logits = model(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / len(losses[-20:])


def build_tiny(texts: list[str], args: argparse.Namespace, device: torch.device):
    """A small Qwen2-shaped LM with its own BPE, pretrained on the item texts; returns model and tokenizer."""
    tokenizer = train_bpe(texts, args.vocab_size)
    heads = max(1, args.width // 32)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=len(tokenizer), hidden_size=args.width, intermediate_size=args.width * 3,
        num_hidden_layers=args.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device)
    eos = tokenizer.eos_token_id
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    tokens = torch.tensor([t for text in ids for t in (*text, eos)])
    start = time.time()
    loss = pretrain(model, tokens, args.pretrain_steps, args.seed)
    print(f"tiny backbone | {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters | "
          f"{len(tokenizer)} pieces | {len(tokens)} text tokens | pretrained {args.pretrain_steps} steps, "
          f"loss {loss:.3f}, {time.time() - start:.0f} s")
    return model, tokenizer


def load_backbone(name: str, device: torch.device):
    """A Hugging Face causal LM and its tokenizer; BERT-like models are switched to causal attention."""
    try:
        config = AutoConfig.from_pretrained(name)
        if getattr(config, "is_decoder", None) is False:
            config.is_decoder = True
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=torch.float32,
                                                     attn_implementation="sdpa")
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        stop(f"--backbone {name}: cannot be loaded ({str(error).splitlines()[0]})")
    if not tokenizer.is_fast:
        stop(f"--backbone {name}: its tokenizer has no fast (JSON) form; choose a model that has one")
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token or tokenizer.pad_token
    if tokenizer.eos_token is None:
        stop(f"--backbone {name}: its tokenizer names no end, separator or pad token; choose a model that has one")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.to(device).eval(), tokenizer


@torch.no_grad()
def check_head(model, name: str) -> None:
    """Stop unless logits = last hidden state @ head.T, which training and search rely on.

    Extra weights in the head (a bias, BERT's transform) are dropped with a word; arithmetic without weights
    (soft-capping, a scale) cannot be seen in the checkpoint and is refused.
    """
    model.eval()
    ids = torch.arange(1, 9, device=model.device)[None]
    head = model.get_output_embeddings()
    hidden = model.base_model(ids, use_cache=False).last_hidden_state
    placed = model.base_model(ids, position_ids=torch.arange(8, device=model.device)[None], use_cache=False)
    if not torch.allclose(placed.last_hidden_state, hidden, atol=1e-3, rtol=1e-3):      # RoBERTa's do not
        stop(f"--backbone {name}: its positions do not count 0, 1, 2, ...; choose another model")
    if torch.allclose(model(ids, use_cache=False).logits, hidden @ head.weight.T, atol=1e-3, rtol=1e-3):
        return
    known = {id(p) for p in model.base_model.parameters()} | {id(head.weight)}
    extra = [n for n, p in model.named_parameters() if id(p) not in known]
    if not extra:
        stop(f"--backbone {name}: its logits are more than the last hidden state times a matrix (soft-capping "
             "or a scale); such a head is not supported, choose another model")
    print(f"note: the head of {name} has weights of its own ({', '.join(extra)}); they are left out")


# ---------------------------------------------------------------------------------------------------------
# Vocabulary extension (eq. 4)
# ---------------------------------------------------------------------------------------------------------

def extend_vocabulary(model, tokenizer, num_levels: int, codebook_size: int) -> torch.Tensor:
    """Add the L*K SID tokens and grow the embedding where needed, never shrink it; their ids, (L, K)."""
    names = [sid_token(l, k) for l in range(num_levels) for k in range(codebook_size)]
    tokenizer.add_tokens([AddedToken(n, normalized=False, special=False) for n in names])
    ids = sid_token_ids(tokenizer, num_levels, codebook_size)
    rows = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= rows:                      # many models have spare rows past the tokenizer's size
        model.resize_token_embeddings(int(ids.max()) + 1, mean_resizing=False)
    return ids


def check_tokens(tokenizer, ids: torch.Tensor) -> None:
    """Stop unless every SID token is one id in the middle of running text and decodes back to itself."""
    flat = ids.flatten().tolist()
    names = tokenizer.convert_ids_to_tokens(flat)
    around = tokenizer([f"The item {n}{n}, then" for n in names], add_special_tokens=False).input_ids
    for name, i, text in zip(names, flat, around):
        if text.count(i) != 2 or tokenizer.decode([i], skip_special_tokens=True).strip() != name:
            stop(f"SID token {name} does not survive this tokenizer (read as {text}); choose another backbone")
    if len(set(flat)) != len(flat):
        stop("two SID tokens share one id; choose another backbone")


# ---------------------------------------------------------------------------------------------------------
# Initialisation
# ---------------------------------------------------------------------------------------------------------

def gaussian_rows(text: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw rows from N(mu, Sigma) fitted to the pretrained rows (section 3.2.2); (V, D) -> (count, D)."""
    mu = text.mean(0)
    values, vectors = torch.linalg.eigh((text - mu).T @ (text - mu) / len(text))
    noise = torch.randn(count, text.shape[1], generator=generator).to(text)
    return mu + (noise * values.clamp_min(0).sqrt()) @ vectors.T


def keyword_rows(text: torch.Tensor, keyword_ids: list[list[int]]) -> torch.Tensor:
    """Mean of the pretrained rows of each token's keyword pieces (eq. 9); (V, D) -> (n, D)."""
    return torch.stack([text[torch.tensor(ids, device=text.device)].mean(0) for ids in keyword_ids])


def rescale(rows: torch.Tensor, text: torch.Tensor, sa_norm: str) -> torch.Tensor:
    """Apply --sa-norm to SA rows (n, D), given the pretrained rows (V, D)."""
    if sa_norm == "none":
        return rows
    mu = text.mean(0) if sa_norm == "centered" else torch.zeros_like(text[0])
    away = rows - rows.mean(0) if sa_norm == "centered" else rows
    length = (text - mu).norm(dim=1).mean()
    return mu + away * (length / away.norm(dim=1, keepdim=True).clamp_min(1e-12))


def initial_rows(text: torch.Tensor, keyword_ids: dict[tuple[int, int], list[int]], shape: tuple[int, int],
                 args: argparse.Namespace) -> torch.Tensor:
    """Rows for all SID tokens, (V, D) -> (L, K, D). Tokens without keywords, and levels below --sa-depth,
    are gaussian."""
    num_levels, k = shape
    if args.init == "mean":
        return text.mean(0).expand(num_levels, k, -1)
    rows = gaussian_rows(text, num_levels * k, torch.Generator().manual_seed(args.seed)).view(num_levels, k, -1)
    chosen = [t for t in sorted(keyword_ids) if t[0] < args.sa_depth]
    if args.init == "sa" and chosen:
        sa = rescale(keyword_rows(text, [keyword_ids[t] for t in chosen]), text, args.sa_norm)
        rows[[t[0] for t in chosen], [t[1] for t in chosen]] = sa
    return rows


def read_keywords(path: str | Path, used: list[str], shape: tuple[int, int]) -> dict[tuple[int, int], str]:
    """Join each token's keywords with blanks (W_s of eq. 8): (level, code) -> text; all of `used` must have some."""
    texts = {}

    def take(place: str, row: dict) -> None:
        level, code = parse_sid_token(row["token"])
        if level >= shape[0] or code >= shape[1]:
            stop(f"{place}: {row['token']} is none of this catalogue's {shape[0]} x {shape[1]} tokens; "
                 "run extract_semantics.py for this run")
        if not isinstance(row["keywords"], list) or not all(isinstance(word, str) for word in row["keywords"]):
            stop(f"{place}: keywords must be a list of strings")
        if "".join(row["keywords"]).strip():
            texts[level, code] = " ".join(row["keywords"])
    read_jsonl(path, ("token", "keywords"), take)
    missing = [token for token in used if parse_sid_token(token) not in texts]
    if missing:
        stop(f"{path}: no keywords for {missing[0]} and {len(missing) - 1} more tokens that the catalogue uses; "
             "run extract_semantics.py for this run")
    return texts


def show_neighbours(model, tokenizer, ids: torch.Tensor, used: list[str], count: int = 6) -> None:
    """Print the five text tokens whose input rows are nearest (cosine, mean taken out) to some SID tokens'."""
    weight = model.get_input_embeddings().weight.detach()
    text = weight[:int(ids.min())]
    mu = text.mean(0)
    space = F.normalize(text - mu, dim=1)
    for name in used[::max(1, len(used) // count)][:count]:
        row = F.normalize(weight[tokenizer.convert_tokens_to_ids(name)] - mu, dim=0)
        near = (space @ row).topk(5)
        words = ", ".join(f"{tokenizer.decode([i]).strip()!r} {s:.2f}" for s, i in zip(*map(torch.Tensor.tolist, near)))
        print(f"neighbours {name:>8} | {words}")


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--run", default="runs/demo", help="folder of the run")
    files.add_argument("--items", help="instead of RUN/items.jsonl")
    files.add_argument("--semantics", help="instead of RUN/semantics.jsonl")
    files.add_argument("--codebook", help="instead of RUN/codebook.pt (read for its size, where it exists)")
    files.add_argument("--out", help="instead of RUN/init.pt")
    init = parser.add_argument_group("initialisation of the SID rows")
    init.add_argument("--init", choices=("sa", "mean", "gaussian"), default="sa",
                      help="keyword mean (eq. 9), mean of vocabulary (STAR eq. 1), N(mu, Sigma) of the pretrained rows")
    init.add_argument("--sa-depth", type=within(int, 0, len(LEVELS) + 1), default=len(LEVELS),
                      help="SA-Init on the first n levels, gaussian below")
    init.add_argument("--sa-norm", choices=("none", "vocab", "centered"), default="centered",
                      help="eq. 9 as printed, rescaled to the vocabulary's mean norm, or centered and rescaled")
    model = parser.add_argument_group("backbone")
    model.add_argument("--backbone", default="tiny", help="tiny, a Hugging Face causal LM by name or folder, or an "
                       "earlier checkpoint (.pt), whose SID rows are made anew")
    model.add_argument("--width", type=within(int, 32), default=192, help="tiny: hidden size, a multiple of 32")
    model.add_argument("--layers", type=within(int, 1), default=4, help="tiny: number of layers")
    model.add_argument("--vocab-size", type=within(int, 1), default=6000, help="tiny: pieces of the BPE")
    model.add_argument("--pretrain-steps", type=within(int, 1), default=400, help="tiny: steps on the item texts")
    parser.add_argument("--seed", type=SEED, default=42, help="seed of weights, text windows and gaussian rows")
    parser.add_argument("--device", default="", help="cpu, cuda, ...; empty: cuda where there is one")
    args = parser.parse_args(argv)
    if args.width % 32:
        parser.error("--width must be a multiple of 32")
    return args


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu")      # its CPU backward is slow on short texts
    run = Path(args.run)
    items = read_catalogue(args.items or run / "items.jsonl")
    used = sorted({t for item in items for t in item["sid"]}, key=parse_sid_token)
    book = Path(args.codebook or run / "codebook.pt")
    num_levels, codebook_size = len(items[0]["sid"]), 1 + max(parse_sid_token(t)[1] for t in used)
    if args.codebook or book.exists():
        codebook_size = max(codebook_size, load_codebook(book)["centroids"].shape[1])
    shape = num_levels, codebook_size
    keywords = read_keywords(args.semantics or run / "semantics.jsonl", used, shape) if args.init == "sa" else {}

    kind = args.backbone
    if kind == "tiny":
        model, tokenizer = build_tiny([item_text(item) for item in items], args, device)
    elif kind.endswith(".pt"):
        model, tokenizer, checkpoint = load_model(kind, device)
        kind = checkpoint["args"]["backbone"]
    else:
        model, tokenizer = load_backbone(kind, device)
    check_head(model, args.backbone)
    ids = extend_vocabulary(model, tokenizer, *shape)
    text_rows = int(ids.min())                                          # rows before this are pretrained
    check_tokens(tokenizer, ids)

    tokenized = {t: tokenizer(" " + text, add_special_tokens=False).input_ids for t, text in keywords.items()}
    keyword_ids = {t: pieces for t, pieces in tokenized.items() if pieces}
    matrices = {"input": model.get_input_embeddings().weight, "head": model.get_output_embeddings().weight}
    tied = matrices["input"].data_ptr() == matrices["head"].data_ptr()
    for name, weight in list(matrices.items())[:1 if tied else 2]:
        with torch.no_grad():
            rows = initial_rows(weight[:text_rows], keyword_ids, shape, args)
            weight[ids.to(device)] = rows.to(weight)
        flat = F.normalize(rows.flatten(0, 1), dim=1)
        by_sa = sum(level < args.sa_depth for level, _ in keyword_ids)
        how = f"{by_sa} by sa (sa-norm {args.sa_norm}), the others gaussian" if args.init == "sa" else args.init
        print(f"{name}{' and head (tied)' if tied else ''} | {ids.numel()} SID rows | {how} | mean norm "
              f"{rows.norm(dim=-1).mean():.3f}, text rows {weight[:text_rows].norm(dim=1).mean():.3f} | "
              f"mean cosine {(flat.sum(0).square().sum() - len(flat)) / (len(flat) * (len(flat) - 1)):.3f}")
    show_neighbours(model, tokenizer, ids, used)

    out = args.out or run / "init.pt"
    save_model(out, model, tokenizer, {"num_levels": num_levels, "codebook_size": codebook_size,
                                       "num_items": len(items), "digest": sid_digest(items), "new_items": []},
               stage="init", args={**vars(args), "backbone": kind}, step=0, metrics={})
    print(f"wrote {out}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
          f"{weight.shape[0]} rows, {args.backbone} backbone")


if __name__ == "__main__":
    main()
