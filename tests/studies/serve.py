"""Check the folder that evaluate.py --export writes, ask a server for recommendations, compare with ours.

The check: transformers loads the folder, its logits equal the checkpoint's bit for bit, a SID token is one
id. With --engine, a server completes test prompts, freely and constrained to the catalogue. Each engine has
its own fields for that:

  transformers   generation_config: beam search, with a bonus for each token that continues a SID
  vllm           structured_outputs, a list of all SIDs; of --samples answers the most likely one counts
  sglang         regex, the trie of all SIDs; greedy; not run yet

Start a server by `transformers serve FOLDER` or `vllm serve FOLDER --logprobs-mode processed_logprobs`; the
latter's beam search takes no constraint (0.32). Without a constraint no answer need be a SID.

A grammar also admits a SID spelled letter by letter; allowed_token_ids or logit_bias rules that out. Answers
are compared with the first SID of our beam_search: W=1 is the greedy choice, W=20 what evaluate.py finds.

Examples, from the project's root
  python tests/studies/serve.py runs/demo/served
  python tests/studies/serve.py runs/mine/served --run runs/mine --engine vllm
  python tests/studies/serve.py runs/demo/served --engine sglang --print
"""
import argparse
import json
import re
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import requests
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from evaluate import beam_search, read_pairs  # noqa: E402
from init_embeddings import build_trie, check_tokens, load_model, sid_token_ids  # noqa: E402
from tokenize_items import (codes_of, make_parser, number, read_catalogue, read_jsonl, set_up,  # noqa: E402
                            stop)
from train import prompt_ids  # noqa: E402

BONUS = 100.0                           # much more than logits differ


def alternatives(sids: list[list[str]]) -> str:
    """The trie of SIDs as a regex: (<a_1>(<b_2>(<c_3>|<c_4>))|...)."""
    groups = defaultdict(list)
    for first, *rest in sids:
        groups[first].append(rest)
    return "(" + "|".join(token + (alternatives(rests) if rests[0] else "")
                          for token, rests in groups.items()) + ")"


def constraint(engine: str, sids: list[list[str]], id_of: dict[str, int], beams: int, samples: int) -> dict:
    """The fields of a request to /v1/completions that make the engine answer with one of these SIDs."""
    if engine == "vllm":
        return {"structured_outputs": {"choice": ["".join(sid) for sid in sids]},
                "allowed_token_ids": sorted(id_of.values()),
                "n": samples, "temperature": int(samples > 1), "logprobs": 0}
    if engine == "sglang":
        return {"regex": alternatives(sids), "logit_bias": {str(i): BONUS for i in id_of.values()}}
    ids = [[id_of[token] for token in sid] for sid in sids]
    prefixes = {tuple(row[:depth]) for row in ids for depth in range(1, len(row) + 1)}
    bias = [[prefix, BONUS * len(prefix)] for prefix in sorted(prefixes)]       # deeper counts more
    return {"generation_config": json.dumps(
        {"max_new_tokens": len(sids[0]), "num_beams": beams, "do_sample": False, "renormalize_logits": True,
         "sequence_bias": bias})}


def check_folder(folder: str, ours, our_tokenizer, sid_ids: torch.Tensor, texts: list[str]) -> None:
    """Stop unless the folder is the checkpoint: the same ids, the same logits, whole SID tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_tokens(tokenizer, sid_ids)
    for text, ids in zip(texts, prompt_ids(our_tokenizer, texts)):
        with torch.no_grad():
            logits = [m(torch.tensor([ids])).logits for m in (model, ours)]
        if tokenizer(text).input_ids != ids or not torch.equal(*logits):
            stop(f"{folder} is not the checkpoint: other ids or logits for {text!r}; export it again")
    print(f"{folder} | {sid_ids.numel()} SID tokens are one id each | equal logits for {len(texts)} prompts")


def ask(base_url: str, body: dict) -> tuple[str, float]:
    """The most likely of the texts with which the server completes a prompt, and the milliseconds it took."""
    start = time.perf_counter()
    try:
        answer = requests.post(f"{base_url}/completions", json=body, timeout=600)
    except requests.RequestException as error:
        stop(f"{base_url}: no answer ({str(error)[:200]}); start the server first, or give --base-url")
    if not answer.ok:
        stop(f"{base_url} answers {answer.status_code}: {answer.text[:300]}")
    choices = answer.json()["choices"]
    if len(choices) > 1:
        choices.sort(key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
    return choices[0]["text"].strip(), 1e3 * (time.perf_counter() - start)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "run")
    flag = parser.add_argument
    flag("folder", help="what evaluate.py --export wrote")
    flag("--checkpoint", help="instead of RUN/sft.pt")
    flag("--engine", choices=("transformers", "vllm", "sglang"), help="what runs at --base-url")
    flag("--base-url", default="http://localhost:8000/v1", help="of the server")
    flag("--model", help="the server's name for the model; default: the folder, as it is written here")
    flag("--users", type=number(int, 1), default=50, help="so many test prompts")
    flag("--num-beams", type=number(int, 1), default=20, help="W")
    flag("--samples", type=number(int, 1), default=64, help="vllm: answers to a prompt; 1: greedy")
    flag("--print", action="store_true", help="print the first constrained request, send nothing")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    transformers.logging.disable_progress_bar()
    device, run = set_up("cpu"), Path(args.run)
    items = read_catalogue(run / "items.jsonl")
    model, tokenizer, saved = load_model(args.checkpoint or run / "sft.pt", device, items)
    sid = saved["sid"]
    sid_ids = sid_token_ids(tokenizer, sid["num_levels"], sid["codebook_size"])
    pairs = read_pairs(run, saved["args"].get("recommends", "next"), "test", items, args.users)
    texts = [pair.instruction for pair in pairs]
    check_folder(args.folder, model, tokenizer, sid_ids, texts)
    if not args.engine:
        return

    known = {row["sid"] for row in read_jsonl(Path(args.folder) / "sids.jsonl", {"sid": str})}
    sids = [re.findall("<[^>]+>", text) for text in sorted(known)]
    id_of = {token: tokenizer.convert_tokens_to_ids(token) for tokens in sids for token in tokens}
    free = {"model": args.model or args.folder, "max_tokens": sid["num_levels"], "temperature": 0}
    bound = free | constraint(args.engine, sids, id_of, args.num_beams, args.samples)
    if args.print:
        print(json.dumps({"prompt": texts[0], **bound}))
        return
    codes, ours = torch.from_numpy(codes_of(items)), {}
    trie, leaves = build_trie(codes, sid["codebook_size"], device), torch.unique(codes, dim=0)
    for beams in (1, args.num_beams):
        prompts, levels = prompt_ids(tokenizer, texts), range(sid["num_levels"])
        best = [beam_search(model, trie, sid_ids, [ids], beams)[0][0, 0] for ids in prompts]
        ours[beams] = [tokenizer.decode(sid_ids[levels, leaves[leaf]]) for leaf in best]
    for name, body in (("free", free), ("constrained", bound)):
        answers, times = zip(*(ask(args.base_url, {**body, "prompt": text}) for text in texts))
        equal = ", ".join(f"{sum(map(str.__eq__, answers, best))} are our first of W={beams}"
                          for beams, best in ours.items())
        in_catalogue = sum(text in known for text in answers)
        print(f"{args.engine}, {name} | {in_catalogue} of {len(answers)} answers are SIDs of the catalogue, "
              f"{equal} | median {statistics.median(times):.0f} ms | first {answers[0]!r}")


if __name__ == "__main__":
    main()
