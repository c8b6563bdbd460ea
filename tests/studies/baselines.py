"""Train two yardsticks on a run's samples: SASRec, which knows item ids only, and a TIGER-style decoder.

sasrec: arXiv 1808.09781, two causal transformer blocks over items. The loss is the cross-entropy of a
softmax over the whole catalogue, at every position of a user's sequence; the paper has one negative.
tiger:  arXiv 2305.05065, a decoder from scratch that reads and writes SID tokens and no words. It has the
shape of the tiny backbone, and is trained and evaluated by train.py and evaluate.py.

Differs from the papers
  1. sasrec: tied output, AdamW, cosine learning rate. The best epoch by NDCG@10 on validation is kept.
  2. tiger: a Qwen2 decoder, not T5. The SIDs are the run's, there is no user token. Loss over the trie.

Reads   RUN/items.jsonl, train.jsonl, valid.jsonl, test.jsonl
Writes  RUN/metrics.jsonl (appended); for tiger also tiger_init.pt, tiger.pt and tiger_predictions.jsonl

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
from evaluate import (count_pairs, print_table, rank_metrics, rank_of, rank_results, recall,  # noqa: E402
                      what_training_showed)
from init_embeddings import (build_trie, check_tokens, count_parameters, extend_vocabulary,  # noqa: E402
                             learning_rate, save_model, sid_digest)
from tokenize_items import (codes_of, make_parser, number, read_catalogue, read_jsonl,  # noqa: E402
                            read_samples, set_up, write_jsonl)
from train import MAX_GRAD_NORM, MAX_SEQUENCE, user_sequences  # noqa: E402

# Letters used in shapes: B users, T items of a sequence, N items of the catalogue, D width.
LAYERS, HEADS, BATCH, WARMUP, DEPTH = 2, 2, 128, 100, 20
EOS = "<|endoftext|>"


# ---- SASRec ------------------------------------------------------
class SASRec(nn.Module):
    """A causal transformer over items, whose output layer is its item embedding."""
    def __init__(self, num_items: int, width: int, dropout: float) -> None:
        super().__init__()
        self.items = nn.Embedding(num_items, width)
        self.positions = nn.Embedding(MAX_SEQUENCE, width)
        self.dropout = nn.Dropout(dropout)
        block = nn.TransformerEncoderLayer(width, HEADS, 4 * width, dropout, "gelu", batch_first=True,
                                           norm_first=True)
        self.blocks = nn.TransformerEncoder(block, LAYERS, nn.LayerNorm(width), enable_nested_tensor=False)
        nn.init.normal_(self.items.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, rows: Tensor) -> Tensor:
        """What each position knows of the items up to it; (B, T) -> (B, T, D)."""
        length = rows.shape[1]
        x = self.items(rows) + self.positions.weight[:length]
        future = torch.ones(length, length, dtype=torch.bool, device=rows.device).triu(1)
        return self.blocks(self.dropout(x), mask=future)

    def scores(self, hidden: Tensor) -> Tensor:
        """Logits of the next item; (..., D) -> (..., N)."""
        return hidden @ self.items.weight.T


def sequence_loss(model: SASRec, sequences: list[Tensor]) -> Tensor:
    """Mean cross-entropy of every item but the first of each sequence, given those before; -> ()."""
    # Padding is on the right, where no item sees it
    rows = pad_sequence([row[:-1] for row in sequences], batch_first=True)
    labels = pad_sequence([row[1:] for row in sequences], batch_first=True, padding_value=-1)
    hidden = model(rows)[labels >= 0]                                       # (items, D)
    return F.cross_entropy(model.scores(hidden), labels[labels >= 0])


def mix(p: Tensor, memory: Tensor, weight: float) -> Tensor:
    """(1 - lambda m) p + lambda p_memory, where m is the sum of p_memory; (B, N), (B, N) -> (B, N)."""
    return (1 - weight * memory.sum(1, keepdim=True)) * p + weight * memory


@torch.no_grad()
def rank_items(model: SASRec, histories: list[Tensor], recalled: list[dict], weight: float) -> list[list]:
    """The best rows of the catalogue for each history; recalled: p_memory of each, {row: mass}."""
    model.eval()
    ranked, device = [], model.items.weight.device
    for start in range(0, len(histories), BATCH):
        batch = histories[start:start + BATCH]
        last = torch.tensor([len(row) - 1 for row in batch], device=device)
        hidden = model(pad_sequence(batch, batch_first=True))               # (B, T, D)
        p = model.scores(hidden[torch.arange(len(batch), device=device), last]).softmax(1)
        memory = torch.zeros_like(p)
        for user, masses in enumerate(recalled[start:start + BATCH]):
            memory[user, list(masses)] = torch.tensor(list(masses.values()), device=device)
        ranked += mix(p, memory, weight).topk(min(DEPTH, p.shape[1])).indices.tolist()
    return ranked


def train_sasrec(model: SASRec, sequences: list[Tensor], validate, epochs: int, lr: float,
                 weight_decay: float) -> None:
    """Train, and end with the weights of the epoch for which `validate()` was highest."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    steps, step, best = epochs * -(-len(sequences) // BATCH), 0, (-1.0, 0, {})
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        for batch in torch.randperm(len(sequences)).split(BATCH):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr, WARMUP)
            loss = sequence_loss(model, [sequences[row] for row in batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            step, total = step + 1, total + loss.item()
        ndcg = validate()
        print(f"epoch {epoch:>3}/{epochs} | loss {total * epochs / steps:.4f} | valid NDCG@10 {ndcg:.4f}")
        if ndcg > best[0]:
            best = (ndcg, epoch, {name: w.clone() for name, w in model.state_dict().items()})
    model.load_state_dict(best[2])
    print(f"kept epoch {best[1]}")


def run_sasrec(args: argparse.Namespace, run: Path, items: list[dict]) -> None:
    """Train SASRec, rank the samples of valid and test, and append the figures to metrics.jsonl."""
    device, start = set_up(args.device, args.seed), time.time()
    item_ids = [item["item_id"] for item in items]
    row_of = {item_id: row for row, item_id in enumerate(item_ids)}

    def rows_of(sequence: list) -> Tensor:
        return torch.tensor([row_of[item_id] for item_id in sequence], device=device)

    samples = {name: read_samples(run / f"{name}.jsonl", set(row_of)) for name in ("train", "valid", "test")}
    sequences = [rows_of(user["items"]) for user in user_sequences(samples["train"])]
    histories = {name: [rows_of(sample["history"][-MAX_SEQUENCE:]) for sample in samples[name]]
                 for name in ("valid", "test")}
    model = SASRec(len(items), args.width, args.dropout).to(device)
    valid_rows = [row_of[sample["target"]] for sample in samples["valid"]]

    def validate() -> float:
        ranked = rank_items(model, histories["valid"], [{}] * len(valid_rows), 0.0)
        return rank_metrics(list(map(rank_of, valid_rows, ranked)), (10,))["NDCG@10"]

    train_sasrec(model, sequences, validate, args.epochs, args.lr, args.weight_decay)
    minutes, pairs, results = (time.time() - start) / 60, count_pairs(samples["train"]), []
    codes = torch.from_numpy(codes_of(items))
    trie = build_trie(codes, int(codes.max()) + 1, torch.device("cpu"))
    for split in histories:
        rows, started = samples[split], time.time()
        recalled = [recall(row["history"], pairs, row_of, set()) for row in rows]
        recalled = [{row_of[i]: mass for i, mass in masses.items()} for masses in recalled]
        rankings = {}
        for weight in sorted({0.0, args.memory}):
            name = f"sasrec + memory {weight:g}" if weight else "sasrec"
            ranked = rank_items(model, histories[split], recalled, weight)
            rankings[name] = [[item_ids[row] for row in best] for best in ranked]
        facts = {"method": "", "task": "next_brief", "split": split, "n": len(rows), "num_beams": DEPTH,
                 "exclude_history": False, "candidates": None, "seconds": round(time.time() - started, 2),
                 "seed": args.seed, "parameters": sum(p.numel() for p in model.parameters()),
                 "minutes": round(minutes, 2)}
        found = rank_results(facts, trie, item_ids, [row["target"] for row in rows], rankings, {},
                             what_training_showed(samples["train"], rows))
        print(f"{split}, {len(rows)} samples")
        print_table(found)
        results += found
    metrics = run / "metrics.jsonl"
    write_jsonl(metrics, (read_jsonl(metrics, {}) if metrics.exists() else []) + results)
    print(f"sasrec | {count_parameters(model):.2f} M parameters | {minutes:.1f} minutes | wrote {metrics}")


# ---- TIGER-style -------------------------------------------------
def sid_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE without pieces drops all text: "The user bought <a_1><b_2>" will be two ids."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({EOS: 0}, [])), eos_token=EOS)


def make_start(run: Path, items: list[dict], seed: int) -> Path:
    """Write RUN/tiger_init.pt: a random model of the tiny backbone's shape, for SID tokens only."""
    set_up("cpu", seed)
    num_levels, codebook_size = len(items[0]["sid"]), 1 + int(codes_of(items).max())
    config = AutoConfig.for_model(
        "qwen2", vocab_size=1, hidden_size=128, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    tokenizer, path = sid_tokenizer(), run / "tiger_init.pt"
    check_tokens(tokenizer, extend_vocabulary(model, tokenizer, num_levels, codebook_size))
    sid = {"num_levels": num_levels, "codebook_size": codebook_size, "num_items": len(items),
           "digest": sid_digest(items), "new_items": []}
    # train.py and rl.py choose their settings by the backbone's name
    save_model(path, model, tokenizer, sid, stage="init", args={"backbone": "tiny"}, step=0, metrics={})
    print(f"wrote {path}: {count_parameters(model):.2f} M parameters")
    return path


def run_stage(script: str, *flags) -> None:
    """Run a stage of the project as a command; ends with its exit code if it fails."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)])
    if done.returncode:
        sys.exit(done.returncode)


def run_tiger(args: argparse.Namespace, run: Path, items: list[dict]) -> None:
    """Make the random model, train it with train.py, and evaluate it with evaluate.py."""
    start, out = make_start(run, items, args.seed), run / "tiger.pt"
    began = time.time()
    run_stage("train.py", "--run", run, "--from", start, "--out", out, "--tasks", "sequence",
              "--seed", args.seed, "--device", args.device, *(("--epochs", args.epochs) if args.epochs else ()))
    print(f"tiger | {(time.time() - began) / 60:.1f} minutes")
    for split in ("valid", "test"):
        run_stage("evaluate.py", "--run", run, "--checkpoint", out, "--split", split, "--device", args.device,
                  "--memory", args.memory, "--predictions", run / "tiger_predictions.jsonl")


# ---- Command line ------------------------------------------------
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "run", "seed", "device")
    flag = parser.add_argument
    flag("model", choices=("sasrec", "tiger"), help="which yardstick to train")
    flag("--memory", type=number(float, 0, 1), default=0.6, metavar="LAMBDA", help="as in evaluate.py")
    flag("--epochs", type=number(int, 0), default=0, help="0: 40 for sasrec, train.py's preset for tiger")
    flag("--width", type=number(int, 2), default=128, help="sasrec: D, an even number")
    flag("--dropout", type=number(float, 0, 1), default=0.3, help="sasrec: of embeddings and blocks")
    flag("--lr", type=number(float, 0), default=2e-3, help="sasrec: peak learning rate")
    flag("--weight-decay", type=number(float, 0), default=0.1, help="sasrec: of all weights")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    run = Path(args.run)
    items = read_catalogue(run / "items.jsonl")
    if args.model == "tiger":
        run_tiger(args, run, items)
    else:
        args.epochs = args.epochs or 40
        run_sasrec(args, run, items)


if __name__ == "__main__":
    main()
