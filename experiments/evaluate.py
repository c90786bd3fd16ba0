"""`python -m experiments evaluate`: perplexity of a model on texts."""

from __future__ import annotations

import torch

from callbacks.terminal import track
from datamodules.evaluation import perplexities, tokenize_texts
from experiments.arguments import Parser, add_device, at_least, report
from rotpruner.loading import check_seq_len, load_config, load_model, load_tokenizer
from rotpruner.perplexity import windows


def main(arguments: list[str]) -> None:
    """Print `{"ppl": {text: value}, "tokens": {text: count}}`, evaluated in float32."""
    parser = Parser("evaluate", "Perplexity over non-overlapping windows, in float32.")
    parser.add_argument("--model", required=True, help="embedded name, directory or hub name")
    parser.add_argument("--text", required=True, action="append", help="name or path of a test text; repeatable")
    parser.add_argument("--seq_len", type=at_least(2), default=1024, help="tokens a window")
    parser.add_argument("--max_tokens", type=at_least(1), help="first tokens of each text to use; all if left out")
    add_device(parser)
    options = parser.parse_args(arguments)

    check_seq_len(load_config(options.model), options.seq_len)
    tokenizer = load_tokenizer(options.model)
    texts = tokenize_texts(options.text, tokenizer, options.seq_len, options.max_tokens)
    model = load_model(options.model, torch.float32).to(options.device)
    ppl = perplexities(model, texts, options.seq_len, options.max_tokens, track)
    tokens = {name: windows(ids, options.seq_len, options.max_tokens).numel() for name, ids in texts.items()}
    report({"ppl": ppl, "tokens": tokens}, options.json)
