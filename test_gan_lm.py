"""Each test is named after the claim that it checks, in the order of gan_lm.py.  Run: pytest -q
The mathematics: pytest -k "rewards or advantages or gradient".  Speed: python test_gan_lm.py"""
import ast, itertools, json, math, multiprocessing, os, pickle, random, re  # noqa: E401
import shlex, shutil, signal, subprocess, sys, tempfile, time  # noqa: E401
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import gan_lm
from gan_lm import *  # noqa: F403
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
FILES = f"--data {FEW}/mistakes.txt --curated {FEW}/curated.txt --grammar {FEW}/grammar.txt".split()
GRAMMAR = Grammar((FEW / "grammar.txt").read_text(encoding="utf-8"))
SMALL = "S -> 2 N V . | 1 if S then S .\nN -> 3 dogs | 1 the N\nV -> 1 run | 1 see N"
TOY = ("S -> 3 Ds Vs . | 2 Dp Vp .\nDs -> 2 the Ns | 1 a Ns\nDp -> 2 the Np | 1 some Np\n"
       "Ns -> 3 dog | 2 cat | 1 fox\nNp -> 3 dogs | 2 cats | 1 foxes\nVs -> 2 runs | 2 sees D\n"
       "Vp -> 2 run | 2 see D\nD -> 1 Ds | 1 Dp\n#~ Ns Np\n#~ runs run\n#~ sees see")

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
def toy(tmp_path_factory):  # a small language, and a model of a messy text in it
    folder, grammar, rng = tmp_path_factory.mktemp("toy"), Grammar(TOY), random.Random(0)
    lines = [grammar.sample(rng) for _ in range(4000)]
    messy = [grammar.with_error(line, "mistakes", rng) if i % 5 < 2 else line
             for i, line in enumerate(lines[:2000])]
    argv = [*FAST, *"--width 64 --context 12 --batch_size 64 --eval_samples 1000".split()]
    for name, content in (("grammar", [TOY]), ("data", messy), ("curated", lines[2000:])):
        (folder / name).write_text("\n".join(content), encoding="utf-8")
        argv += ["--" + name, str(folder / name)]
    cfg = parse_flags(argv)
    toy_data, _ = Data(cfg), torch.manual_seed(0)
    model = GPT(len(toy_data.symbols), 12, 1, 64)
    train_likelihood(model, toy_data.messy, 300, 5e-3, replace(cfg, batch_size=32))
    return cfg, toy_data, model

def tiny_gpt(V=7, context=8):
    torch.manual_seed(0)
    model = GPT(V, context, 2, 64)
    for p in model.parameters():  # far from uniform
        p.data += 0.3 * torch.randn_like(p) / p.shape[-1] ** 0.5
    return model

def rows(*lists, T=8):
    return torch.tensor([[0, *row, *[0] * (T - len(row))] for row in lists])

def every_sequence(V, T):
    return rows(*sorted({tuple(s[:s.index(0) + 1] if 0 in s else s)
                         for s in itertools.product(range(V), repeat=T)}), T=T)

def complaint(argv, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped, pytest.MonkeyPatch.context() as patch:
        patch.setattr(gan_lm, "TINY", FEW)
        main([*map(str, argv)])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1, err
    return err

# ---- the promises about the files
def test_the_files_are_few_and_short_enough_to_be_read():
    most = {"gan_lm.py": 700, "tiny_data/language.py": 130, "test_gan_lm.py": 800}
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*.*")]
    code = {path.as_posix() for path in found if path.suffix in (".py", ".sh", ".ipynb", ".c")}
    assert {file for file in code if file[0] != "."} == most.keys()
    for file in most:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert source.count("\n") <= most[file] and max(map(len, source.split("\n"))) <= 100, file
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                most_of_it = 60 if node.name == "main" else 45
                assert node.end_lineno - node.lineno < most_of_it, node.name

def test_importing_trains_nothing_and_needs_no_matplotlib():
    command = [sys.executable, "-c", "import sys; sys.modules['matplotlib'] = None; import gan_lm"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

# ---- the language
def every_sentence(grammar, symbols):  # {its words: probability}, by brute force
    if not symbols:
        return {(): 1.0}
    out, rest = Counter(), every_sentence(grammar, symbols[1:])
    for w, alternative in grammar.rules.get(symbols[0], [(1.0, None)]):
        head = every_sentence(grammar, alternative) if alternative else {(symbols[0],): 1}
        for (a, p), (b, q) in itertools.product(head.items(), rest.items()):
            out[a + b] += w * p * q
    return out

symbols = st.lists(st.sampled_from("ABxy"), min_size=1, max_size=3)
alternative = st.tuples(st.integers(1, 5), symbols)

@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(alternative, min_size=1, max_size=3), min_size=3, max_size=3))
def test_log_p_equals_brute_force_on_random_grammars_whatever_the_parses(rules):
    # S may use A, B and words, A may use B and words, B words alone: every grammar ends
    grammar = Grammar("\n".join(
        f"{head} -> " + " | ".join(f"{w} " + " ".join(x if x in may else "z" for x in right)
                                   for w, right in rule)
        for head, may, rule in zip("SAB", ("ABxy", "Bxy", "xy"), rules)))
    sentences = every_sentence(grammar, ["S"])
    assert sum(sentences.values()) == pytest.approx(1.0)
    for words, p in sentences.items():
        assert math.exp(grammar.logp(" ".join(words))) == pytest.approx(p, rel=1e-9)

