"""Each test is named after the claim that it checks, in the order of gan_lm.py.  Run: pytest -q"""
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import gan_lm
from gan_lm import (CNNDiscriminator, Config, Data, GPT, Grammar, PrefixDiscriminator,
                    adversarial_phase, advantages, batches, discriminator_loss, divergences, fit,
                    judged, likelihood_loss, main, measure, new_model, policy_gradient_loss,
                    real_tokens, sample, sequence_logp, to_ids, to_lines, token_logp,
                    token_rewards, train_discriminator, train_generator, train_likelihood, verdict)
from hypothesis import given, settings, strategies as st
from tiny_data import language, plumbing

torch.set_num_threads(1)  # for tensors this small a second thread costs more than it brings
ROOT = Path(__file__).resolve().parent
FAST = ("--preset nano --pretrain_steps 20 --sft_steps 5 --d_steps 8 --g_steps 2 --batch_size 16 "
        "--eval_samples 60 --context 24 --device cpu --temperatures 1 0.8").split()
FEW = Path(tempfile.mkdtemp(prefix="gan_lm_test_"))  # a few lines of the shipped files
for file, lines in ("messy.txt", 600), ("curated.txt", 300):
    text = (ROOT / "tiny_data" / file).read_text(encoding="utf-8").split("\n")
    (FEW / file).write_text("\n".join(text[:lines]), encoding="utf-8")
FILES = ["--data", str(FEW / "messy.txt"), "--curated", str(FEW / "curated.txt"), "--grammar",
         str(ROOT / "tiny_data" / "grammar.txt")]
SMALL = Grammar("S -> 2 N V . | 1 if S then S .\nN -> 3 dogs | 1 the N\nV -> 1 run | 1 see N")


def parse(argv):
    return plumbing.flags_of(Config, "", argv)


@pytest.fixture(scope="module")
def data():
    return Data(parse(["--device", "cpu"]))


def tiny_gpt(V=7, context=8, seed=0):
    torch.manual_seed(seed)
    model = GPT(V, context, 2, 64).eval()
    for p in model.parameters():  # far from uniform
        p.data += 0.3 * torch.randn_like(p) / p.shape[-1] ** 0.5
    return model


def rows(*lists, T=8):
    return torch.tensor([[0, *row, *[0] * (T - len(row))] for row in lists])


# ---- the promises about the file itself

def test_the_file_is_short_enough_to_be_read():
    import ast
    source = (ROOT / "gan_lm.py").read_text(encoding="utf-8")
    lines = source.split("\n")[:-1]
    docs, longest = set(), 0
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            docs |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.FunctionDef):
            longest = max(longest, node.end_lineno - node.lineno + 1)
    code = [i for i, line in enumerate(lines, 1)
            if line.strip() and not line.strip().startswith("#") and i not in docs]
    assert len(lines) <= 600 and len(code) <= 420 and longest <= 45
    assert max(map(len, lines)) <= 100


def test_importing_trains_nothing_and_needs_no_matplotlib():
    code = ("import sys, time; t = time.time(); import gan_lm; "
            "assert 'matplotlib' not in sys.modules; print(len(gan_lm.__doc__) > 0)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_a_preset_gives_what_no_flag_gives():
    tiny, large = parse([]), parse(["--preset", "large", "--lr", "0.01"])
    assert (tiny.context, tiny.lr, tiny.gan_lr) == (64, 4e-3, 3e-3)
    assert (large.context, large.lr) == (256, 0.01) and 0 < large.gan_lr < tiny.gan_lr
    assert parse(["--preset", "large", "--context", "9"]).context == 9


# ---- the language

def every_sentence(grammar, symbols, depth):
    """Brute force: {sentence: probability} of all expansions at most `depth` deep."""
    if not symbols:
        return {(): 1.0}
    if symbols[0] not in grammar.rules:
        head = {(symbols[0],): 1.0}
    else:
        head = {}
        for w, alternative in grammar.rules[symbols[0]] if depth else ():
            for words, p in every_sentence(grammar, alternative, depth - 1).items():
                head[words] = head.get(words, 0.0) + w * p
    out = {}
    for (a, p), (b, q) in itertools.product(head.items(),
                                            every_sentence(grammar, symbols[1:], depth).items()):
        out[a + b] = out.get(a + b, 0.0) + p * q
    return out


AMBIGUOUS = Grammar("S -> 2 S and S | 3 N\nN -> 1 cats | 2 dogs")  # left recursive, two parses


@pytest.mark.parametrize("grammar, depth", [
    (Grammar("S -> 2 A B | 1 B\nA -> 1 x | 3 y\nB -> 1 x | 1 A A"), 9), (AMBIGUOUS, 6)])
def test_log_p_equals_brute_force_enumeration(grammar, depth):
    sentences = every_sentence(grammar, (grammar.start,), depth)
    longest = 5 if grammar is AMBIGUOUS else 99  # longer ones have parses deeper than the search
    for words, p in sentences.items():
        if len(words) <= longest:
            assert math.exp(grammar.logp(" ".join(words))) == pytest.approx(p, rel=1e-9)
    if grammar is not AMBIGUOUS:
        assert sum(sentences.values()) == pytest.approx(1.0)


alternative = st.tuples(st.integers(1, 5),
                        st.lists(st.sampled_from("ABxy"), min_size=1, max_size=3))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(alternative, min_size=1, max_size=3), min_size=3, max_size=3))
def test_log_p_equals_brute_force_on_random_grammars(rules):
    # S may use A, B and words, A may use B and words, B words alone: every grammar ends
    text = "\n".join(
        f"{head} -> " + " | ".join(f"{w} " + " ".join(x if x in may else "z" for x in right)
                                   for w, right in rule)
        for head, may, rule in zip("SAB", ("ABxy", "Bxy", "xy"), rules))
    grammar = Grammar(text)
    sentences = every_sentence(grammar, ("S",), 3)
    assert sum(sentences.values()) == pytest.approx(1.0)
    for words, p in sentences.items():
        assert math.exp(grammar.logp(" ".join(words))) == pytest.approx(p, rel=1e-9)
    assert all(s in {" ".join(words) for words in sentences} for s in grammar.samples(5, 0))


def test_log_p_agrees_with_sampled_frequencies():
    rng, n = random.Random(0), 20000
    lines = [SMALL.sample(rng) for _ in range(n)]
    for line in ("dogs run .", "dogs see dogs .", "the dogs run ."):
        p = math.exp(SMALL.logp(line))
        assert lines.count(line) / n == pytest.approx(p, abs=4 * math.sqrt(p / n))


@pytest.mark.parametrize("line", ["", "run dogs .", "dogs fly .", "dogs run", "if dogs run . then"])
def test_what_the_grammar_cannot_say_has_probability_zero(line):
    assert SMALL.logp(line) == -math.inf


