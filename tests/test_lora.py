"""LoRA: training/adapters.py and model_files/adapters.py, against peft, transformers and NumPy."""

import functools
import json
import re
import secrets
import shutil
import signal
from importlib.util import find_spec

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import torch
from conftest import REPO, TINY, hugging_face, random_params

import train_jax
import utils
from encoder import Encoder
from gpt2 import gpt2
from model_files import weights
from model_files.adapters import merge, read_adapter, read_config, write_adapter
from training import checkpoints, devices
from training.adapters import Adapted, adapt, base_name, find_adapters, new_adapters
from training.batches import read_batches
from training.state import combine, moment_shapes, partition, start_state

pytestmark = pytest.mark.skipif(not find_spec("peft"), reason="peft is not installed")
FLAGS = {"seed": 1, "lora_rank": 4, "lora_alpha": 6.0, "lora_targets": "c_attn,c_proj,c_fc"}
TEXT = [np.random.default_rng(0).integers(0, 257, 5000, dtype=np.uint16)]
RUN = ["--lora_rank", 2, "--n_ctx", 16, "--n_steps", 8, "--eval_every", 4, "--checkpoint_every", 2]


def trained(rng, params, **flags):
    """An adapter whose lora_B is not zero any more, as {name: (lora_A, lora_B, scale)}."""
    adapters = new_adapters(params, FLAGS | {"seed": int(rng.integers(2**32))} | flags)
    noise = {n: rng.standard_normal(B.shape, np.float32) for n, (_, B, _) in adapters.items()}
    return {n: (A, 0.3 * noise[n], scale) for n, (A, _, scale) in adapters.items()}


def losses(params, tokens):
    return train_jax.losses(params, tokens, TINY["n_head"]).mean()


def cosine(a, b):
    return (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)


# --- The arithmetic -------------------------------------------------------------------------------


def test_at_the_start_the_model_is_its_base(rng):
    params = random_params(rng, TINY)
    adapters = new_adapters(params, FLAGS)
    assert len(adapters) == 4 * TINY["n_layer"]
    ids = rng.integers(0, 257, (2, 20))
    wanted = gpt2(ids, **params, n_head=2)
    assert np.array_equal(gpt2(ids, **merge(params, adapters), n_head=2), wanted)
    assert np.array_equal(gpt2(ids, **adapt(params, adapters), n_head=2), wanted)
    for lora_A, lora_B, _ in adapters.values():  # uniform, up to 1 / sqrt(n_in)
        bound = lora_A.shape[1] ** -0.5
        assert not lora_B.any() and 0.8 * bound < abs(lora_A).max() <= bound
        assert abs(lora_A.std() / bound - 3**-0.5) < 0.2 and lora_A.dtype == np.float32


@pytest.mark.parametrize("backend", [np.asarray, jnp.asarray])
def test_merged_is_unmerged(rng, backend):
    params = random_params(rng, TINY)
    adapters = trained(rng, params)
    ids = backend(rng.integers(0, 257, (2, 20)))
    adapted = jax.tree.map(backend, adapt(params, adapters))
    ours = gpt2(ids, **adapted, n_head=2)
    wanted = gpt2(ids, **jax.tree.map(backend, merge(params, adapters)), n_head=2)
    assert abs(ours - wanted).max() < 1e-5 * abs(wanted).max()
    assert abs(gpt2(ids, **jax.tree.map(backend, params), n_head=2) - wanted).max() > 0.1


@pytest.mark.parametrize(
    "targets, n_each",
    [("c_proj", 2), ("attn.c_proj", 1), ("mlp.c_proj,c_fc", 2), ("c_attn,c_proj,c_fc", 4)],
)
def test_a_bare_c_proj_means_both_as_in_peft(rng, targets, n_each):
    params = random_params(rng, TINY)
    adapters = new_adapters(params, FLAGS | {"lora_targets": targets})
    assert len(adapters) == n_each * TINY["n_layer"]
    theirs = peft_model(params, target_modules=targets.split(","))
    layers = {n.removesuffix(".lora_A") for n, _ in theirs.named_modules() if n.endswith("lora_A")}
    names = {"transformer." + weights.hugging_face_name(name) for name in adapters}
    assert {f"base_model.model.{name}".removesuffix(".weight") for name in names} == layers


