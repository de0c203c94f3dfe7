"""Do GANs help language models?  One file that answers by measurement.

A small GPT is trained by likelihood: on a large messy text (`mle`), then on a curated one (`sft`).
Then comes a GAN: a discriminator D learns to tell curated sentences from the model's own, and
policy gradient (write, be judged, make more likely what was judged well) moves the model to where D
cannot (`gan`).  The cheap rivals: a lower temperature, a cut of unlikely tokens (min-p), the same
time in more likelihood (`continued`), a choice among samples of `sft` by the same D (`reranked`).

Deleted from SeqGAN (Yu et al. 2017): Monte-Carlo rollouts, which finish a prefix many times to
judge it: our D judges every prefix.  Added: D reads what the model thought, and an anchor, the KL
to the model that D was trained against.  With D frozen this is RLHF, D the reward model.

    python gan_lm.py                     # tiny_data/: a grammar knows the exact p of any sentence
    python gan_lm.py --data your.txt     # any text, one sequence a line: a fresh D is the judge

Shapes: B batch, T time, C channels, V vocabulary.  p is the truth, q the model.
"""
import argparse, json, math, random, re, sys, time, zlib  # noqa: E401
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

TINY = Path(__file__).resolve().parent / "tiny_data"
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
END = 0  # one token begins, ends and pads a sequence
AT_ONCE = 2**23  # numbers computed at a time (rows x tokens x numbers a token): bounds memory


# ---- 1 configuration: each field is a flag of the same name --------------------------------------
def flag(default, text, low=None, high=None, **how):  # a field that is a flag, from low to high
    return field(default=default, metadata={"range": (low, high), "how": {"help": text, **how}})


@dataclass
class Config:
    """Everything that a run depends on.  None: chosen by sized_to_text()."""
    data: str = flag("mistakes", "text: a file, or mistakes, noise, clean")
    curated: str = flag("", "text to sharpen towards (none: --data, or tiny_data/curated.txt)")
    grammar: str = flag("", "grammar of --curated (none: none, or tiny_data/grammar.txt)")
    level: str = flag("word", "what a token is", choices=["word", "char"])
    out: str = flag("out", "folder for <phase>.pt, samples_<arm>.txt and report.json")
    resume: bool = flag(False, "go on with the run in --out", action="store_true")
    seed: int = flag(0, "same seed, same machine: same numbers", 0, 10**6)
    device: str = flag(DEVICES[0], "where to compute", choices=DEVICES)
    layers: int = flag(2, "layers of the GPT", 1, 100)
    width: int = flag(64, "channels of the GPT, a multiple of 32: a head has 32", 32, 4096)
    context: int = flag(64, "longest sequence in tokens, the rest of a line is cut", 1, 4096)
    batch_size: int = flag(64, "sequences per step of likelihood, and of D", 2, 10**6)
    pretrain_steps: int = flag(None, "likelihood steps on --data; None: fitted to it", 0, 10**9)
    sft_steps: int = flag(None, "likelihood steps on --curated", 0, 10**9)
    lr: float = flag(4e-3, "peak learning rate of likelihood, less on --curated", 0, 1)
    rounds: int = flag(1, "turns of both networks; 0: no GAN, `gan` is `sft`", 0, 100)
    disc: str = flag("lm", "D is a language model, or SeqGAN's CNN", choices=["lm", "cnn"])
    d_steps: int = flag(None, "discriminator steps per round", 1, 10**9)
    g_steps: int = flag(None, "policy-gradient steps per round", 1, 10**9)
    g_samples: int = flag(1024, "samples of the model per policy-gradient step", 2, 10**6)
    gan_lr: float = flag(3e-3, "peak learning rate of both, times 64 / width", 0, 1)
    kl_coef: float = flag(1.0, "weight of the anchor; 1 makes the truth the optimum", 0, 1000)
    lam: float = flag(0.5, "a token's share of the reward k tokens later is lam^k", 0, 1)
    temperatures: tuple = flag(None, "that are measured, first the plain one", 0.01, 100, nargs="+")
    min_ps: tuple = flag(None, "cuts of tokens below that share of the likeliest", 0, 1, nargs="+")
    eval_samples: int = flag(4000, "samples per side of each figure", 10, 10**6)