def test_the_shipped_language_is_as_described(data):
    rng = random.Random(1)
    lines = [data.grammar.sample(rng) for _ in range(3000)]
    assert max(len(s.split()) for s in lines) <= 24
    assert 15 < -np.mean([data.grammar.logp(s) for s in lines]) < 25


def test_the_shipped_texts_are_made_again_byte_for_byte(tmp_path):
    language.main([str(tmp_path)])
    for name in ("messy.txt", "curated.txt"):
        assert (tmp_path / name).read_bytes() == (ROOT / "tiny_data" / name).read_bytes()
    grammar = Grammar((ROOT / "tiny_data" / "grammar.txt").read_text(encoding="utf-8"))
    messy = (tmp_path / "messy.txt").read_text(encoding="utf-8").splitlines()
    wrong = np.mean([grammar.logp(s) == -math.inf for s in messy])
    assert len(messy) == 20000 and wrong == pytest.approx(0.4, abs=0.015)
    with pytest.raises(SystemExit):  # what is there already is left as it is
        language.main([str(tmp_path)])


def test_a_text_can_be_corrupted_too(tmp_path):
    text = tmp_path / "text.txt"
    lines = [f"word{i} is number {i} of many" for i in range(100)]
    text.write_text("\n".join(lines), encoding="utf-8")
    language.main([str(tmp_path / "made"), "--text", str(text), "--curated", "60"])
    curated = (tmp_path / "made" / "curated.txt").read_text(encoding="utf-8").splitlines()
    assert len(curated) == 60 and set(curated) <= set(lines)


# ---- data

@pytest.mark.parametrize("level", ["word", "char"])
@pytest.mark.parametrize("line", ["the dog runs .", "Don't stop-now, O'Neil!",
                                  "naïve e\u0301 \U0001F600", "a\x00b \u200d !",
                                  "¿qué? … 東京"])
def test_any_line_comes_back_from_ids_as_it_went_in(line, level):
    cfg = Config(level=level, context=40, device="cpu")
    symbols = ["", *sorted(set(language.tokens_of(line, level)))]
    assert to_lines(to_ids([line], symbols, cfg), symbols) == [line]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1,
                max_size=5), st.sampled_from(["word", "char"]))
def test_any_text_at_all_comes_back_from_ids_as_it_went_in(texts, level):
    lines = [" ".join(text.split()) for text in texts if text.split()]
    cfg = Config(level=level, context=1000, device="cpu")
    symbols = ["", *sorted({t for line in lines for t in language.tokens_of(line, level)})]
    assert not lines or to_lines(to_ids(lines, symbols, cfg), symbols) == lines


def test_held_out_lines_are_in_no_training_split(data):
    for text in (data.messy, data.curated):
        for part in text[1:]:
            assert not data.seen & set(to_lines(part, data.symbols))
            assert len(data.novel(part)) == len(part)


def test_longer_lines_are_cut_and_counted(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"{i:03} " + "x" * i for i in range(100)), encoding="utf-8")
    data = Data(parse(["--data", str(path), "--level", "char", "--context", "20"]))
    assert data.messy[0].shape[1] == 21
    assert re.search(r"\d+ of \d+ lines were cut", capsys.readouterr().out)


def test_bom_crlf_and_blank_lines_do_no_harm(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(b"line %d" % i for i in range(60)))
    assert language.read_lines(path) == [f"line {i}" for i in range(60)]


def test_the_vocabulary_is_the_same_in_every_process():
    code = ("from gan_lm import *; cfg = flags_of(Config, '', []); "
            "import hashlib; print(hashlib.md5('|'.join(Data(cfg).symbols).encode()).hexdigest())")
    runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                           env={**os.environ, "PYTHONHASHSEED": seed}) for seed in "12"]
    assert runs[0].stdout == runs[1].stdout != "", runs[0].stderr


def test_batches_hold_every_row_once_an_epoch_with_its_label():
    x = rows(*[[1] * (i % 7 + 1) for i in range(64)])
    stream = batches(x, 8, torch.arange(64))
    got = [next(stream) for _ in range(8)]
    labels = torch.cat([label for _, label in got])
    assert sorted(labels.tolist()) == list(range(64))
    for part, label in got:
        assert torch.equal(real_tokens(part).sum(1), real_tokens(x)[label].sum(1))


# ---- generator

def test_generator_is_causal_and_tokens_after_the_end_change_nothing():
    model = tiny_gpt()
    x = rows([1, 2, 3, 4, 5, 6], [3, 3, 2])
    y = x.clone()
    y[0, 5:] = 6
    assert torch.allclose(model(x)[0, :5], model(y)[0, :5], atol=1e-5)
    z = x.clone()
    z[1, 5:] = 4  # after the closing END
    assert torch.equal(token_logp(model, x)[1], token_logp(model, z)[1])


def test_sequence_probabilities_sum_to_one_at_any_temperature():
    model = tiny_gpt(V=3, context=3)
    everything = {tuple(s[:s.index(0) + 1] if 0 in s else s)
                  for s in itertools.product(range(3), repeat=3)}
    x = rows(*everything, T=3)
    for T in (1.0, 0.7):
        assert sequence_logp(model, x, T).exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_cached_sampling_equals_uncached_sampling():
    model, n = tiny_gpt(), 50
    torch.manual_seed(3)
    fast = sample(model, n, 0.8, prompt=[2, 5])
    torch.manual_seed(3)
    slow, alive = torch.zeros(n, 9, dtype=torch.long), torch.arange(n)
    slow[:, 1:3] = torch.tensor([2, 5])
    for t in range(3, 9):
        p = (model(slow[alive, :t])[:, -1] / 0.8).softmax(-1)
        slow[alive, t] = (p / torch.empty_like(p).exponential_()).argmax(-1)
        alive = alive[slow[alive, t] != 0]
        if not len(alive):
            break
    assert torch.equal(fast, slow)


def test_samples_have_the_probabilities_that_sequence_logp_says():
    model, n = tiny_gpt(V=3, context=2), 20000
    torch.manual_seed(0)
    x, counts = torch.unique(sample(model, n, 0.9), dim=0, return_counts=True)
    p = sequence_logp(model, x, 0.9).exp()
    assert ((counts / n - p).abs() < 4 * (p / n).sqrt()).all()


def test_memory_is_bounded_however_long_the_context():
    asked = []

    class Spy(GPT):
        def hidden(self, x, cache=None, extra=0.0):
            asked.append(x.numel() if cache is None else len(x) * (1 + self.shape[1]))
            return super().hidden(x, cache, extra)
    torch.manual_seed(0)
    model = Spy(5, 1000, 1, 32)
    x = torch.randint(1, 5, (300, 1001))
    sequence_logp(model, x)
    assert max(asked) <= 32_500 and len(asked) > 8
    asked.clear()
    model.token.weight.data[0] = 9.0  # nearly every row ends soon
    sample(model, 300)
    assert max(asked) <= 130_000