def peft_model(params, **settings):
    """peft's model on transformers' GPT-2, its factors random."""
    import peft  # here: it takes 140 MiB

    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj", "c_fc"]} | settings
    settings |= {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}
    model = peft.get_peft_model(hugging_face(params, TINY), peft.LoraConfig(**settings))
    for name, x in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(x, std=0.3)
    return model.eval()


def load_into(model, adapters):
    """Our factors in peft's model, by the names that it has itself."""
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for name, (lora_A, lora_B, _) in adapters.items():
            module = (
                "base_model.model.transformer." + weights.hugging_face_name(name)[: -len("weight")]
            )
            for which, factor in ("A", lora_A), ("B", lora_B):
                theirs[f"{module}lora_{which}.default.weight"].copy_(torch.tensor(factor))
    return theirs


def test_gradients_are_pefts(rng):
    """And there are no others: of the base there is no gradient, and no moment."""
    params = random_params(rng, TINY)
    adapters = trained(rng, params)
    tokens = rng.integers(0, 257, (3, 21))
    tree = jax.tree.map(jnp.asarray, adapt(params, adapters))
    ours, frozen = partition(tree)
    function = jax.value_and_grad(lambda t: losses(combine(t, frozen), tokens))
    value, gradients = jax.jit(function)(ours)

    model = peft_model(params)
    theirs = load_into(model, adapters)
    batch = torch.from_numpy(tokens)
    logits = model(batch[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    assert abs(value - loss.item()) < 1e-5 * abs(value)
    gradients = find_adapters(gradients)
    assert gradients.keys() == adapters.keys()
    for name, (d_A, d_B, _) in gradients.items():
        module = "base_model.model.transformer." + weights.hugging_face_name(name)[: -len("weight")]
        for which, ours in ("A", d_A), ("B", d_B):
            wanted = theirs[f"{module}lora_{which}.default.weight"].grad.numpy()
            assert np.linalg.norm(ours - wanted) < 1e-4 * np.linalg.norm(wanted), (name, which)
    assert len([x for x in theirs.values() if x.grad is not None]) == 2 * len(adapters)
    names = moment_shapes(optax.adamw(1e-3), tree)
    assert sum(len(shape) == 2 for shape, _ in names.values()) == 2 * 2 * len(adapters)
    assert all("lora_" in name for name, (shape, _) in names.items() if shape)


def test_a_rank_of_the_width_recovers_the_direction_of_full_finetuning(rng):
    """One step of descent from lora_B = 0, of one matrix. lora_A is a rotation: nothing is lost."""
    params, name = random_params(rng, TINY), "blocks.1.attn.c_attn.w"
    rotation = np.linalg.qr(rng.standard_normal((16, 16)))[0].astype(np.float32)
    adapters = {name: (rotation, np.zeros((48, 16), np.float32), 0.5)}
    batches = rng.integers(0, 257, (1, 1, 4, 21))

    def change(tree, matrix):
        optimizer = optax.sgd(0.1)
        steps = train_jax.make_train_steps(optimizer, n_head=2)
        state, _ = start_state(tree, None, 0, optimizer, 257, devices.make_mesh(1), False)
        (after, _, _), _ = steps(state, batches, 1)
        return matrix(after) - weights.leaf(params, name)

    def merged(tree):
        return weights.leaf(merge(params, find_adapters(devices.to_host(tree))), name)

    ours = change(adapt(params, adapters), merged)
    full = change(params, lambda tree: np.asarray(weights.leaf(tree, name)))
    assert cosine(ours, full) > 0.9999
    assert np.linalg.norm(ours) == pytest.approx(
        0.25 * np.linalg.norm(full), rel=1e-3
    )  # scale ** 2


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_eight_devices_compute_what_one_does(rng, fsdp):
    params = random_params(rng, TINY)
    adapters = trained(rng, params)

    def train(n_devices, fsdp):  # 3 steps of 2 * 8 sequences
        mesh, optimizer = devices.make_mesh(n_devices), optax.adamw(1e-3)
        tree = adapt(params, adapters)
        state, shardings = start_state(tree, None, 0, optimizer, 257, mesh, fsdp)
        steps = train_jax.make_train_steps(optimizer, shardings=shardings, n_head=2)
        spec = devices.make_sharding(mesh, None, None, "data")
        state, (loss, *_) = steps(state, read_batches(TEXT, 1, 0, (3, 2, 8), 16, spec), 3)
        return devices.to_host(state[0]), float(loss)

    one, wanted = train(1, False)
    eight, loss = train(8, fsdp)
    assert loss == pytest.approx(wanted, rel=1e-5)
    pairs = zip(find_adapters(one).values(), find_adapters(eight).values(), strict=True)
    for (A, B, _), (other_A, other_B, _) in pairs:
        assert np.linalg.norm(A - other_A) < 1e-3 * np.linalg.norm(A)
        assert np.linalg.norm(B - other_B) < 1e-3 * np.linalg.norm(B)
    for (lora_A, _, _), (other, _, _) in zip(
        adapters.values(), find_adapters(one).values(), strict=True
    ):
        assert (lora_A != other).any()
    for name, w in weights.leaves(params).items():  # the base has not moved by one bit
        after = weights.leaf(eight, name)
        assert np.array_equal(after.w if isinstance(after, Adapted) else after, w), name


@pytest.mark.slow
def test_narrow_products_are_near(rng):
    """bfloat16 rounds the base; the factors stay float32 between the steps."""
    params = random_params(rng, TINY)
    tree = jax.tree.map(jnp.asarray, adapt(params, trained(rng, params)))
    tokens = rng.integers(0, 257, (3, 21))
    narrow = train_jax.narrow(tree, "bfloat16")
    assert narrow["blocks"][0]["attn"]["c_attn"]["w"].dtype == jnp.bfloat16
    assert losses(narrow, tokens) == pytest.approx(float(losses(tree, tokens)), rel=0.05)
    optimizer = optax.adamw(1e-3)
    steps = train_jax.make_train_steps(optimizer, dtype="bfloat16", n_head=2)
    state, _ = start_state(tree, None, 0, optimizer, 257, devices.make_mesh(1), False)
    (after, _, _), _ = steps(state, tokens[None, None], 1)
    assert {x.dtype.name for x in jax.tree.leaves(partition(after)[0])} == {"float32"}


# --- peft's layout --------------------------------------------------------------------------------

SETTINGS = {
    "plain": {},
    "bare c_proj": {"target_modules": ["c_proj"]},
    "regex": {"target_modules": r".*\.1\.(attn\.c_attn|mlp\.c_fc)"},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"mlp.c_proj": 2, r"h\.1\.attn\.c_attn": 3},
        "alpha_pattern": {"c_fc": 9, r"h\.0\..*": 5},
    },
    "rslora and patterns": {
        "use_rslora": True, "rank_pattern": {"c_fc": 1}, "alpha_pattern": {"^transformer.h.1.*": 2},
    },
    "some layers": {"layers_to_transform": [1], "layers_pattern": "h"},
    "no dropout where nothing is trained": {"lora_dropout": 0.5, "init_lora_weights": "gaussian"},
}  # fmt: skip


