"""Cheap rivals of the game on real strings, beside a finished strings.py of the same arguments:

    python .github/studies/strings_rivals.py TEXT FOLDER SEED [flags of gan_lm.py]

Loss truncation, from the same mle; and likelihood alone for a G that sees one token more."""
from common import *
from rivals import larger, loss_truncation
from strings import write


def main(text, folder, seed, *flags, n=16_000, grid=((1.0, 0.0), (0.8, 0.0)), steps=8000,
         shares=(0.1, 0.4), wider=True):
    cfg, data, mle = start(int(seed), "--data", text, "--seed", seed, *flags, out=folder)
    for share in shares:
        torch.manual_seed(cfg.seed)
        model = loss_truncation(mle, data, cfg, share, steps)
        write(f"truncated-{share}", model, data, cfg, n, grid)
    if wider and cfg.window:  # 0 sees all already
        model = larger(lambda V, T: GPT(V, T, cfg.layers, cfg.width, cfg.window + 1), data, cfg,
                       cfg.mle_steps)
        write("window-plus-1", model, data, cfg, n, grid)


if __name__ == "__main__":
    main(*sys.argv[1:])
