# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy", "tqdm"]
# ///
"""Do GANs help language models?  One file that answers by measurement.

A small GPT is trained by likelihood, as every language model is: on a large messy corpus (MLE,
maximum likelihood), then on a small curated one (SFT, supervised fine-tuning).  Then comes the
phase under test, a GAN: a discriminator D learns to tell curated sentences from the model's own,
and policy gradient (write, be judged, make more likely what was judged well) moves the model to
where D cannot.  The text comes from a known grammar: how far each model is from the truth is
computed, not guessed.  The cheap rivals, a lower temperature and more likelihood, run along.

Deleted from SeqGAN (Yu et al. 2017): Monte-Carlo rollouts and the critic (D judges every prefix, so
each token has its own reward), reward scaling, a blind D (ours reads what the model thought).
Added: an anchor, the KL to the model that D was trained against.  Freeze D, and this is RLHF.

Map: 1 configuration  2 data  3 generator  4 discriminators  5 objectives  6 training phases
     7 measurement  8 main.  Text, grammar, flags and files: tiny_data/*.py
Shapes: B batch, T time, C channels, V vocabulary.  p is the truth, q the model, D the discriminator
"""
import json, math, sys, time  # noqa: E401
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm
from tiny_data.language import Grammar, load_texts, read, tokens_of
from tiny_data.plumbing import (agreed, average, draw, fail, flag, flags_of, join_torchrun, load,
                                leave_torchrun, one_line_errors, peak_memory_mb, ranks, save, write)

TINY = Path(__file__).resolve().parent / "tiny_data"
CHIPS = ["cpu"] + ["mps"] * torch.backends.mps.is_available() + ["cuda"] * torch.cuda.is_available()
LIKELIHOOD = "mle", "sft", "mixed", "continued"  # the arms that have no GAN in them
END = 0  # one token begins, ends and pads a sequence: whatever follows the closing one is ignored


# ---- 1 configuration: each field is a flag of the same name --------------------------------------
# gan_lr falls as 1/width beyond tiny's; the rates of medium and large were never tried
PRESETS = {"nano": (1, 1, 64, 4e-3, 3e-3),  # layers, heads of 32, context, lr, gan_lr
           "tiny": (2, 2, 64, 4e-3, 3e-3), "small": (4, 4, 64, 4e-3, 1.5e-3),
           "medium": (8, 16, 64, 1e-3, 4e-4), "large": (12, 24, 256, 6e-4, 2.5e-4)}


@dataclass
class Config:
    """Everything a run depends on.  The defaults are the run that the README shows."""
    data: str = flag("", "text to pretrain on; none: tiny_data/messy.txt", None, "the run")
    curated: str = flag("", "text to sharpen towards; none: --data, or tiny_data/curated.txt")
    grammar: str = flag("", "grammar of --curated; none: none, or tiny_data/grammar.txt")
    level: str = flag("word", "what a token is", ["word", "char"])
    out: str = flag("out", "folder for model.pt, report.json, samples.txt and frontier.png")
    resume: bool = flag(False, "go on with the run in --out after its last finished phase")
    seed: int = flag(0, "same seed, same machine: same numbers", (0, 10**6))
    device: str = flag("cuda" if "cuda" in CHIPS else "cpu", "of those at hand", CHIPS)
    preset: str = flag("tiny", "size of the models", [*PRESETS])
    context: int = flag(0, "longest sequence in tokens, the rest is cut; 0: as preset", (0, 4096))
    batch_size: int = flag(64, "sequences a step; GAN steps take four such batches", (2, 10**6))
    pretrain_steps: int = flag(4000, "MLE steps on --data", (0, 10**9), "training by likelihood")
    lr: float = flag(0.0, "peak learning rate of MLE; an eighth for SFT; 0: as preset", (0, 1))
    sft_steps: int = flag(600, "SFT steps on --curated", (0, 10**9))
    continued: float = flag(1.0, "length of the rival arm `continued`, in the GAN's", (0, 1000))
    rounds: int = flag(1, "turns of both networks; 0: no GAN", (0, 1000), "the adversarial phase")
    disc: str = flag("lm", "D's start; blind: no hints", ["lm", "scratch", "blind", "cnn"])
    d_loss: str = flag("bce", "the GAN's loss or the reward model's", ["bce", "pairwise"])
    d_steps: int = flag(200, "discriminator steps a round", (1, 10**9))
    g_steps: int = flag(300, "policy-gradient steps a round", (1, 10**9))
    gan_lr: float = flag(0.0, "peak learning rate of both; 0: as preset", (0, 1))
    reward: str = flag("logit", "log D/(1-D), D, or D/(1-D)", ["logit", "prob", "ratio"])
    kl_coef: float = flag(1.0, "weight of the anchor; 1 is what the GAN says", (0, 1000))
    lam: float = flag(0.8, "a token's share of the reward k tokens later is lam^k", (0, 1))
    temperatures: tuple = flag((1.0, 0.9, 0.8, 0.7), "of samples", (0.01, 100), "measurement")
    eval_samples: int = flag(2000, "samples a side for each figure", (10, 10**7))
    samples: int = flag(0, "only print so many", (0, 10**7), "samples of the model in --out")
    prompt: str = flag("", "how each of --samples begins")
    temperature: float = flag(1.0, "of --samples and of samples.txt", (0.01, 100))

    def __post_init__(self):
        for name, value in zip(("context", "lr", "gan_lr"), PRESETS[self.preset][2:]):
            setattr(self, name, getattr(self, name) or value)


