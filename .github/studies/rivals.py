"""Everything cheap, from the same mle: `python .github/studies/rivals.py 100 101 102`

D is the one of the finished run in out_SEED; the rows have the seconds."""
from common import *

from copy import deepcopy

BOOK = "rivals.jsonl"
BEYOND = [(heat, min_p) for heat in (1.3, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
          for min_p in (0.0, 0.05, 0.1, 0.2)]  # decodings
SCALE = 1.0  # of all numbers of steps and samples: smaller in the test


def log_w(D, G, x):
    """D's logit of whole sentences, (N, T+1) ids -> (N,): log of the weight D / (1 - D)"""
    return (in_chunks(D.logp, x) - in_chunks(G.logp, x)).sum(1)


class Reranked:
    """One of k samples, with probability w / (sum of the k weights): it samples x with
    probability k q(x) E[w(x) / (w(x) + the weights of k - 1 others)]."""

    def __init__(self, G, D, k):
        self.G, self.D, self.k = G, D, k

    def sample(self, n, temperature=1.0, min_p=0.0):
        x = self.G.sample(n * self.k, temperature, min_p)
        w = log_w(self.D, self.G, x)
        self.others = w[torch.randint(len(w), (1000, self.k - 1))].logsumexp(1)
        first = torch.arange(0, n * self.k, self.k)
        return x[first + w.view(n, self.k).softmax(1).multinomial(1)[:, 0]]

    def logp(self, x, temperature=1.0, min_p=0.0):
        w = log_w(self.D, self.G, x)
        share = (w[:, None] - self.others).sigmoid().mean(1).log() + math.log(self.k)
        logq = self.G.logp(x, temperature, min_p).detach()
        return logq + share[:, None] * is_last(x)


def again(mle, data, cfg, text, steps, val=None):
    """mle, trained by likelihood on another text"""
    model, old = deepcopy(mle), (data.train, data.val)
    data.train, data.val = text, data.val if val is None else val
    train_mle(model, data, cfg, int(steps * SCALE))
    data.train, data.val = old
    return model


def chosen_samples(mle, D, data, cfg, times=3):
    """Likelihood on its own samples, each one of four by D: stopped by samples of that kind."""
    model = mle
    for _ in range(times):
        x = Reranked(model, D, 4).sample(int(22_000 * SCALE))
        val = len(x) // 11
        model = again(model, data, cfg, x[val:], 3000, x[:val])
    return model


def selected_text(mle, D, data, cfg):
    """Likelihood on the half of the text that D likes best in comparison to G, two rounds"""
    model = mle
    for _ in range(2):
        w, v = log_w(D, model, data.train), log_w(D, model, data.val)
        model = again(model, data, cfg, data.train[w >= w.median()], 4000,
                      data.val[v >= w.median()])
    return model


KINDS = ["if", "either", "when", "both", "neither", "there", "says that", "self", "?", "that",
         "by", "other"]


def kind_of(line):
    words = line.split()
    for kind in KINDS[:6]:
        if words and words[0] == kind:
            return kind
    if re.search(r"\b(says?|thinks?|knows?|hopes?) that\b", line):
        return "says that"
    if re.search(r"\b\w+(self|selves)\b", line):
        return "self"
    for kind in ("?", "there", "that", "by"):
        if kind in words:
            return kind
    return "other"


def shares(lines):
    return {kind: np.mean([kind_of(line) == kind for line in lines]) for kind in KINDS}


def same_kinds(mle, G, data, cfg):
    """Likelihood on a text whose kinds of sentences have the shares of the game's samples"""
    wanted = shares(lines_of(G.sample(8000), data.symbols))

    def drawn(x, n):
        kinds = [kind_of(line) for line in lines_of(x, data.symbols)]
        there = {kind: max(1, kinds.count(kind)) for kind in KINDS}
        weight = torch.tensor([wanted[kind] / there[kind] for kind in kinds])
        return x[weight.multinomial(n, replacement=True)]
    return again(mle, data, cfg, drawn(data.train, 100_000), 9000, drawn(data.val, 2000))


def loss_truncation(mle, data, cfg, share, steps=9000):
    """Kang and Hashimoto 2020: without the share of each batch that is least likely"""
    model = deepcopy(mle)
    adam = adamw(model)
    for step in trange(int(steps * SCALE), disable=None):
        logp = model.logp(trim(batch(data.train, cfg.batch_size))).sum(1)
        keep = logp.detach() >= logp.detach().quantile(share)
        (-(logp * keep).sum() / keep.sum()).backward()
        update(model, adam, step, steps, cfg.lr)
    return model


def distilled(mle, D, data, cfg, steps=4000):
    """On-policy distillation (GKD, reverse KL): D's advice for each next token of G's samples"""
    model = deepcopy(mle)
    adam = adamw(model)
    for step in trange(int(steps * SCALE), disable=None):
        if step % 16 == 0:
            samples = model.sample(1024)
        x = trim(batch(samples, cfg.batch_size))
        logq = model(x[:, :-1])[0].log_softmax(-1)
        with torch.no_grad():
            logp = D(x[:, :-1])[0].log_softmax(-1)
        kl = (logq.exp() * (logq - logp)).sum(-1) * token_mask(x)
        kl.sum(1).mean().backward()
        update(model, adam, step, steps, cfg.g_lr)
    return model


class LSTM(GPT):
    """An LSTM of G's width in the place of attention"""

    def __init__(self, V, context, layers, width):
        super().__init__(V, context, 0, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)

    def forward(self, x, t=0, cache=None):
        h = self.token(x) + self.position.weight[t:t + x.shape[1]]
        past = [part.transpose(0, 1).contiguous() for part in cache[0]] if cache else None
        h, state = self.lstm(h, past)
        return self.ln(h) @ self.token.weight.T, [[part.transpose(0, 1) for part in state]]


def larger(make, data, cfg, steps):
    torch.manual_seed(cfg.seed)
    model = make(len(data.symbols), data.context)
    train_mle(model, data, cfg, int(steps * SCALE))
    return model


def rivals(mle, G, D, data, cfg):
    """name -> a model; each is made when it is called"""
    return {
        "gan": lambda: G,
        "d": lambda: D,
        "mle, decodings beyond the grid": lambda: mle,
        "mle, four times its steps": lambda: again(mle, data, cfg, data.train, 18_000),
        "one of 2 by D": lambda: Reranked(mle, D, 2),
        "one of 4 by D": lambda: Reranked(mle, D, 4),
        "one of 8 by D": lambda: Reranked(mle, D, 8),
        "own samples chosen by D, three times": lambda: chosen_samples(mle, D, data, cfg),
        "text selected by D": lambda: selected_text(mle, D, data, cfg),
        "text with the game's kinds": lambda: same_kinds(mle, G, data, cfg),
        "loss truncation 0.1": lambda: loss_truncation(mle, data, cfg, 0.1),
        "loss truncation 0.4": lambda: loss_truncation(mle, data, cfg, 0.4),
        "on-policy distillation from D": lambda: distilled(mle, D, data, cfg),
        "window 3": lambda: larger(lambda V, T: GPT(V, T, 1, 32, 3), data, cfg, 15_000),
        "two layers": lambda: larger(lambda V, T: GPT(V, T, 2, 32, 2), data, cfg, 12_000),
        "LSTM": lambda: larger(lambda V, T: LSTM(V, T, 1, 32), data, cfg, 15_000)}


def by_kind(G, D, data, decoding, n=8000):
    """For each kind of sentence: share of the samples and how many are right, of G and D"""
    rows = {}
    for name, model in (("gan", G), ("d", D)):
        lines = lines_of(model.sample(n, *decoding), data.symbols)
        right = data.logp(lines) > -math.inf
        kinds = np.array([kind_of(line) for line in lines])
        rows[name] = {kind: [float(np.mean(kinds == kind)), float(right[kinds == kind].mean())]
                      for kind in KINDS if (kinds == kind).sum() >= 20}
    common = rows["gan"].keys() & rows["d"].keys()
    total = sum(rows["gan"][kind][0] for kind in common)
    rows["d at gan's kinds"] = sum(rows["gan"][k][0] * rows["d"][k][1] for k in common) / total
    rows["gan at them"] = sum(rows["gan"][k][0] * rows["gan"][k][1] for k in common) / total
    rows["gan errs less in"] = sum(rows["gan"][k][1] >= rows["d"][k][1] for k in common)
    rows["of kinds"] = len(common)
    return rows


def main(seeds, flags=(), out="out_{}", only=None, book=BOOK):
    book = Book(book)
    for seed in seeds:
        cfg, data, mle = start(seed, *flags, out=out)
        V, T = len(data.symbols), data.context
        G, D = deepcopy(mle), GPT(V, T, cfg.layers, cfg.d_width)
        phase("gan", [G, D], train_gan, data, cfg)  # of the finished run

        def due(name):
            return not book.has(rival=name, seed=seed) and (not only or name in only)
        torch.manual_seed(seed)
        for name, decoding in (("kinds", (1.0, 0.0)), ("kinds, cooled", (0.9, 0.005))):
            if due(name):
                book.write(rival=name, seed=seed, **by_kind(G, D, data, decoding))
        for name, make in rivals(mle, G, D, data, cfg).items():
            if not due(name):
                continue
            torch.manual_seed(zlib.crc32(f"{name} {seed}".encode()))
            began = time.monotonic()
            model = make()
            seconds = time.monotonic() - began
            decodings = BEYOND if "beyond" in name else None
            book.write(rival=name, seed=seed, seconds=seconds,
                       **flat(best(model, data, cfg, decodings)))


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [100, 101, 102])
