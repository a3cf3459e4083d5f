"""Dialogs as text: chat templates, schemas of tools, the grammar of tool calls and its parsers, observations, tokenizers."""

from pixel_jax.dialog.call_parser import CallParser, ParserState, call_parser, token_table
from pixel_jax.dialog.grammar import (
    DecimalNumber,
    Language,
    MalformedCallError,
    ParsedTurn,
    ToolCall,
    parse_call,
    parse_turn,
)
from pixel_jax.dialog.observations import ObservationKind, Observations, ObservationValues
from pixel_jax.dialog.template import (
    CHAT_TEMPLATE,
    GUIDELINES,
    Media,
    Special,
    first_messages,
    flatten,
    render,
    system_prompt,
    to_ids,
    user_text,
)
from pixel_jax.dialog.tokenizer import TokenBytes, Vocabulary, build_tokenizer

__all__ = [
    "CHAT_TEMPLATE",
    "GUIDELINES",
    "ObservationValues",
    "ToolCall",
    "ObservationKind",
    "Language",
    "MalformedCallError",
    "Media",
    "DecimalNumber",
    "Observations",
    "CallParser",
    "Special",
    "ParserState",
    "TokenBytes",
    "ParsedTurn",
    "Vocabulary",
    "build_tokenizer",
    "first_messages",
    "flatten",
    "parse_call",
    "parse_turn",
    "call_parser",
    "render",
    "system_prompt",
    "to_ids",
    "token_table",
    "user_text",
]