def test_log_p_agrees_with_sampled_frequencies():
    grammar, rng, n = Grammar(SMALL), random.Random(0), 10000
    lines = Counter(grammar.sample(rng) for _ in range(n))
    for line in ("dogs run .", "dogs see dogs .", "", "run dogs .", "dogs fly .", "dogs run"):
        p = math.exp(grammar.logp(line))
        assert lines[line] / n == pytest.approx(p, abs=4 * math.sqrt(p / n))

def test_a_mistake_is_a_sibling_and_noise_swaps_drops_doubles_or_replaces_one_word():
    assert GRAMMAR.siblings["runs"] == ["run"] and GRAMMAR.siblings["mice"] == ["mouse"]
    assert set(GRAMMAR.siblings["himself"]) == {"herself", "itself", "themselves"}
    rng = random.Random(0)
    for _ in range(100):
        a = GRAMMAR.sample(rng).split()
        b, c = (GRAMMAR.with_error(" ".join(a), kind, rng).split() for kind in KINDS[:2])
        (right, wrong), = [pair for pair in zip(a, b, strict=True) if pair[0] != pair[1]]
        assert wrong in GRAMMAR.siblings[right] and abs(len(c) - len(a)) <= 1
        assert c != a and sum((Counter(c) - Counter(a)).values()) <= 1
        assert GRAMMAR.logp(" ".join(b)) == GRAMMAR.logp(" ".join(c)) == -math.inf
    pytest.raises(SystemExit, Grammar("S -> 1 a").with_error, "a", "mistakes", rng)  # no sibling
    Grammar("S -> 1 Anna runs", known={"Anna"})  # a capital is no missing rule if the texts have it

@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_texts_are_made_again_byte_for_byte(kind, tmp_path):
    language.main([kind, str(tmp_path)])
    for name in (f"{kind}.txt", "curated.txt"):
        assert (tmp_path / name).read_bytes() == (ROOT / "tiny_data" / name).read_bytes(), name
    lines = (tmp_path / f"{kind}.txt").read_text(encoding="utf-8").splitlines()[:4000]
    wrong = np.isneginf([GRAMMAR.logp(line) for line in lines]).mean()
    assert wrong == (0 if kind == "clean" else pytest.approx(0.4, abs=0.03))
    (tmp_path / "curated.txt").write_text("precious", encoding="utf-8")
    with pytest.raises((SystemExit, FileExistsError)):  # nothing is overwritten
        language.main([kind, str(tmp_path), "--messy", "9", "--curated", "9"])
    assert (tmp_path / "curated.txt").read_text(encoding="utf-8") == "precious"

def test_the_shipped_language_is_as_described():
    lines = [GRAMMAR.sample(random.Random(i)) for i in range(1000)]
    assert max(len(line.split()) for line in lines) <= 22
    assert 15 < -np.mean([GRAMMAR.logp(line) for line in lines]) < 25
    assert sum(file.stat().st_size for file in (ROOT / "tiny_data").glob("*.txt")) < 3e6

# ---- 1 configuration, 2 text
def text_of(lines, level, context):
    text = Data.__new__(Data)
    text.cfg = Config(level=level, context=context, device="cpu")
    text.symbols = ["", *sorted({t for line in lines for t in tokens_of(line, level)})]
    text.id_of = {symbol: i for i, symbol in enumerate(text.symbols)}
    return text

@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1,
                max_size=5), st.sampled_from(["word", "char"]))
def test_any_text_at_all_comes_back_from_ids_as_it_went_in(texts, level):
    lines = ["a b", *(" ".join(text.split()) for text in texts if text.split())]
    for context in 1000, 3:  # longer ones are cut
        text = text_of(lines, level, context)
        kept = ["".join(tokens_of(line, level)[:context]).strip() for line in lines]
        assert text.to_lines(text.to_ids(lines)) == kept and (context == 3 or kept == lines)

def test_a_text_is_split_into_train_and_a_tenth_each_to_stop_and_to_measure(data):
    lines = (FEW / "curated.txt").read_text(encoding="utf-8").split("\n")
    parts = {name: data.to_lines(x) for name, x in data.curated.items()}
    assert Counter(lines) == Counter(line for part in parts.values() for line in part)
    assert len(parts["test"]) == len(parts["val"]) == len(lines) // 10

def test_batches_hold_every_row_and_rows_of_like_length():
    x = rows(*[[1] * (i % 7 + 1) for i in range(64)])
    assert real_tokens(trim(x[:2])).tolist() == [[1, 1, 0], [1, 1, 1]]  # a closing END counts
    epoch = list(itertools.islice(batches(x, 8), 8))
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
    a, b = model(rows([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 6, 6]))
    assert torch.allclose(a[:5], b[:5], atol=1e-5) and not torch.allclose(a[5], b[5], atol=1e-3)
    logp = token_logp(model, x)
    assert torch.allclose(logp[1:, :4], token_logp(model, x[1:, :5]), atol=1e-5)
    assert (logp[1, 4:] == 0).all() and (logp[1, :4] < 0).all()

def test_min_p_cuts_what_is_below_that_share_of_the_likeliest():
    p = torch.tensor([0.5, 0.26, 0.14, 0.1])
    for T, min_p, rest in ((1, 0, p), (1, 0.25, p[:3]), (1, 1, p[:1]), (2, 0.5, p[:3].sqrt())):
        expected = F.pad(rest / rest.sum(), (0, 4 - len(rest)))
        assert torch.allclose(decoded(p.log(), T, min_p).exp(), expected)

