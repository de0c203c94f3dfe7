"""Each test is named after the claim that it checks, in the order of gan_lm.py.

All: pytest -q.  The mathematics: pytest -q -k "loss or gradient or advantages or rewards"."""
import ast, builtins, importlib, io, itertools, json, math, os, random, re, runpy  # noqa: E401
import shlex, shutil, subprocess, sys, tempfile, tokenize, unicodedata  # noqa: E401
from collections import Counter
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path

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
MOST_CODE = 420
ROOT = Path(__file__).resolve().parent
SOURCE = (ROOT / "gan_lm.py").read_text(encoding="utf-8")
RULES = (ROOT / "tiny_data" / "grammar.txt").read_text(encoding="utf-8")
LANGUAGE = Grammar(RULES)
FAST = ("--layers 1 --width 32 --window 3 --d_width 32 --context 24 --batch_size 8 "
        "--mle_steps 10 --continued_steps 5 --head_start 2 --rounds 3 --g_samples 8 "
        "--d_steps 1 --eval_samples 40 --device cpu").split()
KNOWN = "--sentences 400 --d_mle_steps 60".split()  # of the grammar; D soon passes its exam
LINES = [LANGUAGE.sample(random.Random(i)) for i in range(400)]
TEXT = Path(tempfile.mkdtemp(prefix="gan_lm_test_"), "text.txt")
TEXT.write_text("\n".join(LINES), encoding="utf-8")
# A G that sees two tokens has forgotten the animal when it comes to the verb
TOY = """S -> 5 The dog At barks . | 1 The cat At meows .
At -> 2 in the Place | 1 near the Place
The -> 2 the | 1 this
Place -> 3 town | 2 house | 1 sea"""


def run(*argv):
    """main() in miniature; a flag given later wins."""
    main([*FAST, *([] if "--data" in argv else KNOWN), *map(str, argv)])


def quicken(module, patch, steps=3):
    """One decoding instead of twelve; a judge that learns for few steps instead of 300."""
    patch.setattr(module, "DECODINGS", DECODINGS[:1])
    patch.setattr(module, "range", lambda *n: builtins.range(*(steps,) if n == (300,) else n),
                  raising=False)


@pytest.fixture
def quick(monkeypatch):
    quicken(gan_lm, monkeypatch)


@pytest.fixture(scope="module")
def data():
    return Data(RULES, parse_flags([*FAST, *KNOWN]))


@pytest.fixture(scope="module")
def toy():
    """A small language, a short-sighted G by likelihood, that G after the game, and D."""
    cfg = parse_flags("--sentences 4000 --eval_samples 1000 --batch_size 32 --head_start 60 "
                      "--rounds 40 --d_steps 4 --g_samples 256 --g_lr 5e-3 --d_lr 5e-3 "
                      "--device cpu".split())
    text = Data(TOY, cfg)
    torch.manual_seed(0)
    mle = GPT(len(text.symbols), text.context, 1, 32, window=2)
    train_mle(mle, text, cfg, 300)
    gan, D = deepcopy(mle), GPT(len(text.symbols), text.context, 1, 64)
    train_gan(gan, D, text, cfg)
    return cfg, text, mle, gan, D


def tiny_gpt(V=7, context=8, window=0, layers=2):
    torch.manual_seed(0)
    model = GPT(V, context, layers, 64, window)
    for p in model.parameters():  # far from uniform
        p.data += 0.3 * torch.randn_like(p) / p.shape[-1] ** 0.5
    return model


def rows(*lists, T=8):
    return torch.tensor([[0, *row, *[0] * (T - len(row))] for row in lists])


def every_sequence(V, T):
    """Each once: those that end, and those that are cut at T."""
    return rows(*sorted({tuple(s[:s.index(0) + 1] if 0 in s else s)
                         for s in itertools.product(range(V), repeat=T)}), T=T)


def weights(module):
    return deepcopy(module.state_dict())


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def program(*argv, cwd=ROOT, **environment):
    """A process of its own, which imports from no other folder than its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""} | environment
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, env=env,
                          capture_output=True, text=True)


def complaint(argv, capsys):
    """The one line on standard error with which main() ends, status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, argv)])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1, err
    return err


# ---- the promises about the files
def lines_of_code(source):
    """How many lines hold code: not blank, no comment, no docstring."""
    docs = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                docs |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    used, lines = set(), iter(source.splitlines(keepends=True))
    for token in tokenize.generate_tokens(lambda: next(lines, "")):
        if token.string.strip() and token.type != tokenize.COMMENT:
            used |= set(range(token.start[0], token.end[0] + 1))
    return len(used - docs)


def test_the_files_are_few_and_made_to_be_read():
    visible = {path.name for path in ROOT.iterdir() if path.name[0] not in "._"}
    assert {name for name in visible if not name.startswith("out")} == {
        "gan_lm.py", "tiny_data", "test_gan_lm.py", "README.md", "LICENSE"}
    for file, code, lines in (("tiny_data/language.py", 95, 110), ("gan_lm.py", MOST_CODE, 680)):
        source = (ROOT / file).read_text(encoding="utf-8")
        assert max(map(len, source.split("\n"))) <= 92
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 45, node.name
        assert lines_of_code(source) <= code and source.count("\n") <= lines


def test_importing_trains_nothing_and_needs_no_matplotlib():
    done = program("-c", "import sys; sys.modules['matplotlib'] = None; import gan_lm")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_pasted_into_a_notebook_nothing_runs_and_the_functions_are_there(capsys):
    pasted = {"__name__": "__main__"}
    exec(compile(SOURCE, "<cell>", "exec"), pasted)
    assert capsys.readouterr() == ("", "") and {"main", "GPT", "train_gan"} <= pasted.keys()


def test_the_help_needs_no_docstrings_and_no_terminal(monkeypatch):
    done = program("-OO", "gan_lm.py", "--help")
    assert done.returncode == 0 and "--d_steps" in done.stdout
    monkeypatch.setattr(sys, "argv", ["gan_lm.py", "--help"])
    with redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "gan_lm.py"), run_name="__main__")
    assert stopped.value.code == 0 and "--d_steps" in said.getvalue()


