"""How a prompt becomes tokens, with what a run puts before it: a system message, worked examples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canopy_store import store
from canopy_store.errors import DataError, StoreError, UsageError
from canopy_store.ingest.training_data import read_records

Message = dict[str, str]


@dataclass(frozen=True)
class Context:
    """What stands before each prompt of a run; the prompts themselves, and their ids, stay the same.

    Parameters
    ----------
    system : a system message, or in plain rendering a text
    examples : worked examples, in order: {"prompt", "completion"} or {"messages"}
    """

    system: str | None = None
    examples: tuple[Mapping[str, Any], ...] = ()

    def settings(self) -> dict[str, Any]:
        """What the run's settings say of it: system, examples, examples_sha256, where there are any."""
        said: dict[str, Any] = {} if self.system is None else {"system": self.system}
        if self.examples:
            listed = [dict(example) for example in self.examples]
            said |= {"examples": listed, "examples_sha256": store.content_id(listed)}
        return said

    def messages(self) -> list[Message]:
        """The conversation before a prompt."""
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        for example in self.examples:
            before += example.get("messages") or [
                {"role": "user", "content": example["prompt"]},
                {"role": "assistant", "content": example["completion"]},
            ]
        return before

    def text(self) -> str:
        """The text before a prompt: each part and an empty line; completions follow their prompts."""
        parts = [] if self.system is None else [self.system]
        parts += [example["prompt"] + example["completion"] for example in self.examples]
        return "".join(f"{part}\n\n" for part in parts)


NO_CONTEXT = Context()


def context_of(settings: Mapping[str, Any]) -> Context:
    """The context that a run's settings tell of."""
    return Context(settings.get("system"), tuple(settings.get("examples") or ()))


def read_system(option: str) -> str:
    """The system message that --system asks for: the text, or @FILE for a file that holds it.

    Raises
    ------
    StoreError, DataError
        A file that cannot be read, or is no text.
    """
    if not option.startswith("@"):
        return option
    path = Path(option[1:]).expanduser()
    try:
        return store.read_input(path).decode().rstrip("\n")
    except StoreError as error:
        raise StoreError(f"--system @{error}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None


def read_context(system: str | None, examples: str | Path | None) -> Context:
    """The context of a system message and a JSONL file of examples.

    Its lines are {"prompt": …, "completion": …} or {"messages": […]}.

    Raises
    ------
    StoreError
        A file that cannot be read.
    DataError
        A line that is no example; names file and line.
    UsageError
        A system message of no text.
    """
    if system is not None and not system.strip():
        raise UsageError("--system: needs a text; leave it out for none")
    return Context(system, () if examples is None else tuple(_read_examples(Path(examples))))


def _read_examples(path: Path) -> list[dict[str, Any]]:
    listed = []
    for where, record in read_records(path):
        if "messages" in record:
            if any(message["role"] == "system" for message in record["messages"]):
                raise DataError(f"{where}: a system message in an example; give it with --system")
            if record["messages"][-1]["role"] != "assistant":
                raise DataError(f"{where}: an example ends with the assistant's message; add it")
            messages = [{"role": m["role"], "content": m["content"]} for m in record["messages"]]
            listed.append({"messages": messages})
        elif "prompt" in record:
            listed.append({"prompt": record["prompt"], "completion": record["completion"]})
        else:
            raise DataError(
                f'{where}: an example needs {{"prompt": …, "completion": …}} or {{"messages": […]}}'
            )
    return listed


def render(
    prompt: Mapping[str, Any],
    tokenizer: Any,
    rendering: str,
    where: str,
    context: Context = NO_CONTEXT,
) -> list[int]:
    """A prompt's token ids after those of the context, by the chat template or as plain text.

    Raises
    ------
    UsageError
        Chat asked of a tokenizer without a template.
    DataError
        Several messages where plain text is asked for, two system messages, or a prompt of no tokens.
    """
    messages = json.loads(prompt["messages"]) if prompt["messages"] else None
    if rendering == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("--template chat: the tokenizer has no chat template; use plain")
        messages = messages or [{"role": "user", "content": prompt["text"]}]
        text = chat_text(messages, tokenizer, where, context)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        if messages and len(messages) > 1:
            raise DataError(f"{where}: several messages need --template chat, or a text")
        if any("messages" in example for example in context.examples):
            raise DataError(
                "--examples: messages need --template chat; for plain text write "
                '{"prompt": …, "completion": …}'
            )
        text = messages[0]["content"] if messages else prompt["text"]
        ids = tokenizer(context.text() + text)["input_ids"]
    if not ids:
        raise DataError(f"{where}: the tokenizer makes no token of it")
    return [int(i) for i in ids]


def chat_text(messages: list[Message], tokenizer: Any, where: str, context: Context) -> str:
    """The text of a conversation after the context's, by the chat template, up to the answer.

    Raises
    ------
    DataError
        Two system messages, or roles that the template refuses.
    """
    before = context.messages()
    if before and messages[0]["role"] == "system":
        raise DataError(
            f"{where}: its messages begin with a system message, which --system and --examples "
            "would stand before; take it out, or leave these options out"
        )
    try:
        return tokenizer.apply_chat_template(
            [*before, *messages], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template may raise anything on roles it does not know
        raise DataError(f"{where}: the chat template refuses it: {error}") from None


def leading_ids(tokenizer: Any) -> list[int]:
    """The token ids that a tokenizer puts before a text by itself."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return [int(i) for i in whole[:at]]