@pytest.mark.parametrize("temperature, min_p", DECODINGS)
def test_cached_sampling_equals_uncached_and_tells_the_log_q_of_each_token(temperature, min_p):
    model, n = tiny_gpt(), 50
    torch.manual_seed(3)
    fast, logq = sample(model, n, temperature, min_p)
    torch.manual_seed(3)
    slow, alive = torch.zeros(n, 9, dtype=torch.long), torch.arange(n)
    for t in range(1, 9):
        total = decoded(model(slow[alive, :t])[:, -1], temperature, min_p).exp().cumsum(-1)
        u = total[:, -1:] * torch.rand(len(alive), 1)
        slow[alive, t] = torch.searchsorted(total, u, right=True)[:, 0]
        alive = alive[slow[alive, t] != 0]
    assert torch.equal(fast, slow)
    assert torch.allclose(logq, token_logp(model, fast, temperature, min_p), atol=1e-4)

@pytest.mark.parametrize("decoding", DECODINGS)
def test_probabilities_of_sequences_sum_to_one_and_are_those_of_samples(decoding):
    model, x, n = tiny_gpt(V=3, context=2), every_sequence(3, 2), 20000
    p = sequence_logp(model, x, *decoding).exp()
    assert p.sum().item() == pytest.approx(1.0, abs=1e-5) and len(p) == 7
    drawn = (sample(model, n, *decoding)[0][:, None] == x).all(2).float().mean(0)
    assert ((drawn - p).abs() <= 4 * (p / n).sqrt()).all()

def test_memory_is_bounded_however_long_the_context_and_large_the_vocabulary(monkeypatch):
    asked, decode = [], gan_lm.decoded
    monkeypatch.setattr(gan_lm, "AT_ONCE", 2**16)
    monkeypatch.setattr(gan_lm, "decoded", lambda h, *a: asked.append(h.numel()) or decode(h, *a))
    for V, T in ((5, 300), (2000, 10)):
        torch.manual_seed(0)
        model, x = GPT(V, T, 1, 32), torch.randint(1, V, (100, T + 1))
        model.blocks[0].register_forward_hook(
            lambda block, given, out: asked.append(2 * out[1][0].numel() * bool(given[1])))
        sequence_logp(model, x)
        gan_lm.in_chunks(lambda part: asked.append(part.numel() * V) or part[:, 1:], x, size=V)
        assert len(sample(model, 100)[0]) == 100 and max(asked) <= 2**16 and len(asked) > 20

# ---- 4 discriminators
@pytest.mark.parametrize("kind", [PrefixDiscriminator, CNNDiscriminator])
def test_discriminators_ignore_what_follows(kind):
    ref, x = tiny_gpt(), rows([3, 3, 2], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 1, 1])
    disc = kind(ref)
    a, b, c = disc(x, hints_of(ref, x))
    assert torch.allclose(a[:4], disc(x[:1, :5], hints_of(ref, x[:1, :5]))[0], atol=1e-5)
    if kind is CNNDiscriminator:  # one verdict, at the closing END
        assert (disc(x, None) != 0).nonzero().tolist() == [[0, 3], [1, 6], [2, 6]]
    else:  # each prefix is judged by itself
        assert torch.allclose(b[:4], c[:4], atol=1e-5) and not torch.allclose(b[4:7], c[4:7])

def test_the_discriminator_starts_as_the_generator_and_reads_what_it_thought():
    ref, x = tiny_gpt(), rows([1, 2, 3])
    disc, hints, p = PrefixDiscriminator(ref), hints_of(ref, x), ref(x[:, :-1]).softmax(-1)
    minus_entropy = (p * p.log()).sum(-1) * real_tokens(x)
    expected = torch.stack([token_logp(ref, x) - minus_entropy, minus_entropy], -1)
    assert torch.equal(disc.lm(x), ref(x)) and torch.allclose(hints, expected, atol=1e-4)
    assert not torch.allclose(disc(x, hints), disc(x, 0 * hints), atol=1e-3)

# ---- 5 objectives
def test_policy_gradient_equals_the_exact_gradient_by_enumeration():
    torch.manual_seed(0)
    first, second = torch.randn(3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    x = every_sequence(3, 2)
    mask = real_tokens(x)
    def of_prefixes(one, two):  # a table for the first token, one for the second after each first
        return torch.stack([one[x[:, 1]], two[x[:, 1], x[:, 2]]], 1) * mask
    logp = of_prefixes(first.log_softmax(0), second.log_softmax(-1))
    logp_ref = of_prefixes(torch.randn(3).log_softmax(0), torch.randn(3, 3).log_softmax(-1))
    rewards = token_rewards(of_prefixes(torch.randn(3), torch.randn(3, 3)), mask)
    q = logp.sum(1).exp()
    for kl_coef in (0.0, 1.0):
        expected = (q * (rewards - kl_coef * (logp - logp_ref)).sum(1)).sum()
        exact = torch.autograd.grad(-expected, (first, second), retain_graph=True)
        A = advantages(rewards, logp, logp_ref, mask, kl_coef, lam=1.0)
        surrogate = sum(weight * policy_gradient_loss(logp[i:i + 1], A[i:i + 1])
                        for i, weight in enumerate(q.detach()))
        ours = torch.autograd.grad(surrogate, (first, second), retain_graph=True)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(exact, ours))

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
    assert (token_rewards(torch.zeros(2, 5), mask) == 0).all()  # without an opinion it is silent

def test_the_discriminator_loss_is_ln_2_without_a_signal_and_falls_with_the_right_one():
    mask, is_real = torch.ones(2, 1), torch.tensor([True, False])
    right = torch.tensor([[3.0], [-3.0]])
    silent, good, bad = (discriminator_loss(scale * right, is_real, mask).item()
                         for scale in (0, 1, -1))
    assert silent == pytest.approx(math.log(2)) and good < silent < bad

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
        update(model, adam, step, 100, 0.5)
        lr = 0.5 * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / 100)) / 2
        group = adam.param_groups[0]
        assert group["lr"] == pytest.approx(lr) and group["betas"] == (0.9, 0.99)
    before = model.weight.item()
    (model(torch.ones(1, 1)).sum() * math.inf).backward()  # what is not finite changes nothing
    update(model, adam, 50, 100, 0.5)
    assert model.weight.item() == before and model.weight.grad is None

