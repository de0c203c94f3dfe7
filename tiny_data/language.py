"""The known language: sentences of a weighted grammar, and the exact probability of any.
`python tiny_data/language.py 1000 --seed 7 > text.txt` writes a thousand of grammar.txt."""
import argparse, math, random, re, sys  # noqa: E401
from functools import lru_cache
from pathlib import Path


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


class Grammar:
    """A weighted context-free grammar: `symbol -> weight words | weight words`, ...
    name: what an error calls it."""

    def __init__(self, text, name="grammar"):
        self.rules = {}  # symbol -> [(probability, [symbol, ...]), ...]
        for number, line in enumerate(text.strip("\ufeff").split("\n"), 1):
            if line := line.split("#")[0].strip():
                symbol, rule = self.parse(line, f"{name}, line {number}")
                total = sum(weight for weight, _ in rule)
                self.rules[symbol] = [(weight / total, right) for weight, right in rule]
        if not self.rules:
            fail(f"{name}: no rule in it; expected lines like 'S -> 3 dogs VP | 1 cats VP'")
        self.start = next(iter(self.rules))
        used = [right for rule in self.rules.values() for _, right in rule]
        self.words = set().union(*used) - self.rules.keys()
        self.check(name)

    def parse(self, line, place):
        """`symbol -> 3 a b | 1 c` -> symbol, [(3.0, [a, b]), (1.0, [c])]."""
        symbol, _, right = (part.strip() for part in line.partition("->"))
        rule = []
        for alternative in right.split("|"):
            weight, *symbols = alternative.split() or [""]
            number = float(weight) if re.fullmatch(r"\d*\.?\d+", weight) else 0
            rule.append((number, symbols))
        good = all(weight > 0 and symbols for weight, symbols in rule)
        if not good or len(symbol.split()) != 1 or symbol in self.rules or "->" in right:
            fail(f"{place}: {line[:40]!r}: expected 'symbol -> weight words | ...', "
                 "weights above 0, one rule for a symbol")
        return symbol, rule

    def check(self, name):
        """Every symbol must end in words (probability 1) and never begin with itself."""
        ends = {w: float(not w[0].isupper()) for w in self.words}
        first = {word: {word} for word in self.words}  # what an expansion can begin with
        first |= {symbol: {s[0] for _, s in rule} for symbol, rule in self.rules.items()}
        for _ in range(500):
            for symbol, rule in self.rules.items():
                first[symbol] |= set().union(*(first[s] for s in first[symbol]))
                ends[symbol] = sum(w * math.prod(ends.get(x, 0) for x in s)
                                   for w, s in rule)
        for symbol in [*self.words, *self.rules]:
            if ends[symbol] < 0.99 or symbol in self.rules and symbol in first[symbol]:
                fail(f"{name}: {symbol!r} has no rule, never ends, or begins with itself")
        self.begun = {symbol: {  # -> word -> the alternatives that can begin with it
            word: [(w, s) for w, s in rule if word in first[s[0]]]
            for word in first[symbol]} for symbol, rule in self.rules.items()}

    def sample(self, rng):
        """One sentence, drawn by `rng` (random.Random): the leftmost symbol is replaced."""
        words, stack = [], [self.start]
        while stack:
            symbol = stack.pop()
            if symbol in self.words:
                words.append(symbol)
            else:
                weights, alternatives = zip(*self.rules[symbol])
                stack += reversed(rng.choices(alternatives, weights)[0])
        return " ".join(words)

    @lru_cache(200_000)  # samples repeat
    def logp(self, sentence):
        """Exact log p in nats, over all parses (inside algorithm, Baker 1979), or -inf."""
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


def main(argv=None):
    parser = argparse.ArgumentParser(description="write sentences of grammar.txt")
    parser.add_argument("sentences", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    grammar = Grammar(Path(__file__).with_name("grammar.txt").read_text(encoding="utf-8"))
    rng = random.Random(args.seed)
    print(*(grammar.sample(rng) for _ in range(args.sentences)), sep="\n")


if __name__ == "__main__":
    main()
