"""What lies beside the weights goes out as it came in, and nothing from outside the directory with it."""

import json
import os

import pytest

import pixel_jax
from pixel_jax.files import FileError
from pixel_jax.models import side_files
from pixel_jax.models.processor import Processor
from tests.rollouts import scripted_model

# What a directory of transformers 4.57 may hold; contents that only other programs read are free.
CAME = {
    "generation_config.json": '{"do_sample": true,  "eos_token_id": [3, 5]}\n',
    "special_tokens_map.json": '{"eos_token": {"content": "<|im_end|>", "lstrip": false}}',
    "video_preprocessor_config.json": '{"size": {"longest_edge": 12544},  "note": {"by": "caf\u00e9"}}',
    "chat_template.json": '{"chat_template": "{{ messages }}"}',
    "additional_chat_templates/tool_use.jinja": "{% for m in messages %}{{ m }}{% endfor %}\r\n",
}


@pytest.fixture(scope="module")
def processor():
    return Processor(scripted_model.vocabulary().tokenizer, min_pixels=784, max_pixels=4 * 784)


@pytest.fixture(scope="module")
def source(tmp_path_factory, processor):
    """A directory that came from somewhere: its own spelling of every file."""
    directory = tmp_path_factory.mktemp("source")
    pixel_jax.save_pretrained(scripted_model.model(), processor, directory)
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        (directory / name).write_text(json.dumps(json.loads((directory / name).read_text()), indent=7) + "\n\n")
    (directory / "additional_chat_templates").mkdir()
    for name, content in CAME.items():
        (directory / name).write_bytes(content.encode())
    return directory


@pytest.fixture
def copy(source, tmp_path):
    """The same without weights: processors need none."""
    for path in source.rglob("*.*"):
        if path.suffix != ".safetensors":
            place = tmp_path / "copy" / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    return tmp_path / "copy"


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.suffix != ".safetensors" and path.name != "config.json"
    }


def read(directory):
    return Processor.from_directory(directory, scripted_model.model().config)