def peft_folder(params, folder, base, **settings):  # -> peft's model, saved there
    model = peft_model(params, **settings)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", SETTINGS)
def test_an_adapter_of_pefts_loads_with_its_logits(models, rng, tmp_path, case):
    folder, params = models
    model = peft_folder(params, tmp_path / "theirs", str(folder / "tiny"), **SETTINGS[case])
    ids = rng.integers(0, 257, (2, 20))
    wanted = model(torch.from_numpy(ids)).logits.detach().numpy()
    _, hparams, ours = utils.load_encoder_hparams_and_params(str(tmp_path / "theirs"), folder)
    assert hparams == TINY
    assert abs(gpt2(ids, **ours, n_head=2) - wanted).max() < 1e-4
    assert abs(gpt2(ids, **params, n_head=2) - wanted).max() > 1e-2
    assert not any(x.flags.writeable for x in weights.leaves(ours).values())


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """A finished run of 8 steps; the flags that it took."""
    folder, _ = models
    place = tmp_path_factory.mktemp("lora")
    text = (REPO / "gpt2.py").read_text() + str(secrets.randbits(64))
    (place / "text").write_text(text)
    args = ["--init_from", "tiny", "--data", place / "text", *RUN]
    code, out, err = conftest.call_trainer(*args, "--out", place / "out", models_dir=folder)
    assert (code, err) == (0, "")
    return place / "out", args, out


