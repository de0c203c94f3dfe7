"""Do GANs help language models?  One file that answers by measurement.

A small GPT is trained by likelihood: on a large messy text (`mle`), then on a curated one (`sft`,
supervised fine-tuning).  Then comes the phase under test, a GAN: a discriminator D learns to tell
curated sentences from the model's own, and policy gradient (write, be judged, make more likely what
was judged well) moves the model to where D cannot (`gan`).  Everything cheap that could be done
instead runs along: a lower temperature, a cut of unlikely tokens (min-p), the same time in more
likelihood (`continued`), choosing among the samples of `sft` by the same D (`reranked`).

Deleted from SeqGAN (Yu et al. 2017) and its heirs: Monte-Carlo rollouts, which finish a prefix many
times to judge it, and critics (our D judges every prefix), and reward scaling.  Added: D reads what
the model thought, and an anchor, the KL to the model that D was trained against.  Freeze D, and
this is preference learning (RLHF).  What came out, with figures: README.md.

    python gan_lm.py                     # tiny_data/: a grammar knows the exact p of any sentence
    python gan_lm.py --data your.txt     # any text, one sequence a line: a fresh D is the judge

Shapes: B batch, T time, C channels, V vocabulary.  p is the truth, q the model.
"""
import argparse, io, json, math, os, random, re, sys, time  # noqa: E401
from contextlib import suppress
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
AT_ONCE = 2**24  # numbers computed at a time (rows x tokens x numbers a token): bounds memory


# ---- 1 configuration: each field is a flag of the same name --------------------------------------
def flag(default, text, low=None, high=None, group="", **how):
    """A field that is a flag, from low to high; `group` begins a group of --help."""
    how = {"help": text, **how}
    return field(default=default, metadata={"range": (low, high), "group": group, "how": how})


@dataclass
class Config:
    """Everything that a run depends on.  None: chosen by sized_to_text()."""
    data: str = flag("mistakes", "text to learn: a file, or mistakes, noise, clean of tiny_data",
                     group="the run")
    curated: str = flag("", "text to sharpen towards (none: --data, or tiny_data/curated.txt)")
    grammar: str = flag("", "grammar of --curated (none: none, or tiny_data/grammar.txt)")
    level: str = flag("word", "what a token is", choices=["word", "char"])
    out: str = flag("out", "folder for model.pt, report.json, report.png, samples_<arm>.txt")
    resume: bool = flag(False, "go on with the run in --out", action="store_true")
    seed: int = flag(0, "same seed, same machine: same numbers", 0, 10**6)
    device: str = flag(DEVICES[0], "where to compute", choices=DEVICES)
    layers: int = flag(2, "layers of the GPT", 1, 100, group="the model")
    width: int = flag(64, "channels of the GPT, a multiple of 32: a head has 32", 32, 4096)
    context: int = flag(64, "longest sequence in tokens, the rest of a line is cut", 1, 4096)
    batch_size: int = flag(64, "sequences per step of likelihood, and of D", 2, 10**6)
    pretrain_steps: int = flag(None, "likelihood steps on --data", 0, 10**9, group="likelihood")
    sft_steps: int = flag(None, "likelihood steps on --curated", 0, 10**9)
    lr: float = flag(4e-3, "peak learning rate of likelihood, a quarter on --curated", 0, 1)
    rounds: int = flag(1, "turns of both networks; 0: no GAN", 0, 100, group="the GAN")
    disc: str = flag("lm", "D is a language model, or SeqGAN's CNN", choices=["lm", "cnn"])
    d_loss: str = flag("bce", "the GAN's, or reward models'", choices=["bce", "pairwise"])
    d_steps: int = flag(None, "discriminator steps per round", 1, 10**9)
    g_steps: int = flag(None, "policy-gradient steps per round", 1, 10**9)
    g_samples: int = flag(1024, "samples of the model per policy-gradient step", 2, 10**6)
    gan_lr: float = flag(3e-3, "peak learning rate of both, times 64 / width", 0, 1)
    reward: str = flag("logit", "a token is to raise D's logit, or D", choices=["logit", "prob"])
    kl_coef: float = flag(1.0, "weight of the anchor; 1 makes the truth the optimum", 0, 1000)
    lam: float = flag(0.8, "a token's share of the reward k tokens later is lam^k", 0, 1)
    temperatures: tuple = flag(None, "to measure, the first is plain", 0.01, 100,
                               group="measurement", nargs="+")
    min_ps: tuple = flag(None, "cuts of tokens below that share of the likeliest", 0, 1, nargs="+")
    eval_samples: int = flag(4000, "samples per side of each figure", 10, 10**7)
    samples: int = flag(0, "print so many of the model in --out", 0, 10**7, group="samples")
    prompt: str = flag("", "how each of --samples begins")
    temperature: float = flag(1.0, "of --samples", 0.01, 100)
    min_p: float = flag(0.0, "of --samples", 0, 1)


