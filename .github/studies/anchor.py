"""Is it that D is told log q, or would any anchor in G's reward do?

    python .github/studies/anchor.py 1 2            # tuning: all strengths
    python .github/studies/anchor.py 100 101 102    # the chosen ones

D is SeqGAN's CNN.  In `CNN + log q_start - log q` the anchor is in D's loss and in G's reward.
Here it is in one of them, or the reward gets another: a KL penalty to G's start, an entropy
bonus.  The games of a seed share one head start for each of the two losses of D."""
from common import *
from ladder import Alone

from copy import deepcopy

BOOK = "anchor.jsonl"
KL = {f"untold, KL penalty {b}": (False, False, b, 0.0) for b in (0.03, 0.1, 0.3, 1.0)}
ENTROPY = {f"untold, entropy bonus {b}": (False, False, 0.0, b) for b in (0.01, 0.03, 0.1, 0.3)}
# name -> (is D's loss told, is G's reward told, strength of the KL penalty, of the bonus)
GAMES = {"untold, reward told": (False, True, 0.0, 0.0),
         "told, reward untold": (True, False, 0.0, 0.0), **KL, **ENTROPY}
CHOSEN = ["untold, reward told", "told, reward untold", "untold, KL penalty 0.1"]  # by 1, 2


def learn_d(D, adam, G, mle, fake, i, told, data, cfg):
    half = cfg.batch_size // 2
    for _ in range(cfg.d_steps):
        x = trim(torch.cat([batch(data.train, half), batch(fake, half)]))
        s = D.logp(x)  # f, at the last token
        if told:
            s = s + in_chunks(mle.logp, x) - in_chunks(G.logp, x)
        is_real = torch.arange(len(x)) < half
        discriminator_loss(s.cumsum(1), is_real, is_last(x)).backward()
        update(D, adam, i, cfg.head_start + cfg.rounds, cfg.d_lr)


def head_start(D, mle, told, data, cfg):
    adam = adamw(D)
    for i in trange(cfg.head_start, disable=None):
        learn_d(D, adam, mle, mle, mle.sample(cfg.g_samples), i, told, data, cfg)
    return D, adam


def play(G, D, adam_d, mle, data, cfg, loss_told, reward_told, kl, entropy):
    """train_gan() after the head start, with the anchors"""
    adam_g = adamw(G)
    for i in trange(cfg.rounds, disable=None):
        fake = G.sample(cfg.g_samples)
        fake = fake[token_mask(fake).sum(1).argsort()]
        learn_d(D, adam_d, G, mle, fake, cfg.head_start + i, loss_told, data, cfg)
        f, logq, logq_start = (in_chunks(model.logp, fake) for model in (D, G, mle))
        s, mask = f + logq_start - logq if reward_told else f, token_mask(fake)
        rewards = token_rewards(s.cumsum(1), mask, cfg.reward)
        A = advantages(rewards + kl * (logq_start - logq) - entropy * logq, mask, cfg.lam)
        for part, a in zip(fake.split(ROWS), A.split(ROWS)):
            part = trim(part)
            loss = policy_gradient_loss(G.logp(part), a[:, :part.shape[1] - 1])
            (loss * len(part) / len(fake)).backward()
        update(G, adam_g, i, cfg.rounds, cfg.g_lr)


def main(seeds, flags=(), only=None, out="out_{}", book=BOOK):
    book = Book(book)
    for seed in seeds:
        cfg, data, mle = start(seed, *flags, out=out)
        begun = {}
        for name, (loss_told, *anchors) in GAMES.items():
            if book.has(game=name, seed=seed) or only and name not in only:
                continue
            began = time.monotonic()
            if loss_told not in begun:
                torch.manual_seed(seed)
                begun[loss_told] = head_start(Alone(mle, 96), mle, loss_told, data, cfg)
            G, (D, adam) = deepcopy(mle), deepcopy(begun[loss_told])
            torch.manual_seed(zlib.crc32(f"gan {seed}".encode()))
            play(G, D, adam, mle, data, cfg, loss_told, *anchors)
            seconds = time.monotonic() - began
            book.write(game=name, seed=seed, seconds=seconds, **look(G, data),
                       **flat(best(G, data, cfg)))


if __name__ == "__main__":
    seeds = [int(seed) for seed in sys.argv[1:]] or [100, 101, 102]
    main(seeds, only=None if {*seeds} <= {1, 2} else CHOSEN)