def fail(message):
    print(f"gan_lm.py: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def parse_flags(argv=None):
    """Command line -> Config.  A mistake ends the program with one line that names the flag."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    for f in fields(Config):
        kind = {} if f.type is bool else {"type": float if f.type is tuple else f.type}
        parser.add_argument("--" + f.name, default=f.default, **kind, **f.metadata["how"])
    cfg = Config(**vars(parser.parse_args(argv)))
    for f in fields(Config):
        value, (low, high) = getattr(cfg, f.name), f.metadata["range"]
        for number in value if isinstance(value, list) else [value]:
            if None not in (low, number) and not low <= number <= high:
                fail(f"argument --{f.name}: {number}: expected {low} to {high}")
    if cfg.width % 32:
        fail(f"argument --width: {cfg.width}: expected a multiple of 32")
    return cfg


# ---- 2 text: lines <-> (N, T+1) token ids --------------------------------------------------------
def read(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        fail(f"{path}: expected a UTF-8 text file ({error})")


def tokens_of(line, level):
    """A word carries the space before it, so that joining the tokens gives the line back."""
    return list(line) if level == "char" else re.findall(r" ?[\w'-]+| ?\S", " " + line)


class Data:
    """Both texts as ids, dicts of train, val and test; truth: sentences of the grammar, or test."""
    def __init__(self, cfg):
        self.cfg, self.grammar = cfg, None
        messy, curated, grammar = cfg.data, cfg.curated or cfg.data, cfg.grammar
        if cfg.data in ("mistakes", "noise", "clean"):
            messy = TINY / f"{cfg.data}.txt"
            curated, grammar = cfg.curated or TINY / "curated.txt", grammar or TINY / "grammar.txt"
        texts = [self.split(path) for path in dict.fromkeys((messy, curated))]
        lines = [line for text in texts for part in text.values() for line in part]
        self.seen = {line for text in texts for line in text["train"]}
        self.words = {word for line in lines for word in line.split()}
        if grammar:
            from tiny_data.language import Grammar  # the only use of that folder's code
            self.grammar = Grammar(read(grammar), grammar, known=self.words)
            lines += self.grammar.words
            rng = random.Random(cfg.seed + 10**6)
            truth = [self.grammar.sample(rng) for _ in range(cfg.eval_samples)]
            if max(len(tokens_of(line, cfg.level)) for line in truth) > cfg.context:
                fail(f"--context {cfg.context}: true sentences are longer; expected more")
            self.truth_logp = np.array([self.grammar.logp(line) for line in truth])
        self.symbols = ["", *sorted({t for line in lines for t in tokens_of(line, cfg.level)})]
        self.id_of = {symbol: i for i, symbol in enumerate(self.symbols)}  # END is 0
        if len(self.symbols) > 20000:
            fail(f"--level {cfg.level}: over 20000 different tokens; expected less text, or char")
        self.texts = [{part: self.to_ids(lines) for part, lines in text.items()} for text in texts]
        self.messy, self.curated = self.texts[0], self.texts[-1]
        self.truth = self.to_ids(truth) if grammar else self.curated["test"]

    def split(self, path):
        """A held-out line may stand in train as well, as often as the language repeats itself."""
        lines = [" ".join(line.split()) for line in read(path).split("\n") if line.split()]
        n, different = len(lines) // 10, len(set(lines))
        if different < 50 or len(lines) < 80:
            fail(f"{path}: {len(lines)} lines, {different} different; expected 80, 50 different")
        random.Random(self.cfg.seed).shuffle(lines)
        return {"test": lines[:n][:5000], "val": lines[n:2 * n][:2000], "train": lines[2 * n:]}

    def to_ids(self, lines):
        """N lines -> (N, T+1) ids: each row END, the tokens, END ... END; longer lines are cut."""
        T = self.cfg.context
        x = np.full((len(lines), T + 1), END, np.int16)  # a text is large; trim() makes it 64 bits
        for row, line in zip(x, lines):
            ids = [self.id_of[t] for t in tokens_of(line, self.cfg.level)[:T]]
            row[1:1 + len(ids)] = ids
        return torch.from_numpy(x).to(self.cfg.device)

    def to_lines(self, x):  # (N, T+1) ids -> N lines
        return ["".join(self.symbols[i] for i in row).strip() for row in x.tolist()]


def real_tokens(x):
    """(B, T+1) ids -> (B, T) mask of the tokens that count: the text and its END, if not cut.

    x[:, :-1]        END  the  dog  runs  .    END  END    what the model reads
    x[:, 1:]         the  dog  runs  .    END  END  END    what it should say next
    real_tokens(x)    1    1    1    1    1    0    0"""
    return torch.cat([torch.ones_like(x[:, :1]), x[:, 1:-1].ne(END)], 1).float()


def trim(x):
    """Without the columns in which no row has a real token."""
    return x[:, :int(real_tokens(x).sum(1).max()) + 1].long()


def batches(x, size):
    """Endless shuffled batches of row numbers, each of rows of like length: little padding."""
    while True:
        for rows in torch.randperm(len(x), device=x.device).split(16 * size):
            rows = rows[:max(1, len(rows) // size) * size]  # a short rest waits for next time
            sets = rows[real_tokens(x[rows]).sum(1).argsort()].split(size)
            for i in torch.randperm(len(sets)):
                yield sets[i]


# ---- 3 generator: a GPT --------------------------------------------------------------------------
class Block(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x, past=None):  # (B, T, C); past: keys and values of the tokens before
        B, T, C = x.shape
        qkv = self.qkv(self.ln1(x)).view(B, T, 3, C // 32, 32)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, 32) each
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.ln2(x)), (k, v)


class GPT(nn.Module):
    """Pre-norm transformer (Radford et al. 2019); its head is its token embedding, transposed."""
    def __init__(self, V, context, layers, C):
        super().__init__()
        self.shape = V, context, layers, C
        self.token = nn.Embedding(V, C)
        self.position = nn.Embedding(context + 1, C)
        self.blocks = nn.ModuleList(Block(C) for _ in range(layers))
        self.ln = nn.LayerNorm(C)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def embed(self, x, start=0):  # (B, T) ids -> (B, T, C)
        return self.token(x) + self.position.weight[start:start + x.shape[1]]

    def trunk(self, h, cache=None):  # (B, T, C) -> (B, T, C), and the cache for the tokens to come
        new_cache = []
        for i, block in enumerate(self.blocks):
            h, keys_and_values = block(h, cache[i] if cache else None)
            new_cache.append(keys_and_values)
        return self.ln(h), new_cache

    def forward(self, x):  # (B, T) ids -> (B, T, V) logits of the token after each
        return self.trunk(self.embed(x))[0] @ self.token.weight.T


def decoded(logits, temperature=1.0, min_p=0.0):
    """log q of every next token, (..., V) logits -> (..., V), at a temperature and after the cut of
    min-p (Nguyen et al. 2024): tokens below min_p times the likeliest's probability get 0."""
    logp = (logits / temperature).log_softmax(-1)
    if min_p > 0:
        too_rare = logp < logp.amax(-1, keepdim=True) + math.log(min_p)
        logp = logp.masked_fill(too_rare, -math.inf).log_softmax(-1)
    return logp


def token_logp(model, x, temperature=1.0, min_p=0.0):
    """log q(x_t | x_<t) in nats: (B, T+1) ids -> (B, T), 0 after the end."""
    logp = decoded(model(x[:, :-1]), temperature, min_p).gather(-1, x[:, 1:, None])[..., 0]
    return logp.masked_fill(real_tokens(x) == 0, 0.0)


def by_length(x, size):
    """(N, T+1) ids -> lists of row numbers, each of rows of like length and not too many."""
    return real_tokens(x).sum(1).argsort().split(max(1, min(128, AT_ONCE // (size * x.shape[1]))))


@torch.no_grad()
def in_chunks(f, x, *hints, size=256, shape=()):
    """f(x, *hints), (N, T+1) ids -> (N, T, *shape), few rows at a time; size: numbers a token."""
    out = torch.zeros(len(x), x.shape[1] - 1, *shape, device=x.device)
    for rows in by_length(x, size):
        part = trim(x[rows])
        T = part.shape[1] - 1
        out[rows, :T] = f(part, *(h[rows, :T] for h in hints)).float()
    return out


def sequence_logp(model, x, *decoding):
    """Exact log q(x) of whole sequences, (N, T+1) ids -> (N,); decoding: temperature, min_p."""
    return in_chunks(lambda part: token_logp(model, part, *decoding), x, size=model.shape[0]).sum(1)


@torch.no_grad()
def sample(model, n, temperature=1.0, min_p=0.0):
    """n sequences -> (n, T+1) ids, and (n, T) the log q of each token that was drawn."""
    V, T = model.shape[:2]
    out = torch.full((n, T + 1), END, device=model.token.weight.device)
    logq = torch.zeros(n, T, device=out.device)
    for rows in torch.arange(n, device=out.device).split(max(1, AT_ONCE // (64 * T + 8 * V))):
        x, cache = out[rows, :1], None
        for t in range(T):
            h, cache = model.trunk(model.embed(x, start=t), cache)
            logp = decoded(h[:, -1] @ model.token.weight.T, temperature, min_p)  # (rows, V)
            total = logp.exp().cumsum(-1)  # a draw: where in it a uniform number falls
            x = torch.searchsorted(total, total[:, -1:] * torch.rand_like(total[:, :1]), right=True)
            out[rows, t + 1], logq[rows, t] = x[:, 0], logp.gather(1, x)[:, 0]
            going = x[:, 0].ne(END).nonzero()[:, 0]  # here alone the host waits for a GPU
            if len(going) == 0:
                break
            rows, x = rows[going], x[going]  # a finished row leaves the batch
            cache = [(k[going], v[going]) for k, v in cache]
    return out, logq


# ---- 4 discriminators: (B, T+1) ids, (B, T, 2) hints -> (B, T) logits, one for each x_1..x_t -----
def hints_of(ref, x):
    """What the frozen generator thought: (N, T+1) ids -> (N, T, 2): how far log q_ref(x_t | x_<t)
    is above its mean; that mean (-entropy).  With plain log q_ref D starts later, if at all."""
    def both(part):
        logq = ref(part[:, :-1]).log_softmax(-1)
        mean = (logq.exp() * logq).sum(-1)
        above = logq.gather(-1, part[:, 1:, None])[..., 0] - mean
        return torch.stack([above, mean], -1) * real_tokens(part)[..., None]
    return in_chunks(both, x, size=ref.shape[0], shape=(2,))


class PrefixDiscriminator(nn.Module):
    """A language model with a verdict for a head: logit_t estimates log(p/q_ref) of x_1..t.  It is
    a copy of a generator and reads the hints: what is left to learn is where q_ref is wrong."""
    def __init__(self, generator):
        super().__init__()
        C = generator.shape[-1]
        self.lm, self.hints, self.head = deepcopy(generator), nn.Linear(2, C), nn.Linear(C, 1)

    def forward(self, x, hints):
        h = self.lm.embed(x) + F.pad(self.hints(hints / 3), (0, 0, 1, 0))  # /3: to be about 1
        return self.head(self.lm.trunk(h)[0])[:, 1:, 0]


class CNNDiscriminator(nn.Module):
    """Kim (2014), as in SeqGAN: one verdict, at the last token, 0 before; it ignores the hints."""
    def __init__(self, generator):
        super().__init__()
        V, _, _, C = generator.shape
        self.token = nn.Embedding(V, C, padding_idx=END)  # 0 for END: what pads says nothing
        self.convolutions = nn.ModuleList(nn.Conv1d(C, C, w, padding=w) for w in (2, 3, 4, 5))
        self.head = nn.Linear(4 * C, 1)

    def forward(self, x, hints):
        h = self.token(x[:, 1:]).transpose(1, 2)  # (B, C, T)
        h = torch.cat([conv(h).relu().amax(2) for conv in self.convolutions], 1)  # (B, 4C)
        return self.head(h) * F.one_hot(real_tokens(x).sum(1).long() - 1, x.shape[1] - 1)


# ---- 5 objectives: pure functions, each with its equation ----------------------------------------
# D learns log p/q of every prefix (discriminator_loss).  A token's reward is by how much it raised
# that (token_rewards); its advantage, how much better than usual things went from there on
# (advantages).  A draw has no gradient, so none flows back through D: the model makes each token
# that it drew more likely in proportion to its advantage (policy_gradient_loss).
def likelihood_loss(logp):
    """MLE: -sum_t log q(x_t | x_<t), nats a sequence; (B, T) -> scalar."""
    return -logp.sum(1).mean()  # not the mean over tokens: it would favour batches of short rows


def discriminator_loss(logits, is_real, mask):
    """-log D(real) - log(1 - D(fake)) of each prefix, D = sigmoid(logit) (Goodfellow et al. 2014,
    eq. 1).  Half of what D reads is real, so the best D is p/(p+q) and its logit is log p/q.
    (B, T), (B,) bool, (B, T) -> scalar."""
    loss = F.softplus(torch.where(is_real[:, None], -logits, logits))
    return (loss * mask).sum() / mask.sum()  # as lengths are alike, a sentence counts, not a token


def token_rewards(logits, mask):
    """r_t = logit(x_1..t) - logit(x_1..t-1): by how much a token raised what D takes for log p/q,
    0 for the empty prefix.  (B, T) -> (B, T)."""
    return (logits - F.pad(logits[:, :-1], (1, 0))) * mask


def advantages(rewards, logp, logp_ref, mask, kl_coef=1.0, lam=1.0):
    """A_t = sum_{k>=t} lam^(k-t) (r_k - kl_coef log [q/q_ref](x_k|x_<k)) - baseline_t.
    With kl_coef 1 and lam 1 the expected sum is -KL(q || q_ref D/(1-D)), highest at q = q_ref
    D/(1-D), which is p if D is optimal.  Then p is the optimum for any lam; less lam, less noise.
    The baseline is the batch mean at each position.  No division by the deviation: with D at chance
    it would blow noise up to full-size steps.  (B, T) each -> (B, T), data: without gradient."""
    A = (rewards - kl_coef * (logp - logp_ref)).detach() * mask
    for t in reversed(range(A.shape[1] - 1)):
        A[:, t] += lam * A[:, t + 1]
    baseline = A.sum(0) / mask.sum(0).clamp(min=1)
    return (A - baseline) * mask


def policy_gradient_loss(logp, advantage):
    """REINFORCE (Williams 1992): -sum_t A_t log q(x_t | x_<t), (B, T) -> scalar.  As grad E_q[R] is
    E_q[R grad log q], its gradient is that of minus the expected return; its value is no score."""
    return -(advantage * logp).sum(1).mean()


# ---- 6 training ----------------------------------------------------------------------------------
def update(model, adam, step, steps, peak):
    """One step of AdamW along the gradients that were added up; none where one is not finite.
    The learning rate rises to `peak` in 20 steps and falls to 0 along a cosine."""
    rise = min(1, (step + 1) / 20)
    fall = (1 + math.cos(math.pi * step / steps)) / 2
    adam.param_groups[0]["lr"] = peak * rise * fall
    if nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
        adam.step()
    adam.zero_grad()


def fit(model, x, loss_of, score, held_out, steps, lr, cfg):
    """Descend loss_of(rows of x); ends at the least held_out()[score] of the start and 16 looks."""
    adam = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), fused=True)
    best, best_state = held_out(), deepcopy(model.state_dict())
    for step, rows in zip(tqdm(range(steps), score, disable=None), batches(x, cfg.batch_size)):
        loss_of(rows).backward()
        update(model, adam, step, steps, lr)
        if (step + 1) % max(10, math.ceil(steps / 16)) == 0 or step + 1 == steps:
            figures = held_out()
            if figures[score] <= best[score]:
                best, best_state = figures, deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    return best


def train_likelihood(model, text, steps, lr, cfg):
    """MLE on text["train"], stopped early on text["val"]."""
    def loss(rows):
        logp = token_logp(model, trim(text["train"][rows]))
        return likelihood_loss(logp) / 10  # so that clipping at 1 is rare; Adam ignores the scale

    def held_out():
        return {"val_nll": -sequence_logp(model, text["val"]).mean().item()}

    return fit(model, text["train"], loss, "val_nll", held_out, steps, lr, cfg)


def verdict(disc, x, hints):
    """D's logit on whole sentences, the one at the last token: (N, T+1) ids -> (N,)."""
    last = real_tokens(x).sum(1, keepdim=True).long() - 1
    return in_chunks(disc, x, hints).gather(1, last)[:, 0]


def judged(real, fake):
    """D's verdicts on held-out sentences, (N,) and (M,) -> its loss (ln 2: no signal), the standard
    error of that, and its accuracy.  1 - loss / ln 2 is the JS, in bits, that D has found."""
    middle = (real.mean() + fake.mean()) / 2  # a constant changes no advantage: forgiven
    loss_r, loss_f = F.softplus(middle - real), F.softplus(fake - middle)
    error = (loss_r.var() / len(real) + loss_f.var() / len(fake)).sqrt() / 2
    right = ((real > middle).float().mean() + (fake <= middle).float().mean()) / 2
    return {"d_loss": (loss_r.mean() + loss_f.mean()).item() / 2, "d_loss_se": error.item(),
            "d_acc": right.item()}


def train_discriminator(disc, ref, real, fake, steps, cfg):
    """The same loop, another loss: tell real from fake sentences, stopped early on held-out ones.
    `real`, `fake`: dicts of train and val ids; `ref`: the generator whose hints D reads."""
    turn = torch.arange(max(len(real["train"]), len(fake["train"])))  # the smaller is repeated
    # Joined before batches() sorts by length: a batch then has reals and fakes of like length.
    x = torch.cat([text["train"][turn % len(text["train"])] for text in (real, fake)])
    is_real = torch.arange(len(x), device=cfg.device) < len(turn)
    hints = hints_of(ref, x)
    held = [(text["val"], hints_of(ref, text["val"])) for text in (real, fake)]

    def loss(rows):
        part = trim(x[rows])
        logits = disc(part, hints[rows, :part.shape[1] - 1])
        return discriminator_loss(logits, is_real[rows], real_tokens(part))

    def held_out():
        return judged(*(verdict(disc, *text) for text in held))

    return fit(disc, x, loss, "d_loss", held_out, steps, cfg.gan_lr * 64 / cfg.width, cfg)


def teach(disc, ref, data, steps, cfg):
    """D learns to tell curated text from what `ref` writes."""
    n = cfg.batch_size * steps // 2  # half of what D will read
    fake = {"train": sample(ref, n)[0].short(), "val": sample(ref, 2000)[0]}
    real = {"train": data.curated["train"][:n], "val": data.curated["val"]}
    return train_discriminator(disc, ref, real, fake, steps, cfg)


def train_generator(model, ref, disc, cfg):
    """The loop once more, on the model's own samples: reinforcement learning in six steps."""
    adam = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), fused=True)
    stats = []
    for step in tqdm(range(cfg.g_steps), "generator", disable=None):
        x, logp = sample(model, cfg.g_samples)  # 1 the model writes
        mask = real_tokens(x)
        hints = hints_of(ref, x)  # 2 the reference reads it
        logp_ref = hints.sum(-1)  # (log q_ref - its mean) + that mean
        rewards = token_rewards(in_chunks(disc, x, hints), mask)  # 3 D reads both
        A = advantages(rewards, logp, logp_ref, mask, cfg.kl_coef, cfg.lam)  # 4 better than usual?
        for rows in by_length(x, ref.shape[0]):  # 5 make better tokens more likely
            part = trim(x[rows])
            new_logp = token_logp(model, part)  # logp again, now with a gradient
            loss = policy_gradient_loss(new_logp, A[rows, :part.shape[1] - 1])
            (loss / 10 * len(rows) / len(x)).backward()  # / 10 as in train_likelihood()
        stats.append(torch.stack([rewards, logp - logp_ref, -logp, mask]).sum(2).mean(1))
        update(model, adam, step, cfg.g_steps, cfg.gan_lr * 64 / cfg.width)  # 6 a step
    ends = [torch.stack(part).mean(0) for part in (stats[:10], stats[-10:])]  # first, last
    return dict(zip(("reward", "kl_to_ref", "entropy", "tokens"), torch.stack(ends, 1).tolist()))


def why_undone(before, after, data, old, new):
    """Why a round is not kept, or "".  A GAN is for being told apart less: the next D must not find
    more on held-out text than the old one did, and likelihood and variety must not collapse."""
    if math.log(2) - old["d_loss"] < 2 * old["d_loss_se"] + 0.001:  # + 0.001: fit() took the least
        return "the discriminator was at chance"
    torch.manual_seed(0)  # the same decision after --resume
    nll, nll_before = (-sequence_logp(m, data.curated["val"]).mean() for m in (after, before))
    unique, unique_before = (len(sample(m, 1000)[0].unique(dim=0)) for m in (after, before))
    if nll > 1.05 * nll_before or unique < 0.9 * unique_before:
        return "held-out likelihood or the variety of the samples collapsed"
    return "the next discriminator finds more" if new["d_loss"] < old["d_loss"] else ""


# ---- 7 measurement -------------------------------------------------------------------------------
def divergences(logp_p, logq_p, logp_q, logq_q, weight=1.0):
    """From exact log p and log q on samples of p and of q: KL = E_p log p/q, nats, and the Jensen-
    Shannon divergence (E_p log2 p/m + E_q log2 q/m) / 2, m = (p+q)/2, bits (Lin 1991); standard
    errors.  `weight`: how much each sample of q counts, 1 on average; terms: what JS averages."""
    with np.errstate(invalid="ignore"):  # a cut can make q 0, and KL infinite
        kl = logp_p - logq_p
        kl_se = kl.std() / math.sqrt(len(kl))
    js_p = 1 - np.logaddexp(0, -kl) / math.log(2)
    js_q = weight * (1 - np.logaddexp(0, logp_q - logq_q) / math.log(2))
    js_q = js_q - (weight - 1) * js_q.mean()  # same mean; adds to js_se the error of Z, estimated
    js_se = math.sqrt(js_p.var() / len(js_p) + js_q.var() / len(js_q)) / 2
    return {"kl": kl.mean(), "kl_se": kl_se, "js": (js_p.mean() + js_q.mean()) / 2, "js_se": js_se,
            "terms": (js_p, js_q)}


def measure(model, first, decoding, data, cfg, disc=None):
    """A row of the report for `model` at (temperature, min_p), and its samples as lines.  With
    `disc` they are re-ranked: of four times as many some are drawn by the weight w = D/(1-D).  JS
    and KL are those of a large pool: q w / Z (Deng et al. 2020), Z the mean of w."""
    n = cfg.eval_samples
    x, logq = sample(model, 4 * n if disc else n, *decoding)
    logq, logq_real = logq.sum(1), sequence_logp(model, data.truth, *decoding)
    drawn, weight = torch.arange(n), torch.ones(n)
    if disc:
        log_w, log_w_real = (verdict(disc, text, hints_of(model, text)) for text in (x, data.truth))
        log_z = log_w.logsumexp(0) - math.log(len(x))
        logq, logq_real = logq + log_w - log_z, logq_real + log_w_real - log_z
        drawn, weight = log_w.softmax(0).multinomial(n).cpu(), (log_w - log_z).exp()
    lines = data.to_lines(x)
    kept = [lines[i] for i in drawn]
    row = {"temperature": decoding[0], "min_p": decoding[1], "unique": len(set(kept)) / n,
           "novel": np.mean([line not in data.seen for line in kept])}
    if data.grammar:
        logp = np.array([data.grammar.logp(line) for line in lines])
        logq, logq_real, weight = (v.cpu().double().numpy() for v in (logq, logq_real, weight))
        row |= {"valid": np.isfinite(logp[drawn]).mean(),
                **divergences(data.truth_logp, logq_real, logp, logq, weight)}
    else:
        known = [word in data.words for line in kept for word in line.split()]
        row |= {"words": np.mean(known or [0.0]), "nll": -logq_real.mean().item(),
                **fresh_judge(model, first, x[drawn.to(x.device)], data, cfg)}
    return row, kept


def fresh_judge(model, first, x, data, cfg):
    """The accuracy of a D trained anew, 0.5: fooled; for all arms a copy of `first`, to be fair."""
    n = len(x) // 4
    fake, judge = {"train": x[2 * n:].short(), "val": x[n:2 * n]}, PrefixDiscriminator(first)
    real = {**data.curated, "train": data.curated["train"][:4 * n]}
    train_discriminator(judge.to(cfg.device), model, real, fake, min(500, cfg.d_steps), cfg)
    sides = data.curated["test"], x[:n]
    accuracy = judged(*(verdict(judge, side, hints_of(model, side)) for side in sides))["d_acc"]
    return {"judge_acc": max(0.5, accuracy),  # less than 0.5 is noise
            "judge_acc_se": math.sqrt(sum(1 / len(side) for side in sides)) / 4}


def show_report(rows):
    """One line an arm, and the answer: does `gan` beat the best arm that is likelihood alone?"""
    y, more = ("js", ["kl", "valid"]) if "js" in rows[0] else ("judge_acc", ["nll", "words"])
    columns = "temperature", "min_p", y, y + "_se", *more, "novel", "unique"
    print(f"\n{'':15}plain | best decoding\n{'':10}", *(f"{c:>12}" for c in (y, *columns)))
    best = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        best[name] = min(mine, key=lambda row: row[y])
        cells = mine[0][y], *(best[name][c] for c in columns)
        print(f"{name:10}", *(f"{cell:12.3f}" for cell in cells))
    gan, other = best["gan"], min((best["mle"], best["sft"], best["continued"]), key=lambda r: r[y])
    gain, error = other[y] - gan[y], math.hypot(gan[y + "_se"], other[y + "_se"])
    if y == "js":  # on the same true sentences: a paired difference
        parts = other["terms"][0] - gan["terms"][0], other["terms"][1], gan["terms"][1]
        error = math.sqrt(sum(part.var() / len(part) for part in parts)) / 2
    luck = max(0.002, 2 * error)
    says = "wins" if gain > luck else "LOSES" if gain < -luck else "does NOT win"
    print(f"\nBest {y}: gan {gan[y]:.3f}, {other['name']} {other[y]:.3f}, difference {gain:.3f} +- "
          f"{error:.3f} (standard error; under {luck:.3f} is luck): the GAN phase {says}.")


# ---- 8 the run -----------------------------------------------------------------------------------
def write(path, save):
    """What save(path) writes, whole or not at all: a full disk leaves the file that was there."""
    new = path.with_name(f".{path.name}.new")
    save(new)
    new.replace(path)


def begin_or_resume(cfg, data):
    """Take the folder --out, or go on in it if the run there has the same flags and texts."""
    file = Path(cfg.out, "config.json")
    told = asdict(cfg) | {"out": "", "resume": "", "device": "", "symbols": data.symbols}
    told["texts"] = [zlib.crc32(x.cpu().numpy()) for text in data.texts for x in text.values()]
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in told.items()]
    if file.exists():
        if not cfg.resume:
            fail(f"--out {cfg.out}: there is a run already; expected --resume, or another folder")
        for line in sorted({*lines} - {*read(file)[1:-1].split(",\n")}):
            fail(f"--out {cfg.out}: the run there had other flags or texts than {line:.60}")
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, lambda new: new.write_text("{" + ",\n".join(lines) + "}"))