def test_a_fit_ends_at_its_best_look_at_held_out_text_and_passes_over_losses_not_finite():
    for losses, looks, best in (([1.0] * 30, [5.0, 3.0, 4.0, 6.0], 1),  # a look each ten steps
                                ([math.nan] * 30, [5.0, 5.0, 5.0, 5.0], 0)):
        weight, seen, losses = torch.nn.Linear(1, 1, bias=False), [], iter(losses)
        def look():
            seen.append(weight.weight.item())
            return {"score": looks[len(seen) - 1]}
        def loss(rows):
            return weight(torch.ones(1, 1)).sum() * next(losses)
        assert fit(weight, rows(*[[1]] * 9), loss, "score", look, 30, 0.1, Config()) == {
            "score": looks[best]}
        assert weight.weight.item() == seen[best] and len(set(seen)) == (4 if best else 1)

def test_the_verdict_is_the_last_logit_and_its_figures_forgive_a_constant():
    x = rows([1, 2, 3], [4], [1] * 8)
    got = verdict(lambda part, hints: part[:, :-1] * 10.0 + hints[..., 0], x, torch.ones(3, 8, 2))
    assert got.tolist() == [31.0, 41.0, 11.0]
    real, fake = torch.tensor([1.0, 3.0, -1.0, 2.0]), torch.tensor([-1.0, -2.0, 2.0, -3.0])
    found = judged(real, fake)
    assert found == pytest.approx(judged(real + 9, fake + 9))
    assert found["d_loss"] < math.log(2) and found["d_acc"] == 0.75

def test_each_half_of_the_gan_leaves_the_other_alone(data):
    torch.manual_seed(0)
    model = GPT(len(data.symbols), 24, 1, 32)
    ref, disc = deepcopy(model).requires_grad_(False), PrefixDiscriminator(model)
    fake = {part: sample(ref, 64)[0] for part in ("train", "val")}
    train_discriminator(disc, model, data.curated, fake, 10, data.cfg)
    assert torch.equal(model.token.weight, ref.token.weight)
    assert all(p.grad is None for p in model.parameters())
    judge = deepcopy(disc).requires_grad_(False)
    train_generator(model, ref, disc.requires_grad_(False), data.cfg)
    assert all(torch.equal(a, b) for a, b in zip(judge.parameters(), disc.parameters()))
    assert not torch.equal(model.token.weight, ref.token.weight)

def test_the_adversarial_phase_lowers_js(toy):
    cfg, toy_data, ref = toy
    torch.manual_seed(1)
    model, disc = deepcopy(ref), PrefixDiscriminator(ref)
    found = teach(disc, ref, toy_data, 300, cfg)
    assert found["d_loss"] < math.log(2) - 9 * found["d_loss_se"] and found["d_acc"] > 0.65
    train_generator(model, ref, disc, replace(cfg, g_steps=40, g_samples=256))
    before, after = (measure(m, ref, (1.0, 0.0), toy_data, cfg)[0] for m in (ref, model))
    assert after["js"] < before["js"] / 2 and after["valid"] > before["valid"] + 0.2

def test_a_round_is_undone_for_a_worse_verdict_a_lost_likelihood_or_repetition(toy, monkeypatch):
    before, found, less = toy[2], *({"d_loss": d, "d_loss_se": 0.005} for d in (0.6, 0.65))
    after, worse = deepcopy(before), deepcopy(before)
    worse.ln.bias.data += 4
    assert why_undone(before, after, toy[1], found, less) == ""
    assert "discriminator finds more" in why_undone(before, after, toy[1], less, found)
    assert "likelihood" in why_undone(before, worse, toy[1], found, less)
    monkeypatch.setattr(gan_lm, "sample", lambda model, n: (
        sample(model, n)[0].clamp(max=n if model is before else 1), None))
    assert re.search("variety|repeat", why_undone(before, after, toy[1], found, less))

# ---- 7 measurement
P, Q = np.array([0.6, 0.3, 0.1, 0.0]), np.array([0.3, 0.3, 0.2, 0.2])
WEIGHT = np.array([2.0, 0.5, 1.0, 0.1])  # unnormalised, of a sample of Q

