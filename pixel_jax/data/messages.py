r"""Reads conversations: messages with a role and parts, as OpenAI's API and the released traces write them.

    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
                                 {"type": "text", "text": "What does the sign say?"}]}
    {"role": "assistant", "content": "I look.\n<tool_call>\n{...}\n</tool_call>"}
    {"role": "user", "content": [{"type": "image", "image": "crop.png"}]}
    {"role": "assistant", "content": "\\boxed{Exit 12}"}

The first message has the question. Results of calls are not read: they are computed again from the pictures.
"""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pixel_jax.data.example import ExampleError
from pixel_jax.data.sources import Embedded
from pixel_jax.dialog import grammar
from pixel_jax.dialog.formats import Body
from pixel_jax.dialog.grammar import RELEASED_LANGUAGE, Language
from pixel_jax.dialog.unrecognised import fitting_formats
from pixel_jax.dialog.writing import Json, UnwritableError, write_members
from pixel_jax.files import parse_json
from pixel_jax.terminal import brief

KINDS = {"text": "text", "image": "image", "image_url": "image", "video": "video", "video_url": "video"}
PLACEHOLDERS = {"<image>": "image", "<video>": "video"}  # marks in texts for pictures in a field of their own
FETCHED = ("http:", "https:", "ftp:", "s3:", "gs:", "hf:")
DATA = "data:"


class Message(NamedTuple):
    """A message: its text, and its images or the frames of its video."""

    role: str
    text: str
    images: list[Any]  # names or `Embedded`, or the frames of a video
    video: bool
    text_before: bool = False  # some of the text comes before an image
    text_after: bool = False
    learned: bool | None = None  # None: the message does not say


class Dialogue(NamedTuple):
    """A question with its pictures, and the turns of the assistant."""

    system: str | None
    first: Message
    said: list[Message]


def fields(value: Any, names: Sequence[str], where: str) -> Mapping[str, Any]:
    """Checks that `value` is an object with fields of these names, and returns it. ExampleError: it is not."""
    if not isinstance(value, Mapping):
        raise ExampleError(f"{where} is {type(value).__name__}, not an object")
    if missing := [name for name in names if name not in value]:
        raise ExampleError(f"{where} has no {missing[0]!r}, only {brief(list(value))}")
    return value


def read_dialogue(
    messages: Any,
    where: str,
    pictures: Sequence[Any] | None = None,
    *,
    video: bool = False,
    language: Language = RELEASED_LANGUAGE,
    needs_pictures: bool = True,
) -> Dialogue:
    """Reads the conversation of a row.

    Args:
        messages: the list of messages.
        where: what errors call the row.
        pictures: those of a field beside the messages, for which parts without a value, or `<image>` in a text, stand.
        video: whether the pictures are the frames of one video, or its file.
        language: the language of the calls.
        needs_pictures: whether the first message must show something.

    Raises:
        ExampleError: the conversation is not valid. The error names `where` and the number of the message.
    """
    if not isinstance(messages, list):
        raise ExampleError(f"{where} must be a list, not {type(messages).__name__}")
    waiting = None if pictures is None else list(pictures)
    parsed = [
        read_message(message, f"{where}, message {i}", waiting, video, language)
        for i, message in enumerate(messages, 1)
    ]
    system = parsed.pop(0).text if parsed and parsed[0].role == "system" else None
    if waiting and parsed and not any(message.images for message in parsed):  # no part stands for them: they come first
        kind = {"images": waiting, "video": video, "text_after": bool(parsed[0].text)}
        parsed[0], waiting = parsed[0]._replace(**kind), None
    if waiting:
        raise ExampleError(f"{where}: {len(waiting)} pictures are more than the messages have places for")
    roles = ["user" if i and message.role == "tool" else message.role for i, message in enumerate(parsed)]
    if not roles or roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        raise ExampleError(f"{where}: user and assistant must take turns, the user first, not {brief(roles)}")
    first, answers, returned = parsed[0], parsed[1::2], parsed[2::2]
    if not first.text.strip() or (needs_pictures and not first.images):
        more = " and an image or a video" if needs_pictures else ""
        raise ExampleError(f"{where}: the first message needs a question{more}")
    if len(returned) == len(answers) > 0:
        raise ExampleError(f"{where}: user and assistant must take turns and the assistant end, not {brief(roles)}")
    for i, message in enumerate(answers, 1):
        if message.images or not message.text:
            raise ExampleError(f"{where}: turn {i} of the assistant must be a text and nothing else")
        text = tidy(message.text, language)
        parsed_turn = grammar.parse_turn(text, language)
        if parsed_turn.required != (i < len(answers)):
            what = "ends with a call" if parsed_turn.required else "is followed by another and has no call"
            raise ExampleError(f"{where}: turn {i} of the assistant {what}{other_format(text, language)}")
        if parsed_turn.required and parsed_turn.call is None:
            other = other_format(text, language)
            if returned[i - 1].images or other:
                back = ", but images came back" if returned[i - 1].images else ""
                raise ExampleError(f"{where}: the call of turn {i} cannot be read{back}{other}: {text[-200:]!r}")
    return Dialogue(system, first, [message._replace(text=tidy(message.text, language)) for message in answers])


