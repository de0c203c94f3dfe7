"""The map: where does the game help?  `python .github/studies/map.py 100`

Each cell: a generator and an amount of text; mle, then the game with a GPT that has learned
by likelihood first, since from little text it learns too little in the game.  (There is no
`continued` here: mle stops early, or its steps are many.)"""
from common import *

from copy import deepcopy

BOOK = "map.jsonl"
GENERATORS = [(1, 32, 2), (1, 64, 3), (2, 64, 3), (2, 64, 5), (2, 64, 0)]  # layers, width, window
TEXTS = [4_000, 16_000, 160_000]
STEPS = {4_000: 1500, 16_000: 3000, 160_000: 6000}


def name_of(generator):
    return "{}x{} window {}".format(*generator)


def cell(seed, generator, sentences, book, flags=()):
    name = name_of(generator)
    if book.has(cell=name, sentences=sentences, seed=seed):
        return
    shape = [x for flag, value in zip(("--layers", "--width", "--window"), generator)
             for x in (flag, str(value))]
    cfg, data, mle = start(
        seed, *shape, "--sentences", str(sentences), "--mle_steps", str(STEPS[sentences]), *flags,
        out="map_{}_" + "_".join(map(str, (*generator, sentences))))
    gan = deepcopy(mle)
    torch.manual_seed(cfg.seed)
    D = GPT(len(data.symbols), data.context, 2, cfg.d_width)
    began = time.monotonic()
    record = phase("gan", [gan, D], train_gan, data, cfg)
    seconds = time.monotonic() - began
    rows = {arm: flat(best(model, data, cfg)) for arm, model in (("mle", mle), ("gan", gan))}
    d = measure(D, (1.0, 0.0), 1, data, cfg)[0]["score"]
    book.write(cell=name, sentences=sentences, seed=seed, seconds=seconds,
               played=bool(record["curves"]), ratio=rows["gan"]["js"] / rows["mle"]["js"],
               mle_js=rows["mle"]["js"], gan_js=rows["gan"]["js"], d_js_plain=d,
               mle_valid=rows["mle"]["valid"], gan_valid=rows["gan"]["valid"])


def main(seeds, flags=("--head_start", "30", "--d_mle_steps", "2000"), book=BOOK):
    book = Book(book)
    for seed in seeds:
        for sentences in TEXTS:
            for generator in GENERATORS:
                cell(seed, generator, sentences, book, flags)


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [100])
