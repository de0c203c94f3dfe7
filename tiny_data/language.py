"""The known language: sentences from a weighted grammar, and the exact probability of any sentence.

As a program it makes a text to learn from, the same bytes for the same numbers:

    python tiny_data/language.py KIND FOLDER [--messy 18000] [--curated 16000] [--seed 0]

FOLDER/curated.txt gets sentences of grammar.txt; FOLDER/KIND.txt gets others, 40 % of them with one
error that the grammar cannot say.  KIND is `mistakes` (a word replaced by its sibling: runs by run,
himself by herself; the siblings stand in grammar.txt), `noise` (two neighbours swapped, or a word
dropped, doubled or replaced by any other) or `clean` (no error).  Nothing is overwritten."""
import argparse
import math
import random
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Grammar:
    """A weighted context-free grammar.  One rule a line, `S -> 4 NP VP . | 1 if S then S`:
    alternatives of a weight and symbols.  What has no rule is a word, the first symbol is the
    start, # begins a comment; `#~ runs run` names words, or classes of like order, as siblings.
    Weights are normalised within a rule.  A fault ends the program and names its line or symbol."""
    def __init__(self, text, name="grammar"):
        self.rules = {}  # symbol -> [(probability, [symbol, ...]), ...]
        lines = text.strip("\ufeff").split("\n")
        for number, line in enumerate(lines, 1):
            if line := line.split("#")[0].strip():
                self.read_rule(line, f"{name}, line {number}")
        if not self.rules:
            fail(f"{name}: no rule in it; expected lines such as 'S -> 3 dogs VP | 1 cats VP'")
        self.start = next(iter(self.rules))
        used = {s for rule in self.rules.values() for _, symbols in rule for s in symbols}
        self.words = used - self.rules.keys()
        self.first = {word: {word} for word in self.words}  # what an expansion can begin with
        self.check_that_it_ends(name)
        self.siblings = {word: [] for word in self.words}  # what a mistake puts in its place
        for group in (line[2:].split() for line in lines if line.startswith("#~")):
            classes = [[s for _, [s] in self.rules[g]] if g in self.rules else [g] for g in group]
            for words in zip(*classes):
                for word in words:
                    self.siblings[word] += [w for w in words if w != word]

    def read_rule(self, line, where):
        symbol, _, alternatives = (part.strip() for part in line.partition("->"))
        try:
            rule = [(float(w), s) for w, *s in map(str.split, alternatives.split("|"))]
        except ValueError:
            rule = []
        if not rule or "->" in alternatives or not all(0 < w < math.inf and s for w, s in rule):
            fail(f"{where}: {line[:40]!r}: expected 'symbol -> weight words | weight words', "
                 "weights above 0")
        if len(symbol.split()) != 1 or symbol in self.rules:
            fail(f"{where}: {symbol!r}: expected one symbol, and one rule for it")
        total = sum(w for w, _ in rule)
        self.rules[symbol] = [(w / total, symbols) for w, symbols in rule]

    def check_that_it_ends(self, name):
        self.first |= {symbol: {s[0] for _, s in rule} for symbol, rule in self.rules.items()}
        ends = dict.fromkeys(self.words, 1.0)  # the probability that an expansion comes to an end
        for _ in range(500):
            for symbol, rule in self.rules.items():
                self.first[symbol] |= set().union(*(self.first[s] for s in self.first[symbol]))
                ends[symbol] = sum(w * math.prod(ends.get(x, 0.0) for x in s) for w, s in rule)
        for symbol in self.rules:
            if ends[symbol] < 0.99 or symbol in self.first[symbol]:
                fail(f"{name}: {symbol!r} never ends, or begins with itself; expected rules that "
                     "lead to words")

    def sample(self, rng):
        """One sentence, drawn with `rng`, a random.Random."""
        words, stack = [], [self.start]
        while stack:
            symbol = stack.pop()  # the leftmost one
            if symbol in self.words:
                words.append(symbol)
            else:
                weights, alternatives = zip(*self.rules[symbol])
                stack += reversed(rng.choices(alternatives, weights)[0])
        return " ".join(words)

    def logp(self, sentence):
        """Exact log p in nats, summed over all parses; -inf for what the grammar cannot say."""
        words = sentence.split()

        @lru_cache(None)
        def ends(symbol, i):  # {j: probability that the symbol expands to words[i:j]}
            if symbol in self.words:
                return {i + 1: 1.0}
            total = {}
            for probability, symbols in self.rules[symbol]:
                reached = {i: probability}
                for s in symbols:
                    step = {}
                    for j, so_far in reached.items():
                        if j < len(words) and words[j] in self.first[s]:
                            for k, inner in ends(s, j).items():
                                step[k] = step.get(k, 0.0) + so_far * inner
                    reached = step
                for j, found in reached.items():
                    total[j] = total.get(j, 0.0) + found
            return total

        p = ends(self.start, 0).get(len(words), 0.0) if words else 0.0
        return math.log(p) if p else -math.inf

    def logps(self, lines):
        return np.array([self.logp(line) for line in lines])

    def with_error(self, line, kind, rng):
        """The line with one error, of the kind named above, that the grammar cannot say."""
        for _ in range(1000):
            words = line.split()
            i = rng.randrange(len(words))
            if kind == "mistakes":
                words[i] = rng.choice(self.siblings[words[i]] or [words[i]])
            else:
                other = rng.choice(sorted(self.words))
                errors = [words[i:i + 2][::-1], [], [words[i]] * 2, [other]]
                error = rng.randrange(4)
                words[i:i + (2 if error == 0 else 1)] = errors[error]
            if words and self.logp(" ".join(words)) == -math.inf:
                return " ".join(words)
        fail(f"{line[:40]!r}: found no error of the kind {kind} to make in it")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=["mistakes", "noise", "clean"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--messy", type=int, default=18000, help="lines of KIND.txt")
    parser.add_argument("--curated", type=int, default=16000, help="lines of curated.txt")
    parser.add_argument("--errors", type=float, default=0.4, help="share of lines with an error")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    grammar = Grammar(Path(__file__).with_name("grammar.txt").read_text(encoding="utf-8"))
    rng = random.Random(args.seed)
    curated = [grammar.sample(rng) for _ in range(args.curated)]
    messy = [grammar.sample(rng) for _ in range(args.messy)]
    if args.kind != "clean":
        messy = [grammar.with_error(line, args.kind, rng) if rng.random() < args.errors else line
                 for line in messy]
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("curated", curated), (args.kind, messy)):
        with open(args.folder / f"{name}.txt", "x", encoding="utf-8", newline="\n") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
