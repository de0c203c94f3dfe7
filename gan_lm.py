"""Do GANs help language models?  Two small GPTs, one game, a language whose truth is known.

The generator G, a small GPT, is first trained by likelihood, as every language model is
(`mle`).  Then it plays a game (`gan`): a discriminator D learns to tell real sentences from
G's samples, and G learns to make samples that D takes for real.

    text --likelihood--> mle --the game: D and G take turns--> gan
                          |-----more likelihood--------------> continued, about as long

Does the game do more for G than more likelihood, a lower temperature, a truncation of
unlikely tokens?  The sentences come from a grammar, so the true probability p of each is
known, and so is G's own, q: the distance from p to q is measured, not guessed.

So that G falls short, as models of real text do, it sees only the last few tokens; D sees
all.  Likelihood asks only that no true sentence be unlikely: so G tries to say everything,
with errors.  The game judges only what G samples: G stops saying what it gets wrong.

    python gan_lm.py                                # a language whose truth is known
    python gan_lm.py --data your.txt --level char   # your own text, one sequence per line
    python gan_lm.py --sample 9 --prompt "the dog"  # the same command, when it has finished

Deleted from SeqGAN (Yu et al. 2017): rollouts, which complete a prefix to learn its worth;
here D judges each prefix.  Added: -log q in D's logit, which holds G back (section 4).

Shapes: B batch, T time, C channels, V vocabulary.  X.logp: log of X's probability, in nats.
"""
import argparse, importlib.util, json, math, os, random, re, sys, time, unicodedata, zlib
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm, trange

END = 0  # one token begins, ends and pads a sequence
HEAD = 32  # channels of an attention head
ROWS = 128  # sequences that are computed at a time: they fit a CPU's cache
TINY = Path(globals().get("__file__", "gan_lm.py")).with_name("tiny_data")
DECODINGS = [(heat, min_p) for heat in (1, 1.15, 0.9, 0.8) for min_p in (0.0, 0.005, 0.02)]


# ---- 1 configuration: each field is a flag of the same name ------------------------------
WIDTHS = [32, 64, 96, 128, 192, 256, 384, 512, 768, 1024]  # multiples of HEAD