# ---- the language
def test_log_p_agrees_with_sampled_frequencies_whatever_the_parses():
    rules = "S -> 2 N V | 1 if S then S\nN -> 3 dogs | 1 the N\nV -> 1 run | 1 see N | 1 see dogs"
    grammar, rng, n = Grammar(rules), random.Random(0), 20000
    drawn = Counter(grammar.sample(rng) for _ in range(n))
    for line in ("dogs run", "dogs see dogs", "if dogs run then dogs see dogs",
                 "the the dogs run", "", "run dogs", "dogs fly", "dogs run then"):
        p = math.exp(grammar.logp(line))
        assert drawn[line] / n == pytest.approx(p, abs=4 * math.sqrt(p / n)), line


# ---- 1 configuration, 2 text
def test_every_flag_is_used_and_its_help_names_its_default_with_data():
    own = parse_flags(["--data", "x"])
    for f in fields(Config)[1:]:
        assert re.search(rf"cfg\.{f.name}\b", SOURCE), f.name
        named = re.search(r"(\S+) with --data", f.metadata["help"])
        assert str(getattr(own, f.name)) == (named[1] if named else str(f.default)), f.name


@pytest.mark.parametrize("word", [
    "हिन्दी", unicodedata.normalize("NFD", "yếu"), "don't", "half-light",
    "\u0645\u064F\u062D\u064E\u0645\u0651\u064E\u062F"])  # Muhammad, with its vowels
def test_a_word_keeps_its_combining_marks(word):
    found = tokens_of(f"{word} {word}, {word}.", "word")
    assert found == [f" {word}", f" {word}", ",", f" {word}", "."]


anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"))


@settings(max_examples=50, deadline=None)
@given(st.lists(anything, max_size=4), st.sampled_from(["word", "char"]),
       st.sampled_from([1000, 3]))
def test_any_text_at_all_comes_back_from_ids_as_it_went_in(texts, level, context):
    texts = [line for line in ("a b", "  indented\tcode ", *texts) if line.strip()]
    cfg = parse_flags(["--data", "x", "--level", level, "--context", str(context)])
    found = Data("\n".join(texts * 100), cfg).seen
    cut = ["".join(tokens_of(line, level)[:context]) for line in texts]
    assert found == {line.removeprefix(" ") for line in cut}
    if context == 1000:  # up to white space it is all there
        assert {" ".join(line.split()) for line in found} == {
            " ".join(line.split()) for line in texts}


def test_a_text_is_split_into_train_and_a_tenth_each_to_stop_and_to_measure(data):
    own = Data("\n".join(LINES), parse_flags(["--data", "x"]))
    parts = [lines_of(x, own.symbols) for x in (own.train, own.val, own.truth)]
    assert [len(part) for part in parts] == [320, 40, 40] and own.seen == set(parts[0])
    assert Counter(LINES) == Counter(line for part in parts for line in part)
    assert (len(data.train), len(data.val), len(data.truth)) == (356, 44, 40)  # drawn besides
    assert data.truth_logp.tolist() == [*map(LANGUAGE.logp, lines_of(data.truth, data.symbols))]


def test_a_line_is_marked_as_wrong_or_copied(data):
    wrong, copied = "dog the .", next(iter(data.seen))
    fresh = next(line for line in LINES if line not in data.seen)
    assert [data.mark(line)[:4] for line in (wrong, copied, fresh)] == ["  * ", "  + ", "    "]


# ---- 3 the generator
TRUNCATIONS = [(1.0, 0.0), (0.7, 0.0), (1.0, 0.3), (0.8, 0.2)]  # temperature, min_p


@pytest.mark.parametrize("layers, window", [(1, 1), (1, 2), (2, 2), (2, 3)])
def test_what_is_said_depends_on_so_many_tokens_and_no_more(layers, window):
    model, x = tiny_gpt(layers=layers, window=window), rows([1, 2, 3, 4, 5, 6, 1])[:, :8]
    sight = layers * (window - 1) + 1  # the token that is read and those before
    for back in range(7):
        other = x.clone()
        other[0, 7 - back] = 6 if x[0, 7 - back] != 6 else 5
        unmoved = torch.allclose(model(x)[0][0, 7], model(other)[0][0, 7], atol=1e-6)
        assert unmoved == (back >= sight), back


@pytest.mark.parametrize("window", [1, 2, 3, 0])
def test_a_window_is_full_attention_with_a_mask_and_so_is_the_cache(window):
    """Against attention written out, with -inf outside the window."""
    model, x = tiny_gpt(window=window, layers=1), rows([1, 2, 3, 4, 5], [5, 5, 1, 2])[:, :6]
    block, h, size = model.blocks[0], model.token(x) + model.position.weight[:6], window or 99
    seen = torch.tensor([[0 <= i - j < size for j in range(6)] for i in range(6)])
    q, k, v = block.qkv(block.ln1(h)).view(2, 6, 3, 2, 32).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(32)).masked_fill(~seen, -math.inf)
    y = h + block.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 6, 64))
    expected = model.ln(y + block.mlp(block.ln2(y))) @ model.token.weight.T
    assert torch.allclose(model(x)[0], expected, atol=1e-4)
    cache = None
    for t in range(6):
        logits, cache = model(x[:, t:t + 1], t, cache)
        assert torch.allclose(logits[:, 0], expected[:, t], atol=1e-4)
        assert cache[0][0].shape[2] == min(t + 1, size - 1)  # no more than can be seen


@pytest.mark.parametrize("window", [0, 1, 2])
def test_cached_sampling_sees_what_a_model_that_reads_all_again_sees(window, monkeypatch):
    model, seen = tiny_gpt(window=window), []
    monkeypatch.setattr(gan_lm, "log_probs", lambda logits, *decoding: seen.append(logits)
                        or log_probs(logits, *decoding))
    x = model.sample(50)
    for t, logits in enumerate(seen):
        going = (x[:, 1:t + 1] != 0).all(1)  # a finished sequence has left
        assert torch.allclose(logits, model(x[going])[0][:, t], atol=1e-4)