def exact(p, q):  # as sums
    def kl(a, b):
        return (a[a > 0] * np.log(a[a > 0] / b[a > 0])).sum()
    return {"kl": kl(p, q), "js": (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2 / math.log(2)}

def estimated(n, rng, weight):  # of P and Q * weight / Z, from n samples each
    x, y = rng.choice(4, n, p=P), rng.choice(4, n, p=Q)
    z = weight[y].mean()
    with np.errstate(divide="ignore"):
        logq = np.log(Q * weight / z)
        return divergences(np.log(P)[x], logq[x], np.log(P)[y], logq[y], weight[y] / z)

@pytest.mark.parametrize("weight", [np.ones(4), WEIGHT])
def test_divergences_agree_with_the_sums_over_two_known_distributions(weight):
    a, never = np.log(P[:3]), np.full(3, -np.inf)
    assert all(divergences(a, a, a, a)[name] == 0 for name in ("kl", "js"))
    apart = divergences(a, never, never, a)
    assert apart["js"] == 1 and apart["kl"] == math.inf
    got = estimated(200000, np.random.default_rng(0), weight)
    for name, value in exact(P, Q * weight / (Q * weight).sum()).items():
        assert got[name] == pytest.approx(value, abs=0.01)
        assert abs(got[name] - value) < 4 * got[name + "_se"] + 1e-4 < 0.02
    rng = np.random.default_rng(0)  # the standard error is how far js scatters
    many = [estimated(300, rng, weight) for _ in range(400)]
    js, error = zip(*((r["js"], r["js_se"]) for r in many))
    assert np.mean(error) == pytest.approx(np.std(js), rel=0.2)

@pytest.mark.parametrize("decoding", [(1.0, 0.0), (0.9, 0.1)])
def test_re_ranking_is_measured_as_the_exact_density_q_d_over_1_minus_d_by_z(decoding):
    model, x, rng = tiny_gpt(V=3, context=2), every_sequence(3, 2), np.random.default_rng(0)
    p, logit = rng.dirichlet(np.ones(len(x)) * 3), rng.normal(size=len(x))
    place = {str(row[1:]): i for i, row in enumerate(x.tolist())}
    def disc(part, hints):  # a verdict on each whole sequence, at all of its positions
        ids = [place[str((row + [0])[1:3])] for row in part.tolist()]
        return torch.tensor(logit[ids]).float()[:, None].expand(-1, part.shape[1] - 1)
    drawn = rng.choice(len(x), 20000, p=p)
    known = SimpleNamespace(
        seen=set(), truth=x[drawn], truth_logp=np.log(p)[drawn],
        to_lines=lambda ids: [str(row[1:]) for row in ids.tolist()],
        grammar=SimpleNamespace(logp=lambda line: np.log(p)[place[line]]))
    torch.manual_seed(0)
    row = measure(model, model, decoding, known, Config(device="cpu", eval_samples=20000), disc)[0]
    density = sequence_logp(model, x, *decoding).exp().double().numpy() * np.exp(logit)
    expected = exact(p, density / density.sum())
    assert abs(row["js"] - expected["js"]) < 4 * row["js_se"] < 0.05

def test_re_ranking_by_the_true_ratio_gives_nearly_the_true_language(toy):
    cfg, toy_data, model = toy
    def optimal(x, hints):  # logits log p/q, at every position
        logp = torch.tensor([toy_data.grammar.logp(s) for s in toy_data.to_lines(x)]).clamp(min=-50)
        return (logp - sequence_logp(model, x)).float()[:, None].expand(-1, x.shape[1] - 1)
    torch.manual_seed(0)
    plain, better = (measure(model, model, (1.0, 0.0), toy_data, cfg, disc)[0]
                     for disc in (None, optimal))
    assert plain["js"] > 0.1 > 0.02 > better["js"] and plain["valid"] < 0.8 < better["valid"]

def test_a_judge_finds_a_difference_and_counts_as_chance_below_one_half(data, monkeypatch):
    torch.manual_seed(0)
    model, cfg = GPT(len(data.symbols), 24, 1, 32), replace(data.cfg, d_steps=60, gan_lr=0.02)
    assert fresh_judge(model, model, sample(model, 100)[0], data, cfg)["judge_acc"] > 0.8
    monkeypatch.setattr(gan_lm, "judged", lambda real, fake: {"d_loss": 0.8, "d_acc": 0.3})
    assert fresh_judge(model, model, sample(model, 100)[0], data, cfg)["judge_acc"] == 0.5

def answer(capsys, gan, other, y, se=0.0, shared=0.0):
    """What show_report() says of these scores; se: the error of each, shared: of both alike."""
    wave = np.array([1.0, -1.0] * 50)
    row = dict.fromkeys("temperature min_p novel unique kl valid nll words".split(), 1.0)
    row |= {y: other, y + "_se": se, "terms": (wave * shared, wave * se * 20)}
    show_report([row | {"name": name} for name in ("mle", "sft", "continued")]
                + [row | {"name": "gan", y: gan}])
    says = capsys.readouterr().out.split("the GAN phase ")[1]
    return {"wins.": 1, "does NOT win.": 0, "LOSES.": -1}[says.strip()]

@pytest.mark.parametrize("y", ["js", "judge_acc"])
def test_the_answer_is_yes_only_for_a_gain_beyond_two_standard_errors(y, capsys):
    error = 0.1 / math.sqrt(2)  # of each; of the difference: 0.1
    assert (answer(capsys, 0.5, 0.71, y, error), answer(capsys, 0.5, 0.69, y, error)) == (1, 0)
    assert (answer(capsys, 0.71, 0.5, y, error), answer(capsys, 0.69, 0.5, y, error)) == (-1, 0)
    assert (answer(capsys, 0.5, 0.51, y), answer(capsys, 0.5, 0.501, y)) == (1, 0)  # a word's worth
    assert answer(capsys, 0.5, 0.6, y, shared=9.0) == 1  # luck that both have is no error

# ---- 8 the run: whole runs in miniature
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    run("--out", out)
    return out

def figures(out):
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    for record in report["rounds"].values():
        del record["seconds"]
    return report["arms"], report["rounds"], report["entropy"]

def test_a_run_writes_the_report_that_is_promised(finished):
    report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    assert {"config", "torch", "entropy", "arms", "rounds"} <= report.keys()
    names = [arm["name"] for arm in report["arms"]]  # each with both decodings
    assert names == [n for n in ("mle", "sft", "continued", "gan", "reranked") for _ in range(2)]
    for arm in report["arms"]:
        assert {"temperature", "min_p", "kl", "js_se", "novel", "unique"} <= arm.keys()
        assert 0 <= arm["js"] <= 1.001 and 0 <= arm["valid"] <= 1
        for decoding in "", "_1_0.01":  # for an outside judge
            file = finished / f"samples_{arm['name']}{decoding}.txt"
            assert len(file.read_bytes().split(b"\n")) == 61
    assert {"reward", "kl_to_ref", "entropy", "tokens", "kept"} <= report["rounds"]["gan1"].keys()

def test_the_same_seed_gives_the_same_figures_and_another_gives_others(finished, tmp_path):
    run("--out", tmp_path / "0")
    run("--out", tmp_path / "1", "--seed", 1)
    assert figures(finished) == figures(tmp_path / "0") != figures(tmp_path / "1")

def die_at_write(number, argv):
    """Run until the file of this number is half written, and be killed there."""
    write, calls = gan_lm.write, itertools.count()
    def half(path, save):
        if next(calls) == number:
            path.with_name(f".{path.name}.new").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, save)
    gan_lm.write, sys.stdout, sys.stderr = half, *(open(os.devnull, "w") for _ in range(2))
    run(*argv)