def test_peft_opens_what_the_trainer_writes(models, run, rng):
    from peft import PeftModel

    folder, params = models
    out, _, printed = run
    model = PeftModel.from_pretrained(hugging_face(params, TINY), str(out)).eval()
    ids = rng.integers(0, 257, (2, 20))
    wanted = model(torch.from_numpy(ids)).logits.detach().numpy()
    _, _, ours = utils.load_encoder_hparams_and_params(str(out), folder)
    assert abs(gpt2(ids, **ours, n_head=2) - wanted).max() < 1e-4
    assert abs(gpt2(ids, **params, n_head=2) - wanted).max() > 1e-4
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "tiny")  # not in the default folder
    n_trained = sum(
        x.size for x in safetensors.numpy.load_file(out / "adapter_model.safetensors").values()
    )
    n_base = sum(x.size for x in weights.leaves(params).values())
    assert printed.startswith(f"{n_trained} parameters beside {n_base} frozen ones, ")
    assert {p.name for p in out.iterdir()} >= {"metrics.jsonl", "checkpoints", "loss.png"}
    assert not (out / "model.safetensors").exists()
    losses = [float(x) for x in re.findall(r"validation (\d\.\d+)", printed)]
    assert len(losses) == 3 and losses[2] < losses[0]


def test_half_as_wide_on_the_disk(models, tmp_path, rng):
    folder, params = models
    adapters = trained(rng, params)
    config = peft_config()
    write_adapter(tmp_path / "half", config, adapters, "float16")
    tensors = safetensors.numpy.load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {x.dtype.name for x in tensors.values()} == {"float16"}
    found = read_adapter(tmp_path / "half", read_config(tmp_path / "half"), TINY)
    assert found.keys() == adapters.keys()
    for name, (A, B, scale) in adapters.items():
        assert np.array_equal(found[name][0], A.astype("f2")) and found[name][2] == scale
        assert np.array_equal(found[name][1], B.astype("f2"))


def test_an_adapter_keeps_the_template_of_its_conversations(models, tmp_path, rng):
    folder, params = models
    model = utils.load_encoder_hparams_and_params("tiny", folder)
    flags = FLAGS | {"init_from": "tiny"}
    adapted = model._replace(params=adapt(params, trained(rng, params)))
    talking = adapted._replace(encoder=model.encoder.with_chat_template("{{ messages }}"))
    out, whole = tmp_path / "out", tmp_path / "whole"
    for saved, template in ((talking, "{{ messages }}"), (adapted, None)):
        checkpoints.save_params(out, saved, flags)
        utils.check_target(out, for_adapter=True)
        read = utils.load_encoder_hparams_and_params(str(out), folder)
        assert read.encoder.chat_template == template
        utils.save_model(whole, *read)
        assert utils.load_encoder_hparams_and_params(str(whole)).encoder.chat_template == template


def peft_config(**settings):
    from model_files.adapters import peft_config

    return peft_config("tiny", 4, 6.0, ["c_attn", "c_proj", "c_fc"]) | settings


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_settings_that_concern_the_training_alone_change_nothing(models, tmp_path, rng, start):
    adapters = trained(rng, models[1])
    write_adapter(tmp_path, peft_config(), adapters)
    config = peft_config(
        init_lora_weights=start, lora_dropout=0.5, inference_mode=False, task_type=None,
        auto_mapping={"base_model_class": "GPT2LMHeadModel"}, eva_config={"rho": 2.0},
        exclude_modules=["wte"], layers_pattern="h", layers_to_transform=[0, 1],
        megatron_core="megatron.core", peft_version="0.1", qalora_group_size=16, revision="main",
    )  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = read_adapter(tmp_path, read_config(tmp_path), TINY)
    assert found.keys() == adapters.keys()
    for name, (A, B, scale) in adapters.items():
        assert np.array_equal(found[name][0], A) and np.array_equal(found[name][1], B)
        assert found[name][2] == scale


def test_numbers_and_patterns_have_limits(tmp_path):
    def read(**settings):
        (tmp_path / "adapter_config.json").write_text(json.dumps(peft_config(**settings)))
        return read_config(tmp_path)

    patterns = {f"{i:01000}": 1 for i in range(1000)}  # a thousand, each of a thousand letters
    assert read(r=2**24 - 1, rank_pattern=patterns)["rank_pattern"] == patterns
    assert read(r=1, lora_alpha=0.5, alpha_pattern=None)["alpha_pattern"] == {}
    for wrong, words in [
        ({"r": 2**24}, "r is 16777216, not a sensible number"),
        ({"lora_alpha": 2.0**24}, "lora_alpha is 16777216.0, not a sensible number"),
        ({"lora_alpha": True}, "lora_alpha is True, not a sensible number"),
        ({"rank_pattern": patterns | {"h": 1}}, "rank_pattern is too long, more than 1000"),
    ]:
        with pytest.raises(ValueError, match=words):
            read(**wrong)


