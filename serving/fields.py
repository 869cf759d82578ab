"""The fields of a request: which are supported, which are rejected, and which are ignored.

The field names are those of OpenAI, vLLM and llama.cpp. A field that has a meaning in any of them
is either supported, or rejected unless its value has no effect. Unknown fields are ignored.
"""

DONE = {  # {supported field: its values}, for the guide
    "model": "the name or the --model_size that the server was started with",
    "prompt": "a string, strings, token ids, or lists of token ids; missing means empty",
    "messages": "of system or developer, user and assistant; each is text, or a list of text parts",
    "max_tokens": "at most as many as fit; in chats also max_completion_tokens",
    "n": "1 to 128",
    "temperature": "0 or more; 1 by default",
    "top_p": "0 (greedy) to 1",
    "top_k": "-1 or 0 for all",
    "min_p": "0 to 1",
    "presence_penalty": "-2 to 2, over the generated tokens, as OpenAI defines it",
    "frequency_penalty": "-2 to 2, over the generated tokens, as OpenAI defines it",
    "repetition_penalty": "0.01 to 100, over the whole text, as in vLLM",
    "seed": "the same seed samples the same text",
    "stop": "a string, or a list of at most 1024, of 10000 characters together",
    "stop_token_ids": "ids that end a text",
    "min_tokens": "no stop and no end token ends a text before it has this many",
    "ignore_eos": "continue after the end token",
    "logit_bias": "an object, {id: -100 to 100}",
    "logprobs": "0 to 20; in chats a boolean, beside top_logprobs",
    "echo": "completions only",
    "stream": "server-sent events",
    "stream_options": "include_usage",
    "input": "of /v1/responses: a string or a list of messages, as in chats",
    "instructions": "of /v1/responses: a system message before the others",
    "max_output_tokens": "of /v1/responses: like max_tokens in chats",
    "text": "of /v1/responses: its format must be text",
}
REFUSED = {  # {rejected field: the values that have no effect, besides null}
    # OpenAI's
    "suffix": ("",),
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "web_search_options": (),
    "background": (False,),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "previous_response_id": (),
    "reasoning": ({},),
    "truncation": ("auto",),
    # vLLM's
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "guided_choice": ([],),
    "guided_decoding_backend": (),
    "guided_grammar": ("",),
    "guided_json": (),
    "guided_regex": ("",),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "prompt_logprobs": (0,),
    "skip_special_tokens": (True,),
    "structural_tag": (),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    # llama.cpp's
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "grammar": ("",),
    "input_prefix": ("",),
    "input_suffix": ("",),
    "json_schema": ({},),
    "lora": ([],),
    "mirostat": (0,),
    "n_predict": (-1,),
    "n_probs": (0,),
    "repeat_penalty": (1,),
    "samplers": ([],),
    "tfs_z": (1,),
    "typical_p": (1,),
    "xtc_probability": (0,),
}
INSTEAD = {  # {rejected field: its replacement}
    "repeat_penalty": "repetition_penalty",
    "n_predict": "max_tokens",
    "n_probs": "logprobs",
    "prompt_logprobs": "echo with logprobs",
}


def find_refused(data):  # -> (the name of an unsupported field, the error's text) or None
    for name, neutral in REFUSED.items():
        value = data.get(name)
        if value is not None and value not in neutral:
            advice = f"use {INSTEAD[name]}" if name in INSTEAD else "leave it out"
            return name, f"{name} is not supported; {advice}"
    return None
