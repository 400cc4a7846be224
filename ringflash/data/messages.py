"""Messages in the form that chat templates expect, whichever form a record has them in.

role and content    as in OpenAI's and TRL's records; from and value, as in ShareGPT's
content in parts    joined: many templates read no lists, and render nothing or Python's spelling of the list
thinking            under all THOUGHTS, since a template renders only the names that it knows
arguments of calls  as objects: OpenAI's records have them as text, which templates would quote again
flags of training   as one WEIGHT, whatever their name
"""

from __future__ import annotations

import json
from typing import Any

from ringflash.data.formats import RecordError

WEIGHT = "weight"  # of an assistant's message: 0 (not trained on) or 1
FLAGS = (WEIGHT, "train", "training", "loss", "trainable")  # of OpenAI, Axolotl (twice), ms-swift and XTuner, tinker
PARTIAL = ("train_detail", "training_detail", "loss_scale")  # of a part of a message, or a fraction: not supported
PLAIN = {"role", "content", WEIGHT}  # of a message without tool calls or thinking
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # read by Qwen 3's template, Gemma 4's, gpt-oss's
INSTRUCTION, INPUT, OUTPUT, HISTORY = "instruction", "input", "output", "history"  # of Alpaca's records
CALLS = ("function_call", "tool_call")  # roles of the assistant whose content is the JSON of a call
OBSERVATION = "observation"
ROLES = {  # of ShareGPT, whose messages have `from` and `value`, of ms-swift and Gemini; and what templates call them
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **dict.fromkeys((*CALLS, "gpt", "model"), "assistant"),
    **dict.fromkeys((OBSERVATION, "tool_response"), "tool"),
    "human": "user",
}


def message_of(place: str, message: dict[str, Any]) -> dict[str, Any]:
    """A message with role and content. Raises RecordError, which begins with `place`."""
    message = _with_call(_with_role(place, message))
    message = {key: x for key, x in message.items() if key == "content" or x not in (None, [])}
    message = _with_weight(place, message)
    content = message.get("content")
    if content is None and "tool_calls" not in message:
        empty = "holds content=null, and no tool_calls" if "content" in message else "has no content"
        raise RecordError(f"{place} {empty}; it has {', '.join(map(str, message))}")
    if not isinstance(content := _joined(place, content), str | None):
        raise RecordError(f"{place} holds content={content!r:.60}, not text; give an object as JSON text")
    return {**message, "content": content, **_with_objects(place, message), **_with_thoughts(message)}


def messages_of_turns(where: str, record: dict[str, Any], answer: str) -> list[dict[str, Any]]:
    """The messages of a record in Alpaca's form, the last of which is in the field `answer`."""
    asked = [record[INSTRUCTION], record.get(INPUT)]
    history = record.get(HISTORY) or []
    if not isinstance(history, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in history
    ):
        raise RecordError(f"{where}: {HISTORY} holds {history!r:.60}, not a list of pairs of a question and its answer")
    turns = [*history, ["\n".join(text for text in asked if isinstance(text, str) and text), record[answer]]]
    for name, value in ((INSTRUCTION, asked[0]), (INPUT, asked[1] or ""), (answer, record[answer])):
        if not isinstance(value, str):
            raise RecordError(f"{where}: {name} holds {value!r:.60}, not text")
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def thinking(message: dict[str, Any]) -> str:
    """The thinking of a message; "" if there is none."""
    found = next((message[name] for name in THOUGHTS if message.get(name)), "")
    return found if isinstance(found, str) else ""


def names_of(called: Any) -> list[str]:
    """The names in tools or in tool calls."""
    functions = [x.get("function", x) for x in called or [] if isinstance(x, dict)]
    names = [x.get("name") for x in functions if isinstance(x, dict)]
    return [name for name in names if isinstance(name, str)]


def from_json(value: Any) -> Any:
    """A value that a table holds as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def messages_from_json(value: Any) -> Any:
    """Messages, where there is one, or a table holds them as JSON text. Other text is that of a prompt or an answer."""
    found = [value] if isinstance(value, dict) else from_json(value)
    listed = isinstance(found, list) and all(isinstance(x, dict) and {"role", "from"} & x.keys() for x in found)
    return found if listed and found else value


def _joined(place: str, content: Any) -> Any:
    """Content as text, where it is in parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RecordError(f"{place} holds content of the type {kind}; only text is supported")
        texts.append(part["text"])
    return "".join(texts)


