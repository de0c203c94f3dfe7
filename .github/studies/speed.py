"""Speed, in milliseconds and ratios of one run: `python .github/studies/speed.py`"""
from common import *

from dataclasses import replace


LEAST = 1.0  # seconds per figure


def ms(work):
    """Milliseconds per call, after two calls to warm up"""
    work(), work()
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < LEAST:
        work()
        n += 1
    return 1000 * (time.perf_counter() - start) / n


def setup(*flags):
    cfg = parse_flags(["--sentences", "8000", "--eval_samples", "500", "--device", "cpu", *flags])
    torch.set_num_threads(cfg.threads)
    data = Data(read(cfg.data or cfg.grammar), cfg)
    torch.manual_seed(0)
    V, T = len(data.symbols), data.context
    return cfg, data, GPT(V, T, cfg.layers, cfg.width, cfg.window), GPT(V, T, cfg.layers, cfg.d_width)


def likelihood_step(model, data, cfg, cut=trim):
    adam = adamw(model)

    def step():
        likelihood_loss(model.logp(cut(batch(data.train, cfg.batch_size)))).backward()
        update(model, adam, 100, 10_000, 1e-4)
    return step


def parts(cfg, data, G, D):
    """name -> milliseconds of each part of the default"""
    adam, half = adamw(D), cfg.batch_size // 2
    fake = batch(data.train, cfg.g_samples)
    fake = fake[token_mask(fake).sum(1).argsort()]

    def d_step():
        loss_of_d(D, G, batch(data.train, half), batch(fake, half)).backward()
        update(D, adam, 100, 10_000, 1e-4)

    def gradient():
        for part in fake.split(ROWS):
            part = trim(part)
            policy_gradient_loss(G.logp(part), token_mask(part)).backward()
        G.zero_grad()
    return {"a likelihood step of G": ms(likelihood_step(G, data, cfg)),
            "a step of D": ms(d_step),
            "a round's samples": ms(lambda: G.sample(cfg.g_samples)),
            "a round's verdicts (log q and log p_D)": ms(
                lambda: (in_chunks(G.logp, fake), in_chunks(D.logp, fake))),
            "a round's gradient of G": ms(gradient),
            "one measurement of 1,000 samples": ms(
                lambda: measure(G, (1.0, 0.0), 1, data, replace(cfg, eval_samples=1000))),
            "a likelihood step, not trimmed": ms(likelihood_step(G, data, cfg, lambda x: x))}


def uncached(G, n):
    x = torch.zeros(n, 1, dtype=torch.long)
    for t in range(G.context):
        with torch.no_grad():
            logits, _ = G(x)
        x = torch.cat([x, logits[:, -1].softmax(-1).multinomial(1)], 1)


def rollouts(G, D, n=64, k=16):
    """A round as SeqGAN's: each prefix of n sentences is completed k times, and judged"""
    x = G.sample(n)
    for t in range(1, int(token_mask(x).sum(1).max())):
        for row in x[:, 1:1 + t][::n]:  # all prefixes cost the same: one row, as often as n
            y = G.sample(n * k, prompt=row.tolist())
        in_chunks(D.logp, y), in_chunks(G.logp, y)


def growth(cases=(["--width", "64"], ["--width", "128"], ["--window", "0"], ["--layers", "2"],
                  ["--level", "char"])):
    for flags in cases:
        yield " ".join(flags), setup(*flags)


def main():
    cfg, data, G, D = setup()
    found = parts(cfg, data, G, D)
    for name, figure in found.items():
        print(f"{name}: {figure:.1f} ms")
    print(f"samples without the cache: {ms(lambda: uncached(G, 1024)):.0f} ms")
    print(f"64 sentences by rollouts of 16: {ms(lambda: rollouts(G, D)):.0f} ms")
    base = found["a likelihood step of G"], found["a step of D"], found["a round's samples"]
    for name, (cfg, data, G, D) in growth():
        more = parts(cfg, data, G, D)
        new = (more["a likelihood step of G"], more["a step of D"], more["a round's samples"])
        print(f"{name}: likelihood, D, samples x", *(f"{a / b:.2f}" for a, b in zip(new, base)))


if __name__ == "__main__":
    main()