def test_min_p_cuts_what_is_below_that_share_of_the_likeliest():
    p = torch.tensor([0.5, 0.26, 0.14, 0.1])
    for T, min_p, rest in ((1, 0, p), (1, 0.25, p[:3]), (1, 1, p[:1]), (2, 0.5, p[:3].sqrt())):
        q = log_probs(p.log(), T, min_p).exp()
        assert torch.allclose(q, F.pad(rest / rest.sum(), (0, 4 - len(rest))))


@pytest.mark.parametrize("decoding", TRUNCATIONS)
def test_probabilities_of_all_sequences_sum_to_one_and_are_those_of_samples(decoding):
    model, x, n = tiny_gpt(V=3, context=3), every_sequence(3, 3), 20000
    p = model.logp(x, *decoding).sum(1).exp()
    assert p.sum().item() == pytest.approx(1.0, abs=1e-5) and len(p) == 15
    drawn = (model.sample(n, *decoding)[:, None] == x).all(2).float().mean(0)
    assert ((drawn - p).abs() <= 4 * (p / n).sqrt()).all()


@pytest.mark.parametrize("window", [0, 2])
def test_a_prompt_is_read_and_what_follows_has_the_models_own_probabilities(window):
    model, n = tiny_gpt(V=4, context=3, window=window), 20000
    sentences = F.pad(F.pad(every_sequence(4, 2)[:, 1:], (1, 0), value=2), (1, 0))
    p = model.logp(sentences)[:, 1:].sum(1).exp()
    assert p.sum().item() == pytest.approx(1.0, abs=1e-5)
    drawn = (model.sample(n, prompt=[2])[:, None] == sentences).all(2).float().mean(0)
    assert ((drawn - p).abs() <= 4 * (p / n).sqrt()).all() and drawn.sum() > 0.999


# ---- 4 the discriminator
def test_the_cnn_begins_as_log_q_of_the_start_judges_a_sentence_once_and_ignores_padding():
    start, x = tiny_gpt(context=12), rows([3, 3, 2], [1, 2, 3, 4, 5, 6], [1], T=12)
    cnn = CNN(start, 32)
    assert torch.equal(cnn.logp(x), start.logp(x))  # and so D = 1/2: no opinion
    torch.nn.init.normal_(cnn.head.weight)
    judged = (cnn.logp(x) - start.logp(x)).abs() > 1e-4
    assert judged.nonzero().tolist() == [[0, 3], [1, 6], [2, 1]]  # at the closing END
    for i in range(3):
        alone = trim(x[i:i + 1])
        length = alone.shape[1] - 1
        assert torch.allclose(cnn.logp(alone)[0], cnn.logp(x)[i, :length], atol=1e-5)


# ---- 5 objectives.  A tiny language: a table of its prefixes stands for a network.
X = every_sequence(3, 3)  # fifteen sentences, of one, two and three tokens
MASK = token_mask(X)
PREFIXES = [[tuple(row[1:t]) for t in (1, 2, 3)] for row in X.tolist()]
NAMES = sorted({prefix for row in PREFIXES for prefix in row})
PLACE = torch.tensor([[NAMES.index(prefix) for prefix in row] for row in PREFIXES])


def table(seed):
    """A number for each token after each prefix"""
    torch.manual_seed(seed)
    return torch.randn(len(NAMES), 3, dtype=torch.double, requires_grad=True)


def of_tokens(table):
    """-> (15, 3), for the tokens of the sentences"""
    return table[PLACE, X[:, 1:]] * MASK


def logp_of(table):
    return of_tokens(table.log_softmax(-1))


def logp_of_counts(counts):
    """(15,) how often each sentence occurs -> (15, 3) log-probability of each of its tokens"""
    begin = torch.stack([(X[:, None, :t] == X[:, :t]).all(2).double() @ counts.double()
                         for t in (1, 2, 3, 4)], 1).log()  # how many begin as this one
    return (begin[:, 1:] - begin[:, :-1]) * MASK