def _with_weight(place: str, message: dict[str, Any]) -> dict[str, Any]:
    """A message with one WEIGHT instead of all FLAGS, if it has any. Raises RecordError for flags that are not met."""
    if (partial := next((name for name in PARTIAL if name in message), None)) is not None:
        raise RecordError(f"{place} has {partial}; only whole messages are left out, by {WEIGHT} 0 or train false")
    flags = {name: message[name] for name in FLAGS if name in message}
    if not flags:
        return message
    shown = " and ".join(f"{name}={flag!r:.60}" for name, flag in flags.items())
    if any(flag not in (0, 1) for flag in flags.values()):
        raise RecordError(f"{place} has {shown}; it must be 0 or false (not trained on), or 1 or true")
    if len({*map(bool, flags.values())}) > 1:
        raise RecordError(f"{place} has {shown}, which contradict each other: keep one")
    if message["role"] != "assistant" and any(flags.values()):
        raise RecordError(
            f"{place} has {shown} and the role {message['role']}: only the assistant's messages are trained on"
        )
    rest = {name: value for name, value in message.items() if name not in FLAGS}
    return {**rest, WEIGHT: int(any(flags.values()))}


def _with_thoughts(message: dict[str, Any]) -> dict[str, Any]:
    thought = thinking(message)
    return dict.fromkeys(THOUGHTS, thought) if thought else {}


def _with_role(place: str, message: dict[str, Any]) -> dict[str, Any]:
    """A message with role and content, and with the role's usual name.

    A role `observation` stays as it is: GLM 4's template reads it.
    """
    of_sharegpt = "role" not in message and {"from", "value"} <= {*message}
    if of_sharegpt:
        rest = {key: value for key, value in message.items() if key not in ("from", "value")}
        message = {"role": message["from"], "content": message["value"], **rest}
    role = message.get("role")
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if of_sharegpt and known is None:
        raise RecordError(f"{place} is from {role!r:.60}, which is not one of {', '.join(ROLES)}")
    if not isinstance(role, str):
        raise RecordError(f"{place} has no role; it has {', '.join(map(str, message)) or 'nothing'}")
    if role.lower() in CALLS:
        return {**message, "role": known, "content": None, "tool_calls": _calls(place, role, message.get("content"))}
    return {**message, "role": known} if known and (of_sharegpt or role != OBSERVATION) else message


def _with_call(message: dict[str, Any]) -> dict[str, Any]:
    """A message of OpenAI's earlier form with tool_calls, or as the result of one."""
    if isinstance(call := from_json(message.get("function_call")), dict) and not message.get("tool_calls"):
        rest = {key: value for key, value in message.items() if key != "function_call"}
        return {"content": None, **rest, "tool_calls": [{"type": "function", "function": call}]}
    return {**message, "role": "tool"} if message.get("role") == "function" else message


def _calls(place: str, role: str, value: Any) -> list[dict[str, Any]]:
    """tool_calls of the JSON of one call or of a list of them."""
    found = from_json(value)
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and {"name", "arguments"} <= {*call} for call in calls):
        raise RecordError(
            f"{place} is from {role} and holds {value!r:.60}; it must be the JSON of a call with its name and "
            f"arguments, or of a list of calls"
        )
    return [{"type": "function", "function": call} for call in calls]


def _with_objects(place: str, message: dict[str, Any]) -> dict[str, Any]:
    """tool_calls whose arguments are objects."""
    calls = from_json(message.get("tool_calls"))
    if not isinstance(calls, list):
        return {}
    return {"tool_calls": [_with_object(place, call) for call in calls]}


def _with_object(place: str, call: Any) -> Any:
    """A call of a function whose arguments are an object.

    Text that is no JSON stays, as the input of a tool that takes text.
    """
    if isinstance(call, dict) and "function" not in call and {"name", "arguments"} <= call.keys():
        call = {"type": "function", "function": call}
    if not isinstance(call, dict) or not isinstance(called := call.get("function"), dict):
        return call
    given = called.get("arguments")
    arguments = from_json(given) if given != "" else {}
    if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
        raise RecordError(f"{place} calls {called.get('name')} with arguments that are not JSON: {arguments!r:.60}")
    return {**call, "function": {**called, "arguments": arguments}} if isinstance(arguments, dict) else call
