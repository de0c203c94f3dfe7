"""Each test is named after the claim that it checks, in the order of gan_lm.py.  Run: pytest -q
The mathematics: pytest -k "rewards or advantages or gradient".  Speed: python test_gan_lm.py"""
import ast
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import gan_lm
from gan_lm import (CNNDiscriminator, Config, Data, GPT, PrefixDiscriminator, advantages, batches,
                    decoded, discriminator_loss, divergences, fit, fresh_judge, hints_of, judged,
                    likelihood_loss, main, measure, parse_flags, policy_gradient_loss, program,
                    real_tokens, sample, sequence_logp, show_report, teach, token_logp,
                    token_rewards, tokens_of, train_discriminator, train_generator,
                    train_likelihood, trim, update, verdict, why_undone)
from tiny_data import language
from tiny_data.language import Grammar

torch.set_num_threads(1)  # for tensors this small a second thread costs more than it brings
ROOT = Path(__file__).resolve().parent
KINDS = "mistakes", "noise", "clean"
FAST = ("--layers 1 --width 32 --context 24 --batch_size 8 --pretrain_steps 20 --sft_steps 5 "
        "--d_steps 8 --g_steps 2 --g_samples 32 --eval_samples 60 --temperatures 1 "
        "--min_ps 0 0.01 --device cpu").split()
FEW = Path(tempfile.mkdtemp(prefix="gan_lm_test_"))  # tiny_data/ with a few lines of each text
shutil.copy(ROOT / "tiny_data" / "grammar.txt", FEW)
for file in (*KINDS, "curated"):
    text = (ROOT / "tiny_data" / f"{file}.txt").read_text(encoding="utf-8").split("\n")
    (FEW / f"{file}.txt").write_text("\n".join(text[:400]), encoding="utf-8")
FILES = ["--data", str(FEW / "mistakes.txt"), "--curated", str(FEW / "curated.txt"),
         "--grammar", str(FEW / "grammar.txt")]
GRAMMAR = Grammar((FEW / "grammar.txt").read_text(encoding="utf-8"))
SMALL = "S -> 2 N V . | 1 if S then S .\nN -> 3 dogs | 1 the N\nV -> 1 run | 1 see N"
TOY = ("S -> 3 Ds Vs . | 2 Dp Vp .\nDs -> 2 the Ns | 1 a Ns\nDp -> 2 the Np | 1 some Np\n"
       "Ns -> 3 dog | 2 cat | 1 fox\nNp -> 3 dogs | 2 cats | 1 foxes\n"
       "Vs -> 2 runs | 1 sings | 2 sees D\nVp -> 2 run | 1 sing | 2 see D\nD -> 1 Ds | 1 Dp\n"
       "#~ Ns Np\n#~ runs run\n#~ sings sing\n#~ sees see")

def run(*argv):
    """main() with the few lines for the known language and at most 300 samples at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gan_lm, "TINY", FEW)
        patch.setattr(gan_lm, "sample", lambda model, n, *how: sample(model, min(n, 300), *how))
        main([*map(str, argv), *FAST])

@pytest.fixture(scope="module")
def data():
    return Data(parse_flags([*FILES, *FAST]))

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A language of eleven words, and a model that learned it from a messy text."""
    folder, grammar, rng = tmp_path_factory.mktemp("toy"), Grammar(TOY), random.Random(0)
    lines = [grammar.sample(rng) for _ in range(4000)]
    messy = [grammar.with_error(line, "mistakes", rng) if i % 5 < 2 else line
             for i, line in enumerate(lines[:2000])]
    for name, content in (("grammar", [TOY]), ("messy", messy), ("curated", lines[2000:])):
        (folder / f"{name}.txt").write_text("\n".join(content), encoding="utf-8")
    cfg = parse_flags([*FAST, "--data", str(folder / "messy.txt"), "--context", "12",
                       "--curated", str(folder / "curated.txt"), "--batch_size", "32",
                       "--grammar", str(folder / "grammar.txt"), "--eval_samples", "1000"])
    toy_data = Data(cfg)
    torch.manual_seed(0)
    model = GPT(len(toy_data.symbols), 12, 1, 32)
    train_likelihood(model, toy_data.messy, 300, 1e-2, cfg)
    return cfg, toy_data, model

def tiny_gpt(V=7, context=8, seed=0):
    torch.manual_seed(seed)
    model = GPT(V, context, 2, 64).eval()
    for p in model.parameters():  # far from uniform
        p.data += 0.3 * torch.randn_like(p) / p.shape[-1] ** 0.5
    return model

def rows(*lists, T=8):
    return torch.tensor([[0, *row, *[0] * (T - len(row))] for row in lists])

def every_sequence(V, T):
    """All that a model of V tokens and T places can write, as ids."""
    return rows(*sorted({tuple(s[:s.index(0) + 1] if 0 in s else s)
                         for s in itertools.product(range(V), repeat=T)}), T=T)

