"""The ladder: what must a discriminator be?  `python .github/studies/ladder.py 100 101 102`

Each rung plays the game with another D from the same mle; all else is as by default."""
from common import *

from copy import deepcopy
from dataclasses import replace

BOOK = "ladder.jsonl"


class Number(nn.Module):
    """A transformer's number f(x) at each prefix; anchored: added to log q of G's start."""

    def __init__(self, V, context, width, start=None):
        super().__init__()
        self.gpt, self.width = GPT(V, context, 2, width), width  # one layer learns nothing
        self.start = start and deepcopy(start).requires_grad_(False)
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.gpt.ln.register_forward_hook(lambda ln, x, h: setattr(self, "h", h))

    def logp(self, x):
        self.gpt(x)  # all T+1 ids: a prefix is judged after its last token
        f = self.head(self.h)[:, 1:, 0] * token_mask(x)
        s = (f - F.pad(f[:, :-1], (1, 0))) * token_mask(x)  # differences: the sum is f again
        return s if self.start is None else s + self.start.logp(x)


class Alone(CNN):
    """SeqGAN's CNN by itself."""

    def logp(self, x):
        return self(x) * is_last(x)


def without_log_q(s, logq):
    return s.cumsum(1)


def rungs(cfg, data, mle):
    """name -> (D, likelihood steps of D, config, does D learn in the game, log q told)"""
    V, T = len(data.symbols), data.context
    steps = (cfg.head_start + cfg.rounds) * cfg.d_steps

    twice = replace(cfg, head_start=2 * cfg.head_start)

    def gpt(width=cfg.d_width):
        return GPT(V, T, cfg.layers, width)
    return {
        "CNN": (lambda: Alone(mle, 96), 0, cfg, True, False),
        "CNN, SeqGAN's reward": (
            lambda: Alone(mle, 96), 0, replace(cfg, reward="prob"), True, False),
        "CNN + log q_start - log q": (lambda: CNN(mle, 96), 0, cfg, True, True),
        "GPT": (gpt, 0, cfg, True, True),
        "GPT, frozen after its head start": (gpt, 0, cfg, False, True),
        "GPT, all its steps in the head start, then frozen": (
            gpt, 0, replace(cfg, head_start=cfg.head_start + cfg.rounds), False, True),
        "GPT, no head start": (
            gpt, 0, replace(cfg, head_start=0, d_steps=steps // cfg.rounds), True, True),
        "GPT, half as wide": (lambda: gpt(cfg.d_width // 2), 0, cfg, True, True),
        "GPT, twice as wide": (lambda: gpt(cfg.d_width * 2), 0, cfg, True, True),
        "GPT by likelihood, as many steps, frozen": (
            gpt, steps, replace(cfg, head_start=0), False, True),
        "GPT by likelihood, then learning": (gpt, steps, replace(cfg, head_start=0), True, True),
        **{f"GPT by likelihood, {n} steps, {then}": (
            gpt, n, replace(cfg, head_start=0), then != "frozen", True)
           for n in (300, 600, 1000) for then in ("frozen", "then learning")},
        # a number for each prefix is slow to learn: twice the head start
        "f": (lambda: Number(V, T, cfg.d_width), 0, twice, True, False),
        "f + log q_start - log q": (lambda: Number(V, T, cfg.d_width, mle), 0, twice, True, True)}


def play(G, D, learns, data, cfg, d_mle_steps):
    """The game; a D that does not learn in it has its head start as a game of its own."""
    record = {"curves": []}
    if d_mle_steps:
        train_mle(D, data, cfg, d_mle_steps)
    if not learns and cfg.head_start:
        train_gan(G, D, data, replace(cfg, rounds=0))
        cfg = replace(cfg, head_start=0)
    if cfg.rounds:
        record = train_gan(G, D, data, cfg if learns else replace(cfg, d_steps=0))
    return record


def main(seeds, flags=(), only=None, out="out_{}", book=BOOK):
    book = Book(book)
    told = gan_lm.discriminator_logits
    for seed in seeds:
        cfg, data, mle = start(seed, *flags, out=out)
        if not book.has(rung="mle", seed=seed):
            book.write(rung="mle", seed=seed, seconds=0.0, **flat(best(mle, data, cfg)))
        for name, (make, d_mle_steps, how, learns, with_q) in rungs(cfg, data, mle).items():
            if book.has(rung=name, seed=seed) or only and name not in only:
                continue
            gan_lm.discriminator_logits = told if with_q else without_log_q
            torch.manual_seed(seed)
            G, D = deepcopy(mle), make()
            torch.manual_seed(zlib.crc32(f"gan {seed}".encode()))
            began = time.monotonic()
            curves = play(G, D, learns, data, how, d_mle_steps)["curves"]
            seconds = time.monotonic() - began
            gan_lm.discriminator_logits = told
            row = look(G, data) | flat(best(G, data, cfg))
            if isinstance(D, GPT):
                d = measure(D, (1.0, 0.0), 1, data, cfg)[0]
                row |= {"d_js": d["score"], "d_valid": d["valid"]}
            if curves:
                row |= {"tokens": curves[-1]["tokens"], "d_loss": curves[-1]["d_loss"]}
            book.write(rung=name, seed=seed, seconds=seconds, **row)


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [100, 101, 102])
