"""Downloads models of the Hugging Face Hub by name: owner/name, or owner/name@revision.

    fetch_repository("openai-community/gpt2")  # -> a folder in the Hub's own cache

huggingface_hub does the work. The cache (HF_HOME), resuming, tokens (HF_TOKEN), HF_ENDPOINT and
HF_HUB_OFFLINE are its own. A cached model is used without asking the Hub. Otherwise only the files
that we can open are downloaded, and never a pickle, which can run programs.
"""

import functools
import os
import re

from encoder import get_encoder
from model_files.config import read_hparams
from model_files.download import NO_NETWORK
from model_files.tokenizer import CHAT_TEMPLATE_FILE, TOKENIZER_FILES
from model_files.weights import WEIGHTS, WEIGHTS_INDEX, read_index
from plumbing.cli import notice

RELEASED = {  # the weights of OpenAI's checkpoints, as safetensors
    "124M": "openai-community/gpt2",
    "355M": "openai-community/gpt2-medium",
    "774M": "openai-community/gpt2-large",
    "1558M": "openai-community/gpt2-xl",
}
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(@.+)?")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
TEXTS = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "added_tokens.json")
TEXTS += ("special_tokens_map.json", "generation_config.json", CHAT_TEMPLATE_FILE, WEIGHTS_INDEX)
LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN"


def is_repository(name):
    """Returns whether this can be a repository's name, and not a path into a local folder."""
    return bool(REPOSITORY.fullmatch(name)) and not os.path.isdir(name.split("/")[0])


def fetch_released(size):  # -> a folder
    """Downloads a released GPT-2 as safetensors. Raises the same errors as fetch_repository."""
    name = RELEASED[size]
    words = (
        f"TensorFlow is not installed, so {size} is downloaded from the Hugging Face Hub, {name}, "
        "which has the same weights"
    )
    try:
        return fetch_repository(name, words=words)
    except ConnectionError as error:
        raise ConnectionError(f"{size}, without TensorFlow: {error}; {NO_NETWORK}") from None


def fetch_repository(name, only_tokenizer=False, words=None):  # -> a folder
    """Downloads a model's files, unless all of them are in the cache.

    words: a notice, printed before anything is downloaded. Raises ValueError if we cannot open the
    model, before anything large is downloaded, and ConnectionError if a download fails. Both
    messages are one line.
    """
    try:
        from huggingface_hub import constants, errors
        from huggingface_hub.utils import logging
    except ImportError:
        problem = f"no folder at {name}, and a model of the Hub needs huggingface_hub"
        raise ImportError(f"{problem}: pip install -r requirements.txt") from None
    logging.set_verbosity_error()  # its advice about tokens and speed would clutter stderr
    repo, _, revision = name.partition("@")
    revision = revision or constants.DEFAULT_REVISION
    try:
        folder = find_cached(repo, revision, only_tokenizer)
        if folder is None and words is not None:
            notice(words)
        return folder or fetch(repo, revision, only_tokenizer)
    except (errors.HTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # our own disk may be full
            raise
        raise ConnectionError(reason(error, name)) from None


def ask(function, *args, **kwargs):
    """Calls the library. It does not check the Hub's answers, which can cause any exception."""
    from huggingface_hub import errors

    guard_names()
    try:
        return function(*args, **kwargs)
    except (errors.HTTPError, errors.HFValidationError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise ConnectionError(f"its answer is malformed ({type(error).__name__})") from None


@functools.cache
def guard_names():
    """Makes every client that the library creates from now on check its answers by check_names."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import get_session

    client = get_session()
    hooks = client.event_hooks | {"response": [check_names]}
    options = {"event_hooks": hooks, "follow_redirects": client.follow_redirects}
    set_client_factory(lambda: type(client)(**options, timeout=client.timeout))


def check_names(answer):
    """The library names files in its cache after these headers, which could be ../../.bashrc."""
    for header in ("ETag", "X-Linked-ETag", "X-Repo-Commit"):
        if re.search(r"[/\\]", answer.headers.get(header, "").removeprefix("W/")):
            raise ConnectionError(f"its {header} header is a path")


def find_cached(repo, revision, only_tokenizer):  # -> a folder, or None if anything is missing
    from huggingface_hub import try_to_load_from_cache

    for config in ("config.json", ADAPTER[0]):
        path = try_to_load_from_cache(repo, config, revision=revision)
        if isinstance(path, str):
            folder = os.path.dirname(path)
            return folder if is_complete(folder, config, only_tokenizer) else None
    return None


def is_complete(folder, config, only_tokenizer):
    def has(*names):
        return all(os.path.isfile(os.path.join(folder, name)) for name in names)

    if config in ADAPTER:
        return has(*ADAPTER)
    tokenizer = any(has(*names) for names in TOKENIZER_FILES)
    if only_tokenizer or not tokenizer or has(WEIGHTS):
        return tokenizer
    index = os.path.join(folder, WEIGHTS_INDEX)
    return os.path.isfile(index) and has(*read_index(index))


def fetch(repo, revision, only_tokenizer):  # -> a folder
    """Downloads the small files first and, if we can open such a model, the large ones.

    All files belong to one commit. The library records the revision's commit last, so an
    interrupted download is not mistaken for a complete one.
    """
    from huggingface_hub import HfApi, hf_hub_download

    found = ask(HfApi().model_info, repo, revision=revision)
    if not re.fullmatch("[0-9a-f]+", str(found.sha)):  # it also becomes a file's name
        raise ConnectionError("it names no commit")
    names = {str(file.rfilename) for file in found.siblings or ()}
    config = next((name for name in ("config.json", ADAPTER[0]) if name in names), None)
    if config is None:
        raise ValueError(f"{repo} is not a model for transformers, because it has no config.json")
    for name in (*sorted(names.intersection(TEXTS)), config):
        path = ask(hf_hub_download, repo, name, revision=found.sha)
    folder = os.path.dirname(path)
    try:
        if config == "config.json":
            read_hparams(folder)
            get_encoder("", folder)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(str(error).replace(folder, repo)) from None
    if not only_tokenizer:
        for name in list_weights(repo, names, config, folder):
            ask(hf_hub_download, repo, name, revision=found.sha)
    ask(hf_hub_download, repo, config, revision=revision)
    if find_cached(repo, revision, only_tokenizer) != folder:
        raise ConnectionError("it changed during the download; try again")
    return folder


def list_weights(repo, names, config, folder):  # -> the files that hold the tensors
    """Raises ValueError if the repository has no weights that we can open."""
    files = [WEIGHTS]
    if config in ADAPTER:
        files = [ADAPTER[1]]
    elif WEIGHTS not in names and WEIGHTS_INDEX in names:
        files = read_index(os.path.join(folder, WEIGHTS_INDEX))
    missing = [name for name in files if name not in names]
    if missing:
        pickles = any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names)
        hint = ", and its pickles are not opened because they could run programs" if pickles else ""
        raise ValueError(f"{repo} has no {missing[0]}{hint}")
    return files


def reason(error, name):  # -> one line instead of the library's paragraph
    from huggingface_hub import constants, errors

    repo, _, revision = name.partition("@")
    hub = constants.ENDPOINT
    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"no folder at {name}, nor in the Hub's cache; unset HF_HUB_OFFLINE to download it"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated; ask for access at {hub}/{repo}. {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision or constants.DEFAULT_REVISION!r}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no folder at {name}, and no public model at {hub}. If it is private: {LOG_IN}"
    if isinstance(error, errors.HfHubHTTPError):
        error = f"it answered {error.response.status_code}"
    message = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"no folder at {name}, and downloading it from {hub} failed: {message}"