def test_kills_at_random_moments_change_nothing(finished, tmp_path):
    argv, rng = ["--out", tmp_path / "killed", "--resume"], random.Random(0)
    start = multiprocessing.get_context("fork").Process  # a fork has imported torch already
    # 2: each phase is the first one of a process, and its last; None: a moment of the clock's
    for number in (0, None, 1, *[2] * 8, None):
        child = start(target=die_at_write, args=(number, argv))
        child.start()
        child.join(rng.uniform(0.02, 0.2) if number is None else 60)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    run(*argv)
    assert figures(finished) == figures(tmp_path / "killed")
    for file in finished.glob("*.pt"):
        a, b = (torch.load(out / file.name)[1] for out in (finished, tmp_path / "killed"))
        assert all(torch.equal(a[name], b[name]) for name in a), file

def test_ctrl_c_says_how_to_go_on_and_full_memory_what_to_lower(tmp_path):
    shutil.copy(ROOT / "gan_lm.py", tmp_path)
    for error, status, hint in (
            ("KeyboardInterrupt", 1, "--resume goes on"), ("OSError", 2, "error"),
            ("torch.OutOfMemoryError", 2, "--batch_size")):
        (tmp_path / "sitecustomize.py").write_text(f"import tqdm\ndef stop(*args, **how):\n"
                                                   f"    import torch\n    raise {error}\n"
                                                   "tqdm.tqdm = stop\n", encoding="utf-8")
        command = [sys.executable, "gan_lm.py", "--data", FEW / "curated.txt", "--resume"]
        env = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == status and hint in done.stderr and done.stderr.count("\n") == 1

def test_on_a_full_disk_the_last_file_stays_whole(tmp_path):
    (tmp_path / "mle.pt").write_bytes(b"precious")
    def full(new):
        new.write_bytes(b"part")
        raise OSError("no space")
    with pytest.raises(OSError):
        gan_lm.write(tmp_path / "mle.pt", full)
    assert (tmp_path / "mle.pt").read_bytes() == b"precious"

def test_a_finished_run_gives_the_same_figures_again(finished):
    before = figures(finished)
    run("--out", finished, "--resume")  # trains nothing, measures again
    assert figures(finished) == before

@pytest.mark.parametrize("flags", [  # the last three: the least that is allowed
    "--rounds 3 --lam 1", "--level char --data noise --context 160",
    "--disc cnn --kl_coef 0", "--lr 0 --data clean", "--rounds 0",
    "--d_steps 1 --g_steps 1 --g_samples 2", "--pretrain_steps 0 --sft_steps 0 --eval_samples 10"])
def test_every_switch_runs(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "FAST", [*FAST, *flags.split()])
    run("--out", tmp_path)
    assert figures(tmp_path)[0]

@pytest.mark.parametrize("lines, level", [(400, "word"), (400, "char"), (80, "word")])
def test_text_without_a_grammar_gets_a_judge(lines, level, tmp_path):
    text = (FEW / "curated.txt").read_text(encoding="utf-8").split("\n")[:lines]
    (tmp_path / "text.txt").write_text("\n".join(text), encoding="utf-8")
    run("--data", tmp_path / "text.txt", "--level", level, "--out", tmp_path)
    for arm in figures(tmp_path)[0]:
        assert {"nll", "words", "novel", "unique"} <= arm.keys() and 0.5 <= arm["judge_acc"] <= 1

def test_the_file_alone_in_an_empty_folder_runs_on_a_text_and_resumes_in_another_process(tmp_path):
    shutil.copy(ROOT / "gan_lm.py", tmp_path)
    shutil.copy(FEW / "curated.txt", tmp_path / "your.txt")
    command = [sys.executable, "gan_lm.py", "--data", "your.txt", "--level", "char", *FAST]
    for resume in ([], ["--resume"]):  # with other hashes, so that no order depends on those
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": f"{1 + len(resume)}"}
        done = subprocess.run([*command, *resume], cwd=tmp_path, env=env | {"PYTHONPATH": ""},
                              capture_output=True, text=True)
        assert done.returncode == 0 and "Best judge_acc" in done.stdout, done.stderr
        assert ("val_nll" in done.stdout) != bool(resume) and (tmp_path / "out/gan1.pt").exists()

# ---- bad input: one line that names what is at fault, status 2, nothing written
BAD_FLAGS = (
    "--context 5, --seed x, --lr 2, --lr nan, --gan_lr -0.1, --temperatures 0, --temperatures a, "
    "--temperatures, --temperatures 1 nan, --min_ps 1.5, --min_ps -1, --level x, --disc rnn, "
    "--batch 3, --lam 1.5, --kl_coef -1, --batch_size 1, --rounds -1, --width 48, --layers 0, "
    "--context -3, --context 5000, --data /, --eval_samples 1, --g_samples 0, --device teapot, "
    "--pretrain_steps 1.5, --sft_steps -1, --d_steps -1, --nonsense 1, extra, --data, "
    "--data /no/such, --curated /no/such, --grammar /no/such, --seed -1").split(", ")