def test_the_likelihood_loss_is_in_nats_a_sequence_and_the_discriminator_loss_a_prefix():
    assert likelihood_loss(torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])).item() == 3.0
    is_real, mask = torch.tensor([True, False]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    right = torch.tensor([[3.0, 3.0], [-3.0, 9.0]])  # 9: after the end, counts for nothing
    losses = [discriminator_loss(scale * right, is_real, mask).item() for scale in (0, 1, -1)]
    assert losses == pytest.approx([math.log(2), *(math.log(1 + math.exp(x)) for x in (-3, 3))])


@pytest.mark.parametrize("seed", range(4))
def test_the_discriminator_loss_is_least_at_log_p_over_q_of_each_prefix_and_so_at_s_log_p(seed):
    """For any q and whatever the lengths.  It is convex in the logits: where its gradient by
    the number of each prefix is 0, it is least."""
    torch.manual_seed(seed)
    p, q = torch.randint(1, 6, (2, 15))  # how often a sentence occurs; of both equally many:
    batch = [torch.arange(15).repeat_interleave(n) for n in (p * q.sum(), q * p.sum())]
    places, is_real = torch.cat(batch), torch.arange(2 * len(batch[0])) < len(batch[0])
    for scale in 0, 1:  # s is log p; s is something else
        extra = (scale * table(seed)).detach().requires_grad_()
        s = logp_of_counts(p) + of_tokens(extra)
        logits = discriminator_logits(s, logp_of_counts(q))
        loss = discriminator_loss(logits[places], is_real, MASK[places])
        gradient, = torch.autograd.grad(loss, extra)
        assert (gradient.abs().max() < 1e-9) == (scale == 0)


def test_where_d_knows_nothing_its_loss_has_the_gradient_of_likelihood_on_the_real_prefixes():
    """Where log p_D lies far below log q: of each real prefix -log p_D(x_1..t) is lowered,
    over the number of all prefixes, and the samples count for nothing."""
    D, is_real = tiny_gpt(), torch.arange(8) < 4
    x, theta = D.sample(8), tuple(D.parameters())
    mask, s = token_mask(x), D.logp(x)
    loss = discriminator_loss(discriminator_logits(s, s.detach() + 40 * mask), is_real, mask)
    found = torch.autograd.grad(loss, theta, retain_graph=True)
    expected = torch.autograd.grad(-(s.cumsum(1) * mask)[is_real].sum() / mask.sum(), theta)
    assert all(torch.allclose(*pair, atol=1e-5, rtol=1e-4) for pair in zip(found, expected))
    assert max(part.abs().max() for part in found) > 0.1


def gradient_of_the_game(theta, logp, reward, lam=1.0):
    """The expectation of G's gradient, D being optimal.  The baseline is left out of the sum
    (its expectation is 0); it is tested by itself."""
    logq = logp_of(theta)
    rewards = token_rewards(discriminator_logits(logp, logq.detach()), MASK, reward)
    discount = torch.tensor([[lam ** (k - t) if k >= t else 0 for t in range(3)] for k in range(3)])
    A, q = rewards @ discount.double(), logq.sum(1).exp().detach()
    loss = sum(q[i] * policy_gradient_loss(logq[i:i + 1], A[i:i + 1]) for i in range(len(q)))
    return torch.autograd.grad(loss, theta)[0]


@pytest.mark.parametrize("reward", ["js", "logit", "prob"])
def test_the_gradient_of_the_game_is_that_of_the_divergence_by_enumeration(reward):
    logp, theta = logp_of(table(0)).detach(), table(1)
    logp_x, logq_x = logp.sum(1), logp_of(theta).sum(1)
    p, q = logp_x.exp(), logq_x.exp()
    middle = ((p + q) / 2).log()
    divergence = {
        "js": (p * (logp_x - middle)).sum() + (q * (logq_x - middle)).sum(),  # 2 JS
        "logit": (q * (logq_x - logp_x)).sum(),
        "prob": (p * (logp_x - middle)).sum()}[reward]
    exact, = torch.autograd.grad(divergence, theta)
    assert torch.allclose(exact, gradient_of_the_game(theta, logp, reward), atol=1e-9)
    assert exact.abs().max() > 0.01


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("reward", ["js", "logit", "prob"])
def test_at_the_truth_the_gradient_of_the_game_is_zero_for_any_lam(lam, reward):
    ours = gradient_of_the_game(table(1), logp_of(table(1)).detach(), reward, lam)
    assert ours.abs().max() < 1e-9


@pytest.mark.parametrize("reward", ["js", "logit", "prob"])
def test_token_rewards_add_up_to_the_value_of_the_sentence(reward):
    logits, mask = torch.randn(2, 5), torch.tensor([[1.0] * 5, [1, 1, 1, 0, 0]])
    rewards, ends = token_rewards(logits, mask, reward), logits[[0, 1], [4, 2]]
    expected = value(ends, reward) - value(torch.zeros(2), reward)
    assert torch.allclose(rewards.sum(1), expected, atol=1e-6) and (rewards[1, 3:] == 0).all()
    assert (token_rewards(torch.zeros(2, 5), mask, reward) == 0).all()  # no opinion: silence


def test_advantages_are_discounted_sums_less_the_mean_of_the_others():
    r, mask = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0], [0.0, 0.0, 2.0]]), torch.ones(3, 3)
    mask[1, 1:] = 0  # the second sequence has ended
    returns = torch.tensor([[3.0, 4.0, 4.0], [0.0, 0.0, 0.0], [0.5, 1.0, 2.0]])
    others = torch.tensor([[0.25, 1.0, 2.0], [1.75, 0.0, 0.0], [1.5, 4.0, 4.0]])
    assert torch.allclose(advantages(r, mask, lam=0.5), (returns - others) * mask)
    assert advantages(r[:1], mask[:1]).isfinite().all()  # alone: no others


def test_leaving_one_out_keeps_the_expected_gradient():
    """Of all pairs of sequences, weighted by q q: the mean gradient is the exact one."""
    theta, logp = table(1), logp_of(table(0)).detach()
    logq, loss = logp_of(theta), 0
    rewards = token_rewards(discriminator_logits(logp, logq.detach()), MASK)
    q = logq.sum(1).exp().detach()
    for i, j in itertools.product(range(len(q)), repeat=2):
        A = advantages(rewards[[i, j]], MASK[[i, j]])
        loss = loss + q[i] * q[j] * policy_gradient_loss(logq[[i, j]], A)
    # where the other sequence has ended there is no baseline: its expectation is 0 all the same
    exact = gradient_of_the_game(theta, logp, "js")
    assert torch.allclose(torch.autograd.grad(loss, theta)[0], exact, atol=1e-9)


# ---- 6 training
@pytest.mark.parametrize("looks, best", [([5.0, 3.0, 4.0, 6.0], 1), ([5.0, 5.5, 6.0, 7.0], 0)])
def test_likelihood_ends_at_its_best_validation(looks, best, data, monkeypatch):
    model, seen, scores = GPT(len(data.symbols), 24, 1, 32), [], iter(looks)

    def look(function, x):
        assert x is data.val
        seen.append(weights(model))
        return torch.full((len(x), 1), -next(scores))
    monkeypatch.setattr(gan_lm, "in_chunks", look)
    assert train_mle(model, data, parse_flags(FAST), 3) == {"nll": looks}
    assert same(weights(model), seen[best]) and not same(seen[0], seen[1])


@pytest.mark.parametrize("disc, d_steps", [("gpt", 0), ("gpt", 2), ("cnn", 2)])
def test_d_and_g_take_turns_and_leave_each_other_alone(d_steps, disc, data, monkeypatch):
    cfg = replace(parse_flags(FAST), head_start=1, rounds=3, d_steps=d_steps)
    torch.manual_seed(0)
    G, turns, real_update = GPT(len(data.symbols), data.context, 1, 32), [], gan_lm.update
    D = GPT(len(data.symbols), data.context, 1, 32) if disc == "gpt" else CNN(G, 32)

    def watched(module, *how):
        other = D if module is G else G
        before = weights(other)
        assert any(p.grad is not None for p in module.parameters())
        assert all(p.grad is None for p in other.parameters())
        real_update(module, *how)
        assert same(before, weights(other))
        turns.append("G" if module is G else "D")
    monkeypatch.setattr(gan_lm, "update", watched)
    monkeypatch.setattr(gan_lm, "passes_exam", lambda *models: True)
    g_start, d_start = weights(G), weights(D)
    curves = train_gan(G, D, data, cfg)["curves"]
    assert "".join(turns) == "D" * d_steps + ("D" * d_steps + "G") * 3
    assert same(d_start, weights(D)) == (d_steps == 0) and not same(g_start, weights(G))
    assert disc == "gpt" or same(g_start, weights(D.start))  # what q was at the start stays
    assert len(curves) == 3 and all(math.isfinite(x) for point in curves for x in point.values())


