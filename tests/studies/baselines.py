"""Train two yardsticks on a run's samples: SASRec, which knows item ids only, and a TIGER-style decoder.

sasrec  arXiv 1808.09781: two causal blocks over item embeddings, every position is supervised.
        Differs: a softmax over all items, not one negative; GELU, 4 D, AdamW with a cosine.
tiger   arXiv 2305.05065: a model from scratch that reads and writes SID tokens, and no words.
        Differs: a Qwen2 decoder of the tiny backbone's size, not T5; the run's SIDs; no user token.

SASRec ends with its best epoch on validation. TIGER is trained and evaluated by train.py and
evaluate.py, with the settings of the tiny backbone. Both are ranked without and with the memory.

Reads   RUN/items.jsonl, train.jsonl, valid.jsonl, test.jsonl
Writes  RUN/metrics.jsonl (appended); tiger also tiger_init.pt, tiger.pt and tiger_predictions.jsonl

Examples, from the project's root
  python tests/studies/baselines.py sasrec --run runs/demo
  python tests/studies/baselines.py tiger --run runs/demo --seed 43
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from evaluate import (count_pairs, measure, print_table, rank_metrics, rank_of, recall,  # noqa: E402
                      what_training_showed)
from init_embeddings import (autocast, check_tokens, count_parameters,  # noqa: E402
                             extend_vocabulary, learning_rate, save_model, sid_digest)
from tokenize_items import (codes_of, make_parser, number, read_catalogue, read_jsonl,  # noqa: E402
                            read_samples, set_up, write_jsonl)
from train import MAX_GRAD_NORM, user_sequences  # noqa: E402

# Letters used in shapes: B users, T items of a sequence, N items of the catalogue, D width.
WIDTH, LAYERS, HEADS, EPOCHS, BATCH = 128, 2, 2, 20, 64             # of SASRec, chosen on validation
LR, WARMUP, WEIGHT_DECAY = 2e-3, 100, 0.1
DEPTH = 20                              # of the rankings, as evaluate.py's beams
EOS = "<|endoftext|>"


# ---- SASRec ------------------------------------------------------
class SASRec(nn.Module):
    """A causal transformer over items, whose output layer is its item embedding."""
    def __init__(self, num_items: int, max_history: int, dropout: float) -> None:
        super().__init__()
        self.items = nn.Embedding(num_items, WIDTH)
        self.positions = nn.Embedding(max_history, WIDTH)
        self.dropout = nn.Dropout(dropout)
        block = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout, "gelu", batch_first=True,
                                           norm_first=True)
        self.blocks = nn.TransformerEncoder(block, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        nn.init.normal_(self.items.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, rows: Tensor) -> Tensor:
        """What each position knows of the items up to it; (B, T) -> (B, T, D)."""
        length = rows.shape[1]
        x = self.items(rows) + self.positions.weight[:length]
        future = torch.ones(length, length, dtype=torch.bool, device=rows.device).triu(1)
        return self.blocks(self.dropout(x), mask=future)


def pieces(sequence: list, max_history: int) -> list[Tensor]:
    """A sequence in pieces of at most max_history + 1 items; neighbours share one item."""
    starts = range(0, len(sequence) - 1, max_history)
    return [torch.tensor(sequence[start:start + max_history + 1]) for start in starts]


def sequence_loss(model: SASRec, sequences: list[Tensor]) -> Tensor:
    """Mean cross-entropy of every item but the first of each sequence, given those before; -> ()."""
    # Padding is on the right, where no item sees it
    device = model.items.weight.device
    rows = pad_sequence([row[:-1] for row in sequences], batch_first=True).to(device)
    labels = pad_sequence([row[1:] for row in sequences], batch_first=True, padding_value=-1).to(device)
    with autocast(device, "fast"):
        hidden = model(rows)[labels >= 0]                                   # (supervised items, D)
        logits = hidden @ model.items.weight.T                              # (supervised items, N)
    return F.cross_entropy(logits.float(), labels[labels >= 0])


def mix(p: Tensor, memory: Tensor, weight: float) -> Tensor:
    """(1 - lambda m) p + lambda p_memory, where m is the sum of p_memory; (B, N), (B, N) -> (B, N)."""
    return (1 - weight * memory.sum(1, keepdim=True)) * p + weight * memory


@torch.no_grad()
def rank_items(model: SASRec, histories: list[list], recalled: list[dict], weight: float) -> list[list]:
    """The best items for each history; recalled: p_memory of each, {item: mass}; weight: lambda."""
    model.eval()
    ranked, device = [], model.items.weight.device
    for start in range(0, len(histories), BATCH):
        batch = [torch.tensor(history) for history in histories[start:start + BATCH]]
        users, last = range(len(batch)), [len(row) - 1 for row in batch]
        with autocast(device, "fast"):
            hidden = model(pad_sequence(batch, batch_first=True).to(device))            # (B, T, D)
            logits = hidden[users, last] @ model.items.weight.T                         # (B, N)
        memory = torch.zeros(logits.shape)
        for user, masses in zip(users, recalled[start:]):
            memory[user, list(masses)] = torch.tensor(list(masses.values()))
        mixed = mix(logits.float().softmax(1), memory.to(device), weight)               # (B, N)
        ranked += mixed.topk(min(DEPTH, mixed.shape[1])).indices.tolist()
    return ranked


def ndcg(model: SASRec, samples: list[dict]) -> float:
    """NDCG@10 of the model alone."""
    ranked = rank_items(model, [row["history"] for row in samples], [{}] * len(samples), 0.0)
    ranks = [rank_of(row["target"], best) for row, best in zip(samples, ranked)]
    return rank_metrics(ranks, (10,))["NDCG@10"]


def train_sasrec(model: SASRec, sequences: list[Tensor], valid: list[dict], epochs: int) -> None:
    """Train, and end with the weights of the epoch with the best NDCG@10 on validation."""
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY)
    steps, step, best = epochs * -(-len(sequences) // BATCH), 0, -1.0
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in torch.randperm(len(sequences)).split(BATCH):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, LR, WARMUP)
            loss = sequence_loss(model, [sequences[row] for row in batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            step += 1
        now = ndcg(model, valid)
        print(f"epoch {epoch:>3}/{epochs} | loss {loss.item():.4f} | valid NDCG@10 {now:.4f}")
        if now > best:
            best, weights = now, {name: w.clone() for name, w in model.state_dict().items()}
    model.load_state_dict(weights)


def read_rows(run: Path, items: list[dict]) -> dict[str, list[dict]]:
    """The samples of each split, with places in the catalogue instead of item_ids."""
    place, splits = {item["item_id"]: n for n, item in enumerate(items)}, {}
    for split in ("train", "valid", "test"):
        samples = read_samples(run / f"{split}.jsonl", set(place))
        splits[split] = [row | {"history": [place[i] for i in row["history"]],
                                "target": place[row["target"]]} for row in samples]
    return splits


def evaluate_sasrec(model: SASRec, train: list[dict], samples: list[dict], items: list[dict],
                    memory: float, facts: dict) -> list[dict]:
    """Rows of metrics.jsonl: the model alone, and with the memory."""
    start, pairs = time.time(), count_pairs(train)
    histories, rankings = [row["history"] for row in samples], {}
    recalled = [recall(history, pairs) for history in histories]
    for weight in sorted({0.0, memory}):
        name = f"sasrec + memory {weight:g}" if weight else "sasrec"
        rankings[name] = rank_items(model, histories, recalled, weight)
    facts |= {"task": "next_brief", "n": len(samples), "num_beams": DEPTH, "exclude_history": False,
              "candidates": None, "seconds": round(time.time() - start, 2)}
    places = [{**item, "item_id": place} for place, item in enumerate(items)]
    return measure(facts, places, [row["target"] for row in samples], rankings, (),
                   what_training_showed(train, pairs, samples))


def run_sasrec(args: argparse.Namespace, run: Path, items: list[dict]) -> None:
    """Train SASRec, rank the samples of valid and test, and append the figures to metrics.jsonl."""
    device, splits, start = set_up(args.device, args.seed), read_rows(run, items), time.time()
    max_history = max(len(row["history"]) for rows in splits.values() for row in rows)
    users = user_sequences(splits["train"])
    sequences = [piece for user in users for piece in pieces(user["items"], max_history)]
    model = SASRec(len(items), max_history, args.dropout).to(device)
    train_sasrec(model, sequences, splits["valid"], args.epochs or EPOCHS)
    minutes, results = round((time.time() - start) / 60, 2), []
    for split in ("valid", "test"):
        facts = {"split": split, "seed": args.seed, "parameters": count_parameters(model), "minutes": minutes}
        found = evaluate_sasrec(model, splits["train"], splits[split], items, args.memory, facts)
        print(f"{split}, {len(splits[split])} samples")
        print_table(found)
        results += found
    metrics = run / "metrics.jsonl"
    write_jsonl(metrics, (read_jsonl(metrics, {}) if metrics.exists() else []) + results)
    print(f"sasrec | {count_parameters(model):.2f} M parameters | {minutes:.1f} minutes | wrote {metrics}")


# ---- TIGER-style -------------------------------------------------
def make_start(run: Path, items: list[dict], seed: int) -> Path:
    """Write RUN/tiger_init.pt: a random model of the tiny backbone's shape, for SID tokens only."""
    set_up("cpu", seed)
    num_levels, codebook_size = len(items[0]["sid"]), 1 + int(codes_of(items).max())
    config = AutoConfig.for_model(
        "qwen2", vocab_size=1, hidden_size=128, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    # A BPE without pieces drops all text: "The user bought <a_1><b_2>" will be two ids
    pieceless = Tokenizer(models.BPE({EOS: 0}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieceless, eos_token=EOS)
    check_tokens(tokenizer, extend_vocabulary(model, tokenizer, num_levels, codebook_size))
    sid = {"num_levels": num_levels, "codebook_size": codebook_size, "num_items": len(items),
           "digest": sid_digest(items), "new_items": []}
    path = run / "tiger_init.pt"
    # train.py chooses its settings by the backbone's name
    save_model(path, model, tokenizer, sid, stage="init", args={"backbone": "tiny"}, step=0, metrics={})
    print(f"wrote {path}: {count_parameters(model):.2f} M parameters", flush=True)
    return path


def run_tiger(args: argparse.Namespace, run: Path, items: list[dict]) -> None:
    """Make the random model, train it with train.py, and evaluate it with evaluate.py."""
    first, out, start = make_start(run, items, args.seed), run / "tiger.pt", time.time()
    train = ["train.py", "--from", first, "--out", out, "--tasks", "sequence", "--seed", args.seed]
    train += ["--epochs", args.epochs] if args.epochs else []
    evaluate = ["evaluate.py", "--checkpoint", out, "--memory", args.memory,
                "--predictions", run / "tiger_predictions.jsonl"]
    for script, *flags in (train, [*evaluate, "--split", "valid"], [*evaluate, "--split", "test"]):
        command = [sys.executable, ROOT / script, *flags, "--run", run, "--device", args.device]
        code = subprocess.run([str(part) for part in command]).returncode
        if code:
            sys.exit(code)
        print(f"tiger | {(time.time() - start) / 60:.1f} minutes after the start", flush=True)


# ---- Command line ------------------------------------------------
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "run", "seed", "device")
    flag = parser.add_argument
    flag("model", choices=("sasrec", "tiger"), help="which yardstick to train")
    flag("--memory", type=number(float, 0, 1), default=0.6, metavar="LAMBDA", help="as in evaluate.py")
    flag("--epochs", type=number(int, 0), default=0, help=f"0: {EPOCHS} for sasrec, train.py's for tiger")
    flag("--dropout", type=number(float, 0, 1), default=0.3, help="sasrec: of embeddings and blocks")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    run = Path(args.run)
    items = read_catalogue(run / "items.jsonl")
    (run_sasrec if args.model == "sasrec" else run_tiger)(args, run, items)


if __name__ == "__main__":
    main()