def fail(message):
    print(f"gan_lm.py: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def parse_flags(argv=None):
    """Command line -> Config.  A mistake ends the program with one line that names the flag."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    for f in fields(Config):
        group = parser.add_argument_group(f.metadata["group"]) if f.metadata["group"] else group
        kind = {} if f.type is bool else {"type": float if f.type is tuple else f.type}
        group.add_argument("--" + f.name, default=f.default, **kind, **f.metadata["how"])
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
    """Both texts as ids, each a dict of train, val and test.  Of a known language also true
    sentences and their exact log p, the same for every figure."""
    def __init__(self, cfg):
        self.cfg, self.grammar = cfg, None
        messy, curated, grammar = cfg.data, cfg.curated or cfg.data, cfg.grammar
        if cfg.data in ("mistakes", "noise", "clean"):
            messy = TINY / f"{cfg.data}.txt"
            curated, grammar = cfg.curated or TINY / "curated.txt", grammar or TINY / "grammar.txt"
        texts = self.split(messy), self.split(curated)
        lines = [line for text in texts for part in text.values() for line in part]
        self.seen = {line for text in texts for line in text["train"]}
        self.words = {word for line in lines for word in line.split()}
        if grammar:
            from tiny_data.language import Grammar  # the only use of that folder's code
            self.grammar = Grammar(read(grammar), grammar)
            for word in self.grammar.words - self.words:
                if word[0].isupper():
                    fail(f"{grammar}: {word!r} has no rule and is no word of the texts")
            lines += self.grammar.words
        self.symbols = ["", *sorted({t for line in lines for t in tokens_of(line, cfg.level)})]
        if len(self.symbols) > 20000:
            fail(f"--level {cfg.level}: over 20000 different tokens: try --level char or less text")
        self.id_of = {symbol: i for i, symbol in enumerate(self.symbols)}  # END is 0
        self.messy, self.curated = ({part: self.to_ids(lines) for part, lines in text.items()}
                                    for text in texts)
        if self.grammar:
            rng = random.Random(cfg.seed + 10**6)
            truth = [self.grammar.sample(rng) for _ in range(cfg.eval_samples)]
            if max(len(tokens_of(line, cfg.level)) for line in truth) > cfg.context:
                fail(f"--context {cfg.context}: true sentences are longer; expected more")
            self.truth = self.to_ids(truth)
            self.truth_logp = np.array([self.grammar.logp(line) for line in truth])

    def split(self, path):
        """A held-out line may stand in train as well, as often as the language repeats itself."""
        lines = [" ".join(line.split()) for line in read(path).split("\n") if line.split()]
        if len(set(lines)) < 50 or len(lines) < 80:
            fail(f"{path}: {len(lines)} lines, {len(set(lines))} different; expected 80 lines, one "
                 "sequence each, 50 of them different")
        random.Random(self.cfg.seed).shuffle(lines)
        n = len(lines) // 10
        return {"test": lines[:n], "val": lines[n:2 * n][:2000], "train": lines[2 * n:]}

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
    """(B, T+1) ids -> (B, T) mask of the tokens that count: the text and its closing END.

    x[:, :-1]        END  the  dog  runs  .    END  END    what the model reads
    x[:, 1:]         the  dog  runs  .    END  END  END    what it should say next
    real_tokens(x)    1    1    1    1    1    0    0"""
    return torch.cat([torch.ones_like(x[:, :1]), x[:, 1:-1].ne(END)], 1).float()


def trim(x):
    """Without the columns in which no row has a real token."""
    return x[:, :int(real_tokens(x).sum(1).max()) + 1].long()


def batches(x, size):
    """Endless shuffled batches of row numbers, each of rows of like length: little padding."""
    size = min(size, len(x))
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
            k = torch.cat([past[0], k], dim=2)
            v = torch.cat([past[1], v], dim=2)
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
    """log q of every next token, (..., V) logits -> (..., V), at a temperature and after the cut
    of min-p (Nguyen et al. 2024): what has less than min_p times the likeliest token's probability
    gets none, the rest is scaled to sum to 1."""
    logp = (logits / temperature).log_softmax(-1)
    if min_p > 0:
        too_rare = logp < logp.amax(-1, keepdim=True) + math.log(min_p)
        logp = logp.masked_fill(too_rare, -math.inf).log_softmax(-1)
    return logp


def token_logp(model, x, temperature=1.0, min_p=0.0):
    """log q(x_t | x_<t) in nats: (B, T+1) ids -> (B, T), 0 after the end."""
    logp = decoded(model(x[:, :-1]), temperature, min_p).gather(-1, x[:, 1:, None])[..., 0]
    return logp.masked_fill(real_tokens(x) == 0, 0.0)


def by_length(x, V):
    """(N, T+1) ids -> lists of row numbers, each of rows of like length and not too many."""
    return real_tokens(x).sum(1).argsort().split(max(1, min(512, AT_ONCE // (V * x.shape[1]))))


@torch.no_grad()
def in_chunks(f, x, *also, V=256):
    """f(x, *also) of many rows, (N, T+1) ids -> (N, T) or (N, T, 2), in bounded memory.  `also`:
    what else f reads of each token, (N, T, 2); V: how many numbers f makes of a token."""
    parts, order = [], by_length(x, V)
    for rows in order:
        part = trim(x[rows])
        y = f(part, *(hints[rows, :part.shape[1] - 1] for hints in also))
        rest = y.new_zeros(len(y), x.shape[1] - part.shape[1], *y.shape[2:])
        parts.append(torch.cat([y, rest], 1))
    return torch.cat(parts)[torch.cat(order).argsort()]


def sequence_logp(model, x, *decoding):
    """Exact log q(x) of whole sequences, (N, T+1) ids -> (N,); decoding: temperature, min_p."""
    return in_chunks(lambda part: token_logp(model, part, *decoding), x, V=model.shape[0]).sum(1)


@torch.no_grad()
def sample(model, n, temperature=1.0, min_p=0.0, prompt=()):
    """n sequences -> (n, T+1) ids, and (n, T) the log q of each token that was drawn."""
    V, T = model.shape[:2]
    out = torch.full((n, T + 1), END, device=model.token.weight.device)
    logq = torch.zeros(n, T, device=out.device)
    out[:, 1:1 + len(prompt)] = torch.tensor(prompt)
    for rows in torch.arange(n, device=out.device).split(max(1, AT_ONCE // (64 * T + 8 * V))):
        x, cache = out[rows, :1 + len(prompt)], None
        for t in range(1 + len(prompt), T + 1):
            h, cache = model.trunk(model.embed(x, start=t - x.shape[1]), cache)
            logp = decoded(h[:, -1] @ model.token.weight.T, temperature, min_p)  # (rows, V)
            total = logp.exp().cumsum(-1)  # a draw: where in it a uniform number falls
            x = torch.searchsorted(total, total[:, -1:] * torch.rand_like(total[:, :1]), right=True)
            out[rows, t], logq[rows, t - 1] = x[:, 0], logp.gather(1, x)[:, 0]
            going = x[:, 0].ne(END).nonzero()[:, 0]  # here alone the host waits for a GPU
            if len(going) == 0:
                break
            if len(going) < len(rows):  # a finished row leaves the batch
                rows, x = rows[going], x[going]
                cache = [(k[going], v[going]) for k, v in cache]
    return out, logq


# ---- 4 discriminators: (B, T+1) ids, (B, T, 2) hints -> (B, T) logits, one for each x_1..x_t -----
def hints_of(ref, x):
    """What the frozen generator q_ref thought of each token: log q_ref(x_t | x_<t), and minus the
    entropy of that step.  (N, T+1) ids -> (N, T, 2).  Constants of a text: computed once."""
    def both(part):
        logq = ref(part[:, :-1]).log_softmax(-1)
        said = logq.gather(-1, part[:, 1:, None])[..., 0]
        hints = torch.stack([said, (logq.exp() * logq).sum(-1)], -1)
        return hints * real_tokens(part)[..., None]
    return in_chunks(both, x, V=ref.shape[0])


class PrefixDiscriminator(nn.Module):
    """A language model with a verdict for a head: logit_t estimates log(p/q_ref) of x_1..t.
    It starts as a copy of a generator and reads the hints with each token: what is left to learn is
    where q_ref is wrong, not the language."""
    def __init__(self, generator):
        super().__init__()
        C = generator.shape[-1]
        self.lm, self.hints, self.head = deepcopy(generator), nn.Linear(2, C), nn.Linear(C, 1)

    def forward(self, x, hints):
        h = self.lm.embed(x)  # (B, T+1, C)
        h = torch.cat([h[:, :1], h[:, 1:] + self.hints(hints / 3)], 1)  # /3: to be about 1
        return self.head(self.lm.trunk(h)[0])[:, 1:, 0]


class CNNDiscriminator(nn.Module):
    """Kim (2014), as in SeqGAN: one verdict on the sentence, at its last token, 0 before; blind."""
    def __init__(self, generator, widths=(2, 3, 4, 5)):
        super().__init__()
        V, _, _, C = generator.shape
        self.token, self.head = nn.Embedding(V, C), nn.Linear(C * len(widths), 1)
        self.convolutions = nn.ModuleList(nn.Conv1d(C, C, w, padding=w - 1) for w in widths)

    def forward(self, x, hints):
        mask = real_tokens(x)
        h = (self.token(x[:, 1:]) * mask[..., None]).transpose(1, 2)  # (B, C, T)
        found = []
        for conv in self.convolutions:
            seen = F.pad(mask, (conv.padding[0], 0), value=1.0)  # no window over padding alone
            found.append((conv(h).relu() * seen[:, None]).amax(2))  # (B, C)
        last = F.one_hot(mask.sum(1).long() - 1, mask.shape[1])  # (B, T), 1 at the last token
        return self.head(torch.cat(found, 1)) * last


# ---- 5 objectives: pure functions, each with its equation ----------------------------------------
# The method: D learns log p/q of every prefix (discriminator_loss).  A token's reward is by how
# much it raised that (token_rewards); its advantage, how much better than usual things went from
# there on (advantages).  A draw has no gradient, so none flows back through D: the model makes
# each token that it drew more likely in proportion to its advantage (policy_gradient_loss).
def likelihood_loss(logp):
    """MLE: -sum_t log q(x_t | x_<t), nats a sequence; (B, T) -> scalar."""
    return -logp.sum(1).mean()  # not the mean over tokens: it would favour batches of short rows


def discriminator_loss(logits, is_real, mask, kind="bce"):
    """How badly D tells real from fake at each prefix; (B, T), (B,) bool, (B, T) -> scalar.
    bce (Goodfellow et al. 2014, eq. 1): -log D(real) - log(1 - D(fake)), D = sigmoid(logit); at its
    optimum the logit is log p/q.  pairwise (Bradley-Terry; the reward model of RLHF):
    -log sigmoid(logit_real - logit_fake), each real prefix against each fake one of its length."""
    if kind == "bce":
        loss = F.softplus(torch.where(is_real[:, None], -logits, logits))
    else:
        loss = F.softplus(logits[~is_real][:, None] - logits[is_real][None])  # (fakes, reals, T)
        mask = mask[~is_real][:, None] * mask[is_real][None]
    return (loss * mask).sum() / mask.sum().clamp(min=1)


def token_rewards(logits, mask, shape="logit"):
    """r_t = f(x_1..t) - f(x_1..t-1): by how much a token raised D's verdict; (B, T) -> (B, T).
    logit: f = log D/(1-D) = log p/q.  prob: f = D (SeqGAN).  The empty prefix has logit 0."""
    f = torch.cat([torch.zeros_like(logits[:, :1]), logits], 1)
    if shape == "prob":
        f = f.sigmoid()
    return (f[:, 1:] - f[:, :-1]) * mask


def advantages(rewards, logp, logp_ref, mask, kl_coef=1.0, lam=1.0):
    """A_t = sum_{k>=t} lam^(k-t) (r_k - kl_coef log q(x_k|x_<k)/q_ref(x_k|x_<k)) - baseline_t.
    With logit rewards, kl_coef 1 and lam 1 the expected sum is -KL(q || q_ref D/(1-D)), highest at
    q = q_ref D/(1-D), which is p where D is optimal, as it is for any lam: less of lam is less
    noise, for a reward that is near in time anyway.  The baseline is
    the batch mean at each position.  No division by the deviation: with D at chance it would blow
    noise up to full-size steps.  (B, T) each -> (B, T), without gradient: advantages are data."""
    A = (rewards - kl_coef * (logp - logp_ref)).detach() * mask
    for t in reversed(range(A.shape[1] - 1)):
        A[:, t] += lam * A[:, t + 1]
    baseline = A.sum(0) / mask.sum(0).clamp(min=1)
    return (A - baseline) * mask


def policy_gradient_loss(logp, advantage):
    """REINFORCE (Williams 1992): -sum_t A_t log q(x_t | x_<t), (B, T) -> scalar.
    Its gradient is, on average, that of minus the expected return; its value is no score."""
    return -(advantage * logp).sum(1).mean()


# ---- 6 training ----------------------------------------------------------------------------------
def update(model, adam, step, steps, peak):
    """One step of AdamW along the gradients that were added up.  The learning rate rises to `peak`
    in 20 steps and falls to 0 along a cosine.  False: the gradient is not finite."""
    rise = min(1, (step + 1) / 20)
    fall = (1 + math.cos(math.pi * step / steps)) / 2
    adam.param_groups[0]["lr"] = peak * rise * fall
    finite = bool(nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite())
    if finite:
        adam.step()
    adam.zero_grad()
    return finite


def fit(model, steps, lr, loss_of_a_batch, name, held_out):
    """Descend loss_of_a_batch(); the model ends as at the best of some 16 looks at held_out()."""
    adam = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), fused=True)
    best, best_state = held_out(), deepcopy(model.state_dict())
    for step in tqdm(range(steps), name, disable=None):
        loss_of_a_batch().backward()
        if not update(model, adam, step, steps, lr):
            print(f"{name}: no finite gradient at step {step + 1}; back to the best model so far")
            break
        if (step + 1) % max(10, math.ceil(steps / 16)) == 0 or step + 1 == steps:
            score = held_out()
            if score <= best:
                best, best_state = score, deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    return best


def train_likelihood(model, text, steps, lr, cfg):
    """MLE on text["train"], stopped early on text["val"]."""
    stream = batches(text["train"], cfg.batch_size)

    def loss():
        x = trim(text["train"][next(stream)])
        return likelihood_loss(token_logp(model, x)) / 10  # so that clipping at 1 is rare

    def held_out():
        return -sequence_logp(model, text["val"]).mean().item()

    return {"val_nll": fit(model, steps, lr, loss, "likelihood", held_out)}


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
    loss = (loss_r.mean() + loss_f.mean()) / 2
    return {"d_loss": loss.item(), "d_loss_se": error.item(), "d_acc": right.item()}


def train_discriminator(disc, ref, real, fake, steps, cfg):
    """The same loop, another loss: tell real from fake sentences, stopped early on held-out ones.
    `real`, `fake`: dicts of train and val ids; `ref`: the generator whose hints D reads."""
    row = torch.arange(max(len(real["train"]), len(fake["train"])), device=cfg.device)
    # The smaller class is repeated.  Both are mixed before they are sorted by length: a batch of
    # long reals and then one of short fakes would teach D lengths.
    x = torch.cat([text["train"][row % len(text["train"])] for text in (real, fake)])
    is_real = torch.arange(len(x), device=cfg.device) < len(row)
    hints = hints_of(ref, x)
    held = [(text["val"], hints_of(ref, text["val"])) for text in (real, fake)]
    stream = batches(x, cfg.batch_size)

    def loss():
        rows = next(stream)
        part = trim(x[rows])
        logits = disc(part, hints[rows, :part.shape[1] - 1])
        return discriminator_loss(logits, is_real[rows], real_tokens(part), cfg.d_loss)

    def figures():
        return judged(*(verdict(disc, *text) for text in held))

    fit(disc, steps, cfg.gan_lr * 64 / cfg.width, loss, "D", lambda: figures()["d_loss"])
    return figures()


def teach(disc, ref, data, steps, cfg):
    """D learns to tell curated text from what `ref` writes."""
    n = cfg.batch_size * steps // 2  # half of what D will read
    fake = {"train": sample(ref, n)[0].short(), "val": sample(ref, 4000)[0]}
    real = {"train": data.curated["train"][:n], "val": data.curated["val"]}
    return train_discriminator(disc, ref, real, fake, steps, cfg)


def train_generator(model, ref, disc, cfg):
    """The loop once more, on the model's own samples: reinforcement learning in six steps."""
    adam = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), fused=True)
    stats = []
    for step in tqdm(range(cfg.g_steps), "generator", disable=None):
        x, logp = sample(model, cfg.g_samples)  # 1 the model writes
        mask = real_tokens(x)
        hints = hints_of(ref, x)  # 2 the reference reads it, then the discriminator
        logp_ref = hints[..., 0]
        rewards = token_rewards(in_chunks(disc, x, hints), mask, cfg.reward)  # 3 token by token
        A = advantages(rewards, logp, logp_ref, mask, cfg.kl_coef, cfg.lam)  # 4 better than usual?
        for rows in by_length(x, ref.shape[0]):  # 5 make better tokens more likely
            part = trim(x[rows])
            new_logp = token_logp(model, part)  # logp again, now with a gradient
            loss = policy_gradient_loss(new_logp, A[rows, :part.shape[1] - 1])
            (loss / 10 * len(rows) / len(x)).backward()  # / 10 as in train_likelihood()
        stats.append(torch.stack([rewards, logp - logp_ref, -logp, mask]).sum(2).mean(1))
        if not update(model, adam, step, cfg.g_steps, cfg.gan_lr * 64 / cfg.width):  # 6 a step
            print(f"generator: no finite gradient at step {step + 1}: stopped there")
            break
    ends = [torch.stack(part).mean(0) for part in (stats[:10], stats[-10:])]  # of ten steps
    return dict(zip(("reward", "kl_to_ref", "entropy", "tokens"), torch.stack(ends, 1).tolist()))


