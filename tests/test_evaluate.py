"""evaluate.py: each figure against Hugging Face's model and against arithmetic done by hand."""

import json
import math
import os
import types
from dataclasses import replace

import conftest
import numpy as np
import pytest
from conftest import TINY, hugging_face, random_params

import encoder as encoder_module
import evaluate
import gpt2
import utils
from encoder import Encoder
from evaluation import tasks
from evaluation.tasks import Item
from model_files import download, weights

N_HEAD, N_CTX, ENDOFTEXT = TINY["n_head"], TINY["n_ctx"], 256


@pytest.fixture
def params(rng):
    return random_params(rng, TINY)


def constant_params(favourite=None, hparams=TINY):
    """A model whose logits are all 0, or 16 for one id: whatever it has read."""
    shapes = dict(weights.tensor_shapes(hparams))
    params = weights.nest({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    params["ln_f"]["b"] += 1
    if favourite is not None:
        params["wte"][favourite] += 1
    return params


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def write_lines(path, items):
    return write(path, "".join(json.dumps(item) + "\n" for item in items))


def accuracy(items, mark, params, n_head):
    return tasks.accuracy(items, mark, evaluate.score_all(items, params, n_head))


def token_log_probs(model, ids):
    """Of every id but the first: its log p in float64, and which id is likeliest in its place."""
    import torch

    inputs, targets = (torch.tensor(np.array(part)) for part in (ids[:-1], ids[1:]))
    with torch.no_grad():
        logits = model(inputs[None]).logits[0].double()
    log_probs = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    return log_probs.numpy(), logits.argmax(-1).numpy()


# --------------------------------------------------------------------------------------------------
# score
# --------------------------------------------------------------------------------------------------


def test_score_is_log_softmax_in_chunks_of_any_size(rng, params, monkeypatch):
    x = rng.standard_normal((13, 16), dtype=np.float32)
    targets = rng.integers(0, 257, 13)
    logits = x.astype(np.float64) @ params["wte"].T.astype(np.float64)
    targets[::3] = logits.argmax(-1)[::3]
    expected = logits[range(13), targets] - np.log(np.exp(logits).sum(-1))
    for chunk in (1, 2, 5, 12, 13, 14, 256):
        monkeypatch.setattr(evaluate, "LOGITS_ROWS", chunk)
        log_probs, hits = evaluate.score(x, targets, params)
        np.testing.assert_allclose(log_probs, expected, rtol=0, atol=1e-4)
        assert hits.tolist() == (logits.argmax(-1) == targets).tolist() and hits[::3].all()
        assert log_probs.dtype == np.float32


def test_score_makes_64_rows_of_logits_at_most_and_in_float32(params, monkeypatch):
    seen, plain = [], evaluate.next_logits

    def look(x, params):
        logits = plain(x, params)
        seen.append((len(logits), x.dtype, logits.dtype))
        return logits

    monkeypatch.setattr(evaluate, "next_logits", look)
    evaluate.score(np.ones((150, 16), np.float32), np.zeros(150, int), params)
    assert seen == [(n, np.float32, np.float32) for n in (64, 64, 22)]


def test_logits_of_any_size_do_not_overflow(params):
    x = np.full((1, 16), 1e30, np.float32)
    best = int((x @ params["wte"].T).argmax())
    (log_prob,), (hit,) = evaluate.score(x, np.array([best]), params)
    assert log_prob == 0 and hit
    (log_prob,), (hit,) = evaluate.score(x, np.array([(best + 1) % 257]), params)
    assert -1e32 < log_prob < -1e20 and not hit


def test_of_equal_logits_the_first_is_the_likeliest():
    _, hits = evaluate.score(np.ones((3, 16), np.float32), np.array([0, 1, 0]), constant_params())
    assert hits.tolist() == [True, False, True]


def test_a_damaged_model_gets_no_result(params):
    params["wte"][7, 3] = np.nan
    with pytest.raises(ValueError, match="not finite: its weights must be damaged"):
        evaluate.score(np.ones((3, 16), np.float32), np.array([0, 1, 0]), params)


# --------------------------------------------------------------------------------------------------
# Perplexity
# --------------------------------------------------------------------------------------------------


def context_start(t, n_tokens, n_ctx, stride):
    """The first id that target t (from 1 on) sees, by the rule in words and not by a loop."""
    if t <= n_ctx:
        return 0
    k = -(-(t - n_ctx) // stride)  # the first window that reaches it
    return min(k * stride, n_tokens - n_ctx)


@pytest.mark.parametrize("n_tokens", [1, 2, 47, 48, 49, 96, 97, 131])
def test_perplexity_is_hugging_faces_for_every_stride(rng, params, n_tokens):
    model = hugging_face(params, TINY)
    ids = rng.integers(0, 257, n_tokens + 1)
    for stride in (None, 1, 7, 24, 47, 48):
        starts = [context_start(t, n_tokens, N_CTX, stride or N_CTX) for t in range(n_tokens + 1)]
        windows = {s: token_log_probs(model, ids[s : s + N_CTX + 1])[0] for s in set(starts)}
        nats = -sum(windows[starts[t]][t - 1 - starts[t]] for t in range(1, n_tokens + 1))
        result = evaluate.perplexity(ids, 10, 3, params, N_HEAD, stride)
        assert math.isclose(result["nats_per_token"], nats / n_tokens, rel_tol=1e-5)
        assert math.isclose(result["perplexity"], math.exp(nats / n_tokens), rel_tol=1e-4)
        assert math.isclose(result["nats_per_byte"], nats / 10, rel_tol=1e-5)
        sizes = {key: result[key] for key in ("n_tokens", "n_bytes", "n_words", "n_ctx", "stride")}
        assert sizes == {
            "n_tokens": n_tokens, "n_bytes": 10, "n_words": 3, "n_ctx": 48,
            "stride": stride or 48,
        }  # fmt: skip


def test_every_token_counts_once_after_exactly_its_context(rng, params):
    """Token by token, each the last of a text of its own that holds its context and no more."""
    n_tokens, stride = 61, 11
    ids = rng.integers(0, 257, n_tokens + 1)
    nats = 0
    for t in range(1, n_tokens + 1):
        context = ids[context_start(t, n_tokens, N_CTX, stride) : t]
        assert len(context) <= N_CTX and (t <= N_CTX or len(context) > N_CTX - stride)
        logits = gpt2.gpt2(context, **params, n_head=N_HEAD)[-1].astype(np.float64)
        nats -= logits[ids[t]] - np.log(np.exp(logits).sum())
    result = evaluate.perplexity(ids, 1, 1, params, N_HEAD, stride)
    assert math.isclose(result["nats_per_byte"], nats, rel_tol=1e-5)


def test_windows_are_full_evenly_spaced_and_count_each_target_once(rng):
    for _ in range(300):
        n_tokens, n_ctx = rng.integers(1, 60), rng.integers(1, 20)
        stride = rng.integers(1, n_ctx + 1)
        cuts = list(evaluate.windows(n_tokens, n_ctx, stride))
        scored = [t for _, stop, n in cuts for t in range(stop - n + 1, stop + 1)]
        assert scored == list(range(1, n_tokens + 1))
        assert {stop - start for start, stop, _ in cuts} == {min(n_ctx, n_tokens)}
        starts = [start for start, _, _ in cuts]
        assert starts[:-1] == [k * stride for k in range(len(cuts) - 1)]
        assert starts[-1] == max(0, n_tokens - n_ctx)
        assert all(n == stride for _, _, n in cuts[1:-1])


def test_a_model_that_knows_nothing_has_the_vocabularys_size_as_perplexity(tmp_path):
    """Twelve bytes, which are the tokens, in two words: by the word it is 257 to the power of 6."""
    data = write(tmp_path / "text", "ab\r\n  cdef\u00e9")
    ids, n_bytes, n_words = evaluate.load_ids(data, Encoder([]))
    result = evaluate.perplexity(ids, n_bytes, n_words, constant_params(), N_HEAD)
    assert (n_bytes, n_words, result["n_tokens"]) == (12, 2, 12)
    assert math.isclose(result["nats_per_token"], math.log(257), rel_tol=1e-6)
    assert math.isclose(result["perplexity"], 257, rel_tol=1e-5)
    assert math.isclose(result["nats_per_byte"], math.log(257), rel_tol=1e-6)
    assert math.isclose(result["perplexity_per_word"], 257**6, rel_tol=1e-4)


def test_tokens_bytes_and_words_are_counted_apart(tmp_path):
    encoder = Encoder([("Ġ", "a"), ("b", "c")])  # 256: " a", 257: "bc", 258: the end of text
    data = write(tmp_path / "text", "bc a\u2003é")
    ids, n_bytes, n_words = evaluate.load_ids(data, encoder)
    em_space, e_acute = encoder.encode("\u2003"), encoder.encode("é")
    assert ids.tolist() == [258, 257, 256, *em_space, *e_acute]
    assert (n_bytes, n_words) == (9, 3)
    hparams = TINY | {"n_vocab": 259}
    result = evaluate.perplexity(ids, n_bytes, n_words, constant_params(None, hparams), N_HEAD)
    assert math.isclose(result["nats_per_byte"], 7 * math.log(259) / 9, rel_tol=1e-6)
    assert math.isclose(result["perplexity_per_word"], 259 ** (7 / 3), rel_tol=1e-4)


def test_a_text_is_its_bytes(tmp_path):
    for text, n_bytes, n_words in (
        (b"a\r\nb\n", 5, 2),  # line ends stay as they are
        (b"a\xff b", 6, 2),  # no UTF-8: U+FFFD has 3 bytes
        (b"\xef\xbb\xbfa", 1, 1),  # a byte order mark is not text, except after the beginning
        (b"a \xef\xbb\xbfb", 6, 2),
        (b" \n ", 3, 0),
    ):
        ids, *counts = evaluate.load_ids(write(tmp_path / "text", text), Encoder([]))
        assert counts == [n_bytes, n_words] and len(ids) == 1 + n_bytes
        text = text.removeprefix(b"\xef\xbb\xbf").replace(b"\xff", "\ufffd".encode())
        assert Encoder([]).decode(ids[1:]).encode() == text
        assert ids[0] == ENDOFTEXT not in ids[1:]


def test_without_an_end_of_text_the_first_token_only_predicts(tmp_path):
    merges = [("b", "c")]
    vocab = Encoder(merges).vocab
    vocab.pop("<|endoftext|>")
    encoder = Encoder(merges, vocab)
    for text, n_bytes, n_words in (("bc a", 2, 1), ("bcd é", 4, 2), ("é ", 2, 1), ("b ", 1, 0)):
        ids, *counts = evaluate.load_ids(write(tmp_path / "text", text), encoder)
        assert ids.tolist() == encoder.encode(text) and counts == [n_bytes, n_words]
    for text in ("", "b", "bc"):
        with pytest.raises(ValueError, match="text is empty, or too short to predict any of it"):
            evaluate.load_ids(write(tmp_path / "text", text), encoder)
    assert len(evaluate.load_ids(write(tmp_path / "text", "b"), Encoder([]))[0]) == 2


def test_spaces_that_the_tokenizer_adds_are_not_counted(tmp_path):
    merges = [("Ġ", "a"), ("b", "c")]
    vocab = {piece: id for piece, id in Encoder(merges).vocab.items() if piece != "<|endoftext|>"}
    encoder = Encoder(merges, vocab, add_prefix_space=True)
    for text, n_bytes in (("a bc a", 5), (" a bc a", 5), ("bc a", 4)):
        ids, *counts = evaluate.load_ids(write(tmp_path / "text", text), encoder)
        assert counts[0] == n_bytes == len(encoder.decode_bytes(ids[1:].tolist()))
    encoder = Encoder(merges, add_prefix_space=True)
    documents = ["a bc a", "bc dé a", "x y"]
    (tmp_path / "shards").mkdir()
    encoder.save(tmp_path / "shards")
    ids = [id for text in documents for id in [*encoder.encode(text), encoder.endoftext]]
    sizes = {}
    for split in ("train", "val"):
        name = f"{split}_000000.bin"
        np.array(ids, "<u2").tofile(tmp_path / "shards" / name)
        sizes[name] = len(ids)
    write(tmp_path / "shards" / "meta.json", json.dumps({"dtype": "uint16", "shards": sizes}))
    found, *counts = evaluate.load_ids(str(tmp_path / "shards"), encoder)
    assert found.tolist() == [encoder.endoftext, *ids]
    assert counts == [sum(len(text.encode()) for text in documents), 8]


def test_what_no_float_can_hold_is_none():
    ids = np.zeros(2000, int)
    result = evaluate.perplexity(ids, 1999, 1, constant_params(), N_HEAD)
    assert result["perplexity_per_word"] is None and math.isfinite(result["perplexity"])
    assert (
        evaluate.perplexity(ids, 1999, 0, constant_params(), N_HEAD)["perplexity_per_word"] is None
    )
    far = constant_params(1)  # and 0 is what comes, every time
    far["wte"] *= 1000
    assert evaluate.perplexity(ids, 1999, 1999, far, N_HEAD)["perplexity"] is None
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("stride", [0, -1, 49])
def test_a_stride_beyond_the_context_is_refused(params, stride):
    with pytest.raises(ValueError, match=f"stride must be from 1 to .* 48, not {stride}"):
        evaluate.perplexity(np.arange(9), 8, 1, params, N_HEAD, stride)


def test_float32_inside_and_float64_sums(params, monkeypatch):
    def large(x, targets, params):
        assert x.dtype == np.float32 and len(x) == len(targets)
        return np.array([-(2.0**24)] + [-1] * (len(x) - 1), np.float32), None

    monkeypatch.setattr(evaluate, "score", large)
    result = evaluate.perplexity(np.arange(97), 1, 1, params, N_HEAD)
    assert result["nats_per_byte"] == 2 * (2**24 + 47)


# --------------------------------------------------------------------------------------------------
# HellaSwag and LAMBADA
# --------------------------------------------------------------------------------------------------


def random_items(rng, n_items, n_endings=4, longest=20):
    """Items in ids, as encode_item makes them; a third fill all positions, a third see 1 token."""
    items = []
    for i in range(n_items):
        lengths = rng.integers(1, longest + 1, n_endings)
        room = N_CTX + 1 - lengths.max()
        n_context = [room, 1, rng.integers(1, room + 1)][i % 3]
        items.append(
            Item(
                context=rng.integers(0, 257, n_context).tolist(),
                endings=[rng.integers(0, 257, n).tolist() for n in lengths],
                label=int(rng.integers(n_endings)),
                n_seq=int(n_context + lengths.max() - 1),
                is_cut=bool(rng.integers(2)),
            )
        )
    return items


def reference(model, item):
    """[(log-probabilities, hits) of each ending], a row at a time and nothing shared."""
    answers = []
    for ending in item.endings:
        ids = item.context + ending
        log_probs, best = token_log_probs(model, ids)
        hits = best == np.array(ids[1:])
        answers.append((log_probs[-len(ending) :], hits[-len(ending) :]))
    return answers


def test_endings_are_scored_as_by_hugging_face_in_any_grouping(rng, params):
    model = hugging_face(params, TINY)
    items = random_items(rng, 9) + random_items(rng, 3, n_endings=2, longest=48)
    expected = [reference(model, item) for item in items]
    for size in (1, 2, 5, 12):
        groups = [items[i : i + size] for i in range(0, 12, size)]
        ours = [
            scores for group in groups for scores in evaluate.score_items(group, params, N_HEAD)
        ]
        assert len(ours) == 12
        for item, mine, theirs in zip(items, ours, expected, strict=True):
            assert [len(p) for p, _ in mine] == [len(ending) for ending in item.endings]
            for (log_probs, hits), (log_probs_there, hits_there) in zip(mine, theirs, strict=True):
                np.testing.assert_allclose(log_probs, log_probs_there, rtol=0, atol=2e-4)
                assert hits.tolist() == hits_there.tolist()


def test_hellaswags_accuracies_are_those_of_hugging_faces_model(rng, params, monkeypatch):
    """Labels are the choice by sum, by mean, or neither, so that every confusion would show."""
    model, items, expected = hugging_face(params, TINY), [], {"acc": 0, "acc_norm": 0}
    for item in random_items(rng, 60):
        endings = reference(model, item)
        sums, means = ([f(log_probs) for log_probs, _ in endings] for f in (np.sum, np.mean))
        margins = [np.diff(np.sort(values))[-1] for values in (sums, means)]
        if min(margins) < 1e-2:  # float32 might choose the other
            continue
        chosen = int(np.argmax(sums)), int(np.argmax(means))
        item = replace(item, label=[*chosen, item.label][len(items) % 3])
        expected["acc"] += chosen[0] == item.label
        expected["acc_norm"] += chosen[1] == item.label
        items.append(item)
    sizes = {"n_items": len(items), "n_cut": sum(item.is_cut for item in items)}
    expected = {name: n / len(items) for name, n in expected.items()} | sizes
    for limit in (1, 500, evaluate.CACHED_TOKENS):
        monkeypatch.setattr(evaluate, "CACHED_TOKENS", limit)
        assert accuracy(items, tasks.mark_hellaswag, params, N_HEAD) == expected


def test_choices_are_those_of_hugging_faces_model_by_sum_and_by_character(rng):
    """With a tokenizer whose tokens have several bytes: a mean by token would choose otherwise."""
    tokenizer = encoder_module.train("the cat sat on the mat and läuft after the rat " * 9, 300)
    hparams = TINY | {"n_vocab": 300}
    params = random_params(rng, hparams)
    model, words, labels = hugging_face(params, hparams), ["the", "läuft", "xyz", "rat", "q q"], []
    items, shares = [], {"acc": 0, "acc_norm": 0}
    for i in range(60):
        texts = [" " + " ".join(rng.choice(words, n)) for n in (1, 2, 4)]
        raw = {"prompt": " ".join(rng.choice(words, 3)), "choices": texts, "answer": 0}
        item = tasks.encode_item("", *tasks.read_choices(raw, ""), tokenizer, N_CTX)
        sums = [log_probs.sum() for log_probs, _ in reference(model, item)]
        means = [nats / len(text) for nats, text in zip(sums, texts, strict=True)]
        if min(np.diff(np.sort(values))[-1] for values in (sums, means)) < 1e-3:
            continue
        chosen = int(np.argmax(sums)), int(np.argmax(means))
        raw["answer"] = [*chosen, (chosen[0] + 1) % 3][i % 3]
        labels.append(chosen[0] == chosen[1])
        shares["acc"] += chosen[0] == raw["answer"]
        shares["acc_norm"] += chosen[1] == raw["answer"]
        items.append(tasks.encode_item("", *tasks.read_choices(raw, ""), tokenizer, N_CTX))
    found = accuracy(items, tasks.mark_choices, params, N_HEAD)
    assert not all(labels)
    assert found == {k: n / len(items) for k, n in shares.items()} | {
        "n_items": len(items),
        "n_cut": sum(item.is_cut for item in items),
    }


def test_marks_of_choices_are_those_of_eleutherais_harness(rng):
    """Its own function, given the same likelihoods of choices in several scripts."""
    task = pytest.importorskip("lm_eval.api.task", reason="lm_eval is not installed")
    words = ["the", "läuft", "кот", "鸟", "🐦", "rat"]
    n_differ = 0
    for _ in range(300):
        choices = [" " + " ".join(rng.choice(words, n)) for n in (1, 2, 4)]
        sums = [-float(rng.uniform(0.5, 1.5)) * len(choice) for choice in choices]
        answer = int(rng.integers(3))
        harness = types.SimpleNamespace(
            OUTPUT_TYPE="multiple_choice",
            config=types.SimpleNamespace(process_results=None),
            _metric_fn_list={"acc": None, "acc_norm": None, "acc_bytes": None},
            multiple_input=False,
            multiple_target=False,
            doc_to_choice=lambda doc: doc["choices"],
            doc_to_target=lambda doc: doc["answer"],
        )
        doc = {"prompt": "a", "choices": choices, "answer": answer}
        results = [(nats, False) for nats in sums]
        theirs = task.ConfigurableTask.process_results(harness, doc, results)
        _, _, label = tasks.read_choices(doc, "")
        ours = tasks.mark_choices(scores(*[[nats] for nats in sums]), label)
        assert ours == {key: bool(theirs[key]) for key in ("acc", "acc_norm")}
        n_differ += theirs["acc_norm"] != theirs["acc_bytes"]
    assert n_differ


def test_a_choice_is_measured_in_characters():
    """-4 for the 3 characters (7 bytes) of " 鸟鸟" is worse than -5 for the 5 of " bird"."""
    doc = {"prompt": "a", "choices": [" 鸟鸟", " bird"], "answer": 1}
    _, _, label = tasks.read_choices(doc, "")
    assert tasks.mark_choices(scores([-4], [-5]), label) == {"acc": False, "acc_norm": True}


def test_lambadas_accuracies_are_those_of_hugging_faces_model(rng, params):
    """Last words that the model would write, and such with another first or another last token."""
    model, items = hugging_face(params, TINY), []
    for i, item in enumerate(random_items(rng, 24, n_endings=1, longest=5)):
        wrong = {2: 0, 3: -1}.get(i // 3 % 4)
        ids, n_word = list(item.context), len(item.endings[0])
        for n in range(n_word):
            likeliest = int(gpt2.gpt2(ids, **params, n_head=N_HEAD)[-1].argmax())
            ids.append((likeliest + (wrong is not None and n == wrong % n_word)) % 257)
        items.append(replace(item, endings=[ids[-n_word:]]))
    hits = [reference(model, item)[0][1] for item in items]
    ours = accuracy(items, tasks.mark_lambada, params, N_HEAD)
    assert ours["acc_last_word"] == sum(h.all() for h in hits) / 24 == 0.5
    assert 0.5 <= ours["acc_last_token"] == sum(h[-1] for h in hits) / 24 <= 0.75


def test_a_context_runs_once_and_nothing_is_padded(params, monkeypatch):
    passes = []

    def count(plain):
        def look(caches, new_ids, *rest):
            passes.append([len(ids) for ids in new_ids])
            return plain(caches, new_ids, *rest)

        return look

    monkeypatch.setattr(evaluate, "extend", count(evaluate.extend))
    monkeypatch.setattr(evaluate, "extend_all", count(evaluate.extend_all))
    items = [
        Item(context=[1] * 9, endings=[[2] * 3, [3]], label=0, n_seq=11, is_cut=False),
        Item(context=[1], endings=[[4] * 5, [5] * 2], label=0, n_seq=5, is_cut=False),
    ]
    evaluate.score_items(items, params, N_HEAD)
    assert passes == [[8], [3, 1, 5, 2]]
    evaluate.score_items(items[1:], params, N_HEAD)
    assert passes[2:] == [[5, 2]]


def test_no_cache_grows(rng, params, monkeypatch):
    """n_seq is what an item needs: growing would copy, and take more than CACHED_TOKENS."""
    caches, plain = [], evaluate.copy_cache
    monkeypatch.setattr(
        evaluate, "copy_cache", lambda cache: caches.append(plain(cache)) or caches[-1]
    )
    for item in random_items(rng, 6):
        caches.clear()
        evaluate.score_items([item], params, N_HEAD)
        assert {cache.kv.shape[3] for cache in caches} == {item.n_seq}
        assert max(cache.n_seq for cache in caches) == item.n_seq


def test_groups_keep_their_order_and_the_limit(rng, monkeypatch):
    for limit in (1, 90, 300, 2048):
        monkeypatch.setattr(evaluate, "CACHED_TOKENS", limit)
        items = random_items(rng, 20)
        groups = list(evaluate.group_items(items))
        assert [item for group in groups for item in group] == items
        sizes = [[5 * item.n_seq for item in group] for group in groups]
        assert all(sum(size) <= limit or len(size) == 1 for size in sizes)
        together = [sum(a) + b[0] for a, b in zip(sizes, sizes[1:], strict=False)]
        assert all(n > limit for n in together)  # no group ends early


def scores(*endings):
    return [(np.array(log_probs, np.float32), None) for log_probs in endings]


def test_two_items_by_hand(monkeypatch):
    """Sums -2, -1.5, -6 and means -1, -1.5, -2; then sums -4, -3, -3.5 and means -2, -3, -0.5."""
    first = scores([-1, -1], [-1.5], [-2, -2, -2])
    second = scores([-2, -2], [-3], [-0.5] * 7)
    monkeypatch.setattr(evaluate, "score_items", lambda *_: [first, second])
    for labels, acc, acc_norm in (
        ((0, 0), 0, 0.5), ((1, 1), 1, 0), ((0, 2), 0, 1), ((2, 0), 0, 0), ((1, 2), 0.5, 0.5),
    ):  # fmt: skip
        items = [
            Item(context=[], endings=[], label=label, n_seq=1, is_cut=is_cut)
            for label, is_cut in zip(labels, (True, False), strict=True)
        ]
        assert accuracy(items, tasks.mark_hellaswag, None, None) == {
            "acc": acc, "acc_norm": acc_norm, "n_items": 2, "n_cut": 1
        }  # fmt: skip


def test_ties_go_to_the_first_and_sums_are_float64():
    tie = scores([-2, -2], [-4], [-2, -2])
    assert tasks.mark_hellaswag(tie, 0) == {"acc": True, "acc_norm": True}
    for label in (1, 2):
        assert tasks.mark_hellaswag(tie, label) == {"acc": False, "acc_norm": False}
    near = scores([-(2.0**24), -1], [-(2.0**24)])  # float32 cannot tell these two sums apart
    assert tasks.mark_hellaswag(near, 1)["acc"]
    near = scores([-(2.0**24), -1], [-(2.0**23)])  # nor these two means
    assert tasks.mark_hellaswag(near, 1)["acc_norm"]


def test_the_last_word_is_all_of_its_tokens():
    for hits, word, token in (
        ([True], True, True), ([False, True], False, True), ([True, False], False, False),
        ([True, True, True], True, True), ([True, False, True], False, True),
    ):  # fmt: skip
        mark = tasks.mark_lambada([(None, np.array(hits))], None)
        assert mark == {"acc_last_word": word, "acc_last_token": token}


def test_reading_hellaswag(tmp_path):
    item = {"ctx": "Ein Mann", "endings": ["läuft.", "", " 🙂"], "label": 2, "ind": 7}
    path = write(tmp_path / "f", json.dumps(item) + "\n\n  \n" + json.dumps(item | {"label": 0}))
    texts = "Ein Mann", [" läuft.", " ", "  🙂"]
    assert tasks.load_items("hellaswag", path) == [
        (f"{path}, line 1", *texts, 2),
        (f"{path}, line 4", *texts, 0),
    ]


def test_reading_lambada(tmp_path):
    texts = ["She said: hello", " x", "a  b\u2028c", "two\nlines of text."]
    path = write_lines(tmp_path / "f", [{"text": text} for text in texts])
    rest = [item[1:] for item in tasks.load_items("lambada", path)]
    assert rest == [
        ("She said:", [" hello"], None),
        ("", [" x"], None),
        ("a ", [" b\u2028c"], None),
        ("two\nlines of", [" text."], None),
    ]


def test_contexts_lose_what_does_not_fit_on_their_left():
    def encode(context, endings, n_ctx=48):
        item = tasks.encode_item("f, line 1", context, endings, 0, Encoder([]), n_ctx)
        assert [Encoder([]).decode(ending) for ending in item.endings] == endings
        assert item.n_seq == len(item.context) + max(map(len, endings)) - 1 <= n_ctx
        return Encoder([]).decode(item.context), item.is_cut

    digits = "0123456789" * 6
    assert encode(digits, [" abcd", " abcdefgh"]) == (digits[-40:], True)
    assert encode(digits, [" abcdefgh", " a", ""]) == (digits[-40:], True)
    assert encode(digits[:40], [" abcdefgh", " a"]) == (digits[:40], False)
    assert encode(digits[:41], [" abcdefgh", " a"]) == (digits[1:41], True)
    assert encode(digits[:41], [" abcdefg", " a"]) == (digits[:41], False)
    assert encode("yz", ["x" * 48]) == ("z", True)
    assert encode("z", ["x" * 48]) == ("z", False)
    assert encode("", [" a"]) == ("<|endoftext|>", False)
    with pytest.raises(
        ValueError, match="^f, line 1: an ending of 49 tokens, but n_ctx is only 48"
    ):
        encode("z", [" a", "x" * 49])


def test_no_context_needs_an_end_of_text():
    vocab = Encoder([]).vocab
    vocab.pop("<|endoftext|>")
    with pytest.raises(ValueError, match=r"^f, line 1: no context, and there is no <|endoftext|>"):
        tasks.encode_item("f, line 1", "", [" a"], 0, Encoder([], vocab), 48)


HELLASWAG = {"ctx": "A man", "endings": ["runs.", "is a very long ending, é.", "x"], "label": 1}
LAMBADA = {"text": "A man runs"}
CHOICES = {"prompt": "The sky is", "choices": [" blue", " seven"], "answer": 0}
GOOD = {"hellaswag": HELLASWAG, "lambada": LAMBADA, "choose": CHOICES}
BAD_ITEMS = {
    "no JSON": ("hellaswag", b"{'ctx'", "not JSON"),
    "no UTF-8": ("hellaswag", b'{"ctx": "\xff"}', "not JSON"),
    "no object": ("lambada", [1], "not a JSON object"),
    "no ctx": ("hellaswag", {"endings": ["a", "b"], "label": 0}, "ctx is missing or not text"),
    "ctx a number": ("hellaswag", HELLASWAG | {"ctx": 1}, "ctx is missing or not text"),
    "no endings": ("hellaswag", {"ctx": "a", "label": 0}, "endings is missing, or not a list"),
    "endings a text": (
        "hellaswag",
        HELLASWAG | {"endings": "abc"},
        "endings is missing, or not a list",
    ),
    "endings numbers": ("hellaswag", HELLASWAG | {"endings": ["a", 1]}, "endings is missing, or"),
    "one ending": ("hellaswag", HELLASWAG | {"endings": ["a"], "label": 0}, "two texts or more"),
    "no label": ("hellaswag", {"ctx": "a", "endings": ["a", "b"]}, "no label (the test set"),
    "label 3": ("hellaswag", HELLASWAG | {"label": 3}, "label is 3, not a number from 0 to 2"),
    "label -1": ("hellaswag", HELLASWAG | {"label": -1}, "label is -1, not a number from 0 to 2"),
    "label text": ("hellaswag", HELLASWAG | {"label": "1"}, "label is '1', not a number"),
    "label true": ("hellaswag", HELLASWAG | {"label": True}, "label is True, not a number"),
    "no text": ("lambada", {"txt": "a b"}, "text is missing or not text"),
    "text a list": ("lambada", {"text": ["a b"]}, "text is missing or not text"),
    "no space": ("lambada", {"text": "word"}, "should end with a space and a last word"),
    "no prompt": ("choose", CHOICES | {"prompt": None}, "prompt is missing or not text"),
    "one choice": ("choose", CHOICES | {"choices": [" a"]}, "choices is missing, or not a list"),
    "an empty choice": ("choose", CHOICES | {"choices": [" a", ""]}, "choices is missing, or not"),
    "no answer": ("choose", {"prompt": "", "choices": ["a", "b"]}, "answer is None, not a number"),
    "answer 2": ("choose", CHOICES | {"answer": 2}, "answer is 2, not a number from 0 to 1"),
    "answer true": ("choose", CHOICES | {"answer": True}, "answer is True, not a number from 0"),
    "no word": ("lambada", {"text": "word "}, "should end with a space and a last word"),
    "no word but a line end": ("lambada", {"text": "a word \n"}, "with a space and a last word"),
}


@pytest.mark.parametrize("case", BAD_ITEMS)
def test_a_bad_item_is_one_line_that_says_where(tmp_path, case):
    task, item, words = BAD_ITEMS[case]
    good = json.dumps(GOOD[task]).encode()
    line = item if isinstance(item, bytes) else json.dumps(item).encode()
    path = write(tmp_path / "f.jsonl", b"\n".join([good, b"", line, good]))
    with pytest.raises(ValueError) as raised:
        tasks.load_items(task, path)
    message = str(raised.value)
    assert message.startswith(f"{path}, line 3: ") and words in message and "\n" not in message


def test_a_file_without_items(tmp_path):
    for text in ("", "\n \n"):
        with pytest.raises(ValueError, match="f: no items"):
            tasks.load_items("lambada", write(tmp_path / "f", text))


@pytest.mark.parametrize("task", ["hellaswag", "lambada"])
def test_the_default_file_is_downloaded_once(tmp_path, monkeypatch, task):
    monkeypatch.chdir(tmp_path)
    fetched = []

    def download_file(url, path):
        fetched.append((url, path))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_lines(tmp_path / path, [HELLASWAG | LAMBADA])

    monkeypatch.setattr(tasks, "download_file", download_file)
    assert len(tasks.load_items(task)) == 1
    name = {"hellaswag": "hellaswag_val", "lambada": "lambada_test"}[task]
    ((url, path),) = fetched
    assert url.startswith("https://") and url.endswith(f"/data/{name}.jsonl")
    assert path == os.path.join("data", f"{name}.jsonl")

    monkeypatch.setattr(tasks, "download_file", download.download_file)  # which finds it there
    assert len(tasks.load_items(task)) == 1

    def fail(url, path):
        raise ConnectionError(f"cannot download {url}: no connection")

    monkeypatch.setattr(tasks, "download_file", fail)
    with pytest.raises(ConnectionError, match="cannot download .*; --data FILE takes a copy"):
        tasks.load_items(task)


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def run(folder, *args, model="tiny", how=conftest.call):
    which = [] if "--model_size" in args else ["--model_size", model]
    return how("evaluate.py", *args, *which, models_dir=folder)


def result(*args, **kwargs):
    """The one line of standard output, strict JSON. No bar: stderr is not a terminal."""
    code, out, err = run(*args, **kwargs)
    assert (code, err) == (0, "") and out.count("\n") == 1 and out.endswith("}\n")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(out, parse_constant=refuse)


def test_perplexity_of_a_file(models, tmp_path):
    folder, params = models
    data = write(tmp_path / "text", "Wörter und Zahlen, 1 2 3. " * 5)
    ids, n_bytes, n_words = evaluate.load_ids(data, Encoder([]))
    for flags, stride in ([], None), (["--stride", "9"], 9), (["--stride", "none"], None):
        ours = result(folder, "perplexity", "--data", data, *flags, how=conftest.run)
        expected = evaluate.perplexity(ids, n_bytes, n_words, params, N_HEAD, stride)
        assert ours.keys() == expected.keys() and ours["stride"] == (stride or 48)
        for key, value in expected.items():
            assert math.isclose(ours[key], value, rel_tol=1e-5)
    assert (n_bytes, n_words) == (135, 30) and ours["n_tokens"] == 135


def test_perplexity_of_token_shards_is_that_of_their_validation_text(models, tmp_path):
    """A document's end is a token more to predict, but has no bytes; the words are the text's."""
    documents = ["Once upon a time,\n ünï\n", "there was\n", "a king"]
    text = "<|endoftext|>\n".join(documents)
    command = ["prepare.py", write(tmp_path / "text.txt", text), "--out", tmp_path / "shards"]
    assert conftest.run(*command, "--val_fraction", "0.999999")[0] == 0
    ours = result(models[0], "perplexity", "--data", str(tmp_path / "shards"))
    encoder, hparams, params = utils.load_encoder_hparams_and_params("tiny", models[0])
    ids = [256]
    for document in documents:
        ids += [*encoder.encode(document), 256]
    x = gpt2.gpt2(ids[:-1], **params, n_head=N_HEAD).astype(np.float64)
    log_probs = np.log(gpt2.softmax(x))[np.arange(len(ids) - 1), ids[1:]]
    n_bytes = len("".join(documents).encode())
    assert (ours["n_tokens"], ours["n_bytes"], ours["n_words"]) == (n_bytes + 3, n_bytes, 9)
    np.testing.assert_allclose(ours["nats_per_token"], -log_probs.mean(), rtol=1e-5)
    np.testing.assert_allclose(ours["nats_per_byte"], -log_probs.sum() / n_bytes, rtol=1e-5)


def test_shards_of_others_have_ids_of_the_models(models, tmp_path):
    """nanoGPT's, which do not say whose tokens they are; then shards that say it is not ours."""
    text = "no end of text"
    for name in ("train", "val"):
        np.array(Encoder([]).encode(text), "<u2").tofile(tmp_path / f"{name}.bin")
    plain = result(models[0], "perplexity", "--data", write(tmp_path / "text", text))
    assert result(models[0], "perplexity", "--data", str(tmp_path)) == plain
    Encoder([("a", "b")]).save(tmp_path)
    code, _, err = run(models[0], "perplexity", "--data", tmp_path)
    remedy = "run prepare.py with --tokenizer MODEL"
    assert (code, err) == (2, f"error: {tmp_path} was made with another tokenizer; {remedy}\n")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).unlink()
    np.array([1, 257], "<u2").tofile(tmp_path / "val.bin")
    code, _, err = run(models[0], "perplexity", "--data", tmp_path)
    assert code == 2 and "id 257 at position" in err and "only 257" in err
    np.array([256, 256], "<u2").tofile(tmp_path / "val.bin")
    code, _, err = run(models[0], "perplexity", "--data", tmp_path)
    assert code == 2 and "no text to predict" in err
    (tmp_path / "val.bin").unlink()
    code, _, err = run(models[0], "perplexity", "--data", tmp_path)
    remedy = "run prepare.py with a larger --val_fraction"
    assert (code, err) == (2, f"error: {tmp_path} has no validation shards; {remedy}\n")


def test_an_infinite_perplexity_is_valid_json(models, tmp_path):
    ours = result(models[0], "perplexity", "--data", write(tmp_path / "text", "x" * 999))
    assert ours["perplexity_per_word"] is None and ours["n_words"] == 1


def test_hellaswag_from_a_file(models, tmp_path, rng):
    folder, params = models
    words = ["läuft", "runs", "🙂", "a", "in the longest of all endings", "x" * 30]
    raw = [
        {
            "ctx": " ".join(rng.choice(words, rng.integers(0, 4))),
            "endings": [" ".join(rng.choice(words[:5], rng.integers(0, 2))) for _ in range(4)],
            "label": int(rng.integers(4)),
        }
        for _ in range(12)
    ]
    path = write_lines(tmp_path / "f", raw)
    items = tasks.load_items("hellaswag", path)
    items = [tasks.encode_item(*item, Encoder([]), N_CTX) for item in items]
    expected = accuracy(items, tasks.mark_hellaswag, params, N_HEAD)
    assert result(folder, "hellaswag", "--data", path) == expected
    assert list(expected) == ["acc", "acc_norm", "n_items", "n_cut"] and expected["n_items"] == 12
    n_cut = 0
    for item in raw:
        n_endings = [len((" " + ending).encode()) for ending in item["endings"]]
        n_cut += max(1, len(item["ctx"].encode())) + max(n_endings) - 1 > 48
    assert expected["n_cut"] == n_cut


def test_lambada_from_a_file(models, tmp_path):
    """A model that says " a" whatever it has read, and one that says "a"."""
    encoder, hparams = Encoder([("Ġ", "a")]), TINY | {"n_vocab": 258}
    texts = ["It is a", "It is aa", "It is ba", "a" * 60 + " a", "It is b"]
    path = write_lines(tmp_path / "f", [{"text": text} for text in texts])
    for name, favourite, word, token in (("spaced", 256, 2, 2), ("plain", None, 0, 2)):
        favourite = encoder.encode("a")[0] if favourite is None else favourite
        utils.save_model(models[0] / name, encoder, hparams, constant_params(favourite, hparams))
        assert result(models[0], "lambada", "--data", path, model=name) == {
            "acc_last_word": word / 5, "acc_last_token": token / 5, "n_items": 5, "n_cut": 1,
        }  # fmt: skip


def test_nothing_right_is_zero_and_not_missing(models, tmp_path):
    utils.save_model(models[0] / "dull", Encoder([]), TINY, constant_params(ENDOFTEXT))
    path = write_lines(tmp_path / "f", [LAMBADA])
    expected = {"acc_last_word": 0.0, "acc_last_token": 0.0, "n_items": 1, "n_cut": 0}
    assert result(models[0], "lambada", "--data", path, model="dull") == expected


FLAGS = {
    "an unknown task": (
        ["piqa"],
        "unknown task 'piqa'; choose one of perplexity, hellaswag, lambada, choose",
    ),
    "no task": ([], "task"),
    "choices without a file": (["choose"], "choose needs --data, a file of JSON lines"),
    "a stride for hellaswag": (["hellaswag", "--stride", "4"], "--stride is only for perplexity"),
    "a stride for lambada": (["lambada", "--stride", "4"], "--stride is only for perplexity"),
    "stride 0": (["perplexity", "--data", __file__, "--stride", "0"], "stride must be 1 or more"),
    "no data": (["perplexity"], "perplexity needs --data, a text file or a folder of token"),
    "no such text": (["perplexity", "--data", "nowhere.txt"], "no file at nowhere.txt"),
    "a folder": (["lambada", "--data", os.sep], f"no file at {os.sep}: --data takes the path"),
    "no such items": (
        ["lambada", "--data", "nowhere"],
        "no file at nowhere: --data takes the path",
    ),
    "no items": (["hellaswag", "--data", os.path.abspath(__file__)], ", line 1: not JSON"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_a_mistake_ends_in_one_line_and_exit_code_2_before_a_model_is_looked_for(tmp_path, case):
    args, words = FLAGS[case]
    code, out, err = run(tmp_path, *args, "--model_size", "missing")
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_mistakes_that_only_the_model_shows(models, tmp_path):
    empty = write(tmp_path / "empty", "")
    long_word = write_lines(tmp_path / "long", [LAMBADA, {"text": "a " + "x" * 48}])
    params = constant_params()
    params["wte"][9] = np.nan
    utils.save_model(models[0] / "damaged", Encoder([]), TINY, params)
    for args, words in (
        (["perplexity", "--data", empty], f"{empty} is empty, or too short"),
        (["perplexity", "--data", __file__, "--stride", "49"], "n_ctx, 48, not 49"),
        (["perplexity", "--data", tmp_path], f"{tmp_path}: no token shards"),
        (["lambada", "--data", long_word], f"{long_word}, line 2: an ending of 49 tokens"),
        (["perplexity", "--data", long_word, "--model_size", "damaged"], "must be damaged"),
        (["perplexity", "--data", long_word, "--model_size", "huge"], "no model 'huge'"),
    ):
        code, out, err = run(models[0], *args)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_a_bar_shows_the_running_figure_on_a_terminal_only(params, monkeypatch):
    shown = []

    class Bar:
        def __init__(self, total, unit, disable):
            assert disable is None  # tqdm then asks whether standard error is a terminal
            self.total, self.n = total, 0
            shown.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            assert self.n == self.total

        def update(self, n):
            self.n += n

        def set_postfix(self, figures=None, refresh=True, **more):
            self.figures = (figures or {}) | more

    for module in (evaluate, tasks):
        monkeypatch.setattr(module, "tqdm", Bar)
    ids = np.arange(100)
    ours = evaluate.perplexity(ids, 99, 9, params, N_HEAD)
    assert shown[0].figures == {"nats_per_token": f"{ours['nats_per_token']:.4f}"}
    items = [Item(context=[1], endings=[[0]], label=None, n_seq=1, is_cut=False)] * 3
    accuracy(items, tasks.mark_lambada, constant_params(0), N_HEAD)
    assert shown[1].figures == {"acc_last_word": "1.0000", "acc_last_token": "1.0000"}
    assert [bar.total for bar in shown] == [99, 3]