# ---- discriminators

@pytest.mark.parametrize("kind", [PrefixDiscriminator, CNNDiscriminator])
def test_discriminators_judge_prefixes_and_ignore_what_follows_the_end(kind):
    disc = kind(tiny_gpt())
    x = rows([1, 2, 3, 4, 5, 6], [3, 3, 2])
    y = x.clone()
    y[1, 5:] = 4
    mask = real_tokens(x)
    assert torch.allclose((disc(x) * mask)[1], (disc(y) * mask)[1], atol=1e-5)
    if kind is PrefixDiscriminator:
        y[0, 5:] = 1
        assert torch.allclose(disc(x)[0, :4], disc(y)[0, :4], atol=1e-5)
        assert not torch.allclose(disc(x)[0, 4:], disc(y)[0, 4:], atol=1e-5)
    else:
        assert (disc(x)[0] != 0).sum() == 1  # one verdict, at the closing END


def test_the_discriminator_starts_as_the_language_model_and_reads_its_log_probabilities():
    ref = tiny_gpt()
    disc, x = PrefixDiscriminator(ref), rows([1, 2, 3])
    assert torch.equal(disc.hidden(x), ref.hidden(x))
    read = {}
    disc.hints.register_forward_hook(lambda module, given, out: read.update(hints=given[0] * 3))
    disc(x)
    assert torch.allclose(read["hints"][0, :4, 0], token_logp(ref, x)[0, :4], atol=1e-5)
    p = ref(x[:, :-1]).softmax(-1)
    assert torch.allclose(read["hints"][..., 1], (p * p.log()).sum(-1), atol=1e-4)
    assert not any(p is q for p in disc.parameters() for q in ref.parameters())


# ---- objectives

def test_policy_gradient_equals_the_exact_gradient_by_enumeration():
    torch.manual_seed(0)
    first, second = torch.randn(3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    ref = torch.randn(3).log_softmax(0), torch.randn(3, 3).log_softmax(-1)
    x = rows([0], *([a, b] for a in (1, 2) for b in range(3)), T=2)  # every sequence, V = 3, T = 2
    mask, verdict = real_tokens(x), torch.randn(3, 3)
    logits = torch.stack([verdict[x[:, 1], 0], verdict[x[:, 1], x[:, 2]]], 1)  # of prefixes alone
    rewards = token_rewards(logits, mask)

    def logp_under(one, two):
        return torch.stack([one[x[:, 1]], two[x[:, 1], x[:, 2]]], 1) * mask

    logp = logp_under(first.log_softmax(0), second.log_softmax(-1))
    q, logp_ref = logp.sum(1).exp(), logp_under(*ref)
    assert q.sum().item() == pytest.approx(1)
    for kl_coef in (0.0, 1.0):
        expected = (q * (rewards - kl_coef * (logp - logp_ref)).sum(1)).sum()
        exact = torch.autograd.grad(-expected, (first, second), retain_graph=True)
        A = advantages(rewards, logp, logp_ref, mask, kl_coef, lam=1.0)
        surrogate = sum(weight * policy_gradient_loss(logp[i:i + 1], A[i:i + 1])
                        for i, weight in enumerate(q.detach()))
        ours = torch.autograd.grad(surrogate, (first, second), retain_graph=True)
        for a, b in zip(exact, ours):
            assert torch.allclose(a, b, atol=1e-6)


def test_without_reward_and_at_the_reference_there_is_no_advantage():
    logp, mask = -torch.rand(5, 4), torch.ones(5, 4)
    assert (advantages(torch.zeros(5, 4), logp, logp, mask) == 0).all()


def test_advantages_are_discounted_sums_less_the_batch_mean():
    r, mask = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]]), torch.ones(2, 3)
    A = advantages(r, torch.zeros(2, 3), torch.zeros(2, 3), mask, lam=0.5)
    assert torch.allclose(A[0], torch.tensor([3.0, 4.0, 4.0]) / 2) and torch.allclose(A[1], -A[0])


def test_token_rewards_add_up_to_the_verdict_on_the_sentence():
    logits, mask = torch.randn(2, 5), torch.tensor([[1.0] * 5, [1, 1, 1, 0, 0]])
    assert torch.allclose(token_rewards(logits, mask).sum(1),
                          torch.stack([logits[0, 4], logits[1, 2]]), atol=1e-6)
    prob = token_rewards(logits, mask, "prob").sum(1)
    assert prob[0].item() == pytest.approx(logits[0, 4].sigmoid().item() - 0.5, abs=1e-6)
    ratio = token_rewards(torch.zeros(2, 5), mask, "ratio")
    assert (ratio == 0).all()  # where D has no opinion every shape is silent


def test_discriminator_losses_have_their_optimum_at_the_log_ratio():
    mask, is_real = torch.ones(2, 1), torch.tensor([True, False])
    for kind, signal in (("bce", [[3.0], [-3.0]]), ("pairwise", [[3.0], [-3.0]])):
        silent = discriminator_loss(torch.zeros(2, 1), is_real, mask, kind).item()
        assert silent == pytest.approx(math.log(2))
        assert discriminator_loss(torch.tensor(signal), is_real, mask, kind).item() < silent
        assert discriminator_loss(-torch.tensor(signal), is_real, mask, kind).item() > silent
    # p = 0.8 and q = 0.2 on one prefix: the best constant logit is log 4
    s = torch.tensor([0.0], requires_grad=True)
    real = torch.tensor([True] * 8 + [False] * 2)
    loss = discriminator_loss(s.expand(10, 1), real, torch.ones(10, 1))
    grad_at_0 = torch.autograd.grad(loss, s)[0]
    best = torch.tensor([math.log(4)], requires_grad=True)
    loss = discriminator_loss(best.expand(10, 1), real, torch.ones(10, 1))
    assert grad_at_0 < 0 and abs(torch.autograd.grad(loss, best)[0].item()) < 1e-6


# ---- training phases

def test_likelihood_training_ends_at_its_best_look_at_held_out_text(data):
    torch.manual_seed(0)
    cfg = parse(["--batch_size", "16", "--device", "cpu"])
    model = GPT(len(data.symbols), 64, 1, 32)
    before = -sequence_logp(model, data.curated[1]).mean()
    train_likelihood(model, data.curated, 30, 1e-2, cfg)
    assert -sequence_logp(model, data.curated[1]).mean() < before
    looks = iter([5.0, 3.0, 4.0, 6.0])
    weight = torch.nn.Linear(1, 1)
    seen = []

    def look():
        seen.append(weight.weight.item())
        return next(looks)
    fit(weight, 30, 0.1, lambda: weight(torch.ones(1, 1)).sum(), "", held_out=look)
    assert weight.weight.item() == seen[1]