def test_alpha_is_written_whole_where_it_is_as_peft_declares_it():
    import peft  # here: it takes 140 MiB

    from model_files.adapters import peft_config

    for alpha, kind in (6.0, int), (1.5, float):
        found = peft_config("tiny", 4, alpha, ["c_fc", "c_attn"])
        assert found["lora_alpha"] == alpha and type(found["lora_alpha"]) is kind
        theirs = peft.LoraConfig(**found)  # takes all of it
        assert theirs.task_type == "CAUSAL_LM" and theirs.inference_mode and theirs.r == 4
        assert theirs.fan_in_fan_out and theirs.bias == "none"
        assert theirs.lora_dropout == 0 and theirs.init_lora_weights is True


@pytest.mark.parametrize("rank", [4, 2])
def test_old_weights_do_not_stay_beside_other_settings(models, tmp_path, rng, monkeypatch, rank):
    """Where the new ones cannot be written: then the old ones are right for their own alone."""
    adapters = trained(rng, models[1])
    write_adapter(tmp_path / "a", peft_config(), adapters)
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model_files.adapters.write_safetensors", full)
    with pytest.raises(OSError, match="cannot write .*: No space left"):
        write_adapter(tmp_path / "a", peft_config(r=rank), adapters)
    left = {p.name: p.read_bytes() for p in (tmp_path / "a").glob("*.safetensors")}
    assert left == ({"adapter_model.safetensors": before} if rank == 4 else {})


@pytest.mark.parametrize(
    "script", ["gpt2.py", "kv_cache.py", "explain.py", "utils.py", "evaluate.py"]
)
def test_an_adapters_folder_is_a_model_for_every_script(models, run, tmp_path, script):
    folder, _ = models
    out, _, _ = run
    where, whole = {"models_dir": folder, "cwd": tmp_path}, tmp_path / "whole"
    if script == "utils.py":
        code, printed, err = conftest.call(script, "merge", out, whole, **where)
        assert (code, err, printed) == (0, "", f"the merged model is in {whole}\n")
        ids = np.arange(20)
        logits = [
            gpt2(ids, **utils.load_encoder_hparams_and_params(str(place), folder)[2], n_head=2)
            for place in (out, whole)
        ]
        assert np.array_equal(*logits)
        printed = conftest.call(script, "merge", out, f"whole_{tmp_path.name}", **where)[1]
        assert printed == f"the merged model is in {folder}/whole_{tmp_path.name}\n"
        code, _, err = conftest.call(script, "merge", out, whole, **where)
        assert code == 2 and err == f"error: {whole} is not empty; name a new folder\n"
        return
    assert conftest.call("utils.py", "merge", out, whole, **where)[0] == 0
    (tmp_path / "text").write_text("some words to be measured " * 9)
    args = {"explain.py": ["abc", "--out", "page.html"]}.get(script, ["abc"])
    args = (
        ["perplexity", "--data", "text", "--backend", "numpy"] if script == "evaluate.py" else args
    )
    (code, ours, err), (_, wanted, _) = (
        conftest.call(script, *args, "--model_size", model, **where) for model in (out, whole)
    )
    assert (code, err) == (0, "") and ours == wanted and ours


# --- A run ----------------------------------------------------------------------------------------


def written(out):
    """What a run leaves, but for its number and what says when and where."""
    files = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    names = ("metrics.jsonl", "loss.png", "run.json")
    return {name: data for name, data in files.items() if name.name not in names}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_run_that_goes_on_ends_with_the_same_bits(run, models, tmp_path, monkeypatch, how):
    """It needs no models_dir: the checkpoint says where its base is."""
    out, args, _ = run
    read, n_read = train_jax.read_batches, []

    def interrupted(*args):
        n_read.append(1)
        if len(n_read) == 4:
            if how == "killed":
                raise MemoryError("as good as killed")
            signal.raise_signal(signal.SIGINT)
        return read(*args)

    monkeypatch.setattr(train_jax, "read_batches", interrupted)
    code, printed, err = conftest.call_trainer(*args, "--out", tmp_path / "b", models_dir=models[0])
    monkeypatch.setattr(train_jax, "read_batches", read)
    assert code == (130 if how == "stopped" else 2)
    assert not (tmp_path / "b" / "checkpoints" / "00000008").exists()
    code, printed, err = conftest.call_trainer("--resume", tmp_path / "b")
    assert (code, err) == (0, "") and "resuming " in printed
    assert written(tmp_path / "b") == written(out)