def test_g_does_not_move_in_the_head_start_nor_after_a_failed_exam(data, monkeypatch):
    cfg, exams = replace(parse_flags(FAST), head_start=3, rounds=3), []
    G, D = (GPT(len(data.symbols), data.context, 1, 32) for _ in "GD")
    g_start, d_start = weights(G), weights(D)
    monkeypatch.setattr(gan_lm, "passes_exam", lambda *models: exams.append(models) or False)
    train_gan(G, D, data, replace(cfg, rounds=0))
    assert same(g_start, weights(G)) and not same(d_start, weights(D)) and exams == []
    record = train_gan(G, D, data, cfg)
    assert same(g_start, weights(G)) and record["curves"] == [] and exams == [(D, G, data)]
    monkeypatch.setattr(gan_lm, "passes_exam", lambda *models: True)
    train_gan(G, D, data, cfg)
    assert not same(g_start, weights(G))


def test_a_d_that_knows_nothing_fails_its_exam_and_a_good_one_passes(toy):
    cfg, text, mle, gan, D = toy
    assert passes_exam(D, mle, text)
    for poor in GPT(len(text.symbols), text.context, 1, 64), mle, CNN(mle, 32):  # two think as G
        assert not passes_exam(poor, mle, text)


def test_the_game_lowers_js_where_the_generator_is_too_small(toy):
    cfg, text, mle, gan, D = toy
    before, after = (measure(model, (1.0, 0.0), 1, text, cfg)[0] for model in (mle, gan))
    assert before["score"] > 0.15 and before["valid"] < 0.75
    assert after["score"] < 0.8 * before["score"] and after["valid"] > before["valid"] + 0.1


# ---- 7 measurement
def test_js_terms_agree_with_the_sums_over_two_known_distributions_and_so_does_the_error():
    P, Q = np.array([0.6, 0.3, 0.1, 0.0]), np.array([0.3, 0.3, 0.2, 0.2])

    def terms(n, rng):
        x, y = rng.choice(4, n, p=P), rng.choice(4, n, p=Q)
        with np.errstate(divide="ignore"):
            return js_terms(np.log(P)[x], np.log(Q)[x], np.log(P)[y], np.log(Q)[y])
    rng, exact = np.random.default_rng(0), sum(
        p * math.log2(2 * p / (p + q)) / 2 for p, q in [*zip(P, Q), *zip(Q, P)] if p > 0)
    assert np.mean(terms(200000, rng)) == pytest.approx(exact, abs=0.005)
    many = [terms(300, rng) for _ in range(400)]
    error = np.mean([half_interval(*found) for found in many])
    assert error == pytest.approx(1.96 * np.std(np.mean(many, axis=(1, 2))), rel=0.2)
    a, never = np.log(P[:3]), np.full(3, -np.inf)
    assert not np.any(js_terms(a, a, a, a)) and np.mean(js_terms(a, never, never, a)) == 1


def test_the_judge_tells_different_texts_apart_and_real_from_real_it_cannot(monkeypatch):
    quicken(gan_lm, monkeypatch, steps=60)
    grammar, rng = Grammar(TOY), random.Random(0)
    text = Data("\n".join(grammar.sample(rng) for _ in range(4000)), parse_flags(["--data", "x"]))
    torch.manual_seed(0)
    G = GPT(len(text.symbols), text.context, 1, 32)
    x, real = G.sample(len(text.val)), text.train
    for fake, samples, low, high in ((x[::2], x[1::2], 0.95, 1.0),
                                     (real[::2], text.val, 0.44, 0.56)):
        terms = judge_terms(G, real[1::2], fake, text.truth, samples)
        assert low <= np.mean([term.mean() for term in terms]) <= high


def test_a_model_is_measured_on_the_half_of_the_truth_that_is_asked_for(toy):
    cfg, text, mle, gan, D = toy
    for half in 0, 1:  # half of the samples are enough to choose by
        row, terms, lines = measure(mle, (0.8, 0.02), half, text, cfg)
        assert (len(terms[0]), len(terms[1])) == (500, len(lines)) == (500, 500 * (half + 1))
        logq = in_chunks(lambda x: mle.logp(x, 0.8, 0.02), text.truth[half::2]).sum(1).numpy()
        assert np.allclose(terms[0], js_terms(text.truth_logp[half::2], logq, *np.zeros((2, 1)))[0])
        assert row["valid"] == np.mean([text.grammar.logp(line) > -math.inf for line in lines])


# ---- 8 the answer
def test_the_best_decoding_is_chosen_on_one_half_and_reported_on_the_other(data, monkeypatch):
    seen = []

    def fake(model, decoding, half, data, cfg):
        seen.append((decoding, half))
        score = 0.4 if half == 1 else 0.1 if decoding == (0.8, 0.005) else 0.5
        return {"decoding": decoding, "score": score}, (np.zeros(2), np.zeros(2)), ["a line"]
    monkeypatch.setattr(gan_lm, "measure", fake)
    monkeypatch.setattr(gan_lm, "figures", str)
    results, _ = compare(dict.fromkeys(["mle", "continued", "gan"]), data, parse_flags(FAST))
    assert seen[:12] == [(decoding, 0) for decoding in DECODINGS]
    assert seen[12:14] == [((1.0, 0.0), 1), ((0.8, 0.005), 1)]
    assert results["mle"]["best"] == {"decoding": (0.8, 0.005), "score": 0.4}


def answer_of(gan, other, error=0.0, shared=0.0):
    """What verdict() says of these scores; error: of each; shared: what both have alike."""
    wave, scores = np.array([1.0, -1.0] * 50), {"mle": other, "continued": 1.0, "gan": gan}
    results = {name: {"best": {"score": score}} for name, score in scores.items()}
    terms = {name: (wave * shared, wave * error * 20 / 1.96) for name in scores}
    said = verdict(results, terms)
    return [answer for answer in ("wins", "does NOT win", "LOSES") if answer in said][-1]


