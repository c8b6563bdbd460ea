"""SID comprehension: decode the title of an item from its SID (TS-Rec, arXiv 2602.22632, section 5.5, ACC2).

The other direction, title to SID (ACC1), is `evaluate.py --task title2sid`. Here the response is a text: beam
search over the whole vocabulary with the tree attention of evaluate.py, 5 beams. Beside the accuracy (exact
but for blanks and case) stands the F1 of the words of the best text.

Reads   RUN/sft.pt (or --checkpoint), RUN/items.jsonl; for other tasks also valid.jsonl and semantics.jsonl
Writes  RUN/metrics.jsonl (appended)

Examples
  python tests/studies/sid2title.py --run runs/demo --show 3
  python tests/studies/sid2title.py --run runs/demo --task describe_item --limit 100
"""
import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from evaluate import follow, prefill, read_tokens  # noqa: E402
from init_embeddings import check_lengths, length_batches, load_model  # noqa: E402
from tokenize_items import (make_parser, number, read_catalogue, read_jsonl,  # noqa: E402
                            set_up, stop, write_jsonl)
from train import TASKS, make_pairs, prompt_ids, read_data  # noqa: E402

# Letters used in shapes: B prompts, W beams, V vocabulary rows, D width.
TEXT_TASKS = [name for name, task in TASKS.items() if task.source in ("items", "tokens")
              and ("{title}" in task.response or "{description}" in task.response)]


@torch.no_grad()
def decode_texts(model, prompts: list[list[int]], num_beams: int, max_tokens: int,
                 eos: int) -> list[list[list[int]]]:
    """Beam search over the whole vocabulary; per prompt the ids of its texts up to EOS, best first.

    A beam that has ended goes on with EOS at no cost. Scores are sums of log-probabilities.
    """
    head, prefix = model.get_output_embeddings().weight, prefill(model, prompts)
    hidden, ancestors, slots = prefix.last, [], []
    scores = torch.zeros(len(prompts), 1, device=model.device)
    texts: Tensor = prefix.lengths.new_zeros(len(prompts), 1, 0)                     # (B, W, step)
    only_eos = torch.where(torch.arange(len(head), device=model.device) == eos, 0.0, -torch.inf)
    for step in range(max_tokens):
        log_probs = (hidden.to(head.dtype) @ head.T).float().log_softmax(-1)         # (B, W, V)
        if step:
            log_probs = torch.where((texts[..., -1] == eos)[..., None], only_eos, log_probs)
        total = (scores[..., None] + log_probs).flatten(1)
        scores, best = total.topk(min(num_beams, total.shape[1]))
        parent, token = best // len(head), best % len(head)                          # (B, W)
        before = texts.gather(1, parent[..., None].expand(-1, -1, step))
        texts = torch.cat([before, token[..., None]], -1)
        if (token == eos).all() or step + 1 == max_tokens:
            break
        ancestors = follow(ancestors, parent)
        slots.append(token.shape[1])
        hidden = read_tokens(model, token, prefix, step, ancestors, slots)           # (B, W, D)
    return [[ids[:ids.index(eos)] if eos in ids else ids for ids in beams] for beams in texts.tolist()]


def text_metrics(wanted: list[str], found: list[list[str]]) -> dict[str, float]:
    """How often the best text is the wanted one, how often any is, and the F1 of the best one's words."""
    totals = Counter()
    for want, texts in zip(wanted, found):
        want, texts = want.casefold().split(), [text.casefold().split() for text in texts]
        shared = (Counter(want) & Counter(texts[0])).total()
        totals.update({"accuracy": texts[0] == want, "accuracy_any": want in texts,
                       "token_f1": 2 * shared / max(1, len(want) + len(texts[0]))})
    return {name: totals[name] / len(wanted) for name in ("accuracy", "accuracy_any", "token_f1")}


def decode_all(model, tokenizer, prompts: list[list[int]], num_beams: int, max_tokens: int,
               batch_tokens: int) -> list[list[str]]:
    """Texts for every prompt, best first; never past the backbone's positions."""
    limit = check_lengths(max(map(len, prompts)), model.config, in_search=True)
    texts: list = [None] * len(prompts)
    batches = length_batches([len(prompt) for prompt in prompts], batch_tokens)
    for rows in tqdm(batches, desc="decode", disable=None):
        batch = [prompts[row] for row in rows]
        room = limit - max(len(prompt) for prompt in batch) + 1
        beams = decode_texts(model, batch, num_beams, min(max_tokens, room), tokenizer.eos_token_id)
        for row, ids in zip(rows, beams):
            texts[row] = tokenizer.batch_decode(ids)
    return texts


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "run", "device")
    flag = parser.add_argument
    flag("--checkpoint", help="instead of RUN/sft.pt")
    flag("--task", choices=TEXT_TASKS, default="sid2title", help="what is asked, see train.py")
    flag("--metrics", help="instead of RUN/metrics.jsonl")
    flag("--num-beams", type=number(int, 1), default=5, help="texts per prompt")
    flag("--batch-tokens", type=number(int, 1), default=2048, help="prompt tokens per batch")
    flag("--limit", type=number(int, 0), default=0, help="only the first so many examples; 0: all")
    flag("--show", type=number(int, 0), default=0, help="print so many examples")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    device, run = set_up(args.device), Path(args.run)
    items = read_catalogue(run / "items.jsonl")
    path = Path(args.checkpoint or run / "sft.pt")
    model, tokenizer, _ = load_model(path, device, items)
    pairs = make_pairs(args.task, read_data(run, items, [args.task]))[:args.limit or None]
    if not pairs:
        stop(f"--task {args.task}: this run has no examples of it")
    prompts = prompt_ids(tokenizer, [pair.instruction for pair in pairs])
    responses = [pair.response for pair in pairs]
    longest = 1 + max(len(ids) for ids in tokenizer(responses, add_special_tokens=False).input_ids)
    start = time.time()
    texts = decode_all(model, tokenizer, prompts, args.num_beams, longest, args.batch_tokens)
    for pair, found in list(zip(pairs, texts))[:args.show]:
        print(f"{pair.instruction.strip()}\n   wanted  {pair.response}\n   decoded {found[0]}")
    row = {"method": path.name, "task": args.task, "split": "test", "level": "text", "n": len(pairs),
           "num_beams": args.num_beams, "seconds": round(time.time() - start, 2),
           **text_metrics(responses, texts)}
    print(f"{path.name} | {len(pairs)} examples of {args.task} | accuracy {row['accuracy']:.4f} | any of "
          f"{args.num_beams} {row['accuracy_any']:.4f} | token F1 {row['token_f1']:.4f} | {row['seconds']} s")
    metrics = Path(args.metrics or run / "metrics.jsonl")
    write_jsonl(metrics, (read_jsonl(metrics, {}) if metrics.exists() else []) + [row])


if __name__ == "__main__":
    main()
