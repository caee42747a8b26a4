"""Chats as texts, by the templates that come with tokenizers."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from jaxtok.tokenizers.hub_files import named_token, read_json

Message = Mapping[str, Any]
"""What one side says: `role` (system, user or assistant) and `content`."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template in Jinja, with the functions and settings that `transformers` defines for it."""

    source: str
    names: Mapping[str, str]
    """The names of special tokens by role, such as bos_token, for use in the template."""

    def text(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Returns a chat as text, with the beginning of the answer if `add_generation_prompt`.

        Raises:
          ValueError: the template is damaged, or refuses the messages.
        """
        if wrong := next((message for message in messages if not {"role", "content"} <= set(message)), None):
            raise ValueError(f"a message is {wrong!r}; it must have role and content.")
        try:
            return (
                _environment()
                .from_string(self.source)
                .render(messages=list(messages), add_generation_prompt=add_generation_prompt, **self.names)
            )
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is damaged ({error}); fetch it again.") from error
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error


def read_template(folder: Path) -> ChatTemplate:
    """Returns the template in a tokenizer's folder: that of chat_template.jinja, or else of tokenizer_config.json.

    Raises:
      ValueError: there is none, or there are several and none is the default.
    """
    settings, special = (read_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    source: Any = settings.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if (file := folder / "chat_template.jinja").is_file():
        source = file.read_text(encoding="utf-8")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}
    if isinstance(source, Mapping):
        if "default" not in source:
            raise ValueError(f"{folder} has the chat templates {', '.join(source)}; one must be named default.")
        source = source["default"]
    if not source:
        raise ValueError(
            f"{folder} has no chat template; put one there as chat_template.jinja, or give a prompt without chat."
        )
    names = {}
    for role, name in (special | settings).items():
        if role.endswith("_token") and (name := named_token(name)) is not None:
            names[role] = name
    return ChatTemplate(source, names)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what the model says, for training: here its content is taken as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """The sandbox in which templates run: they are code of others."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def as_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = as_json  # the library's own escapes HTML
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