def other_format(text: str, language: Language) -> str:
    """Returns the end of an error message about a turn whose call is in another format; otherwise an empty text."""
    fits = [name for name in fitting_formats([text]) if name != language.format.name]
    if not fits or grammar.parse_turn(text, language).call is not None:
        return ""
    return f" in the format {language.format.name!r}, which the config names; it is one in {fits[0]!r} (rollout.call_format)"


def tidy(text: str, language: Language) -> str:
    """Returns a turn as the policy would write it: without an end marker and without anything after a call."""
    bare = text.replace(grammar.END.decode(), "")
    return bare.rstrip() if bare.rstrip().endswith(language.format.closing) else bare


def read_message(
    message: Any,
    where: str,
    waiting: list[Any] | None = None,
    video: bool = False,
    language: Language = RELEASED_LANGUAGE,
) -> Message:
    """Reads one message. Parts that stand for a picture take it from `waiting`, those of a `video` all frames at once."""
    message = fields(message, ("role",), where)
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    if isinstance(content, str):
        content = [{"text": content}]
    if content is None and calls:
        content = []
    if not isinstance(role, str) or not isinstance(content, list):
        raise ExampleError(f"{where}: a message has a role and a list of parts, not {brief(role)} and {brief(content)}")
    weight = message.get("weight")
    if not (weight is None or (type(weight) is int and weight in (0, 1))):
        raise ExampleError(f"{where}: 'weight' is 1 or 0, learned or only read, not {brief(weight)}")
    texts, images, videos, text_before, text_after = [], [], [], False, False
    for part in content:
        for kind, value in read_part(part, where, waiting is not None):
            if kind == "text":
                texts.append(value)
                text_after = text_after or bool(value.strip() and (images or videos))
                continue
            text_before = text_before or any(text.strip() for text in texts)
            if value is None:
                if not waiting:
                    raise ExampleError(f"{where}: a place for {kind}s has none left to stand for")
                value = [waiting.pop(0) for _ in list(waiting)] if video else waiting.pop(0)
                kind = "video" if video else kind
            if kind == "image":
                images.append(value)
            else:
                videos.append(value if isinstance(value, list) else [value])
    if len(videos) > 1 or (videos and images):
        raise ExampleError(f"{where} shows {len(videos)} videos and {len(images)} images: one video or images")
    text = "".join(texts) + written_calls(calls, where, language)
    shown = (videos[0], True) if videos else (images, False)
    return Message(role, text, *shown, text_before, text_after, None if weight is None else bool(weight))