def test_an_adapter_and_a_model_do_not_share_a_folder(run, models, tmp_path):
    out, args, _ = run
    folder, _ = models

    def refused(*args):
        code, printed, err = conftest.call_trainer(*args, models_dir=folder)
        assert (code, printed) == (2, "") and err.count("\n") == 1
        return err

    before = written(out)
    err = refused(*args, "--out", out)
    assert err.startswith(f"error: {out} holds an adapter, which training would replace: --resume")
    full = args[: args.index("--lora_rank")] + args[args.index("--lora_rank") + 2 :]
    assert "has adapter_config.json" in refused(*full, "--out", out, "--overwrite")
    shutil.copytree(folder / "tiny", tmp_path / "model")
    assert "has config.json" in refused(*args, "--out", tmp_path / "model", "--overwrite")
    assert written(out) == before


@pytest.mark.slow
def test_an_adapter_is_replaced_where_one_says_so(run, models, tmp_path):
    out, args, _ = run
    folder, _ = models
    shutil.copytree(out, tmp_path / "old")
    code, _, err = conftest.call_trainer(
        *args, "--lora_alpha", 3, "--out", tmp_path / "old", "--overwrite", models_dir=folder
    )
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "old" / "adapter_config.json").read_text())["lora_alpha"] == 3


def test_a_base_that_has_changed_is_no_base_to_go_on_with(run, models, tmp_path, rng):
    out, _, _ = run
    folder, _ = models
    shutil.copytree(out, tmp_path / "run")
    utils.save_model(tmp_path / "other", Encoder([]), TINY, random_params(rng, TINY))
    (place,) = (tmp_path / "run" / "checkpoints").glob("*8")
    text = (place / "adapter_config.json").read_text()
    changed = text.replace(str(folder / "tiny"), str(tmp_path / "other"))
    (place / "adapter_config.json").write_text(changed)
    code, printed, err = conftest.call_trainer("--resume", tmp_path / "run", "--n_steps", 9)
    assert (code, printed) == (2, "") and err.count("\n") == 1
    assert f"is not the model that {place} was trained on" in err


def test_a_run_goes_on_where_its_base_has_moved(run, models, tmp_path, rng):
    out, _, _ = run
    folder, _ = models
    shutil.copytree(out, tmp_path / "run")
    for place in sorted((tmp_path / "run" / "checkpoints").iterdir()):
        text = (place / "adapter_config.json").read_text()
        gone = text.replace(str(folder / "tiny"), str(tmp_path / "gone"))
        (place / "adapter_config.json").write_text(gone)

    def resume(*args):
        return conftest.call_trainer("--resume", tmp_path / "run", "--n_steps", 9, *args)

    code, printed, err = resume()
    assert (code, printed) == (2, "") and err.count("\n") == 1 and "its base is missing" in err
    assert err.endswith("; if it has moved, pass its new path with --init_from\n")
    utils.save_model(tmp_path / "other", Encoder([]), TINY, random_params(rng, TINY))
    code, printed, err = resume("--init_from", tmp_path / "other")
    assert (code, printed) == (2, "") and err.count("\n") == 1
    assert f"other is not the model that {place} was trained on" in err
    moved = shutil.copytree(folder / "tiny", tmp_path / "moved")
    code, printed, err = resume("--init_from", moved)
    assert (code, err) == (0, "") and ") after step 8 of" in printed
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(moved)


@pytest.mark.parametrize(
    "given, models_dir, wanted",
    [
        ("tiny", "models", "tiny"),
        ("124M", "models", "124M"),
        ("openai-community/gpt2", "models", "openai-community/gpt2"),
        ("tiny", "elsewhere", "HERE/elsewhere/tiny"),
        ("elsewhere/tiny", "models", "HERE/elsewhere/tiny"),
        ("./models/tiny", "models", "HERE/models/tiny"),
    ],
)
def test_a_base_is_called_so_that_it_is_found_again(
    tmp_path, monkeypatch, given, models_dir, wanted
):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "elsewhere" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert base_name(given, models_dir) == wanted.replace("HERE", str(tmp_path))


# --- What is refused ------------------------------------------------------------------------------