def complaint(argv, capsys):
    """The one line on standard error with which the program ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        program([*map(str, argv)])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1, err
    return err

# ---- the promises about the files

def test_the_files_are_short_enough_to_be_read():
    for file, most in ("gan_lm.py", 700), ("tiny_data/language.py", 130), ("test_gan_lm.py", 800):
        source = (ROOT / file).read_text(encoding="utf-8")
        lines = source.split("\n")[:-1]
        assert len(lines) <= most and max(map(len, lines)) <= 100, file
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and file != "test_gan_lm.py":
                length = node.end_lineno - node.lineno + 1
                assert length <= (60 if node.name == "main" else 45), node.name

def test_there_is_no_other_code():
    code = {".py", ".pyx", ".ipynb", ".sh", ".c", ".cpp", ".cu", ".js", ".ts", ".rs"}
    found = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.suffix in code
             and not any(p.startswith((".", "__")) for p in path.relative_to(ROOT).parts)}
    assert found == {"gan_lm.py", "test_gan_lm.py", str(Path("tiny_data", "language.py"))}

def test_importing_trains_nothing_and_needs_no_matplotlib():
    code = ("import sys; sys.modules['matplotlib'] = None; import gan_lm; "
            "print(len(gan_lm.__doc__) > 0, 'tiny_data.language' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr

# ---- the language

def every_sentence(grammar, symbols, depth):
    """Brute force: {sentence: probability} of all expansions at most `depth` deep."""
    if not symbols:
        return {(): 1.0}
    if symbols[0] not in grammar.rules:
        head = {(symbols[0],): 1.0}
    else:
        head = Counter()
        for w, alternative in grammar.rules[symbols[0]] if depth else ():
            for words, p in every_sentence(grammar, alternative, depth - 1).items():
                head[words] += w * p
    out = Counter()
    rest = every_sentence(grammar, symbols[1:], depth)
    for (a, p), (b, q) in itertools.product(head.items(), rest.items()):
        out[a + b] += p * q
    return out

def test_log_p_equals_brute_force_where_a_sentence_has_several_parses():
    grammar = Grammar("S -> 2 A B | 1 B\nA -> 1 x | 3 y\nB -> 1 x | 1 A A")
    endless = Grammar("S -> 2 N and S | 1 N and N | 3 N\nN -> 1 cats | 2 dogs")
    sentences = every_sentence(grammar, ("S",), 9)
    assert sum(sentences.values()) == pytest.approx(1.0)
    for words, p in sentences.items():
        assert math.exp(grammar.logp(" ".join(words))) == pytest.approx(p, rel=1e-9)
    for words, p in every_sentence(endless, ("S",), 5).items():
        if len(words) <= 7:  # longer ones have parses deeper than the search
            assert math.exp(endless.logp(" ".join(words))) == pytest.approx(p, rel=1e-9)

alternative = st.tuples(st.integers(1, 5),
                        st.lists(st.sampled_from("ABxy"), min_size=1, max_size=3))

@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(alternative, min_size=1, max_size=3), min_size=3, max_size=3))
def test_log_p_equals_brute_force_on_random_grammars(rules):
    # S may use A, B and words, A may use B and words, B words alone: every grammar ends
    grammar = Grammar("\n".join(
        f"{head} -> " + " | ".join(f"{w} " + " ".join(x if x in may else "z" for x in right)
                                   for w, right in rule)
        for head, may, rule in zip("SAB", ("ABxy", "Bxy", "xy"), rules)))
    sentences = every_sentence(grammar, ("S",), 3)
    assert sum(sentences.values()) == pytest.approx(1.0)
    for words, p in sentences.items():
        assert math.exp(grammar.logp(" ".join(words))) == pytest.approx(p, rel=1e-9)
    assert tuple(grammar.sample(random.Random(0)).split()) in sentences

def test_log_p_agrees_with_sampled_frequencies_and_is_minus_infinity_where_nothing_is_sampled():
    grammar, rng, n = Grammar(SMALL), random.Random(0), 10000
    lines = Counter(grammar.sample(rng) for _ in range(n))
    for line in ("dogs run .", "dogs see dogs .", "the dogs run ."):
        p = math.exp(grammar.logp(line))
        assert lines[line] / n == pytest.approx(p, abs=4 * math.sqrt(p / n))
    for line in ("", "run dogs .", "dogs fly .", "dogs run", "if dogs run . then"):
        assert grammar.logp(line) == -math.inf

def test_a_mistake_puts_a_sibling_in_the_place_of_one_word():
    assert GRAMMAR.siblings["runs"] == ["run"] and GRAMMAR.siblings["mice"] == ["mouse"]
    assert set(GRAMMAR.siblings["himself"]) == {"herself", "itself", "themselves"}
    rng = random.Random(0)
    for _ in range(200):
        line = GRAMMAR.sample(rng)
        wrong = GRAMMAR.with_error(line, "mistakes", rng)
        changed = [(a, b) for a, b in zip(line.split(), wrong.split()) if a != b]
        assert len(line.split()) == len(wrong.split()) and len(changed) == 1
        assert changed[0][1] in GRAMMAR.siblings[changed[0][0]]
        assert GRAMMAR.logp(wrong) == -math.inf < GRAMMAR.logp(line)

def test_noise_swaps_drops_doubles_or_replaces_one_word():
    rng = random.Random(0)
    for _ in range(100):
        a = GRAMMAR.sample(rng).split()
        b = GRAMMAR.with_error(" ".join(a), "noise", rng).split()
        may = [a[:i] + [a[i + 1], a[i]] + a[i + 2:] for i in range(len(a) - 1)]
        may += [a[:i] + a[i + 1:] for i in range(len(a))]
        may += [a[:i + 1] + a[i:] for i in range(len(a))]
        may += [a[:i] + [b[i]] + a[i + 1:] for i in range(min(len(a), len(b)))]
        assert b in may and GRAMMAR.logp(" ".join(b)) == -math.inf

@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_texts_are_made_again_byte_for_byte(kind, tmp_path):
    language.main([kind, str(tmp_path)])
    for name in (f"{kind}.txt", "curated.txt"):
        assert (tmp_path / name).read_bytes() == (ROOT / "tiny_data" / name).read_bytes(), name
    lines = (tmp_path / f"{kind}.txt").read_text(encoding="utf-8").splitlines()[:4000]
    wrong = np.mean([GRAMMAR.logp(line) == -math.inf for line in lines])
    assert wrong == (0 if kind == "clean" else pytest.approx(0.4, abs=0.03))

def test_a_text_that_is_there_already_is_not_made_again(tmp_path, capsys):
    (tmp_path / "curated.txt").write_text("precious", encoding="utf-8")
    with pytest.raises((SystemExit, FileExistsError)):
        language.main(["clean", str(tmp_path), "--messy", "9", "--curated", "9"])
    assert (tmp_path / "curated.txt").read_text(encoding="utf-8") == "precious"

def test_the_shipped_language_is_as_described():
    lines = [GRAMMAR.sample(random.Random(i)) for i in range(1000)]
    assert max(len(line.split()) for line in lines) <= 22
    assert 15 < -GRAMMAR.logps(lines).mean() < 25
    assert sum(file.stat().st_size for file in (ROOT / "tiny_data").glob("*.txt")) < 3e6

# ---- 1 configuration, 2 text

def test_each_field_of_the_configuration_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        program(["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and all(f"--{f.name} " in out for f in fields(Config))
    assert parse_flags(["--lr", "0.01"]).lr == 0.01 and parse_flags([]).temperatures == (1.0, 0.9)

def text_of(lines, level, context):
    """Data of these lines alone, without a file."""
    text = Data.__new__(Data)
    text.cfg = Config(level=level, context=context, device="cpu")
    text.symbols = ["", *sorted({t for line in lines for t in tokens_of(line, level)})]
    text.id_of = {symbol: i for i, symbol in enumerate(text.symbols)}
    return text

@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1,
                max_size=5), st.sampled_from(["word", "char"]))
def test_any_text_at_all_comes_back_from_ids_as_it_went_in(texts, level):
    lines = [" ".join(text.split()) for text in texts if text.split()]
    text = text_of(lines, level, 1000)
    assert not lines or text.to_lines(text.to_ids(lines)) == lines

@pytest.mark.parametrize("level", ["word", "char"])
def test_odd_lines_come_back_and_longer_ones_are_cut(level):
    lines = ["the dog runs .", "Don't stop-now, O'Neil!", "naïve e\u0301 \U0001F600", "a\x00b \u200d",
             "¿qué? … 東京"]
    text = text_of(lines, level, 24)
    assert text.to_lines(text.to_ids(lines)) == lines
    short = text_of(lines, level, 3)
    assert short.to_lines(short.to_ids(["the dog runs ."])) == [
        {"word": "the dog runs", "char": "the"}[level]]

def test_a_text_is_split_into_train_and_a_tenth_each_to_stop_and_to_measure(data):
    lines = (FEW / "curated.txt").read_text(encoding="utf-8").split("\n")
    parts = {name: data.to_lines(x) for name, x in data.curated.items()}
    assert Counter(lines) == Counter(line for part in parts.values() for line in part)
    assert len(parts["test"]) == len(parts["val"]) == len(lines) // 10
    assert set(parts["train"]) <= data.seen
    alone = Data(parse_flags(["--data", str(FEW / "curated.txt"), *FAST]))
    assert all(torch.equal(alone.messy[part], alone.curated[part]) for part in alone.messy)

def test_the_mask_marks_the_text_and_its_closing_end():
    x = rows([5, 6], [1, 2, 3, 4], T=4)
    assert real_tokens(x).tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert trim(rows([5, 6], T=8)).tolist() == [[0, 5, 6, 0]]

def test_batches_hold_every_row_and_rows_of_like_length():
    x = rows(*[[1] * (i % 7 + 1) for i in range(64)])
    stream = batches(x, 8)
    epoch = [next(stream) for _ in range(8)]
    assert sorted(torch.cat(epoch).tolist()) == list(range(64))
    assert max(real_tokens(x[part]).sum(1).var() for part in epoch) < 1
    stream = batches(x[:61], 8)  # a rest that fills no batch waits for another epoch
    assert {i for _ in range(60) for i in next(stream).tolist()} == set(range(61))
    assert sorted(next(batches(x[:3], 8)).tolist()) == [0, 1, 2]

# ---- 3 generator

DECODINGS = [(1.0, 0.0), (0.7, 0.0), (1.0, 0.3), (0.8, 0.2)]  # temperature, min_p

def test_the_generator_is_causal_and_padding_changes_nothing():
    model = tiny_gpt()
    x = rows([1, 2, 3, 4, 5, 6], [3, 3, 2])
    y = x.clone()
    y[0, 5:] = 6
    assert torch.allclose(model(x)[0, :5], model(y)[0, :5], atol=1e-5)
    assert not torch.allclose(model(x)[0, 5], model(y)[0, 5], atol=1e-3)
    logp = token_logp(model, x)
    assert torch.allclose(logp[1:, :4], token_logp(model, x[1:, :5]), atol=1e-5)
    assert (logp[1, 4:] == 0).all() and (logp[1, :4] < 0).all()

@pytest.mark.parametrize("decoding", DECODINGS)
def test_sequence_probabilities_sum_to_one(decoding):
    x = every_sequence(3, 3)
    p = sequence_logp(tiny_gpt(V=3, context=3), x, *decoding).exp()
    assert p.sum().item() == pytest.approx(1.0, abs=1e-5) and len(p) == 15

def test_min_p_cuts_what_is_below_that_share_of_the_likeliest():
    p = torch.tensor([0.5, 0.26, 0.14, 0.1])
    assert torch.allclose(decoded(p.log()).exp(), p)
    assert torch.allclose(decoded(p.log(), 1.0, 0.25).exp(),
                          torch.tensor([0.5, 0.26, 0.14, 0.0]) / 0.9)
    assert torch.allclose(decoded(p.log(), 1.0, 1.0).exp(), torch.tensor([1.0, 0, 0, 0]))
    hot = p.sqrt() / p.sqrt().sum()  # at temperature 2, and the cut is of these
    assert torch.allclose(decoded(p.log(), 2.0).exp(), hot)
    assert torch.allclose(decoded(p.log(), 2.0, 0.5).exp(),
                          torch.where(hot < hot[0] / 2, 0, hot) / hot[:3].sum())

@pytest.mark.parametrize("temperature, min_p", DECODINGS)
def test_cached_sampling_equals_uncached_sampling(temperature, min_p):
    model, n = tiny_gpt(), 50
    torch.manual_seed(3)
    fast, logq = sample(model, n, temperature, min_p, prompt=[2, 5])
    torch.manual_seed(3)
    slow, alive = torch.zeros(n, 9, dtype=torch.long), torch.arange(n)
    slow[:, 1:3] = torch.tensor([2, 5])
    for t in range(3, 9):
        total = decoded(model(slow[alive, :t])[:, -1], temperature, min_p).exp().cumsum(-1)
        u = total[:, -1:] * torch.rand(len(alive), 1)
        slow[alive, t] = torch.searchsorted(total, u, right=True)[:, 0]
        alive = alive[slow[alive, t] != 0]
        if not len(alive):
            break
    assert torch.equal(fast, slow) and (logq[:, :2] == 0).all()

@pytest.mark.parametrize("decoding", DECODINGS)
def test_sampling_tells_the_log_q_of_each_token(decoding):
    model = tiny_gpt()
    x, logq = sample(model, 200, *decoding)
    assert torch.allclose(logq, token_logp(model, x, *decoding), atol=1e-4)

@pytest.mark.parametrize("decoding", DECODINGS)
def test_samples_have_the_probabilities_that_sequence_logp_says(decoding):
    model, n = tiny_gpt(V=3, context=2), 20000
    torch.manual_seed(0)
    x, counts = torch.unique(sample(model, n, *decoding)[0], dim=0, return_counts=True)
    p = sequence_logp(model, x, *decoding).exp()
    assert ((counts / n - p).abs() < 4 * (p / n).sqrt()).all()

def test_memory_is_bounded_however_long_the_context_and_large_the_vocabulary(monkeypatch):
    asked, decode = [], gan_lm.decoded
    monkeypatch.setattr(gan_lm, "AT_ONCE", 2**16)
    monkeypatch.setattr(gan_lm, "decoded", lambda logits, *how: asked.append(logits.numel())
                        or decode(logits, *how))
    for V, T in ((5, 300), (2000, 10)):
        torch.manual_seed(0)
        model, x = GPT(V, T, 1, 32), torch.randint(1, V, (100, T + 1))
        model.trunk = lambda h, cache=None: (
            asked.append(sum(k.numel() + v.numel() for k, v in cache or [])),
            GPT.trunk(model, h, cache))[1]
        sequence_logp(model, x)
        gan_lm.in_chunks(lambda part: asked.append(part.numel() * V) or part[:, 1:], x, V=V)
        assert len(sample(model, 100)[0]) == 100 and max(asked) <= 2**16 and len(asked) > 20
        asked.clear()

# ---- 4 discriminators

def test_the_language_model_judges_each_prefix_by_what_came_before():
    ref, x = tiny_gpt(), rows([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 1, 1])
    a, b = PrefixDiscriminator(ref)(x, hints_of(ref, x))
    assert torch.allclose(a[:4], b[:4], atol=1e-5)
    assert not torch.allclose(a[4:], b[4:], atol=1e-3)

@pytest.mark.parametrize("kind", [PrefixDiscriminator, CNNDiscriminator])
def test_discriminators_ignore_what_follows_the_end(kind):
    ref = tiny_gpt()
    disc, x = kind(ref), rows([1, 2, 3, 4, 5, 6], [3, 3, 2])
    assert torch.allclose(disc(x, hints_of(ref, x))[1, :4],
                          disc(x[1:, :5], hints_of(ref, x[1:, :5]))[0], atol=1e-5)
    if kind is CNNDiscriminator:  # one verdict, at the closing END
        assert (disc(x, None) != 0).nonzero().tolist() == [[0, 6], [1, 3]]

def test_the_discriminator_starts_as_the_generator_and_reads_what_it_thought():
    ref, x = tiny_gpt(), rows([1, 2, 3])
    disc, hints = PrefixDiscriminator(ref), hints_of(ref, x)
    assert torch.equal(disc.lm(x), ref(x))
    assert torch.allclose(hints[..., 0], token_logp(ref, x), atol=1e-5)
    p = ref(x[:, :-1]).softmax(-1)
    minus_entropy = (p * p.log()).sum(-1) * real_tokens(x)
    assert torch.allclose(hints[..., 1], minus_entropy, atol=1e-4)
    assert not torch.allclose(disc(x, hints), disc(x, 0 * hints), atol=1e-3)
    assert not any(p is q for p in disc.parameters() for q in ref.parameters())

# ---- 5 objectives

def test_policy_gradient_equals_the_exact_gradient_by_enumeration():
    torch.manual_seed(0)
    first, second = torch.randn(3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    ref = torch.randn(3).log_softmax(0), torch.randn(3, 3).log_softmax(-1)
    x = every_sequence(3, 2)
    mask, verdicts = real_tokens(x), torch.randn(3, 3)
    logits = torch.stack([verdicts[x[:, 1], 0], verdicts[x[:, 1], x[:, 2]]], 1)  # of prefixes alone
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

def test_advantages_are_discounted_sums_less_the_batch_mean_and_have_no_derivative():
    r, mask = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]]), torch.ones(2, 3)
    logp = torch.zeros(2, 3, requires_grad=True)
    A = advantages(r, logp, torch.zeros(2, 3), mask, lam=0.5)
    assert torch.allclose(A[0], torch.tensor([3.0, 4.0, 4.0]) / 2) and torch.allclose(A[1], -A[0])
    assert not A.requires_grad and r[0, 0] == 1
    mask[1, 1:] = 0  # the mean is over the sequences that are still going on
    A = advantages(r, logp, torch.zeros(2, 3), mask, lam=0.5)
    assert torch.allclose(A, torch.tensor([[1.5, 0, 0], [-1.5, 0, 0]]))

def test_advantages_count_the_distance_from_the_reference_as_a_cost():
    mask, logp = torch.ones(2, 2), torch.tensor([[-1.0, -1.0], [-3.0, -1.0]])
    A = advantages(torch.zeros(2, 2), logp, -torch.ones(2, 2), mask, kl_coef=2.0, lam=1.0)
    assert torch.allclose(A, torch.tensor([[-2.0, 0.0], [2.0, 0.0]]))
    assert (advantages(torch.zeros(2, 2), logp, logp, mask) == 0).all()  # at the reference

def test_token_rewards_add_up_to_the_verdict_on_the_sentence():
    logits, mask = torch.randn(2, 5), torch.tensor([[1.0] * 5, [1, 1, 1, 0, 0]])
    rewards = token_rewards(logits, mask)
    assert torch.allclose(rewards.sum(1), torch.stack([logits[0, 4], logits[1, 2]]), atol=1e-6)
    assert rewards[0, 1] == logits[0, 1] - logits[0, 0] and (rewards[1, 3:] == 0).all()
    prob = token_rewards(logits, mask, "prob").sum(1)
    assert prob[0].item() == pytest.approx(logits[0, 4].sigmoid().item() - 0.5, abs=1e-6)
    for shape in ("logit", "prob"):  # where D has no opinion each of them is silent
        assert (token_rewards(torch.zeros(2, 5), mask, shape) == 0).all()

@pytest.mark.parametrize("kind", ["bce", "pairwise"])
def test_discriminator_losses_are_ln_2_without_a_signal_and_fall_with_the_right_one(kind):
    mask, right, is_real = torch.ones(2, 1), torch.tensor([[3.0], [-3]]), torch.tensor([True, False])
    silent = discriminator_loss(torch.zeros(2, 1), is_real, mask, kind).item()
    assert silent == pytest.approx(math.log(2))
    assert discriminator_loss(right, is_real, mask, kind).item() < silent
    assert discriminator_loss(-right, is_real, mask, kind).item() > silent
    x, mask = torch.randn(2, 3), torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    assert discriminator_loss(x, is_real, mask, "pairwise").item() == pytest.approx(
        F.softplus(x[1, :2] - x[0, :2]).mean().item())

def test_the_likelihood_loss_is_in_nats_and_the_discriminators_least_at_the_log_ratio():
    assert likelihood_loss(torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])).item() == 3.0  # a sequence
    is_real, ends = torch.tensor([True] * 8 + [False] * 2), []  # p = 0.8, q = 0.2 on one prefix
    for logit in (0.0, math.log(4), 3.0):
        s = torch.tensor([logit], requires_grad=True)
        discriminator_loss(s.expand(10, 1), is_real, torch.ones(10, 1)).backward()
        ends.append(s.grad.item())
    assert ends[0] < 0 < ends[2] and abs(ends[1]) < 1e-6

# ---- 6 training

def test_the_learning_rate_rises_20_steps_and_falls_along_a_cosine_and_betas_stay():
    model = torch.nn.Linear(1, 1)
    adam = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    for step in range(100):
        model(torch.ones(1, 1)).sum().backward()
        assert update(model, adam, step, 100, 0.5)
        expected = 0.5 * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / 100)) / 2
        assert adam.param_groups[0]["lr"] == pytest.approx(expected)
        assert adam.param_groups[0]["betas"] == (0.9, 0.99)
    before = model.weight.item()
    (model(torch.ones(1, 1)).sum() * math.inf).backward()  # what is not finite changes nothing
    assert not update(model, adam, 50, 100, 0.5) and model.weight.item() == before

def test_a_fit_ends_at_its_best_look_at_held_out_text():
    weight, looks, seen = torch.nn.Linear(1, 1), iter([5.0, 3.0, 4.0, 6.0]), []

    def look():
        seen.append(weight.weight.item())
        return next(looks)
    fit(weight, 30, 0.1, lambda: weight(torch.ones(1, 1)).sum(), "", look)
    assert weight.weight.item() == seen[1] and len(set(seen)) == 4

def test_a_loss_that_is_not_finite_ends_a_fit_at_the_best_model_before_it(capsys):
    weight, seen = torch.nn.Linear(1, 1, bias=False), []
    losses = iter([1.0] * 12 + [math.nan, 1.0])

    def look():
        seen.append(weight.weight.item())
        return 0
    fit(weight, 32, 0.1, lambda: weight(torch.ones(1, 1)).sum() * next(losses), "phase", look)
    assert "phase: no finite gradient at step 13" in capsys.readouterr().out
    assert weight.weight.item() == seen[-1] and len(seen) == 2  # the look after step 10

def test_likelihood_training_makes_held_out_text_likelier_and_says_how_likely(data):
    torch.manual_seed(0)
    model = GPT(len(data.symbols), 24, 1, 32)
    before = -sequence_logp(model, data.curated["val"]).mean()
    told = train_likelihood(model, data.curated, 40, 1e-2, data.cfg)["val_nll"]
    after = -sequence_logp(model, data.curated["val"]).mean()
    assert after < 0.9 * before and told == pytest.approx(after.item(), rel=1e-4)

def test_the_verdict_is_the_logit_at_the_last_token():
    x = rows([1, 2, 3], [4], [1] * 8)
    got = verdict(lambda part, hints: part[:, :-1] * 10.0 + hints[..., 0], x, torch.ones(3, 8, 2))
    assert got.tolist() == [31.0, 41.0, 11.0]

def test_the_figures_of_a_discriminator_forgive_a_constant():
    real, fake = torch.tensor([1.0, 3.0, -1.0, 2.0]), torch.tensor([-1.0, -2.0, 2.0, -3.0])
    first, second = judged(real, fake), judged(real + 9, fake + 9)
    assert first == pytest.approx(second) and first["d_loss"] < math.log(2)
    assert first["d_acc"] == 0.75
    assert judged(torch.zeros(4), torch.zeros(4))["d_loss"] == pytest.approx(math.log(2))

@pytest.mark.parametrize("kind, loss", [(PrefixDiscriminator, "bce"), (CNNDiscriminator, "bce"),
                                        (PrefixDiscriminator, "pairwise")])
def test_a_discriminator_learns_what_tells_the_two_sides_apart(kind, loss, data):
    torch.manual_seed(0)
    model = GPT(len(data.symbols), 24, 1, 32)
    cfg = replace(data.cfg, d_loss=loss, gan_lr=0.02)
    fake = {part: sample(model, 200)[0].short() for part in ("train", "val")}
    figures = train_discriminator(kind(model), model, data.curated, fake, 80, cfg)
    assert figures["d_acc"] > 0.8 and figures["d_loss"] < 0.65

def test_each_half_of_the_gan_leaves_the_other_alone(data):
    torch.manual_seed(0)
    model = GPT(len(data.symbols), 24, 1, 32)
    ref = deepcopy(model).requires_grad_(False)
    disc = PrefixDiscriminator(model)
    fake = {part: sample(ref, 64)[0] for part in ("train", "val")}
    train_discriminator(disc, model, data.curated, fake, 10, data.cfg)
    assert torch.equal(model.token.weight, ref.token.weight)
    assert all(p.grad is None for p in model.parameters())
    judge = deepcopy(disc.state_dict())
    for p in disc.parameters():
        p.grad = None
    train_generator(model, ref, disc, data.cfg)
    assert all(torch.equal(a, b) for a, b in zip(judge.values(), disc.state_dict().values()))
    assert all(p.grad is None for p in (*disc.parameters(), *ref.parameters()))
    assert not torch.equal(model.token.weight, ref.token.weight)

def test_the_adversarial_phase_lowers_js_and_a_good_round_is_kept(toy):
    cfg, toy_data, ref = toy
    cfg = replace(cfg, d_steps=100, g_steps=40, g_samples=256, gan_lr=5e-3)
    torch.manual_seed(1)
    model, disc = deepcopy(ref), PrefixDiscriminator(ref)
    old = teach(disc, ref, toy_data, 100, cfg)
    assert old["d_loss"] < math.log(2) - 3 * old["d_loss_se"]
    train_generator(model, ref, disc, cfg)
    before, after = (measure(m, (1.0, 0.0), toy_data, cfg)[0] for m in (ref, model))
    assert after["js"] + 3 * (after["js_se"] + before["js_se"]) < before["js"]
    assert after["valid"] > before["valid"] + 0.1
    assert why_undone(ref, model, toy_data, old, teach(disc, model, toy_data, 100, cfg)) == ""

def test_a_round_is_undone_for_a_worse_verdict_a_lost_likelihood_or_repetition(toy, monkeypatch):
    _, toy_data, before = toy
    after, found, less = deepcopy(before), {"d_loss": 0.6}, {"d_loss": 0.65}
    assert why_undone(before, after, toy_data, found, less) == ""
    assert "discriminator" in why_undone(before, after, toy_data, less, found)
    worse = deepcopy(before)
    worse.ln.bias.data += 0.5
    assert "likelihood" in why_undone(before, worse, toy_data, found, less)
    monkeypatch.setattr(gan_lm, "sample", lambda model, n: (
        sample(model, n)[0].clamp(max=n if model is before else 1), None))
    assert re.search("variety|repeat", why_undone(before, after, toy_data, found, less))

# ---- 7 measurement

P, Q = np.array([0.6, 0.3, 0.1, 0.0]), np.array([0.3, 0.3, 0.2, 0.2])
WEIGHT = np.array([2.0, 0.5, 1.0, 0.1])  # unnormalised, of a sample of Q

def exact(p, q):
    """KL, JS and TV as sums."""
    m, support = (p + q) / 2, p > 0
    js = [(a[a > 0] * np.log2(a[a > 0] / m[a > 0])).sum() / 2 for a in (p, q)]
    return {"kl": (p[support] * np.log(p[support] / q[support])).sum(), "js": sum(js),
            "tv": np.abs(p - q).sum() / 2}

def estimated(n, rng, weight):
    """divergences() of P and Q * weight / Z from n samples each; Z is estimated, too."""
    x, y = rng.choice(4, n, p=P), rng.choice(4, n, p=Q)
    z = weight[y].mean()
    with np.errstate(divide="ignore"):
        logq = np.log(Q * weight / z)
        return divergences(np.log(P)[x], logq[x], np.log(P)[y], logq[y], weight[y] / z)

@pytest.mark.parametrize("weight", [np.ones(4), WEIGHT])
def test_divergences_agree_with_the_sums_over_two_known_distributions(weight):
    a, never = np.log(P[:3]), np.full(3, -np.inf)
    assert all(divergences(a, a, a, a)[name] == 0 for name in ("kl", "js", "tv"))
    apart = divergences(a, never, never, a)
    assert apart["js"] == apart["tv"] == 1 and apart["kl"] == math.inf
    got = estimated(200000, np.random.default_rng(0), weight)
    for name, value in exact(P, Q * weight / (Q * weight).sum()).items():
        assert got[name] == pytest.approx(value, abs=0.01)
        assert name == "tv" or abs(got[name] - value) < 4 * got[name + "_se"] + 1e-4 < 0.02

@pytest.mark.parametrize("weight", [np.ones(4), WEIGHT])
def test_the_standard_error_of_js_is_how_far_js_scatters(weight):
    rng = np.random.default_rng(0)
    rows = [estimated(300, rng, weight) for _ in range(400)]
    scatter = np.std([row["js"] for row in rows])
    assert np.mean([row["js_se"] for row in rows]) == pytest.approx(scatter, rel=0.2)

@pytest.mark.parametrize("decoding", [(1.0, 0.0), (0.9, 0.1)])
def test_re_ranking_is_measured_as_the_exact_density_q_d_over_1_minus_d_by_z(decoding):
    model, x, rng = tiny_gpt(V=3, context=2), every_sequence(3, 2), np.random.default_rng(0)
    p, logit = rng.dirichlet(np.ones(len(x)) * 3), rng.normal(size=len(x))
    place = {tuple(row): i for i, row in enumerate(x.tolist())}

    def disc(part, hints):  # a verdict on each whole sequence, at all of its positions
        ids = [place[tuple(row + [0] * (3 - len(row)))] for row in part.tolist()]
        return torch.tensor(logit[ids]).float()[:, None].expand(-1, part.shape[1] - 1)
    drawn, n = rng.choice(len(x), 20000, p=p), 20000
    toy_data = SimpleNamespace(
        seen=set(), truth=x[drawn], truth_logp=np.log(p)[drawn],
        to_lines=lambda ids: [tuple(row) for row in ids.tolist()],
        grammar=SimpleNamespace(logps=lambda lines: np.log(p)[[place[a] for a in lines]]))
    torch.manual_seed(0)
    row, lines = measure(model, decoding, toy_data, Config(device="cpu", eval_samples=n), disc)
    density = sequence_logp(model, x, *decoding).exp().double().numpy() * np.exp(logit)
    density /= density.sum()
    expected = exact(p, density)
    assert abs(row["js"] - expected["js"]) < 4 * row["js_se"] < 0.05
    assert row["tv"] == pytest.approx(expected["tv"], abs=0.02)
    shares = np.bincount([place[line] for line in lines], minlength=len(x)) / n
    assert np.abs(shares - density).max() < 0.02  # the samples shown are of that density as well

def test_re_ranking_by_the_true_ratio_gives_nearly_the_true_language(toy):
    cfg, toy_data, model = toy

    def optimal(x, hints):  # logits log p/q, at every position
        logp = torch.tensor(toy_data.grammar.logps(toy_data.to_lines(x))).clamp(min=-50)
        return (logp - sequence_logp(model, x)).float()[:, None].expand(-1, x.shape[1] - 1)
    torch.manual_seed(0)
    plain, better = (measure(model, (1.0, 0.0), toy_data, cfg, disc)[0] for disc in (None, optimal))
    assert plain["js"] > 0.1 > 0.02 > better["js"] and plain["valid"] < 0.8 < better["valid"]

def test_a_judge_finds_what_is_different_and_one_that_is_mostly_wrong_counts_as_chance(
        data, monkeypatch):
    torch.manual_seed(0)
    model, cfg = GPT(len(data.symbols), 24, 1, 32), replace(data.cfg, d_steps=60, gan_lr=0.02)
    assert fresh_judge(model, sample(model, 100)[0], data, cfg)["judge_acc"] > 0.8
    monkeypatch.setattr(gan_lm, "judged", lambda real, fake: {"d_loss": 0.8, "d_acc": 0.3})
    found = fresh_judge(model, sample(model, 100)[0], data, cfg)
    assert found["judge_acc"] == 0.5 and found["judge_acc_se"] > 0.05

def answer(capsys, gan, other, se=0.0, shared=0.0, y="js"):
    """What show_report() says of these scores; se: the error of each, shared: of both alike."""
    wave = np.array([1.0, -1.0] * 50)
    row = {"temperature": 1.0, "min_p": 0.0, "novel": 1.0, "unique": 1.0, y + "_se": se, "kl": 1.0,
           "valid": 0.5, "nll": 9.0, "words": 1.0, "terms": (wave * shared, wave * se * 20)}
    show_report([row | {"name": name, y: gan if name == "gan" else other}
                 for name in ("mle", "sft", "continued", "gan", "reranked")])
    return capsys.readouterr().out

@pytest.mark.parametrize("y", ["js", "judge_acc"])
def test_the_answer_is_yes_only_for_a_gain_beyond_two_standard_errors(y, capsys):
    wins, error = "the GAN phase wins", 0.1 / math.sqrt(2)  # of the difference: 0.1
    assert wins in answer(capsys, 0.5, 0.71, error, y=y)
    assert "does NOT win" in answer(capsys, 0.5, 0.69, error, y=y)
    assert "does NOT win" in answer(capsys, 0.7, 0.5, y=y)
    assert "does NOT win" in answer(capsys, 0.599, 0.6, y=y)  # nothing worth the word
    assert wins in answer(capsys, 0.5, 0.6, shared=9.0)  # luck that both have is no error

def test_the_report_is_drawn_where_matplotlib_is_installed(tmp_path):
    pytest.importorskip("matplotlib")
    for y in ("js", "judge_acc"):
        arms = [{"name": name, y: 0.5} for name in ("mle", "sft", "continued", "gan", "reranked")]
        gan_lm.draw([arms, arms], tmp_path / f"{y}.png")
        assert (tmp_path / f"{y}.png").read_bytes().startswith(b"\x89PNG")

# ---- 8 the run: whole runs in miniature

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    run("--out", out)
    return out

def figures(out):
    """All that a report says, but for the time that things took."""
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    rounds = {name: {k: v for k, v in record.items() if k != "seconds"}
              for name, record in report["rounds"].items()}
    return report["arms"], rounds, report["entropy"]

def weights(out):
    models = torch.load(out / "model.pt", weights_only=True)["models"]
    return {f"{name}.{key}": value for name, state in models.items()
            for key, value in state.items()}

def test_a_run_writes_the_report_that_is_promised(finished):
    report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    assert {"config", "versions", "entropy", "arms", "rounds", "timing"} <= report.keys()
    arms = {"mle", "sft", "continued", "gan", "reranked"}
    assert Counter(arm["name"] for arm in report["arms"]) == dict.fromkeys(arms, 2)  # decodings
    for arm in report["arms"]:
        assert {"temperature", "min_p", "kl", "js", "js_se", "tv", "valid", "novel", "unique"} <= arm.keys()
        assert 0 <= arm["js"] <= 1.001 and 0 <= arm["valid"] <= 1
    assert {"reward", "kl_to_ref", "entropy", "tokens", "kept"} <= report["rounds"]["gan1"].keys()
    assert {"d_loss", "d_loss_se", "d_acc"} <= report["rounds"]["disc1"].keys()
    for arm in arms:
        lines = (finished / f"samples_{arm}.txt").read_text(encoding="utf-8").split("\n")
        assert len(lines) == 61

def test_the_same_seed_gives_the_same_figures_and_another_gives_others(finished, tmp_path):
    for seed in (0, 1):
        run("--out", tmp_path / f"{seed}", "--seed", seed)
    assert figures(finished) == figures(tmp_path / "0") != figures(tmp_path / "1")

def die_at_write(number, argv):
    """Run until the file of this number is half written, and be killed there."""
    write, calls = gan_lm.write, itertools.count()

    def dying(content, path):
        if next(calls) == number:
            path.with_name(f".{path.name}.{os.getpid()}").write_bytes(content[:len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(content, path)
    gan_lm.write = dying
    with open(os.devnull, "w") as sys.stdout:
        with open(os.devnull, "w") as sys.stderr:
            run(*argv)

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_at_random_moments_change_nothing(finished, tmp_path):
    argv, rng = ["--out", tmp_path / "killed", "--resume"], random.Random(0)
    start = multiprocessing.get_context("fork").Process  # a fork has imported torch already
    for number in (0, 1, 2, 99, 1, 3, 99, 2, 99, 1):  # 99: never, the moment is one of the clock's
        child = start(target=die_at_write, args=(number, argv))
        child.start()
        child.join(rng.uniform(0.1, 0.6) if number == 99 else 60)
        child.kill()
        child.join()
        assert number == 99 or child.exitcode == -signal.SIGKILL
        assert number == 99 or not (tmp_path / "killed" / "report.json").exists()
    run(*argv)
    assert figures(finished) == figures(tmp_path / "killed")
    ours, theirs = weights(finished), weights(tmp_path / "killed")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)

def test_ctrl_c_says_how_to_go_on_and_exits_130(tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(gan_lm, "train_likelihood", interrupt)
    with pytest.raises(SystemExit) as stopped:
        program([*FILES, *FAST, "--out", str(tmp_path)])
    err = capsys.readouterr().err
    assert stopped.value.code == 130 and "--resume" in err and err.count("\n") == 1
    assert (tmp_path / "model.pt").exists()
    assert "no phase" in complaint(["--samples", "1", "--out", tmp_path], capsys)

def test_a_gpu_too_small_is_a_message_that_names_the_flags_to_lower(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
    monkeypatch.setattr(gan_lm, "train_likelihood", full)
    err = complaint([*FILES, *FAST, "--out", tmp_path], capsys)
    assert "--batch_size" in err and "--context" in err and "--width" in err

def test_a_full_disk_is_a_clear_message_and_the_last_file_is_whole(tmp_path, monkeypatch, capsys):
    gan_lm.write(b"precious", tmp_path / "model.pt")

    def full(path, content):
        path.open("wb").write(content[:4])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space" in complaint([*FILES, *FAST, "--out", tmp_path / "new"], capsys)
    with pytest.raises(OSError):
        gan_lm.write(b"longer than that", tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == b"precious"
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["model.pt"]

def test_a_saved_model_gives_the_same_samples_and_figures(finished, capsys):
    before, printed = figures(finished), []
    for seed in (1, 1, 2):
        capsys.readouterr()
        main(f"--samples 5 --seed {seed} --out {finished} --prompt".split() + ["the dog"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2] and printed[0].count("\n") == 5
    assert all(line.startswith("the dog") for line in printed[0].split("\n")[:5])
    run("--out", finished, "--resume")  # trains nothing, measures again
    assert figures(finished) == before

def test_samples_are_of_the_last_model_that_was_kept(finished, tmp_path, capsys):
    for kept, chosen in (True, "gan1"), (False, "sft"):
        saved = torch.load(finished / "model.pt", weights_only=True)
        saved["records"]["gan1"]["kept"] = kept
        for name in {"mle", "sft", "gan1", "more", "continued"} - {chosen}:
            saved["models"][name]["token.weight"][0] = 99.0  # a broken one
        torch.save(saved, tmp_path / "model.pt")
        main(["--samples", "20", "--out", str(tmp_path), "--seed", "1"])
        model = GPT(len(saved["symbols"]), 24, 1, 32)
        model.load_state_dict(saved["models"][chosen])
        torch.manual_seed(1)
        expected = ["".join(saved["symbols"][i] for i in row).strip()
                    for row in sample(model, 20)[0].tolist()]
        assert capsys.readouterr().out.split("\n")[:-1] == expected

@pytest.mark.parametrize("flags", [
    "--rounds 0", "--rounds 3 --lam 1 --reward prob", "--level char --data noise",
    "--disc cnn --kl_coef 0 --gan_lr 1", "--d_loss pairwise --lr 0 --data clean"])
def test_every_switch_runs(flags, tmp_path):
    run("--out", tmp_path, *flags.split())
    assert figures(tmp_path)[0]

@pytest.mark.parametrize("flags", ["--d_steps 1", "--g_steps 1 --g_samples 2", "--context 1",
                                   "--pretrain_steps 0 --sft_steps 0", "--eval_samples 10"])
def test_the_least_that_a_flag_allows_runs(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "FAST", [*FAST, *flags.split()])
    run("--out", tmp_path)
    assert figures(tmp_path)[0]

@pytest.mark.parametrize("lines, level", [(400, "word"), (400, "char"), (50, "word")])
def test_text_without_a_grammar_gets_a_judge(lines, level, tmp_path):
    rng = random.Random(0)
    words = "Hark who goes there my lord, good night sweet prince".split()
    text = {" ".join(rng.choices(words, k=6)) for _ in range(2 * lines)}
    (tmp_path / "text.txt").write_text("\n".join(sorted(text)[:lines]), encoding="utf-8")
    run("--data", tmp_path / "text.txt", "--level", level, "--out", tmp_path)
    arms, _, entropy = figures(tmp_path)
    assert entropy is None and len(arms) == 10
    for arm in arms:
        assert {"nll", "words", "novel", "unique"} <= arm.keys() and "js" not in arm
        assert 0.5 <= arm["judge_acc"] <= 1

def test_the_file_alone_in_an_empty_folder_runs_on_a_text_and_goes_on_in_another_process(tmp_path):
    shutil.copy(ROOT / "gan_lm.py", tmp_path)
    shutil.copy(FEW / "curated.txt", tmp_path / "your.txt")
    argv = ["--data", "your.txt", "--level", "char", *FAST]
    for resume in ([], ["--resume"]):  # with other hashes, so that no order depends on those
        done = subprocess.run(
            [sys.executable, "gan_lm.py", *argv, *resume], cwd=tmp_path, capture_output=True,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "",
                            "PYTHONHASHSEED": str(1 + len(resume))})
        assert done.returncode == 0 and "Best judge_acc" in done.stdout, done.stderr
        assert ("likelihood" in done.stderr or "val_nll" in done.stdout) != bool(resume)
    assert (tmp_path / "out" / "report.json").exists()

# ---- bad input: one line that names what is at fault, status 2, nothing written

BAD_FLAGS = {
    "--seed -1": "seed", "--seed x": "seed", "--seed 1 2": "2", "--lr 2": "lr", "--lr nan": "lr",
    "--lr inf": "lr", "--gan_lr -0.1": "gan_lr", "--temperatures 0": "temperatures",
    "--temperatures a": "temperatures", "--temperatures": "temperatures",
    "--temperatures 1 nan": "temperatures", "--temperatures 1 0": "temperatures",
    "--min_ps 1.5": "min_ps", "--min_ps": "min_ps", "--min_p -1 --samples 1": "min_p",
    "--temperature 0": "temperature", "--level syllable": "level", "--reward ratio": "reward",
    "--disc rnn": "disc", "--d_loss hinge": "d_loss", "--lam 1.5": "lam", "--kl_coef -1": "kl_coef",
    "--batch_size 1": "batch_size", "--rounds -1": "rounds", "--width 48":
    "width", "--width 0": "width", "--layers 0": "layers", "--context -3": "context",
    "--context 5000": "context", "--eval_samples 1": "eval_samples", "--g_samples 0": "g_samples",
    "--pretrain_steps 1.5": "pretrain_steps", "--sft_steps -1": "sft_steps", "--d_steps -1":
    "d_steps", "--samples -1": "samples", "--samples 3": "model.pt", "--device teapot": "device",
    "--data": "data", "--data /": "/", "--data /no/such/file": "/no/such/file",
    "--curated /no/such": "/no/such", "--grammar /no/such": "/no/such", "--nonsense 1": "nonsense",
    "--batch 3": "--batch", "--resume yes": "yes", "extra": "extra"}
BAD_GRAMMARS = {
    "S -> 1 S": "S", "S -> 1 A\nA -> 1 S": "never ends", "S -> 3 S S | 1 a": "never ends",
    "S -> 3 a S S | 1 b": "never ends", "S -> 1 S a | 1 b": "begins with itself",
    "S -> 1 A | 1 b\nA -> 1 B\nB -> 1 A": "never", "S -> x a": "line 1", "S -> 0 a": "line 1",
    "S -> -1 a": "line 1", "S -> nan a": "line 1", "S -> inf a": "line 1", "S -> 1e999 a": "line 1",
    "S -> 1": "line 1", "S 1 a": "line 1", "S": "line 1", "S -> 1 a |": "line 1",
    "S -> | 1 a": "line 1", "A B -> 1 a": "line 1", "-> 1 a": "line 1",
    "S -> 1 a -> 1 b": "line 1", "S -> 1 a\nS -> 1 b": "line 2", "S -> 1 a b\n\n# x\nT ->": "line 4",
    "# nothing": "no rule", "": "no rule", "\ufeff": "no rule"}
BAD_TEXTS = {b"": "0 different", b"one line\n": "1 different", b"same\n" * 99: "1 different",
             b"\n\n \n": "0 different", b"\xef\xbb\xbf": "0 different", b"\x00": "1 different",
             b"\r\n" * 80: "0 different", b"x" * 10**6: "1 different", b"\xff\xfe\xfa" * 9: "UTF-8",
             b"ok\n" * 60 + b"\xc3": "UTF-8", "gr\xfc\xdfe\n".encode("utf-16"): "UTF-8",
             b"\n".join(b"%d" % (i % 49) for i in range(500)): "49 different"}
GOOD_TEXTS = {"crlf": "\r\n\r\n".join(f"line {i} of a file" for i in range(90)).encode(),
              "bom": b"\xef\xbb\xbf" + b"\n".join(b"line %d" % i for i in range(90)),
              "nul": b"\n".join(b"a\x00b %d" % i for i in range(90)),
              "emoji": "\n".join(f"\U0001F468\u200D\U0001F469 e\u0301 {i}"
                                 for i in range(90)).encode(),
              "a line of a million characters": b"\n".join(
                  [b"x" * 10**6, *(b"line %d" % i for i in range(90))]),
              "one word, of every length": b"\n".join(b"a " * i for i in range(1, 90))}

@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_get_one_clear_line(flags, tmp_path, capsys):
    assert BAD_FLAGS[flags] in complaint([*flags.split(), "--out", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()

@pytest.mark.parametrize("text", BAD_GRAMMARS)
def test_bad_grammars_get_one_clear_line(text, tmp_path, capsys):
    (tmp_path / "g.txt").write_text(text, encoding="utf-8")
    argv = [*FILES, "--grammar", tmp_path / "g.txt", "--out", tmp_path / "out"]
    err = complaint(argv, capsys)
    assert BAD_GRAMMARS[text] in err and "g.txt" in err and not (tmp_path / "out").exists()

@pytest.mark.parametrize("content", BAD_TEXTS)
@pytest.mark.parametrize("flag", ["--data", "--curated"])
def test_bad_texts_get_one_clear_line(flag, content, tmp_path, capsys):
    (tmp_path / "t.txt").write_bytes(content)
    err = complaint([*FILES, flag, tmp_path / "t.txt", "--out", tmp_path / "out"], capsys)
    assert BAD_TEXTS[content] in err and "t.txt" in err and not (tmp_path / "out").exists()

@pytest.mark.parametrize("level", ["word", "char"])
@pytest.mark.parametrize("kind", GOOD_TEXTS)
def test_odd_but_good_texts_are_read(kind, level, tmp_path):
    (tmp_path / "t.txt").write_bytes(GOOD_TEXTS[kind])
    text = Data(parse_flags(["--data", str(tmp_path / "t.txt"), "--level", level]))
    assert 71 <= len(text.curated["train"]) <= 74
    assert 1 <= int(text.curated["train"].max()) < len(text.symbols)
    assert not any("\ufeff" in symbol or "\r" in symbol for symbol in text.symbols)

def test_too_many_words_are_told_to_become_characters(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("\n".join(f"w{i} x{i}" for i in range(20001)), encoding="utf-8")
    err = complaint(["--data", tmp_path / "t.txt", "--out", tmp_path / "out"], capsys)
    assert "--level char" in err and not (tmp_path / "out").exists()

def test_a_run_is_not_overwritten_nor_resumed_with_another_configuration(finished, capsys):
    before = (finished / "model.pt").read_bytes()
    argv = [*FAST, "--data", "mistakes", "--out", finished]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gan_lm, "TINY", FEW)
        assert "--resume" in complaint(argv, capsys)
        assert "--seed" in complaint([*argv, "--resume", "--seed", "5"], capsys)
        patch.setattr(gan_lm, "tokens_of", lambda line, level: ["odd", *tokens_of(line, level)])
        assert "texts" in complaint([*argv, "--resume"], capsys)
    assert (finished / "model.pt").read_bytes() == before

@pytest.mark.parametrize("damage", [
    lambda whole: b"", lambda whole: b"not a checkpoint", lambda whole: b"PK\x03\x04broken",
    lambda whole: whole[:len(whole) // 2], lambda whole: whole[len(whole) // 2:]])
def test_a_damaged_checkpoint_is_refused(damage, finished, tmp_path, capsys):
    content = damage((finished / "model.pt").read_bytes())
    (tmp_path / "model.pt").write_bytes(content)
    assert "model.pt" in complaint([*FILES, "--out", tmp_path, "--resume"], capsys)
    assert "model.pt" in complaint(["--out", tmp_path, "--samples", "1"], capsys)
    assert (tmp_path / "model.pt").read_bytes() == content

class Hostile:
    def __reduce__(self):
        return os.system, ("touch " + str(FEW / "hacked"),)

def test_a_hostile_checkpoint_is_refused_and_not_run(tmp_path, capsys):
    run = {"config": {}, "symbols": [], "records": {}, "models": Hostile()}
    torch.save(run, tmp_path / "model.pt")
    assert "model.pt" in complaint([*FILES, "--out", tmp_path, "--resume"], capsys)
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Hostile()))
    assert "model.pt" in complaint(["--out", tmp_path, "--samples", "1"], capsys)
    torch.save([1, 2], tmp_path / "model.pt")  # harmless, but of another program
    assert "model.pt" in complaint(["--out", tmp_path, "--samples", "1"], capsys)
    assert not (FEW / "hacked").exists()

def test_an_unknown_word_in_a_prompt_and_an_out_folder_that_is_a_file_are_named(
        finished, tmp_path, capsys):
    argv = ["--samples", "1", "--out", finished, "--prompt", "the zebra"]
    assert "zebra" in complaint(argv, capsys)
    (tmp_path / "file").write_text("precious", encoding="utf-8")
    assert "file" in complaint([*FILES, *FAST, "--out", tmp_path / "file"], capsys)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "precious"

# ---- the README

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = {shlex.join(shlex.split(line, comments=True)[2:])
            for line in re.findall(r"^python gan_lm\.py.*$", README, re.M)}

@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_of_the_readme_runs(command, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = [str(FEW / "curated.txt") if a.endswith(".txt") and not Path(a).exists() else a
            for a in shlex.split(command)]
    old = "--samples" in argv or "--resume" in argv
    run(*argv, "--out", finished if old else tmp_path / "out")

def test_every_function_that_the_readme_names_exists():
    names = re.findall(r"`(\w+)\(\)`", README)
    assert names
    for name in names:
        assert hasattr(gan_lm, name) or hasattr(language, name) or name in globals(), name

# ---- several processes

def python(*argv):
    return subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True,
                          text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0",
            "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")

def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys, gan_lm, torch
cfg = gan_lm.parse_flags([*{FILES}, *{FAST}, "--batch_size", sys.argv[1]])
gan_lm.join_torchrun("cpu")
data = gan_lm.Data(cfg)
torch.manual_seed(0)
model = gan_lm.GPT(len(data.symbols), 24, 1, 32)
gan_lm.train_likelihood(model, data.curated, 20, 1e-2, cfg)
if gan_lm.ranks()[0] == 0:
    torch.save(model.state_dict(), sys.argv[2])
""", encoding="utf-8")
    for done in (python(*TORCHRUN, script, 16, tmp_path / "two.pt"),
                 python(script, 32, tmp_path / "one.pt")):
        assert done.returncode == 0, done.stderr
    two, one = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("two", "one"))
    torch.manual_seed(0)
    start = GPT(len(two["token.weight"]), 24, 1, 32).state_dict()
    assert all(torch.allclose(one[name], two[name], atol=2e-4) for name in one)
    assert not torch.allclose(one["token.weight"], start["token.weight"], atol=2e-2)