def sized_to_text(cfg, data):
    """Choose what was not given: for three minutes on the known language, for ten on other text."""
    tokens = real_tokens(data.messy["train"][:2000]).sum(1).mean().item()
    cost = tokens * (12 * cfg.layers * cfg.width**2 + cfg.width * len(data.symbols))
    scale = 1 if data.grammar else min(3, 1.5e6 / cost)
    chosen = {"pretrain_steps": 3000, "sft_steps": 1500, "d_steps": 800, "g_steps": 160}
    chosen = {name: max(10, round(scale * steps)) for name, steps in chosen.items()}
    chosen["temperatures"] = [1.0, 0.9] if data.grammar else [1.0]
    chosen["min_ps"] = [0.0, 0.003, 0.01] if data.grammar else [0.0, 0.05]
    for name in chosen:
        if getattr(cfg, name) is None:
            setattr(cfg, name, chosen[name])
    print("chosen:", *(f"{name} {getattr(cfg, name)}" for name in chosen))


def report(arms, records, data, cfg):
    """Measure every arm with every decoding; print and write what comes out."""
    rows, out = [], Path(cfg.out)
    torch.manual_seed(cfg.seed)
    grid = [(temperature, min_p) for temperature in cfg.temperatures for min_p in cfg.min_ps]
    for name, (model, *disc) in arms.items():
        print(f"\n{name} says (+ is in the training text, * is wrong by the grammar, if any):")
        for decoding in tqdm(grid, name, disable=None):
            row, lines = measure(model, arms["mle"][0], decoding, data, cfg, *disc)
            rows.append({"name": name, **row})
            tag = "" if decoding == grid[0] else "_{:g}_{:g}".format(*decoding)
            write(out / f"samples_{name}{tag}.txt",
                  lambda new: new.write_text("\n".join([*lines, ""]), encoding="utf-8"))
            for line in [] if tag else lines[:8]:
                wrong = data.grammar and data.grammar.logp(line) == -math.inf
                print("  ", "+" if line in data.seen else "*" if wrong else " ", line)
    show_report(rows)
    rows = [{name: value if name == "name" or math.isfinite(value) else None
             for name, value in row.items() if name != "terms"} for row in rows]
    result = {"torch": torch.__version__, "config": asdict(cfg), "arms": rows, "rounds": records,
              "entropy": -data.truth_logp.mean() if data.grammar else None}
    write(out / "report.json", lambda new: new.write_text(json.dumps(result, indent=1)))


