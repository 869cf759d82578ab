"""The tokens that end a text are the model's: one place reads them, every command asks it."""

import json

import numpy as np
import pytest
from conftest import TINY, call, hugging_face, random_params

import gpt2
import kv_cache
import utils
from corpus.chat import encode_messages, is_learned_answer
from corpus.examples import load_examples
from encoder import Encoder, get_encoder

END, OTHER_END = "</s>", "<|im_end|>"
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
SPECIAL = {"<|endoftext|>": 256, END: 257, OTHER_END: 258}
SIZES = TINY | {"n_vocab": 259}


def write(folder, **contents):  # tokenizer_config={...} -> tokenizer_config.json, merged into it
    for name, content in contents.items():
        path = folder / f"{name}.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(old | content))


@pytest.fixture
def folder(rng, tmp_path):
    """A random model whose tokenizer has three special tokens."""
    utils.save_model(tmp_path / "m", Encoder([], None, SPECIAL), SIZES, random_params(rng, SIZES))
    return tmp_path / "m"


CASES = {  # what the folder's files say -> the ids that end a text
    "nothing else": ({}, (256,)),
    "config, a number": ({"config": {"eos_token_id": 257}}, (257,)),
    "config, a list": ({"config": {"eos_token_id": [258, 257]}}, (258, 257)),
    "generation_config comes first": (
        {"config": {"eos_token_id": 257}, "generation_config": {"eos_token_id": [258]}},
        (258,),
    ),
    "null is no answer": (
        {"config": {"eos_token_id": 257}, "generation_config": {"eos_token_id": None}},
        (257,),
    ),
    "GPT-2's id, which this vocabulary lacks": (
        {"config": {"eos_token_id": 50256}, "tokenizer_config": {"eos_token": END}},
        (257,),
    ),
    "the tokenizer's": (
        {"config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": OTHER_END}},
        (258,),
    ),
    "the tokenizer's, with settings": (
        {"config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": {"content": END}}},
        (257,),
    ),
    "a byte": ({"config": {"eos_token_id": 10}}, (10,)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_folders_files_say_which_ids_end_a_text(folder, case):
    contents, end_ids = CASES[case]
    write(folder, **contents)
    encoder = get_encoder("", folder)
    assert (encoder.end_ids, encoder.endoftext) == (end_ids, end_ids[0])


@pytest.mark.parametrize("as_settings", [False, True])
def test_older_folders_name_the_end_in_special_tokens_map(folder, as_settings):
    transformers = pytest.importorskip("transformers")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"], config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    end = {"content": END, "lstrip": False, "rstrip": False} if as_settings else END
    write(folder, config={"eos_token_id": None}, special_tokens_map={"eos_token": end})
    theirs = transformers.GPT2TokenizerFast.from_pretrained(folder)
    assert get_encoder("", folder).endoftext == theirs.eos_token_id == 257


@pytest.mark.parametrize("value", ["</s>", 1.5, [257, "x"], True, {}])
def test_an_end_that_is_no_id_is_refused(folder, value):
    write(folder, config={"eos_token_id": value})
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id .* is not an id"):
        get_encoder("", folder)


def greedy(params, prompt, n):  # -> the new ids, without an end
    return gpt2.generate(prompt, params, SIZES["n_head"], n)


@pytest.mark.parametrize("script", ["gpt2.py", "gpt2_pico.py", "kv_cache.py", "jax"])
def test_every_command_ends_where_transformers_ends(folder, rng, script):
    """At whichever of two ids comes first."""
    encoder, hparams, params = utils.load_encoder_hparams_and_params(str(folder))
    prompt = "It was"
    ids = encoder.encode(prompt)
    new_ids = greedy(params, ids, 12)
    ends = [new_ids[9], new_ids[4]]
    write(folder, config={"eos_token_id": ends})
    theirs = hugging_face(params, hparams)
    import torch

    written = theirs.generate(
        torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=ends, pad_token_id=0
    )[0, len(ids) :].tolist()
    assert written[-1] in ends
    flags = ["--backend", "jax"] if script == "jax" else []
    script = "kv_cache.py" if script == "jax" else script
    code, out, err = call(script, prompt, "-n", "12", "--model_size", str(folder), *flags)
    assert (code, out) == (0, encoder.decode(written[:-1]) + "\n"), err


def test_generation_stops_at_any_of_several_ids(rng):
    params = random_params(rng, SIZES)
    new_ids = greedy(params, [1, 2], 20)
    ends = {new_ids[8], new_ids[15]}
    expected = new_ids[: next(i for i, id in enumerate(new_ids) if id in ends)]
    for endoftext in ends, tuple(ends), [np.int64(end) for end in ends]:
        assert gpt2.generate([1, 2], params, 2, 20, endoftext=endoftext) == expected
        assert kv_cache.generate([[1, 2]], params, 2, 20, endoftext=endoftext) == [expected]


def test_an_export_keeps_the_ends(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    write(folder, config={"eos_token_id": [258, 257]})
    encoder, hparams, params = utils.load_encoder_hparams_and_params(str(folder))
    utils.save_model(tmp_path / "again", encoder, hparams, params)
    again = get_encoder("again", tmp_path)
    assert (again.end_ids, again.special) == (encoder.end_ids, encoder.special)
    theirs = transformers.GPT2TokenizerFast.from_pretrained(tmp_path / "again")
    assert theirs.eos_token_id == 258
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again")
    assert model.generation_config.eos_token_id == [258, 257]


def test_prepare_separates_documents_by_the_models_end(folder, tmp_path):
    write(folder, config={"eos_token_id": 257})
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\nthree\n" * 20)
    out = tmp_path / "shards"
    code, _, err = call(
        "prepare.py", tmp_path / "a.txt", "--tokenizer", folder, "--out", out, "--val_fraction", "0"
    )
    assert code == 0, err
    ids = np.fromfile(out / "train_000000.bin", np.uint16)
    assert ((ids == 257).sum(), (ids == 256).sum()) == (41, 0)
    assert get_encoder("", out).endoftext == 257


def test_an_answer_to_learn_from_ends_with_the_models_end(folder):
    write(folder, config={"eos_token_id": 258})
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (_, asked), (answer, answered) = encode_messages(messages, get_encoder("", folder))
    assert (asked, answered, answer[-1]) == (False, True, 258)


@pytest.mark.parametrize("template", [TEMPLATE, {"default": TEMPLATE, "rag": "{{ messages }}"}])
@pytest.mark.parametrize("as_jinja", [True, False])
def test_a_chat_template_is_read_wherever_transformers_saves_it(
    folder, tmp_path, template, as_jinja
):
    """In files of their own, or in tokenizer_config.json; of several, the default one is kept."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2TokenizerFast.from_pretrained(folder)
    theirs.chat_template = template
    theirs.save_pretrained(tmp_path / "theirs", save_jinja_files=as_jinja)
    assert (tmp_path / "theirs" / "chat_template.jinja").is_file() == as_jinja
    ours = get_encoder("theirs", tmp_path)
    assert ours.chat_template == theirs.get_chat_template() == TEMPLATE
    ours.save(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.chat_template == TEMPLATE


def test_the_file_of_a_chat_template_comes_first(folder):
    transformers = pytest.importorskip("transformers")
    write(folder, tokenizer_config={"chat_template": "{{ bos_token }}"})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    theirs = transformers.GPT2TokenizerFast.from_pretrained(folder)
    assert get_encoder("", folder).chat_template == theirs.chat_template == TEMPLATE
    with pytest.raises(ValueError, match="has chat_template.jinja, which belongs to another model"):
        utils.check_target(folder)


@pytest.mark.parametrize("template", [{"default": ""}, 7, [{"name": "rag", "template": ""}], ["x"]])
def test_a_chat_template_that_is_none_is_refused(folder, template):
    write(folder, tokenizer_config={"chat_template": template})
    problem = r"tokenizer_config\.json: chat_template must be a text, or a list of templates "
    with pytest.raises(ValueError, match=problem):
        get_encoder("", folder)


@pytest.mark.parametrize("end", ["", END, OTHER_END, "<|endoftext|>", f"{END} \n"])
def test_an_end_at_the_end_of_an_answer_is_the_end(folder, tmp_path, end):
    """In an example as in a conversation; elsewhere it is text."""
    write(folder, config={"eos_token_id": [258, 257]})
    encoder = get_encoder("", folder)
    wanted = [*encoder.encode(f" {END}Ho"), 258]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "completion": f" {END}Ho{end}"}))
    [example], *_ = load_examples(str(path), encoder, 99)
    assert example[2:].tolist() == wanted
    messages = [{"role": "user", "content": "Hi"}]
    messages.append({"role": "assistant", "content": f"{END}Ho{end}"})
    (_, _), (answer, _) = encode_messages(messages, encoder)
    assert answer == wanted
    messages[1]["content"] = end
    assert not is_learned_answer(messages[1], encoder)


def test_the_server_ends_where_gpt2_ends_and_names_the_end(folder):
    serve = pytest.importorskip("serve", reason="starlette is not installed")
    testclient = pytest.importorskip("starlette.testclient")
    _, _, params = utils.load_encoder_hparams_and_params(str(folder))
    new_ids = greedy(params, Encoder([]).encode("It was"), 12)
    ends = [258, new_ids[5]]
    write(folder, config={"eos_token_id": ends})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    encoder, hparams, params = utils.load_encoder_hparams_and_params(str(folder))
    wanted = gpt2.generate(encoder.encode("It was"), params, 2, 12, endoftext=ends)
    with testclient.TestClient(
        serve.make_app("m", encoder, hparams, params), base_url="http://localhost"
    ) as client:
        body = {"prompt": "It was", "max_tokens": 12, "temperature": 0}
        [choice] = client.post("/v1/completions", json=body).json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == (encoder.decode(wanted), "stop")
        about = client.get("/tokenizer_info").json()
        assert (about["eos_token"], about["chat_template"]) == (OTHER_END, TEMPLATE)
        tokens = client.post("/tokenize", json={"prompt": f"a{OTHER_END}"}).json()["tokens"]
        assert tokens == [*encoder.encode("a"), 258]