def read_part(part: Any, where: str, places: bool) -> list[tuple[str, Any]]:
    """Reads a part of a message as pairs (kind, value). With `places`, marks in a text stand for pictures (value: None)."""
    if not isinstance(part, Mapping):
        raise ExampleError(f"{where}: a part of a message is an object, not {brief(part)}")
    members = {name: value for name, value in part.items() if value is not None and name != "type"}
    if not members and places and part.get("type") in ("image", "video"):
        return [(part["type"], None)]
    if len(members) != 1 or not members.keys() <= KINDS.keys():
        raise ExampleError(
            f"{where}: a part of a message is one of text, image and video, not {brief(sorted(members))}"
        )
    ((name, value),) = members.items()
    kind = KINDS[name]
    if name.endswith("_url") and isinstance(value, Mapping):
        value = fields(value, ("url",), f"{where}: {name}")["url"]
    if kind != "text":
        return [(kind, [picture(x, where) for x in value] if isinstance(value, list) else picture(value, where))]
    if not isinstance(value, str):
        raise ExampleError(f"{where}: a text is no text: {brief(value)}")
    pieces = [("text", value)]
    for mark, kind in PLACEHOLDERS.items() if places else ():
        pieces = [x for one in pieces for x in (split(one[1], mark, kind) if one[0] == "text" else [one])]
    return pieces


def split(text: str, mark: str, kind: str) -> list[tuple[str, Any]]:
    """Splits a text at marks that stand for pictures of a kind."""
    first, *rest = text.split(mark)
    return [("text", first), *(x for one in rest for x in ((kind, None), ("text", one)))]


def picture(value: Any, where: str) -> Any:
    """Returns the name of a file, or the content of a data URL. ExampleError: it is a URL that would have to be fetched."""
    if not isinstance(value, str):
        return value  # `locate` refuses it
    if value.startswith(DATA):
        return from_data_url(value, where)
    if value.lower().startswith(FETCHED):
        raise ExampleError(
            f"{where}: {brief(value)} is not fetched: give the file beside the data, or its content as data:"
        )
    return value.removeprefix("file://")


def from_data_url(url: str, where: str) -> Embedded:
    """Decodes `data:image/png;base64,...`. The kind of the content is known by its first bytes, not by the URL."""
    head, comma, content = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ExampleError(f"{where}: a data URL is data:TYPE;base64,CONTENT, not {brief(url, 60)}")
    try:
        data = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as reason:  # the latter: what is not ASCII
        raise ExampleError(f"{where}: the content of {brief(head, 60)} is no base64: {reason}") from None
    return Embedded(data, f"{where}, {brief(head, 60)}")


def written_calls(calls: Any, where: str, language: Language = RELEASED_LANGUAGE) -> str:
    """Writes the `tool_calls` of an assistant's message as the text that the model writes: one call a turn."""
    if not calls:
        return ""
    if not isinstance(calls, list) or len(calls) != 1:
        raise ExampleError(f"{where}: 'tool_calls' must hold one call: a turn ends with one, not {brief(calls)}")
    call = fields(
        fields(calls[0], ("function",), f"{where}: a call")["function"], ("name", "arguments"), f"{where}: a call"
    )
    arguments, written = call["arguments"], language.format
    if written.body == Body.TAGS:
        return f"\n{_between_tags(call['name'], arguments, where, language)}"
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not language.named:  # of the one tool that such a format can write
        (tool,) = language.tools
        if call["name"] != tool.name:
            raise ExampleError(
                f"{where}: calls of the format {written.name!r} have no name and are all of {tool.name!r}, not of "
                f"{brief(call['name'])}"
            )
        return f"\n{written.opening}{arguments}{written.closing}"
    name = json.dumps(call["name"], ensure_ascii=False)
    return f'\n{written.opening}\n{{"name": {name}, "arguments": {arguments}}}\n{written.closing}'


def _between_tags(name: Any, arguments: Any, where: str, language: Language) -> str:
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{where}: the text of a call's arguments", ExampleError)
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise ExampleError(
            f"{where}: a call has a name and an object of arguments, not {brief(name)}, {brief(arguments)}"
        )
    members = {
        key: value if isinstance(value, str) else Json(json.dumps(value, ensure_ascii=False))
        for key, value in arguments.items()
    }
    try:
        return write_members(language.format, name, members)
    except UnwritableError as reason:
        raise ExampleError(f"{where}: {reason}") from None