# ---- 2 data: lines of text <-> (N, T+1) token ids ------------------------------------------------
def to_ids(lines, symbols, cfg):
    """N lines -> (N, context + 1) ids, each row END, the tokens, END...; longer lines are cut."""
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    rows = [[END, *(ids[t] for t in tokens_of(s, cfg.level)), *[END] * cfg.context] for s in lines]
    return torch.tensor([row[:cfg.context + 1] for row in rows], device=cfg.device)


def to_lines(x, symbols):
    """(N, T+1) ids -> N lines."""
    return ["".join(symbols[i] for i in row[:(row + [END]).index(END)]).strip()
            for row in x[:, 1:].tolist()]


class Data:
    """Both texts as ids, each [train, val, test]; no held-out line is in any train."""
    def __init__(self, cfg):
        grammar = cfg.grammar or ("" if cfg.data else TINY / "grammar.txt")
        paths = cfg.data or TINY / "messy.txt", cfg.curated or cfg.data or TINY / "curated.txt"
        self.grammar = Grammar(read(grammar), grammar) if grammar else None
        self.symbols, self.seen, texts = load_texts(paths, self.grammar, cfg)
        self.messy, self.curated = (
            [to_ids(part, self.symbols, cfg) for part in text] for text in texts)
        if self.grammar:  # the same true sentences for every figure, and their exact log p
            truth = self.grammar.samples(cfg.eval_samples, cfg.seed + 10**6)
            self.truth = to_ids(truth, self.symbols, cfg), self.grammar.logps(truth)

    def novel(self, x):
        """The rows that are in no training split; all, where hardly one is new."""
        new = [line not in self.seen for line in to_lines(x, self.symbols)]
        return x[new] if sum(new) > 3 else x


def real_tokens(x):
    """(B, T+1) ids -> (B, T) mask of the tokens that count: the text and its closing END.

    x[:, :-1]        END  the  dog  runs  .    END  END    what the model reads
    x[:, 1:]         the  dog  runs  .    END  END  END    what it should say next
    real_tokens(x)    1    1    1    1    1    0    0"""
    return torch.cat([torch.ones_like(x[:, :1]), x[:, 1:-1].ne(END).long().cumprod(1)], 1).float()


def trim(x):
    return x[:, :int(real_tokens(x).sum(1).max()) + 1]