def test_each_half_of_the_gan_leaves_the_other_alone(data):
    cfg = parse(FAST)
    torch.manual_seed(0)
    model = GPT(len(data.symbols), 64, 1, 32)
    ref = deepcopy(model).requires_grad_(False)
    disc = PrefixDiscriminator(ref)
    fake = sample(ref, 64)
    before = deepcopy(ref.state_dict())
    train_discriminator(disc, data.curated[0], fake, data.curated[1], fake, cfg)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), ref.state_dict().values()))
    judge = deepcopy(disc.state_dict())
    train_generator(model, ref, disc, cfg)
    assert all(torch.equal(a, b) for a, b in zip(judge.values(), disc.state_dict().values()))
    assert all(p.grad is None for p in disc.parameters())
    assert not torch.equal(model.token.weight, ref.token.weight)


def test_where_the_discriminator_is_at_chance_the_phase_leaves_the_model_alone(data, capsys):
    cfg = parse([*FAST, "--rounds", "3"])
    torch.manual_seed(0)
    model = GPT(len(data.symbols), 64, 1, 32)
    same = deepcopy(data)  # "curated" text that is the model's own samples: nothing to sharpen
    same.curated = [sample(model, 300), sample(model, 300), None]
    same.seen = set()
    before = deepcopy(model.state_dict())
    records = adversarial_phase(model, PrefixDiscriminator(model), same, cfg)
    assert len(records) == 1 and not records[0]["kept"] and "reward" not in records[0]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))


def test_a_loss_that_is_not_finite_ends_the_phase_at_the_best_model_before_it(capsys):
    weight, losses = torch.nn.Linear(1, 1, bias=False), iter([1.0] * 12 + [math.nan, 1.0])
    looks = []

    def look():
        looks.append(weight.weight.item())
        return 0
    fit(weight, 32, 0.1, lambda: weight(torch.ones(1, 1)).sum() * next(losses), "phase", look)
    assert "phase: no finite gradient at step 13" in capsys.readouterr().out
    assert weight.weight.item() == looks[-1] and len(looks) == 2  # the look after step 10


def test_a_round_that_collapses_or_costs_likelihood_is_undone_and_says_why(data, monkeypatch,
                                                                           capsys):
    cfg = parse([*FAST, "--rounds", "2"])
    certain = {"d_loss": 0.1, "d_loss_se": 0.01, "heldout_acc": 0.9}
    monkeypatch.setattr(gan_lm, "train_discriminator", lambda *args: certain)

    def generator_that(damage):
        def train_generator(model, ref, disc, cfg):
            for name, p in model.named_parameters():
                damage(name, p.data)
            return {"reward": (0.0, 9.9), "kl_to_ref": (0.0, 1.0)}
        return train_generator

    def collapse(name, p):  # the closing END comes first, always
        if name == "token.weight":
            p *= 0
            p[0] += 50
        if name == "ln.bias":
            p.fill_(1)
    for damage, why in ((collapse, "the samples collapsed"), (
            lambda name, p: p.add_(torch.randn_like(p)), "held-out text became less likely")):
        torch.manual_seed(0)
        model = GPT(len(data.symbols), 24, 1, 32)
        before = deepcopy(model.state_dict())
        monkeypatch.setattr(gan_lm, "train_generator", generator_that(damage))
        records = adversarial_phase(model, PrefixDiscriminator(model), data, cfg)
        assert [r["why"] for r in records] == [why] and not records[0]["kept"]
        assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))


def test_the_adversarial_phase_lowers_js(data, capsys):
    cfg = parse("--device cpu --d_steps 120 --g_steps 40 --eval_samples 1000".split())
    torch.manual_seed(0)
    model = new_model({"symbols": data.symbols}, cfg)
    train_likelihood(model, data.messy, 700, 4e-3, cfg)
    before = measure(model, 1.0, data, cfg)[0]
    adversarial_phase(model, PrefixDiscriminator(model), data, cfg)
    after = measure(model, 1.0, data, cfg)[0]
    assert after["js"] + 3 * (after["js_se"] + before["js_se"]) < before["js"]
    assert after["valid"] > before["valid"]


# ---- measurement

def test_js_of_a_distribution_with_itself_is_0_and_of_disjoint_ones_1():
    a, never = np.log(np.array([0.5, 0.25, 0.25])), np.full(3, -np.inf)
    same = divergences(a, a, a, a)
    assert same["kl"] == same["js"] == same["tv"] == 0
    apart = divergences(a, never, never, a)
    assert apart["js"] == apart["tv"] == 1 and apart["kl"] == math.inf


def test_divergences_agree_with_the_sums_over_two_known_distributions():
    rng, n = np.random.default_rng(0), 200000
    p, q = np.array([0.6, 0.3, 0.1, 0.0]), np.array([0.3, 0.3, 0.2, 0.2])
    x, y = rng.choice(4, n, p=p), rng.choice(4, n, p=q)
    with np.errstate(divide="ignore"):
        got = divergences(np.log(p)[x], np.log(q)[x], np.log(p)[y], np.log(q)[y])
    m, support = (p + q) / 2, p > 0
    kl = (p[support] * np.log(p[support] / q[support])).sum()
    js = ((p[support] * np.log2(p[support] / m[support])).sum() + (q * np.log2(q / m)).sum()) / 2
    assert got["kl"] == pytest.approx(kl, abs=0.01) and got["tv"] == pytest.approx(0.3, abs=0.01)
    assert abs(got["js"] - js) < 4 * got["js_se"] < 0.01


def test_re_ranking_by_the_true_ratio_gives_the_true_language(data):
    cfg = parse("--device cpu --preset nano --eval_samples 500".split())
    torch.manual_seed(0)
    model = new_model({"symbols": data.symbols}, cfg)
    train_likelihood(model, data.curated, 500, 8e-3, cfg)

    def optimal(x):  # logits log p/q, at every position
        logp = torch.tensor(data.grammar.logps(to_lines(x, data.symbols))).clamp(min=-50)
        return (logp - sequence_logp(model, x)).float()[:, None].expand(-1, x.shape[1] - 1)
    plain, better = (measure(model, 1.0, data, cfg, disc)[0] for disc in (None, optimal))
    assert better["js"] < plain["js"] / 2 and better["valid"] > plain["valid"] + 0.1


