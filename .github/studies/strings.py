"""Real strings, judged outside: writes what mle, continued and gan sample at each decoding
into FOLDER, a file each, for a judge such as RDKit or a parser.

    python .github/studies/strings.py TEXT FOLDER SEED [flags of gan_lm.py]

With --disc gpt D learns by likelihood first (--d_mle_steps).  `reranked`: one of four by D."""
from common import *
from rivals import Reranked

from copy import deepcopy

GRID = [(T, min_p) for T in (1.0, 0.9, 0.8, 0.7, 0.6) for min_p in (0.0, 0.05)]
GRID += [(1.0, 0.1), (1.0, 0.2)]


def write(name, model, data, cfg, n, grid=GRID):
    for decoding in grid:
        torch.manual_seed(cfg.seed)
        parts = [model.sample(min(1000, n), *decoding) for _ in range(max(1, n // 1000))]
        lines = [line for x in parts for line in lines_of(x, data.symbols)]
        file = Path(cfg.out, "{}_{}_{}.txt".format(name, *decoding))
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(text, folder, seed, *flags, n=5000, grid=GRID):
    argv = ["--data", text, "--seed", seed, *flags]
    cfg, data, mle = start(int(seed), *argv, out=folder)
    write("mle", mle, data, cfg, n, grid)
    gan, continued = deepcopy(mle), deepcopy(mle)
    torch.manual_seed(cfg.seed)
    V, T = len(data.symbols), data.context
    D = CNN(mle, cfg.d_width) if cfg.disc == "cnn" else GPT(V, T, cfg.layers, cfg.d_width)
    phase("gan", [gan, D], train_gan, data, cfg)
    write("gan", gan, data, cfg, n, grid)
    temperatures = [d for d in grid if d[1] == 0]
    write("reranked", Reranked(mle, D, 4), data, cfg, n, temperatures[::2])  # it is slow
    if cfg.continued_steps:
        phase("continued", [continued], train_mle, data, cfg, cfg.continued_steps)
        write("continued", continued, data, cfg, n, grid)


if __name__ == "__main__":
    main(*sys.argv[1:])