def batches(x, size, *labels):
    """Endless shuffled batches, each of rows of like length, so that little padding is computed."""
    length, (rank, world) = real_tokens(x).sum(1), ranks()
    size = min(size * world, len(x))
    while True:
        for rows in torch.randperm(len(x), device=x.device).split(size * 16):
            sets = rows[length[rows].argsort()].split(size)[:len(rows) // size]
            for i in torch.randperm(len(sets)):
                part = sets[i][rank::world]  # each process of a torchrun takes its part of a batch
                yield trim(x[part]), *(label[part] for label in labels)


# ---- 3 generator: a GPT --------------------------------------------------------------------------
class GPT(nn.Module):
    """Pre-norm transformer (Radford et al. 2019); its head is its token embedding, transposed."""
    def __init__(self, V, context, n_layer, C):
        super().__init__()
        self.shape = V, context, n_layer, C
        self.token, self.position = nn.Embedding(V, C), nn.Embedding(context + 1, C)
        self.layers = nn.ModuleList(nn.ModuleList([
            nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 3 * C)), nn.Linear(C, C),
            nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))])
            for _ in range(n_layer))
        self.ln = nn.LayerNorm(C)
        for p in filter(lambda p: p.dim() == 2, self.parameters()):
            nn.init.normal_(p, std=0.02)

    def hidden(self, x, cache=None, extra=0.0):  # (B, T) ids -> (B, T, C)
        (B, T), start = x.shape, cache[0][0].shape[2] if cache else 0
        h = self.token(x) + self.position.weight[start:start + T] + extra
        for i, (qkv, out, mlp) in enumerate(self.layers):
            q, k, v = qkv(h).view(B, T, 3, -1, 32).permute(2, 0, 3, 1, 4)  # (B, heads, T, 32) each
            if start:  # the cache has the earlier keys and values: only the new ones are computed
                k, v = (torch.cat(pair, 2) for pair in zip(cache[i], (k, v)))
            if cache is not None:
                cache[i] = k, v
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # (B, heads, T, 32)
            h = h + out(y.transpose(1, 2).reshape(B, T, -1))
            h = h + mlp(h)
        return self.ln(h)

    def forward(self, x, cache=None):  # (B, T) ids -> (B, T, V) logits of the token after each
        return self.hidden(x, cache) @ self.token.weight.T


def token_logp(model, x, T=1.0):
    """log q(x_t | x_<t) in nats at temperature T: (B, T+1) ids -> (B, T), 0 after the end."""
    logits = model(x[:, :-1]) / T
    logp = -F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none")
    return logp.view_as(x[:, 1:]) * real_tokens(x)