def why_undone(before, after, data, old, new):
    """A round is kept only if held-out text says so.  A GAN is for being told apart less: the next
    D, which went on from the old one with the same budget, must find less in the new model than
    the old one did in the old.  And likelihood and variety must not collapse.  "": keep it."""
    if math.log(2) - old["d_loss"] < 2 * old["d_loss_se"] + 0.001:  # the best of 16 looks
        return "the discriminator was at chance"
    torch.manual_seed(0)  # the same decision after --resume
    nll, nll_before = (-sequence_logp(m, data.curated["val"]).mean() for m in (after, before))
    unique, unique_before = (len(sample(m, 1000)[0].unique(dim=0)) for m in (after, before))
    if nll > 1.05 * nll_before or unique < 0.9 * unique_before:
        return "held-out likelihood or the variety of the samples collapsed"
    return "the next discriminator finds more" if new["d_loss"] < old["d_loss"] else ""


# ---- 7 measurement -------------------------------------------------------------------------------
def divergences(logp_p, logq_p, logp_q, logq_q, weight=1.0):
    """From exact log p and log q on samples of p and of q: KL in nats, Jensen-Shannon divergence in
    bits (0 to 1), total variation; standard errors _se.  KL = E_p log p/q.  JS = (E_p log2 p/m +
    E_q log2 q/m) / 2, m = (p+q)/2 (Lin 1991).  TV = E_p (1 - q/p)+; the best D is right (1+TV)/2 of
    the time.  `weight`: how much each sample of q counts, 1 on average; terms: what JS averages."""
    with np.errstate(invalid="ignore"):  # a cut can make q 0, and KL infinite
        kl = logp_p - logq_p
        kl_se = kl.std() / math.sqrt(len(kl))
    js_p = 1 - np.logaddexp(0, -kl) / math.log(2)
    js_q = weight * (1 - np.logaddexp(0, logp_q - logq_q) / math.log(2))
    js_q = js_q - (weight - 1) * js_q.mean()  # keeps the mean; Z is an estimate: adds its error
    return {"kl": kl.mean(), "kl_se": kl_se, "js": (js_p.mean() + js_q.mean()) / 2,
            "js_se": math.sqrt(js_p.var() / len(js_p) + js_q.var() / len(js_q)) / 2,
            "tv": -np.expm1(np.minimum(-kl, 0)).mean(), "terms": (js_p, js_q)}