def test_the_record_of_a_discriminator_forgives_a_constant():
    class Constant(torch.nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.shift = shift

        def forward(self, x):
            return x[:, 1:] * 2.0 - 5.0 + self.shift
    real, fake = rows([3] * 7, [2] * 7, T=8), rows([1] * 7, [2] * 7, T=8)
    real[:, 8], fake[:, 8] = real[:, 7], fake[:, 7]
    first, second = judged(Constant(0.0), real, fake), judged(Constant(9.0), real, fake)
    assert first == pytest.approx(second) and first["d_loss"] < math.log(2)
    assert first["heldout_acc"] == 0.75  # [3...] and [1...] are told apart, the two [2...] tie


# ---- main: whole runs in miniature

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    main([*FILES, *FAST, "--out", str(out)])
    return out


def figures(out):
    return {k: v for k, v in json.loads((out / "report.json").read_text(encoding="utf-8")).items()
            if k in ("arms", "discriminator", "entropy")}


def test_a_run_writes_the_report_that_is_promised(finished):
    report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    assert {"config", "versions", "entropy", "arms", "discriminator", "timing"} <= report.keys()
    assert {a["name"] for a in report["arms"]} == {"mle", "sft", "mixed", "continued", "gan_mle",
                                                   "gan", "reranked"}
    for arm in report["arms"]:
        assert {"temperature", "kl", "kl_se", "js", "js_se", "tv", "valid", "valid_se", "novel",
                "unique"} <= arm.keys()
        assert 0 <= arm["js"] <= 1 and 0 <= arm["valid"] <= 1
    for r in report["discriminator"]:
        assert {"round", "train_loss", "train_acc", "d_loss", "heldout_acc", "optimal_acc", "kept",
                "why", "js"} <= r.keys()
    assert {"pretrain_s", "pretrain_tokens_per_s", "sample_tokens_per_s", "sft_s", "adversarial_s",
            "total_s", "peak_memory_mb"} <= report["timing"].keys()
    assert len((finished / "samples.txt").read_text(encoding="utf-8").split("\n")) == 1001


def reported(gan, tmp_path, capsys, **figures):
    """What show_report() prints where all arms have the same figures, but for those of `gan`."""
    row = dict(temperature=1.0, novel=1, unique=1) | figures
    arms = [row | {"name": name} for name in (*gan_lm.LIKELIHOOD, "gan_mle")]
    gan_lm.show_report([*arms, row | {"name": "gan"} | gan], tmp_path)
    return capsys.readouterr().out


def test_the_answer_is_yes_only_for_a_gain_beyond_its_error_and_worth_the_word(tmp_path, capsys):
    def answer(js, se):
        return reported({"js": js}, tmp_path, capsys, js=0.5, js_se=se, kl=1.0, tv=0.5, valid=0.5)
    assert "the GAN phase wins" in answer(0.4, 0.01)
    assert "does NOT win" in answer(0.4, 0.05) and "does NOT win" in answer(0.499, 0.0)
    assert "does NOT win" in answer(0.6, 0.01)


def test_a_judge_that_is_more_often_wrong_than_right_counts_as_chance(tmp_path, capsys):
    out = reported({"judge_acc": 0.3}, tmp_path, capsys, judge_acc=0.5, judge_acc_se=0.02, nll=9.0)
    assert "gan 0.500" in out and "does NOT win" in out


def test_the_report_is_drawn_where_matplotlib_is_installed(finished, tmp_path):
    pytest.importorskip("matplotlib")
    arms = json.loads((finished / "report.json").read_text(encoding="utf-8"))["arms"]
    gan_lm.show_report(arms, tmp_path)
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_figures(finished, tmp_path):
    main([*FILES, *FAST, "--out", str(tmp_path / "again")])
    assert figures(finished) == figures(tmp_path / "again")


def run_quietly(argv):
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        main(argv)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ten_kills_at_random_moments_change_nothing(finished, tmp_path):
    argv, rng = [*FILES, *FAST, "--out", str(tmp_path / "killed")], random.Random(0)
    start = multiprocessing.get_context("fork").Process  # a fork has imported torch already
    for kill in range(10):
        resume = ["--resume"] * (tmp_path / "killed" / "model.pt").exists()
        run = start(target=run_quietly, args=([*argv, *resume],))
        run.start()
        run.join(rng.uniform(0.3, 2.0))
        run.kill()
        run.join()
    main([*argv, "--resume"])
    assert figures(finished) == figures(tmp_path / "killed")
    models = [torch.load(out / "model.pt", weights_only=True)["models"]
              for out in (finished, tmp_path / "killed")]
    for name, state in models[0].items():
        assert all(torch.equal(a, b) for a, b in zip(state.values(), models[1][name].values()))


def test_ctrl_c_says_how_to_go_on_and_exits_130(tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(gan_lm, "train_likelihood", interrupt)
    with pytest.raises(SystemExit) as stopped:
        main([*FILES, *FAST, "--out", str(tmp_path)])
    err = capsys.readouterr().err
    assert stopped.value.code == 130 and "--resume" in err and err.count("\n") == 1
    assert (tmp_path / "model.pt").exists()
    assert "no phase" in complaint(["--samples", "1", "--out", str(tmp_path)], capsys)


def test_a_gpu_too_small_is_a_message_that_names_the_flags_to_lower(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
    monkeypatch.setattr(gan_lm, "train", full)
    err = complaint([*FILES, *FAST, "--out", str(tmp_path)], capsys)
    assert "--batch_size" in err and "--context" in err and "--preset" in err


def test_a_full_disk_is_a_clear_message_and_the_last_checkpoint_is_whole(tmp_path, monkeypatch,
                                                                        capsys):
    plumbing.save({"config": {}, "models": 1}, tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()

    def full(path, content):
        path.open("wb").write(content[:100])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    err = complaint([*FILES, *FAST, "--out", str(tmp_path / "new")], capsys)
    assert "No space left" in err
    with pytest.raises(OSError):
        plumbing.save({"config": {}, "models": 2}, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == before
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["model.pt"]


def test_a_saved_model_gives_the_same_samples_and_figures(finished, capsys):
    before, printed = figures(finished), []
    for _ in range(2):
        capsys.readouterr()
        main(["--samples", "5", "--out", str(finished), "--prompt", "the dog", "--seed", "1"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].count("\n") == 5
    assert all(line.startswith("the dog") for line in printed[0].split("\n")[:5])
    main([*FILES, *FAST, "--out", str(finished), "--resume"])  # trains nothing, measures again
    assert figures(finished) == before


@pytest.mark.parametrize("flags", [  # the other switches are commands of the README, run below
    "--reward ratio", "--rounds 2 --lam 1", "--rounds 0", "--level char"])
def test_every_switch_runs(flags, tmp_path):
    main([*FILES, *FAST, "--out", str(tmp_path), "--temperatures", "1", *flags.split()])
    assert (tmp_path / "report.json").exists()


@pytest.mark.parametrize("level", ["word", "char"])
def test_text_without_a_grammar_gets_a_judge(level, tmp_path):
    rng = random.Random(0)
    lines = [" ".join(rng.choice(["Hark", "who", "goes", "there", "my", "lord,"]) for _ in range(6))
             for _ in range(300)]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    main([*FAST, "--data", str(tmp_path / "text.txt"), "--level", level, "--out", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    for arm in report["arms"]:
        assert {"nll", "judge_acc", "novel", "unique"} <= arm.keys() and "js" not in arm
    assert report["entropy"] is None


# ---- bad input: one line that names what is at fault, status 2, nothing written

BAD_GRAMMARS = {
    "S -> 1 NP runs": "NP", "S -> 1 S": "never ends", "S -> 1 A\nA -> 1 S": "never ends",
    "S -> 3 S S | 1 a": "never ends", "S -> x a": "line 1", "S -> 0 a": "line 1",
    "S -> -1 a": "line 1", "S -> nan a": "line 1", "S -> inf a": "line 1", "S -> 1": "line 1",
    "S 1 a": "line 1",
    "S -> 1 a |": "line 1", "# nothing": "no rule", "": "no rule", "S -> 1 a\nS -> 1 b": "line 2",
    "A B -> 1 a": "line 1", "-> 1 a": "line 1", "S -> 1 a -> 1 b": "line 1", "S -> 1": "line 1",
    "S -> 1 A | 1 b\nA -> 1 B\nB -> 1 A": "never ends", "S -> 1e999 a": "line 1",
    "S -> 1 a b\n\n# x\nT ->": "line 4", "\ufeff": "no rule", "S": "line 1", "S -> | 1 a": "line 1",
    "S -> 1 A a\nA -> 1 S b": "never ends"}
BAD_TEXTS = {b"": "0 different", b"one line\n": "1 different", b"same\n" * 99: "1 different",
             b"\n\n \n": "0 different", b"\xff\xfe\xfa" * 60: "UTF-8", b"\xef\xbb\xbf": "0 diff",
             b"\r\n" * 80: "0 different", b"a\r\n" * 80: "1 different", b"x" * 10**6: "1 different",
             b"\x00": "1 different", "\U0001F600\n".encode() * 70: "1 different",
             b"ok\n" * 60 + b"\xc3": "UTF-8", "gr\xfc\xdfe\n".encode("utf-16"): "UTF-8",
             b"\n".join(b"%d" % (i % 49) for i in range(500)): "49 different"}
GOOD_TEXTS = {"crlf": "\r\n".join(f"line {i} of a file" for i in range(90)).encode(),
              "bom": b"\xef\xbb\xbf" + b"\n".join(b"line %d" % i for i in range(90)),
              "nul": b"\n".join(b"a\x00b %d" % i for i in range(90)),
              "emoji": "\n".join(f"\U0001F468\u200D\U0001F469 e\u0301 {i}"
                                 for i in range(90)).encode(),
              "a line of a million characters": b"\n".join(
                  [b"x" * 10**6, *(b"line %d" % i for i in range(90))]),
              "one word, of every length": b"\n".join(b"a " * i for i in range(1, 90))}
BAD_FLAGS = {
    "--preset huge": "preset", "--seed -1": "seed", "--seed x": "seed", "--lr 2": "lr",
    "--lr nan": "lr", "--temperatures 0": "temperatures", "--temperatures a": "temperatures",
    "--level syllable": "level", "--reward x": "reward", "--disc rnn": "disc", "--lam 1.5": "lam",
    "--kl_coef -1": "kl_coef", "--batch_size 1": "batch_size", "--rounds -1": "rounds",
    "--nonsense 1": "nonsense", "--eval_samples 1": "eval_samples", "--d_steps 0": "d_steps",
    "--context -3": "context", "--data /no/such/file": "/no/such/file", "--device teapot": "device",
    "--curated /no/such": "/no/such", "--grammar /no/such": "/no/such", "--samples 3": "model.pt",
    "--data": "data", "--temperatures": "temperatures", "--temperatures nan": "temperatures",
    "--temperatures 1 0": "temperatures", "--temperatures 101": "temperatures", "--lr inf": "lr",
    "--pretrain_steps 1.5": "pretrain_steps", "--sft_steps -1": "sft_steps",
    "--g_steps 0": "g_steps", "--gan_lr -0.1": "gan_lr", "--d_loss hinge": "d_loss",
    "--continued -1": "continued", "--resume yes": "yes", "--samples -1": "samples",
    "--temperature 0": "temperature", "--seed 1 2": "2", "--context 5000": "context",
    "--batch 3": "--batch", "--data /": "/", "extra": "extra"}


def complaint(argv, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_get_one_clear_line(flags, tmp_path, capsys):
    assert BAD_FLAGS[flags] in complaint([*flags.split(), "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", BAD_GRAMMARS)
def test_bad_grammars_get_one_clear_line(text, tmp_path, capsys):
    (tmp_path / "g.txt").write_text(text, encoding="utf-8")
    err = complaint(["--grammar", str(tmp_path / "g.txt"), "--out", str(tmp_path / "out")], capsys)
    assert BAD_GRAMMARS[text] in err and "g.txt" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", BAD_TEXTS)
def test_bad_texts_get_one_clear_line(content, tmp_path, capsys):
    (tmp_path / "t.txt").write_bytes(content)
    err = complaint(["--data", str(tmp_path / "t.txt"), "--out", str(tmp_path / "out")], capsys)
    assert BAD_TEXTS[content] in err and "t.txt" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", GOOD_TEXTS)
def test_odd_texts_are_read(kind, tmp_path):
    (tmp_path / "t.txt").write_bytes(GOOD_TEXTS[kind])
    for level in ("word", "char"):
        data = Data(parse(["--data", str(tmp_path / "t.txt"), "--level", level]))
        assert len(data.curated[0]) > 50 and int(data.curated[0].max()) < len(data.symbols)


def test_too_many_words_are_told_to_become_characters(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("\n".join(f"w{i} x{i}" for i in range(20001)), encoding="utf-8")
    assert "--level char" in complaint(["--data", str(tmp_path / "t.txt"), "--out", "x"], capsys)


def test_a_run_is_not_overwritten_nor_resumed_with_another_configuration(finished, capsys):
    before = (finished / "model.pt").read_bytes()
    assert "--resume" in complaint([*FILES, *FAST, "--out", str(finished)], capsys)
    err = complaint([*FILES, *FAST, "--out", str(finished), "--resume", "--seed", "5"], capsys)
    assert "--seed 5" in err and (finished / "model.pt").read_bytes() == before


def test_a_checkpoint_of_other_texts_or_shapes_says_so(finished, tmp_path, capsys):
    run = torch.load(finished / "model.pt", weights_only=True)
    torch.save(run | {"symbols": run["symbols"][:-1]}, tmp_path / "model.pt")
    assert "texts" in complaint([*FILES, *FAST, "--out", str(tmp_path), "--resume"], capsys)
    del run["models"]["gan"]["token.weight"]
    torch.save(run, tmp_path / "model.pt")
    assert "token.weight" in complaint(["--samples", "1", "--out", str(tmp_path)], capsys)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
def test_a_damaged_checkpoint_is_refused(content, tmp_path, capsys):
    (tmp_path / "model.pt").write_bytes(content)
    assert "model.pt" in complaint(["--out", str(tmp_path), "--resume"], capsys)
    assert "model.pt" in complaint(["--out", str(tmp_path), "--samples", "1"], capsys)
    assert (tmp_path / "model.pt").read_bytes() == content


class Hostile:
    def __reduce__(self):
        return os.system, ("touch " + str(ROOT / "hacked"),)


def test_a_hostile_checkpoint_is_refused_and_not_run(tmp_path, capsys):
    torch.save({"config": {}, "models": Hostile()}, tmp_path / "model.pt")
    assert "model.pt" in complaint(["--out", str(tmp_path), "--resume"], capsys)
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Hostile()))
    assert "model.pt" in complaint(["--out", str(tmp_path), "--samples", "1"], capsys)
    assert not (ROOT / "hacked").exists()


def test_a_second_run_in_a_folder_that_is_in_use_is_refused(tmp_path, monkeypatch, capsys):
    seen = []

    def second(*args):  # while the first is in its first phase
        seen.append(complaint([*FILES, *FAST, "--out", str(tmp_path)], capsys))
        raise KeyboardInterrupt
    monkeypatch.setattr(gan_lm, "train", second)
    with pytest.raises(SystemExit):
        main([*FILES, *FAST, "--out", str(tmp_path)])
    assert "--resume, or another folder" in seen[0]


def test_an_out_folder_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("precious", encoding="utf-8")
    complaint([*FILES, *FAST, "--out", str(tmp_path / "file")], capsys)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "precious"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_an_out_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert str(tmp_path) in complaint([*FILES, *FAST, "--out", str(tmp_path / "out")], capsys)


def test_an_unknown_word_in_a_prompt_is_named(finished, capsys):
    err = complaint(["--samples", "1", "--out", str(finished), "--prompt", "the zebra"], capsys)
    assert "zebra" in err


# ---- the README

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^python gan_lm\.py.*$", README, re.M))))
def test_every_command_of_the_readme_runs(command, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = shlex.split(command, comments=True)[2:]
    argv = [str(FEW / "curated.txt") if a.startswith("your") else a for a in argv]
    if "--samples" in argv:
        return main([*argv, "--out", str(finished)])
    files = [] if "--data" in argv else FILES
    main([*files, *argv, *FAST, "--temperatures", "1", "--out", str(tmp_path / "out")])


def test_every_function_that_the_readme_names_exists():
    for name in re.findall(r"`(\w+)\(\)`", README):
        assert hasattr(gan_lm, name) or hasattr(language, name) or name in globals(), name


# ---- several processes

def torchrun(script, *argv, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
               "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0",
               str(script), *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import sys, torch
from gan_lm import *
cfg = flags_of(Config, "", ["--device", "cpu", "--batch_size", sys.argv[1]])
join_torchrun("cpu")
torch.manual_seed(0)
data, model = Data(cfg), GPT(300, 64, 1, 32)
train_likelihood(model, data.curated, 20, 1e-2, cfg)
if ranks()[0] == 0:
    torch.save(model.state_dict(), sys.argv[2])
leave_torchrun()
""", encoding="utf-8")
    done = torchrun(script, 16, tmp_path / "two.pt")
    assert done.returncode == 0, done.stderr
    alone = subprocess.run([sys.executable, str(script), "32", str(tmp_path / "one.pt")], cwd=ROOT,
                           env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert alone.returncode == 0
    two, one = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("two", "one"))
    start = GPT(300, 64, 1, 32).state_dict()
    for name in one:
        assert torch.allclose(one[name], two[name], atol=2e-4), name
    assert not torch.allclose(one["token.weight"], start["token.weight"], atol=2e-2)


def test_a_whole_run_under_torchrun_writes_one_report(tmp_path):
    done = torchrun("gan_lm.py", *FILES, *FAST, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Best js") == 1
    assert {"model.pt", "report.json", "samples.txt"} <= {f.name for f in tmp_path.iterdir()}


def test_a_process_that_dies_ends_the_job_with_a_message(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import os, sys
import gan_lm
if os.environ["RANK"] == "1":
    gan_lm.train_discriminator = lambda *args: os._exit(9)
gan_lm.main(sys.argv[1:])
""", encoding="utf-8")
    start = time.time()
    done = torchrun(script, *FILES, *FAST, "--out", tmp_path / "out")
    assert done.returncode != 0 and time.time() - start < 100
    assert "a process of this torchrun is gone" in done.stderr or "exitcode  : 9" in done.stderr


# ---- speed: `python test_gan_lm.py` prints the ratios of the README

def rate(step, tokens, seconds=4.0):
    """Tokens (or whatever step() is told to count) a second, after a warm-up."""
    step()
    start, done = time.time(), 0
    while time.time() - start < seconds:
        step()
        done += tokens()
    return done / (time.time() - start)


def training_rates(data, cfg, seconds):
    """Real tokens a second of our MLE step, and of two nanoGPT-style ones (forward, backward, clip,
    plain AdamW): of the same sentences, each row padded to the longest of its batch; and of a
    stream cut into rows of 64 tokens, as many a step, where sentences read their neighbours."""
    count = {}

    def ours():
        x, = next(sentences)
        (likelihood_loss(token_logp(model, x)) / 10).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step(), adam.zero_grad()
        count["ours"] = int(real_tokens(x).sum())

    def plain(x, targets):
        logits = model(x)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                                          ignore_index=-1).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step(), adam.zero_grad()

    def padded():
        x = text[torch.randint(len(text), (cfg.batch_size,))]
        mask = real_tokens(x)
        T = int(mask.sum(1).max())
        plain(x[:, :T], x[:, 1:T + 1].where(mask[:, :T] > 0, -1))
        count["padded"] = int(mask.sum())

    def stream():
        start = torch.randint(len(tokens) - 65, (rows_a_step,))
        x = torch.stack([tokens[i:i + 65] for i in start])
        plain(x[:, :-1], x[:, 1:])
    text = data.messy[0]
    mask = real_tokens(text).bool()
    tokens, sentences = text[:, 1:][mask], batches(text, cfg.batch_size)
    rows_a_step = round(mask.sum().item() / len(text) * cfg.batch_size / 64)
    model = new_model({"symbols": data.symbols}, cfg)
    adam = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    first = rate(ours, lambda: count["ours"], seconds)
    adam = torch.optim.AdamW(model.parameters(), 1e-4)
    return (first, rate(padded, lambda: count["padded"], seconds),
            rate(stream, lambda: rows_a_step * 64, seconds))


@torch.no_grad()
def uncached(model, n, stop=False):
    """nanoGPT's `generate`: the whole prefix again for each token, up to the whole context.  With
    `stop` it ends when every row has ended, which nanoGPT's does not; finished rows go along."""
    x = torch.zeros(n, 1, dtype=torch.long)
    while x.shape[1] <= model.shape[1] and not (stop and (x[:, 1:] == 0).any(1).all()):
        x = torch.cat([x, model(x)[:, -1].softmax(-1).multinomial(1)], 1)
    return x


def sampling_rates(model, n, seconds):
    """Real tokens a second of sample(), of nanoGPT's loop, and of that loop with a stop."""
    count = {}

    def step(draw):
        count["n"] = int(real_tokens(draw(model, n)).sum())
    return [rate(lambda: step(draw), lambda: count["n"], seconds)
            for draw in (sample, uncached, lambda model, n: uncached(model, n, True))]


@torch.no_grad()
def rollout_rewards(model, disc, x, rollouts=16):
    """SeqGAN's reward of each token: the mean verdict on 16 completions of its prefix.  The
    completions are drawn with the cache, so that the comparison is of methods, not of loops."""
    B, T = x.shape[0], int(real_tokens(x).sum(1).max())
    rewards = torch.zeros(B, T)
    for t in range(1, T + 1):
        y, cache = x[:, :t + 1].repeat_interleave(rollouts, 0), {}
        full, token = y, y
        for _ in range(T - t):
            token = model(token, cache)[:, -1].softmax(-1).multinomial(1)
            full = torch.cat([full, token], 1)
        rewards[:, t - 1] = verdict(disc, full).sigmoid().view(B, rollouts).mean(1)
    return rewards


def adversarial_rates(model, cfg, seconds):
    """Sequences a second of our generator step, and of a SeqGAN step with 16 rollouts."""
    ref, n = deepcopy(model).requires_grad_(False), 4 * cfg.batch_size
    disc, cnn = PrefixDiscriminator(ref), CNNDiscriminator(ref)
    adam = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)

    def seqgan():
        x = sample(model, cfg.batch_size)
        rewards = rollout_rewards(model, cnn, x)
        x = x[:, :rewards.shape[1] + 1]
        policy_gradient_loss(token_logp(model, x), rewards * real_tokens(x)).backward()
        adam.step(), adam.zero_grad()
    start, steps = time.time(), 0
    while time.time() - start < seconds:
        train_generator(model, ref, disc, replace(cfg, g_steps=5, gan_lr=1e-6))
        steps += 5
    ours = steps * n / (time.time() - start)
    return ours, rate(seqgan, lambda: cfg.batch_size, seconds)


def as_gpt2(model):
    """The same weights in HuggingFace's GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel
    V, context, n_layer, C = model.shape
    hf = GPT2LMHeadModel(GPT2Config(
        vocab_size=V, n_positions=context + 1, n_embd=C, n_layer=n_layer, n_head=C // 32,
        activation_function="gelu", bos_token_id=0, eos_token_id=0)).eval()
    names = {"token": "wte", "position": "wpe", "ln": "ln_f"} | {
        f"layers.{i}.{ours}": f"h.{i}.{theirs}" for i in range(n_layer) for ours, theirs in (
            ("0.0", "ln_1"), ("0.1", "attn.c_attn"), ("1", "attn.c_proj"), ("2.0", "ln_2"),
            ("2.1", "mlp.c_fc"), ("2.3", "mlp.c_proj"))}
    theirs = hf.transformer.state_dict()
    for name, p in model.state_dict().items():
        module, kind = name.rsplit(".", 1)
        p = p.T if "c_" in names[module] and p.dim() == 2 else p
        theirs[f"{names[module]}.{kind}"].copy_(p)
    return hf


def test_logits_equal_those_of_transformers_gpt2():
    pytest.importorskip("transformers")
    model, x = tiny_gpt(V=50, context=16), torch.randint(50, (4, 16))
    assert torch.allclose(model(x), as_gpt2(model)(x).logits, atol=1e-4)


def trained(data, preset, steps):
    cfg = parse(["--device", "cpu", "--preset", preset])
    torch.manual_seed(0)
    model = new_model({"symbols": data.symbols}, cfg)
    train_likelihood(model, data.messy, steps, 4e-3, cfg)
    return model, cfg


def test_sampling_and_the_adversarial_step_are_faster_than_the_usual_ways(data):
    model, cfg = trained(data, "tiny", 100)
    ours, loop, stopping = sampling_rates(model, 200, 0.5)
    assert ours > 10 * loop and ours > 2 * stopping
    ours, rollouts = adversarial_rates(model, replace(cfg, batch_size=16), 0.5)
    assert ours > 5 * rollouts


def speed():
    data = Data(parse(["--device", "cpu"]))
    for preset, steps in (("tiny", 400), ("small", 300)):
        model, cfg = trained(data, preset, steps)
        ours, padded, stream = training_rates(data, cfg, 8)
        print(f"{preset}: training {ours:,.0f} real tokens/s; nanoGPT-style, padded {padded:,.0f}: "
              f"{ours / padded:.2f} times; a stream {stream:,.0f}: {ours / stream:.2f} times")
        for n in (256, 2000):
            ours, loop, stopping = sampling_rates(model, n, 8)
            print(f"{preset}: sampling {n} at once {ours:,.0f} tokens/s; without a cache "
                  f"{loop:,.0f}: {ours / loop:.1f} times, and with a stop {stopping:,.0f}: "
                  f"{ours / stopping:.1f} times")
            with suppress(ImportError):
                hf, count = as_gpt2(model), {}

                def generate():
                    x = hf.generate(torch.zeros(n, 1, dtype=torch.long), do_sample=True, top_k=0,
                                    max_length=65, pad_token_id=0,
                                    attention_mask=torch.ones(n, 1, dtype=torch.long))
                    count["n"] = int(real_tokens(x).sum())
                other = rate(generate, lambda: count["n"], 8)
                print(f"{preset}: sampling {n} at once by transformers' generate {other:,.0f} "
                      f"tokens/s: ours is {ours / other:.1f} times that")
        ours, other = adversarial_rates(model, cfg, 15)
        print(f"{preset}: adversarial step {ours:,.0f} sequences/s, SeqGAN's with 16 rollouts "
              f"{other:,.1f}: {ours / other:.0f} times")


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count())
    speed()