def test_the_answer_is_yes_only_for_a_gain_beyond_its_error():
    error = 0.1 / math.sqrt(2)  # of each; of the difference: 0.1
    assert answer_of(0.5, 0.61, error) == "wins" and answer_of(0.61, 0.5, error) == "LOSES"
    assert answer_of(0.5, 0.59, error) == answer_of(0.59, 0.5, error) == "does NOT win"
    assert answer_of(0.5, 0.51) == "wins" and answer_of(0.5, 0.501) == "does NOT win"
    assert answer_of(0.5, 0.6, shared=9.0) == "wins"  # luck that both have is no error


# ---- 9 the run: whole runs in miniature
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        quicken(gan_lm, patch)
        run("--out", out)
    return out


def figures_of(out):
    """What two equal runs must have alike: all but the seconds."""
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    for record in report["phases"].values():
        del record["seconds"]
    return report["models"], report["phases"], report["verdict"]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_finished_run_is_measured_again_not_trained_and_needs_no_matplotlib(
        finished, tmp_path, quick, monkeypatch):
    models, phases, says = figures_of(finished)
    assert list(models) == ["mle", "continued", "gan", "d"] and "the game " in says
    assert list(phases) == ["mle", "gan", "continued"] and len(phases["gan"]["curves"]) == 3
    out = shutil.copytree(finished, tmp_path / "out")
    for file in out.glob("report.*"):
        file.unlink()
    monkeypatch.setattr(gan_lm, "update", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run("--out", out)
    assert figures_of(out) == (models, phases, says) and not (out / "report.png").exists()


def test_the_picture_is_drawn_whatever_the_notebooks_backend(tmp_path):
    pytest.importorskip("matplotlib")
    done = program("gan_lm.py", *FAST, *KNOWN, "--out", tmp_path / "out",
                   MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert done.returncode == 0 and "the game " in done.stdout, done.stderr
    assert (tmp_path / "out" / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_same_seed_gives_the_same_figures_and_another_gives_others(finished, tmp_path, quick):
    run("--out", tmp_path / "0")
    run("--out", tmp_path / "1", "--seed", 1)
    assert figures_of(finished) == figures_of(tmp_path / "0") != figures_of(tmp_path / "1")


@pytest.mark.parametrize("module, name, number", [
    (gan_lm, "update", 4), (torch, "save", 1), (gan_lm, "update", 72), (torch, "save", 2)])
def test_a_run_that_stops_anywhere_goes_on_by_the_same_command(
        module, name, number, finished, tmp_path, quick):
    function, calls = getattr(module, name), itertools.count()

    def deadly(*args, **kwargs):
        if next(calls) == number:
            if name == "save":
                Path(args[1]).write_bytes(b"half of a file")
            raise KeyboardInterrupt
        return function(*args, **kwargs)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, name, deadly)
        run("--out", tmp_path)
    run("--out", tmp_path)
    assert figures_of(tmp_path) == figures_of(finished)


def test_a_text_that_has_moved_goes_on_and_one_that_has_changed_is_refused(
        tmp_path, quick, capsys, monkeypatch):
    out, text, moved = (tmp_path / name for name in ("out", "a.txt", "b.txt"))
    text.write_text("\n".join(LINES), encoding="utf-8")
    run("--data", text, "--out", out)
    before = figures_of(out)
    assert {"score", "nll", "novel"} <= before[0]["gan"]["best"].keys()  # it has a judge
    text.rename(moved)
    monkeypatch.setattr(gan_lm, "train_mle", None)
    run("--data", moved, "--out", out)
    assert figures_of(out) == before
    moved.write_text("\n".join(LINES[:-1]), encoding="utf-8")
    assert "--out" in complaint([*FAST, "--data", moved, "--out", out], capsys)


@pytest.mark.parametrize("flags", [
    "--window 0 --level char --context 160", "--window 1 --reward logit --lam 0.5",
    "--reward prob --d_mle_steps 0", "--disc cnn --d_mle_steps 0", "--width 64 --layers 2",
    "--d_steps 0 --rounds 0", "--head_start 0 --g_samples 2",
    "--mle_steps 0 --continued_steps 0 --eval_samples 20"])
def test_every_switch_runs(flags, tmp_path, quick):
    run("--out", tmp_path / "out", *flags.split())
    assert figures_of(tmp_path / "out")[0]


@pytest.mark.parametrize("level", ["word", "char"])
@pytest.mark.parametrize("path", sorted((ROOT.parent / "shared" / "cases").glob("*")),
                         ids=lambda path: path.name)
def test_every_odd_text_is_learned_or_refused_in_one_line(path, level, tmp_path, quick, capsys):
    argv = "--rounds 1 --mle_steps 2 --continued_steps 1 --eval_samples 20".split()
    try:
        run("--data", path, "--level", level, "--out", tmp_path / "out", *argv)
        assert "the game " in capsys.readouterr().out
    except SystemExit as stopped:
        err = capsys.readouterr().err
        assert stopped.code == 2 and err.count("\n") == 1 and path.name in err


def test_the_file_alone_in_an_empty_folder_runs_on_a_text_and_writes(tmp_path):
    shutil.copy(ROOT / "gan_lm.py", tmp_path)
    shutil.copy(TEXT, tmp_path / "your.txt")
    argv = [*FAST, "--data", "your.txt", "--level", "char"]
    quickly = ("import builtins, gan_lm; gan_lm.DECODINGS[1:] = []; gan_lm.range = lambda *n: "
               "builtins.range(*(3,) if n == (300,) else n); gan_lm.main()")
    done = program("-c", quickly, *argv, cwd=tmp_path)
    assert done.returncode == 0 and "the game " in done.stdout, done.stderr
    done = program("gan_lm.py", *argv, "--sample", 3, "--prompt", "the dog", cwd=tmp_path)
    assert [line[:7] for line in done.stdout.splitlines()] == ["the dog"] * 3, done.stderr


@pytest.mark.parametrize("name", ["mle", "continued", "gan"])
def test_any_model_of_a_finished_run_goes_on_from_a_prompt(name, finished, capsys):
    before = contents(finished)
    run("--out", finished, "--sample", 20, "--model", name, "--prompt", "the",
        "--temperature", 0.7, "--min_p", 0.01)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20 and all(line.startswith("the") for line in lines)
    assert len(set(lines)) > 1 and contents(finished) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_what_a_cpu_computes(tmp_path):
    G, gpt, cnn = tiny_gpt(window=3), tiny_gpt(layers=1), CNN(tiny_gpt(), 32)
    torch.nn.init.normal_(cnn.head.weight)
    x = deepcopy(G).cuda().sample(1000, 0.9, prompt=[2]).cpu()
    for D in gpt, cnn:
        found = []
        for device in "cuda", "cpu":
            d, g, ids = (deepcopy(part).to(device) for part in (D, G, x))
            found.append((discriminator_logits(d.logp(ids), g.logp(ids)) * token_mask(ids)).cpu())
        assert torch.allclose(*found, atol=1e-2, rtol=1e-3)
    run("--device", "cuda", "--out", tmp_path)
    run("--device", "cuda", "--out", tmp_path, "--sample", 3, "--prompt", "the")


# ---- bad input: one line that names what is at fault, status 2, nothing overwritten
BAD_FLAGS = {
    "--width 50": "--width", "--mle_steps 1e4": "integer", "--lr x": "--lr", "--level x": "--level",
    "--disc rnn": "--disc", "--reward x": "--reward", "--nonsense 1": "--nonsense",
    "extra": "extra", "--data": "--data", "--seed x": "--seed", "--model x": "--model",
    "--temperature 0.8": "--temperature", "--min_p 0.1": "--min_p", "--prompt the": "--prompt",
    "--model mle": "--model", "--data x --sentences 500": "--sentences",
    "--data x --grammar y": "--grammar", "--data /no/such": "/no/such", "--data /": "/",
    "--grammar /no/such": "/no/such", "--sample 3": "--sample"}
BAD_TEXTS = [b"", b"\n \n" * 99, b"a line\n" * 99, b"\xff\xfe\x00\x9c" * 99]
BAD_GRAMMARS = ["S -> 1 NP runs", "S -> 1 S a | 1 b", "S -> 1 A\nA -> 1 S", "S -> 3 S S | 1 a",
                "S -> 1 a\nS -> 1 b", "S -> 1 a b\n\n# x\nT ->", "# no", "", "S -> x a", "S",
                "S -> 0 a", "S -> -1 a", "S -> 1", "S -> 1 a |", "A B -> 1 a", "S -> 1 -> 1"]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_get_one_clear_line(flags, tmp_path, capsys):
    said = complaint([*flags.split(), "--out", tmp_path / "out"], capsys)
    assert BAD_FLAGS[flags] in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag, content", [
    *(("--data", content) for content in BAD_TEXTS),
    *(("--grammar", content.encode()) for content in BAD_GRAMMARS)])
