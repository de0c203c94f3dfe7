"""What the studies share.  Run a study from the project's folder, for example
`python .github/studies/ladder.py 100 101 102`; the figures go to the end of a .jsonl file
where it is run, a line each, and one that stands there already is not computed again."""
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import gan_lm  # noqa: E402
from gan_lm import *  # noqa: E402, F403


def start(seed, *flags, out="out_{}"):
    """cfg, data and mle of a seed: of the finished run in out_SEED, or trained there."""
    cfg = parse_flags(["--seed", str(seed), "--out", out.format(seed), "--device", "cpu", *flags])
    torch.set_num_threads(cfg.threads)
    data = Data(read(cfg.data or cfg.grammar), cfg)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.seed)
    mle = GPT(len(data.symbols), data.context, cfg.layers, cfg.width, cfg.window)
    phase("mle", [mle], train_mle, data, cfg, cfg.mle_steps)
    return cfg, data, mle


def best(model, data, cfg, decodings=None):
    """{"plain": row, "best": row} as the program reports them."""
    torch.manual_seed(cfg.seed)
    rows = {d: measure(model, d, 0, data, cfg)[0]["score"] for d in decodings or DECODINGS}
    choice = min(rows, key=rows.get)
    plain = measure(model, (1.0, 0.0), 1, data, cfg)[0]
    return {"plain": plain, "best": measure(model, choice, 1, data, cfg)[0]}


def look(G, data):
    """What G samples: tokens and entropy (nats) per sentence, and four of them"""
    x = G.sample(1000)
    return {"tokens": token_mask(x).sum(1).mean().item(),
            "entropy": -in_chunks(G.logp, x).sum(1).mean().item(),
            "samples": [data.mark(line) for line in lines_of(x[:4], data.symbols)]}


class Book:
    """Rows of figures in a .jsonl file."""

    def __init__(self, path):
        self.path = Path(path)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.rows = [json.loads(line) for line in lines]

    def has(self, **key):
        return any(key.items() <= row.items() for row in self.rows)

    def write(self, **row):
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(*(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
                if not isinstance(v, (list, dict))), flush=True)


def flat(measured):
    """plain and best -> one flat row of numbers"""
    plain, best = measured["plain"], measured["best"]
    return {"js": best["score"], "js_plain": plain["score"], "valid": plain.get("valid"),
            "valid_best": best.get("valid"), "kl": plain.get("kl"), "distinct": plain["distinct"]}
