"""What a request may not say although its types allow it, each refused with the field that says it.

Here and not in the request's own class, by which jobs of earlier versions are read as well.
"""

import re
from collections.abc import Iterator

from d2lora.errors import ProblemItem, RequestInvalid
from d2lora.initializations import InitializationSpec


def check_text(spec: InitializationSpec) -> None:
    """Raise unless all that the request says is text that databases, answers and file systems can hold."""
    for pointer, text in _texts(spec.model_dump(), "#"):
        if "\0" in text or not _is_text(text):
            raise _refused(pointer, "holds a null character or half of a surrogate pair, which is no text")


def check_target_modules(spec: InitializationSpec) -> None:
    """Raise unless ``target_modules`` names something in a way that PEFT understands."""
    named = spec.lora.target_modules
    if not named:
        raise _refused("#/lora/target_modules", "is empty; leave it out for all linear layers")
    if isinstance(named, str):
        try:
            re.compile(named)
        except (re.error, RecursionError, OverflowError) as error:
            raise _refused("#/lora/target_modules", f"is not a regular expression: {error}") from error


def _texts(value: object, pointer: str) -> Iterator[tuple[str, str]]:
    """Yield every string inside, keys of objects too, with where it is."""
    match value:
        case str():
            yield pointer, value
        case list():
            for index, item in enumerate(value):
                yield from _texts(item, f"{pointer}/{index}")
        case dict():
            for name, item in value.items():
                yield pointer, name
                yield from _texts(item, f"{pointer}/{name}")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refused(pointer: str, what: str) -> RequestInvalid:
    detail = f"{pointer.removeprefix('#/').replace('/', '.')}: {what}"
    return RequestInvalid(detail, errors=[ProblemItem(detail=detail, pointer=pointer)])