def test_bad_files_get_one_clear_line(flag, content, tmp_path, capsys):
    (tmp_path / "t.txt").write_bytes(content)
    assert "t.txt" in complaint([flag, tmp_path / "t.txt", "--out", tmp_path / "out"], capsys)


def test_a_text_that_was_refused_leaves_nothing_and_can_be_mended(tmp_path, quick, capsys):
    (tmp_path / "t.txt").write_text("too short")
    complaint([*FAST, "--data", tmp_path / "t.txt", "--out", tmp_path / "out"], capsys)
    (tmp_path / "t.txt").write_text("long enough\n" * 100)
    run("--data", tmp_path / "t.txt", "--out", tmp_path / "out")


def test_no_folder_of_another_run_or_of_something_else_is_used(finished, tmp_path, capsys):
    before, argv = contents(finished), [*FAST, *KNOWN, "--out", finished]
    for other in (["--seed", 7], ["--lam", 0.5], ["--rounds", 4, "--sample", 3]):
        assert "--out" in complaint([*argv, *other], capsys)
    assert contents(finished) == before
    (tmp_path / "precious.txt").write_text("mine", encoding="utf-8")
    for more in [], ["--sample", 3]:
        assert "--out" in complaint([*FAST, "--out", tmp_path, *more], capsys)
    assert contents(tmp_path) == {"precious.txt": b"mine"}
    assert "--out" in complaint([*FAST, "--out", tmp_path / "precious.txt"], capsys)


def test_samples_need_a_finished_run_and_a_prompt_that_fits(finished, tmp_path, capsys):
    argv = [*FAST, *KNOWN, "--sample", 3, "--out"]
    for prompt in "the unicorn", "the " * 25:
        assert "--prompt" in complaint([*argv, finished, "--prompt", prompt], capsys)
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "continued.pt").unlink()
    assert "--sample" in complaint([*argv, out], capsys)


# ---- the studies, the README and the pages beside it
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", *sorted((ROOT / ".github").glob("*.md")))}
COMMANDS = {shlex.join(shlex.split(line, comments=True)[2:]) for page in PAGES.values()
            for line in re.findall(r"^(?:[A-Z_]+=\S+ )*(python gan_lm\.py.*)$", page, re.M)}
CODE = re.compile(r"^```.*?^```", re.M | re.S)
EXERCISES = re.split(r"^## ", PAGES[ROOT / ".github" / "EXERCISES.md"], flags=re.M)[1:]
ALREADY_RUN, OF_SAMPLES = [], ["--sample", "--model", "--prompt", "--temperature", "--min_p"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "studies").glob("*.py")),
                         ids=lambda path: path.name)
