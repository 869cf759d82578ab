"""Added tokens and settings of tokenizers' files: the ids are those of the tokenizers library."""

import json
import re

import pytest
from conftest import TINY, call, random_params
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import utils
from encoder import ENDOFTEXT, Encoder, get_encoder, train
from model_files.vocabulary import AddedToken

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = train("The covid wave, the   coved way: low lower lowest, the covid waves. " * 3, 290)
N = SMALL.n_vocab
START, PAD = "<|startoftext|>", "<|pad|>"
TEXTS = [
    "The covid wave",
    f"{START}The covid wave{ENDOFTEXT}{PAD}{PAD}",
    f"covidcovid  a   b    {START} <|start",
    "",
    "The  covid",
]


def write_json(folder, **contents):
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def check_ids(folder, texts=TEXTS, also_as_text=True):
    """Our ids are transformers', with special tokens as text and as ids; and so is our text."""
    theirs = transformers.GPT2TokenizerFast.from_pretrained(folder)
    ours = get_encoder("", folder)
    assert ours.n_vocab == len(theirs)
    for text in texts:
        if also_as_text:
            plain = theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
            assert ours.encode(text) == plain, text
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, allow_endoftext=True) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), text
    return ours


@pytest.fixture
def folder(tmp_path):
    SMALL.save(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("special", [(), (PAD,), (START, PAD)])
def test_a_folder_of_transformers_4_0_to_4_33(folder, special):
    """vocab.json, merges.txt, added_tokens.json and special_tokens_map.json."""
    roles = {"bos_token": ENDOFTEXT, "eos_token": ENDOFTEXT, "unk_token": ENDOFTEXT}
    if special:
        roles |= {"pad_token": PAD, "additional_special_tokens": list(special)}
    write_json(
        folder,
        added_tokens={START: N, PAD: N + 1, "covid": N + 2},
        special_tokens_map=roles,
        tokenizer_config={"model_max_length": 1024, "tokenizer_class": "GPT2Tokenizer"},
    )
    # transformers 5 takes additional_special_tokens, which version 4 wrote, for plain ones
    ours = check_ids(folder, also_as_text=START not in special)
    assert set(ours.special) == {ENDOFTEXT, *special}


@pytest.mark.parametrize("with_vocabulary", [False, True])
def test_a_tokenizer_json_with_added_tokens(folder, tmp_path, with_vocabulary):
    """As transformers writes it, alone, and beside vocab.json and merges.txt."""
    theirs = transformers.GPT2TokenizerFast.from_pretrained(folder)
    theirs.add_special_tokens({"additional_special_tokens": [START, PAD]})
    theirs.add_tokens(["covid", "  ", "    "])
    theirs.save_pretrained(tmp_path / "theirs")
    if with_vocabulary:
        for name in ("vocab.json", "merges.txt"):
            (tmp_path / "theirs" / name).write_bytes((folder / name).read_bytes())
    ours = check_ids(tmp_path / "theirs")
    assert ours.n_vocab == N + 5
    ours.save(tmp_path / "again")
    again = check_ids(tmp_path / "again")
    assert (again.added, again.piece_of_id) == (ours.added, ours.piece_of_id)


def test_tokens_that_are_not_special_are_always_one_id(folder):
    plain = {"content": "covid", "special": False}
    special = {"content": START, "special": True}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {N: plain, N + 1: special}
    write_json(folder, tokenizer_config=config)
    ours = check_ids(folder)
    the, wave = SMALL.encode("The "), SMALL.encode(" wave")
    assert ours.encode("The covid wave") == [*the, N, *wave]
    assert N + 1 not in ours.encode(START)


ONLY_NAMED = [
    {"added_tokens": {START: N, PAD: N + 1}},
    {"added_tokens": {START: N}, "special_tokens_map": {"pad_token": PAD}},
    {"special_tokens_map": {"pad_token": {"content": PAD}, "unk_token": START}},
]


@pytest.mark.parametrize("contents", ONLY_NAMED)
def test_the_rows_of_added_tokens_are_kept(rng, folder, contents):
    """They were cut off as padding where only older files named the tokens, with an id or not."""
    sizes = TINY | {"n_vocab": N + 2}
    params = random_params(rng, sizes)
    added = Encoder(SMALL.merges, SMALL.vocab, {ENDOFTEXT: N - 1, START: N, PAD: N + 1})
    utils.save_model(folder, added, sizes, params)
    SMALL.save(folder)
    write_json(folder, **contents)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    encoder, hparams, loaded = utils.load_encoder_hparams_and_params(str(folder))
    assert (encoder.n_vocab, hparams["n_vocab"], len(loaded["wte"])) == (N + 2, N + 2, N + 2)
    assert encoder.decode([N, N + 1]) == START + PAD


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_added_tokens_give_the_ids_of_the_tokenizers_library(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    SMALL.save(folder)
    texts = data.draw(st.lists(st.text("abc <|é", min_size=1, max_size=4), unique=True, max_size=5))
    theirs = transformers.GPT2TokenizerFast.from_pretrained(folder)
    raw = theirs.get_vocab()
    for text in texts:
        if text in raw or "é" in text:  # the library takes "é" for the byte that is spelled so
            continue
        normalized, special = data.draw(st.booleans()), data.draw(st.booleans())
        token = transformers.AddedToken(text, normalized=normalized, special=special)
        theirs.add_tokens([token], special_tokens=special)
    theirs.save_pretrained(folder)
    samples = st.lists(st.sampled_from([*texts, "a", "b", " ", ENDOFTEXT, "é", "covid"]))
    check_ids(folder, ["".join(data.draw(samples)) for _ in range(4)])


REFUSED = {
    "'covid' has two ids": ({"covid": N + 1}, {str(N): {"content": "covid"}}),
    "have the same id": ({}, {"97": {"content": "xyz"}}),
    "has lstrip, rstrip or single_word": ({}, {str(N): {"content": "x", "lstrip": True}}),
    "has no id or no text": ({"x": -1}, None),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_added_tokens_that_contradict_each_other_are_refused(folder, problem):
    in_tokenizer, decoder = REFUSED[problem]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if decoder is None:
        write_json(folder, added_tokens=in_tokenizer)
    else:
        config["added_tokens_decoder"] = decoder
    write_json(folder, tokenizer_config=config)
    if in_tokenizer and decoder:
        added = [{"id": id, "content": text} for text, id in in_tokenizer.items()]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        model = {"type": "BPE", "vocab": SMALL.vocab, "merges": list(SMALL.merges)}
        content = {"model": model, "pre_tokenizer": byte_level, "added_tokens": added}
        write_json(folder, tokenizer=content)
    with pytest.raises(ValueError, match=problem) as caught:
        get_encoder("", folder)
    assert str(caught.value).startswith(f"{folder}/") and "\n" not in str(caught.value)


def test_the_courses_own_recipe_lacks_some_bytes(tmp_path):
    """A BpeTrainer knows the bytes of its text; encoding another one is the error."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=[ENDOFTEXT])
    theirs.train_from_iterator(["def f(x):\n    return x + 1\n" * 9], trainer=trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = get_encoder("", tmp_path)
    assert ours.endoftext == 0 and ours.n_vocab == theirs.get_vocab_size()
    for text in "def f(x):\n", "return x + 1", "x x  x\n\n":
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    with pytest.raises(ValueError, match=r"^the vocabulary has no id for the byte 0x7a, in 'z'$"):
        ours.encode("(z")
    ours.save(tmp_path / "again")
    assert get_encoder("again", tmp_path).vocab == ours.vocab


def test_a_tokenizer_with_more_ids_than_the_model(rng, folder):
    """As after add_special_tokens without resize_token_embeddings: the rest works as before."""
    sizes = TINY | {"n_vocab": N}
    utils.save_model(folder, SMALL, sizes, random_params(rng, sizes))
    plain = utils.load_encoder_hparams_and_params(str(folder))
    (folder / "tokenizer.json").unlink(missing_ok=True)
    write_json(folder, added_tokens={PAD: N}, special_tokens_map={"pad_token": PAD})
    encoder, hparams, params = utils.load_encoder_hparams_and_params(str(folder))
    assert (encoder.n_vocab, hparams) == (N, plain[1]) and len(params["wte"]) == N
    assert encoder.encode("low, low") == SMALL.encode("low, low")
    code, out, err = call("gpt2.py", "low", "-n", "5", "--model_size", folder)
    assert (code, err) == (0, "")
    with pytest.raises(ValueError, match=f"the id {N}, but the model has only {N} rows"):
        encoder.encode(f"a{PAD}", allow_endoftext=True)


def change_config(folder, **changes):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder, tokenizer_config=config | changes)


PREFIXED = [
    *TEXTS,
    "Hello",
    " x",
    "\nx",
    f"a{ENDOFTEXT}b{ENDOFTEXT}",
    f"a{ENDOFTEXT} \n",
    "low,low",
]


@pytest.mark.parametrize("place", ["tokenizer_config.json", "tokenizer.json"])
def test_a_prefix_space_is_added_where_the_tokenizer_adds_one(folder, tmp_path, place):
    change_config(folder, add_prefix_space=True)
    if place == "tokenizer.json":
        theirs = transformers.GPT2TokenizerFast.from_pretrained(folder)
        theirs.add_tokens(["covid"])
        theirs.save_pretrained(tmp_path / "theirs")
        folder = tmp_path / "theirs"
        content = json.loads((folder / "tokenizer.json").read_text())
        assert content["pre_tokenizer"]["add_prefix_space"] is True
    ours = check_ids(folder, PREFIXED, also_as_text=False)
    assert ours.encode("low") == SMALL.encode(" low") != SMALL.encode("low")
    ours.save(tmp_path / "again")
    again = check_ids(tmp_path / "again", PREFIXED, also_as_text=False)
    assert again.add_prefix_space


def test_a_tokenizer_json_alone_says_whether_a_space_is_added(folder, tmp_path):
    change_config(folder, add_prefix_space=True)
    theirs = transformers.GPT2TokenizerFast.from_pretrained(folder)
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = get_encoder("", tmp_path)
    for text in PREFIXED:
        assert ours.encode(text, allow_endoftext=True) == theirs.backend_tokenizer.encode(text).ids


def test_a_bytes_only_tokenizer_with_a_prefix_space(tmp_path):
    Encoder([], add_prefix_space=True).save(tmp_path)
    check_ids(tmp_path, PREFIXED, also_as_text=False)


@pytest.mark.parametrize("key", ["add_bos_token", "add_eos_token"])
def test_tokens_that_would_be_added_to_every_text_are_refused(folder, key):
    change_config(folder, **{key: True})
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {key} is not supported"):
        get_encoder("", folder)
    change_config(folder, **{key: False})
    check_ids(folder)


@pytest.mark.parametrize("kind", ["GPT2TokenizerFast", "PreTrainedTokenizerFast", "AutoTokenizer"])
def test_an_exports_tokenizer_json_gives_our_ids(tmp_path, kind):
    """By itself, without the other files, and with all kinds of added tokens."""
    added = {
        PAD: AddedToken(N),
        "covid": AddedToken(N + 1, False, True),
        "  ": AddedToken(N + 2, False),
    }
    ours = Encoder(SMALL.merges, SMALL.vocab, {ENDOFTEXT: N - 1}, added=added)
    ours.save(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    theirs = getattr(transformers, kind).from_pretrained(tmp_path)
    assert theirs.eos_token_id == N - 1 and len(theirs) == ours.n_vocab
    for text in TEXTS:
        ids = ours.encode(text, allow_endoftext=True)
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
    again = get_encoder("", tmp_path)
    assert (again.added, again.piece_of_id) == (ours.added, ours.piece_of_id)


TOKEN_SETTINGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
REFUSALS = r"has lstrip, rstrip or single_word|add_bos_token is not|add_eos_token is not"


def draw_tokens(data):  # -> {text: settings}
    texts = st.lists(st.text("ab <|é", min_size=1, max_size=4), unique=True, max_size=3)
    rarely = st.sampled_from([False] * 9 + [True])
    tokens = {}
    for text in [*data.draw(texts), *data.draw(st.sampled_from([[], [PAD], [START, PAD]]))]:
        if "é" in text or text in SMALL.vocab:  # the library takes "é" for a byte spelled so
            continue
        flags = {name: data.draw(rarely) for name in ("lstrip", "rstrip", "single_word")}
        flags |= {name: data.draw(st.booleans()) for name in ("normalized", "special")}
        tokens[text] = flags
    return tokens


def write_decoder(folder, tokens, config):
    """As transformers 4.34 and later: every token with its id and its settings."""
    decoder = {N + i: {"content": text} | tokens[text] for i, text in enumerate(tokens)}
    decoder[N - 1] = {"content": ENDOFTEXT, "special": True}
    config["added_tokens_decoder"] = {str(id): decoder[id] for id in sorted(decoder)}


def write_added_tokens(folder, tokens, config):
    """As before that: ids in one file, roles and settings of special tokens in another."""
    special = [text for text in tokens if tokens[text]["special"]]
    roles = dict(zip(("bos_token", "pad_token", "mask_token"), special, strict=False))
    settings = {text: {"content": text} | tokens[text] for text in special}
    for text in special:
        del settings[text]["special"]
    special_tokens_map = {role: settings[text] for role, text in roles.items()}
    without_id = [*roles.values()][1::2]
    numbered = [text for text in tokens if text not in without_id]
    added_tokens = {text: id for id, text in enumerate(numbered, N)}
    write_json(folder, added_tokens=added_tokens, special_tokens_map=special_tokens_map)


def write_roles(folder, tokens, config):
    """Special tokens that have a role, but no id in any file."""
    config |= dict(zip(("pad_token", "eos_token", "sep_token", "cls_token"), tokens, strict=False))


def write_tokenizer_json(folder, tokens, config):
    theirs = transformers.GPT2TokenizerFast.from_pretrained(folder)
    for text, flags in tokens.items():
        theirs.add_tokens([transformers.AddedToken(text, **flags)])
    theirs.backend_tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    "place", [write_decoder, write_added_tokens, write_roles, write_tokenizer_json]
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_settings_give_the_ids_of_transformers_or_are_refused(tmp_path_factory, place, data):
    folder = tmp_path_factory.mktemp("fuzz")
    SMALL.save(folder)
    (folder / "tokenizer.json").unlink()
    tokens = draw_tokens(data)
    flags = ("add_prefix_space", "add_bos_token", "add_eos_token")
    config = {"tokenizer_class": "GPT2Tokenizer"}
    config |= {
        name: data.draw(st.sampled_from([True, False]))
        for name in data.draw(st.sets(st.sampled_from(flags)))
    }
    if end := data.draw(st.sampled_from([None, ENDOFTEXT, *tokens])):
        config["eos_token"] = end
    place(folder, tokens, config)
    write_json(folder, tokenizer_config=config)
    samples = st.lists(st.sampled_from([*tokens, "a", "b", " ", "  ", ENDOFTEXT, "é", "covid"]))
    texts = ["".join(data.draw(samples)) for _ in range(4)]
    try:
        ours = get_encoder("", folder)
    except ValueError as refusal:
        is_plain = not any(t[key] for t in tokens.values() for key in TOKEN_SETTINGS[:3])
        adds = config.get("add_bos_token") or config.get("add_eos_token")
        assert re.search(REFUSALS, str(refusal)) and "\n" not in str(refusal)
        assert adds or not is_plain
        return
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.n_vocab == len(theirs) and ours.endoftext == theirs.eos_token_id
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, allow_endoftext=True) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), text