def main(argv=None):
    cfg = parse_flags(argv)
    data = Data(cfg)
    sized_to_text(cfg, data)
    begin_or_resume(cfg, data)
    records = {}

    def phase(name, model, train, *how):
        """`model` as train(model, *how) leaves it, or as an earlier run did."""
        file = Path(cfg.out, f"{name}.pt")
        if not file.exists():
            print(f"\n{name}", flush=True)
            torch.manual_seed(1000 * cfg.seed + sum(name.encode()))  # each phase has its own
            start = time.time()
            half = cfg.device == "cuda" and train != train_generator  # rewards need 32 bits
            with torch.autocast(cfg.device, torch.bfloat16, half, cache_enabled=False):
                record = train(model, *how, cfg)
            record["seconds"] = time.time() - start
            print("  " + "\n  ".join(f"{k:10} {np.round(v, 3)}" for k, v in record.items()))
            write(file, lambda new: torch.save([record, model.state_dict()], new))
        try:  # as data only: nothing in it is run
            records[name], state = torch.load(file, map_location=cfg.device, weights_only=True)
            model.load_state_dict(state)
        except Exception as error:  # whatever a damaged, foreign or hostile file makes of itself
            fail(f"{file} is no model of this run ({error!r:.60})")
        return model

    # 1 likelihood: on the messy text, then on the curated one
    torch.manual_seed(cfg.seed)
    gpt = GPT(len(data.symbols), cfg.context, cfg.layers, cfg.width).to(cfg.device)
    mle = phase("mle", gpt, train_likelihood, data.messy, cfg.pretrain_steps, cfg.lr)
    sft = phase("sft", deepcopy(mle), train_likelihood, data.curated, cfg.sft_steps, cfg.lr / 4)

    # 2 the GAN: D warms up on the easier samples of mle, then both take turns
    torch.manual_seed(cfg.seed)
    disc = CNNDiscriminator(mle) if cfg.disc == "cnn" else PrefixDiscriminator(mle)
    disc = phase("warm_up", disc.to(cfg.device), teach, mle, data, cfg.d_steps)
    disc = disc1 = phase("disc1", deepcopy(disc), teach, sft, data, cfg.d_steps)
    gan = sft
    for i in range(1, cfg.rounds + 1):
        new = phase(f"gan{i}", deepcopy(gan), train_generator, gan, disc)
        disc = phase(f"disc{i + 1}", deepcopy(disc), teach, new, data, cfg.d_steps)
        why = why_undone(gan, new, data, records[f"disc{i}"], records[f"disc{i + 1}"])
        records[f"gan{i}"]["kept"] = not why
        print(f"\nround {i} is", f"undone: {why}" if why else "kept")
        if why:
            break
        gan = new

    # 3 the control: the GAN's time in more likelihood, two batches for each that D reads or a model
    # writes (other text: three).  A curated text of its own is read often: a low rate suits that.
    written = cfg.rounds * cfg.g_steps * cfg.g_samples // cfg.batch_size
    work = (2 if data.grammar else 3) * (cfg.d_steps * (2 + cfg.rounds) + written) + cfg.sft_steps
    rate = cfg.lr if data.curated is data.messy else cfg.lr / 16
    continued = phase("continued", deepcopy(mle), train_likelihood, data.curated, work, rate)

    report({"mle": [mle], "sft": [sft], "continued": [continued], "gan": [gan],
            "reranked": [sft, disc1]}, records, data, cfg)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        fail(str(error))
    except torch.OutOfMemoryError:
        fail("the GPU is full: lower --batch_size, --context, --width or --layers")
    except KeyboardInterrupt:
        sys.exit("stopped: finished phases are saved, --resume goes on from there")