def test_every_study_imports(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location(f"study_{path.stem}", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_every_study_runs_in_miniature(tmp_path, monkeypatch, quick, capsys):
    monkeypatch.syspath_prepend(ROOT / ".github" / "studies")
    monkeypatch.chdir(tmp_path)
    common, ladder, anchor, rivals, world, strings, cheap, speed, pictures = map(
        importlib.import_module, ("common ladder anchor rivals map strings strings_rivals "
                                  "speed pictures").split())
    monkeypatch.setattr(common, "DECODINGS", DECODINGS[:1])
    monkeypatch.setattr(rivals, "SCALE", 0.002)
    monkeypatch.setattr(speed, "LEAST", 0.001)
    run("--out", "out_1", "--seed", 1)
    small = [*FAST, *KNOWN]
    rungs = ["CNN", "f + log q_start - log q", "GPT by likelihood, 300 steps, frozen"]
    monkeypatch.setattr(ladder, "train_mle", lambda D, data, cfg, steps: None)
    ladder.main([1], small, only=rungs)
    anchor.main([1], small, only=["untold, reward told", "told, reward untold",
                                  "untold, KL penalty 0.1"])
    rivals.main([1], small, only=["kinds", "kinds, cooled", "one of 2 by D",
                                  "own samples chosen by D, three times",
                                  "text with the game's kinds", "loss truncation 0.1",
                                  "on-policy distillation from D", "LSTM"])
    for sentences in world.TEXTS:
        world.cell(1, world.GENERATORS[0], sentences, common.Book(world.BOOK), small)
    strings.main(str(TEXT), "strings", "1", *FAST, n=8, grid=[(1.0, 0.0)])
    cheap.main(str(TEXT), "strings", "1", *FAST, n=8, grid=[(1.0, 0.0)], steps=4)
    shutil.copy(ROOT / ".github" / "studies" / "molecules.jsonl", ".")  # judged elsewhere
    pictures.main(".")
    assert {path.name for path in Path("strings").glob("*.txt")} == {
        f"{arm}_1.0_0.0.txt" for arm in ("mle", "gan", "continued", "reranked",
                                     "truncated-0.1", "truncated-0.4", "window-plus-1")}
    assert len(Path("ladder.jsonl").read_text().splitlines()) == 1 + len(rungs)
    assert len(Path("anchor.jsonl").read_text().splitlines()) == 3
    assert all(Path(name).stat().st_size > 10_000
               for name in ("ladder.png", "map.png", "molecules.png"))
    parts = speed.parts(*speed.setup("--g_samples", "16", "--sentences", "400"))
    assert all(figure > 0 for figure in parts.values())


def miniature(command):
    """The flags of a page's command, checked and made small; and what it asks of the run."""
    argv = [str(TEXT) if a.endswith(".txt") and not Path(a).exists() else a
            for a in shlex.split(re.sub(r"\bS\b", "1", command))]
    parse_flags(argv)
    pairs = list(zip(argv[::2], argv[1::2]))  # every flag has one value
    train = [a for pair in pairs if pair[0] not in OF_SAMPLES for a in pair]
    small = [*train, *FAST, *([] if "--data" in argv else KNOWN)]
    small += ["--d_mle_steps", "0"] if "cnn" in argv else []
    for kept in {"--window", "--d_steps"} & {*argv}:
        small += [kept, argv[argv.index(kept) + 1]]
    return small, [a for pair in pairs if pair[0] in OF_SAMPLES for a in pair]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_of_the_pages_runs(command, tmp_path, monkeypatch, quick, capsys):
    monkeypatch.chdir(ROOT)
    argv, samples = miniature(command)
    small = parse_flags([*argv, *samples, "--out", "out", "--seed", "0"])
    if small in ALREADY_RUN:  # it was small before, or differs in what is now small
        return
    ALREADY_RUN.append(small)
    main([*argv, "--out", str(tmp_path)])
    assert "the game " in capsys.readouterr().out
    if samples:
        main([*argv, *samples, "--out", str(tmp_path)])
        assert capsys.readouterr().out


def anchors(page):
    """What GitHub makes of a page's headings."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", page, re.M)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_internal_link_resolves_and_every_named_function_exists(path):
    page = PAGES[path]
    for link in re.findall(r"\]\((?!http)([^)]*)\)|src=\"(?!http)([^\"]*)\"", CODE.sub("", page)):
        file, _, anchor = "".join(link).partition("#")
        target = (path.parent / file) if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link
    functions = {*dir(gan_lm), *dir(language), *dir(Data), *dir(GPT), *dir(CNN), *globals()}
    assert {*re.findall(r"`(\w+)\(\)`", page)} <= functions
    flags = {f.name for f in fields(Config)} | {"help"}
    for code in re.findall(r"`--[^`\n]+`|gan_lm\.py --.*", page):
        assert {*re.findall(r"--([a-z]\w*)", code)} <= flags, code
    assert page.count("<details>") == page.count("</details>") == page.count("<summary>")


def test_the_figures_of_the_readme_are_those_of_the_results():
    prose = re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", CODE.sub("", README))
    known = re.findall(r"\d+\.\d+", PAGES[ROOT / ".github" / "RESULTS.md"])
    for figure in set(re.findall(r"(?<![\d.])\d+\.\d+", prose)) - {"2.5", "0.693"}:  # ln 2
        digits = len(figure.split(".")[1])
        assert any(f"{float(number):.{digits}f}" == figure for number in known), figure


def block(kind, exercise):
    found = re.search(rf"^```{kind}\n(.*?)^```", exercise, re.M | re.S)
    return found[1] if found else ""


def changed(diff):
    """gan_lm.py after a diff without line numbers: what a hunk replaces is there once."""
    source = SOURCE
    for hunk in diff.split("@@\n"):
        old, new = ("\n".join(line[1:] for line in hunk.splitlines() if line[:1] in signs)
                    for signs in (" -", " +"))
        assert source.count(old) == 1, hunk
        source = source.replace(old, new)
    return source


@pytest.mark.parametrize("exercise", [e for e in EXERCISES if block("diff", e)],
                         ids=lambda exercise: exercise[:40])
def test_every_diff_of_the_exercises_applies_and_runs(exercise, tmp_path, monkeypatch, capsys):
    name = "exercise_" + exercise.split(".")[0]
    (tmp_path / f"{name}.py").write_text(changed(block("diff", exercise)), encoding="utf-8")
    (tmp_path / "tiny_data").symlink_to(ROOT / "tiny_data")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(name)
    quicken(module, monkeypatch)
    monkeypatch.chdir(ROOT)
    for flags in re.findall(r"^python gan_lm.py([^#\n]*)", block("sh", exercise), re.M)[:1]:
        module.main([*miniature(flags)[0], "--out", str(tmp_path / "out")])
        assert "the game " in capsys.readouterr().out