BAD_GRAMMARS = {
    "S -> 1 NP runs": "'NP' has no rule", "S -> 1 S a | 1 b": "begins with itself",
    **dict.fromkeys(["S -> 1 A\nA -> 1 S", "S -> 3 S S | 1 a", "S -> 3 a S S | 1 b", "S -> 1 A | "
                     "1 b\nA -> 1 B\nB -> 1 A"], "never ends"), "S -> 1 a\nS -> 1 b": "line 2",
    **dict.fromkeys(["# no", "", "\ufeff"], "no rule"), "S -> 1 a b\n\n# x\nT ->": "line 4",
    **dict.fromkeys(["S -> x a", "S -> 0 a", "S -> -1 a", "S -> nan a", "S -> inf a", "S -> 1", "S",
                     "S -> 1 a |", "S -> | 1 a", "A B -> 1 a", "-> 1 a", "S -> 1 -> 1"], "line 1")}
BAD_TEXTS = {"": "0 diff", "same\n" * 99: "1 diff", "\n\n \n": "0 diff", "\ufeff": "0 diff",
             "\0": "1 diff", "\r\n" * 80: "0 diff", "x" * 10**6: "1 diff", "\udcff\n": "UTF-8",
             "ok\n" * 60 + "\udcc3": "UTF-8", "\n".join(str(i % 49) for i in range(99)): "49 diff"}
LINES = [f"line {i}" for i in range(90)]
GOOD_TEXTS = {"crlf": "\r\n\r\n".join(LINES), "bom": "\ufeff" + "\n".join(LINES),
              "nul": "\0x\n".join(LINES), "emoji": "\U0001F468\u200D\U0001F469e\n".join(LINES),
              "a line of a million characters": "\n".join([*LINES, "x" * 10**6])}

@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_get_one_clear_line(flags, tmp_path, capsys):
    named = flags.split()[-1 if "/" in flags else 0]
    assert named in complaint([*flags.split(), "--out", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()

@pytest.mark.parametrize("flag, content, fault", [
    *(("--grammar", *item) for item in BAD_GRAMMARS.items()),
    *((flag, *item) for flag in ("--data", "--curated") for item in BAD_TEXTS.items())])
def test_bad_files_get_one_clear_line(flag, content, fault, tmp_path, capsys):
    (tmp_path / "t.txt").write_bytes(content.encode("utf-8", "surrogateescape"))
    err = complaint([*FILES, flag, tmp_path / "t.txt", "--out", tmp_path / "out"], capsys)
    assert fault in err and "t.txt" in err and not (tmp_path / "out").exists()

@pytest.mark.parametrize("kind", GOOD_TEXTS)
def test_odd_but_good_texts_are_read(kind, tmp_path):
    (tmp_path / "t.txt").write_bytes(GOOD_TEXTS[kind].encode())
    for level in ("word", "char"):
        text = Data(parse_flags(["--data", str(tmp_path / "t.txt"), "--level", level]))
        assert len(text.curated["train"]) in (72, 73)
        assert not {"\ufeff", "\r"} & {*"".join(text.symbols)}

def test_no_run_is_overwritten_or_resumed_with_other_flags_or_texts(finished, monkeypatch, capsys):
    before = {file: file.read_bytes() for file in finished.iterdir()}
    argv = [*FAST, "--out", finished]
    assert "--resume" in complaint(argv, capsys)
    assert "seed" in complaint([*argv, "--resume", "--seed", "5"], capsys)
    assert "min_ps" in complaint([*argv, "--resume", "--min_ps", "0"], capsys)
    monkeypatch.setattr(random.Random, "shuffle", lambda *lines: None)  # the same symbols
    assert "texts" in complaint([*argv, "--resume"], capsys)
    monkeypatch.setattr(gan_lm, "tokens_of", lambda line, level: ["odd", *tokens_of(line, level)])
    assert "symbols" in complaint([*argv, "--resume"], capsys)
    assert before == {file: file.read_bytes() for file in finished.iterdir()}

class Hostile:
    def __reduce__(self):
        return os.mkdir, (str(FEW / "hacked"),)

@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:999], lambda content: content[999:],
    lambda content: pickle.dumps(Hostile())])
def test_a_damaged_or_hostile_model_is_refused_and_not_run(damage, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "out")
    content = damage((finished / "sft.pt").read_bytes())
    (out / "sft.pt").write_bytes(content)
    assert "sft.pt" in complaint([*FAST, "--out", out, "--resume"], capsys)
    assert (out / "sft.pt").read_bytes() == content and not (FEW / "hacked").exists()

def test_too_many_words_and_an_out_that_is_a_file_are_named(capsys):
    (FEW / "large.txt").write_text("\n".join(map(str, range(20001))), encoding="utf-8")
    assert "--level word" in complaint(["--data", FEW / "large.txt"], capsys)
    with pytest.raises(OSError, match="large.txt"):  # a folder that is a file
        main([*FILES, *FAST, "--out", str(FEW / "large.txt")])
    assert (FEW / "large.txt").read_bytes()[:6] == b"0\n1\n2\n"

# ---- the README
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = {shlex.join(shlex.split(line, comments=True)[2:])
            for line in re.findall(r"^python gan_lm\.py.*$", README, re.M)}