def flag(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    # the text
    data: str = flag("", "a text, one sequence per line; none: sentences of the grammar")
    grammar: str = flag(str(TINY / "grammar.txt"), "rules of the language, without --data")
    sentences: int = flag(160_000, "how many sentences of the grammar")
    level: str = flag("word", "what a token is", ["word", "char"])
    context: int = flag(64, "longer sequences of --data are cut to this many tokens")
    # the generator G and its training by likelihood
    layers: int = flag(1, "layers of G, and of D; 2 with --data")
    width: int = flag(32, "channels of G; 128 with --data", WIDTHS)
    window: int = flag(2, "how many tokens a layer of G sees, 0: all; 0 with --data")
    mle_steps: int = flag(6000, "likelihood steps of mle; 3000 with --data")
    continued_steps: int = flag(15_000, "about as long as the game; 1500 with --data")
    batch_size: int = flag(64, "sequences per step; for D half of them are real")
    lr: float = flag(4e-3, "peak learning rate of likelihood")
    # the discriminator D
    disc: str = flag("gpt", "D is a GPT or a CNN; cnn with --data", ["gpt", "cnn"])
    d_width: int = flag(64, "channels of D", WIDTHS)
    d_mle_steps: int = flag(0, "likelihood steps of D before the game, if it is a GPT")
    # the game
    head_start: int = flag(250, "rounds in which D learns alone; 100 with --data")
    rounds: int = flag(200, "rounds in which D and G learn; 80 with --data")
    d_steps: int = flag(8, "steps of D per round; 0: D is frozen")
    g_samples: int = flag(1024, "samples of G per round; 256 with --data")
    g_lr: float = flag(3e-3, "peak learning rate of G in the game")
    d_lr: float = flag(3e-3, "peak learning rate of D in the game")
    reward: str = flag("js", "what G maximises: see value()", ["js", "logit", "prob"])
    lam: float = flag(1.0, "a reward k tokens later counts lam^k")
    # measurement and the run
    eval_samples: int = flag(8000, "samples and true lines to measure by; 2000 with --data")
    seed: int = flag(0, "same seed, same machine: same numbers")
    threads: int = flag(1, "CPU threads; more are slow where other programs run")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to compute")
    out: str = flag("out", "folder of the run; the same command resumes it")
    # a finished run
    sample: int = flag(0, "print this many samples of a run that has finished")
    model: str = flag("gan", "whose samples", ["mle", "continued", "gan"])
    prompt: str = flag("", "the text that these samples begin with")
    temperature: float = flag(1.0, "of these samples")
    min_p: float = flag(0.0, "truncation of these samples")


# Defaults with --data: a larger G that sees all; D starts from G's log q, see CNN
YOUR_TEXT = dict(layers=2, width=128, window=0, disc="cnn", eval_samples=2000, rounds=80,
                 mle_steps=3000, head_start=100, g_samples=256, continued_steps=1500)
FOR_SAMPLES = ["model", "prompt", "temperature", "min_p"]


def fail(message):
    print("gan_lm.py: error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def parse_flags(argv=None):
    """Command line -> Config.  Refuses the flags in `idle`, which would have no effect."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda e: fail(e.replace("invalid int value", "expected an integer"))
    for f in fields(Config):
        parser.add_argument("--" + f.name, type=f.type, default=f.default, **f.metadata)
    if parser.parse_args(argv).data:
        parser.set_defaults(**YOUR_TEXT)  # for the second look at the flags
    cfg = Config(**vars(parser.parse_args(argv)))
    idle = dict.fromkeys(["grammar", "sentences"], "without --data") if cfg.data else {}
    idle |= {} if cfg.sample else dict.fromkeys(FOR_SAMPLES, "with --sample")
    idle |= {"d_mle_steps": "with --disc gpt"} if cfg.disc == "cnn" else {}
    for name in idle:
        if getattr(cfg, name) != parser.get_default(name):
            fail(f"argument --{name} works only {idle[name]}")
    return cfg


# ---- 2 text: lines <-> (N, T+1) token ids ------------------------------------------------
# \w leaves out accents and vowel signs that are characters of their own, and joiners.
MARKS = "".join(c for c in map(chr, range(2**17)) if unicodedata.category(c)[0] == "M")
WORD = re.compile(rf" ?[\w'\u200c\u200d{MARKS}-]+| ?\S")


def tokens_of(line, level):
    """A word carries the space before it: the tokens, joined, are the line again."""
    return list(line) if level == "char" else WORD.findall(" " + " ".join(line.split()))


def lines_of(x, symbols):
    """(N, T+1) ids -> N lines.  symbols[i]: the text of id i; that of END is empty."""
    return ["".join(symbols[i] for i in row).removeprefix(" ") for row in x.tolist()]


def read(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        fail(f"{path}: expected a UTF-8 text file: {error}")


class Data:
    """A text as (N, T+1) ids: `train`; `val`, for early stopping and D's exam; `truth`, to
    measure by.  grammar: the language, if it is known, or None.  seen: lines of `train`."""

    def __init__(self, text, cfg):
        self.grammar, rng = None, random.Random(cfg.seed)
        lines = [line for line in text.split("\n") if line.strip()]
        n_truth = min(len(lines) // 10, cfg.eval_samples)
        if not cfg.data:
            from tiny_data.language import Grammar  # the only use of that folder's code
            self.grammar, n_truth = Grammar(text, cfg.grammar), cfg.eval_samples
            bar = trange(cfg.sentences + n_truth, desc="text", disable=None)
            lines = [self.grammar.sample(rng) for _ in bar]
        if len(lines) < 100:
            fail(f"{cfg.data or cfg.grammar}: {len(lines)} lines; expected 100 or more")
        rng.shuffle(lines)

        tokens = [tokens_of(line, cfg.level) for line in lines]
        longest = max(map(len, tokens))
        self.context = longest + 1 if self.grammar else min(cfg.context, longest + 1)
        self.symbols = ["", *sorted(set().union(*tokens))]  # the 0th is END
        id_of = {symbol: i for i, symbol in enumerate(self.symbols)}
        x = torch.full((len(lines), self.context + 1), END)  # END, the tokens, END ... END
        for row, line in zip(x.numpy(), tokens):  # each row is a view of x
            row[1:1 + len(line)] = [id_of[token] for token in line[:self.context]]
        ends = [n_truth, n_truth + min(len(lines) // 10, 2000)]
        self.truth, self.val, self.train = x.to(cfg.device).tensor_split(ends)
        self.seen = set(lines_of(self.train, self.symbols))
        self.truth_logp = self.logp(lines[:n_truth]) if self.grammar else None

    def logp(self, lines):
        """log p of N lines by the grammar, (N,) in nats; -inf: not in the language."""
        return np.array([self.grammar.logp(line) for line in lines])

    def mark(self, line):
        """`+`: in the training text.  `*`: not in the language, if there is a grammar."""
        wrong = self.grammar and self.grammar.logp(line) == -math.inf
        return ("  + " if line in self.seen else "  * " if wrong else "    ") + line


def token_mask(x):
    """(B, T+1) ids -> (B, T) mask of what counts: the text and, unless it was cut, one END.

    x[:, :-1]        END  the  dog  runs  .    END  END    what the model reads
    x[:, 1:]         the  dog  runs  .    END  END  END    what it should say next
    token_mask(x)     1    1    1    1    1    0    0"""
    return F.pad(x[:, 1:-1].ne(END), (1, 0), value=True).float()


def is_last(x):
    """(B, T+1) ids -> (B, T) mask of the last token that counts."""
    return token_mask(x) - F.pad(token_mask(x)[:, 1:], (0, 1))


def trim(x):
    """Drop the columns in which no row has a token that counts."""
    return x[:, :1 + int(token_mask(x).sum(1).max())]


def batch(x, size):
    return x[torch.randint(len(x), (size,), device=x.device)]


@torch.no_grad()
def in_chunks(function, x, *how):
    """function(x), (N, T+1) ids -> (N, T), without a gradient and ROWS rows at a time."""
    T = x.shape[1] - 1
    parts = [function(trim(part), *how) for part in x.split(ROWS)]
    return torch.cat([F.pad(part, (0, T - part.shape[1])) for part in parts])


# ---- 3 the generator G: a GPT with a window ----------------------------------------------
def log_probs(logits, temperature=1.0, min_p=0.0):
    """(..., V) logits -> (..., V) log q at a temperature and after a truncation, min-p
    (Nguyen et al. 2024): no token below min_p times the likeliest one's probability."""
    logq = (logits / max(temperature, 1e-4)).log_softmax(-1)  # at 0: the likeliest token
    if min_p > 0:
        too_rare = logq < logq.amax(-1, keepdim=True) + math.log(min(1.0, min_p))
        logq = logq.masked_fill(too_rare, -math.inf).log_softmax(-1)
    return logq


class Block(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x, mask, past=None):
        """(B, T, C) -> (B, T, C), and the keys and values: those of `past`, and its own.
        mask (T, T): which tokens each may see; T is 1 with a past, and nothing hidden."""
        B, T, C = x.shape
        qkv = self.qkv(self.ln1(x)).view(B, T, 3, C // HEAD, HEAD)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, heads, T, HEAD)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.ln2(x)), (k, v)


class GPT(nn.Module):
    """A transformer (Radford et al. 2019) whose head is its token embedding, transposed.
    window: how many tokens attention sees, a token itself and those just before; 0: all."""

    def __init__(self, V, context, layers, width, window=0):
        super().__init__()
        self.context, self.width, self.window = context, width, window or context + 1
        self.token = nn.Embedding(V, width)
        self.position = nn.Embedding(context + 1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.ln = nn.LayerNorm(width)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, x, t=0, cache=None):
        """(B, T) ids, whose first is the t-th of its sentence, and the KV cache of those
        before -> (B, T, V) logits of the token after each, and the new cache."""
        T, new_cache = x.shape[1], []
        ones = torch.ones(T, T, dtype=torch.bool, device=x.device)
        mask = ones.tril() & ones.triu(1 - self.window)  # (T, T): the past, but not too far
        h = self.token(x) + self.position.weight[t:t + T]  # (B, T, C)
        for block, past in zip(self.blocks, cache or [None] * len(self.blocks)):
            h, (k, v) = block(h, mask, past)
            forget = max(0, k.shape[2] - (self.window - 1))
            new_cache.append((k[:, :, forget:], v[:, :, forget:]))
        return self.ln(h) @ self.token.weight.T, new_cache

    def logp(self, x, temperature=1.0, min_p=0.0):
        """log q(x_t | x_<t) of each token: (B, T+1) ids -> (B, T), 0 after the end."""
        logq = log_probs(self(x[:, :-1])[0], temperature, 0.999 * min_p)  # keep all sampled
        logq = logq.gather(-1, x[:, 1:, None])[..., 0]
        return logq.masked_fill(token_mask(x) == 0, 0.0)

    @torch.no_grad()
    def sample(self, n, temperature=1.0, min_p=0.0, prompt=()):
        """n sequences -> (n, T+1) ids.  prompt: ids that every sequence begins with."""
        x = torch.full((n, self.context + 1), END, device=self.token.weight.device)
        x[:, 1:1 + len(prompt)] = torch.tensor(prompt, dtype=torch.long)
        rows, cache = torch.arange(n, device=x.device), None
        for t in range(len(prompt), self.context):
            first = t if cache else 0  # the prompt is read at once
            logits, cache = self(x[rows, first:t + 1], first, cache)
            total = log_probs(logits[:, -1], temperature, min_p).exp().cumsum(-1)  # (B, V)
            # The token whose total reaches a random number: as multinomial(), but faster
            chance = (1 - torch.rand_like(total[:, :1])) * total[:, -1:]  # > 0: 0 gives END
            token = torch.searchsorted(total, chance)[:, 0]
            x[rows, t + 1] = token
            going = token.ne(END).nonzero()[:, 0]  # a finished sequence leaves the batch
            rows, cache = rows[going], [(k[going], v[going]) for k, v in cache]
        return x


# ---- 4 the discriminator D ---------------------------------------------------------------
def discriminator_logits(s, logq):
    """D's logit for each prefix x_1..t, whose sigmoid is D's probability that it is real:

        logit_t = sum_{k<=t} ( s_k - log q(x_k | x_<k) ),     s = D.logp(x)

    The best logit is log p/q (see discriminator_loss).  log q is known: it is G's own.  So
    all that D has to learn is s = log p, the language, which stays as it is while G moves.
    And, what counts most (README), the logit falls at once where G raises q above s.  With
    no such anchor in its reward, G runs away to where D has never looked.

    D is a GPT, whose s is its log-probability, or a CNN.  (D is told log q likewise in
    imitation learning: Finn et al. 2016, Fu et al. 2018.)  (B, T), (B, T) -> (B, T)"""
    return (s - logq).cumsum(1)


class CNN(nn.Module):
    """SeqGAN's D (Kim 2014): a number f(x) for a whole sentence, added to log q of G as it
    was when the game began (`start`).  So D begins without an opinion: all logits are 0.
    (RLHF has this form: f is the reward model, log q_start - log q the KL penalty.)"""

    def __init__(self, start, C):
        super().__init__()
        self.start, self.width = deepcopy(start).requires_grad_(False), C
        self.token = nn.Embedding(len(start.token.weight), C, padding_idx=END)
        # END's vector is 0; each filter sees k zeros in any case: f ignores how x is padded
        self.convs = nn.ModuleList(nn.Conv1d(C, C, k, padding=k) for k in (2, 3, 4, 5))
        self.head = nn.Linear(4 * C, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        """(B, T+1) ids -> (B, 1)"""
        h = self.token(x[:, 1:]).transpose(1, 2)  # (B, C, T)
        h = torch.cat([conv(h).relu().amax(2) for conv in self.convs], dim=1)  # (B, 4C)
        return self.head(h)

    def logp(self, x):
        """(B, T+1) ids -> (B, T): f comes with the last token.  Not normalised over x."""
        return self.start.logp(x) + self(x) * is_last(x)


# ---- 5 objectives: pure functions, each with its equation --------------------------------
def likelihood_loss(logp):
    """Maximum likelihood: -sum_t log q(x_t | x_<t), nats per sentence; (B, T) -> scalar."""
    return -logp.sum(1).mean()


def discriminator_loss(logits, is_real, mask):
    """-log D if a sentence is real, -log(1 - D) if it is a sample, D = sigmoid(logit): the
    mean over all prefixes (Goodfellow et al. 2014, eq. 1).  Half of the sentences are real.
    A prefix that begins a share p of the real ones and q of the samples costs -p log D -
    q log(1 - D), which is least at D = p/(p+q): there the logit is log p/q.
    (B, T), (B,) bool, (B, T) -> scalar; ln 2 = 0.693 where D has no opinion."""
    loss = F.softplus(torch.where(is_real[:, None], -logits, logits))  # -log D, -log(1-D)
    return (loss * mask).sum() / mask.sum()


def value(logits, reward="js"):
    """How real a prefix looks to D: what G maximises; any shape -> the same.

    reward  what G maximises    what it minimises; m = (p+q)/2, KL(a || b) = E_a[log a/b]
    js      -log(1 - D)         2 JS(p, q) = KL(p || m) + KL(q || m): Goodfellow's game
    prob    D                   KL(p || m) alone: SeqGAN's choice
    logit   log D - log(1 - D)  KL(q || p): punishes what is wrong, not what is missing

    (Likelihood: KL(p || q), which punishes what is missing.)  The last column is for whole
    sentences and the best D, held still while G takes a step: the gradient of 2 JS is
    sum_x grad q(x) log q/m, and -log(1 - D) is log 2 - log q/m.  (JS: Jensen-Shannon.)"""
    return {"js": F.softplus(logits), "logit": logits, "prob": logits.sigmoid()}[reward]


def token_rewards(logits, mask, reward="js"):
    """r_t = value(x_1..t) - value(x_1..t-1): by how much a token raised the value.  Over a
    sentence the prefixes cancel: its value, less a constant (Ng et al. 1999).  -> (B, T)"""
    before = F.pad(logits[:, :-1], (1, 0))  # of the empty prefix: logit 0, since p = q = 1
    return (value(logits, reward) - value(before, reward)) * mask


def advantages(rewards, mask, lam=1.0):
    """A_t = sum_{k>=t} lam^(k-t) r_k - baseline_t: the rewards from the t-th token on, less
    their mean in the other samples (RLOO, Kool et al. 2019).  A baseline takes away noise
    and, not depending on the sample, leaves G's mean gradient as it is: E_q[grad log q] =
    sum_x q (grad q)/q = grad 1 = 0.  lam < 1: less noise, biased.  (B, T) -> (B, T)."""
    A = rewards * mask  # a copy
    for t in reversed(range(A.shape[1] - 1)):
        A[:, t] += lam * A[:, t + 1]
    others = (A.sum(0) - A) / (mask.sum(0) - 1).clamp(min=1)  # their mean at each place
    return (A - others) * mask


def policy_gradient_loss(logq, advantage):
    """REINFORCE (Williams 1992): -sum_t A_t log q(x_t | x_<t); (B, T) -> scalar.
    The gradient of E_q[R] = sum_x q(x) R(x) is E_q[R grad log q], as grad q = q grad log q:
    a mean over samples.  A_t stands for R: what came before is not the t-th token's doing.
    Only this loss's gradient means something, not its value."""
    return -(advantage * logq).sum(1).mean()


# ---- 6 training: likelihood, and the game ------------------------------------------------
def adamw(module):
    return torch.optim.AdamW(module.parameters(), betas=(0.9, 0.99), fused=True)


def update(module, adam, step, steps, lr):
    """One step of AdamW; its rate rises for 20 steps, then falls along a cosine."""
    lr *= min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
    adam.param_groups[0]["lr"] = lr * min(1, 64 / module.width)  # lower for a wide module
    nn.utils.clip_grad_norm_(module.parameters(), 10.0)
    adam.step()
    adam.zero_grad()


def train_mle(model, data, cfg, steps):
    """Likelihood with early stopping: the model ends as it was at its best validation."""
    adam, nll, best = adamw(model), [], None
    for step in trange(steps + 1, disable=None):
        if step % max(1, steps // 16) == 0 or step == steps:
            nll.append(-in_chunks(model.logp, data.val).sum(1).mean().item())
            if nll[-1] == min(nll):
                best = deepcopy(model.state_dict())
        if step < steps:
            x = trim(batch(data.train, cfg.batch_size))
            likelihood_loss(model.logp(x)).backward()
            update(model, adam, step, steps, cfg.lr)
    model.load_state_dict(best)
    print(f"validation nll: best {min(nll):.2f}, last {nll[-1]:.2f} nats per sequence")
    return {"nll": nll}


def loss_of_d(D, G, real, fake):
    """D's loss on (B, T+1) real sentences and (B, T+1) samples; no gradient reaches G."""
    x = trim(torch.cat([real, fake]))
    is_real = torch.arange(len(x), device=x.device) < len(real)
    logits = discriminator_logits(D.logp(x), in_chunks(G.logp, x))
    mask = is_last(x) if isinstance(D, CNN) else token_mask(x)  # a CNN judges whole ones
    return discriminator_loss(logits, is_real, mask)


def passes_exam(D, G, data):
    """Is D better than chance on held-out sentences and fresh samples?  (In training it may
    know a short text by heart.)  The spread over ten parts gives the mean loss an error."""
    parts = zip(data.val.chunk(10), G.sample(len(data.val)).chunk(10))
    losses = [loss_of_d(D, G, real, fake).item() for real, fake in parts]
    worst = np.mean(losses) + 2 * np.std(losses) / math.sqrt(len(losses))
    says = "G listens" if worst < math.log(2) else "nothing to teach: G stays as it is"
    tqdm.write(f"D's exam: loss {np.mean(losses):.3f}, chance 0.693: {says}")
    return worst < math.log(2)


def train_gan(G, D, data, cfg):
    """The game: D and G take turns.  First D learns alone for some rounds, the head start,
    then has to pass an exam: G must not listen to a D that knows nothing."""
    if cfg.d_mle_steps:
        train_mle(D, data, cfg, cfg.d_mle_steps)
    adam_g, adam_d, d_loss, curves = adamw(G), adamw(D), [], []
    half, rounds = cfg.batch_size // 2, cfg.head_start + cfg.rounds
    for i in trange(rounds, desc="game", disable=None):
        # (1) G samples.  Sorted by length, as chunks of like length need less padding.
        fake = G.sample(cfg.g_samples)
        fake = fake[token_mask(fake).sum(1).argsort()]

        # (2) D learns to tell real sentences from these.
        for _ in range(cfg.d_steps):
            loss = loss_of_d(D, G, batch(data.train, half), batch(fake, half))
            loss.backward()
            update(D, adam_d, i, rounds, cfg.d_lr)  # a rate per round
            d_loss.append(loss.item())
        if i < cfg.head_start:
            continue
        if i == cfg.head_start and not passes_exam(D, G, data):
            break

        # (3) Rewards (n, T): by how much each token raised D's opinion.  D holds still: no
        # gradient passes through its logit, not even through log q.
        logq, mask = in_chunks(G.logp, fake), token_mask(fake)
        logits = discriminator_logits(in_chunks(D.logp, fake), logq)
        rewards = token_rewards(logits, mask, cfg.reward)

        # (4) Advantages (n, T): above 0 where it went better than in the other samples.
        A = advantages(rewards, mask, cfg.lam)

        # (5) G learns: tokens with an advantage become more likely, others less.
        for part, a in zip(fake.split(ROWS), A.split(ROWS)):
            part = trim(part)
            loss = policy_gradient_loss(G.logp(part), a[:, :part.shape[1] - 1])
            (loss * len(part) / len(fake)).backward()  # adds up to the mean over all
        update(G, adam_g, i - cfg.head_start, cfg.rounds, cfg.g_lr)

        curves.append(watch(fake, rewards, d_loss[-cfg.d_steps:], data))
        if len(curves) % max(1, cfg.rounds // 10) == 0:
            tqdm.write(f"round {len(curves)}: {figures(curves[-1])}")
            tqdm.write("\n".join(map(data.mark, lines_of(batch(fake, 2), data.symbols))))
    return {"d_loss": d_loss, "curves": curves}


def watch(fake, rewards, d_loss, data):
    point = {"d_loss": float(np.mean(d_loss or 0)), "reward": rewards.sum(1).mean().item(),
             "tokens": token_mask(fake).sum(1).mean().item()}
    if data.grammar:
        logp = data.logp(lines_of(batch(fake, 50), data.symbols))
        point["valid"] = float(np.mean(logp > -math.inf))
    return point


# ---- 7 measurement -----------------------------------------------------------------------
def js_terms(logp_p, logq_p, logp_q, logq_q):
    """The Jensen-Shannon divergence in bits (Lin 1991), 0: the same, 1: nothing in common.
    JS = (E_p[log2 p/m] + E_q[log2 q/m]) / 2, m = (p+q)/2.  logq_p (N,): log q of sentences
    drawn from p, and so on -> (N,), (M,): JS is the mean of their two means."""
    return (1 - np.logaddexp(0, logq_p - logp_p) / math.log(2),  # log2 p/m
            1 - np.logaddexp(0, logp_q - logq_q) / math.log(2))  # log2 q/m


def judge_terms(model, real, fake, truth, samples):
    """For a text without a grammar: a new CNN learns to tell `real` from `fake`, (N, T+1)
    ids each.  Is it right about `truth` and `samples`, which are new to it?  Two arrays of
    1 and 0; the mean of their means is its accuracy, 0.5 if it is fooled."""
    cnn = CNN(model, 32).to(real.device)  # only its f(x) is used
    adam, is_real = adamw(cnn), (torch.arange(128) < 64).to(real.device)
    for step in range(300):
        logits = cnn(trim(torch.cat([batch(real, 64), batch(fake, 64)])))
        discriminator_loss(logits, is_real, torch.ones_like(logits)).backward()
        update(cnn, adam, step, 300, lr=4e-3)
    return [(in_chunks(cnn, x)[:, 0] > 0).eq(wanted).cpu().double().numpy()  # column 0: f
            for x, wanted in ((truth, True), (samples, False))]


def figures(row):
    return ", ".join(f"{name} {figure:.3f}" for name, figure in row.items())


def half_interval(*terms):
    """The +- (95 %) of (mean of the first term + mean of the second + ...) / 2"""
    return 1.96 * math.sqrt(sum(term.var() / len(term) for term in terms)) / 2


def measure(model, decoding, half, data, cfg):
    """A model at a decoding, against one half of the true sentences, 0 or 1 -> its figures
    (score: JS, or the judge's accuracy; less is better), the score's terms, the samples."""
    truth = data.truth[half::2]
    x = model.sample(cfg.eval_samples // (2 - half), *decoding)  # half as many to choose by
    lines = lines_of(x, data.symbols)
    logq, logq_truth = (in_chunks(model.logp, ids, *decoding).sum(1).cpu().double().numpy()
                        for ids in (x, truth))
    if data.grammar:
        logp, logp_truth = data.logp(lines), data.truth_logp[half::2]
        terms = js_terms(logp_truth, logq_truth, logp, logq)
        row = {"valid": np.mean(logp > -math.inf), "kl": np.mean(logp_truth - logq_truth)}
    else:
        terms = judge_terms(model, data.train, x[::2], truth, x[1::2])
        row = {"nll": -logq_truth.mean()}
    novel = np.mean([line not in data.seen for line in lines])
    return {"score": np.mean([t.mean() for t in terms]), "error": half_interval(*terms),
            "temperature": decoding[0], "min_p": decoding[1], **row, "novel": novel,
            "distinct": len(set(lines)) / len(lines)}, terms, lines


# ---- 8 the answer ------------------------------------------------------------------------
def compare(models, data, cfg):
    """Measure all.  A model's best decoding is chosen on half of the true sentences; on the
    other half it is reported, and so is plain sampling: temperature 1, no truncation."""
    results, terms = {}, {}
    for name, model in models.items():
        torch.manual_seed(cfg.seed)
        rows = [measure(model, decoding, 0, data, cfg)[0]
                for decoding in tqdm(DECODINGS, f"measure {name}", disable=None)]
        chosen = DECODINGS[np.argmin([row["score"] for row in rows])]
        plain, _, lines = measure(model, (1.0, 0.0), 1, data, cfg)
        best, terms[name], _ = measure(model, chosen, 1, data, cfg)
        results[name] = {"plain": plain, "best": best, "all": rows}
        print(f"\n{name} plain: {figures(plain)}\n{name} best:  {figures(best)}")
        print(*map(data.mark, lines[:5]), sep="\n", flush=True)
    return results, verdict(results, terms)


def verdict(results, terms):
    """Does `gan` beat G by likelihood alone, each at its best decoding?  Terms [0], of the
    same true sentences, are paired; terms [1], of each model's own samples, are not."""
    score = {name: result["best"]["score"] for name, result in results.items()}
    rival = min("mle", "continued", key=score.get)
    gan, other, gain = terms["gan"], terms[rival], score[rival] - score["gan"]
    error = max(0.002, half_interval(other[0] - gan[0], other[1], gan[1]))  # less: a tie
    says = "wins" if gain > error else "LOSES" if gain < -error else "does NOT win"
    return (f"Best scores: gan {score['gan']:.3f}, {rival} {score[rival]:.3f}, difference "
            f"{gain:.3f}\u00b1{error:.3f}: the game {says} on this seed.")


def draw(curves, path):
    os.environ["MPLBACKEND"] = "agg"  # a notebook's may be missing, and a file needs none
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 8), layout="constrained")
    for axis, name in zip(figure.subplots(len(curves[0])), curves[0]):
        axis.plot([point[name] for point in curves])
        axis.set(xlabel="rounds in which D and G learn", ylabel=name)
    figure.savefig(path, dpi=150)


# ---- 9 the run ---------------------------------------------------------------------------
MAY_CHANGE = ["data", "grammar", "threads", "device", "out", "sample", *FOR_SAMPLES]


def claim(cfg, text):
    """--out is for one run: the same text, and the same flags but for MAY_CHANGE."""
    folder, file = Path(cfg.out), Path(cfg.out, "config.json")
    run = {name: x for name, x in asdict(cfg).items() if name not in MAY_CHANGE}
    run = json.dumps(run | {"checksum of the text": zlib.crc32(text.encode())}, indent=1)
    taken = folder.is_file() or set(folder.glob("*")) - {file}
    if taken and not (file.exists() and file.read_text() == run):
        fail(f"--out {folder}: holds something other than this run; use a new folder")
    if cfg.sample and not Path(folder, "continued.pt").exists():  # the last phase
        fail(f"argument --sample: --out {folder}: expected the folder of a finished run")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(run)


def phase(name, models, train, data, cfg, *steps):
    """Train the models, or load them if an earlier call has.  Returns train()'s record."""
    file = Path(cfg.out, f"{name}.pt")
    if not file.exists():
        torch.manual_seed(zlib.crc32(f"{name} {cfg.seed}".encode()))  # whatever ran before
        start = time.monotonic()
        record = train(*models, data, cfg, *steps)
        record["seconds"] = time.monotonic() - start
        print(f"{name}: {record['seconds']:.0f} seconds", flush=True)
        torch.save([record, *(m.state_dict() for m in models)], file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)  # whole, or not at all
    record, *states = torch.load(file, cfg.device, weights_only=True)  # data, no code
    for model, state in zip(models, states):
        model.load_state_dict(state)
    return record


def print_samples(model, data, cfg):
    prompt = tokens_of(cfg.prompt, cfg.level)
    if not set(prompt) <= set(data.symbols) or len(prompt) >= data.context:
        fail(f"argument --prompt: expected fewer than {data.context} tokens, of the text's")
    ids = [data.symbols.index(token) for token in prompt]
    x = model.sample(cfg.sample, cfg.temperature, cfg.min_p, ids)
    print(*lines_of(x, data.symbols), sep="\n")


def main(argv=None):
    cfg = parse_flags(argv)
    torch.set_num_threads(cfg.threads)
    text = read(cfg.data or cfg.grammar)
    claim(cfg, text)
    data = Data(text, cfg)
    V, T = len(data.symbols), data.context

    torch.manual_seed(cfg.seed)
    mle = GPT(V, T, cfg.layers, cfg.width, cfg.window).to(cfg.device)
    phases = {"mle": phase("mle", [mle], train_mle, data, cfg, cfg.mle_steps)}
    gan, continued, steps = deepcopy(mle), deepcopy(mle), cfg.continued_steps

    torch.manual_seed(cfg.seed)
    D = CNN(mle, cfg.d_width) if cfg.disc == "cnn" else GPT(V, T, cfg.layers, cfg.d_width)
    phases["gan"] = phase("gan", [gan, D.to(cfg.device)], train_gan, data, cfg)

    # The control: more likelihood, by default for about the game's time
    phases["continued"] = phase("continued", [continued], train_mle, data, cfg, steps)

    models = {"mle": mle, "continued": continued, "gan": gan}
    models |= {"d": D} if cfg.disc == "gpt" else {}  # D can sample too, but is no rival
    if cfg.sample:
        return print_samples(models[cfg.model], data, cfg)
    results, says = compare(models, data, cfg)
    report = {"config": asdict(cfg), "phases": phases, "models": results, "verdict": says}
    Path(cfg.out, "report.json").write_text(json.dumps(report).replace("Infinity", "null"))
    if phases["gan"]["curves"] and importlib.util.find_spec("matplotlib"):  # optional
        draw(phases["gan"]["curves"], Path(cfg.out, "report.png"))
    print("\n" + says)


if __name__ == "__main__" and "__file__" in globals():  # not if pasted into a notebook
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack a letter
    main()