def measure(model, decoding, data, cfg, disc=None):
    """A row of the report for `model` at (temperature, min_p), and its samples as lines.  With
    `disc` they are re-ranked: of four times as many some are drawn by the weight D/(1-D).  JS and
    KL are those of the limit of a large pool, q D/(1-D) / Z (Deng et al. 2020): Z, the mean weight
    in the pool, and each sample of the pool counts by its weight."""
    def log_weight(x):  # log D/(1-D) of whole sentences, (N, T+1) ids -> (N,)
        found = verdict(disc, x, hints_of(model, x)) if disc else torch.zeros(len(x))
        return found.cpu().double()

    n = cfg.eval_samples
    x, logq = sample(model, 4 * n if disc else n, *decoding)
    log_w = log_weight(x)
    log_z = log_w.logsumexp(0) - math.log(len(x))
    drawn = log_w.softmax(0).multinomial(n) if disc else torch.arange(n)
    lines = data.to_lines(x)
    kept = [lines[i] for i in drawn]
    row = {"temperature": decoding[0], "min_p": decoding[1], "unique": len(set(kept)) / n,
           "novel": np.mean([line not in data.seen for line in kept])}
    real = data.truth if data.grammar else data.curated["test"]
    logq_real = sequence_logp(model, real, *decoding).cpu().double()
    if data.grammar:
        logp_q = np.array([data.grammar.logp(line) for line in lines])
        log_w_real = log_weight(real) - log_z
        log_w = log_w - log_z
        row |= {"valid": np.isfinite(logp_q[drawn]).mean(), **divergences(
            data.truth_logp, (logq_real + log_w_real).numpy(), logp_q,
            (logq.sum(1).cpu() + log_w).numpy(), log_w.exp().numpy())}
    else:
        known = [word in data.words for line in kept for word in line.split()]
        row |= {"words": np.mean(known or [0.0]), "nll": -logq_real.mean().item(),
                **fresh_judge(model, x[drawn.to(x.device)], data, cfg)}
    return row, kept


