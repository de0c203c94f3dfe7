"""The known language: sentences of a weighted grammar, and the exact probability of any sentence.
`python tiny_data/language.py KIND FOLDER` writes FOLDER/curated.txt, sentences of grammar.txt, and
FOLDER/KIND.txt: others, 40 % with an error the grammar cannot say.  `mistakes`: a word replaced
by a sibling; `noise`: neighbours swapped, or a word dropped, doubled or replaced; `clean`: none."""
import argparse, math, random, sys  # noqa: E401
from collections import defaultdict
from functools import lru_cache
from pathlib import Path


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Grammar:
    """A weighted context-free grammar, as in grammar.txt.  Weights are normalised within a rule;
    `#~ runs run` names words, or classes of like order, as siblings: what mistakes confuse."""
    def __init__(self, text, name="grammar", known=()):
        self.rules = {}  # symbol -> [(probability, [symbol, ...]), ...]
        lines = text.strip("\ufeff").split("\n")
        for number, line in enumerate(lines, 1):
            if line := line.split("#")[0].strip():
                symbol, _, alternatives = (part.strip() for part in line.partition("->"))
                try:
                    rule = [(float(w), s) for w, *s in map(str.split, alternatives.split("|"))]
                except ValueError:
                    rule = [(0.0, [])]
                if (len(symbol.split()) != 1 or symbol in self.rules or "->" in alternatives
                        or not all(0 < w < math.inf and s for w, s in rule)):
                    fail(f"{name}, line {number}: {line[:40]!r}: expected 'symbol -> weight words "
                         "| weight words', weights above 0, one rule for a symbol")
                self.rules[symbol] = [(w / sum(v for v, _ in rule), s) for w, s in rule]
        if not self.rules:
            fail(f"{name}: no rule in it; expected lines such as 'S -> 3 dogs VP | 1 cats VP'")
        self.start = next(iter(self.rules))
        self.words = {s for rule in self.rules.values() for _, symbols in rule for s in symbols
                      if s not in self.rules}
        self.first = {word: {word} for word in self.words}  # what an expansion can begin with
        self.first |= {symbol: {s[0] for _, s in rule} for symbol, rule in self.rules.items()}
        ends = {w: float(w in known or not w[0].isupper()) for w in self.words}  # P(it ends)
        for _ in range(500):
            for symbol, rule in self.rules.items():
                self.first[symbol] |= set().union(*(self.first[s] for s in self.first[symbol]))
                ends[symbol] = sum(w * math.prod(ends.get(x, 0.0) for x in s) for w, s in rule)
        for symbol in [*self.words, *self.rules]:
            if ends[symbol] < 0.99 or symbol in self.rules and symbol in self.first[symbol]:
                fail(f"{name}: {symbol!r} has no rule, never ends, or begins with itself")
        self.begun = {symbol: {x: [(w, s) for w, s in rule if x in self.first[s[0]]]
                               for x in self.first[symbol]} for symbol, rule in self.rules.items()}
        self.siblings = defaultdict(list)  # word -> what a mistake puts in its place
        for group in (line[2:].split() for line in lines if line.startswith("#~")):
            classes = [[s[0] for _, s in self.rules.get(g, [(1, [g])])] for g in group]
            for words in zip(*classes):
                for word in words:
                    self.siblings[word] += [w for w in words if w != word]

    def sample(self, rng):
        """One sentence, drawn with `rng`, a random.Random: the leftmost symbol is replaced."""
        words, stack = [], [self.start]
        while stack:
            symbol = stack.pop()
            if symbol in self.words:
                words.append(symbol)
            else:
                weights, alternatives = zip(*self.rules[symbol])
                stack += reversed(rng.choices(alternatives, weights)[0])
        return " ".join(words)

    @lru_cache(None)  # samples repeat
    def logp(self, sentence):
        """Exact log p in nats, summed over all parses; -inf for what the grammar cannot say."""
        words = [*sentence.split(" "), ""]
        @lru_cache(None)
        def ends(symbol, i):  # {j: probability that the symbol expands to words[i:j]}
            if symbol in self.words:
                return {i + 1: 1.0} if symbol == words[i] else {}
            total = {}
            for probability, symbols in self.begun[symbol].get(words[i], []):
                reached = {i: probability}
                for s in symbols:
                    before, reached = reached, {}
                    for j, so_far in before.items():
                        for k, inner in ends(s, j).items():
                            reached[k] = reached.get(k, 0.0) + so_far * inner
                for j, found in reached.items():
                    total[j] = total.get(j, 0.0) + found
            return total
        p = ends(self.start, 0).get(len(words) - 1, 0.0)
        return math.log(p) if p else -math.inf

    def with_error(self, line, kind, rng):
        """The line with one error, of the kind named above, that the grammar cannot say."""
        for _ in range(1000):
            words = line.split()
            i = rng.randrange(len(words))
            if kind == "mistakes":
                words[i] = rng.choice(self.siblings[words[i]] or [words[i]])
            else:
                other, error = rng.choice(sorted(self.words)), rng.randrange(4)
                words[i:i + (2 if error == 0 else 1)] = [
                    words[i:i + 2][::-1], [], [words[i]] * 2, [other]][error]
            if words and self.logp(" ".join(words)) == -math.inf:
                return " ".join(words)
        fail(f"{line[:40]!r}: found no error of the kind {kind} to make in it")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=["mistakes", "noise", "clean"])
    parser.add_argument("folder", type=Path)
    for name, default in ("messy", 18000), ("curated", 16000), ("errors", 0.4), ("seed", 0):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args(argv)
    grammar = Grammar(Path(__file__).with_name("grammar.txt").read_text(encoding="utf-8"))
    rng = random.Random(args.seed)
    curated, messy = ([grammar.sample(rng) for _ in range(n)] for n in (args.curated, args.messy))
    for i, line in enumerate(messy):
        if args.kind != "clean" and rng.random() < args.errors:
            messy[i] = grammar.with_error(line, args.kind, rng)
    for name, lines in (("curated", curated), (args.kind, messy)):
        path = args.folder / f"{name}.txt"
        if path.exists():
            fail(f"{path} is there already; expected another FOLDER")
        args.folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(("\n".join(lines) + "\n").encode("utf-8"))


if __name__ == "__main__":
    main()