@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_of_the_readme_runs(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = [str(FEW / "curated.txt") if a.endswith(".txt") and not Path(a).exists() else a
            for a in shlex.split(command)]
    run(*argv, "--out", tmp_path / "out")

@pytest.mark.parametrize("recipe", re.findall(r"^```python\n(.*?)^```", README, re.M | re.S))
def test_every_recipe_of_the_readme_runs(recipe, finished, tmp_path, monkeypatch):
    if "matplotlib" in recipe:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "out")
    exec(recipe, {})

def test_every_function_and_exercise_that_the_readme_names_exists():
    exercises = re.findall(r"<summary>(\d+)\. ", README)
    assert exercises == [str(1 + i) for i in range(len(exercises))]
    assert {*re.findall(r"exercises?\s(\d+)", README)} <= {*exercises}
    assert README.count("<details>") == README.count("</details>") == README.count("<summary>")
    assert {*re.findall(r"`(\w+)\(\)`", README)} <= {*dir(gan_lm), *dir(language), *globals()}

# ---- speed: `python test_gan_lm.py` prints ratios, each with ours first
def rate(step, seconds=8):  # what step() counts, a second, after a warm-up
    done, start = 0 * step(), time.time()
    while time.time() - start < seconds:
        done += step()
    return done / (time.time() - start)

def training_rates(data, cfg, model):
    """Real tokens a second of our step, and of nanoGPT-style ones (forward, backward, clip, AdamW):
    on rows padded to the longest of the batch; on a stream of sentences cut into rows of 64."""
    text, adam = data.messy["train"], torch.optim.AdamW(model.parameters(), fused=True)
    stream, sentences = text[:, 1:][real_tokens(text).bool()], batches(text, cfg.batch_size)
    n = round(len(stream) / len(text) * cfg.batch_size / 64)  # as many tokens a step
    def step(ours, x, mask):
        loss = likelihood_loss(token_logp(model, x)) if ours else F.cross_entropy(
            model(x[:, :-1]).flatten(0, 1), x[:, 1:].where(mask > 0, -1).flatten(), ignore_index=-1)
        loss.backward()
        update(model, adam, 500, 1000, 1e-4)
        return int(mask.sum())
    def rows_of(rows):
        x = trim(text[rows])
        return x, real_tokens(x)
    def cut_stream():
        x = stream[torch.randint(len(stream) - 65, (n, 1)) + torch.arange(65)].long()
        return x, torch.ones(n, 64)
    return [rate(lambda: step(True, *rows_of(next(sentences)))),
            rate(lambda: step(False, *rows_of(torch.randint(len(text), (cfg.batch_size,))))),
            rate(lambda: step(False, *cut_stream()))]

@torch.no_grad()
def uncached(model, n):
    """nanoGPT's `generate` with a stop: the whole prefix again for each token."""
    x = torch.zeros(n, 1, dtype=torch.long)
    while x.shape[1] <= model.shape[1] and not (x[:, 1:] == 0).any(1).all():
        x = torch.cat([x, model(x)[:, -1].softmax(-1).multinomial(1)], 1)
    return F.pad(x[:, 1:] * x[:, 1:].ne(0).cumprod(1), (1, 0))  # nothing after an END

@torch.no_grad()
def rollout_rewards(model, disc, x, rollouts=16):
    """SeqGAN's reward of each token: the mean verdict on 16 completions of its prefix, cached."""
    T, rewards = x.shape[1] - 1, torch.zeros(len(x), x.shape[1] - 1)
    for t in range(1, T + 1):
        y = x[:, :t + 1].repeat_interleave(rollouts, 0)
        token, cache = y, None
        for place in range(t + 1, T + 1):
            h, cache = model.trunk(model.embed(token, place - token.shape[1]), cache)
            token = (h[:, -1] @ model.token.weight.T).softmax(-1).multinomial(1)
            y = torch.cat([y, token], 1)
        y[:, 1:] *= y[:, 1:].ne(0).cumprod(1)  # nothing after an END
        rewards[:, t - 1] = verdict(disc, y, y[:, 1:]).sigmoid().view(len(x), rollouts).mean(1)
    return rewards

def adversarial_rates(cfg, model):
    """Sequences a second of our generator step, and of a SeqGAN step with 16 rollouts."""
    ref, cfg = deepcopy(model), replace(cfg, g_steps=3, g_samples=256, gan_lr=1e-6)
    disc, cnn = PrefixDiscriminator(ref), CNNDiscriminator(ref)
    adam = torch.optim.AdamW(model.parameters(), fused=True)
    def seqgan():
        x = trim(sample(model, 64)[0])
        rewards = rollout_rewards(model, cnn, x) * real_tokens(x)
        policy_gradient_loss(token_logp(model, x), rewards).backward()
        update(model, adam, 500, 1000, 1e-6)
        return 64
    return rate(lambda: 768 * bool(train_generator(model, ref, disc, cfg))), rate(seqgan)

def speed():
    data = Data(cfg := parse_flags(["--device", "cpu"]))
    model = GPT(len(data.symbols), cfg.context, cfg.layers, cfg.width)
    train_likelihood(model, data.messy, 400, cfg.lr, cfg)
    def sampling(n):
        return [rate(lambda: int(real_tokens(f(model, n)).sum()))
                for f in (lambda *how: sample(*how)[0], uncached)]
    for name, rates in (
            ("tokens/s: ours, padded, stream", training_rates(data, cfg, deepcopy(model))),
            ("sampling 256, tokens/s: ours, without a cache", sampling(256)),
            ("sampling 2,000, tokens/s: ours, without a cache", sampling(2000)),
            ("adversarial, sequences/s: ours, 16 rollouts", adversarial_rates(cfg, model))):
        print(f"{name}:", *(f"{r:,.0f} ({rates[0] / r:.2f} times)" for r in rates))

if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count())
    speed()
