"""Recipes: values for the flags of a training run. A flag that is typed overrides its value.

`python train_jax.py --help` explains them.
"""

SHAKESPEARE = {
    "data": "shakespeare",
    "n_accumulate": 1,
    "optimizer": "muon",
    "n_warmup": 100,
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "adam_b2": 0.99,
    "dropout": 0.0,
    "ema": 0.0,
    "dtype": None,  # float32 on CPUs, bfloat16 elsewhere
    "fsdp": False,
    "eval_every": 200,
    "checkpoint_every": 200,
    "seed": 1337,
}
GPT2 = SHAKESPEARE | {
    "data": None,
    "n_ctx": 1024,
    "batch_size": 32,
    "n_accumulate": 16,  # 32 * 16 * 1024 = 524288 tokens per step, and 10 billion in all
    "n_steps": 19073,
    "optimizer": "adamw",
    "n_warmup": 700,
    "adam_b2": 0.95,
    "eval_every": 250,
    "checkpoint_every": 1000,
}
RECIPES = {
    "shakespeare-cpu": SHAKESPEARE
    | {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_ctx": 64, "batch_size": 12, "n_steps": 2000}
    | {"learning_rate": 5e-3, "min_learning_rate": 5e-4, "ema": 0.99},
    "shakespeare": SHAKESPEARE
    | {"n_layer": 6, "n_head": 6, "n_embd": 384, "n_ctx": 256, "batch_size": 64, "n_steps": 5000}
    | {"learning_rate": 3e-3, "min_learning_rate": 3e-5, "dropout": 0.1},
    "tinystories": SHAKESPEARE  # 23 million parameters with 8192 tokens, trained on the stories
    | {"n_layer": 6, "n_head": 8, "n_embd": 512, "n_ctx": 512, "batch_size": 64, "n_steps": 20000}
    | {"learning_rate": 2e-3, "min_learning_rate": 2e-5, "n_warmup": 500, "data": None},
    "finetune": SHAKESPEARE  # the model's own sizes
    | {"n_ctx": 256, "batch_size": 4, "n_accumulate": 4, "n_steps": 200, "data": None}
    | {"optimizer": "adamw", "learning_rate": 3e-5, "min_learning_rate": 3e-6, "n_warmup": 10}
    | {"weight_decay": 0.0, "eval_every": 50, "checkpoint_every": 50},
}
LORA = {  # what --lora_rank changes; a small update learns at ten times the rate
    "learning_rate": 3e-4,
    "min_learning_rate": 3e-5,
    "lora_alpha": 16.0,
    "lora_targets": "c_attn,c_proj,c_fc",
}
# Layers, heads, width and learning rate. GPT-2's sizes (Radford et al. 2019) have the rates of
# similar sizes of GPT-3. GPT-3's are from Brown et al. 2020, arXiv:2005.14165, table 2.1, except
# for the heads of 1.3B, because the table's 24 don't divide its width.
LARGER = {
    "gpt2-124M": (12, 12, 768, 6e-4),
    "gpt2-355M": (24, 16, 1024, 3e-4),
    "gpt2-774M": (36, 20, 1280, 2.5e-4),
    "gpt2-1558M": (48, 25, 1600, 2e-4),
    "gpt3-125M": (12, 12, 768, 6e-4),
    "gpt3-350M": (24, 16, 1024, 3e-4),
    "gpt3-760M": (24, 16, 1536, 2.5e-4),
    "gpt3-1.3B": (24, 16, 2048, 2e-4),
    "gpt3-2.7B": (32, 32, 2560, 1.6e-4),
    "gpt3-6.7B": (32, 32, 4096, 1.2e-4),
    "gpt3-13B": (40, 40, 5120, 1e-4),
    "gpt3-175B": (96, 96, 12288, 6e-5),
}
RECIPES |= {
    name: GPT2
    | {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "fsdp": n_embd >= 1600}
    | {"learning_rate": rate, "min_learning_rate": rate / 10}
    | ({"n_ctx": 2048, "batch_size": 16} if name.startswith("gpt3") else {})
    for name, (n_layer, n_head, n_embd, rate) in LARGER.items()
}