def test_a_whole_run_under_torchrun_writes_one_report(tmp_path):
    done = python(*TORCHRUN, "gan_lm.py", *FILES, *FAST, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Best js") == 1 and figures(tmp_path)[0]

# ---- speed: `python test_gan_lm.py` prints ratios, each with ours first

def rate(step, seconds):
    """What step() counts, a second, after a warm-up."""
    step()
    start, done = time.time(), 0
    while time.time() - start < seconds:
        done += step()
    return done / (time.time() - start)

def training_rates(data, cfg, model, seconds):
    """Real tokens a second of our step, and of nanoGPT-style ones (forward, backward, clip, AdamW):
    on rows padded to the longest of the batch; on a stream of sentences cut into rows of 64."""
    text = data.messy["train"]
    stream = text[:, 1:][real_tokens(text).bool()].long()
    n = round(len(stream) / len(text) * cfg.batch_size / 64)  # as many tokens a step
    adam, sentences = torch.optim.AdamW(model.parameters(), fused=True), batches(text, cfg.batch_size)

    def ours():
        x = trim(text[next(sentences)])
        (likelihood_loss(token_logp(model, x)) / 10).backward()
        update(model, adam, 500, 1000, 1e-4)
        return int(real_tokens(x).sum())

    def plain(x, mask):
        targets = x[:, 1:].where(mask > 0, -1).flatten()
        F.cross_entropy(model(x[:, :-1]).flatten(0, 1), targets, ignore_index=-1).backward()
        update(model, adam, 500, 1000, 1e-4)
        return int(mask.sum())

    def padded():
        x = trim(text[torch.randint(len(text), (cfg.batch_size,))])
        return plain(x, real_tokens(x))

    def streamed():
        x = stream[torch.randint(len(stream) - 65, (n, 1)) + torch.arange(65)]
        return plain(x, torch.ones(n, 64))
    return [rate(step, seconds) for step in (ours, padded, streamed)]

@torch.no_grad()
def uncached(model, n):
    """nanoGPT's `generate` with a stop: the whole prefix again for each token."""
    x = torch.zeros(n, 1, dtype=torch.long)
    while x.shape[1] <= model.shape[1] and not (x[:, 1:] == 0).any(1).all():
        x = torch.cat([x, model(x)[:, -1].softmax(-1).multinomial(1)], 1)
    return ended(x)

def ended(x):  # without what a row says after its first END
    return torch.cat([x[:, :1], x[:, 1:] * x[:, 1:].ne(0).cumprod(1)], 1)

@torch.no_grad()
def rollout_rewards(model, disc, x, rollouts=16):
    """SeqGAN's reward of each token: the mean verdict on 16 completions of its prefix, cached."""
    T = x.shape[1] - 1
    rewards = torch.zeros(len(x), T)
    for t in range(1, T + 1):
        y = x[:, :t + 1].repeat_interleave(rollouts, 0)
        token, cache = y, None
        for place in range(t + 1, T + 1):
            h, cache = model.trunk(model.embed(token, place - token.shape[1]), cache)
            token = (h[:, -1] @ model.token.weight.T).softmax(-1).multinomial(1)
            y = torch.cat([y, token], 1)
        score = verdict(disc, ended(y), torch.zeros(len(y), T, 2)).sigmoid()
        rewards[:, t - 1] = score.view(len(x), rollouts).mean(1)
    return rewards

def adversarial_rates(cfg, model, seconds):
    """Sequences a second of our generator step, and of a SeqGAN step with 16 rollouts."""
    ref, cfg = deepcopy(model), replace(cfg, g_steps=3, g_samples=256, gan_lr=1e-6)
    disc, cnn = PrefixDiscriminator(ref), CNNDiscriminator(ref)
    adam = torch.optim.AdamW(model.parameters(), fused=True)

    def ours():
        train_generator(model, ref, disc, cfg)
        return cfg.g_steps * cfg.g_samples

    def seqgan():
        x = trim(sample(model, cfg.batch_size)[0])
        rewards = rollout_rewards(model, cnn, x) * real_tokens(x)
        policy_gradient_loss(token_logp(model, x), rewards).backward()
        update(model, adam, 500, 1000, 1e-6)
        return cfg.batch_size
    return rate(ours, seconds), rate(seqgan, seconds)

def sampling_rates(model, n, seconds):
    """Real tokens a second of sample() and of the loop without a cache."""
    return [rate(lambda: int(real_tokens(draw(n)).sum()), seconds)
            for draw in (lambda n: sample(model, n)[0], lambda n: uncached(model, n))]

def test_sampling_and_the_adversarial_step_are_faster_than_the_usual_ways(toy):
    ours, loop = sampling_rates(toy[2], 2000, 0.3)
    assert ours > 1.2 * loop
    ours, rollouts = adversarial_rates(toy[0], deepcopy(toy[2]), 0.3)
    assert ours > 4 * rollouts

def speed():
    cfg = parse_flags(["--device", "cpu"])
    data = Data(cfg)
    model = GPT(len(data.symbols), cfg.context, cfg.layers, cfg.width)
    train_likelihood(model, data.messy, 400, cfg.lr, cfg)
    for name, rates in (
            ("real tokens/s: step, padded, stream", training_rates(data, cfg, deepcopy(model), 8)),
            ("256 samples at once, tokens/s: ours, without a cache", sampling_rates(model, 256, 8)),
            ("2,000 at once", sampling_rates(model, 2000, 8)),
            ("adversarial step, sequences/s: ours, 16 rollouts", adversarial_rates(cfg, model, 15))):
        print(f"{name}:", *(f"{r:,.0f} ({rates[0] / r:.2f} times)" for r in rates))

if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count())
    speed()
