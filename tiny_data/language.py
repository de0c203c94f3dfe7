"""The known language: sentences from a weighted grammar, and the exact probability of any sentence.

As a program it makes messy.txt and curated.txt, the same bytes for the same numbers:

    python tiny_data/language.py FOLDER [--seed 0] [--messy 20000] [--curated 4000] [--text FILE]

curated.txt gets sentences of grammar.txt, or with --text the lines of a text of yours; messy.txt
gets others of the same kind, of which 40 % carry one error: two neighbouring words swapped, or a
word dropped, doubled or replaced.  Files that are there already are left as they are."""
import argparse
import math
import random
import re
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is run as a program
from tiny_data.plumbing import fail, one_line_errors  # noqa: E402


def read(path):
    """The text of a UTF-8 file, with or without a byte order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        fail(f"{path}: expected a UTF-8 text file ({error})")


def read_lines(path):
    """Lines of a text file; blank ones are skipped, white space is folded."""
    lines = [" ".join(line.split()) for line in read(path).split("\n") if line.split()]
    if len(set(lines)) < 50:
        fail(f"{path}: {len(set(lines))} different lines; expected 50 or more, one sequence a line")
    return lines


def tokens_of(line, level):
    """Tokens of a line; a word carries the space before it, so that joining them is exact."""
    return list(line) if level == "char" else re.findall(r" ?[\w'-]+| ?\S", " " + line)


def load_texts(paths, grammar, cfg):
    """Two files -> vocabulary, the set of all training lines, and [train, val, test] of each.

    The lines are shuffled by cfg.seed; a tenth is for testing, a tenth (at most 1000) for
    validation.  A held-out line that is in a training split too is left out.  The vocabulary is
    that of both files and the grammar; its first entry, "", is the end.  Raises UserError."""
    texts, seen = [], set()
    for lines in map(read_lines, paths):
        random.Random(cfg.seed).shuffle(lines)
        n, v = len(lines) // 10, min(len(lines) // 10, 1000)
        texts.append([lines[n + v:], lines[:v], lines[v:n + v]])
        seen |= set(lines[n + v:])
    lines = [line for text in texts for part in text for line in part]
    words = grammar.words if grammar else set()
    for word in sorted(words - {word for line in lines for word in line.split()}):
        if word[0].isupper():
            fail(f"{grammar.name}: {word!r} has no rule and is no word of the texts")
    tokens = [tokens_of(line, cfg.level) for line in (*lines, *words)]
    symbols = ["", *sorted({t for line in tokens for t in line})]
    if len(symbols) > 20000:
        fail(f"--level {cfg.level}: over 20000 different tokens: try --level char or less text")
    if cut := sum(len(line) > cfg.context for line in tokens):
        print(f"{cut} of {len(lines)} lines were cut to --context {cfg.context} tokens")
    texts = [[train, *([s for s in part if s not in seen] for part in held_out)]
             for train, *held_out in texts]
    if min(len(part) for text in texts for part in text) < 4:
        fail(f"{paths[0]}, {paths[1]}: too few lines to hold out; expected fewer repeats")
    return symbols, seen, texts


class Grammar:
    """A weighted context-free grammar.

    One rule a line, `S -> 4 NP VP . | 1 if S then S`: alternatives of a weight and symbols.  What
    has no rule is a word, the first symbol is the start, # begins a comment.  Weights are
    normalised within a rule.  Raises UserError naming the line or the symbol at fault."""

    def __init__(self, text, name="grammar"):
        self.name, self.rules = name, {}  # symbol -> [(probability, (symbol, ...)), ...]
        for n, line in enumerate(text.split("\n"), 1):
            line = line.split("#")[0].strip()
            if not line:
                continue
            try:
                symbol, right = map(str.strip, line.split("->"))
                rule = [(float(w), tuple(s)) for w, *s in map(str.split, right.split("|"))]
            except ValueError:
                rule = []
            if not rule or not all(0 < w < math.inf and symbols for w, symbols in rule):
                fail(f"{name}, line {n}: {line[:40]!r}: expected 'symbol -> weight words | weight "
                     "words', weights above 0")
            if symbol.split() != [symbol] or symbol in self.rules:
                fail(f"{name}, line {n}: {symbol!r}: expected one symbol, and one rule for it")
            total = sum(w for w, _ in rule)
            self.rules[symbol] = [(w / total, symbols) for w, symbols in rule]
        if not self.rules:
            fail(f"{name}: no rule in it; expected lines such as 'S -> 3 dogs VP | 1 cats VP'")
        self.start = next(iter(self.rules))
        symbols = {x for rule in self.rules.values() for _, s in rule for x in s}
        self.words = symbols - self.rules.keys()
        self.check_that_it_ends()
        # the words that can begin and end each symbol: they prune the parse thirtyfold
        self.first, self.last = self.edge_words(0), self.edge_words(-1)
        self.inside = lru_cache(200_000)(self._inside)

    def check_that_it_ends(self):
        ends = dict.fromkeys(self.rules, 0.0)  # the probability that an expansion comes to an end
        for _ in range(500):
            ends = {symbol: sum(w * math.prod(ends.get(x, 1.0) for x in s) for w, s in rule)
                    for symbol, rule in self.rules.items()}
        for symbol in self.rules:
            if ends[symbol] < 0.99 or self.circles(symbol, ()):
                fail(f"{self.name}: {symbol!r} never ends; expected rules that lead to words")

    def circles(self, symbol, path):
        """Can the symbol be rewritten to itself alone?"""
        return symbol in path or any(self.circles(s[0], (*path, symbol))
                                     for _, s in self.rules.get(symbol, ()) if len(s) == 1)

    def edge_words(self, side):
        edge = {w: {w} for w in self.words} | {symbol: set() for symbol in self.rules}
        for _ in self.rules:
            for symbol, rule in self.rules.items():
                edge[symbol] = set().union(*(edge[s[side]] for _, s in rule))
        return edge

    def sample(self, rng):
        """One sentence, drawn with `rng`, a random.Random."""
        words, stack = [], [self.start]
        while stack:
            symbol = stack.pop()
            if symbol in self.rules:
                weights, alternatives = zip(*self.rules[symbol])
                stack += reversed(rng.choices(alternatives, weights)[0])
            else:
                words.append(symbol)
        return " ".join(words)

    def samples(self, n, seed):
        rng = random.Random(seed)
        return [self.sample(rng) for _ in range(n)]

    def logps(self, lines):
        return np.array([*map(self.logp, lines)])

    def _inside(self, symbols, words):
        """Inside algorithm (Baker 1979): probability that `symbols` expand to exactly `words`."""
        head, rest = symbols[0], symbols[1:]
        if words[0] not in self.first[head] or words[-1] not in self.last[symbols[-1]]:
            return 0.0
        if rest:  # every cut of the words in two
            cuts = range(1, len(words) - len(rest) + 1)
            return sum(p * self.inside(rest, words[i:]) for i in cuts
                       if words[i] in self.first[rest[0]]
                       and (p := self.inside((head,), words[:i])))
        if head not in self.rules:
            return float(words == symbols)
        return sum(w * self.inside(s, words) for w, s in self.rules[head])

    def logp(self, sentence):
        """Exact log p in nats; -inf for what the grammar cannot say."""
        words = tuple(sentence.split())
        p = self.inside((self.start,), words) if words and self.words >= set(words) else 0.0
        return math.log(p) if p else -math.inf


def corrupt(words, vocabulary, rng):
    """One error, at a random place."""
    i, kind = int(rng.random() * len(words)), int(rng.random() * 4)
    swapped, other = words[i:i + 2][::-1], vocabulary[int(rng.random() * len(vocabulary))]
    instead = [swapped, [], [words[i]] * 2, [other]][kind]
    return words[:i] + instead + words[i + (2 if kind == 0 else 1):]


def with_error(line, vocabulary, rng, logp):
    """The line with one error that shows: other words, and nothing that the grammar could say."""
    for _ in range(1000):
        wrong = " ".join(corrupt(line.split(), vocabulary, rng))
        if wrong and wrong != line and logp(wrong) == -math.inf:
            return wrong
    fail(f"{line[:40]!r}: found no error to make in it")


@one_line_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--messy", type=int, default=20000, help="lines of messy.txt")
    parser.add_argument("--curated", type=int, default=4000, help="lines of curated.txt")
    parser.add_argument("--text", type=Path, help="a text to corrupt, instead of the grammar")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    if args.text:
        lines = [line for line in read_lines(args.text) if " " in line]
        rng.shuffle(lines)
        curated, messy = lines[:args.curated], lines[args.curated:args.curated + args.messy]
        vocabulary = sorted({word for line in lines for word in line.split()})
    else:
        grammar = Grammar(read(Path(__file__).with_name("grammar.txt")))
        curated = [grammar.sample(rng) for _ in range(args.curated)]
        messy = [grammar.sample(rng) for _ in range(args.messy)]
        vocabulary = sorted(grammar.words)
    logp = (lambda line: -math.inf) if args.text else grammar.logp
    messy = [with_error(s, vocabulary, rng, logp) if rng.random() < 0.4 else s for s in messy]
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("curated.txt", curated), ("messy.txt", messy)):
        with open(args.folder / name, "x", encoding="utf-8", newline="\n") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