def test_byte_for_byte(source, tmp_path, processor):
    """And nothing is left of what lay there before."""
    model, found = pixel_jax.from_pretrained(source)
    stale = tmp_path / "additional_chat_templates"
    stale.mkdir()
    for path in (stale / "old.jinja", tmp_path / "vocab.json", tmp_path / "processor_config.json"):
        path.write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    pixel_jax.save_pretrained(model, found, tmp_path)
    assert contents(tmp_path) == contents(source) | {"notes.txt": b"mine"} and CAME.keys() < contents(source).keys()
    pixel_jax.save_pretrained(model, None, tmp_path)  # about which nothing is said stays
    assert contents(tmp_path) == contents(source) | {"notes.txt": b"mine"}
    pixel_jax.save_pretrained(model, processor, tmp_path)
    made = {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"}
    assert contents(tmp_path).keys() == made | {"notes.txt"}


def test_what_was_changed_since_is_written_anew(copy, tmp_path):
    found = read(copy)
    found.max_pixels = 9 * 784
    found.save(tmp_path)
    came, went = (
        contents(copy),
        {name: data for name, data in contents(tmp_path).items() if not name.startswith("copy")},
    )
    changed = {"preprocessor_config.json", "video_preprocessor_config.json"}
    assert {name: came[name] for name in came.keys() - changed} == {n: d for n, d in went.items() if n not in changed}
    assert read(tmp_path).max_pixels == 9 * 784 and read(tmp_path).video == read(copy).video == (784, 12544)
    found.tokenizer.add_tokens(["zoom"])
    found.save(tmp_path)
    assert read(tmp_path).tokenizer.encode("zoom") == [len(found.tokenizer) - 1]


def test_a_tokenizer_without_its_tokens(copy):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(FileError, match="has tokenizer_config.json and no tokenizer.json: copy or download it, too"):
        read(copy)


OUTSIDE = "outside the model directory: put the file itself in its place"


@pytest.mark.parametrize(
    "name", ["additional_chat_templates/mine.jinja", "chat_template.jinja", "merges.txt", "tokenizer.json"]
)
def test_a_link_out_of_the_directory(copy, tmp_path, name):
    """It would be copied into every model that is saved."""
    (tmp_path / "secret").write_text("secret")
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(tmp_path / "secret")
    with pytest.raises(FileError, match=f"{name} is a link to .*secret, {OUTSIDE}"):
        read(copy)
    (tmp_path / "secret").unlink()
    with pytest.raises(FileError, match=OUTSIDE):
        read(copy)


def test_a_folder_that_is_a_link(copy, tmp_path):
    (copy / "additional_chat_templates").rename(tmp_path / "elsewhere")
    (copy / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match=OUTSIDE):
        read(copy)


def test_links_of_the_hub_s_cache(copy, tmp_path):
    """A snapshot there is a folder of links into `blobs` beside it, and nowhere else."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (snapshot / "additional_chat_templates").mkdir()
    for i, (name, content) in enumerate(contents(copy).items()):
        (blobs / str(i)).write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(i), (snapshot / name).parent))
    read(snapshot).save(tmp_path)
    assert {name: content for name, content in contents(tmp_path).items() if name in contents(copy)} == contents(copy)
    assert not any(path.is_symlink() for path in tmp_path.iterdir())
    (tmp_path / "models--a--b" / "secret").write_text("secret")
    (snapshot / "chat_template.jinja").symlink_to("../../secret")
    with pytest.raises(FileError, match=OUTSIDE):
        read(snapshot)


def test_a_folder_or_a_pipe_instead_of_a_file(copy):
    os.mkfifo(copy / "merges.txt")
    with pytest.raises(FileError, match="merges.txt' is not a regular file"):
        read(copy)
    (copy / "merges.txt").unlink()
    (copy / "merges.txt").mkdir()
    with pytest.raises(FileError, match="merges.txt' is not a regular file"):
        read(copy)


@pytest.mark.parametrize("name", ["/tmp/PWN", "../../PWN", "a/b", "..", "", ".hidden", "a\0b"])
def test_a_template_whose_name_is_a_path(copy, name):
    """Releases of transformers before 5.10 write to it when they save the tokenizer."""
    values = json.loads((copy / "tokenizer_config.json").read_text())
    for templates in ([{"name": "default", "template": "x"}, {"name": name, "template": "x"}], {name: "x"}):
        (copy / "tokenizer_config.json").write_text(json.dumps(values | {"chat_template": templates}))
        with pytest.raises(
            FileError, match="tokenizer_config.json: a chat template is called .*, which is no plain name"
        ):
            read(copy)


def test_templates_with_names(copy, tmp_path):
    templates = [{"name": "default", "template": "x"}, {"name": "tool_use.v2", "template": "y"}]
    values = json.loads((copy / "tokenizer_config.json").read_text()) | {"chat_template": templates}
    (copy / "tokenizer_config.json").write_text(json.dumps(values))
    read(copy).save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == templates


@pytest.mark.parametrize("name, content, message", [
    ("preprocessor_config.json", "[]", "preprocessor_config.json holds a list, not an object"),
    ("preprocessor_config.json", '"x"', "holds a str"),
    ("preprocessor_config.json", '{"size": [1, 2]}', r"size is \[1, 2\], not an object"),
    ("preprocessor_config.json", '{"min_pixels": "784"}', "min_pixels is '784', not a positive number"),
    ("preprocessor_config.json", '{"size": {"longest_edge": -1}}', "max_pixels is -1, not a positive number"),
    ("preprocessor_config.json", '{"min_pixels": 900, "max_pixels": 800}', "got 900 and 800"),
    ("preprocessor_config.json", '{"patch_size": {}}', "the preprocessor has patch_size {}, the model 14"),
    ("preprocessor_config.json", "[" * 5000 + "]" * 5000, "nested deeper than 100"),
    ("tokenizer_config.json", '{"a": 1, "a": 2}', "tokenizer_config.json is not JSON: the key 'a' occurs twice"),
    ("tokenizer_config.json", '{"chat_template": [1]}', "chat_template is neither a text nor texts with names"),
    ("tokenizer.json", "[" * 5000, "the tokenizer's files cannot be read"),
    ("tokenizer.json", "{}", "the tokenizer's files cannot be read"),
])  # fmt: skip
def test_malformed(copy, name, content, message):
    (copy / name).write_text(content)
    with pytest.raises(FileError, match=message):
        read(copy)


def test_the_chat_template_is_the_one_that_transformers_takes(copy):
    """Of a processor's own file, a file of the tokenizer and a field, whichever are there."""
    from transformers import ProcessorMixin

    (copy / "additional_chat_templates" / "tool_use.jinja").unlink()
    (copy / "additional_chat_templates").rmdir()
    (copy / "chat_template.jinja").write_text("of the tokenizer")
    for name in ("chat_template.json", "chat_template.jinja"):
        theirs = ProcessorMixin.get_processor_dict(copy)[0]["chat_template"]
        assert read(copy).tokenizer.chat_template == theirs
        (copy / name).unlink()
    values = json.loads((copy / "tokenizer_config.json").read_text()) | {"chat_template": "of a field"}
    (copy / "tokenizer_config.json").write_text(json.dumps(values))
    assert read(copy).tokenizer.chat_template == "of a field"


@pytest.mark.parametrize("family", ["qwen2", "qwen3_5", "llava", "llama"])
def test_a_tokenizer_of_no_class_is_read_as_its_file_says(family, tmp_path):
    """transformers' AutoTokenizer makes another one of it, because of the family."""
    made = scripted_model.vocabulary().tokenizer
    for name, content in side_files.tokenizer_files(made).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    found = side_files.load_tokenizer(tmp_path)
    assert json.loads(found.backend_tokenizer.to_str()) == json.loads(made.backend_tokenizer.to_str())
    assert found.chat_template == made.chat_template and found.eos_token == made.eos_token