BAD_FLAGS = {
    "rank": (["--lora_rank", 0], "lora_rank must be from 1 to"),
    "rank too large": (["--lora_rank", 17], "lora_rank is at most n_embd, 16 in that model"),
    "alpha": (["--lora_rank", 2, "--lora_alpha", 0], "lora_alpha must be more than 0"),
    "target": (["--lora_rank", 2, "--lora_targets", "c_attn,wte"], "lora_targets must be some of"),
    "no target": (["--lora_rank", 2, "--lora_targets", ""], "--lora_targets is empty"),
    "no rank": (["--lora_alpha", 2], "lora_alpha needs --lora_rank"),
    "muon": (["--lora_rank", 2, "--optimizer", "muon"], "optimizer must be adamw with --lora_rank"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_flags_that_make_no_sense_are_refused_in_one_line(models, tmp_path, case):
    flags, words = BAD_FLAGS[case]
    args = ["--init_from", "tiny", "--data", "python-docs", "--out", tmp_path / "out", *flags]
    code, out, err = conftest.call_trainer(*args, models_dir=models[0])
    assert (code, out) == (2, "") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "out").exists()


def test_adapters_need_a_model_and_jax(tmp_path):
    args = ["--data", "python-docs", "--out", tmp_path / "out", "--lora_rank", 2]
    code, out, err = conftest.call_trainer(*args)
    assert (code, out) == (2, "") and err.endswith(
        "--lora_rank needs --init_from, the model to adapt\n"
    )
    code, out, err = conftest.call("backprop.py", *args)
    wanted = "error: backprop.py doesn't support --lora_rank 2; use train_jax.py\n"
    assert (code, out, err) == (2, "", wanted)


def test_backprop_does_not_go_on_with_adapters(run):
    code, out, err = conftest.call("backprop.py", "--resume", run[0])
    wanted = "error: backprop.py doesn't support --lora_rank 2; use train_jax.py\n"
    assert (code, out, err) == (2, "", wanted)


A = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
B = A.replace("lora_A", "lora_B")


def without(key):
    return lambda tensors: {name: x for name, x in tensors.items() if name != key}


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): x for name, x in tensors.items()}


