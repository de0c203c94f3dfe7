"""Do GANs help language models?  One file that answers by measurement.

A small GPT, the generator G, is trained by likelihood (`mle`).  Then comes a game: G writes
sentences, a discriminator D says how real each looks, and G makes more likely what looked
real (`gan`).  When does that bring more than cheap things do: a lower temperature, a cut of
unlikely tokens, as much time in more likelihood (`continued`)?  Shown beside them: a choice
among several of G's samples by the same D (`reranked`), which costs several times as much a
sample.

    text --likelihood--> mle --the game: G and D in turn--> gan
                          |-----more likelihood-----------> continued
                          |-----a choice by D-------------> reranked
    text --likelihood--> p0     frozen, a part of D: by default with a longer memory than G

By default G's memory is too short for its language.  The game cannot lengthen it.  But G
learns to make another compromise.  Likelihood punishes a model for each true sentence that
it holds unlikely, and never looks at what it writes: so it tries to cover everything, with
errors.  The game looks at what G writes: G stops saying what it cannot say right.

Is it the game that teaches, or p0?  D begins as a comparison of p0 with G, and learns a
correction.  `--d_steps 0` leaves the correction away: the gain that is left is p0's.  And
p0's training takes time, too: the README says what likelihood makes of that time.
`--memory 0` takes G's limit away; if G then is as large as p0, mle serves as p0, and all
that D can know beyond G is its correction.

    python gan_lm.py                                # a language whose truth is known
    python gan_lm.py --data your.txt --level char   # your own text, one sequence a line
    python gan_lm.py --sample 9 --prompt "the dog"  # what a finished run has learned

Deleted from SeqGAN (Yu et al. 2017), whose D judges whole sentences alone: Monte-Carlo
rollouts, which finish a prefix many times over to judge it.  Our D judges every prefix by
itself.  Added: D knows G's probabilities, and p0's.

Shapes: B batch, T time, C channels, V vocabulary.  p: the truth, q: G.  D's opinion is a
logit, or D = sigmoid(logit), from 0 (written by G) to 1 (real).  logp: a log-probability
in nats; logq: by G; logp0: by p0.
"""
import signal, sys  # noqa: E401


