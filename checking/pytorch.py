"""Collects a PyTorch model's tensors with hooks. torch is imported only when it is needed."""

import numpy as np

from checking import names

N_LAYERS = 1000  # modules of blocks beyond this many are not recorded
INPUTS = {"ln_2": "resid_mid", "attn.c_proj": "attn.out", "mlp.c_proj": "mlp.gelu"}


def to_numpy(x):  # a tensor, an array, a number -> a new array
    if hasattr(x, "detach"):
        x = x.detach().to("cpu")
        x = x.float() if x.is_floating_point() else x
        x = x.numpy()
    return np.array(x)


def record(model, tokens, loss=None, optimizer=None, names_of_theirs=None):
    """Runs a model once and returns {name: array}, for `compare`.

    model: a torch.nn.Module, or any function of the inputs. It returns the logits, an object with
        `.logits`, or a dict of tensors by name, which are then recorded.
    tokens: [n_batch, n_seq + 1] ids. The model gets all but the last.
    loss: loss(the model's result, targets), to record the gradients as well.
    optimizer: a torch.optim optimizer, to take one step; needs loss.
    names_of_theirs: {their name of a module: our name}, where the two differ. {i} is the number of
        a block.
    """
    import torch

    tokens = torch.as_tensor(np.atleast_2d(np.asarray(tokens)), dtype=torch.long)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    is_module = isinstance(model, torch.nn.Module)
    if is_module:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        inputs, targets = inputs.to(device), targets.to(device)
    arrays, tensors = {}, {}
    known = known_modules(model, names_of_theirs or {}) if is_module else {}

    def note(name, x):
        arrays[name] = to_numpy(x)
        if getattr(x, "requires_grad", False):
            x.retain_grad()
            tensors[name] = x

    hooks = [module.register_forward_hook(noting(note, name)) for module, name in known.items()]
    try:
        with torch.set_grad_enabled(loss is not None):
            result = model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    note_results(result, note)
    if loss is not None:
        value = loss(result, targets)
        arrays["loss"] = to_numpy(value)
        if is_module:
            arrays |= gradients_and_step(model, value, optimizer, names_of_theirs or {})
            arrays |= gradients_of(tensors)
    return {"tokens": to_numpy(tokens), **arrays}


def note_results(result, note):  # of what a model returned
    if isinstance(result, dict) and not hasattr(result, "logits"):
        for name, x in result.items():
            note(name, x)
        return
    logits = getattr(result, "logits", result)
    note("logits", logits[0] if isinstance(logits, (tuple, list)) else logits)
    for i, weights in enumerate(getattr(result, "attentions", None) or ()):
        if weights is not None:
            note(f"blocks.{i}.attn.weights", weights)


def known_modules(model, theirs):  # -> {module: our name}
    found = {}
    for name, module in model.named_modules():
        ours = our_name(name, theirs)
        if ours:
            found[module] = ours
    return found


def our_name(name, theirs):
    """Returns our name for a module, or None."""
    if name == "":
        return None
    parts = [str(part) for part in name.split(".")]
    numbers = [part for part in parts if part.isdigit()]
    pattern = ".".join("{i}" if part.isdigit() else part for part in parts)
    if pattern in theirs:
        name = theirs[pattern].replace("{i}", numbers[0] if numbers else "")
    n_layer = int(numbers[0]) + 1 if numbers else 1
    if n_layer > N_LAYERS:
        return None
    try:
        found = names.find_name(name, n_layer, ())
    except KeyError:
        return None
    return found[0][0] if len(found) == 1 else None


def noting(note, name):
    def hook(module, args, result):
        short = name.split(".", 2)[-1]
        if short in INPUTS and hasattr(module, "weight"):  # not a module that contains c_proj
            note(name.removesuffix(short) + INPUTS[short], args[0])
        if name == "logits":
            return
        result = result[0] if isinstance(result, tuple) else result
        note(name, result)

    return hook


def gradients_and_step(model, loss, optimizer, theirs):
    model.zero_grad()
    loss.backward()
    arrays = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            arrays[f"grad.{parameter_name(name, theirs)}"] = to_numpy(p.grad)
    if optimizer is not None:
        optimizer.step()
        for name, p in model.named_parameters():
            arrays[f"step.{parameter_name(name, theirs)}"] = to_numpy(p)
    return arrays


def gradients_of(tensors):  # {name: a tensor whose gradient was kept} -> {"grad.NAME": array}
    """Leaves out the embeddings' rows, because grad.wte and grad.wpe belong to the parameters."""
    return {
        f"grad.{name}": to_numpy(x.grad)
        for name, x in tensors.items()
        if x.grad is not None and name not in ("wte", "wpe")
    }


def parameter_name(name, theirs):  # "layers.0.norm.weight" -> "blocks.0.ln_1.weight", by `theirs`
    module, _, last = name.rpartition(".")
    ours = our_name(module, theirs)
    parts = [part for part in module.split(".") if part.isdigit()]
    pattern = ".".join("{i}" if part.isdigit() else part for part in module.split("."))
    if pattern in theirs and ours:
        return f"{theirs[pattern].replace('{i}', parts[0] if parts else '')}.{last}"
    return name


def hugging_face(model_dir, dtype):  # -> transformers' model of a folder, in evaluation mode
    """Raises ImportError if transformers or torch is not installed."""
    try:
        import torch
        import transformers
    except ImportError:
        raise ImportError("check hf: needs pip install torch transformers") from None
    transformers.utils.logging.disable_progress_bar()
    load = transformers.GPT2LMHeadModel.from_pretrained
    model = load(model_dir, attn_implementation="eager", dtype=getattr(torch, dtype))
    model.config.output_attentions = True
    return model.eval()


def record_hugging_face(model, tokens, adam):
    """Records intermediates, gradients, and a step of torch.optim.AdamW."""
    import torch

    def loss(result, targets):
        logits = result.logits.float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": adam["weight_decay"]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=adam["learning_rate"],
        betas=(adam["adam_b1"], adam["adam_b2"]),
        eps=adam["adam_eps"],
    )
    if model.dtype == torch.float16:  # Adam's eps would be 0; such models train in float32
        optimizer = None
    return record(model, tokens, loss, optimizer)