BAD_FOLDERS = {  # what adapter_config.json says, what becomes of the tensors, what is complained
    "dora": ({"use_dora": True}, None, "use_dora True is not supported"),
    "embeddings": ({"modules_to_save": ["wte"]}, None, "modules_to_save ['wte'] is not supported"),
    "biases": ({"lora_bias": True}, None, "lora_bias True is not supported"),
    "other biases": ({"bias": "all"}, None, "bias 'all' is not supported; only 'none' is"),
    "another method": ({"peft_type": "IA3"}, None, "peft_type 'IA3' is not supported"),
    "another start": ({"init_lora_weights": "pissa"}, None, "init_lora_weights 'pissa' is not"),
    "the future": ({"use_hyperlora": {"x": 1}}, None, "use_hyperlora {'x': 1} is not supported"),
    "no base": ({"base_model_name_or_path": None}, None, "base_model_name_or_path is None"),
    "an empty base": ({"base_model_name_or_path": ""}, None, "base_model_name_or_path is ''"),
    "a number for a base": ({"base_model_name_or_path": 7}, None, "base_model_name_or_path is 7"),
    "a missing base": (
        {"base_model_name_or_path": "gone"}, None, "its base is missing: no model 'gone'",
    ),
    "a missing folder": (
        {"base_model_name_or_path": "/gone/x"}, None, "its base is missing: no folder at /gone/x",
    ),
    "itself": ({"base_model_name_or_path": "FOLDER"}, None, "is also an adapter"),
    "rank": ({"r": 0}, None, "r is 0, not a sensible number"),
    "another rank": ({"r": 5}, None, "is (4, 16), but rank and base ask for (5, 16)"),
    "alpha": ({"lora_alpha": "16"}, None, "lora_alpha is '16', not a sensible number"),
    "alphas": ({"alpha_pattern": {"c_attn": None}}, None, "lora_alpha is None"),
    "a list": ({"rank_pattern": [1]}, None, "rank_pattern is not an object"),
    "no pattern": (
        {"alpha_pattern": {"(": 3}}, None, "adapter_config.json has an invalid pattern: ",
    ),  # fmt: skip
    "a pattern that never ends": (
        {"rank_pattern": {"(?R)": 3}},
        None,
        "adapter_config.json has an invalid pattern: regex timed out",
    ),
    "a long pattern": (
        {"alpha_pattern": {"a" * 1001: 3}}, None, "alpha_pattern is too long, more than 1000",
    ),
    "half a rank": ({"r": 0.5}, None, "r is 0.5, not a sensible number"),
    "half": ({}, without(B), f"{B} is missing"),
    "none": ({}, lambda tensors: {}, "contains no adapters"),
    "a thirteenth block": ({}, renamed(".h.1.", ".h.12."), "the base has only 2 blocks"),
    "the embedding": ({}, renamed("h.0.attn.c_attn", "wte"), "is not a part of attn.c_attn, "),
    "another layer": ({}, renamed("c_attn", "c_extra"), "is not a part of attn.c_attn, "),
    "another base": (
        {}, lambda tensors: {n: x[:, :-1] if n == A else x for n, x in tensors.items()},
        "is (4, 15), but rank and base ask for (4, 16)",
    ),
    "integers": (
        {}, lambda tensors: {n: x.astype(np.int32) for n, x in tensors.items()}, "is I32; only F32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_what_we_would_compute_wrongly_is_refused_in_one_line(models, rng, tmp_path, case):
    changes, spoil, words = BAD_FOLDERS[case]
    folder, params = models
    adapter = tmp_path / "adapter"
    write_adapter(adapter, peft_config(), trained(rng, params))
    config = peft_config(**changes)
    config |= {k: str(adapter) for k, value in config.items() if value == "FOLDER"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    if spoil:
        path = adapter / "adapter_model.safetensors"
        safetensors.numpy.save_file(spoil(safetensors.numpy.load_file(path)), path)
    code, out, err = conftest.call("gpt2.py", "abc", "--model_size", adapter, models_dir=folder)
    assert (code, out) == (2, "") and err.count("\n") == 1 and words in err
    assert str(adapter) in err


@pytest.mark.parametrize("what", ["an adapter", "scaled attention"])
def test_a_base_whose_adapters_would_be_something_else_in_peft_is_refused(
    models, rng, tmp_path, what
):
    """By the trainer, and where somebody else's adapter names it."""
    base = tmp_path / "base"
    shutil.copytree(models[0] / "tiny", base)
    config = json.loads((base / "config.json").read_text())
    config["scale_attn_by_inverse_layer_idx"] = what == "scaled attention"
    (base / "config.json").write_text(json.dumps(config))
    if what == "an adapter":
        base = tmp_path / "first"
        write_adapter(base, peft_config(), trained(rng, models[1]))
    write_adapter(
        tmp_path / "a", peft_config(base_model_name_or_path=str(base)), trained(rng, models[1])
    )
    for code, out, err in (
        conftest.call("gpt2.py", "a", "--model_size", tmp_path / "a", models_dir=models[0]),
        conftest.call_trainer(
            "--init_from", base, "--data", "python-docs", "--out", tmp_path / "out",
            "--lora_rank", 2, models_dir=models[0],
        ),
    ):  # fmt: skip
        assert (code, out) == (2, "") and err.count("\n") == 1 and str(base) in err
        assert ("is also an adapter" if what == "an adapter" else "scales its attention") in err
    assert not (tmp_path / "out").exists()


def test_a_pickle_is_not_opened(models, rng, tmp_path):
    write_adapter(tmp_path / "a", peft_config(), trained(rng, models[1]))
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    code, out, err = conftest.call(
        "gpt2.py", "a", "--model_size", tmp_path / "a", models_dir=models[0]
    )
    assert (code, out) == (2, "") and "adapter_model.safetensors is missing" in err


def test_only_adapters_are_merged(models, tmp_path):
    call = functools.partial(conftest.call, "utils.py", models_dir=models[0])
    code, out, err = call("merge", "tiny", tmp_path / "out")
    assert (code, out) == (2, "") and err.endswith(
        "no adapter_config.json, so there is nothing to merge\n"
    )
    code, out, err = call("split", "tiny", tmp_path / "out")
    assert (code, out) == (2, "") and err == "error: no command 'split'; the only one is merge\n"
    assert not (tmp_path / "out").exists()


def test_adapters_are_among_the_models_that_one_can_choose(models, rng, tmp_path):
    write_adapter(tmp_path / "mine", peft_config(), trained(rng, models[1]))
    with pytest.raises(ValueError, match=r"choose one of mine, 124M"):
        utils.find_model("thine", tmp_path)
