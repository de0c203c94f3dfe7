"""ladder.png, map.png and molecules.png from the rows (.jsonl) where it is run:
`cd .github/studies; python pictures.py ..`"""
from common import *
from map import GENERATORS, name_of

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

RUNGS = {  # rung -> what the picture calls it
    "f": "a transformer's number f(x)\nfor each prefix",
    "CNN": "SeqGAN's CNN\nfor the sentence",
    "mle": "NO GAME (likelihood)",
    "untold, KL penalty 0.1": "SeqGAN's CNN, not told,\nand a KL penalty for G",
    "CNN + log q_start - log q": "SeqGAN's CNN,\ntold log q",
    "GPT": "a second GPT,\ntold log q (the default)"}


def rows(path, **key):
    return [row for row in Book(path).rows if key.items() <= row.items()]


def ladder(folder, book="ladder.jsonl", more="anchor.jsonl"):
    figure = Figure(figsize=(6, 4.6), layout="constrained")
    axis = figure.subplots()
    for place, rung in enumerate(RUNGS):
        js = [row["js"] for row in rows(book, rung=rung)]
        js += [row["js"] for row in rows(more, game=rung) if row["seed"] > 2]  # not tuning
        if js:
            color = "0.75" if rung == "mle" else "0.35"
            axis.barh(place, np.mean(js), color=color, height=0.62)
            axis.plot(js, [place] * len(js), "o", color="white", markeredgecolor="black", ms=5)
            axis.text(1.06, place, f"{np.mean(js):.2f}", va="center", fontsize=13)
    axis.set_yticks(range(len(RUNGS)), RUNGS.values(), fontsize=12)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.18)
    axis.set_xticks([0, 0.5, 1])
    axis.tick_params(axis="x", labelsize=12)
    axis.set_xlabel("distance of G from the true language (JS)", fontsize=12)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(folder, "ladder.png"), dpi=130)


def world(folder, book="map.jsonl"):
    found = {}
    for row in rows(book):
        found.setdefault((row["cell"], row["sentences"]), []).append(row)
    seen = {cell for cell, _ in found}
    cells = [name for name in map(name_of, GENERATORS) if name in seen]
    texts = sorted({n for _, n in found})
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axis = figure.subplots()
    for cell, n in {(cell, n) for cell in cells for n in texts} - set(found):
        axis.text(texts.index(n), cells.index(cell), "not run", ha="center", va="center",
                  fontsize=11, color="0.5")
    for (cell, n), some in found.items():
        ratio = np.mean([row["ratio"] for row in some])
        played = any(row["played"] for row in some)
        x, y = texts.index(n), cells.index(cell)
        gray = 0.35 + 0.6 * min(1, max(0, (ratio - 0.5) / 0.6)) if played else 1
        axis.add_patch(Rectangle(
            (x - 0.5, y - 0.5), 1, 1, facecolor=str(gray), edgecolor="white"))
        axis.text(x, y, f"{ratio:.2f}" if played else "nothing\nto teach", fontsize=13,
                  ha="center", va="center", color="white" if gray < 0.6 else "black")
    axis.set_xticks(range(len(texts)), [f"{n:,}" for n in texts], fontsize=12)
    axis.set_yticks(range(len(cells)), [c.replace(" window 0", ", all").replace(
        " window ", ", ") for c in cells], fontsize=12)
    axis.set_xlim(-0.5, len(texts) - 0.5)
    axis.set_ylim(len(cells) - 0.5, -0.5)
    axis.set_xlabel("sentences of training text", fontsize=12)
    axis.set_ylabel("G: layers x channels, a layer's window", fontsize=12)
    figure.savefig(Path(folder, "map.png"), dpi=130)


ARMS = {"mle": ("o", "likelihood", "white"), "continued": ("s", "more likelihood", "0.75"),
        "gan": ("^", "the game", "black"), "reranked": ("x", "one of four by D", "black"),
        "truncated-0.4": ("D", "likelihood, truncated loss", "0.5")}


def molecules(folder, book="molecules.jsonl"):
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axis = figure.subplots()
    for arm, (marker, label, color) in ARMS.items():
        some = rows(book, arm=arm)
        edge = {} if marker == "x" else {"edgecolors": "black"}
        axis.scatter([row["valid"] for row in some], [row["fcd"] for row in some], s=38,
                     marker=marker, label=label, color=color, linewidths=1.2, **edge)
    axis.set_xlabel("share of valid formulas (right: better)", fontsize=12)
    axis.set_ylabel("distance from real ones, FCD (low: better)", fontsize=12)
    axis.set_ylim(top=14)  # room for the legend
    axis.tick_params(labelsize=12)
    axis.legend(fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(folder, "molecules.png"), dpi=130)


def main(folder=".."):
    if Path("ladder.jsonl").exists():
        ladder(folder)
    if Path("map.jsonl").exists():
        world(folder)
    if Path("molecules.jsonl").exists():
        molecules(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