@torch.no_grad()
def in_chunks(f, x):  # bounded memory, little padding
    return torch.cat([f(trim(rows)) for rows in x.split(min(500, 32_500 // x.shape[1]))])


def sequence_logp(model, x, T=1.0):
    """Exact log q(x) of whole sequences at temperature T, (B, T+1) ids -> (B,)."""
    return in_chunks(lambda x: token_logp(model, x, T).sum(1), x)


@torch.no_grad()
def sample(model, n, T=1.0, prompt=()):
    """n sequences at temperature T -> (n, context + 1) ids.  A finished row leaves the batch."""
    out = torch.full((n, model.shape[1] + 1), END, device=model.token.weight.device)
    out[:, 1:1 + len(prompt)] = torch.tensor(prompt)
    for rows in torch.arange(n, device=out.device).split(min(2000, 130_000 // out.shape[1])):
        x, cache = out[rows, :1 + len(prompt)], {}
        for t in range(1 + len(prompt), out.shape[1]):
            p = (model(x, cache)[:, -1] / T).softmax(-1)  # argmax p/E, E ~ Exp(1), is a draw from p
            x = (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)
            out[rows, t] = x[:, 0]
            going = x[:, 0].ne(END).nonzero()[:, 0]  # here alone the host waits for a GPU
            if len(going) < len(rows):
                rows, x = rows[going], x[going]
                cache = {i: (k[going], v[going]) for i, (k, v) in cache.items()}
            if not len(rows):
                break
    return out


# ---- 4 discriminators: (B, T+1) ids -> (B, T) logits, the t-th is the verdict on x_1..x_t --------
class PrefixDiscriminator(GPT):
    """A language model with a verdict for a head: logit_t estimates log p(x_1..t) / q_ref(x_1..t).
    It starts as a copy of the generator q_ref, and reads two hints with each token, what the frozen
    q_ref thought of it: log q_ref(x_t | x_<t) and minus the entropy of that step, both over 3 to be
    about 1.  What is left to learn is where q_ref is wrong, not the language."""
    def __init__(self, ref):
        super().__init__(*ref.shape)
        self.load_state_dict(ref.state_dict())
        C, self.ref = ref.shape[-1], [ref]  # in a list: no part of D's parameters
        self.hints, self.head = nn.Linear(2, C), nn.Linear(C, 1)

    def forward(self, x):
        with torch.no_grad():
            logq = self.ref[0](x[:, :-1]).log_softmax(-1)  # (B, T, V)
            hints = logq.gather(-1, x[:, 1:, None])[..., 0], (logq.exp() * logq).sum(-1)
        extra = F.pad(self.hints(torch.stack(hints, -1) / 3), (0, 0, 1, 0))  # (B, T+1, C)
        return self.head(self.hidden(x, extra=extra))[:, 1:, 0]


class CNNDiscriminator(nn.Module):
    """Kim (2014), as in SeqGAN: one verdict on the sentence, at its last token; 0 before that."""
    def __init__(self, ref, widths=(2, 3, 4, 5)):
        super().__init__()
        V, _, _, C = ref.shape
        self.ref, self.token = [ref], nn.Embedding(V, C)
        self.head = nn.Linear(C * len(widths), 1)
        self.convolutions = nn.ModuleList(nn.Conv1d(C, C, w, padding=w - 1) for w in widths)

    def forward(self, x):
        mask = real_tokens(x)
        h = (self.token(x[:, 1:]) * mask[..., None]).transpose(1, 2)  # (B, C, T)
        h = torch.cat([conv(h).relu().amax(2) for conv in self.convolutions], 1)  # (B, C * widths)
        return self.head(h) * F.one_hot(mask.sum(1).long() - 1, mask.shape[1])


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
    logit: f = log D/(1-D) = log p/q, towards reverse KL.  prob: f = D (SeqGAN).  ratio: f = D/(1-D)
    = p/q over its mean in the batch (MaliGAN, Che et al. 2017).  The empty prefix has logit 0."""
    s, seen = F.pad(logits, (1, 0)), F.pad(mask, (1, 0), value=1.0)
    ratio = s.clamp(max=3).exp()
    ratio = ratio * seen.sum(0) / (ratio * seen).sum(0).clamp(min=1)
    return {"logit": s, "prob": s.sigmoid(), "ratio": ratio}[shape].diff(dim=1) * mask


def advantages(rewards, logp, logp_ref, mask, kl_coef=1.0, lam=1.0):
    """A_t = sum_{k>=t} lam^(k-t) (r_k - kl_coef log q(x_k|x_<k)/q_ref(x_k|x_<k)) - baseline_t.
    With logit rewards and kl_coef 1 the expected sum is -KL(q || q_ref D/(1-D)), highest at
    q = q_ref D/(1-D), which is p where D is optimal: the coefficient is no knob.  The baseline is
    the batch mean at each position.  No division by the deviation: with D at chance it would blow
    noise up to full-size steps.  (B, T) each -> (B, T), without gradient: advantages are data."""
    A = (rewards - kl_coef * (logp - logp_ref)).detach() * mask
    for t in reversed(range(A.shape[1] - 1)):
        A[:, t] += lam * A[:, t + 1]
    return (A - (A * mask).sum(0) / mask.sum(0).clamp(min=1)) * mask


def policy_gradient_loss(logp, advantage):
    """REINFORCE (Williams 1992): -sum_t A_t log q(x_t | x_<t), (B, T) -> scalar.
    Its gradient is, on average, that of the expected return; its value is no score."""
    return -(advantage * logp).sum(1).mean()


# ---- 6 training phases: one loop, three losses ---------------------------------------------------
def fit(model, steps, lr, loss_of_a_batch, name, held_out=lambda: 0):
    """AdamW on loss_of_a_batch(); the model ends as at the best of some 16 looks at held_out().
    The learning rate rises to `lr` in 20 steps and falls to 0 along a cosine."""
    adam = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, lr, steps + 1, pct_start=20 / (steps + 40))
    best, state, every = held_out(), deepcopy(model.state_dict()), max(10, math.ceil(steps / 16))
    for i in tqdm(range(1, steps + 1), name, disable=None):
        with torch.autocast("cuda", torch.bfloat16, enabled=next(model.parameters()).is_cuda):
            loss = loss_of_a_batch()  # in 16 bits on a GPU; what is measured later is in 32
        loss.backward()
        average([p.grad for p in model.parameters() if p.grad is not None])
        if not nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
            print(f"{name}: no finite gradient at step {i}; back to the best model before it")
            break
        adam.step(), rate.step(), adam.zero_grad()
        if (i % every == 0 or i == steps) and (now := held_out()) <= best:
            best, state = now, deepcopy(model.state_dict())
    model.load_state_dict(state)


def train_likelihood(model, texts, steps, lr, cfg):
    """MLE on texts[0], stopped early on texts[1]."""
    data = batches(texts[0], cfg.batch_size)  # /10 below: one clipping threshold for all losses
    fit(model, steps, lr, lambda: likelihood_loss(token_logp(model, *next(data))) / 10, "MLE",
        held_out=lambda: -sequence_logp(model, texts[1]).mean())


def verdict(disc, x):
    """D's logit on whole sentences, (B, T+1) ids -> (B,)."""
    return in_chunks(lambda x: disc(x).gather(1, real_tokens(x).sum(1, True).long() - 1)[:, 0], x)


def judged(disc, real, fake):
    """D's loss on whole sentences (ln 2: no signal), its standard error, and D's accuracy.
    1 - loss / ln 2 is the part of the JS between the two, in bits, that D has found."""
    r, f = verdict(disc, real), verdict(disc, fake)
    middle = (r.mean() + f.mean()) / 2  # a constant in the logit changes no reward: forgiven
    a, b, right = F.softplus(middle - r), F.softplus(f - middle), (r > middle).float().mean()
    error = (a.var() / len(a) + b.var() / len(b)).sqrt()  # both classes weigh alike
    values = torch.stack([a.mean() + b.mean(), error, right + (f <= middle).float().mean()]) / 2
    return dict(zip(("d_loss", "d_loss_se", "heldout_acc"), values.tolist()))


def train_discriminator(disc, real, fake, real_val, fake_val, cfg, name="discriminator"):
    """The same loop, another loss: tell `real` from `fake`, stopped early on held-out pairs."""
    # Mixed before they are sorted by length: a batch of long reals and short fakes would teach D
    # the length of the day.  The smaller class is repeated: chance is 50 %.
    rows = torch.arange(max(len(real), len(fake)), device=real.device)
    x = torch.cat([real[rows % len(real)], fake[rows % len(fake)]])
    data = batches(x, 4 * cfg.batch_size, torch.arange(len(x), device=x.device) < len(rows))

    def loss():
        x, is_real = next(data)
        return discriminator_loss(disc(x), is_real, real_tokens(x), cfg.d_loss)

    fit(disc, cfg.d_steps, cfg.gan_lr, loss, name,
        held_out=lambda: judged(disc, real_val, fake_val)["d_loss"])
    seen = judged(disc, real[:2000], fake[:2000])
    return {"train_loss": seen["d_loss"], "train_acc": seen["heldout_acc"],
            **judged(disc, real_val, fake_val)}


def train_generator(model, ref, disc, cfg):
    """The same loop once more: the model's own samples, weighted by what the discriminator says."""
    stats = []

    def loss():
        x, total = sample(model, 4 * cfg.batch_size), 0.0
        for x in map(trim, x[real_tokens(x).sum(1).argsort()].split(cfg.batch_size)):
            mask, logp = real_tokens(x), token_logp(model, x)  # of a quarter, of like length
            with torch.no_grad():  # no gradient reaches the discriminator or the reference
                rewards, logp_ref = token_rewards(disc(x), mask, cfg.reward), token_logp(ref, x)
                stats.append(torch.stack([rewards, logp - logp_ref, -logp, mask]).sum(2).mean(1))
            A = advantages(rewards, logp, logp_ref, mask, cfg.kl_coef, cfg.lam)
            total = total + policy_gradient_loss(logp, A) / 40  # 4 quarters; /10 as for MLE
        return total

    with torch.random.fork_rng():  # under torchrun each process draws samples of its own
        torch.manual_seed(torch.initial_seed() + 1 + ranks()[0])
        fit(model, cfg.g_steps, cfg.gan_lr, loss, "generator")
    ends = [torch.stack(part).mean(0).tolist() for part in (stats[:40], stats[-40:])]  # 10 steps
    return agreed(dict(zip(("reward", "kl_to_ref", "entropy", "tokens"), zip(*ends))))


def adversarial_phase(model, disc, data, cfg):
    """Rounds of: the discriminator against the frozen current model, then the model against it.
    A round is kept only if held-out text says so: there D's loss must be two standard errors
    below chance, and the likelihood must not fall by more than two.  -> a record a round."""
    records, (real, val, _) = [], data.curated
    for number in range(1, cfg.rounds + 1):
        ref = disc.ref[0] = deepcopy(model).requires_grad_(False)  # D's hints come from it too
        fake = sample(ref, cfg.batch_size * cfg.d_steps // 2)
        fake_val = data.novel(sample(ref, 1000))
        record = {"round": number, **train_discriminator(disc, real, fake, val, fake_val, cfg)}
        why = "D is at chance on held-out pairs"
        if record["d_loss"] < math.log(2) - 2 * record["d_loss_se"]:
            record |= train_generator(model, ref, disc, cfg)
            gain = sequence_logp(model, val) - sequence_logp(ref, val)
            record |= {"unique": len(sample(model, 1000).unique(dim=0)) / 1000,
                       "heldout_gain": gain.mean().item()}
            worse = gain.mean() < -2 * gain.std() / len(val) ** 0.5
            why = "held-out text became less likely" if worse else ""
            if record["unique"] < 0.5 or record["kl_to_ref"][1] > 20:  # nats a sentence
                why = "the samples collapsed"
        if data.grammar:
            before, after = (measure(m, 1.0, data, cfg)[0] for m in (ref, model))
            record |= {"js": [before["js"].item(), after["js"].item()],
                       "optimal_acc": (1 + before["tv"].item()) / 2}
        records.append(record | {"kept": not why, "why": why or "held-out text says so"})
        print("\n".join(f"  {k:12} {v if k == 'why' else np.round(np.float64(v), 3)}"
                        for k, v in records[-1].items()))
        if why:
            model.load_state_dict(ref.state_dict())
            break
    return records


# ---- 7 measurement -------------------------------------------------------------------------------
def divergences(logp_p, logq_p, logp_q, logq_q):
    """From exact log p and log q on samples of p and of q: KL (nats), JS (bits), TV; errors _se.
    KL = E_p log p/q.  JS = (E_p log2 p/m + E_q log2 q/m) / 2, m = (p+q)/2 (Lin 1991).
    TV = E_p (1 - q/p)+ = E_q (1 - p/q)+; the best possible D is right (1 + TV)/2 of the time."""
    other = logq_p - logp_p, logp_q - logq_q  # log of the other density over the sample's own
    js = [1 - np.logaddexp(0, a) / math.log(2) for a in other]
    tv = [-np.expm1(np.minimum(a, 0)).mean() for a in other]
    return {"kl": -other[0].mean(), "kl_se": other[0].std() / math.sqrt(len(other[0])),
            "js": (js[0].mean() + js[1].mean()) / 2,
            "js_se": math.sqrt(sum(a.var() / len(a) for a in js)) / 2, "tv": sum(tv) / 2}


def measure(model, T, data, cfg, disc=None):
    """A row of the report for `model` at temperature T, and the samples that it was measured on.
    With `disc` the model stays as it is and its samples are re-ranked: of four times as many some
    are drawn by the weight D/(1-D), so that they follow q D/(1-D) / Z (Deng et al. 2020)."""
    x, log_z = sample(model, cfg.eval_samples * (4 if disc else 1), T), 0.0
    if disc:
        weight = verdict(disc, x)
        log_z = weight.logsumexp(0) - math.log(len(x))
        x = x[weight.softmax(0).multinomial(cfg.eval_samples)]

    def logq(x):
        logp = sequence_logp(model, x, T) + (verdict(disc, x) - log_z if disc else 0.0)
        return logp.cpu().double().numpy()

    lines = to_lines(x, data.symbols)
    row = {"temperature": T, "novel": np.mean([s not in data.seen for s in lines]),
           "unique": len(set(lines)) / len(lines)}
    if not data.grammar:
        row["nll"] = -logq(data.curated[2]).mean()  # nats a sequence
        return row | fresh_judge(model, x, data, cfg), lines
    (truth, logp_p), logp_q = data.truth, data.grammar.logps(lines)
    valid = np.isfinite(logp_q)
    row |= {"valid": valid.mean(), "valid_se": valid.std() / math.sqrt(len(x)),
            "valid_logp": logp_q[valid].mean() if valid.any() else 0.0}
    return row | divergences(logp_p, logq(truth), logp_q, logq(x)), lines


def fresh_judge(model, x, data, cfg):
    """A discriminator that has met neither side yet: its accuracy on unseen pairs, 0.5 is perfect.
    Of the test lines and the samples x half train it, a quarter stops it, a quarter is judged."""
    real, fake = data.curated[2], data.novel(x)
    n = min(len(real), len(fake)) // 4  # Data and novel() leave at least 4 of each
    (r, r_val, r_test), (f, f_val, f_test) = (x[:4 * n].split([2 * n, n, n]) for x in (real, fake))
    judge = PrefixDiscriminator(model).to(cfg.device)
    train_discriminator(judge, r, f, r_val, f_val, replace(cfg, d_steps=cfg.d_steps // 2), "judge")
    return {"judge_acc": judged(judge, r_test, f_test)["heldout_acc"],
            "judge_acc_se": 0.5 / math.sqrt(2 * n)}  # that of 2n throws of a coin


def show_report(arms, out):
    """The table, its answer in a sentence, and the picture where matplotlib is installed."""
    y, x, share = ("js", "kl", "valid") if "js" in arms[0] else ("judge_acc", "nll", "novel")
    columns = f"temperature {y} {y}_se {x} {'tv valid' if y == 'js' else ''} novel unique".split()
    print("\n" + " " * 10 + "".join(f" {c:>11}" for c in columns))
    for a in arms:
        print(f"{a['name']:10}" + "".join(f"{a[c]:12.3f}" for c in columns))
    floor = 0.0 if y == "js" else 0.5  # a judge that is more often wrong than right saw nothing
    best = {a["name"]: a | {y: max(a[y], floor)} for a in sorted(arms, key=lambda a: -a[y])}
    gan, other = best["gan"], min(map(best.get, LIKELIHOOD), key=lambda a: a[y])
    gain, error = other[y] - gan[y], math.hypot(gan[y + "_se"], other[y + "_se"])
    verdict = "wins" if gain > max(0.01, 2 * error) else "does NOT win"
    answer = f"Best {y}: gan {gan[y]:.3f}, {other['name']} {other[y]:.3f}: the GAN phase {verdict}."
    print("\n" + answer)
    draw(arms, [("temperature", y), (x, share)], LIKELIHOOD, answer, out / "frontier.png")


# ---- 8 main --------------------------------------------------------------------------------------
def new_model(run, cfg, name=None):
    n_layer, n_head, *_ = PRESETS[cfg.preset]
    model = GPT(len(run["symbols"]), cfg.context, n_layer, 32 * n_head).to(cfg.device)
    model.load_state_dict(run["models"][name] if name else model.state_dict())
    return model


def new_disc(run, cfg, name):
    """The discriminator so far; the first one is made from the model of that name."""
    kind = CNNDiscriminator if cfg.disc == "cnn" else PrefixDiscriminator
    disc = kind(new_model(run, cfg, name)).to(cfg.device)
    if cfg.disc == "blind":
        for p in disc.hints.parameters():
            nn.init.zeros_(p).requires_grad_(False)
    disc.load_state_dict(run["models"].get("disc", disc.state_dict()))
    return disc


def train(run, cfg, data, path):
    """Fill run["models"], each the model that a phase ended with; what is there is skipped."""
    models, times = run["models"], max(1, len(data.messy[0]) // len(data.curated[0]))
    mixed = [torch.cat([data.messy[0], data.curated[0].repeat(times, 1)]), data.curated[1]]
    more = int(cfg.continued * cfg.rounds * (12 * cfg.d_steps + 8 * cfg.g_steps))  # the GAN's time
    sft = data.curated, cfg.sft_steps, cfg.lr / 8
    phases = {"mle": (None, [(data.messy, cfg.pretrain_steps, cfg.lr)]),  # origin, courses of MLE
              "sft": ("mle", [sft]), "gan_mle": ("mle", []), "gan": ("sft", []),
              "continued": ("mle", [(data.messy, more, cfg.lr), sft]),
              "mixed": ("mle", [(mixed, 2 * cfg.sft_steps, cfg.lr / 8)])}
    for i, (name, (origin, courses)) in enumerate(phases.items()):
        if name in models:
            continue
        print(f"\n{name}, from {origin}" if origin else f"\n{name}", flush=True)
        torch.manual_seed(100 * cfg.seed + i)
        start, model = time.time(), new_model(run, cfg, origin)
        for course in courses:
            train_likelihood(model, *course, cfg)
        if not courses:
            # D goes on from MLE's samples to the harder ones of SFT: it finds more than a new one
            disc = new_disc(run, cfg, None if cfg.disc == "scratch" else origin)
            records = adversarial_phase(model, disc, data, cfg)
            run["discriminator"] += [{"phase": name} | record for record in records]
            models |= {"disc": disc.state_dict(), "ref": disc.ref[0].state_dict()}
        phase = {"mle": "pretrain", "gan": "adversarial"}.get(name, name)
        models[name], run["timing"][phase + "_s"] = model.state_dict(), time.time() - start
        save(run, path)


def report(run, cfg, data, out):
    """Measure every model at every temperature; print, draw and write what comes out."""
    torch.manual_seed(cfg.seed)
    arms, timing, start = [], dict(run["timing"]), time.time()
    for name in (*LIKELIHOOD, "gan_mle", "gan") + (("reranked",) if cfg.rounds else ()):
        model = new_model(run, cfg, "ref" if name == "reranked" else name)
        disc = new_disc(run, cfg, "ref") if name == "reranked" else None
        bar = tqdm(cfg.temperatures, name, disable=None)
        rows = [measure(model, T, data, cfg, disc) for T in bar]
        arms += [{"name": name, **row} for row, _ in rows]
        print(f"\n{name} says" + (", * what the grammar could not:" if data.grammar else ":"))
        for line in sorted(rows[0][1][:10], key=lambda s: s not in data.seen):
            mark = "*" if data.grammar and data.grammar.logp(line) == -math.inf else " "
            print("  in training" if line in data.seen else "  new        ", mark, line)
    show_report(arms, out)
    timing["measure_s"] = time.time() - start
    timing["total_s"], start = sum(timing.values()), time.time()
    x = sample(new_model(run, cfg, "gan"), 1000, cfg.temperature)
    timing["sample_tokens_per_s"] = real_tokens(x).sum().item() / (time.time() - start)
    tokens = real_tokens(data.messy[0]).sum(1).mean().item() * cfg.batch_size * cfg.pretrain_steps
    timing["pretrain_tokens_per_s"] = tokens / timing["pretrain_s"]
    timing["peak_memory_mb"] = peak_memory_mb(cfg.device)
    print("\n" + "  ".join(f"{key} {value:.0f}" for key, value in timing.items()))
    write("".join(line + "\n" for line in to_lines(x, data.symbols)), out / "samples.txt")
    result = dict(config=run["config"], versions=dict(python=sys.version, torch=torch.__version__),
                  entropy=-data.truth[1].mean() if data.grammar else None, arms=arms,
                  discriminator=run["discriminator"], timing=timing)
    write(json.dumps(result, indent=1), out / "report.json")


def print_samples(cfg, path):
    run = load(path, cfg.device)
    saved, symbols = Config(**run["config"] | {"device": cfg.device}), run["symbols"]
    prompt = tokens_of(cfg.prompt, saved.level)[:saved.context]
    if unknown := [t.strip() for t in prompt if t not in symbols]:
        fail(f"--prompt {cfg.prompt}: {unknown[0]!r} is not in the text that was trained on")
    torch.manual_seed(cfg.seed)
    model = new_model(run, saved, [n for n in ("mle", "sft", "gan") if n in run["models"]][-1])
    x = sample(model, cfg.samples, cfg.temperature, [symbols.index(t) for t in prompt])
    print("\n".join(to_lines(x, symbols)))


@one_line_errors
def main(argv=None):
    cfg = flags_of(Config, __doc__.split("\n")[0], argv)
    out, path = Path(cfg.out), Path(cfg.out, "model.pt")
    if cfg.samples:
        return print_samples(cfg, path)
    join_torchrun(cfg.device)
    data, first = Data(cfg), ranks()[0] == 0  # of the processes that torchrun started
    if first and path.exists() and not cfg.resume:
        fail(f"--out {out}: there is a run already; expected --resume, or another folder")
    out.mkdir(parents=True, exist_ok=True)
    run = dict(config=asdict(cfg), symbols=data.symbols, models={}, discriminator=[], timing={})
    run = load(path, cfg.device, run) if cfg.resume and path.exists() else run
    save(run, path)  # from now on the folder is taken
    train(run, cfg, data, path)
    leave_torchrun()
    if first:
        report(run, cfg, data, out)


if __name__ == "__main__":
    main()
