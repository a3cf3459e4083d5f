"""The files that lie beside the weights of a model: tokenizer, chat templates, preprocessor, generation settings.

Files that were read with a model are saved with it byte for byte, because releases of transformers cannot read what later ones
write. For a tokenizer that was not read from files, `tokenizer_files` writes files that all releases read.
"""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixel_jax.files import FileError, parse_json, read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
VOCABULARIES = (TOKENIZER, "vocab.json", "tokenizer.model")  # one of them holds the tokens
PREPROCESSOR, VIDEO_PREPROCESSOR = "preprocessor_config.json", "video_preprocessor_config.json"
NESTED = "processor_config.json"  # where transformers 5 keeps the same fields, under "image_processor"
GENERATION = "generation_config.json"
OLD_TEMPLATE = "chat_template.json"  # of processors, before transformers 5
TEMPLATES = "additional_chat_templates"  # a folder of them
TOKENIZER_FILES = (
    *(TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *(OLD_TEMPLATE, "chat_template.jinja"),
)
PREPROCESSOR_FILES = (PREPROCESSOR, NESTED, VIDEO_PREPROCESSOR)
MAX_BYTES = 2**28  # of one file
MAX_TEMPLATES = 100


def is_side_file(name: str) -> bool:
    """Whether a path, relative to a model directory, is a file of its tokenizer, preprocessor or generation settings."""
    return name in (*TOKENIZER_FILES, *PREPROCESSOR_FILES, GENERATION) or is_template(name)


def is_template(name: str) -> bool:
    """Whether a path, relative to a model directory, is an additional chat template."""
    return bool(re.fullmatch(rf"{TEMPLATES}/[^/]+\.jinja", name))


def read_side_files(directory: Path) -> dict[str, bytes]:
    """Reads the side files of a directory, by their path in it.

    Raises:
        FileError: a file is not regular, too large, or a link out of the directory, whose target would be copied into every model
            that is saved. Links of the Hugging Face cache into its own store are followed.
    """
    names = [name for name in (*TOKENIZER_FILES, *PREPROCESSOR_FILES, GENERATION) if os.path.lexists(directory / name)]
    if (directory / TEMPLATES).is_dir():
        templates = sorted(f"{TEMPLATES}/{path.name}" for path in (directory / TEMPLATES).iterdir())
        names += filter(is_template, templates)
        if len(templates) > MAX_TEMPLATES:
            raise FileError(f"{directory / TEMPLATES} holds {len(templates)} files, more than {MAX_TEMPLATES}")
    root = directory.resolve()
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    files = {}
    for name in names:
        target = (directory / name).resolve()
        if not any(target.is_relative_to(folder) for folder in roots):
            raise FileError(
                f"{directory / name} is a link to {target}, outside the model directory: put the file itself in its place"
            )
        files[name] = read_bytes(directory / name, limit=MAX_BYTES)
    for name in (TOKENIZER_CONFIG, OLD_TEMPLATE, *PREPROCESSOR_FILES):
        if name in files:
            _check_templates(json_object(files, name, directory).get("chat_template"), directory / name)
    return files


def json_object(files: dict[str, bytes], name: str, directory: Path) -> dict[str, Any]:
    """Returns the fields of a JSON file; FileError if it is no object."""
    # In files of transformers int(1e30) stands for "no limit" of a text's length.
    values = parse_json(files[name], str(directory / name), largest=int(1e30))
    if not isinstance(values, dict):
        raise FileError(f"{directory / name} holds a {type(values).__name__}, not an object of fields")
    return values


def _check_templates(templates: Any, path: Path) -> None:
    """Checks chat templates: named ones are saved as files with these names, which therefore must not be paths."""
    if templates is None or isinstance(templates, str):
        return
    if isinstance(templates, list) and all(isinstance(x, dict) for x in templates):
        templates = {str(x.get("name")): x.get("template") for x in templates}
    if not isinstance(templates, dict) or not all(isinstance(x, str) for x in templates.values()):
        raise FileError(f"{path}: chat_template is neither a text nor texts with names")
    for name in templates:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise FileError(f"{path}: a chat template is called {name[:80]!r}, which is no plain name")


def processor_template(files: dict[str, bytes], directory: Path) -> Any:
    """The processor's chat template, if it is in `chat_template.json`, which has precedence in transformers."""
    if OLD_TEMPLATE not in files:
        return None
    templates = json_object(files, OLD_TEMPLATE, directory).get("chat_template")
    return {x["name"]: x["template"] for x in templates} if isinstance(templates, list) else templates


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a directory whose files `read_side_files` has read; FileError if it cannot be made of them."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any((directory / name).is_file() for name in VOCABULARIES):
        raise FileError(f"{directory} has {TOKENIZER_CONFIG} and no {TOKENIZER}: copy or download it, too")
    try:
        # For some families AutoTokenizer splits texts as their first release did, whatever tokenizer.json says.
        kind = PreTrainedTokenizerFast if _is_plain(directory) else AutoTokenizer
        tokenizer = kind.from_pretrained(directory, local_files_only=True)
        # Some fields are only checked when the tokenizer is used.
        _ = (tokenizer.encode("a", add_special_tokens=False), tokenizer.pad_token_id)
        return tokenizer
    except Exception as error:  # of any type that the libraries raise for a malformed file
        reason = str(error).strip().partition("\n")[0][:300]
        raise FileError(
            f"{directory}: the tokenizer's files cannot be read: {type(error).__name__}: {reason}"
        ) from error


PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")  # the same class, in transformers 4 and 5


def _is_plain(directory: Path) -> bool:
    """Whether a directory's tokenizer is what its tokenizer.json says, and of no class of its own."""
    if not all((directory / name).is_file() for name in (TOKENIZER, TOKENIZER_CONFIG)):
        return False
    files = {TOKENIZER_CONFIG: read_bytes(directory / TOKENIZER_CONFIG, limit=MAX_BYTES)}
    return json_object(files, TOKENIZER_CONFIG, directory).get("tokenizer_class") in PLAIN


def tokenizer_files(tokenizer: "PreTrainedTokenizerFast") -> dict[str, bytes]:
    """Writes a tokenizer as the two files that transformers 4.49 to 5 read alike."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(f"{type(tokenizer).__name__} is not a fast tokenizer: it has no tokenizer.json behind it")
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # newer names are unknown to older releases
        "processor_class": "Qwen2_5_VLProcessor",
        **named,
        "additional_special_tokens": [token for token in special if token not in named.values()],
        "clean_up_tokenization_spaces": False,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "chat_template": tokenizer.chat_template,
    }
    values = {name: value for name, value in values.items() if value is not None}
    return {TOKENIZER: backend.to_str(pretty=True).encode(), TOKENIZER_CONFIG: as_json(values)}


def as_json(values: dict[str, Any]) -> bytes:
    """Formats fields as a JSON file of transformers."""
    return json.dumps(values, indent=2, ensure_ascii=False).encode()