def fresh_judge(model, x, data, cfg):
    """A discriminator that has met neither side yet: its accuracy on unseen sentences, 0.5: fooled.
    Of the test lines and the samples half trains it, an eighth stops it, the rest is judged."""
    n = min(len(data.curated["test"]), len(x)) // 8
    sides = [dict(zip(("train", "val", "test"), text[:8 * n].split([4 * n, n, 3 * n])))
             for text in (data.curated["test"], x.short())]
    judge = PrefixDiscriminator(model)
    train_discriminator(judge, model, *sides, cfg.d_steps // 2, cfg)
    tests = [verdict(judge, side["test"], hints_of(model, side["test"])) for side in sides]
    # below 0.5 is noise: it must not rank above perfect
    return {"judge_acc": max(0.5, judged(*tests)["d_acc"]), "judge_acc_se": 0.5 / math.sqrt(6 * n)}


def show_report(rows):
    """One line an arm, and the answer: does `gan` beat the best arm that is likelihood alone?"""
    y, more = ("js", ["kl", "valid"]) if "js" in rows[0] else ("judge_acc", ["nll", "words"])
    columns = "temperature", "min_p", y, y + "_se", *more, "novel", "unique"
    print(f"\n{'':12}plain:{'':32}best decoding:\n{'':10}", end="")
    print("".join(f"{c:>12}" for c in (y, *more, *columns)))
    best = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        best[name] = min(mine, key=lambda row: row[y])
        cells = [mine[0][c] for c in (y, *more)] + [best[name][c] for c in columns]
        print(f"{name:10}" + "".join(f"{cell:12.3f}" for cell in cells))
    gan = best["gan"]
    other = min((best["mle"], best["sft"], best["continued"]), key=lambda row: row[y])
    gain, error = other[y] - gan[y], math.hypot(gan[y + "_se"], other[y + "_se"])
    if y == "js":  # on the same true sentences: a paired difference
        parts = other["terms"][0] - gan["terms"][0], other["terms"][1], gan["terms"][1]
        error = math.sqrt(sum(part.var() / len(part) for part in parts)) / 2
    says = "wins" if gain > max(0.002, 2 * error) else "does NOT win"
    print(f"\nBest {y}: gan {gan[y]:.3f}, {other['name']} {other[y]:.3f}, difference {gain:.3f} +- "
          f"{error:.3f} (standard error): the GAN phase {says}.")


def draw(runs, path):
    """How far each arm is from the truth.  `runs`: the rows of each seed; a small dot a seed, a
    large one their mean, with its 95 % interval by the normal rule."""
    from matplotlib.figure import Figure
    lines = [("likelihood, messy text", "mle", False), ("+ fine-tuning", "sft", False),
             ("with its best cut", "sft", True), ("longer, best cut", "continued", True),
             ("fine-tuning + GAN", "gan", False), ("with its best cut", "gan", True),
             ("weighted by D, best cut", "reranked", True)]
    y = "js" if "js" in runs[0][0] else "judge_acc"
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    for place, (label, name, at_best) in enumerate(lines):
        figures = [[row[y] for row in rows if row["name"] == name] for rows in runs]
        values = [min(f) if at_best else f[0] for f in figures]
        spread = 1.96 * np.std(values) / math.sqrt(max(1, len(values) - 1))
        look = {"color": "#0072b2", "marker": "o"}
        if name in ("gan", "reranked"):
            look = {"color": "#d55e00", "marker": "D"}
        axis.plot(values, [-place] * len(values), linestyle="", alpha=0.4, markersize=4, **look)
        axis.errorbar(np.mean(values), -place, xerr=spread, markersize=9, **look)
    axis.set_yticks([-place for place in range(len(lines))], [label for label, _, _ in lines])
    axis.set_xlabel({"js": "JS to the true language, 0 = perfect",
                     "judge_acc": "fresh judge's accuracy, 0.5 = fooled"}[y])
    figure.savefig(path, dpi=150)


# ---- 8 the run -----------------------------------------------------------------------------------
def write(content, path):
    """Bytes to a file, whole or not at all: a full disk leaves the file that was there."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_bytes(content)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def load(cfg):
    """The checkpoint in --out, as data only: nothing in it is run."""
    try:
        run = torch.load(Path(cfg.out, "model.pt"), map_location=cfg.device, weights_only=True)
        return {key: run[key] for key in ("config", "symbols", "models", "records")}
    except Exception as error:  # whatever a damaged, foreign or hostile file makes of itself
        fail(f"--out {cfg.out}: model.pt is no checkpoint of this program ({error!r:.60})")


def save(run, cfg):
    content = io.BytesIO()
    torch.save(run, content)
    write(content.getvalue(), Path(cfg.out, "model.pt"))


def begin_or_resume(cfg, symbols):
    """What is in --out/model.pt: the models of finished phases, and what was noted of them."""
    config = asdict(cfg)
    run = {"config": config, "symbols": symbols, "models": {}, "records": {}}
    if Path(cfg.out, "model.pt").exists():
        if not cfg.resume:
            fail(f"--out {cfg.out}: there is a run already; expected --resume, or another folder")
        run = load(cfg)
        for name, value in config.items():
            if name not in ("out", "resume", "device") and value != run["config"].get(name):
                fail(f"--{name} {value}: the run in --out {cfg.out} has {run['config'].get(name)}")
        if run["symbols"] != symbols:
            fail(f"--out {cfg.out}: the texts are not those that the run there began with")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    save(run, cfg)  # from now on the folder is taken
    return run


def print_samples(cfg):
    run = load(cfg)
    symbols, config = run["symbols"], run["config"]
    names = [name for name, record in run["records"].items() if record.get("kept")]
    if not names:
        fail(f"--out {cfg.out}: the run there has finished no phase yet: --resume goes on")
    prompt = tokens_of(cfg.prompt, config["level"])[:config["context"]]
    for token in prompt:
        if token not in symbols:
            fail(f"--prompt {cfg.prompt}: {token.strip()!r} is not in the text trained on")
    model = GPT(len(symbols), config["context"], config["layers"], config["width"]).to(cfg.device)
    model.load_state_dict(run["models"][names[-1]])
    torch.manual_seed(cfg.seed)
    prompt = [symbols.index(token) for token in prompt]
    for row in sample(model, cfg.samples, cfg.temperature, cfg.min_p, prompt)[0].tolist():
        print("".join(symbols[i] for i in row).strip())


def sized_to_text(cfg, data):
    """Choose what was not given: on two cores some three minutes of the known language, about ten
    of another text, where each decoding costs a judge."""
    tokens = real_tokens(data.messy["train"][:2000]).sum(1).mean().item()
    work = tokens * (1e5 + 64 * len(data.symbols))  # of a sentence, for the default model
    scale = 1.0 if data.grammar else min(3.0, 2e6 / work)
    chosen = {"pretrain_steps": 3000, "sft_steps": 1500, "d_steps": 1000, "g_steps": 150}
    chosen = {name: max(10, round(scale * steps)) for name, steps in chosen.items()}
    chosen["temperatures"] = [1.0, 0.9] if data.grammar else [1.0]
    chosen["min_ps"] = [0.0, 0.003, 0.01] if data.grammar else [0.0, 0.05]
    for name in chosen:
        if getattr(cfg, name) is None:
            setattr(cfg, name, chosen[name])
    print("chosen:", *(f"{name} {getattr(cfg, name)}" for name in chosen))


def report(arms, run, data, cfg):
    """Measure every arm with every decoding; print, draw and write what comes out."""
    start, rows, out = time.time(), [], Path(cfg.out)
    torch.manual_seed(cfg.seed)
    grid = [(temperature, min_p) for temperature in cfg.temperatures for min_p in cfg.min_ps]
    for name, (model, *disc) in arms.items():
        found = [measure(model, decoding, data, cfg, *disc)
                 for decoding in tqdm(grid, name, disable=None)]
        rows += [{"name": name, **row} for row, _ in found]
        plain = found[0][1]
        write(("\n".join(plain) + "\n").encode("utf-8"), out / f"samples_{name}.txt")
        print(f"\n{name} says" + (", * what the grammar cannot:" if data.grammar else ":"))
        for line in sorted(plain[:8], key=lambda line: line not in data.seen):
            wrong = data.grammar and data.grammar.logp(line) == -math.inf
            print("  in training" if line in data.seen else "  new", "* " if wrong else "  ", line)
    show_report(rows)
    with suppress(ImportError):  # without matplotlib there is no picture
        draw([rows], out / "report.png")
    rows = [{name: None if name.startswith("kl") and not math.isfinite(value) else value
             for name, value in row.items() if name != "terms"} for row in rows]
    timing = {name: record["seconds"] for name, record in run["records"].items()}
    timing["measuring"] = time.time() - start
    print("seconds:", *(f"{name} {value:.0f}" for name, value in timing.items()))
    result = {"config": run["config"], "arms": rows, "rounds": run["records"], "timing": timing,
              "entropy": -data.truth_logp.mean() if data.grammar else None,
              "versions": {"python": sys.version, "torch": torch.__version__}}
    write(json.dumps(result, indent=1).encode("utf-8"), out / "report.json")


def main(argv=None):
    cfg = parse_flags(argv)
    if cfg.samples:
        return print_samples(cfg)
    data = Data(cfg)
    sized_to_text(cfg, data)
    run = begin_or_resume(cfg, data.symbols)
    models, records = run["models"], run["records"]

    def phase(name, model, train, *how):
        """`model` as train(model, *how) leaves it, or as an earlier run did."""
        if name not in models:
            print(f"\n{name}", flush=True)
            torch.manual_seed(1000 * cfg.seed + sum(name.encode()))  # each phase has its own
            start = time.time()
            with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.device == "cuda"):
                records[name] = train(model, *how, cfg)  # what is measured later is in 32 bits
            records[name]["seconds"] = time.time() - start
            print("  " + "\n  ".join(f"{k:10} {np.round(v, 3)}" for k, v in records[name].items()))
            models[name] = model.state_dict()
            save(run, cfg)
        model.load_state_dict(models[name])
        return model

    # 1 likelihood: on the messy text, then on the curated one
    torch.manual_seed(cfg.seed)
    gpt = GPT(len(data.symbols), cfg.context, cfg.layers, cfg.width).to(cfg.device)
    mle = phase("mle", gpt, train_likelihood, data.messy, cfg.pretrain_steps, cfg.lr)
    fine_tuning = data.curated, cfg.sft_steps, cfg.lr / 4
    sft = phase("sft", deepcopy(mle), train_likelihood, *fine_tuning)
    records["mle"]["kept"] = records["sft"]["kept"] = True  # --samples shows the last that was kept

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

    # 3 the control: the GAN's time in more likelihood.  A step of D takes that of 2 batches, since
    # its sentences are also written and hinted at; a sample, written, read twice and learned, 5/2.
    work = 2 * cfg.d_steps * (2 + cfg.rounds)
    work += cfg.rounds * cfg.g_steps * 5 * cfg.g_samples // (2 * cfg.batch_size)
    more = phase("more", deepcopy(mle), train_likelihood, data.messy, work, cfg.lr)
    continued = phase("continued", deepcopy(more), train_likelihood, *fine_tuning)

    # 4 measurement
    report({"mle": [mle], "sft": [sft], "continued": [continued], "gan": [gan],
            "reranked": [sft, disc1]}, run, data, cfg)


def program(argv=None):
    """main(); what goes wrong is one line on standard error, and an exit status."""
    try:
        main(argv)
    except OSError as error:
        fail(str(error))
    except torch.OutOfMemoryError:
        fail("the GPU's memory is full: lower --batch_size, --g_samples, --context or --width")
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        fail(f"--out: model.pt does not fit its configuration: {error!s:.200}")
    except KeyboardInterrupt:
        print("stopped: finished phases are saved, --resume goes on from there", file=sys.stderr)
        raise SystemExit(130)


if __name__ == "__main__":
    program()