def stop(*_):
    print("stopped: --resume goes on from the last finished phase", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":  # Ctrl-C is one line from here on, also while torch is imported
    signal.signal(signal.SIGINT, stop)

import argparse, io, itertools, json, math, os, random, re, time, zlib  # noqa: E401, E402
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

TINY = Path(__file__).resolve().parent / "tiny_data"
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
END = 0  # one token begins, ends and pads a sequence
HEAD = 32  # channels of an attention head
AT_ONCE = 2**23  # numbers that a batch may need (rows x tokens x numbers a token): memory


# ---- 1 configuration: each field is a flag of the same name ------------------------------
def flag(default, text, low=None, high=None, **how):
    """A field of Config that is a flag; a number has to lie between low and high."""
    def number(given):
        value = type(low)(given)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{given}: expected {low} to {high}")
        return value

    if low is not None:
        how["type"] = number
    return field(default=default, metadata={"help": text, **how})


@dataclass
class Config:
    """Everything that a run depends on.  With --data some defaults are others: YOUR_TEXT.

    By default a generator too small for its language: half a minute of likelihood takes it
    as far as likelihood can, and more changes nothing."""
    # the text
    data: str = flag("", "a text, one sequence a line; none: sentences of the grammar")
    grammar: str = flag("", "rules that sentences follow; none: tiny_data/grammar.txt")
    sentences: int = flag(160_000, "how many sentences of the grammar", 80, 10**7)
    level: str = flag("word", "what a token is", choices=["word", "char"])
    context: int = flag(64, "longest sequence in tokens; the rest is cut", 1, 4096)
    # the generator; and p0, a frozen model that D's formula contains: discriminator()
    layers: int = flag(1, "layers of G", 1, 100)
    width: int = flag(32, "channels of G, a multiple of 32", 32, 4096)
    memory: int = flag(2, "how many tokens a layer of G sees; 0: all", 0, 4096)
    p0_layers: int = flag(2, "layers of p0, which sees all tokens", 1, 100)
    p0_width: int = flag(64, "channels of p0, a multiple of 32", 32, 4096)
    # likelihood
    mle_steps: int = flag(10_000, "likelihood steps of mle", 0, 10**9)
    p0_steps: int = flag(5000, "likelihood steps of p0", 0, 10**9)
    continued_steps: int = flag(10_500, "of continued: about the game's time", 0, 10**9)
    batch_size: int = flag(64, "sequences a step; real ones a step of D", 2, 10**6)
    lr: float = flag(4e-3, "peak learning rate, at width 64 or less", 0.0, 1.0)
    # the game
    disc: str = flag("lm", "what f in D is: a language model, a CNN", choices=["lm", "cnn"])
    reward: str = flag("js", "what G climbs: see value()", choices=["js", "logit", "prob"])
    g_steps: int = flag(200, "turns of the game; 0: no game", 0, 10**9)
    g_samples: int = flag(1024, "sentences that G writes a turn", 2, 10**6)
    d_steps: int = flag(2, "steps of D a turn; 0: D learns nothing", 0, 10**6)
    gan_lr: float = flag(3e-3, "peak learning rate of G, at width 64 or less", 0.0, 1.0)
    d_lr: float = flag(1e-3, "peak learning rate of D, at width 64 or less", 0.0, 1.0)
    lam: float = flag(1.0, "a reward k tokens later counts lam^k", 0.0, 1.0)
    # measurement
    best_of: int = flag(4, "`reranked` chooses one of so many samples", 2, 1000)
    temperatures: tuple = flag(
        (1.0, 1.15, 0.9, 0.8), "to find the best of", 0.01, 100.0, nargs="+")
    min_ps: tuple = flag(
        (0.0, 0.005, 0.02), "cuts to find the best of: decoded()", 0.0, 1.0, nargs="+")
    eval_samples: int = flag(
        8000, "samples to measure an arm by, and true sentences", 20, 10**6)
    # the run
    seed: int = flag(0, "same seed, same machine: same numbers", 0, 10**6)
    device: str = flag(DEVICES[0], "where to compute", choices=DEVICES)
    out: str = flag("out", "folder for everything that is written")
    resume: bool = flag(False, "go on with the run in --out", action="store_true")
    # a finished run
    sample: int = flag(0, "train nothing: so many samples of the run in --out", 0, 10**6)
    phase: str = flag("gan", "whose samples", choices=["mle", "p0", "gan", "continued"])
    prompt: str = flag("", "the text that these samples go on from")
    temperature: float = flag(1.0, "of these samples", 0.01, 100.0)
    min_p: float = flag(0.0, "cut of these samples", 0.0, 1.0)


# Defaults for a text of your own: what two cores do in about ten minutes.
# mle is then p0, too, unless flags make G another one than p0.
YOUR_TEXT = {"layers": 2, "width": 128, "memory": 0, "p0_width": 128, "mle_steps": 3000,
             "p0_steps": 3000, "continued_steps": 800, "g_steps": 80, "g_samples": 256,
             "gan_lr": 3e-4,  # at 3e-3 it ends with a few short lines
             "temperatures": (1.0, 0.8), "min_ps": (0.0, 0.05), "eval_samples": 2000}


def fail(message):
    print("gan_lm.py: error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def parse_flags(argv=None):
    """Command line -> Config.  A mistake ends the program with one line about it."""
    others = ", ".join(f"{name} {value}" for name, value in YOUR_TEXT.items())
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=f"Defaults with --data: {others}.",
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    for f in fields(Config):
        parser.add_argument("--" + f.name, default=f.default, **f.metadata)
    if parser.parse_args(argv).data:
        parser.set_defaults(**YOUR_TEXT)
    cfg = Config(**vars(parser.parse_args(argv)))
    for name in ("width", "p0_width"):
        if getattr(cfg, name) % HEAD:
            fail(f"argument --{name}: {getattr(cfg, name)}: expected a multiple of {HEAD}")
    if cfg.disc == "cnn" and cfg.lam < 1:
        fail("argument --lam: expected 1 with --disc cnn, whose f judges no prefixes")
    if cfg.prompt and not cfg.sample:
        fail("argument --prompt: expected together with --sample")
    return cfg


# ---- 2 text: lines <-> (N, T+1) token ids ------------------------------------------------
def read(path):
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        fail(f"{path}: expected a UTF-8 text file: {error}")
    if "\0" in text:
        fail(f"{path}: expected a UTF-8 text file: it has NUL characters, as UTF-16 has")
    return text


def tokens_of(line, level):
    """A word carries the space before it: the tokens, joined, are the line again."""
    if level == "char":
        return list(line)
    return re.findall(r" ?[\w'-]+| ?\S", " " + " ".join(line.split()))


def lines_of(path):
    lines = [line.rstrip("\r") for line in read(path).split("\n") if line.strip()]
    different = len(set(lines))
    if different < 50 or len(lines) < 80:
        fail(f"{path}: {len(lines)} lines, {different} different; expected 80 and 50")
    return lines


class Data:
    """A text as (N, T+1) ids: `train`, `val` to stop by, `truth` to measure by.

    grammar: the language if it is known, else None.  seen: the lines of `train`."""

    def __init__(self, cfg):
        self.level, self.context, self.device = cfg.level, cfg.context, cfg.device
        self.grammar, self.cut = None, 0
        lines, truth = (lines_of(cfg.data), []) if cfg.data else self.drawn(cfg)
        tokens = {token for line in lines + truth for token in tokens_of(line, cfg.level)}
        self.symbols = ["", *sorted(tokens)]  # END is the 0th
        self.id_of = {symbol: i for i, symbol in enumerate(self.symbols)}
        if len(self.symbols) > 20_000:
            fail(f"--level {cfg.level}: over 20000 different tokens; expected char")

        # A held-out line may stand in train as well, as often as the text repeats itself.
        random.Random(cfg.seed).shuffle(lines)
        n = len(lines) // 10
        self.val = self.to_ids(lines[:n][:2000])
        self.truth = self.to_ids(truth or lines[n:2 * n][:cfg.eval_samples])
        self.train = self.to_ids(lines[n:] if truth else lines[2 * n:])
        self.seen = set(self.to_lines(self.train))
        self.words = {word for line in self.seen for word in line.split()}
        self.warn()

    def drawn(self, cfg):
        """Sentences of the grammar: to learn, and to measure by."""
        try:
            from tiny_data.language import Grammar  # the only use of that folder's code
        except ImportError:
            fail("no --data, and no tiny_data/ (grammar.txt, language.py) beside gan_lm.py")
        rules = cfg.grammar or TINY / "grammar.txt"
        self.grammar = Grammar(read(rules), rules)
        rng = random.Random(cfg.seed)
        bar = tqdm(range(cfg.sentences), "sentences", disable=None)
        lines = [self.grammar.sample(rng) for _ in bar]
        rng = random.Random(cfg.seed + 10**6)
        truth = [self.grammar.sample(rng) for _ in range(cfg.eval_samples)]
        if max(len(tokens_of(line, cfg.level)) for line in truth) >= cfg.context:
            fail(f"--context {cfg.context}: too short for a true sentence; expected more")
        self.truth_logp = np.array([self.grammar.logp(line) for line in truth])
        return lines, truth

    def warn(self):
        """Say what --context cuts off, and how many held-out tokens are unknown."""
        if self.cut:
            n = len(self.train) + len(self.val) + len(self.truth)
            print(f"{self.cut} of {n} lines are longer than --context {self.context} "
                  "tokens and are cut")
        tokens = self.val[self.val != END]
        unknown = 1 - torch.isin(tokens, self.train.unique()).float().mean().item()
        if unknown > 0.05:
            print(f"{unknown:.0%} of the held-out tokens are in no training line; "
                  "--level char may do better")

    def to_ids(self, lines):
        """N lines -> (N, T+1) ids: a row is END, its tokens (at most T), END ... END."""
        T = self.context
        x = np.full((len(lines), T + 1), END, np.int16)  # small; trim() makes it long
        for row, line in zip(x, lines):
            ids = [self.id_of[token] for token in tokens_of(line, self.level)]
            self.cut += len(ids) > T
            row[1:1 + len(ids)] = ids[:T]
        return torch.from_numpy(x).to(self.device)

    def to_lines(self, x):
        """(N, T+1) ids -> N lines"""
        lines = ["".join(self.symbols[i] for i in row) for row in x.tolist()]
        return lines if self.level == "char" else [line.strip() for line in lines]

    def mark(self, line):
        """`+`: in the training text.  `*`: not in the language, if there is a grammar."""
        if line in self.seen:
            return "+"
        return "*" if self.grammar and self.grammar.logp(line) == -math.inf else " "


def real_tokens(x):
    """(B, T+1) ids -> (B, T) mask of what counts: the text, and its END if it is not cut.

    x[:, :-1]        END  the  dog  runs  .    END  END    what the model reads
    x[:, 1:]         the  dog  runs  .    END  END  END    what it should say next
    real_tokens(x)    1    1    1    1    1    0    0"""
    return torch.cat([torch.ones_like(x[:, :1]), x[:, 1:-1].ne(END)], 1).float()


def is_last(x):
    """(B, T+1) ids -> (B, T), True at the last real token of a row."""
    mask = real_tokens(x)
    return mask > F.pad(mask[:, 1:], (0, 1))


def trim(x):
    """Without the columns in which no row has a real token."""
    longest = int(real_tokens(x).sum(1).max())
    return x[:, :longest + 1].long()


def batches(x, size, pool=16):
    """Endless shuffled batches of row numbers; the rows of `pool` batches are sorted by
    length: with little padding p0 learns 1.5 times as fast.  But where every gradient is
    clipped, as with long lines of characters, batches of short rows would then pull as hard
    as those of long ones: a pool of 1 mixes them."""
    while True:
        for rows in torch.randperm(len(x), device=x.device).split(pool * size):
            rows = rows[:max(1, len(rows) // size) * size]  # without a last one, half full
            sets = rows[real_tokens(x[rows]).sum(1).argsort()].split(size)
            for i in torch.randperm(len(sets)):
                yield sets[i]


# ---- 3 generator: a GPT with a memory ----------------------------------------------------
class Block(nn.Module):
    """Attention to the tokens before, then a small network on each token."""

    def __init__(self, C):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x, mask=None, past=None):
        """(B, T, C) -> (B, T, C), and the keys and values: those of `past`, and its own."""
        B, T, C = x.shape
        qkv = self.qkv(self.ln1(x)).view(B, T, 3, C // HEAD, HEAD)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, heads, T, HEAD)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        causal = mask is None and past is None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.ln2(x)), (k, v)


class GPT(nn.Module):
    """A transformer (Radford et al. 2019); its head is its token embedding, transposed.

    memory: how many tokens a layer's attention sees, the last one included; 0: all.  With L
    layers a word can depend on the L * (memory - 1) + 1 tokens before it."""

    def __init__(self, V, context, layers, width, memory=0):
        super().__init__()
        self.shape = V, context, layers, width, memory  # what to build it from again
        self.V, self.context, self.width, self.memory = V, context, width, memory
        self.token = nn.Embedding(V, width)
        self.position = nn.Embedding(context + 1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.ln = nn.LayerNorm(width)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def embed(self, x, start=0):
        """(B, T) ids -> (B, T, C)"""
        return self.token(x) + self.position.weight[start:start + x.shape[1]]

    def trunk(self, h):
        """(B, T, C) -> (B, T, C)"""
        mask = None  # sees all before
        if self.memory:
            i = torch.arange(h.shape[1], device=h.device)
            steps_back = i[:, None] - i[None, :]
            mask = (steps_back >= 0) & (steps_back < self.memory)  # (T, T)
        for block in self.blocks:
            h, _ = block(h, mask)
        return self.ln(h)

    def forward(self, x):
        """(B, T) ids -> (B, T, V) logits of the token after each"""
        return self.trunk(self.embed(x)) @ self.token.weight.T

    def next_token(self, x, t, cache):
        """(B, 1) ids, the t-th tokens, and the keys and values of those before ->
        (B, V) logits of the token after, and the keys and values that it will look at."""
        h, new_cache = self.embed(x, start=t), []
        for block, past in zip(self.blocks, cache):
            h, (k, v) = block(h, past=past)
            forget = max(0, k.shape[2] - self.memory + 1) if self.memory else 0
            new_cache.append((k[:, :, forget:], v[:, :, forget:]))
        return self.ln(h[:, -1]) @ self.token.weight.T, new_cache


def decoded(logits, temperature=1.0, min_p=0.0):
    """(..., V) logits -> (..., V) log q, at a temperature and after a cut, min-p (Nguyen et
    al. 2024): no token below min_p times the likeliest one's probability is written."""
    logp = (logits / temperature).log_softmax(-1)
    if min_p > 0:
        too_rare = logp < logp.amax(-1, keepdim=True) + math.log(min_p)
        logp = logp.masked_fill(too_rare, -math.inf).log_softmax(-1)
    return logp


def token_logp(model, x, temperature=1.0, min_p=0.0):
    """log q(x_t | x_<t) in nats: (B, T+1) ids -> (B, T), 0 after the end."""
    logp = decoded(model(x[:, :-1]), temperature, min_p)  # (B, T, V)
    of_x = logp.gather(-1, x[:, 1:, None])[..., 0]
    return of_x.masked_fill(real_tokens(x) == 0, 0.0)


@torch.no_grad()
def sample(model, n, temperature=1.0, min_p=0.0, prompt=()):
    """n sequences -> (n, T+1) ids, and (n, T) log q of each token: what the model thought
    of it.  prompt: ids that every sequence begins with; the model reads them.
    With a cache, which finished rows leave: 78 times as fast as without, at 2,000 rows."""
    V, T, layers = model.shape[:3]
    out = torch.full((n, T + 1), END, device=model.token.weight.device)
    logq = torch.zeros(n, T, device=out.device)
    at_once = max(1, AT_ONCE // (64 * T + 8 * V))  # 64: a small model's cache
    for chunk in torch.arange(n, device=out.device).split(at_once):
        rows, x, cache = chunk, out[chunk, :1], [None] * layers
        for t in range(T):
            logits, cache = model.next_token(x, t, cache)
            logp = decoded(logits, temperature, min_p)  # (rows, V)
            total = logp.exp().cumsum(-1)  # multinomial(), but ten times as fast
            uniform = torch.rand_like(total[:, :1]) * total[:, -1:]
            x = torch.searchsorted(total, uniform, right=True)
            if t < len(prompt):
                x = torch.full_like(x, prompt[t])
            out[rows, t + 1] = x[:, 0]
            logq[rows, t] = logp.gather(1, x)[:, 0]
            going = x[:, 0].ne(END).nonzero()[:, 0]  # here alone the host waits for a GPU
            if len(going) == 0:
                break
            rows, x = rows[going], x[going]  # a finished row leaves the batch
            cache = [(k[going], v[going]) for k, v in cache]
    return out, logq


def by_length(x, size):
    """(N, T+1) ids -> lists of row numbers, of rows of like length and not too many.
    size: how many numbers are computed for a token."""
    # 128 fit a CPU's cache: a turn takes 0.7 of the time that it takes with 512.  A GPU is
    # twice as fast with more, if the model is small.
    most = 128 if x.device.type == "cpu" else 2**16 // x.shape[1]
    at_once = max(1, min(most, AT_ONCE // (size * x.shape[1])))
    return real_tokens(x).sum(1).argsort().split(at_once)


@torch.no_grad()
def in_chunks(function, x, *others, size=256, shape=()):
    """function(x, *others) without a gradient, few rows at a time: (N, T+1) ids ->
    (N, T, *shape).  size: how many numbers it computes for a token."""
    out = torch.zeros(len(x), x.shape[1] - 1, *shape, device=x.device)
    for rows in by_length(x, size):
        part = trim(x[rows])
        T = part.shape[1] - 1
        out[rows, :T] = function(part, *(other[rows, :T] for other in others)).float()
    return out


def logp_of(model, x, *decoding):
    """token_logp() without a gradient, few rows at a time: (N, T+1) ids -> (N, T)"""
    return in_chunks(lambda part: token_logp(model, part, *decoding), x, size=model.V)


# ---- 4 discriminators --------------------------------------------------------------------
def discriminator(f, x, hints, logq):
    """D's logit for every prefix x_1..t, (B, T):

        logit_t = f(x_1..t) + log p0(x_1..t) - log q(x_1..t)

    f: a learned correction.  hints (B, T, 2): what the frozen p0 thinks of each token, see
    hints_of().  logq (B, T): what G, as it is now, thinks of it.

    The best logit is log p/q (see discriminator_loss), and log p/q = log p/p0 + log p0/q.
    The second part is known.  So f has to learn log p/p0, what p0 gets wrong; that stays as
    it is while G moves: f need not chase G.  (Why take turns, then?  With finite data f is
    right only where it has seen samples, and where G writes does move.)  With f = 0, as it
    begins, D says how much more p0 likes a sentence than G does: the game then teaches G
    what p0 knows.

    (Two relatives, for those who know them.  p0 e^f, normalised, is a residual energy-based
    model, Deng et al. 2020.  In RLHF the reward has a term - log q/p0 too, with G's start
    as p0: it keeps G near.)"""
    logp0 = hints.sum(-1)  # of each token
    return f(x, hints) + (logp0 - logq).cumsum(1)


def hints_of(p0, x):
    """(N, T+1) ids -> (N, T, 2): what p0 thinks of each token, in two parts; 0 after END.
    The second is the mean of log p0 over all tokens that p0 might say there (-entropy); the
    first, how far log p0(x_t | x_<t) is above it.  Their sum is log p0(x_t | x_<t).  With
    the two apart f learns faster: is this token rare, or was any token rare there?"""
    def both(part):
        logp = p0(part[:, :-1]).log_softmax(-1)  # (B, T, V)
        mean = (logp.exp() * logp).sum(-1)
        above = logp.gather(-1, part[:, 1:, None])[..., 0] - mean
        return torch.stack([above, mean], -1) * real_tokens(part)[..., None]
    return in_chunks(both, x, size=p0.V, shape=(2,))


class Correction(nn.Module):
    """f as a language model with one number for a head, at every prefix: a second p0, one
    that learns and reads the hints.  The head begins at 0, so f does."""

    def __init__(self, p0):
        super().__init__()
        self.lm, self.width = deepcopy(p0), p0.width
        self.hints = nn.Linear(2, p0.width)
        self.head = nn.Linear(p0.width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x, hints):
        """(B, T+1) ids, (B, T, 2) -> (B, T).  A prefix is judged once its last token has
        been read: all T+1 ids go in; what comes out at column 0, where every row has the
        END that begins it, is dropped."""
        h = self.lm.embed(x)
        h[:, 1:] += self.hints(hints / 3)  # read with their tokens; / 3: to be about 1
        return self.head(self.lm.trunk(h))[:, 1:, 0]


class CNNCorrection(nn.Module):
    """f as SeqGAN's D (Kim 2014): one number for a whole sentence, 0 before.  No hints."""

    def __init__(self, p0):
        super().__init__()
        C = self.width = p0.width
        self.token = nn.Embedding(p0.V, C, padding_idx=END)  # END is 0: pads say nothing
        # So much padding that each filter sees pads alone somewhere: more pads do nothing
        convolutions = [nn.Conv1d(C, C, width, padding=width) for width in (2, 3, 4, 5)]
        self.convolutions = nn.ModuleList(convolutions)
        self.head = nn.Linear(4 * C, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x, hints):
        """(B, T+1) ids, (B, T, 2) -> (B, T)"""
        h = self.token(x[:, 1:]).transpose(1, 2)  # (B, C, T)
        h = torch.cat([conv(h).relu().amax(2) for conv in self.convolutions], 1)  # (B, 4C)
        return self.head(h) * is_last(x)


# ---- 5 objectives: pure functions, each with its equation --------------------------------
def likelihood_loss(logp):
    """MLE: -sum_t log q(x_t | x_<t), nats a sequence; (B, T) -> scalar."""
    return -logp.sum(1).mean()  # a mean over tokens would favour batches of short rows


def discriminator_loss(logits, is_real, mask):
    """-log D(real) - log(1 - D(fake)) of each prefix, D = sigmoid(logit) (Goodfellow et al.
    2014, eq. 1); a sum over the sentence, so that a prefix weighs the same however long its
    sentence is.  Half of the sentences are real.  So D is best, for a prefix with which a
    share p of the real ones and q of the written ones begin, where -p log D - q log(1 - D)
    is least: at D = p/(p+q), whose logit is log p/q.
    (B, T), (B,) bool, (B, T) -> scalar; ln 2 a prefix where D has no opinion."""
    loss = F.softplus(torch.where(is_real[:, None], -logits, logits))
    return (loss * mask).sum(1).mean()


def value(logits, reward="js"):
    """How good a prefix looks to D: what G climbs; any shape -> the same.

    name   what G climbs       and thereby descends; m = (p+q)/2
    js     -log(1 - D)         2 JS(p, q) = KL(p || m) + KL(q || m): Goodfellow's game
    prob   D                   KL(p || m) alone: SeqGAN's choice
    logit  log D - log(1 - D)  KL(q || p): punishes what is wrong, not what is missing

    (Likelihood descends KL(p || q): infinite if a true sentence is impossible to q; what q
    says wrong costs nothing but the probability that it takes from the rest.)

    The last column is of whole sentences and of the best D, p/(p+q), held still while G
    takes a step: the gradient of E_q[value] is sum_x grad q(x) value(x).  That of 2 JS is
    sum_x grad q(x) log q/m (what else there is, 1 - p/2m - q/2m, is 0), and log q/m is
    log(1 - D) + log 2.  So it is the same with the other sign: log 2 adds nothing, as all
    grad q(x) add up to 0.  prob: the derivative of KL(p || m) by q(x) is -p/2m = -D.
    KL(a || b) = E_a[log a/b] is 0 if a = b; JS is symmetric and bounded: divergences()."""
    return {"js": F.softplus(logits), "logit": logits, "prob": logits.sigmoid()}[reward]


def token_rewards(logits, mask, reward="js"):
    """r_t = value(x_1..t) - value(x_1..t-1): by how much a token raised the value.  From t
    on they add up to the value of the whole sentence less that of x_1..t-1: what is already
    written gets neither credit nor blame.  At lam 1 D's opinion of a prefix does no more
    than to be subtracted so: on average G learns from the value of whole sentences, and the
    noise of what was clear before is gone.  (B, T) -> (B, T)."""
    before = F.pad(logits[:, :-1], (1, 0))  # of the empty prefix: logit 0, p = q = 1
    return (value(logits, reward) - value(before, reward)) * mask


def advantages(rewards, mask, lam=1.0):
    """A_t = sum_{k>=t} lam^(k-t) r_k - baseline_t: from its t-th token on, did a sequence
    gain more than others do?  The baseline takes noise away and, on average, changes
    nothing else, since E_q[grad log q] = sum_x grad q(x) = grad 1 = 0; but only if it does
    not depend on the draw that it judges: it is the mean of the *other* sequences there.
    lam < 1: less noise, but only the near future counts.  (B, T) -> (B, T)."""
    A = rewards * mask
    for t in reversed(range(A.shape[1] - 1)):
        A[:, t] += lam * A[:, t + 1]
    others = (A.sum(0) - A) / (mask.sum(0) - 1).clamp(min=1)  # their mean, at each place
    return (A - others) * mask


def policy_gradient_loss(logq, advantage):
    """REINFORCE (Williams 1992): -sum_t A_t log q(x_t | x_<t); (B, T) -> scalar.

    Wanted: the gradient of E_q[R] = sum_x q(x) R(x), R the value of a whole sentence.  As
    grad q = q grad log q, it is E_q[R grad log q]: a mean over samples, and log q is a sum
    over tokens.  At lam 1 A_t stands for R: it is R less the value of x_1..t-1 and less the
    baseline, neither of which depends on the t-th token; so on average neither counts.
    The gradient alone means something, the value of this loss nothing."""
    return -(advantage * logq).sum(1).mean()


# ---- 6 training --------------------------------------------------------------------------
def adamw(module):
    return torch.optim.AdamW(module.parameters(), betas=(0.9, 0.99), fused=True)


def update(module, adam, step, steps, lr):
    """One step of AdamW along the gradients that were added up; none if one is not finite.
    The rate rises for 20 steps and falls to 0 along a cosine; wide models: a lower one."""
    rise = min(1, (step + 1) / 20)
    fall = (1 + math.cos(math.pi * step / steps)) / 2
    adam.param_groups[0]["lr"] = lr * rise * fall * min(1, 64 / module.width)
    if nn.utils.clip_grad_norm_(module.parameters(), 10.0).isfinite():
        adam.step()
    adam.zero_grad()


def likelihood(model, data, steps, cfg):
    """Train `model` by likelihood.  It ends as it was at its best look at held-out text."""
    adam = adamw(model)
    batch_rows = batches(data.train, cfg.batch_size, pool=16 if data.grammar else 1)
    look_every = max(10, math.ceil(steps / 16))
    nll, best = [], None

    for step in tqdm(range(steps + 1), disable=None):
        if step % look_every == 0 or step == steps:
            nll.append(-logp_of(model, data.val).sum(1).mean().item())  # nats a sentence
            if nll[-1] == min(nll):
                best = deepcopy(model.state_dict())
        if step == steps:
            break

        x = trim(data.train[next(batch_rows)])
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.device == "cuda"):
            loss = likelihood_loss(token_logp(model, x))
        loss.backward()
        update(model, adam, step, steps, cfg.lr)

    model.load_state_dict(best)
    kept = min(steps, look_every * nll.index(min(nll)))
    print(f"  held-out nll {np.round(nll, 2)}; step {kept} of {steps} is kept")
    return {"steps": steps, "held-out nll": nll}


def adversarial(model, f, p0, data, cfg):
    """The game: G (`model`) and D (through its correction `f`) take turns."""
    start, curves = deepcopy(model), []
    adam_g, adam_d = adamw(model), adamw(f)

    for step in tqdm(range(cfg.g_steps), "game", disable=None):
        # (1) G writes: x (n, T+1), and logq (n, T), what it thought of each token.
        x, logq = sample(model, cfg.g_samples)
        hints, mask = hints_of(p0, x), real_tokens(x)
        n = len(x)

        # (2) D learns to tell real sentences from these.  No gradient reaches G here.
        d_loss = []
        for _ in range(cfg.d_steps):
            real = data.train[torch.randint(len(data.train), (cfg.batch_size,))].long()
            fake = x[torch.randint(n, (cfg.batch_size,))]
            both = trim(torch.cat([real, fake]))
            is_real = torch.arange(len(both), device=x.device) < cfg.batch_size
            logits = discriminator(f, both, hints_of(p0, both), logp_of(model, both))
            loss = discriminator_loss(logits, is_real, real_tokens(both))
            loss.backward()
            update(f, adam_d, step, cfg.g_steps, cfg.d_lr)
            d_loss.append(loss.item() / real_tokens(both).sum(1).mean().item())

        # (3) Rewards (n, T): by how much each token raised D's opinion.  D's logit has log
        # q in it: a number here, without a gradient.  D is held still while G moves.
        logits = in_chunks(lambda *part: discriminator(f, *part), x, hints, logq)
        rewards = token_rewards(logits, mask, cfg.reward)

        # (4) Advantages (n, T): above 0 if it went better than usual from that token on.
        A = advantages(rewards, mask, cfg.lam)

        # (5) G learns: tokens with an advantage become more likely, others less.
        for rows in by_length(x, model.V):
            part = trim(x[rows])
            new_logq = token_logp(model, part)  # logq once more, now with a gradient
            loss = policy_gradient_loss(new_logq, A[rows, :part.shape[1] - 1])
            (loss * len(rows) / n).backward()
        update(model, adam_g, step, cfg.g_steps, cfg.gan_lr)

        curves.append(describe(x, logq, rewards, d_loss, start, data))
        watch(curves, cfg.g_steps, data.to_lines(x[:2]), data)
    return {"curves": curves}


def describe(x, logq, rewards, d_loss, start, data):
    """One point of each curve: means a sentence, before G's step of this turn."""
    kl = logq[:256] - logp_of(start, x[:256])
    point = {"reward": rewards.sum(1).mean().item(),
             "kl_to_start": kl.sum(1).mean().item(),
             "entropy": -logq.sum(1).mean().item(),
             "tokens": real_tokens(x).sum(1).mean().item()}
    if d_loss:
        point["d_loss"] = sum(d_loss) / len(d_loss)
    if data.grammar:
        right = [data.grammar.logp(line) > -math.inf for line in data.to_lines(x[:50])]
        point["valid"] = sum(right) / len(right)
    return point


def watch(curves, steps, lines, data):
    """Ten times in a game: two samples, and the means since the last time."""
    every = max(1, steps // 10)
    if len(curves) % every == 0:
        for line in lines:
            tqdm.write(f"  {data.mark(line)} {line}")
        means = [f"{name} {np.mean([point[name] for point in curves[-every:]]):.3f}"
                 for name in curves[0]]
        tqdm.write(f"turn {len(curves)}: " + ", ".join(means))


# ---- 7 measurement -----------------------------------------------------------------------
def divergences(logp_p, logq_p, logp_q, logq_q):
    """KL(p || q) = E_p[log p/q] in nats, and the Jensen-Shannon divergence (E_p[log2 p/m] +
    E_q[log2 q/m]) / 2, m = (p+q)/2, in bits (Lin 1991): 0 for the same, 1 for nothing in
    common.  (N,) log p and log q of samples of p, (M,) log p and log q of samples of q -> a
    dict with js_se, js's standard error, and js_p and js_q, what js is the mean of."""
    kl = (logp_p - logq_p).mean()  # infinite if a cut has made q 0
    js_p = 1 - np.logaddexp(0, logq_p - logp_p) / math.log(2)  # log2 p/m = 1 - log2(1+q/p)
    js_q = 1 - np.logaddexp(0, logp_q - logq_q) / math.log(2)
    error = math.sqrt(js_p.var() / len(js_p) + js_q.var() / len(js_q)) / 2
    return {"kl": kl, "js": (js_p.mean() + js_q.mean()) / 2, "js_se": error,
            "js_p": js_p, "js_q": js_q}


class Arm:
    """What is compared: a model; or (f given) a choice by D among k of its samples.

    w = D / (1 - D) estimates p/q: to choose in proportion to w moves q towards p.  One of k
    samples is taken with probability w / (sum of the k weights w).  That writes x with
    probability k q(x) E[w(x) / (w(x) + the weights of k - 1 others)]: x may stand in any of
    k places.  The mean over 1,000 sets of others estimates it closely: so log q is known
    for this arm too.  At another temperature log q in w is another; f, log p/p0, is not."""

    def __init__(self, model, p0, f=None, k=1):
        self.model, self.p0, self.f, self.k = model, p0, f, k

    def write(self, n, decoding):
        """(n, T+1) ids, (n,) the log q of each, and a function: log q of any sentences."""
        x, logq = sample(self.model, n * self.k, *decoding)
        if self.f is None:
            return x, logq.sum(1), lambda text: logp_of(self.model, text, *decoding).sum(1)
        log_w = self.log_weights(x, logq)
        others = torch.randint(n * self.k, (1000, self.k - 1), device=x.device)
        log_others = log_w[others].logsumexp(1)  # (1000,)

        def chosen_logq(logq, log_w):  # (N, T), (N,) -> (N,)
            share = (log_w[:, None] - log_others).sigmoid().mean(1)
            return math.log(self.k) + logq.sum(1) + share.log()

        def any_logq(text):
            logq = logp_of(self.model, text, *decoding)
            return chosen_logq(logq, self.log_weights(text, logq))

        first_of_set = torch.arange(0, n * self.k, self.k, device=x.device)
        chosen = first_of_set + log_w.view(n, self.k).softmax(1).multinomial(1)[:, 0]
        return x[chosen], chosen_logq(logq[chosen], log_w[chosen]), any_logq

    def log_weights(self, x, logq):
        """log w, D's logit, of whole sentences: (N, T+1) ids, (N, T) -> (N,)"""
        hints = hints_of(self.p0, x)
        logits = in_chunks(lambda *part: discriminator(self.f, *part), x, hints, logq)
        return logits[is_last(x)]


@torch.no_grad()
def features(p0, x):
    """(N, T+1) ids -> (N, C+3), of a sentence: the means of p0's last layer and of its
    hints, and a constant."""
    out = torch.ones(len(x), p0.width + 3)
    for rows in by_length(x, p0.V):
        part = trim(x[rows])
        h = torch.cat([p0.trunk(p0.embed(part))[:, 1:], hints_of(p0, part)], -1)
        mask = real_tokens(part)[..., None]
        out[rows.cpu(), :-1] = ((h * mask).sum(1) / mask.sum(1)).cpu()
    return out.double()


def judged(p0, x, truth, data):
    """For text without a grammar, a fresh judge: features() @ w, fitted by least squares to
    be 1 for real text that p0 did not learn and -1 for half of the samples.
    (n, T+1), (N, T+1) ids -> its accuracy on the other half, and on truth; 0.5: fooled."""
    texts = data.val[:len(x) // 2], x[0::2], truth, x[1::2]
    real, fake, more_real, more_fake = (features(p0, text) for text in texts)
    spread = real.T @ real / len(real) + fake.T @ fake / len(fake)
    ridge = 0.01 * torch.eye(len(spread), dtype=spread.dtype)
    w = torch.linalg.solve(spread + ridge, real.mean(0) - fake.mean(0))
    right = (more_real @ w > 0).float().mean() + (more_fake @ w <= 0).float().mean()
    return right.item() / 2


def measure(arm, decoding, half, data, cfg):
    """An arm at a decoding (temperature, min_p), against one half of the true sentences ->
    its figures, and its samples as lines."""
    start = time.monotonic()
    x, logq, logq_of = arm.write(cfg.eval_samples, decoding)
    logq = logq.cpu().double().numpy()
    seconds = time.monotonic() - start
    lines, truth = data.to_lines(x), data.truth[half::2]
    logq_truth = logq_of(truth).cpu().double().numpy()
    row = {"temperature": decoding[0], "min_p": decoding[1],
           "novel": np.mean([line not in data.seen for line in lines]),
           "distinct": len(set(lines)) / len(lines), "ms": 1000 * seconds / len(lines)}
    if data.grammar:
        logp = np.array([data.grammar.logp(line) for line in lines])
        row["valid"] = np.isfinite(logp).mean()
        row |= divergences(data.truth_logp[half::2], logq_truth, logp, logq)
    else:
        known = [word in data.words for line in lines for word in line.split()]
        row |= {"judge": max(0.5, judged(arm.p0, x, truth, data)),  # below chance is noise
                # of the mean of two shares near 1/2: of len(truth), and of half of x
                "judge_se": math.sqrt(1 / len(truth) + 2 / len(x)) / 4,
                "nll": -logq_truth.mean(), "words": np.mean(known or [0.0])}
    return row, lines


# ---- 8 the answer ------------------------------------------------------------------------
def measure_all(arms, score, data, cfg):
    """{arm: {"plain": row, "best": row, "all": rows}}.  An arm's best decoding is chosen on
    half of the true sentences and reported, like the plain one, on the other half."""
    grid = list(itertools.product(cfg.temperatures, cfg.min_ps))
    few = replace(cfg, eval_samples=cfg.eval_samples // 2)  # enough to choose by
    results = {}
    for name, arm in arms.items():
        torch.manual_seed(cfg.seed)
        bar = tqdm(grid, f"measure {name}", disable=None)
        rows = [measure(arm, decoding, 0, data, few)[0] for decoding in bar]
        best = min(rows, key=lambda row: row[score])
        plain, lines = measure(arm, (1.0, 0.0), 1, data, cfg)
        best, _ = measure(arm, (best["temperature"], best["min_p"]), 1, data, cfg)
        results[name] = {"plain": plain, "best": best, "all": rows}
        save(Path(cfg.out, f"samples_{name}.txt"), "\n".join([*lines, ""]))
        shown = [f"  {data.mark(line)} {line}" for line in lines[:6]]
        print("", f"{name} writes:", *shown, sep="\n", flush=True)
    return results


def show_table(results, score):
    more = ["valid", "kl"] if score == "js" else ["words", "nll"]
    columns = ["temperature", "min_p", *more, "novel", "distinct", "ms"]
    print(f"\n{'':10} plain | at its best decoding\n{'':10} {score:>5} |", end="")
    print(*(f"{name[:8]:>8}" for name in (score, "±", *columns)))
    for name, result in results.items():
        best = result["best"]
        figures = [best[score], 1.96 * best[score + "_se"]]
        figures += [best[column] for column in columns]
        print(f"{name:10} {result['plain'][score]:.3f} |", *(f"{x:8.3f}" for x in figures))
    print("±: half a 95 % interval; ms: milliseconds a sample; the rest: see the README")


def verdict(results, score):
    """Does `gan` beat G by likelihood alone, each at its best decoding?  (p0 and reranked
    are no rivals: each of their samples costs more.  The table has them all.)"""
    gan = results["gan"]["best"]
    rival = min("mle", "continued", key=lambda name: results[name]["best"][score])
    other = results[rival]["best"]
    gain = other[score] - gan[score]
    error = math.hypot(gan[score + "_se"], other[score + "_se"])
    if score == "js":  # on the same true sentences: a paired difference
        parts = other["js_p"] - gan["js_p"], other["js_q"], gan["js_q"]
        error = math.sqrt(sum(part.var() / len(part) for part in parts)) / 2
    threshold = max(0.002, 1.96 * error)  # less would not matter, however certain it is
    says = "wins" if gain > threshold else "LOSES" if gain < -threshold else "does NOT win"
    ratio = f"ratio {gan[score] / other[score]:.2f}; " if score == "js" else ""
    return (f"Best {score}: gan {gan[score]:.3f}, {rival} {other[score]:.3f}; {ratio}"
            f"difference {gain:.3f}, needed {threshold:.3f}: the GAN phase {says}.")


def draw(results, curves, score, path):
    """report.png: each arm at each decoding, and the curves of the game."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: pip install matplotlib, then run this again with --resume")
        return
    shown = "reward", "d_loss", "entropy", "valid"
    names = [name for name in shown if curves and name in curves[0]]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplot_mosaic([["arms", name] for name in names] or [["arms"]])
    arms = axes.pop("arms")

    def dot(row, place, **style):
        arms.errorbar(row[score], place, xerr=1.96 * row[score + "_se"], **style)

    for place, (name, result) in enumerate(results.items()):
        for row in result["all"]:
            dot(row, place + 0.15, fmt=".", color="0.6")
        dot(result["best"], place, fmt="D", color="C1" if name == "gan" else "C0")
    arms.set_yticks(range(len(results)), list(results))
    arms.invert_yaxis()
    arms.set_xlabel(f"{score}, less is better; diamond: at its best decoding")
    for name, axis in axes.items():
        axis.plot([point[name] for point in curves], color="C1")
        axis.set_ylabel(name)
        axis.set_xlabel("turns of the game" if name == names[-1] else "")
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    save(path, content.getvalue())


# ---- 9 the run ---------------------------------------------------------------------------
def save(path, content):
    """Bytes, or a text: whole or not at all, even on a full disk."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_bytes(content.encode() if isinstance(content, str) else content)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def begin(cfg, data):
    """Take the folder --out; or, to --resume, check that the run there is the same."""
    folder = Path(cfg.out)
    texts = data.train, data.val, data.truth
    mine = {name: value for name, value in asdict(cfg).items() if name not in (
        "out", "resume", "device", "sample", "phase", "prompt", "temperature", "min_p")}
    mine |= {"text": [zlib.crc32(x.cpu().numpy()) for x in texts], "symbols": data.symbols}
    content = json.dumps(mine, indent=1)
    if cfg.resume:
        theirs = config_of(folder)
        for name, value in json.loads(content).items():  # tuples are lists there
            if value == theirs.get(name) or name in ("data", "grammar"):
                continue  # a text may have been moved: what it says is compared
            if name in ("text", "symbols"):
                fail(f"{cfg.data or 'text'}: is not the text that the run in {folder} had")
            fail(f"argument --{name}: the run in {folder} has {theirs.get(name)}")
    elif folder.is_dir() and any(folder.iterdir()):
        fail(f"--out {folder}: is not empty; expected another folder, or --resume")
    else:
        folder.mkdir(parents=True, exist_ok=folder.is_dir())
        save(folder / "config.json", content)


def config_of(folder):
    file = Path(folder, "config.json")
    if not file.exists():
        fail(f"--out {folder}: there is no run; expected the folder of one")
    try:
        return dict(json.loads(read(file)))
    except (ValueError, TypeError):
        fail(f"{file} is damaged: delete {folder} and run again")


def flags_of(run):
    """The flags of a run, from its config.json: a resumed run need not be told them."""
    for name in run.keys() - {"text", "symbols"}:
        yield from ("--" + name, *map(str, np.atleast_1d(run[name])))


def phase(name, model, train, cfg, records):
    """`model` as train(model) leaves it, or as an earlier run did."""
    file = Path(cfg.out, f"{name}.pt")
    if not file.exists():
        torch.manual_seed(zlib.crc32(f"{name} {cfg.seed}".encode()))  # its own seed
        print(f"\n{name}", flush=True)
        start = time.monotonic()
        record = train(model)
        record["seconds"] = time.monotonic() - start
        content = io.BytesIO()  # not the file itself: a full disk would not be an OSError
        torch.save([record, model.shape, model.state_dict()], content)
        save(file, content.getvalue())
        print(f"  {record['seconds']:.0f} seconds")
    model, records[name] = load(file, cfg.device)
    return model


def load(file, device):
    """The model of a finished phase, and its record."""
    try:  # as data only: nothing in the file is run
        record, shape, state = torch.load(file, map_location=device, weights_only=True)
        model = GPT(*shape).to(device)
        model.load_state_dict(state)
        return model, record
    except Exception as error:  # whatever a damaged or hostile file makes of itself
        fail(f"{file} is no model of a run: delete it and --resume ({error!r:.60})")


def main(argv=None):
    cfg = parse_flags(argv)
    if cfg.sample:
        return print_samples(cfg)
    if cfg.resume:
        cfg = parse_flags([*flags_of(config_of(cfg.out)), *(argv or sys.argv[1:])])
    data, records = Data(cfg), {}

    def gpt(*shape):
        torch.manual_seed(cfg.seed)
        return GPT(len(data.symbols), cfg.context, *shape).to(cfg.device)

    def learn(steps):
        return lambda model: likelihood(model, data, steps, cfg)

    # likelihood; p0 is a model of its own unless G would be the same
    small = gpt(cfg.layers, cfg.width, cfg.memory)
    large = gpt(cfg.p0_layers, cfg.p0_width)
    begin(cfg, data)
    same = small.shape == large.shape
    other = "mle" if same else f"{cfg.p0_layers} layers of {cfg.p0_width}, memory all"
    print(f"{len(data.train):,} lines to learn, {len(data.symbols)} different tokens\nG: "
          f"{cfg.layers} layers of {cfg.width}, memory {cfg.memory or 'all'}; p0: {other}")
    mle = phase("mle", small, learn(cfg.mle_steps), cfg, records)
    p0 = mle if same else phase("p0", large, learn(cfg.p0_steps), cfg, records)

    # the game, and the control: about as much time in more likelihood (report.json has the
    # seconds; p0's are not in it: the README says what they buy in likelihood)
    torch.manual_seed(cfg.seed)
    f = (CNNCorrection if cfg.disc == "cnn" else Correction)(p0).to(cfg.device)
    gan = phase("gan", deepcopy(mle), lambda model: adversarial(
        model, f, p0, data, cfg) | {"f": f.state_dict()}, cfg, records)
    f.load_state_dict(records["gan"].pop("f"))  # of an earlier run, if this one resumes it
    more = learn(cfg.continued_steps)
    continued = phase("continued", deepcopy(mle), more, cfg, records)

    # the answer
    arms = {"mle": Arm(mle, p0), "continued": Arm(continued, p0), "gan": Arm(gan, p0),
            "reranked": Arm(mle, p0, f, cfg.best_of)}
    if p0 is not mle:
        arms["p0"] = Arm(p0, p0)
    answer(arms, records, data, cfg)


def answer(arms, records, data, cfg):
    """Measure, and tell it as report.json, as a table and as a picture."""
    score = "js" if data.grammar else "judge"
    results = measure_all(arms, score, data, cfg)
    no_game = "there is nothing to compare: no game was played"
    says = verdict(results, score) if cfg.g_steps else no_game

    def plain(row):  # for JSON: no arrays, and null for what is not finite
        return {name: value if math.isfinite(value) else None
                for name, value in row.items() if name not in ("js_p", "js_q")}

    figures = {name: {"plain": plain(r["plain"]), "best": plain(r["best"]),
                      "all": list(map(plain, r["all"]))} for name, r in results.items()}
    report = {"torch": torch.__version__, "config": asdict(cfg), "phases": records,
              "arms": figures, "verdict": says}
    save(Path(cfg.out, "report.json"), json.dumps(report, indent=1))
    show_table(results, score)
    print(f"\n{says}")
    draw(results, records["gan"]["curves"], score, Path(cfg.out, "report.png"))


def print_samples(cfg):
    """--sample: what a model of the run in --out writes, after --prompt if there is one."""
    run, file = config_of(cfg.out), Path(cfg.out, f"{cfg.phase}.pt")
    if not file.exists():
        finished = sorted(file.stem for file in Path(cfg.out).glob("*.pt"))
        fail(f"argument --phase: the run in {cfg.out} has finished {finished}")
    model, _ = load(file, cfg.device)
    prompt = tokens_of(cfg.prompt, run["level"]) if cfg.prompt else []
    for token in prompt:
        if token not in run["symbols"]:
            fail(f"argument --prompt: {token!r} is no token of the text of {cfg.out}")
    if len(prompt) > model.context:
        fail(f"argument --prompt: {len(prompt)} tokens; expected at most {model.context}")
    torch.manual_seed(cfg.seed)
    ids = [run["symbols"].index(token) for token in prompt]
    x, _ = sample(model, cfg.sample, cfg.temperature, cfg.min_p, ids)
    for row in x.tolist():
        line = "".join(run["symbols"][i] for i in row)
        print(line.strip() if run["level"] == "word" else line)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # an old terminal does not end a run
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 5):
        fail(f"torch {torch.__version__} is installed; expected 2.5 or newer")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in f"{error!r}".lower():
            raise
        fail("out of memory: lower --width, --layers, --context or --batch_size")
